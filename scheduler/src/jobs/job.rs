//! One job: its record, where it is, and what comes next. Nothing here speaks to anybody.

use super::event_log::EventLog;
use super::events::{Counts, Progress, StoredJob};
use super::promoting::Promoting;
use super::session::Session;
use crate::engine::GatewayId;
use crate::time::Millis;
use ashlar_protocol::admin::{JobEvent, JobEventKind, JobRecord, JobRequest, JobStatus};
use ashlar_protocol::training::{Rewards, StepMetrics, TrainingMethod, TrainingSettings, ValidationData};
use ashlar_vocabulary::{BlobId, LeaseTerm};
use std::collections::BTreeSet;

/// Longest text of a rank or a gateway that a record keeps, in bytes.
const TEXT_BYTES_MAX: usize = 2048;
/// How much a new step counts in the mean of a step's time.
const STEP_TIME_WEIGHT: f64 = 0.2;

/// A gateway and the number of its call.
pub(super) type Call = (GatewayId, u64);

/// A job.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) record: JobRecord,
    pub(super) progress: Progress,
    pub(super) phase: Phase,
    pub(super) log: EventLog,
    pub(super) saving: Saving,
    /// Sessions lost since it last made progress.
    pub(super) failures: u32,
    /// It waits for memory: which state of the room it was told to wait in.
    pub(super) waits_since: Option<u64>,
    /// A step for which every rank has voted, and that is committed once the one before is durable.
    pub(super) held: Option<Held>,
}

/// What a step came to.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) metrics: StepMetrics,
    pub(super) shards: Vec<BlobId>,
    pub(super) took_ms: u64,
}

/// Where a job is in this term. Its record's status says the same in fewer words.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// Its files are to be validated, or are being validated.
    Validating(Validation),
    /// In the queue, at this place.
    Queued(u64),
    /// It trains, but has no session; the next is opened then.
    Waiting { due: Millis },
    /// It trains.
    Training(Box<Session>),
    /// It is trained; its adapter is about to be served.
    Publishing { asked: bool, due: Millis, attempts: u32 },
    /// It is trained; its adapter is served only if it is better than what is.
    Promoting(Promoting),
    /// Its owner has stopped it.
    Paused,
    /// Nothing more happens.
    Ended,
}

/// The validation of a job's files.
#[derive(Debug, Clone)]
pub(super) struct Validation {
    /// Who shall do it: who asked for the job.
    pub(super) wish: Option<GatewayId>,
    /// Who does it, since when.
    pub(super) with: Option<(GatewayId, Millis)>,
    /// How often it was begun.
    pub(super) attempts: u32,
}

/// What of a job is durable, and what is not.
#[derive(Debug, Default, Clone)]
pub(super) struct Saving {
    /// Something has changed since it was last given to the store.
    pub(super) dirty: bool,
    /// What the store writes now.
    pub(super) in_flight: Option<Snapshot>,
    /// Steps of the durable record.
    pub(super) steps: u64,
    /// Which of the superseded blobs are being deleted.
    pub(super) deleting: BTreeSet<BlobId>,
    /// Calls to be answered with the record once it is durable.
    pub(super) calls: Vec<Call>,
    /// The table of steps is being written.
    pub(super) results_asked: bool,
}

impl Saving {
    /// Whether everything is durable.
    pub(super) fn is_done(&self) -> bool {
        !self.dirty && self.in_flight.is_none()
    }
}

/// What the store writes.
#[derive(Debug, Clone)]
pub(super) struct Snapshot {
    pub(super) steps: u64,
    pub(super) events: u64,
    pub(super) calls: Vec<Call>,
}

/// What a session does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Compute this step.
    Step(u64),
    /// Measure the validation data.
    Evaluate,
    /// Make a checkpoint.
    Export,
    /// Nothing: it is trained.
    Finish,
}

impl Job {
    /// A job that was just asked for.
    pub(super) fn new(request: JobRequest, asked_by: GatewayId) -> Job {
        let record = JobRecord {
            request,
            status: JobStatus::Validating,
            settings: None,
            data: None,
            steps: 0,
            shards: Vec::new(),
            steps_since_shards: 0,
            last: None,
            trained_tokens: 0,
            trained_ms: 0,
            remaining_s: None,
            fine_tuned_model: None,
            adapter: None,
            evaluation: None,
            candidate: None,
            trained_model: None,
            result_files: Vec::new(),
            error: None,
            finished_at: None,
            events: 0,
            checkpoints: Vec::new(),
        };
        let phase = Phase::Validating(Validation { wish: Some(asked_by), with: None, attempts: 0 });
        Job::with(record, Progress::default(), phase, EventLog::default())
    }

