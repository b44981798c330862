//! A rank's computing in a session: steps, and measurements of the validation data.
//!
//! Micro-batches go through the stages in 1F1B order: a stage begins as many forward passes as there are stages behind it, then
//! takes turns, backward and forward. Backward passes come in the order of the micro-batches on every stage, so a gradient is
//! one chain over the samples in their order, whatever the number of stages.

use super::alarm::{Alarm, Ended};
use super::data::{Micro, MicroPlan, SessionData};
use super::error::SessionError;
use super::facts::{self, Facts};
use super::links::{Links, StageLink};
use ashlar_dataset::plan::Schedule;
use ashlar_kernels::Kernels;
use ashlar_model::adapter::Adapter;
use ashlar_model::stage::{BatchLoss, ForwardError, StageTape, StageTrainer};
use ashlar_model::{Collective as _, CollectiveError, StageInput, Tensors, Trained};
use ashlar_protocol::training::{StepMetrics, TrainingTiming};
use ashlar_training::{Hyperparameters, NormTerms, RunTree, TrainingState, gradient_norm, settle};
use ashlar_vocabulary::StepId;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a session computes with.
pub(super) struct Engine {
    pub(super) kernels: Arc<Kernels>,
    pub(super) trainer: StageTrainer,
    pub(super) state: TrainingState,
    pub(super) tree: RunTree,
    pub(super) links: Links,
    pub(super) data: SessionData,
    pub(super) alarm: Alarm,
    pub(super) course: Course,
    /// Stages behind this one.
    pub(super) stages_behind: usize,
    pub(super) replica: usize,
    pub(super) replicas: usize,
    pub(super) keep: bool,
    /// Pieces of work so far: labels the exchanges of the group.
    pub(super) pieces: u64,
    /// Rows as they arrive, and gradients on their way.
    pub(super) rows: Vec<f32>,
    pub(super) timing: Timing,
}

/// How the weights move.
pub(super) struct Course {
    pub(super) learning_rate: f64,
    pub(super) schedule: Schedule,
    pub(super) steps: u64,
    pub(super) with: Hyperparameters,
}

/// How the present piece of work is being spent.
#[derive(Debug, Default)]
pub(super) struct Timing {
    wait: Duration,
    exchange: Duration,
}

/// A micro-batch between its forward and its backward pass.
struct InFlight {
    micro: Micro,
    run: usize,
    tape: StageTape,
}

impl Engine {
    /// Computes a step and takes it, unless its loss or gradient is no number.
    pub(super) fn step(&mut self, step: u64) -> Result<(StepMetrics, TrainingTiming), SessionError> {
        let started = self.begin();
        let plan = self.data.step(step, self.replica, self.replicas)?;
        let Some(plan) = plan else {
            return Err(SessionError::Refused(format!("the job has no step {step}")));
        };
        let factor = 1.0 / plan.targets as f32;
        let mut loss = BatchLoss::default();
        let mut open_run = plan.runs.start;
        let mut flight: VecDeque<InFlight> = VecDeque::new();
        for micro in &plan.micros {
            flight.push_back(self.forward(micro, self.keep, false)?);
            if flight.len() > self.stages_behind
                && let Some(first) = flight.pop_front()
            {
                loss = loss.and(self.backward(first, factor, &mut open_run)?);
            }
        }
        while let Some(first) = flight.pop_front() {
            loss = loss.and(self.backward(first, factor, &mut open_run)?);
        }
        (open_run..plan.runs.end).for_each(|_| self.tree.end_run(&self.kernels));
        let sums = self.tree.take();
        let gradient = self.gradient(sums)?;
        let (loss, norm) = self.agree(loss, &gradient)?;
        let skipped = plan.targets == 0 || loss.not_finite > 0 || !norm.is_finite();
        let learning_rate = self.course.learning_rate * self.course.schedule.factor(step, self.course.steps);
        if !skipped {
            let (kernels, model) = (&self.kernels, self.trainer.model());
            let (shape, slice) = (&model.config().shape, model.slice());
            self.state.step(&gradient, norm, learning_rate as f32, &self.course.with, shape, slice, kernels);
            if let Trained::Model = self.state.trained() {
                self.trainer.reload(self.state.weights())?;
            }
        }
        self.tree.recycle(gradient);
        let metrics = StepMetrics {
            loss: loss.mean(),
            accuracy: loss.correct as f64 / loss.targets as f64,
            learning_rate,
            gradient_norm: norm,
            targets: loss.targets as u64,
            tokens: plan.rows,
            skipped,
        };
        Ok((metrics, self.timing(started)))
    }

