//! Administration between gateway and scheduler: files, fine-tuning jobs, adapters. Calls with one answer each, on the
//! connection that serves; records are what the scheduler keeps in the store.
//!
//! Times are seconds since 1970. Lists are newest first. Ids are made by the gateway, so that a call may be sent twice.

use crate::access::{KeyCall, KeyRecord};
use crate::models::{DeployModel, ModelView, ScaleModel};
use crate::responses::{ResponseCall, ResponseRecord};
use crate::training::{ExportedFile, StepMetrics, TrainingSettings};
use ashlar_vocabulary::{
    AdapterId, BlobId, Bytes, FileId, JobId, LayerRange, ModelDigest, NodeId, ReplicaId, Tenant,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A call of a gateway; answered once, by [`AdminReply`], unless the connection ends before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// Remember an uploaded file.
    PutFile(FileRecord),
    /// Read a file's record.
    GetFile(FileId),
    /// Files.
    ListFiles(Page<FileId>),
    /// Forget a file. Jobs that have been validated go on: they have samples of their own.
    DeleteFile(FileId),
    /// Begin a job.
    CreateJob(Box<JobRequest>),
    /// Read a job.
    GetJob(JobId),
    /// Jobs.
    ListJobs(Page<JobId>),
    /// Steer a job.
    ControlJob(JobId, JobAction),
    /// A job's events.
    ListEvents(JobId, Page<u64>),
    /// A job's checkpoints.
    ListCheckpoints(JobId, Page<u64>),
    /// Something about a stored response.
    Response(ResponseCall),
    /// Something about API keys.
    Key(KeyCall),
    /// Empty a node, or use it again.
    DrainNode(DrainNode),
    /// What would become of the layout without these nodes. Changes nothing.
    PlanWithout(Vec<NodeId>),
    /// Lay the model out as it would be planned from nothing now; answered by that plan.
    Replan {
        /// Only say what that would be.
        dry_run: bool,
    },
    /// Serve another model beside the others. The same wish may be sent twice.
    DeployModel(Box<DeployModel>),
    /// Give a model more nodes, or fewer.
    ScaleModel(ScaleModel),
    /// Serve a deployed model no longer: requests in progress end, then its nodes are free.
    RemoveModel {
        /// The name.
        name: String,
    },
    /// Serve an adapter under a name: as its first generation, or as a new one.
    LoadAdapter(LoadAdapter),
    /// Serve it no longer. Requests in flight keep it.
    UnloadAdapter {
        /// The name.
        name: String,
        /// Refused where another generation is served.
        expected_generation: Option<u64>,
    },
    /// Serve an earlier generation again, as a new one.
    RollBackAdapter {
        /// The name.
        name: String,
        /// The generation whose adapter it is.
        to_generation: u64,
        /// Refused where another generation is served.
        expected_generation: Option<u64>,
    },
}

/// What an operator wants of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainNode {
    /// Which.
    pub node: NodeId,
    /// Whether it is to hold nothing, so that its machine can be taken away; or to be of use again.
    pub drain: bool,
    /// Even if nothing can take its place.
    pub force: bool,
}

/// What would become of the layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanView {
    /// How it would change.
    pub change: PlannedChange,
    /// Why the model could not be served, if so: for the operator.
    pub problem: Option<String>,
    /// The replicas that there would be.
    pub replicas: Vec<PlannedReplica>,
}

/// How a layout would change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PlannedChange {
    /// Not at all.
    #[serde(rename = "nothing")]
    Nothing,
    /// Standbys would take the places of those who leave, without a pause in serving.
    #[serde(rename = "standbys step in")]
    Standbys,
    /// A replica would end, and others go on with its sequences.
    #[serde(rename = "another replica takes over")]
    OtherReplica,
    /// All would be laid out anew.
    #[serde(rename = "a new layout")]
    NewLayout,
    /// The model could be served no longer.
    #[serde(rename = "it cannot be spared")]
    Impossible,
}

/// A replica that could be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedReplica {
    /// Its number.
    pub replica: ReplicaId,
    /// KV blocks of every rank.
    pub kv_blocks: u32,
    /// Its stages, in order.
    pub stages: Vec<PlannedStage>,
}

/// A stage that could be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedStage {
    /// Its layers.
    pub layers: LayerRange,
    /// Its ranks, from rank 0.
    pub ranks: Vec<PlannedRank>,
}

