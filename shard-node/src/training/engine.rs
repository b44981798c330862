//! A rank's computing in a session: steps, and measurements of the validation data.
//!
//! Micro-batches go through the stages in 1F1B order: a stage begins as many forward passes as there are stages behind it, then
//! takes turns, backward and forward. Backward passes come in the order of the micro-batches on every stage, so a gradient is
//! one chain over the samples in their order, whatever the number of stages.
//!
//! Preferences need a micro-batch's log-probabilities under the model without the adapter, too: it goes through all stages
//! once more just before, over the same weights, and nothing but one number per answer is kept of that, on the last stage.

use super::alarm::{Alarm, Ended};
use super::data::{Micro, MicroPlan, SessionData};
use super::error::SessionError;
use super::facts::{self, Facts};
use super::links::{Links, StageLink};
use ashlar_kernels::Kernels;
use ashlar_model::adapter::Adapter;
use ashlar_model::stage::{BatchLoss, ForwardError, StageTape, StageTrainer};
use ashlar_model::{Collective as _, CollectiveError, StageInput, Tensors, Trained};
use ashlar_protocol::training::{Rewards, StepMetrics, TrainingTiming};
use ashlar_training::preference::{AnswerScore, answer_scores};
use ashlar_training::{
    Hyperparameters, NormTerms, Preference, RunTree, TrainingState, gradient_norm, settle,
};
use ashlar_vocabulary::random::dropout_key;
use ashlar_vocabulary::{Schedule, StepId};
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
    /// Where the samples are pairs of answers.
    pub(super) preference: Option<Preference>,
    /// Stages behind this one.
    pub(super) stages_behind: usize,
    /// The share of their inputs that adapters do not see in a step, and what decides which.
    pub(super) dropout: f32,
    pub(super) seed: u64,
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
    reference: Reference,
}

/// The answers' scores without the adapter: on the last stage, of preferences.
type Reference = Vec<AnswerScore>;

impl Engine {
    /// Computes a step and takes it, unless its loss or gradient is no number.
    pub(super) fn step(&mut self, step: u64) -> Result<(StepMetrics, TrainingTiming), SessionError> {
        let started = self.begin();
        let plan = self.data.step(step, self.replica, self.replicas)?;
        let Some(plan) = plan else {
            return Err(SessionError::Refused(format!("the job has no step {step}")));
        };
        // What the loss is a mean of.
        let count = if self.preference.is_some() { plan.samples } else { plan.targets };
        let mut loss = BatchLoss::default();
        let mut open_run = plan.runs.start;
        let mut flight: VecDeque<InFlight> = VecDeque::new();
        for micro in &plan.micros {
            flight.push_back(self.forward(step, micro)?);
            if flight.len() > self.stages_behind
                && let Some(first) = flight.pop_front()
            {
                loss = loss.and(self.backward(first, count, &mut open_run)?);
            }
        }
        while let Some(first) = flight.pop_front() {
            loss = loss.and(self.backward(first, count, &mut open_run)?);
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
            accuracy: loss.accuracy(),
            learning_rate,
            gradient_norm: norm,
            targets: plan.targets,
            tokens: plan.rows,
            skipped,
            rewards: self.preference.map(|_| {
                let [preferred, non_preferred] = loss.rewards.map(|sum| sum.value() / loss.weight.value());
                Rewards { preferred, non_preferred }
            }),
        };
        Ok((metrics, self.timing(started)))
    }

