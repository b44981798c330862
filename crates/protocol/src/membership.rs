//! The control plane between nodes and the scheduler: joining, assignment, readiness, beats. Typed and rare.
//!
//! One TCP connection per node carries [`FromNode`] and [`ToNode`]; step plans travel on it too, in order. The
//! connection *is* the membership: when it ends, the node has left.

use crate::prefix::BlockHash;
use crate::step::{RowDigests, StepPlan, StepResult, StepTiming};
use crate::training::{OpenSession, TrainingReport, TrainingWork};
use ashlar_vocabulary::{
    AdapterId, BlockId, Bytes, HeadSlice, LayerRange, LeaseTerm, ModelDigest, NodeId, Precision, ReplicaId,
    ReplicaRevision, SequenceId, SessionId, StageIndex, StepId, TensorRank,
};
use serde::{Deserialize, Serialize};

/// From a node to the scheduler.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum FromNode {
    /// First message.
    Join(Box<Join>),
    /// The assignment was refused (for example by its term); the connection is closed afterwards.
    Refused {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// The highest term this node has accepted.
        term: LeaseTerm,
    },
    /// Progress of loading an assignment, at most a few times per second.
    Loading {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// Bytes of weights ready so far.
        loaded: Bytes,
        /// Bytes of weights in all.
        total: Bytes,
    },
    /// Weights are in place and links to the peers stand.
    Ready {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// What the rank has reserved.
        reserved: Bytes,
        /// The process's resident memory now.
        resident: Bytes,
        /// Blocks of its KV cache whose content it has kept from a former layout of the same slice, at most
        /// [`KEPT_BLOCKS_MAX`].
        kept: Vec<(BlockId, BlockHash)>,
        /// Whether its boundary log has the rows of all these blocks.
        logged: bool,
    },
    /// The assignment failed: weights missing, corrupt, too large, a peer lost… The node stays joined.
    Failed {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// What to tell the operator.
        message: String,
        /// Whether it was the weights: they are not there, or not what they should be.
        weights: bool,
    },
    /// The thread that computes has panicked: the process ends.
    Crashed,
    /// This node is to hold nothing any more, because its process was asked to end or an operator wants it empty; or that is
    /// over. It serves on until it is released, and is [dismissed](ToNode::Dismissed) once it may go.
    Leaving(bool),
    /// A slice that was [to be prepared](ToNode::Prepare) is in memory, or why not.
    Prepared {
        /// The revision that it was ordered with.
        revision: ReplicaRevision,
        /// Why not, for the operator.
        outcome: Result<(), String>,
    },
    /// What this rank has computed in a step is not finite, though what it was given was, and no adapter was in it.
    NotFinite {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// Of these sequences.
        sequences: Vec<SequenceId>,
    },
    /// What rank 0 of a stage has computed of audited sequences in a step; before it says that the step is done.
    Digests {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// Of their rows.
        digests: Vec<RowDigests>,
    },
    /// From rank 0 of the last stage only.
    StepResult(StepResult),
    /// From every other rank after each step, so that the scheduler sees all stages at work.
    StepDone {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// The step.
        step: StepId,
        /// How this rank spent it.
        timing: StepTiming,
    },
    /// An adapter was loaded and can be used, or cannot.
    AdapterLoaded {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// The adapter.
        adapter: AdapterId,
        /// The number of the load that this answers.
        load: u64,
        /// The memory that this rank's share takes, or why there is none.
        outcome: Result<Bytes, AdapterRefusal>,
    },
    /// About a session of a fine-tuning job.
    Training {
        /// The session.
        session: SessionId,
        /// What there is to say.
        report: Box<TrainingReport>,
    },
    /// Sent by the compute loop itself, between layers, at most every [`BEAT_INTERVAL_MS`]: silence means a hang.
    Beat,
}

/// Why a rank has not loaded an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRefusal {
    /// What to tell.
    pub message: String,
    /// Whether another attempt may succeed (a store that does not answer), or never will (a file that is missing).
    pub retry: bool,
}

/// Most blocks that a rank says it has kept: a few megabytes of a message.
pub const KEPT_BLOCKS_MAX: usize = 100_000;

/// How often a healthy node beats, busy or idle, in milliseconds.
pub const BEAT_INTERVAL_MS: u64 = 200;

/// What a node tells about itself when it joins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Join {
    /// Its name.
    pub node: NodeId,
    /// Where its peers reach it (`host:port`, data plane).
    pub data_address: String,
    /// Memory it is willing to use.
    pub memory: Bytes,
    /// Measured read bandwidth.
    pub bandwidth_bytes_per_s: f64,
    /// Measured f32 multiply-add rate, in operations (two per multiply-add).
    pub flops_per_s: f64,
    /// Measured rate of products with quantised weights, counted the same.
    pub quantized_flops_per_s: f64,
    /// Compute threads.
    pub threads: u32,
    /// Instruction set chosen.
    pub isa: String,
    /// Layers this node insists on, if configured.
    pub layers: Option<LayerRange>,
    /// What it still holds from before a lost connection, so that nothing is loaded twice.
    pub holds: Option<HeldSlice>,
    /// The highest lease term it has accepted.
    pub term: LeaseTerm,
    /// The signal by which the process before this one crashed, if it did, as its supervisor tells; in the first join only.
    pub crashed: Option<i32>,
    /// Whether it is to be given no place: see [`FromNode::Leaving`].
    pub leaving: bool,
}

