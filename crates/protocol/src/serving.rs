//! Between gateway and scheduler: submissions in, token events out, and a watched snapshot of the cluster.
//!
//! One TCP connection per gateway. When it ends, the scheduler cancels that gateway's requests, and the gateway submits them
//! again to whichever scheduler it reaches next, with the tokens that it has delivered.

use crate::access::{Charge, KeyRecord, Quota};
use crate::admin::{
    AdapterView, AdminReply, AdminRequest, Comparison, FileRecord, JobError, JobRequest, PreparedJob,
    PromotionMetric,
};
use crate::models::ModelsView;
use crate::responses::ResponseRecord;
use crate::step::StepTiming;
use ashlar_vocabulary::{
    AdapterId, BlobId, Bytes, JobId, LayerRange, LeaseTerm, ModelDigest, NodeId, ReplicaId, ReplicaRevision,
    RequestId, SamplingParams, StageIndex, Tenant, TensorRank, TokenId, TokenLogprobs,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest silence of a scheduler that lives, in milliseconds.
pub const SCHEDULER_BEAT_MS: u64 = 200;

/// Names one choice of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChoiceId {
    /// The client's request.
    pub request: RequestId,
    /// Which of its choices, from 0.
    pub choice: u32,
}

/// From a gateway to the scheduler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToScheduler {
    /// Start (or, with `forced` tokens, resume) one choice. Idempotent: a known [`ChoiceId`] is ignored, but for one that is
    /// [kept](Submit::kept), whose tokens are told from the first that is not forced.
    Submit(Box<Submit>),
    /// Stop: the client has gone, or a stop string has matched. Unknown ids are ignored. No event follows. A choice that is
    /// [kept](Submit::kept) is only followed no longer.
    Cancel(ChoiceId),
    /// Administration.
    Admin {
        /// Names the call on this connection.
        call: u64,
        /// For whom: what belongs to others is not there. `None` is for whoever may see everything.
        tenant: Option<Tenant>,
        /// What is wanted.
        request: Box<AdminRequest>,
    },
    /// The files of a job that this gateway was asked to validate are samples now, or cannot be used.
    Prepared {
        /// The job.
        job: JobId,
        /// How it trains, or why it cannot.
        outcome: Box<Result<PreparedJob, JobError>>,
    },
    /// The adapter of a job that this gateway was asked to compare has been compared with what is served, or cannot be.
    Compared {
        /// The job.
        job: JobId,
        /// The figures, or why there are none.
        outcome: Box<Result<Comparison, String>>,
    },
    /// The gateway has heard of this higher term, and closes. A scheduler that leads on with a lower one has been
    /// granted it by a store that has forgotten the higher.
    Refused {
        /// The highest term seen.
        term: LeaseTerm,
    },
}

/// One choice of a request, complete: nothing else is needed to compute it anywhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Submit {
    /// Its name.
    pub id: ChoiceId,
    /// The model it is for; a scheduler of another digest refuses.
    pub model_digest: ModelDigest,
    /// The adapter that changes the model.
    pub adapter: Option<AdapterId>,
    /// Prompt tokens, at least one.
    pub prompt: Vec<TokenId>,
    /// Tokens already delivered to the client: forced, never re-sampled.
    pub forced: Vec<TokenId>,
    /// Of a choice that is kept, what is known of the forced tokens: one each, or none at all.
    pub forced_logprobs: Vec<Option<TokenLogprobs>>,
    /// Whether the choice belongs to a stored response: its tokens are remembered, any gateway that submits it too follows it, and it
    /// goes on for a while when none does.
    pub kept: bool,
    /// Most tokens to generate in all, `forced` included.
    pub max_new_tokens: u32,
    /// Tokens that end the answer (end of sequence unless ignored, `stop_token_ids`).
    pub stop_tokens: Vec<TokenId>,
    /// Sampling, with its seed.
    pub sampling: SamplingParams,
    /// Prefix-cache salt of the tenant; equal salts share cached prefixes.
    pub tenant_salt: u64,
    /// On whose account it is; `None` is on nobody's.
    pub charge: Option<Charge>,
    /// Lower goes first; 0 is normal.
    pub priority: i32,
    /// Milliseconds from arrival until the request is failed.
    pub deadline_ms: u64,
    /// W3C trace context, if traced.
    pub traceparent: Option<String>,
}

