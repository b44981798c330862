//! A session's thread: opens it, then does one piece of work after the other.

use super::alarm::Alarm;
use super::data::SessionData;
use super::engine::{Course, Engine, Timing};
use super::error::SessionError;
use super::export::Export;
use super::links::{self, Arrival, Seat};
use super::memory::{SessionSize, session_memory};
use super::start::{self, Start};
use super::storage::Storage;
use super::{Place, Resources};
use ashlar_kernels::{Kernels, ThreadPool};
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::stage::StageTrainer;
use ashlar_model::{RankSlice, Trained};
use ashlar_protocol::training::{
    LoraSettings, OpenSession, TrainingMethod, TrainingReport, TrainingSettings, TrainingWork,
};
use ashlar_training::checkpoint::{self, Position};
use ashlar_training::{Hyperparameters, Preference, RunTree};
use ashlar_vocabulary::{BlobId, Bytes, FloatType};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tracing::info;

/// How often a session without work looks whether the others are still there.
const IDLE: Duration = Duration::from_millis(200);
/// How long the scheduler may take to close a session that another rank has closed already.
const CLOSING: Duration = Duration::from_secs(1);
/// Largest rank of an adapter.
const RANK_MAX: u32 = 4096;

/// What reaches a session from outside.
pub(super) struct Inbox {
    pub(super) works: Receiver<TrainingWork>,
    pub(super) arrivals: Receiver<Arrival>,
}