/// A rank that could be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedRank {
    /// On which node.
    pub node: NodeId,
    /// The memory that its place takes there.
    pub memory: Bytes,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<Id> {
    /// What follows this entry.
    pub after: Option<Id>,
    /// At most so many.
    pub limit: u32,
}

/// The answer to an [`AdminRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum AdminReply {
    /// Done.
    Done,
    /// A file.
    File(FileRecord),
    /// Files, and whether there are more.
    Files(Vec<FileRecord>, bool),
    /// A job.
    Job(Box<JobRecord>),
    /// Jobs, and whether there are more.
    Jobs(Vec<JobRecord>, bool),
    /// Events, and whether there are more.
    Events(Vec<JobEvent>, bool),
    /// Checkpoints, and whether there are more.
    Checkpoints(Vec<Checkpoint>, bool),
    /// The adapter as it is served now.
    Adapter(AdapterView),
    /// A response.
    Response(ResponseRecord),
    /// A deployed model as it is now.
    Model(Box<ModelView>),
    /// A key, as it is let in.
    Key(Box<KeyRecord>),
    /// A layout that could be.
    Plan(Box<PlanView>),
    /// Refused.
    Refused(AdminFailure),
}

/// Why a call was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminFailure {
    /// Class, which decides the HTTP status.
    pub kind: AdminFailureKind,
    /// For the caller.
    pub message: String,
}

/// Classes of refusals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminFailureKind {
    /// The call makes no sense (400).
    Invalid,
    /// There is no such thing (404).
    NotFound,
    /// What is there is not what the caller expects (409).
    Conflict,
    /// There is no room (429).
    Full,
    /// The store or the cluster does not answer (503).
    Unavailable,
    /// A fault of ours (500).
    Internal,
}

/// An uploaded file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name in the API.
    pub id: FileId,
    /// As the client called it.
    pub name: String,
    /// What it is for, as the client said.
    pub purpose: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it came.
    pub created_at: u64,
    /// Where its bytes are.
    pub blob: BlobId,
    /// Whose it is; `None` is nobody's.
    #[serde(default)]
    pub owner: Option<Tenant>,
}

/// What a client asks for. `None` is for us to choose.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRequest {
    /// The job's name.
    pub id: JobId,
    /// When it was asked for.
    pub created_at: u64,
    /// The base model, as the client calls it.
    pub model: String,
    /// Its digest.
    pub model_digest: ModelDigest,
    /// What to train on.
    pub training_file: FileId,
    /// What to measure.
    pub validation_file: Option<FileId>,
    /// Part of the fine-tuned model's name.
    pub suffix: Option<String>,
    /// The client's own notes.
    pub metadata: BTreeMap<String, String>,
    /// Hyperparameters and additive fields, checked, as JSON: the gateway that validates the file settles them.
    pub settings: String,
    /// The finished adapter is served only if it is better than what is.
    #[serde(default)]
    pub promote: Option<Promotion>,
    /// Whose it is, and what comes of it; `None` is nobody's.
    #[serde(default)]
    pub owner: Option<Tenant>,
    /// Minutes for which all jobs of its owner together may train: then it fails, and keeps its checkpoints. `None` is without a limit.
    #[serde(default)]
    pub training_minutes_max: Option<u32>,
}

impl JobRequest {
    /// The files that it names.
    pub fn files(&self) -> impl Iterator<Item = FileId> {
        let evaluation = self.promote.map(|promote| promote.file);
        [Some(self.training_file), self.validation_file, evaluation].into_iter().flatten()
    }
}

/// What decides whether a finished adapter is served.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Promotion {
    /// What is compared.
    pub metric: PromotionMetric,
    /// Examples to compare on, which are not trained: chats, prompts with completions, or texts.
    pub file: FileId,
    /// What the adapter has to come to besides: at least this share of exact matches, at most this loss.
    pub bound: Option<f64>,
}

/// By what an adapter is compared with what is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromotionMetric {
    /// Share of the examples' answers that it gives to the byte, decoded greedily. More is better.
    ExactMatch,
    /// Mean loss of the examples' targets, in nats. Less is better.
    Loss,
}

impl PromotionMetric {
    /// Whether `one` is better than `other`; equal figures are not.
    pub fn is_better(self, one: f64, other: f64) -> bool {
        match self {
            PromotionMetric::ExactMatch => one > other,
            PromotionMetric::Loss => one < other,
        }
    }
}