    /// Mean loss of the validation data, and the share of its targets that were the most probable token.
    pub(super) fn evaluate(&mut self) -> Result<(f64, f64), SessionError> {
        self.begin();
        if !self.data.is_validated() {
            return Err(SessionError::Refused("the job has no validation data to measure".into()));
        }
        let mut loss = BatchLoss::default();
        for plan in self.data.validation(self.replica, self.replicas) {
            let done = self.forward(&plan, false, true)?;
            if self.is_last() {
                loss = loss.and(self.loss(&done.micro, 0.0, false)?);
            }
        }
        let loss = self.relay(Vec::new(), loss)?.loss;
        let loss = self.links.replicas.sum_loss(loss)?;
        let mean = if loss.not_finite > 0 { f64::NAN } else { loss.mean() };
        Ok((mean, loss.correct as f64 / loss.targets as f64))
    }

    fn is_last(&self) -> bool {
        self.links.next.is_none()
    }

    fn begin(&mut self) -> Instant {
        self.pieces += 1;
        self.links.group.begin(StepId(self.pieces));
        self.timing = Timing::default();
        Instant::now()
    }

    fn timing(&self, started: Instant) -> TrainingTiming {
        let (wait, exchange) = (self.timing.wait, self.timing.exchange + self.links.group.spent());
        let compute = started.elapsed().saturating_sub(wait + exchange);
        let us = |time: Duration| time.as_micros() as u64;
        TrainingTiming {
            compute_us: us(compute),
            wait_us: us(wait),
            exchange_us: us(exchange),
            durable_us: 0,
        }
    }

    /// A micro-batch through this stage.
    fn forward(&mut self, plan: &MicroPlan, keep: bool, validation: bool) -> Result<InFlight, SessionError> {
        let micro = self.data.read(plan, validation)?;
        let Engine { kernels, trainer, state, links, alarm, rows, timing, .. } = self;
        let hidden = trainer.model().config().shape.hidden_size;
        let input = match &mut links.previous {
            None => StageInput::Tokens(&micro.tokens),
            Some(previous) => {
                rows.resize(micro.batch.rows() * hidden, 0.0);
                let waiting = Instant::now();
                previous.receive_rows(kernels, rows)?;
                timing.wait += waiting.elapsed();
                StageInput::Activations(rows)
            }
        };
        let adapter: Option<&Adapter> = state.packed().map(|adapter| &**adapter);
        let beat = &mut || stop(alarm);
        let pass = trainer.forward(&micro.batch, input, adapter, keep, &mut links.group, beat);
        let tape = pass.map_err(|error| because(alarm, error))?;
        if let Some(next) = &mut links.next {
            next.send_rows(kernels, trainer.activations(micro.batch.rows()))?;
        }
        Ok(InFlight { run: plan.run, micro, tape })
    }

    /// The loss of the micro-batch that went through the last stage last; its gradient is in `rows`. Where it `trains`, the head
    /// learns of it.
    fn loss(&mut self, micro: &Micro, factor: f32, trains: bool) -> Result<BatchLoss, SessionError> {
        let Engine { trainer, tree, links, alarm, rows, .. } = self;
        let sink = trains.then(|| tree.current());
        let done = trainer.loss(&micro.targets, factor, micro.batch.rows(), sink, &mut links.group);
        let (loss, gradient) = done.map_err(|error| because(alarm, error))?;
        rows.clear();
        rows.extend_from_slice(gradient);
        Ok(loss)
    }

    /// A micro-batch back through this stage; ends the runs before its own.
    fn backward(
        &mut self,
        first: InFlight,
        factor: f32,
        open_run: &mut usize,
    ) -> Result<BatchLoss, SessionError> {
        while *open_run < first.run {
            self.tree.end_run(&self.kernels);
            *open_run += 1;
        }
        let mut loss = BatchLoss::default();
        if self.is_last() {
            loss = self.loss(&first.micro, factor, true)?;
        }
        let Engine { trainer, state, tree, links, alarm, rows, timing, .. } = self;
        if let Some(next) = &mut links.next {
            let hidden = trainer.model().config().shape.hidden_size;
            rows.resize(first.micro.batch.rows() * hidden, 0.0);
            let waiting = Instant::now();
            next.receive_gradients(rows)?;
            timing.wait += waiting.elapsed();
        }
        let adapter: Option<&Adapter> = state.packed().map(|adapter| &**adapter);
        let (sink, beat) = (tree.current(), &mut || stop(alarm));
        let group = &mut links.group;
        let pass = trainer.backward(&first.micro.batch, first.tape, adapter, rows, sink, group, beat);
        pass.map_err(|error| because(alarm, error))?;
        if let Some(previous) = &mut links.previous {
            previous.send_gradients(rows)?;
        }
        Ok(loss)
    }

