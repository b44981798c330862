//! One rank of a layout: a thread that executes steps in the order in which they are issued.

use crate::bench::rows::{Sequences, Work, fill_cache};
use anyhow::{Context, Result};
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_model::{KvCache, StageInput, StageModel, Workspace};
use ashlar_shard_node::links::Links;
use ashlar_vocabulary::StepId;
use serde::Serialize;
use std::hint::black_box;
use std::ops::AddAssign;
use std::sync::mpsc;
use std::time::Instant;

/// What reaches a rank's thread.
#[derive(Debug, Clone, Copy)]
pub(super) enum Command {
    /// Execute a step.
    Step(Issue),
    /// Rows for its slice of the head have arrived.
    HeadRows,
}

/// A step for every rank of a layout.
#[derive(Debug, Clone, Copy)]
pub(super) struct Issue {
    /// Consecutive over the life of the layout.
    pub(super) step: u64,
    /// What to compute.
    pub(super) work: Work,
}

/// A rank has executed a step, or cannot.
#[derive(Debug)]
pub(super) struct Done {
    /// Which rank of the layout.
    pub(super) rank: usize,
    /// Which step.
    pub(super) step: u64,
    /// How long it took, or what went wrong.
    pub(super) spent: Result<Spent>,
}

/// Where a rank's time went, in microseconds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spent {
    /// Computing, the head included.
    pub(crate) compute_us: f64,
    /// Of which the head.
    pub(crate) head_us: f64,
    /// Exchanging within the group or for a spread head, waiting for slower ranks included.
    pub(crate) collective_us: f64,
    /// Waiting for the stage before.
    pub(crate) wait_us: f64,
    /// Handing activations on.
    pub(crate) send_us: f64,
    /// Without a step to execute.
    pub(crate) idle_us: f64,
}

impl AddAssign for Spent {
    fn add_assign(&mut self, other: Spent) {
        self.compute_us += other.compute_us;
        self.head_us += other.head_us;
        self.collective_us += other.collective_us;
        self.wait_us += other.wait_us;
        self.send_us += other.send_us;
        self.idle_us += other.idle_us;
    }
}

impl Spent {
    /// Every part times `factor`.
    pub(crate) fn scaled(self, factor: f64) -> Spent {
        Spent {
            compute_us: self.compute_us * factor,
            head_us: self.head_us * factor,
            collective_us: self.collective_us * factor,
            wait_us: self.wait_us * factor,
            send_us: self.send_us * factor,
            idle_us: self.idle_us * factor,
        }
    }
}

/// A rank's share of the model with its buffers and links.
#[derive(Debug)]
pub(super) struct Rank {
    index: usize,
    model: StageModel,
    cache: KvCache,
    work: Workspace,
    input: Vec<f32>,
    sequences: Sequences,
    links: Links,
}

impl Rank {
    /// Reserves cache and buffers.
    pub(super) fn new(
        index: usize,
        model: StageModel,
        sequences: Sequences,
        rows_max: usize,
        links: Links,
    ) -> Rank {
        let mut cache = model.kv_cache(sequences.blocks());
        fill_cache(&mut cache, model.slice().layers.len());
        Rank { index, work: model.workspace(rows_max), cache, model, input: Vec::new(), sequences, links }
    }

    /// Executes steps until no more can come or one fails.
    pub(super) fn serve(mut self, commands: &mpsc::Receiver<Command>, done: &mpsc::Sender<Done>) {
        let mut free = Instant::now();
        while let Ok(command) = commands.recv() {
            let issue = match command {
                Command::Step(issue) => issue,
                Command::HeadRows => match self.serve_head() {
                    Ok(()) => continue,
                    // The rank that samples waits in vain, says so and ends the run.
                    Err(_) => return,
                },
            };
            // Between steps it may have worked for the head.
            let head_us = self.take_head_us();
            let idle_us = micros(free) - head_us;
            let spent = self.execute(issue).map(|spent| Spent {
                idle_us,
                compute_us: spent.compute_us + head_us,
                head_us: spent.head_us + head_us,
                ..spent
            });
            free = Instant::now();
            let failed = spent.is_err();
            if done.send(Done { rank: self.index, step: issue.step, spent }).is_err() || failed {
                return;
            }
        }
    }

    /// Computes its slice of the head for rows that have arrived.
    fn serve_head(&mut self) -> Result<()> {
        match &mut self.links.head_service {
            Some(service) => service.serve(&self.model).context("lost the rank that samples"),
            None => Ok(()),
        }
    }

    /// Time spent for the head of other ranks since the last call.
    fn take_head_us(&mut self) -> f64 {
        self.links.head_service.as_mut().map_or(0.0, |service| service.take_spent().as_secs_f64() * 1e6)
    }

    fn execute(&mut self, issue: Issue) -> Result<Spent> {
        let started = Instant::now();
        self.serve_head()?;
        let (shape, step) = (&self.model.config().shape, StepId(issue.step));
        let kernels = self.model.kernels();
        let (rows, tokens) = self.sequences.rows(&issue.work, shape);
        let mut spent = Spent::default();
        let Links { previous, next, group, head_service, head_ranks } = &mut self.links;
        let input = match previous {
            None => StageInput::Tokens(&tokens),
            Some(previous) => {
                self.input.resize(rows.len() * shape.hidden_size, 0.0);
                let received = previous.receive(kernels, step, &mut self.input, &mut || Ok(()));
                received.context("lost the stage before")?;
                spent.wait_us = micros(started);
                StageInput::Activations(&self.input)
            }
        };
        group.begin(step);
        head_ranks.begin(step);
        let mut served = Ok(());
        self.model.forward(&rows, input, &mut self.cache, group, &mut self.work, &mut || {
            if let (Some(service), Ok(())) = (head_service.as_mut(), &served) {
                served = service.serve(&self.model);
            }
        })?;
        served.context("lost the rank that samples")?;
        if let Some(next) = next {
            let sending = Instant::now();
            let activations = self.work.activations(rows.len());
            next.send(kernels, step, activations).context("lost the next stage")?;
            spent.send_us = micros(sending);
        }
        if self.model.slice().last {
            let (heading, before) = (Instant::now(), group.spent());
            for chunk in issue.work.logit_rows().chunks(LOGIT_ROWS_MAX) {
                black_box(self.model.logits(chunk, group, head_ranks, &mut self.work)?);
            }
            let exchanging = group.spent() - before + head_ranks.spent();
            spent.head_us = micros(heading) - exchanging.as_secs_f64() * 1e6;
        }
        spent.collective_us = (group.spent() + head_ranks.spent()).as_secs_f64() * 1e6;
        spent.compute_us = micros(started) - spent.wait_us - spent.send_us - spent.collective_us;
        spent.head_us += self.take_head_us();
        Ok(spent)
    }
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