/// Opens the session and works until it is closed. `report` takes what there is to say.
pub(super) fn run(
    open: &OpenSession,
    place: Option<Place>,
    resources: &Resources,
    alarm: &Alarm,
    inbox: &Inbox,
    report: &dyn Fn(TrainingReport),
) -> Result<(), SessionError> {
    let place = place.filter(|place| place.revision == open.revision);
    let Some(place) = place else {
        return Err(SessionError::Ended("this rank has left the layout that the session is for".into()));
    };
    let mut session = Session::open(open, place, resources, alarm, inbox)?;
    report(TrainingReport::Opened { reserved: session.reserved });
    loop {
        match inbox.works.recv_timeout(IDLE) {
            Ok(TrainingWork::Close) => return Ok(()),
            Ok(TrainingWork::Step { step }) => report(session.step(step)?),
            Ok(TrainingWork::Evaluate) => {
                let (loss, accuracy) = session.engine.evaluate()?;
                if session.is_root() {
                    report(TrainingReport::Evaluated { loss, accuracy });
                }
            }
            Ok(TrainingWork::Export { shards }) => {
                if session.is_root() {
                    report(session.export(&shards)?);
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
            Err(RecvTimeoutError::Timeout) => {
                alarm.check()?;
                if let Err(ended) = alarm.probe() {
                    // Where others have been told to close before this rank was, that is no failure.
                    return match inbox.works.recv_timeout(CLOSING) {
                        Ok(TrainingWork::Close) => Ok(()),
                        _ => Err(ended.into()),
                    };
                }
            }
        }
    }
}

struct Session<'a> {
    open: &'a OpenSession,
    place: Place,
    storage: Storage,
    resources: &'a Resources,
    trained: Trained,
    engine: Engine,
    reserved: Bytes,
    /// Steps in the state.
    steps: u64,
}

impl<'a> Session<'a> {
    fn open(
        open: &'a OpenSession,
        place: Place,
        resources: &'a Resources,
        alarm: &Alarm,
        inbox: &Inbox,
    ) -> Result<Session<'a>, SessionError> {
        let settings = &open.settings;
        let (trained, course) = (trained(settings)?, course(settings)?);
        let preference = preference(settings.method)?;
        let Some(blobs) = resources.blobs.clone() else {
            return Err(refused("this node has no blob store: set `blobs` in its configuration"));
        };
        let storage = Storage { blobs, runtime: resources.runtime.clone(), alarm: alarm.clone() };
        let (slice, config) = (place.model.slice().clone(), place.model.config());
        let shape = &config.shape;
        check_places(open, &slice)?;
        let seat = Seat {
            term: place.term,
            rank: slice.tensor_rank,
            ranks: slice.tensor_parallel_size,
            follows: !slice.first,
            activations: match trained {
                Trained::Adapter(_) => shape.activations,
                Trained::Model => FloatType::F32,
            },
        };
        // Before the samples are fetched, so that whoever is ready finds the others.
        let links =
            links::make(open, &seat, (resources.links, &resources.transport), alarm, &inbox.arrivals)?;
        let data = SessionData::fetch(settings, &storage, &resources.directory)?;
        let pool = ThreadPool::in_background(resources.threads, resources.urgent.clone());
        let kernels = Arc::new(Kernels::on_pool(resources.isa, pool));
        let rows_max = data.rows_max();
        let start = Start { open, place: &place, trained: &trained, storage: &storage, resources };
        let (state, steps) = start.state(&kernels)?;
        let mut trainer = match &trained {
            Trained::Adapter(_) => StageTrainer::new(place.model.clone(), kernels.clone(), rows_max),
            Trained::Model => {
                StageTrainer::new(start::private_copy(&place, &state, &kernels)?, kernels.clone(), rows_max)
            }
        };
        let spread = slice.head.is_some_and(|head| head.of != slice.tensor_parallel_size);
        if slice.last && spread && trained.adapter().is_some() {
            trainer = trainer.with_head(place.model.load_stage_head(&place.directory, &kernels)?);
        }
        let stages_behind = place.num_stages.saturating_sub(place.stage + 1);
        let of_trainer = trainer.model();
        let size = SessionSize {
            shape: &of_trainer.config().shape,
            slice: if trained.adapter().is_some() { &slice } else { of_trainer.slice() },
            trained: &trained,
            rows: rows_max,
            keep: settings.keep_activations,
            stages_behind,
            threads: resources.threads,
            replicas: open.replicas as usize,
            dropout: trained.adapter().is_some() && settings.lora.dropout > 0.0,
        };
        let reserved = session_memory(&size).total();
        let engine = Engine {
            tree: RunTree::new(trained.sums(shape, &slice)),
            kernels,
            trainer,
            state,
            links,
            data,
            alarm: alarm.clone(),
            course,
            preference,
            stages_behind,
            // Where a model trains whole there is no adapter.
            dropout: if trained.adapter().is_some() { settings.lora.dropout } else { 0.0 },
            seed: settings.seed,
            replica: open.replica as usize,
            replicas: open.replicas as usize,
            keep: settings.keep_activations,
            pieces: 0,
            rows: Vec::with_capacity(rows_max * shape.hidden_size),
            timing: Timing::default(),
        };
        info!(session = %open.session, job = %open.job, steps, "opened a training session");
        Ok(Session { open, place, storage, resources, trained, engine, reserved, steps })
    }

    /// The rank that speaks for all.
    fn is_root(&self) -> bool {
        let slice = self.place.model.slice();
        self.open.replica == 0 && slice.first && slice.tensor_rank == 0
    }

    /// Computes a step and makes the state after it durable.
    fn step(&mut self, step: u64) -> Result<TrainingReport, SessionError> {
        if step != self.steps {
            return Err(SessionError::OutOfStep { asked: step, committed: self.steps });
        }
        let (metrics, mut timing) = self.engine.step(step)?;
        self.steps += 1;
        let started = Instant::now();
        let stores = self.open.replica == 0 && self.open.settings.is_durable(self.steps);
        let shard = if stores { Some(self.store()?) } else { None };
        timing.durable_us = started.elapsed().as_micros() as u64;
        let metrics = self.is_root().then_some(metrics);
        Ok(TrainingReport::Prepared { step, shard, metrics, timing })
    }

    fn store(&self) -> Result<BlobId, SessionError> {
        let at = Position { job: self.open.job, steps: self.steps };
        let stored = self.storage.put_pieces(|put| checkpoint::write(&self.engine.state, at, put))?;
        Ok(stored.id)
    }

    /// Puts what was trained together from every rank's share.
    fn export(&self, shards: &[BlobId]) -> Result<TrainingReport, SessionError> {
        let at = Position { job: self.open.job, steps: self.steps };
        let (place, storage, directory) = (&self.place, &self.storage, &self.resources.directory);
        let dropout = self.engine.dropout;
        let export = Export { place, storage, directory, at, dropout };
        match &self.trained {
            Trained::Adapter(_) => export.adapter(&self.trained, shards),
            Trained::Model => export.model(shards),
        }
    }
}

