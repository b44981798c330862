//! A session's steps: forward through the stages, back again, gradients over the replicas, the optimiser, the vote.

use super::{End, Payload, Session, violation};
use crate::durable::Wish;
use crate::process::{Action, Errand, Message, Timer};
use crate::weights::{self, Content, Numbers, Tape};
use ashlar_protocol::training::{StepMetrics, TrainingReport, TrainingTiming, TrainingWork};
use ashlar_vocabulary::{BlobId, SessionId};
use std::collections::BTreeMap;

/// What a session does.
pub(super) enum Doing {
    /// Its links do not stand yet, or shards are missing.
    Opening,
    /// Nothing.
    Idle,
    /// Waits for rows of the stage before.
    Rows,
    /// Computes the forward pass.
    Forward(Vec<u64>),
    /// Waits for gradients of the stage behind.
    Gradient(Tape),
    /// Computes the backward pass.
    Backward(Tape, Vec<u64>),
    /// Waits for the other replica's gradients.
    Sum(Numbers),
    /// Has the next state stored.
    Storing,
    /// Measures.
    Evaluating,
    /// Reads all shards.
    Gathering(Vec<Option<Content>>),
    /// Stores what comes of them.
    Exporting { digest: u64, files: BTreeMap<u64, BlobId> },
}

impl Session {
    /// Begins whatever can be begun.
    pub(super) fn go_on(
        &mut self,
        pass_us: u64,
        actions: &mut Vec<Action>,
        reports: &mut Vec<(SessionId, TrainingReport)>,
    ) -> Result<(), End> {
        let id = self.open.session;
        let mut computes = false;
        match &mut self.doing {
            Doing::Opening => {
                if self.links.stand() && self.shards.iter().all(Option::is_some) {
                    self.restore()?;
                    self.doing = Doing::Idle;
                    let reserved = ashlar_vocabulary::Bytes(1);
                    reports.push((id, TrainingReport::Opened { reserved }));
                    return self.go_on(pass_us, actions, reports);
                }
            }
            Doing::Idle => {
                let Some(work) = self.works.pop_front() else { return Ok(()) };
                computes = self.begin(work, actions)?;
                if !computes {
                    return self.go_on(pass_us, actions, reports);
                }
            }
            Doing::Rows => {
                if let Some((step, rows)) = self.rows.pop_front() {
                    self.check(step)?;
                    self.doing = Doing::Forward(rows);
                    computes = true;
                }
            }
            Doing::Gradient(tape) => {
                if let Some((step, rows)) = self.gradients.pop_front() {
                    self.doing = Doing::Backward(tape.clone(), rows);
                    self.check(step)?;
                    computes = true;
                }
            }
            Doing::Sum(gradients) => {
                if let Some((step, others)) = self.sums.pop_front() {
                    weights::add(gradients, &others);
                    let gradients = std::mem::take(gradients);
                    self.check(step)?;
                    self.update(&gradients, actions, reports);
                    return self.go_on(pass_us, actions, reports);
                }
            }
            Doing::Forward(_)
            | Doing::Backward(..)
            | Doing::Storing
            | Doing::Evaluating
            | Doing::Gathering(_)
            | Doing::Exporting { .. } => {}
        }
        if computes {
            actions.push(Action::Wake { after_us: pass_us, timer: Timer::Trained(id) });
        }
        Ok(())
    }

    /// Begins a piece of work; whether there is something to compute at once.
    fn begin(&mut self, work: TrainingWork, actions: &mut Vec<Action>) -> Result<bool, End> {
        let id = self.open.session;
        let root = self.is_root();
        match work {
            TrainingWork::Step { step } => {
                self.check(step)?;
                if self.links.first {
                    self.doing = Doing::Forward(self.share.input(self.seed(), step));
                    return Ok(true);
                }
                self.doing = Doing::Rows;
            }
            TrainingWork::Evaluate if root => {
                self.doing = Doing::Evaluating;
                return Ok(true);
            }
            TrainingWork::Export { shards } if root => {
                for (index, shard) in shards.iter().enumerate() {
                    actions.push(Action::Call(Errand::Gather(id, index), Wish::Get(*shard)));
                }
                self.doing = Doing::Gathering(vec![None; shards.len()]);
                return Ok(false);
            }
            TrainingWork::Evaluate | TrainingWork::Export { .. } | TrainingWork::Close => {}
        }
        Ok(false)
    }

    fn check(&self, step: u64) -> Result<(), End> {
        match step == self.steps {
            true => Ok(()),
            false => Err(violation(format!("has to do with step {step} at step {}", self.steps))),
        }
    }

    /// What was being computed is done.
    pub(super) fn computed(
        &mut self,
        actions: &mut Vec<Action>,
        reports: &mut Vec<(SessionId, TrainingReport)>,
    ) -> Result<(), End> {
        let (id, step) = (self.open.session, self.steps);
        let send = |link: Option<_>, payload| link.map(|link| Action::Send(link, Message::Training(payload)));
        match std::mem::replace(&mut self.doing, Doing::Idle) {
            Doing::Forward(rows) => {
                let (tape, rows) = self.share.forward(&self.state, rows);
                if self.links.last {
                    let rows = self.share.loss(self.seed(), step, &rows);
                    self.doing = Doing::Backward(tape, rows);
                    actions.push(Action::Wake { after_us: 100, timer: Timer::Trained(id) });
                } else {
                    actions.extend(send(self.links.next, Payload::Rows { step, rows }));
                    self.doing = Doing::Gradient(tape);
                }
            }
            Doing::Backward(tape, rows) => {
                let (gradients, rows) = self.share.backward(&self.state, &tape, rows);
                actions.extend(send(self.links.previous, Payload::Gradient { step, rows }));
                if self.links.alone {
                    self.update(&gradients, actions, reports);
                } else {
                    let sum = Payload::Sum { step, gradients: gradients.clone() };
                    actions.extend(send(self.links.peer, sum));
                    self.doing = Doing::Sum(gradients);
                }
            }
            Doing::Evaluating => {
                reports.push((id, TrainingReport::Evaluated { loss: 1.0, accuracy: 0.5 }));
            }
            doing => {
                self.doing = doing;
                return Err(violation("a timer of nothing"));
            }
        }
        Ok(())
    }

    /// Takes the step; where its state is to be durable, the vote waits for that.
    fn update(
        &mut self,
        gradients: &Numbers,
        actions: &mut Vec<Action>,
        reports: &mut Vec<(SessionId, TrainingReport)>,
    ) {
        weights::update(&mut self.state, gradients);
        self.steps += 1;
        if self.open.replica > 0 || !self.open.settings.is_durable(self.steps) {
            return self.prepared(None, reports);
        }
        self.doing = Doing::Storing;
        let shard = Content::Shard { job: self.open.job, steps: self.steps, cells: self.state.clone() };
        actions.push(Action::Call(Errand::Piece(self.open.session), Wish::Put(shard)));
    }

    /// Votes for the step that was just taken.
    pub(super) fn prepared(&mut self, shard: Option<BlobId>, reports: &mut Vec<(SessionId, TrainingReport)>) {
        self.doing = Doing::Idle;
        let step = self.steps.saturating_sub(1);
        let metrics = self.is_root().then_some(StepMetrics {
            loss: 1.0 / (step + 1) as f64,
            accuracy: 0.5,
            learning_rate: 1e-4,
            gradient_norm: 1.0,
            targets: 10,
            tokens: 20,
            skipped: false,
            rewards: None,
        });
        let timing = TrainingTiming::default();
        reports.push((self.open.session, TrainingReport::Prepared { step, shard, metrics, timing }));
    }
}