/// From the scheduler to a gateway.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromScheduler {
    /// The cluster as it is now: first message, and again on each change (at most a few times per second).
    Cluster(Box<ClusterSnapshot>),
    /// The other models of the cluster: before the first [`Cluster`](Self::Cluster) where there are any, and again on each change.
    Models(Box<ModelsView>),
    /// All keys that are let in: before the first [`Cluster`](Self::Cluster), and again on each change.
    Keys(Vec<KeyRecord>),
    /// What is left of the limits of the key on whose account a choice is: before everything else about it.
    Quota {
        /// Which choice.
        id: ChoiceId,
        /// What is left.
        quota: Quota,
    },
    /// The scheduler lives. Sent at least every [`SCHEDULER_BEAT_MS`], whatever else there is to say.
    Beat,
    /// The answer to a call.
    Admin {
        /// Which.
        call: u64,
        /// What came of it.
        reply: Box<AdminReply>,
    },
    /// Validate a job's files and answer [`ToScheduler::Prepared`]. Repeated to another gateway where this one goes away.
    Prepare(Box<PrepareJob>),
    /// Compare a job's adapter with what is served and answer [`ToScheduler::Compared`]. Repeated to another gateway where this
    /// one goes away.
    Compare(Box<CompareAdapters>),
    /// Nobody follows this response, which is in progress: take it up. Repeated, also to another gateway, until somebody does.
    Adopt(Box<ResponseRecord>),
    /// The next token of a choice.
    Token(TokenEvent),
    /// Tokens of a choice that is kept, which were there before this gateway came.
    Tokens(TokenHistory),
    /// Log-probabilities of prompt tokens, in ascending position order, before the first token.
    PromptLogprobs {
        /// Which choice.
        id: ChoiceId,
        /// Position of the first described token.
        position: u32,
        /// One per position.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The choice ended; nothing follows.
    Finished {
        /// Which choice.
        id: ChoiceId,
        /// Why.
        reason: FinishReason,
        /// What it took.
        receipt: Receipt,
    },
    /// The choice failed; nothing follows.
    Failed {
        /// Which choice.
        id: ChoiceId,
        /// Why.
        error: RequestFailure,
    },
}

/// A job's files, to be validated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PrepareJob {
    /// What was asked for.
    pub request: JobRequest,
    /// The training file.
    pub training_file: FileRecord,
    /// The validation file.
    pub validation_file: Option<FileRecord>,
    /// The file that a promotion is decided on.
    pub evaluation_file: Option<FileRecord>,
}

/// An adapter to be compared with what is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompareAdapters {
    /// Whose adapter it is.
    pub job: JobId,
    /// The base model.
    pub model_digest: ModelDigest,
    /// What to measure.
    pub metric: PromotionMetric,
    /// The samples to measure it on.
    pub evaluation: BlobId,
    /// The adapter.
    pub candidate: AdapterId,
    /// What is served: a generation with its adapter, or the base model.
    pub served: Option<(u64, AdapterId)>,
}

/// A token of a choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenEvent {
    /// Which choice.
    pub id: ChoiceId,
    /// Index among generated tokens, from 0; the gateway forwards only the next one it expects.
    pub index: u32,
    /// The token.
    pub token: TokenId,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Prompt tokens of this choice that came from the prefix cache.
    pub cached_tokens: u32,
    /// Milliseconds that this choice waited before its first step.
    pub queue_ms: u64,
}

/// Consecutive tokens of a choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenHistory {
    /// Which choice.
    pub id: ChoiceId,
    /// Index of the first among generated tokens.
    pub index: u32,
    /// The tokens, with log-probabilities where asked for.
    pub tokens: Vec<(TokenId, Option<TokenLogprobs>)>,
    /// Prompt tokens of this choice that came from the prefix cache.
    pub cached_tokens: u32,
    /// Milliseconds that this choice waited before its first step.
    pub queue_ms: u64,
}