    /// A job of an earlier term, from where its record stands. `place` is its place in the queue, if it belongs there.
    pub(super) fn stored(stored: StoredJob, tail: Vec<JobEvent>, place: u64, now: Millis) -> Job {
        let StoredJob { record, progress, term: _ } = stored;
        let phase = match record.status {
            JobStatus::Validating => Phase::Validating(Validation { wish: None, with: None, attempts: 0 }),
            JobStatus::Queued => Phase::Queued(place),
            JobStatus::Running => Phase::Waiting { due: now },
            JobStatus::Paused => Phase::Paused,
            JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled => Phase::Ended,
        };
        let log = EventLog::stored(record.events, tail);
        let mut job = Job::with(record, progress, phase, log);
        job.saving.steps = job.record.steps;
        job
    }

    fn with(record: JobRecord, progress: Progress, phase: Phase, log: EventLog) -> Job {
        Job {
            record,
            progress,
            phase,
            log,
            saving: Saving::default(),
            failures: 0,
            waits_since: None,
            held: None,
        }
    }

    /// Notes that something happened.
    pub(super) fn happened(&mut self, unix_s: u64, what: JobEventKind) {
        self.log.push(unix_s, what);
        self.record.events = self.log.count();
        self.saving.dirty = true;
    }

    /// As it is stored.
    pub(super) fn to_store(&self, term: LeaseTerm) -> StoredJob {
        StoredJob { term, record: self.record.clone(), progress: self.progress.clone() }
    }

    /// The session, if there is one.
    pub(super) fn session(&self) -> Option<&Session> {
        match &self.phase {
            Phase::Training(session) => Some(session),
            _ => None,
        }
    }

    /// Whether it takes one of the places for jobs that train.
    pub(super) fn takes_a_place(&self) -> bool {
        matches!(self.phase, Phase::Waiting { .. } | Phase::Training(_))
    }

    /// Whether nothing more will happen.
    pub(super) fn ended(&self) -> bool {
        matches!(self.phase, Phase::Ended)
    }

    /// What comes next, as the record has it.
    pub(super) fn next(&self) -> Next {
        let (steps, progress) = (self.record.steps, &self.progress);
        let Some(settings) = self.record.settings.as_ref().filter(|_| steps > 0) else {
            return Next::Step(steps);
        };
        let last = steps >= settings.steps;
        let epoch = last || steps.is_multiple_of(settings.steps_per_epoch.max(1));
        let measured = progress.evaluated.map(|(step, ..)| step) == Some(steps);
        if settings.validation != ValidationData::None && settings.is_measured(steps) && !measured {
            return Next::Evaluate;
        }
        let ended = last || progress.stopped;
        // A whole model is large, and not served: it is put together at the end alone.
        let (wanted, exported) = match settings.full {
            None => (epoch || ended, self.record.checkpoints.last().map(|last| last.step)),
            Some(_) => (ended, self.record.trained_model.as_ref().map(|model| model.step)),
        };
        if wanted && exported != Some(steps) {
            return Next::Export;
        }
        if ended { Next::Finish } else { Next::Step(steps) }
    }

    /// Commits the step for which all ranks have voted, if the step before is durable: a new scheduler would repeat one
    /// committed step at most. Whether it did.
    pub(super) fn commit_held(&mut self, unix_s: u64) -> bool {
        let held = if self.record.steps <= self.saving.steps { self.held.take() } else { None };
        let committed = held.is_some();
        if let Some(held) = held {
            self.commit(unix_s, held);
        }
        committed
    }

    fn commit(&mut self, unix_s: u64, Held { metrics, shards, took_ms }: Held) {
        let metrics = printable(metrics);
        let record = &mut self.record;
        record.steps_since_shards += 1;
        let is_durable = !shards.is_empty();
        if is_durable {
            let former = std::mem::replace(&mut record.shards, shards);
            self.progress.superseded.extend(former.into_iter().map(|shard| (record.steps, shard)));
            record.steps_since_shards = 0;
        }
        record.steps += 1;
        record.trained_ms += took_ms;
        record.last = Some(metrics);
        if metrics.skipped {
            self.progress.skipped += 1;
        } else {
            self.progress.skipped = 0;
            record.trained_tokens += metrics.targets;
        }
        let took_ms = took_ms as f64;
        let mean = self.progress.step_ms.map_or(took_ms, |mean| mean + STEP_TIME_WEIGHT * (took_ms - mean));
        self.progress.step_ms = Some(mean);
        let steps = record.settings.as_ref().map_or(0, |settings| settings.steps);
        record.remaining_s = Some((steps.saturating_sub(record.steps) as f64 * mean / 1000.0).ceil() as u64);
        let step = record.steps;
        self.happened(unix_s, JobEventKind::Step { step, steps, metrics });
        if is_durable {
            // What is repeated is no progress.
            self.failures = 0;
            self.progress.at_shards = Some(self.counts());
        }
    }