    /// Mean loss of the validation data, and the share of its targets that were the most probable token, or of its pairs with a
    /// positive margin.
    pub(super) fn evaluate(&mut self) -> Result<(f64, f64), SessionError> {
        self.begin();
        if !self.data.is_validated() {
            return Err(SessionError::Refused("the job has no validation data to measure".into()));
        }
        let mut loss = BatchLoss::default();
        for plan in self.data.validation(self.replica, self.replicas) {
            let micro = self.data.read(&plan, true)?;
            let reference = self.reference(&micro)?;
            self.measure(&micro, true)?;
            if self.is_last() {
                loss = loss.and(self.loss_alone(&micro, &reference)?);
            }
        }
        let loss = self.relay(Vec::new(), loss)?.loss;
        let loss = self.links.replicas.sum_loss(loss)?;
        let mean = if loss.not_finite > 0 { f64::NAN } else { loss.mean() };
        Ok((mean, loss.accuracy()))
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

    /// A micro-batch through this stage, on the way to its backward pass.
    fn forward(&mut self, step: u64, plan: &MicroPlan) -> Result<InFlight, SessionError> {
        let mut micro = self.data.read(plan, false)?;
        if self.dropout > 0.0 {
            let key = |&(sample, sequence): &(u32, u32)| dropout_key(self.seed, step, sample, sequence);
            let keys: Vec<[u32; 2]> = micro.sequences.iter().map(key).collect();
            micro.batch = micro.batch.with_dropout(self.dropout, &keys);
        }
        let reference = self.reference(&micro)?;
        self.receive_rows(&micro)?;
        let Engine { trainer, state, links, alarm, rows, keep, .. } = self;
        let input = input(links, &micro, rows);
        let (group, beat) = (&mut links.group, &mut || stop(alarm));
        let pass = trainer.forward(&micro.batch, input, adapter(state), *keep, group, beat);
        let tape = pass.map_err(|error| because(alarm, error))?;
        self.send_rows(&micro)?;
        Ok(InFlight { run: plan.run, micro, tape, reference })
    }

    /// A micro-batch through this stage with nothing kept, with the adapter or without.
    fn measure(&mut self, micro: &Micro, adapted: bool) -> Result<(), SessionError> {
        self.receive_rows(micro)?;
        let Engine { trainer, state, links, alarm, rows, .. } = self;
        let input = input(links, micro, rows);
        let adapter = if adapted { adapter(state) } else { None };
        let (group, beat) = (&mut links.group, &mut || stop(alarm));
        let pass = trainer.forward_only(&micro.batch, input, adapter, group, beat);
        pass.map_err(|error| because(alarm, error))?;
        self.send_rows(micro)
    }

    /// What the model without the adapter makes of a micro-batch's answers; nothing where there are no pairs of them.
    fn reference(&mut self, micro: &Micro) -> Result<Reference, SessionError> {
        if self.preference.is_none() {
            return Ok(Reference::new());
        }
        self.measure(micro, false)?;
        if !self.is_last() {
            return Ok(Reference::new());
        }
        let Engine { trainer, links, alarm, .. } = self;
        let scores = trainer.score(&micro.targets, &mut links.group);
        let scores = scores.map_err(|error| because(alarm, error))?;
        Ok(answer_scores(&micro.batch, &micro.targets, &scores))
    }

    /// The previous stage's rows, unless this is the first.
    fn receive_rows(&mut self, micro: &Micro) -> Result<(), SessionError> {
        let Engine { kernels, trainer, links, rows, timing, .. } = self;
        if let Some(previous) = &mut links.previous {
            rows.resize(micro.batch.rows() * trainer.model().config().shape.hidden_size, 0.0);
            let waiting = Instant::now();
            previous.receive_rows(kernels, rows)?;
            timing.wait += waiting.elapsed();
        }
        Ok(())
    }

    /// Rows on to the next stage, unless this is the last.
    fn send_rows(&mut self, micro: &Micro) -> Result<(), SessionError> {
        let Engine { kernels, trainer, links, .. } = self;
        match &mut links.next {
            Some(next) => next.send_rows(kernels, trainer.activations(micro.batch.rows())),
            None => Ok(()),
        }
    }

    /// The loss of the micro-batch that went through the last stage last, of which the whole batch's is a mean over `count`; its
    /// gradient is in `rows`.
    fn loss(
        &mut self,
        micro: &Micro,
        reference: &[AnswerScore],
        count: u64,
    ) -> Result<BatchLoss, SessionError> {
        let Engine { trainer, tree, links, alarm, rows, preference, .. } = self;
        let (batch, targets, group) = (&micro.batch, &micro.targets, &mut links.group);
        let (loss, gradient) = match preference {
            None => trainer.loss(targets, 1.0 / count as f32, batch.rows(), Some(tree.current()), group),
            Some(preference) => {
                // Preferences are learnt by adapters, and none is on the head.
                let scored = trainer.score_with_gradient(targets, 1.0, batch.rows(), None, group);
                scored.map(|(scores, gradient)| {
                    let policy = answer_scores(batch, targets, &scores);
                    (preference.loss(batch, &policy, reference, count, gradient), gradient)
                })
            }
        }
        .map_err(|error| because(alarm, error))?;
        rows.clear();
        rows.extend_from_slice(gradient);
        Ok(loss)
    }

    /// The same loss without its gradient.
    fn loss_alone(&mut self, micro: &Micro, reference: &[AnswerScore]) -> Result<BatchLoss, SessionError> {
        let Engine { trainer, links, alarm, preference, .. } = self;
        let (batch, targets) = (&micro.batch, &micro.targets);
        let scores = trainer.score(targets, &mut links.group).map_err(|error| because(alarm, error))?;
        Ok(match preference {
            None => BatchLoss::of_targets(targets, &scores),
            Some(preference) => {
                let policy = answer_scores(batch, targets, &scores);
                preference.loss(batch, &policy, reference, 1, &mut [])
            }
        })
    }

    /// A micro-batch back through this stage; ends the runs before its own.
    fn backward(
        &mut self,
        first: InFlight,
        count: u64,
        open_run: &mut usize,
    ) -> Result<BatchLoss, SessionError> {
        while *open_run < first.run {
            self.tree.end_run(&self.kernels);
            *open_run += 1;
        }
        let mut loss = BatchLoss::default();
        if self.is_last() {
            loss = self.loss(&first.micro, &first.reference, count)?;
        }
        let Engine { trainer, state, tree, links, alarm, rows, timing, .. } = self;
        if let Some(next) = &mut links.next {
            let hidden = trainer.model().config().shape.hidden_size;
            rows.resize(first.micro.batch.rows() * hidden, 0.0);
            let waiting = Instant::now();
            next.receive_gradients(rows)?;
            timing.wait += waiting.elapsed();
        }
        let (sink, beat) = (tree.current(), &mut || stop(alarm));
        let group = &mut links.group;
        let pass = trainer.backward(&first.micro.batch, first.tape, adapter(state), rows, sink, group, beat);
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

/// What a stage computes a micro-batch from: tokens on the first, elsewhere the rows that have arrived.
fn input<'a>(links: &Links, micro: &'a Micro, rows: &'a [f32]) -> StageInput<'a> {
    match &links.previous {
        None => StageInput::Tokens(&micro.tokens),
        Some(_) => StageInput::Activations(rows),
    }
}

/// What a state's passes multiply with beside the model's weights; nothing where these train themselves.
fn adapter(state: &TrainingState) -> Option<&Adapter> {
    state.packed().map(|adapter| &**adapter)
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
