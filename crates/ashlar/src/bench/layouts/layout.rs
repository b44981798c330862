//! A layout that runs: its ranks' threads, and the window of steps in flight.

use super::measure::Plan;
use super::rank::{Command, Done, Issue, Rank, Spent};
use super::wiring::{self, Place, Port};
use crate::bench::rows::Work;
use anyhow::{Context, Result, anyhow};
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::{RankSlice, StageModel};
use ashlar_shard_node::head::Wake;
use ashlar_shard_node::links::{LinkBreaker, LinkSettings};
use ashlar_vocabulary::Bytes;
use std::cell::Cell;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A way of cutting the model over the threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One rank with all threads.
    One,
    /// Two tensor-parallel ranks with half the threads each.
    TensorParallel,
    /// Two stages with half the threads each, the first with so many layers.
    Stages {
        /// Layers of the first stage.
        cut: usize,
        /// Whether both compute half of the head.
        spread_head: bool,
    },
}

impl Kind {
    /// For people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Kind::One => "one rank",
            Kind::TensorParallel => "two ranks",
            Kind::Stages { spread_head: false, .. } => "two stages",
            Kind::Stages { spread_head: true, .. } => "two stages, head in both",
        }
    }
}

/// What one run of steps took.
#[derive(Debug, Clone)]
pub(super) struct Timed {
    /// From the completion that ends the warm-up to the last one counted.
    pub(super) seconds: f64,
    /// The counted steps' times, rank by rank.
    pub(super) ranks: Vec<Spent>,
}

/// What all ranks of a layout have alike.
#[derive(Debug, Clone, Copy)]
pub(super) struct RankSetup {
    /// Compute threads of each.
    pub(super) threads: usize,
    /// Their instruction set.
    pub(super) isa: Isa,
    /// How they exchange.
    pub(super) links: LinkSettings,
}

/// Ranks at work.
#[derive(Debug)]
pub(super) struct Running {
    kind: Kind,
    issue: Vec<mpsc::Sender<Command>>,
    done: mpsc::Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
    breaker: LinkBreaker,
    /// The next step's number.
    next_step: Cell<u64>,
}

/// A rank that falls silent for so long is lost: no single step takes nearly as long.
const SILENCE_MAX: Duration = Duration::from_secs(600);

