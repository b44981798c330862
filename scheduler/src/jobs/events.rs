//! What the jobs core is told, and what it wants done. Both are closed enums.

use super::replicas::TrainingReplica;
use crate::cluster::NodeConnection;
use crate::engine::GatewayId;
use ashlar_protocol::admin::{
    AdminFailure, AdminReply, AdminRequest, Comparison, FileRecord, JobError, JobEvent, JobRecord,
    LoadAdapter, PreparedJob,
};
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::serving::{CompareAdapters, PrepareJob};
use ashlar_protocol::training::TrainingReport;
use ashlar_vocabulary::{
    AdapterId, BlobId, Bytes, FileId, JobId, LeaseTerm, ModelDigest, ModelShape, ReplicaId, SessionId, Tenant,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Events of one stored piece: a value of the store holds so many.
pub const CHUNK_EVENTS: u64 = 128;

/// What the jobs core is set to.
#[derive(Debug, Clone, PartialEq)]
pub struct JobsConfig {
    /// The lease under which jobs are run.
    pub term: LeaseTerm,
    /// The base model that is served; jobs for another are refused.
    pub model_digest: ModelDigest,
    /// What that model looks like: sessions take memory by it.
    pub shape: ModelShape,
    /// Most memory of a rank that adapters take.
    pub adapter_memory: Bytes,
    /// Most jobs that train at once.
    pub max_jobs_running: usize,
    /// Whether there is a place for blobs; without one files and jobs are refused.
    pub blobs: bool,
}

/// A job as it is stored: its record, and what only the scheduler needs to go on with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredJob {
    /// The lease under which it was written. A new leader writes its own before it goes on, so that a former one that does
    /// not know yet writes nothing more.
    pub term: LeaseTerm,
    /// For everybody.
    pub record: JobRecord,
    /// For the scheduler.
    pub progress: Progress,
}

/// What only the scheduler needs to go on with a job.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Steps committed when the validation data was last measured, and what came out.
    pub evaluated: Option<(u64, f64, f64)>,
    /// The lowest validation loss so far.
    pub best_loss: Option<f64>,
    /// Measurements since then.
    pub worse: u32,
    /// Steps skipped in a row.
    pub skipped: u32,
    /// No further step is wanted: the validation loss no longer falls.
    pub stopped: bool,
    /// The owner wants it to pause.
    pub pause: bool,
    /// Checkpoints made so far.
    pub checkpoints: u64,
    /// How long a step takes, in milliseconds, lately.
    pub step_ms: Option<f64>,
    /// The table of steps is to be written.
    pub results_due: bool,
    /// How far it was when its present shards were made, where not every step has some.
    pub at_shards: Option<Counts>,
    /// Blobs of former states that may still be stored, each with a number of steps: once a record of more steps is durable, the
    /// blob is deleted. They are part of the record, so that whoever takes over deletes them, too.
    pub superseded: Vec<(u64, BlobId)>,
}

/// What a job counts from step to step.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub struct Counts {
    /// Targets trained.
    pub trained_tokens: u64,
    /// As in [`Progress`].
    pub evaluated: Option<(u64, f64, f64)>,
    /// As in [`Progress`].
    pub best_loss: Option<f64>,
    /// As in [`Progress`].
    pub worse: u32,
    /// As in [`Progress`].
    pub skipped: u32,
    /// As in [`Progress`].
    pub stopped: bool,
}

/// What the jobs core is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Everything that is stored, once per term, with this term's mark on every job that has not ended.
    Loaded(Box<Loaded>),
    /// A gateway has connected.
    GatewayUp(GatewayId),
    /// A gateway's connection has ended.
    GatewayGone(GatewayId),
    /// A gateway calls. Calls about adapters are not for this core.
    Admin {
        /// Which gateway.
        gateway: GatewayId,
        /// Names the call on its connection.
        call: u64,
        /// For whom; what belongs to others is not there. `None` sees everything.
        tenant: Option<Tenant>,
        /// What is wanted.
        request: Box<AdminRequest>,
    },
    /// A gateway has validated a job's files.
    Prepared {
        /// Which gateway.
        gateway: GatewayId,
        /// The job.
        job: JobId,
        /// What came of it.
        outcome: Box<Result<PreparedJob, JobError>>,
    },
    /// A replica serves; its ranks can train, too.
    ReplicaUp(TrainingReplica),
    /// A replica serves no longer: one of its ranks is lost, or it is laid out anew.
    ReplicaDown {
        /// Which.
        replica: ReplicaId,
        /// Why.
        reason: String,
    },
    /// What adapters in memory take on a replica's fullest rank has changed.
    AdaptersHeld {
        /// Which replica.
        replica: ReplicaId,
        /// What they take now.
        bytes: Bytes,
    },
    /// A rank reports.
    Report {
        /// On this connection.
        connection: NodeConnection,
        /// About this session.
        session: SessionId,
        /// What.
        report: Box<TrainingReport>,
    },
    /// What was to be saved is durable.
    Saved(SaveId),
    /// The store does not answer; what was to be saved is tried again and again.
    StoreDown(String),
    /// It answers again.
    StoreUp,
    /// Stored events that were asked for; `None` where the store does not answer.
    EventsRead {
        /// The number of the request.
        read: u64,
        /// In the order of their numbers.
        events: Option<Vec<JobEvent>>,
    },
    /// The answer to [`Effect::DeleteBlobs`]: they are gone, or left to a sweep.
    BlobsDeleted {
        /// The job.
        job: JobId,
        /// Which.
        blobs: Vec<BlobId>,
    },
    /// A job's table of steps is stored as a blob, or cannot be.
    ResultsWritten {
        /// The job.
        job: JobId,
        /// Where it is, and its length.
        outcome: Result<(BlobId, u64), String>,
    },
    /// The answer to [`Effect::Publish`]: the adapter is served under this name.
    Published {
        /// The name.
        name: String,
    },
    /// The answer to [`Effect::Publish`]: it is not.
    NotPublished {
        /// The name.
        name: String,
        /// Why. Some kinds pass and are tried again, so many times: [`Unavailable`], [`Full`] and [`Conflict`].
        ///
        /// [`Unavailable`]: ashlar_protocol::admin::AdminFailureKind::Unavailable
        /// [`Full`]: ashlar_protocol::admin::AdminFailureKind::Full
        /// [`Conflict`]: ashlar_protocol::admin::AdminFailureKind::Conflict
        failure: AdminFailure,
    },
    /// The answer to [`Effect::StoreCandidate`].
    CandidateStored {
        /// The job.
        job: JobId,
        /// Which generation of its name the candidate is, or why it is not stored.
        outcome: Result<u64, AdminFailure>,
    },
    /// A gateway has compared a job's adapter with what is served, or cannot.
    Compared {
        /// Which gateway.
        gateway: GatewayId,
        /// The job.
        job: JobId,
        /// What came of it.
        outcome: Box<Result<Comparison, String>>,
    },
    /// The answer to [`Effect::Promote`].
    Promoted {
        /// The job.
        job: JobId,
        /// Why it is not served.
        outcome: Result<(), AdminFailure>,
    },
    /// The wall clock, in seconds since 1970. Only records show it.
    WallClock(u64),
    /// Time passes; attempts are due.
    Tick,
    /// This term ends: sessions are closed.
    Abort,
}