/// A slice of a model that a node has in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSlice {
    /// Which model.
    pub model_digest: ModelDigest,
    /// Which layers.
    pub layers: LayerRange,
    /// Its rank's place in the tensor-parallel group.
    pub tensor_rank: TensorRank,
    /// The group's size.
    pub tensor_parallel_size: u32,
    /// Its rows of the head; `None` where it holds none.
    pub head: Option<HeadSlice>,
}

/// From the scheduler to a node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ToNode {
    /// Take this place. Replaces any former assignment; its links are torn down first.
    Assign(Box<Assignment>),
    /// Give up the current assignment but stay joined (standby).
    Release {
        /// Raised, so that late messages of the former assignment are dropped.
        revision: ReplicaRevision,
    },
    /// Bring the slice of this place into memory, beside the place that is held: it is about to be assigned. Replaces a
    /// former order; `None` only withdraws that. Answered by [`FromNode::Prepared`].
    Prepare(Option<Box<Assignment>>),
    /// Be empty from now on, or be of use again: an operator's wish, which the node repeats as [`FromNode::Leaving`] and in
    /// every later [`Join`] of its process, so that a new scheduler knows it, too.
    Drain(bool),
    /// A node that leaves holds no place and gets none: a process that was asked to end may end.
    Dismissed,
    /// Execute a step.
    Step(Box<StepPlan>),
    /// Load this rank's share of an adapter, beside the steps; answered by [`FromNode::AdapterLoaded`].
    LoadAdapter {
        /// The assignment's revision.
        revision: ReplicaRevision,
        /// Which.
        adapter: AdapterId,
        /// Counts loads, so that the answer to an earlier one is not taken for the answer to a later one.
        load: u64,
    },
    /// Forget an adapter; no sequence of this or a later step uses it.
    UnloadAdapter {
        /// Which.
        adapter: AdapterId,
    },
    /// Take part in a session of a fine-tuning job.
    OpenSession(Box<OpenSession>),
    /// What a session does next.
    Training {
        /// The session; ranks that do not know it ignore this.
        session: SessionId,
        /// What to do.
        work: TrainingWork,
    },
    /// The scheduler lives: sent at least every [`SCHEDULER_BEAT_MS`](crate::serving::SCHEDULER_BEAT_MS), so that a node leaves one
    /// that it does not hear any more.
    Beat,
    /// The connection is closed after this; why, for the node's log. It may come back.
    Closing(String),
    /// This node cannot join; the reason is for the operator. The connection is closed afterwards.
    Rejected(String),
}

/// A rank's place in a replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The scheduler's lease.
    pub term: LeaseTerm,
    /// Who holds it.
    pub holder: String,
    /// Raised by each re-layout.
    pub revision: ReplicaRevision,
    /// Which replica.
    pub replica: ReplicaId,
    /// Where the model's files are: a directory, or a hub id.
    pub model: String,
    /// In which precision to serve it.
    pub precision: Precision,
    /// Digest of the model; the node refuses other bytes.
    pub model_digest: ModelDigest,
    /// Which stage.
    pub stage: StageIndex,
    /// How many stages the replica has.
    pub num_stages: u32,
    /// This stage's layers.
    pub layers: LayerRange,
    /// Which rank within the stage.
    pub tensor_rank: TensorRank,
    /// Ranks per stage.
    pub tensor_parallel_size: u32,
    /// Blocks of KV cache to reserve.
    pub kv_blocks: u32,
    /// Whether to keep, per block, the rows that go to the next stage: should that be lost, it alone computes again.
    pub boundary_log: bool,
    /// Most rows in one step; workspaces are sized by it.
    pub max_num_batched_tokens: u32,
    /// Data addresses of this stage's ranks, by rank (this node's own included).
    pub group: Vec<String>,
    /// Data address of the same rank in the next stage; `None` on the last.
    pub next: Option<String>,
    /// This rank's rows of the head; `None` where it computes none.
    pub head: Option<HeadSlice>,
    /// Data address of rank 0 of the last stage, for ranks of earlier stages that hold rows of the head.
    pub sampler: Option<String>,
    /// Data addresses of other nodes that may have the model's files, likely ones first; at most [`SOURCES_MAX`].
    pub sources: Vec<String>,
}

/// How many nodes an assignment names that may have the model's files.
pub const SOURCES_MAX: usize = 8;