/// What can be done to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobAction {
    /// End it; what it has learnt stays in its checkpoints.
    Cancel,
    /// Stop after the current step until it is resumed.
    Pause,
    /// Go on.
    Resume,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobStatus {
    /// A gateway checks and tokenises its files.
    Validating,
    /// Waiting for ranks.
    Queued,
    /// Training, or recovering to go on.
    Running,
    /// Stopped by its owner.
    Paused,
    /// Its model is served.
    Succeeded,
    /// It cannot go on.
    Failed,
    /// Ended by its owner.
    Cancelled,
}

impl JobStatus {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, JobStatus::Succeeded | JobStatus::Failed | JobStatus::Cancelled)
    }
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobError {
    /// For programs, for example `invalid_n_examples`.
    pub code: String,
    /// For people.
    pub message: String,
    /// Which field of the request is at fault.
    pub param: Option<String>,
}

/// A job, as far as it is. Everything needed to go on with it anywhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobRecord {
    /// What was asked for.
    pub request: JobRequest,
    /// Where it is.
    pub status: JobStatus,
    /// How it trains, once its files are validated.
    pub settings: Option<TrainingSettings>,
    /// What the files held.
    pub data: Option<DataReport>,
    /// Steps committed.
    pub steps: u64,
    /// Shares of the state after them, or after the last of them that was made durable; empty before that.
    pub shards: Vec<BlobId>,
    /// How many of the steps came after these shares: they are repeated if the job is interrupted.
    #[serde(default)]
    pub steps_since_shards: u64,
    /// What the last step showed.
    pub last: Option<StepMetrics>,
    /// Targets trained so far.
    pub trained_tokens: u64,
    /// Milliseconds that committed steps took, those included that were repeated.
    #[serde(default)]
    pub trained_ms: u64,
    /// Seconds until the end, as it goes now.
    pub remaining_s: Option<u64>,
    /// The fine-tuned model's name, once it is served.
    pub fine_tuned_model: Option<String>,
    /// The finished adapter.
    pub adapter: Option<AdapterId>,
    /// Samples of the file that a promotion is decided on.
    #[serde(default)]
    pub evaluation: Option<BlobId>,
    /// How far a promotion is that depends on a comparison.
    #[serde(default)]
    pub candidate: Option<Candidate>,
    /// The model, where all weights were trained.
    #[serde(default)]
    pub trained_model: Option<TrainedModel>,
    /// Once the job has ended: the table of steps, and of one that has succeeded the files of its adapter or model.
    pub result_files: Vec<FileId>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// When it ended.
    pub finished_at: Option<u64>,
    /// Number of events so far.
    pub events: u64,
    /// What could be looked at again.
    pub checkpoints: Vec<Checkpoint>,
}

/// What a job's files held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataReport {
    /// Good examples of the training file.
    pub examples: u64,
    /// What they became.
    pub samples: u64,
    /// Tokens of an epoch.
    pub tokens: u64,
    /// Targets among them.
    pub target_tokens: u64,
    /// Rows of the longest sample, validation data included: no micro-batch can be smaller.
    #[serde(default)]
    pub longest_sample_rows: u32,
    /// Examples that were cut off.
    pub truncated_examples: u64,
    /// Tokens that were cut off.
    pub truncated_tokens: u64,
    /// What an owner should know although it is no error.
    pub warnings: Vec<String>,
}

/// A model all of whose weights were trained, as files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedModel {
    /// Steps committed.
    pub step: u64,
    /// A manifest of the files.
    pub manifest: BlobId,
    /// The files.
    pub files: Vec<ExportedFile>,
}

/// A finished adapter that is served only if it is better than what is. It is stored as a generation of its name either way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// The name.
    pub name: String,
    /// Which of its generations the adapter is.
    pub generation: u64,
    /// What was decided; `None` while it is being compared.
    pub outcome: Option<PromotionOutcome>,
}

/// What became of a candidate, and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromotionOutcome {
    /// Why.
    pub verdict: PromotionVerdict,
    /// The figures; `None` where there are none.
    pub comparison: Option<Comparison>,
}

impl PromotionOutcome {
    /// Whether the candidate is to be served.
    pub fn is_promoted(&self) -> bool {
        matches!(self.verdict, PromotionVerdict::Better | PromotionVerdict::ServedAlready)
    }
}

/// Why a candidate is served, or is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PromotionVerdict {
    /// It is better than what is served.
    Better,
    /// It is what is served: somebody has promoted it by hand, or an earlier job has learnt the very same.
    ServedAlready,
    /// It is worse than what is served, or as good.
    NotBetter,
    /// It is better, but does not come up to the bound.
    OutOfBound,
    /// They could not be compared; why.
    NotCompared(String),
}