/// Everything that is stored.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Loaded {
    /// Files.
    pub files: Vec<FileRecord>,
    /// Jobs; of those that have not ended, the events of the chunk that is still filled and of the one before it.
    pub jobs: Vec<(StoredJob, Vec<JobEvent>)>,
}

/// Names what is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SaveId {
    /// A file.
    File(FileId),
    /// A job.
    Job(JobId),
}

/// What the jobs core wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Answer a call.
    Reply {
        /// Which gateway.
        gateway: GatewayId,
        /// Its call.
        call: u64,
        /// What.
        reply: Box<AdminReply>,
    },
    /// Have a gateway validate a job's files.
    Prepare {
        /// Which gateway.
        gateway: GatewayId,
        /// The files.
        job: Box<PrepareJob>,
    },
    /// Send to these ranks.
    ToNodes(Vec<NodeConnection>, Box<ToNode>),
    /// Save a file's record.
    SaveFile(FileRecord),
    /// Delete a file's record. Its bytes are swept later: another upload of the same bytes may be on its way.
    ForgetFile(FileId),
    /// Save a job: first the chunks of events, by number, then its record. One at a time per job.
    SaveJob {
        /// The record.
        job: Box<StoredJob>,
        /// Chunks with something new in them, whole.
        chunks: Vec<(u64, Vec<JobEvent>)>,
    },
    /// Delete a job's record and its chunks of events, so many.
    ForgetJob {
        /// Which.
        job: JobId,
        /// How many chunks it has.
        chunks: u64,
    },
    /// Read chunks of a job's events, and answer with [`Event::EventsRead`].
    ReadEvents {
        /// The number of the request.
        read: u64,
        /// The job.
        job: JobId,
        /// From this chunk.
        from: u64,
        /// To this one, not included.
        to: u64,
    },
    /// Make the table of a job's steps from its stored events, store it as a blob, and answer with
    /// [`Event::ResultsWritten`].
    WriteResults {
        /// The job.
        job: JobId,
        /// How many chunks of events it has.
        chunks: u64,
    },
    /// Delete blobs of a job's former states, to which nothing durable refers any more, and answer with
    /// [`Event::BlobsDeleted`].
    DeleteBlobs {
        /// The job.
        job: JobId,
        /// Which.
        blobs: Vec<BlobId>,
    },
    /// Sweep what nothing refers to. Whoever performs it adds what others refer to: every adapter that is served.
    Sweep(Box<References>),
    /// Serve an adapter; answered by [`Event::Published`] or [`Event::NotPublished`].
    Publish(LoadAdapter),
    /// Serve a name no longer; not answered.
    Withdraw(String),
    /// Store an adapter as a generation of a name without serving it; answered by [`Event::CandidateStored`].
    StoreCandidate {
        /// Whose it is.
        job: JobId,
        /// The adapter; to be held back.
        load: LoadAdapter,
    },
    /// Have a gateway compare an adapter with what is served.
    Compare {
        /// Which gateway.
        gateway: GatewayId,
        /// The name. Whoever performs this fills in what it serves.
        name: String,
        /// What is to be compared.
        compare: Box<CompareAdapters>,
    },
    /// Serve a generation that was held back; answered by [`Event::Promoted`].
    Promote {
        /// Whose it is.
        job: JobId,
        /// The name.
        name: String,
        /// The generation.
        generation: u64,
        /// Refused where another generation is served; 0 where none shall be.
        expected_generation: u64,
    },
    /// For the log: something an operator should know.
    Warn(String),
    /// For the log.
    Note(String),
}

/// What records refer to.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct References {
    /// Blobs.
    pub blobs: BTreeSet<BlobId>,
    /// Adapters: manifests, with all that they hold.
    pub adapters: BTreeSet<AdapterId>,
}