impl TokenHistory {
    /// The same, token by token.
    pub fn into_events(self) -> impl Iterator<Item = TokenEvent> {
        let TokenHistory { id, index, tokens, cached_tokens, queue_ms } = self;
        tokens.into_iter().enumerate().map(move |(offset, (token, logprobs))| {
            let index = index + offset as u32;
            TokenEvent { id, index, token, logprobs, cached_tokens, queue_ms }
        })
    }
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// A stop token was sampled (it was delivered as the last token event), or the grammar is complete.
    Stop,
    /// `max_new_tokens` or the context length was reached.
    Length,
}

/// Where a choice's time went.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Prompt tokens.
    pub prompt_tokens: u32,
    /// Of these, found in the prefix cache.
    pub cached_tokens: u32,
    /// Generated tokens.
    pub generated_tokens: u32,
    /// Waiting before the first step, in milliseconds.
    pub queue_ms: u64,
    /// From the first step to the first token, in milliseconds.
    pub prefill_ms: u64,
    /// From the first token to the last, in milliseconds.
    pub decode_ms: u64,
    /// Times it was preempted.
    pub preemptions: u32,
    /// Times it was taken up again after its replica was lost.
    pub replays: u32,
    /// How each stage spent the steps that this choice was in (of several ranks, the one that computed longest): it shares them with
    /// others. Steps whose reports came after their end are missing.
    pub stages: Vec<StepTiming>,
}

/// Why a choice failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestFailure {
    /// Class, which decides the HTTP status.
    pub kind: FailureKind,
    /// For the client.
    pub message: String,
    /// When to try again, for `Overloaded` and `Unavailable`.
    pub retry_after_ms: Option<u64>,
}

/// Classes of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The request can never run here (400).
    Invalid,
    /// Another model is served (404).
    UnknownModel,
    /// Queues are full (429).
    Overloaded,
    /// Its key has asked for as much as it may (429).
    RateLimited,
    /// Its key is let in no longer (401).
    UnknownKey,
    /// No replica is up, or it was lost (503).
    Unavailable,
    /// The deadline passed (504).
    DeadlineExceeded,
    /// A fault of ours (500).
    Internal,
    /// Whatever replica computed it has crashed, at last when it was computed alone: it is not tried again (500).
    Suspect,
    /// This scheduler ends. Not for the client: the gateway submits the choice to the next one.
    Leaving,
    /// The response that it belongs to was cancelled or deleted by its owner.
    Cancelled,
}

/// What a gateway (and an operator) may know about the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterSnapshot {
    /// The scheduler's lease.
    pub term: LeaseTerm,
    /// Directory or hub id of the model.
    pub model: String,
    /// Its digest.
    pub model_digest: ModelDigest,
    /// Longest sequence.
    pub max_context_tokens: u32,
    /// Joined nodes.
    pub nodes: Vec<NodeView>,
    /// Replicas, whole or in the making.
    pub replicas: Vec<ReplicaView>,
    /// Adapters that are served, by name.
    pub adapters: Vec<AdapterView>,
    /// Why nothing can be served, if so (for example: the model does not fit, with the ledger's missing bytes).
    pub problem: Option<String>,
    /// Numbers for metrics.
    pub counters: SchedulerCounters,
    /// Who leads: the address of the scheduler's process, and which of its lives it is.
    pub holder: String,
    /// Connected gateways.
    pub gateways: u32,
    /// Choices in progress: those that are computed first, then those that wait; at most [`REQUESTS_SHOWN`].
    pub requests: Vec<RequestView>,
}

/// Most choices that a snapshot tells of.
pub const REQUESTS_SHOWN: usize = 64;

/// A choice in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestView {
    /// Which.
    pub id: ChoiceId,
    /// The adapter that changes the model.
    pub adapter: Option<AdapterId>,
    /// How far it is.
    pub state: RequestState,
    /// Where it is computed.
    pub replica: Option<ReplicaId>,
    /// Tokens of its prompt.
    pub prompt_tokens: u32,
    /// Positions that have been sent to be computed.
    pub computed_tokens: u32,
    /// Tokens generated so far.
    pub generated_tokens: u32,
    /// Milliseconds since it was submitted to this scheduler.
    pub age_ms: u64,
    /// Of these, before its first step.
    pub queue_ms: u64,
}