impl Running {
    /// Loads rank after rank, then connects them all.
    pub(super) fn start(
        kind: Kind,
        directory: &Path,
        slices: Vec<RankSlice>,
        each: RankSetup,
        plan: &Plan,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<Running> {
        let precision = plan.precision();
        let mut models = Vec::with_capacity(slices.len());
        let mut before = Bytes(0);
        for slice in &slices {
            let kernels = Arc::new(Kernels::new(each.isa, each.threads));
            let model =
                StageModel::load(directory, precision, slice.clone(), kernels, &mut |loaded, total| {
                    // The slices are about equal, so the first one tells how long the others will take.
                    progress(before + loaded, total * slices.len() as u64);
                })?;
            before += model.bytes();
            models.push(model);
        }
        let ports = slices.iter().map(|_| Port::open()).collect::<Result<Vec<Port>>>()?;
        let addresses: Vec<String> = ports.iter().map(|port| port.address().to_owned()).collect();
        let breaker = LinkBreaker::default();
        let (report, done) = mpsc::channel();
        let (ready, readiness) = mpsc::channel();
        let (mut issue, mut threads) = (Vec::new(), Vec::new());
        for (rank, (model, port)) in models.into_iter().zip(ports).enumerate() {
            let place = match kind {
                Kind::One | Kind::TensorParallel => {
                    Place { stage: 0, precision, group: addresses.clone(), next: None, sampler: None }
                }
                Kind::Stages { spread_head, .. } => {
                    let next = addresses.get(rank + 1).cloned();
                    let sampler = next.clone().filter(|_| spread_head);
                    Place { stage: rank, precision, group: vec![addresses[rank].clone()], next, sampler }
                }
            };
            let (sender, commands) = mpsc::channel();
            issue.push(sender.clone());
            let wake = Wake::new(move || {
                // A rank that has ended needs no waking.
                let _ = sender.send(Command::HeadRows);
            });
            let (breaker, report, ready) = (breaker.clone(), report.clone(), ready.clone());
            let (sequences, rows_max) = (plan.sequences().clone(), plan.rows_max());
            let body = move || {
                // The last to hold `wake` is the link: a rank's queue ends with its senders.
                let holds = (model.slice(), &model.config().shape);
                let links = wiring::connect(port, holds, place, each.links, &breaker, wake);
                match links.map(|links| Rank::new(rank, model, sequences, rows_max, links)) {
                    Err(error) => drop(ready.send(Err(error))),
                    Ok(rank) => {
                        let told = ready.send(Ok(()));
                        drop(ready);
                        if told.is_ok() {
                            rank.serve(&commands, &report);
                        }
                    }
                }
            };
            let named = std::thread::Builder::new().name(format!("rank-{rank}"));
            threads.push(named.spawn(body).context("cannot start a thread")?);
        }
        drop(ready);
        let running = Running { kind, issue, done, threads, breaker, next_step: Cell::new(1) };
        for _ in 0..running.threads.len() {
            readiness.recv().context("a rank ended while it was connected")??;
        }
        Ok(running)
    }

    /// Which layout this is.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Number of ranks.
    pub(super) fn ranks(&self) -> usize {
        self.issue.len()
    }

    /// Executes steps with at most `in_flight` of them issued and not yet back; step *n* is `work(n)` and is issued when
    /// step *n − in_flight* is back. The clock runs over `counted` steps with a full pipeline: after `in_flight` that
    /// fill it, and before the last that drain it.
    pub(super) fn steady(
        &self,
        in_flight: usize,
        counted: usize,
        work: impl Fn(usize) -> Work,
    ) -> Result<Timed> {
        let total = in_flight + counted + in_flight - 1;
        self.execute(total, in_flight, in_flight..in_flight + counted, work)
    }

    /// Executes `steps` steps from a standstill to the last result.
    pub(super) fn alone(
        &self,
        in_flight: usize,
        steps: usize,
        work: impl Fn(usize) -> Work,
    ) -> Result<Timed> {
        self.execute(steps, in_flight, 0..steps, work)
    }

    fn execute(
        &self,
        total: usize,
        in_flight: usize,
        counted: std::ops::Range<usize>,
        work: impl Fn(usize) -> Work,
    ) -> Result<Timed> {
        let first = self.next_step.get();
        self.next_step.set(first + total as u64);
        let last_rank = self.last_rank();
        let mut ranks = vec![Spent::default(); self.ranks()];
        let (mut started, mut ended) = (Instant::now(), Instant::now());
        let issue = |index: usize| -> Result<()> {
            let issue = Issue { step: first + index as u64, work: work(index) };
            self.issue.iter().try_for_each(|rank| rank.send(Command::Step(issue))).map_err(|_| self.failure())
        };
        for index in 0..in_flight.min(total) {
            issue(index)?;
        }
        for _ in 0..total * self.ranks() {
            let done = self.done.recv_timeout(SILENCE_MAX).map_err(|_| self.failure())?;
            let spent = done.spent.with_context(|| format!("{}, rank {}", self.kind.name(), done.rank))?;
            let index = (done.step - first) as usize;
            if done.rank == last_rank {
                let now = Instant::now();
                if index + 1 == counted.start {
                    started = now;
                }
                if index + 1 == counted.end {
                    ended = now;
                }
                if index + in_flight < total {
                    issue(index + in_flight)?;
                }
            }
            if counted.contains(&index) {
                ranks[done.rank] += spent;
            }
        }
        Ok(Timed { seconds: (ended - started).as_secs_f64(), ranks })
    }

    /// The rank whose result ends a step: rank 0 of the last stage.
    fn last_rank(&self) -> usize {
        match self.kind {
            Kind::One | Kind::TensorParallel => 0,
            Kind::Stages { .. } => self.ranks() - 1,
        }
    }

    /// What a rank said before it ended, if it did.
    fn failure(&self) -> anyhow::Error {
        self.done
            .try_iter()
            .find_map(|done| done.spent.err())
            .unwrap_or_else(|| anyhow!("{}: a rank stopped answering", self.kind.name()))
    }
}

impl Drop for Running {
    /// Ends the ranks and gives their memory back before another layout is loaded.
    fn drop(&mut self) {
        self.issue.clear();
        self.breaker.break_all();
        for thread in self.threads.drain(..) {
            // A rank that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}