/// A candidate and what is served, measured on the same examples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// What the candidate comes to.
    pub candidate: f64,
    /// What is served comes to.
    pub served: f64,
    /// The generation that is served under the name; `None` where there is none, and it is the base model.
    pub against: Option<u64>,
    /// How many answers were asked for, or targets measured.
    pub count: u64,
}

/// A state of the adapter that can be served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Counts a job's checkpoints, from 0.
    pub number: u64,
    /// When it was made.
    pub created_at: u64,
    /// Steps committed.
    pub step: u64,
    /// The adapter.
    pub adapter: AdapterId,
    /// Its files, which anybody may read.
    #[serde(default)]
    pub files: Vec<FileId>,
    /// The name under which it is served.
    pub model: String,
    /// The last step's.
    pub metrics: StepMetrics,
    /// Loss and accuracy of the validation data, where there are any.
    pub validation: Option<(f64, f64)>,
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobEvent {
    /// Counts a job's events, from 0.
    pub number: u64,
    /// When.
    pub created_at: u64,
    /// What.
    pub what: JobEventKind,
}

/// What can happen to a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum JobEventKind {
    /// It was asked for.
    Created,
    /// Its training file is being checked.
    Validating,
    /// Its files are good.
    Queued(DataReport),
    /// Ranks train it.
    Started,
    /// A step was committed.
    Step {
        /// Counted from 1.
        step: u64,
        /// Of how many.
        steps: u64,
        /// What it showed.
        metrics: StepMetrics,
    },
    /// The validation data was measured.
    Evaluated {
        /// Steps committed.
        step: u64,
        /// Mean loss.
        loss: f64,
        /// Share of targets that were the most probable token, or of pairs of answers with a positive margin.
        accuracy: f64,
    },
    /// A checkpoint can be used.
    Checkpoint {
        /// Steps committed.
        step: u64,
        /// Its name as a model.
        model: String,
    },
    /// Ranks were lost or their session ended; it goes on from its committed step.
    Interrupted(String),
    /// Its steps take far longer than they should: a node is slow, or a link is.
    Slowed(String),
    /// By its owner.
    Paused,
    /// By its owner.
    Resumed,
    /// It ends before its last step, as the validation loss no longer falls.
    StoppedEarly {
        /// Steps committed.
        step: u64,
    },
    /// Its model is served under this name.
    ModelCreated(String),
    /// All weights were trained, and the model's files can be downloaded under these names.
    ModelStored(Vec<(FileId, String)>),
    /// It has ended well.
    Succeeded,
    /// By its owner.
    Cancelled,
    /// It has failed.
    Failed(JobError),
    /// It waits until others have given memory back; why, in numbers.
    WaitsForMemory(String),
    /// Its adapter is stored as this generation of a name, and is being compared with what is served.
    Comparing {
        /// The name.
        name: String,
        /// The generation.
        generation: u64,
    },
    /// Its adapter has been compared with what is served.
    Compared(PromotionOutcome),
}

/// An adapter to be served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadAdapter {
    /// Its name as a model.
    pub name: String,
    /// Its files.
    pub adapter: AdapterId,
    /// Where it came from, for the model list: a path, or a job.
    pub root: String,
    /// When.
    pub created_at: u64,
    /// Whether a new generation may replace one that is served.
    pub replace: bool,
    /// Refused where another generation is served.
    pub expected_generation: Option<u64>,
    /// Store it as a generation of the name, and go on serving what is served. Repeating it changes nothing.
    pub hold_back: bool,
    /// Whose it is: for others it is not there. `None` is for everybody.
    pub owner: Option<Tenant>,
}

/// An adapter that is served, or is kept and can be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterView {
    /// Its name as a model.
    pub name: String,
    /// Counts what was served under this name, from 1.
    pub generation: u64,
    /// Its files.
    pub adapter: AdapterId,
    /// Where it came from.
    pub root: String,
    /// When it was loaded.
    pub created_at: u64,
    /// Whose it is: for others it is not there. `None` is for everybody.
    #[serde(default)]
    pub owner: Option<Tenant>,
}

/// What a gateway that validated a job's files answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreparedJob {
    /// How it trains.
    pub settings: TrainingSettings,
    /// What the files held.
    pub data: DataReport,
    /// Samples of the file that a promotion is decided on, where there is one.
    pub evaluation: Option<BlobId>,
}