/// How far a choice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RequestState {
    /// It has no place yet.
    Waiting,
    /// Its prompt is computed.
    Prefill,
    /// Its answer is.
    Decode,
    /// It gave its place up for others, and waits for one again.
    Preempted,
}

/// A joined node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub node: NodeId,
    /// Where other ranks reach it, `host:port`.
    pub address: String,
    /// Compute threads.
    pub threads: u32,
    /// Instruction set.
    pub isa: String,
    /// Memory it offered.
    pub memory: Bytes,
    /// Measured read bandwidth.
    pub bandwidth_bytes_per_s: f64,
    /// Measured multiply-add rate.
    pub flops_per_s: f64,
    /// Its place: replica, stage, rank; `None` for a standby.
    pub place: Option<(ReplicaId, StageIndex, TensorRank)>,
    /// Layers it holds.
    pub layers: LayerRange,
    /// Share of weights loaded, 0…1.
    pub loaded: f32,
    /// Whether it leaves: it is to hold nothing any more.
    pub leaving: bool,
    /// Why others are to take its place, if it does harm.
    pub quarantined: Option<String>,
    /// Memory reserved for serving: weights, KV cache, workspaces.
    pub reserved: Bytes,
    /// What its place is planned to take, line by line; empty for a standby.
    pub ledger: BTreeMap<String, Bytes>,
    /// Memory that adapters in memory take; of a replica's ranks that of the fullest.
    pub adapters: Bytes,
    /// Memory reserved for sessions of fine-tuning jobs.
    pub jobs: Bytes,
    /// Observed resident memory.
    pub resident: Bytes,
    /// Cumulated time since the assignment: computing, waiting, exchanging, sending (µs).
    pub busy: StepTiming,
    /// Cumulated time of the steps of fine-tuning jobs since it joined (µs).
    pub trained: crate::training::TrainingTiming,
}

/// A replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaView {
    /// Which.
    pub replica: ReplicaId,
    /// Its layout's revision.
    pub revision: ReplicaRevision,
    /// Whether it serves.
    pub ready: bool,
    /// KV blocks in all and in use.
    pub kv_blocks: (u32, u32),
    /// Steps completed.
    pub steps: u64,
    /// How long rows lately took from each stage to the next (µs); `None` where nothing has gone that way yet.
    pub hops_us: Vec<Option<u64>>,
}

/// Cumulative numbers, and gauges of the moment.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SchedulerCounters {
    /// Sequences running.
    pub running: u64,
    /// Sequences waiting.
    pub waiting: u64,
    /// Preemptions so far.
    pub preemptions: u64,
    /// Sequences that were taken up again after their replica was lost.
    pub replays: u64,
    /// Prompt tokens looked up in the prefix cache so far.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there so far.
    pub prefix_cache_hits: u64,
    /// Steps so far.
    pub steps: u64,
    /// Tokens computed so far (prompt and generated).
    pub scheduled_tokens: u64,
    /// Of these, positions that only the stages that had been lost computed again.
    pub refilled_tokens: u64,
    /// Tokens generated so far.
    pub generated_tokens: u64,
    /// Steps of fine-tuning jobs that this scheduler has committed.
    pub training_steps: u64,
    /// Tokens that they computed.
    pub trained_tokens: u64,
    /// Training loss of the step committed last, while a job trains.
    pub training_loss: Option<f64>,
    /// How audits went.
    pub audits: AuditCounters,
    /// Choices that were refused so far because more came than could be computed.
    pub shed: u64,
    /// Whether any has been within the last seconds.
    pub shedding: bool,
    /// How long all that waits will take, in milliseconds, as far as that is known; `None` while nobody waits.
    pub predicted_wait_ms: Option<u64>,
}

/// Sampled sequences that were computed again to compare the bits.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuditCounters {
    /// With the same bits.
    pub passed: u64,
    /// With other bits.
    pub differed: u64,
    /// Of these, those in which nobody could tell who is wrong.
    pub undecided: u64,
    /// Not completed: the sequence was cancelled, or lost with its replica.
    pub dropped: u64,
}
