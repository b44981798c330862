//! Fine-tuning jobs and files as a pure function of events.
//!
//! Layout: [`events`] (what goes in and out), `admin` (calls of gateways), `lifecycle` (from validation to the end), `training`
//! (sessions, steps, votes), `publishing` (adapters under names), `promoting` (those that have to be better than what is served), `handing_out` (the files of a whole model), `saving` (what is
//! durable); of one job: `job` (its record and what comes next), `session` (its ranks and their votes), `event_log`; `replicas` (who
//! trains), `room` (whether there is memory for it), `names`, [`results`]
//! (the table of steps).
//!
//! **Invariants:** no tokio, clock, randomness or I/O: the store is an effect, its answers are events. A step is committed only
//! when every rank has voted for it. At most one committed step is not durable, so a new scheduler repeats one at most; where all
//! weights train, those since the last step with shards. A blob is deleted only when a later record is durable, and is named in
//! records until it is. Serving never waits for any of this.

mod admin;
mod event_log;
pub mod events;
mod handing_out;
mod job;
mod lifecycle;
mod names;
mod promoting;
mod publishing;
mod replicas;
pub mod results;
mod room;
mod saving;
mod session;
mod stragglers;
mod training;

pub use events::{CHUNK_EVENTS, Effect, Event, JobsConfig, Loaded, Progress, References, SaveId, StoredJob};
pub use names::{checkpoint_file, results_file};
pub use replicas::{RankRoom, TrainingRank, TrainingReplica};

use crate::engine::GatewayId;
use crate::shelf::Shelf;
use crate::time::Millis;
use admin::Read;
use ashlar_protocol::admin::{FileRecord, JobRecord, JobStatus};
use ashlar_vocabulary::{AdapterId, Bytes, FileId, JobId, ReplicaId, SessionId, Tenant};
use job::{Job, Phase};
use saving::FileSaves;
use std::collections::{BTreeMap, BTreeSet};

/// Most jobs that have not ended.
pub const JOBS_UNFINISHED_MAX: usize = 1000;
/// Most jobs; beyond, the oldest one that has ended is forgotten.
pub const JOBS_MAX: usize = 10_000;
/// Most files.
pub const FILES_MAX: usize = 10_000;

/// Files and jobs of one term.
#[derive(Debug, Clone)]
pub struct Jobs {
    config: JobsConfig,
    now: Millis,
    unix_s: u64,
    effects: Vec<Effect>,
    /// Whether what is stored is known.
    loaded: bool,
    /// Why nothing can be saved.
    store_down: Option<String>,
    files: Shelf<FileId, FileRecord>,
    jobs: Shelf<JobId, Job>,
    /// Jobs that something is still to be done for.
    active: BTreeSet<JobId>,
    /// Gateways that are connected.
    gateways: BTreeSet<GatewayId>,
    /// Replicas that serve.
    replicas: BTreeMap<ReplicaId, TrainingReplica>,
    /// What adapters in memory take on each of them.
    adapters_held: BTreeMap<ReplicaId, Bytes>,
    /// Counts changes of what there is for sessions, from 1.
    room_changes: u64,
    sessions: BTreeMap<SessionId, JobId>,
    sessions_made: u64,
    queue_places: u64,
    file_saves: FileSaves,
    reads: BTreeMap<u64, Read>,
    reads_made: u64,
    sweep_due: Millis,
    /// Steps committed in this term, and tokens computed for them.
    trained: (u64, u64),
}

impl Jobs {
    /// The core of a term that knows of no job yet.
    pub fn new(config: JobsConfig) -> Jobs {
        Jobs {
            config,
            now: Millis(0),
            unix_s: 0,
            effects: Vec::new(),
            loaded: false,
            store_down: None,
            files: Shelf::new(|file| file.created_at),
            jobs: Shelf::new(|job| job.record.request.created_at),
            active: BTreeSet::new(),
            gateways: BTreeSet::new(),
            replicas: BTreeMap::new(),
            adapters_held: BTreeMap::new(),
            room_changes: 1,
            sessions: BTreeMap::new(),
            sessions_made: 0,
            queue_places: 0,
            file_saves: FileSaves::default(),
            reads: BTreeMap::new(),
            reads_made: 0,
            sweep_due: Millis(0),
            trained: (0, 0),
        }
    }