    /// The gradient by the weights from a replica's sums: those of all replicas, and what comes together at the end of a batch.
    fn gradient(&mut self, mut sums: Tensors) -> Result<Tensors, SessionError> {
        let exchanging = Instant::now();
        let Engine { kernels, trainer, state, links, .. } = self;
        let Links { group, previous, next, replicas } = links;
        let of_group = group.spent();
        for tensor in sums.tensors_mut() {
            replicas.sum(kernels, tensor)?;
        }
        let model = trainer.model();
        let (shape, slice) = (&model.config().shape, model.slice());
        let table = slice.vocabulary(shape).len() * shape.hidden_size;
        let is_tied = *state.trained() == Trained::Model && shape.tied_head && !(slice.first && slice.last);
        let mut other_end = |own: &mut [f32]| exchange_ends(previous.as_mut(), next.as_mut(), table, own);
        let other_end = is_tied.then_some(&mut other_end as _);
        let gradient = settle(sums, state.weights().layout(), kernels, group, other_end)?;
        // The group keeps its own account of the time it takes.
        let of_group = group.spent().saturating_sub(of_group);
        self.timing.exchange += exchanging.elapsed().saturating_sub(of_group);
        Ok(gradient)
    }

    /// Sums the loss over the replicas; every rank of the session learns the whole loss and the whole gradient's norm.
    fn agree(&mut self, loss: BatchLoss, gradient: &Tensors) -> Result<(BatchLoss, f64), SessionError> {
        let terms = NormTerms::of(gradient, self.trainer.model().slice(), &self.kernels);
        let mut own = Vec::new();
        facts::encode_terms(&terms, &mut own);
        let group = &mut self.links.group;
        let mut all = vec![0.0; own.len() * group.size()];
        if group.size() > 1 {
            group.all_gather(&own, &mut all)?;
        } else {
            all = own.clone();
        }
        let of_ranks: Option<Vec<NormTerms>> = match own.len() {
            0 => Some(Vec::new()),
            length => all.chunks_exact(length).map(facts::decode_terms).collect(),
        };
        let corrupt = || CollectiveError { rank: 0, reason: "it sent something else than its norm".into() };
        let facts = self.relay(of_ranks.ok_or_else(corrupt)?, loss)?;
        let exchanging = Instant::now();
        let loss = self.links.replicas.sum_loss(facts.loss)?;
        self.timing.exchange += exchanging.elapsed();
        Ok((loss, gradient_norm(&facts.terms)))
    }

    /// Adds what this stage knows to what those before it do, and learns the whole from those behind it.
    fn relay(&mut self, terms: Vec<NormTerms>, loss: BatchLoss) -> Result<Facts, SessionError> {
        let waiting = Instant::now();
        let Links { previous, next, .. } = &mut self.links;
        let mut facts = match previous.as_mut() {
            Some(previous) => previous.receive_facts()?,
            None => Facts::default(),
        };
        facts.terms.push(terms);
        facts.loss = loss;
        if let Some(next) = next {
            next.send_facts(&facts)?;
            facts = next.receive_facts()?;
        }
        previous.as_mut().map_or(Ok(()), |previous: &mut StageLink| previous.send_facts(&facts))?;
        self.timing.wait += waiting.elapsed();
        Ok(facts)
    }
}

/// Exchanges what the first and the last stage have of a tied table, over the stages between them.
fn exchange_ends(
    previous: Option<&mut StageLink>,
    next: Option<&mut StageLink>,
    table: usize,
    own: &mut [f32],
) -> Result<(), SessionError> {
    match (previous, next) {
        (None, Some(next)) => {
            next.send_table(own)?;
            next.receive_table(own)
        }
        (Some(previous), None) => {
            let mut theirs = vec![0.0; own.len()];
            previous.receive_table(&mut theirs)?;
            previous.send_table(own)?;
            own.copy_from_slice(&theirs);
            Ok(())
        }
        (Some(previous), Some(next)) => {
            let mut passing = vec![0.0; table];
            previous.receive_table(&mut passing)?;
            next.send_table(&passing)?;
            next.receive_table(&mut passing)?;
            previous.send_table(&passing)
        }
        (None, None) => Ok(()),
    }
}

/// Ends a pass between two layers.
fn stop(alarm: &Alarm) -> Result<(), ForwardError> {
    alarm.probe().map_err(|_| ForwardError::Stopped)
}

/// Why a pass ended: what raised the alarm, if that is it.
fn because(alarm: &Alarm, error: ForwardError) -> SessionError {
    match alarm.check() {
        Err(Ended(reason)) => SessionError::Ended(reason),
        Ok(()) => error.into(),
    }
}