    fn counts(&self) -> Counts {
        let Progress { evaluated, best_loss, worse, skipped, stopped, .. } = self.progress;
        let trained_tokens = self.record.trained_tokens;
        Counts { trained_tokens, evaluated, best_loss, worse, skipped, stopped }
    }

    /// Goes back to the last step whose state is durable: whoever opens the next session has no later one.
    pub(super) fn go_back(&mut self) {
        let steps = std::mem::take(&mut self.record.steps_since_shards);
        if steps == 0 {
            return;
        }
        self.record.steps = self.record.steps.saturating_sub(steps);
        // What is stored beyond will be written over.
        self.saving.steps = self.saving.steps.min(self.record.steps);
        if let Some(snapshot) = &mut self.saving.in_flight {
            snapshot.steps = snapshot.steps.min(self.record.steps);
        }
        let counts = self.progress.at_shards.clone().unwrap_or_default();
        self.record.trained_tokens = counts.trained_tokens;
        self.progress.evaluated = counts.evaluated;
        self.progress.best_loss = counts.best_loss;
        self.progress.worse = counts.worse;
        self.progress.skipped = counts.skipped;
        self.progress.stopped = counts.stopped;
        self.saving.dirty = true;
    }

    /// The validation data was measured.
    pub(super) fn evaluated(&mut self, unix_s: u64, loss: f64, accuracy: f64) {
        let (loss, accuracy) = (finite(loss), share(accuracy));
        let step = self.record.steps;
        let progress = &mut self.progress;
        progress.evaluated = Some((step, loss, accuracy));
        if progress.best_loss.is_none_or(|best| loss < best) {
            (progress.best_loss, progress.worse) = (Some(loss), 0);
        } else {
            progress.worse += 1;
        }
        let settings = self.record.settings.as_ref();
        let patience = settings.and_then(|settings| settings.patience);
        let last = settings.is_some_and(|settings| step >= settings.steps);
        progress.stopped = !last && patience.is_some_and(|patience| progress.worse >= patience.max(1));
        let stopped = progress.stopped;
        if self.record.steps_since_shards == 0 {
            self.failures = 0;
        }
        self.happened(unix_s, JobEventKind::Evaluated { step, loss, accuracy });
        if stopped {
            self.happened(unix_s, JobEventKind::StoppedEarly { step });
        }
    }
}

/// Why settings cannot be trained with, if so. Numbers that are none would not come back from the store.
pub(super) fn check(settings: &TrainingSettings) -> Result<(), &'static str> {
    let TrainingSettings { learning_rate, adam, weight_decay, norm_max, lora, method, .. } = settings;
    let beta_is_finite = match method {
        TrainingMethod::Supervised => true,
        TrainingMethod::Dpo { beta } => beta.is_finite(),
    };
    let finite = learning_rate.is_finite()
        && beta_is_finite
        && [adam.0, adam.1, adam.2, *weight_decay, lora.dropout].iter().all(|number| number.is_finite())
        && norm_max.is_none_or(f64::is_finite)
        && lora.alpha.is_finite();
    if !finite {
        return Err("a hyperparameter is no finite number");
    }
    if settings.steps == 0 || settings.steps_per_epoch == 0 {
        return Err("there is no step to train");
    }
    Ok(())
}

/// A text of somebody else, short enough for a record.
pub(super) fn short(mut text: String) -> String {
    if text.len() > TEXT_BYTES_MAX {
        let end = (0..=TEXT_BYTES_MAX).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Metrics as JSON can hold them, which knows no infinity: a loss that is none becomes the largest number.
fn printable(metrics: StepMetrics) -> StepMetrics {
    StepMetrics {
        loss: finite(metrics.loss),
        accuracy: share(metrics.accuracy),
        learning_rate: finite(metrics.learning_rate),
        gradient_norm: finite(metrics.gradient_norm),
        rewards: metrics.rewards.map(|rewards| Rewards {
            preferred: finite(rewards.preferred),
            non_preferred: finite(rewards.non_preferred),
        }),
        ..metrics
    }
}

/// A number as JSON can hold it.
pub(super) fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { f64::MAX }
}

fn share(number: f64) -> f64 {
    if number.is_finite() { number.clamp(0.0, 1.0) } else { 0.0 }
}