pub(super) fn refused(what: impl Into<String>) -> SessionError {
    SessionError::Refused(what.into())
}

/// What the settings say is trained.
fn trained(settings: &TrainingSettings) -> Result<Trained, SessionError> {
    match (settings.full, settings.method) {
        (None, _) => Ok(Trained::Adapter(spec(&settings.lora)?)),
        (Some(_), TrainingMethod::Supervised) => Ok(Trained::Model),
        (Some(_), TrainingMethod::Dpo { .. }) => Err(refused(
            "preferences need the model as it was beside the one that trains: train an adapter on them",
        )),
    }
}

/// The adapter that the settings describe.
fn spec(lora: &LoraSettings) -> Result<LoraSpec, SessionError> {
    if lora.rank == 0 || lora.rank > RANK_MAX {
        return Err(refused(format!("the adapter's rank is {}: choose 1 to {RANK_MAX}", lora.rank)));
    }
    if !lora.alpha.is_finite() {
        return Err(refused("the adapter's alpha is no number"));
    }
    if !(0.0..1.0).contains(&lora.dropout) {
        return Err(refused(format!("{} is no dropout: choose a share from 0 to below 1", lora.dropout)));
    }
    let known = || Target::ALL.map(Target::module).join(", ");
    let mut targets = Vec::new();
    for name in &lora.targets {
        let target = Target::from_module(name);
        targets.push(
            target.ok_or_else(|| {
                refused(format!("the model has no module `{name}`: choose among {}", known()))
            })?,
        );
    }
    targets.sort_unstable();
    targets.dedup();
    if targets.is_empty() {
        return Err(refused(format!("the adapter changes no module: choose among {}", known())));
    }
    let (rank, alpha, rank_stabilized) = (lora.rank as usize, lora.alpha, lora.rank_stabilized);
    Ok(LoraSpec { rank, alpha, rank_stabilized, targets })
}

/// What pairs of answers are learnt with, where they are.
fn preference(method: TrainingMethod) -> Result<Option<Preference>, SessionError> {
    let TrainingMethod::Dpo { beta } = method else { return Ok(None) };
    let wrong = || refused(format!("{beta} is no beta: choose a number above 0"));
    Preference::new(beta).map(Some).ok_or_else(wrong)
}

fn course(settings: &TrainingSettings) -> Result<Course, SessionError> {
    if !settings.learning_rate.is_finite() || settings.learning_rate < 0.0 {
        return Err(refused(format!("{} is no learning rate: choose one above 0", settings.learning_rate)));
    }
    let schedule = settings.schedule;
    schedule.check().map_err(|error| refused(error.to_string()))?;
    let (beta1, beta2, epsilon) = settings.adam;
    let (weight_decay, norm_max) = (settings.weight_decay, settings.norm_max);
    let with = Hyperparameters { beta1, beta2, epsilon, weight_decay, norm_max };
    Ok(Course { learning_rate: settings.learning_rate, schedule, steps: settings.steps, with })
}

/// Whether the session's places are those of this rank's layout.
fn check_places(open: &OpenSession, slice: &RankSlice) -> Result<(), SessionError> {
    let (replica, replicas) = (open.replica, open.replicas);
    if !matches!(replicas, 1 | 2 | 4 | 8) || replica >= replicas || open.peers.len() < replicas as usize {
        return Err(refused(format!("replica {replica} of {replicas} cannot take part: use 1, 2, 4 or 8")));
    }
    if open.group.len() != slice.tensor_parallel_size || open.next.is_none() != slice.last {
        return Err(refused("the session names other ranks than the layout has"));
    }
    Ok(())
}