    /// Applies one event, then begins whatever can be begun.
    pub fn handle(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        self.now = now;
        match event {
            Event::Loaded(loaded) => self.load(*loaded),
            Event::GatewayUp(gateway) => {
                self.gateways.insert(gateway);
            }
            Event::GatewayGone(gateway) => self.gateway_gone(gateway),
            Event::Admin { gateway, call, tenant, request } => {
                self.admin((gateway, call), tenant.as_ref(), *request);
            }
            Event::Prepared { gateway: _, job, outcome } => self.prepared(job, *outcome),
            Event::ReplicaUp(replica) => {
                self.adapters_held.remove(&replica.replica);
                self.replicas.insert(replica.replica, replica);
                self.room_changes += 1;
            }
            Event::ReplicaDown { replica, reason } => self.replica_down(replica, &reason),
            Event::AdaptersHeld { replica, bytes } => {
                self.adapters_held.insert(replica, bytes);
                self.room_changes += 1;
            }
            Event::Report { connection, session, report } => self.report(connection, session, *report),
            Event::Saved(SaveId::Job(job)) => self.job_saved(job),
            Event::Saved(SaveId::File(file)) => self.file_saved(file),
            Event::StoreDown(reason) => self.store_down(reason),
            Event::StoreUp => self.store_down = None,
            Event::EventsRead { read, events } => self.events_read(read, events),
            Event::BlobsDeleted { job, blobs } => self.blobs_deleted(job, &blobs),
            Event::ResultsWritten { job, outcome } => self.results_written(job, outcome),
            Event::CandidateStored { job, outcome } => self.candidate_stored(job, outcome),
            Event::Compared { gateway, job, outcome } => self.compared(gateway, job, *outcome),
            Event::Promoted { job, outcome } => self.promoted(job, outcome),
            Event::Published { name } => self.published(&name),
            Event::NotPublished { name, failure } => self.not_published(&name, &failure),
            Event::WallClock(unix_s) => self.unix_s = unix_s,
            Event::Tick => self.tick(),
            Event::Abort => {
                self.close_all();
                self.loaded = false;
            }
        }
        if self.loaded {
            self.begin_what_can_begin();
            self.save_what_has_changed();
        }
        effects.append(&mut self.effects);
    }

    /// Everything that a record of a file or a job refers to. Adapters that are served are not known here.
    pub fn references(&self) -> References {
        let mut references = References::default();
        references.blobs.extend(self.files.values().map(|file| file.blob));
        for job in self.jobs.values() {
            references.adapters.extend(job.record.adapter);
            references
                .adapters
                .extend(job.record.trained_model.as_ref().map(|model| AdapterId(model.manifest)));
            references.adapters.extend(job.record.checkpoints.iter().map(|checkpoint| checkpoint.adapter));
            // Until its end is durable, the stored record still refers to what the job needed.
            if !job.ended() || self.active.contains(&job.record.request.id) {
                references.blobs.extend(job.blobs());
            }
        }
        references
    }

    /// A job's record, as far as the job is; the durable one may be a step behind.
    pub fn job(&self, id: JobId) -> Option<&JobRecord> {
        self.jobs.get(id).map(|job| &job.record)
    }

    /// Minutes for which jobs of a tenant have trained so far.
    pub fn trained_minutes(&self, tenant: &Tenant) -> u64 {
        let of = self.jobs.values().filter(|job| job.record.request.owner.as_ref() == Some(tenant));
        of.map(|job| job.record.trained_ms).sum::<u64>() / 60_000
    }

    /// Training loss of the latest step of a job that trains.
    pub fn training_loss(&self) -> Option<f64> {
        let training = self.sessions.values().filter_map(|id| self.jobs.get(*id)?.record.last);
        training.map(|last| last.loss).next_back()
    }

    /// Steps of all jobs that were committed in this term, and tokens computed for them.
    pub fn trained(&self) -> (u64, u64) {
        self.trained
    }

    /// Whether nobody has a session.
    pub fn is_idle(&self) -> bool {
        self.sessions.is_empty()
    }

    /// What must hold whatever happens; for tests and the simulation.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        for (session, job) in &self.sessions {
            let has = self.jobs.get(*job).and_then(Job::session).is_some_and(|open| open.id == *session);
            if !has {
                return Err(format!("session {session} belongs to no job"));
            }
        }
        for job in self.jobs.values() {
            let (id, status) = (job.record.request.id, job.record.status);
            let expected = match &job.phase {
                Phase::Validating(_) => status == JobStatus::Validating,
                Phase::Queued(_) => status == JobStatus::Queued,
                Phase::Waiting { .. }
                | Phase::Training(_)
                | Phase::Publishing { .. }
                | Phase::Promoting(_) => status == JobStatus::Running,
                Phase::Paused => status == JobStatus::Paused,
                Phase::Ended => status.is_final(),
            };
            if !expected {
                return Err(format!("job {id} is {status:?}, but {:?}", job.phase));
            }
            if !job.ended() && !self.active.contains(&id) {
                return Err(format!("job {id} is not looked after"));
            }
            if job.record.steps > job.saving.steps + 1 {
                return Err(format!("job {id} is {} steps ahead of its record", job.record.steps));
            }
            if let Some(session) = job.session()
                && self.sessions.get(&session.id) != Some(&id)
            {
                return Err(format!("session {} of job {id} is not known", session.id));
            }
        }
        self.check_room()
    }
}
