//! What the cluster core is told, and what it wants done. Both are closed enums.

use crate::engine::ReplicaUp;
use ashlar_protocol::membership::{Assignment, Join};
use ashlar_protocol::prefix::BlockHash;
use ashlar_protocol::step::StepTiming;
use ashlar_protocol::training::TrainingTiming;
use ashlar_shard_plan::Links;
use ashlar_vocabulary::{
    BlockId, Bytes, LayerRange, LeaseTerm, ModelDigest, ModelShape, NodeId, Precision, ReplicaId,
    ReplicaRevision, SequenceId, StepId,
};

/// Names one connection of a node; never reused. A node that reconnects has another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeConnection(pub u64);

/// What is to be laid out, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Where the model's files are: a directory, or a hub id.
    pub model: String,
    /// In which precision nodes serve it.
    pub precision: Precision,
    /// Its digest; nodes refuse other bytes.
    pub model_digest: ModelDigest,
    /// Its dimensions.
    pub shape: ModelShape,
    /// Longest sequence, prompt and answer together.
    pub max_context_tokens: u32,
    /// The lease under which assignments are made.
    pub term: LeaseTerm,
    /// Who holds it.
    pub holder: String,
    /// Pipeline stages per replica; `None` lets the plan choose the fewest that fit.
    pub stages: Option<usize>,
    /// Ranks per stage; `None` means 1.
    pub tensor_parallel_size: Option<usize>,
    /// Replicas; `None` means as many as fit.
    pub replicas: Option<usize>,
    /// Whether all stages share the head; `None` lets the plan choose.
    pub spread_head: Option<bool>,
    /// Wait for this many nodes before the first layout; `None` waits until nobody has joined for `settle_ms`.
    pub expected_nodes: Option<usize>,
    /// See `expected_nodes`.
    pub settle_ms: u64,
    /// Most sequences running per replica; sizes the KV cache.
    pub max_num_seqs: usize,
    /// Most rows in one step; sizes the workspaces.
    pub max_num_batched_tokens: u32,
    /// Most of a node's memory that KV blocks may take, 0…1.
    pub kv_memory_share: f64,
    /// Longest silence of a ready node, unless four predicted steps take longer.
    pub silence_ms_max: u64,
    /// Whether stages keep what they hand on, where there is room: a stage that is lost is then the only one that computes again.
    pub boundary_log: bool,
    /// How long a layout with a vacant place is kept before what is left is planned anew.
    pub replan_after_ms: u64,
    /// Assumed links between nodes.
    pub links: Links,
}

/// What a node has been computing when it says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spent {
    /// Nothing that is counted.
    Nothing,
    /// A step of serving.
    Serving(StepId, StepTiming),
    /// A step of training.
    Training(TrainingTiming),
}

/// What the cluster core is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A node introduces itself.
    Join {
        /// On this connection.
        connection: NodeConnection,
        /// What it offers.
        join: Box<Join>,
    },
    /// A node's connection has ended.
    Lost {
        /// Which.
        connection: NodeConnection,
        /// How, as in "node a was lost: REASON".
        reason: String,
    },
    /// A node is loading weights.
    Loading {
        /// Which node.
        connection: NodeConnection,
        /// Its assignment.
        revision: ReplicaRevision,
        /// Bytes ready.
        loaded: Bytes,
        /// Bytes in all.
        total: Bytes,
    },
    /// A node can execute steps.
    Ready {
        /// Which node.
        connection: NodeConnection,
        /// Its assignment.
        revision: ReplicaRevision,
        /// What it has reserved.
        reserved: Bytes,
        /// Its resident memory.
        resident: Bytes,
        /// Blocks of KV cache that it has kept.
        kept: Vec<(BlockId, BlockHash)>,
        /// Whether it has kept what it handed on of them, too.
        logged: bool,
    },
    /// A node cannot fulfil its assignment.
    Failed {
        /// Which node.
        connection: NodeConnection,
        /// Its assignment.
        revision: ReplicaRevision,
        /// Why.
        message: String,
        /// Whether it was the weights.
        weights: bool,
    },
    /// A node refuses an assignment because it has accepted a higher term.
    Refused {
        /// Which node.
        connection: NodeConnection,
        /// The term it has accepted.
        term: LeaseTerm,
    },
    /// A gateway refuses to be served because it has heard of a higher term.
    GatewayRefused {
        /// The term it has heard of.
        term: LeaseTerm,
    },
    /// A node is to hold nothing any more, or that is over.
    Leaving {
        /// Which node.
        connection: NodeConnection,
        /// Whether.
        leaving: bool,
    },
    /// A node has prepared what it was told to, or could not.
    Prepared {
        /// Which node.
        connection: NodeConnection,
        /// The revision of the order.
        revision: ReplicaRevision,
        /// Why not.
        outcome: Result<(), String>,
    },
    /// A node has computed numbers that are none from numbers that were, without an adapter.
    NotFinite {
        /// Which node.
        connection: NodeConnection,
        /// Its assignment.
        revision: ReplicaRevision,
        /// Of these sequences.
        sequences: Vec<SequenceId>,
    },
    /// A replica has computed other bits than others, of layers in this range or, if it is empty, in the head.
    Differs {
        /// Which.
        replica: ReplicaId,
        /// In which layout.
        revision: ReplicaRevision,
        /// What was computed between the rows that are right and those that are not.
        layers: LayerRange,
    },
    /// A replica that [drains](Effect::ReplicaDrains) has nothing left to do.
    Drained {
        /// Which.
        replica: ReplicaId,
    },
    /// The operator wants the layout that would be planned from nothing now.
    Replan,
    /// Any other sign of life.
    Heard {
        /// Which node.
        connection: NodeConnection,
        /// What it has been computing.
        spent: Spent,
    },
    /// The engine has given up a replica.
    ReplicaFault {
        /// Which.
        replica: ReplicaId,
        /// In which layout.
        revision: ReplicaRevision,
        /// Why.
        reason: String,
    },
    /// Time passes; silence is noticed, retries are due. Sent at least every [`TICK_MS`](super::TICK_MS).
    Tick {
        /// Longest predicted time among the steps in flight.
        slowest_step_ms: u64,
    },
}

/// What the cluster core wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Send an assignment.
    Assign {
        /// To this node.
        connection: NodeConnection,
        /// Its place.
        assignment: Box<Assignment>,
    },
    /// Tell a node to give up its place.
    Release {
        /// Which node.
        connection: NodeConnection,
        /// Raised.
        revision: ReplicaRevision,
    },
    /// Tell a node to bring a slice into memory beside its place, if there is room for it; without room, it counts as
    /// prepared, and is loaded when it is assigned. `None` withdraws a former order.
    Prepare {
        /// Which node.
        connection: NodeConnection,
        /// The place, and the bytes that its weights take.
        order: Option<(Box<Assignment>, Bytes)>,
    },
    /// For the log: others are to take this node's place.
    Quarantined {
        /// Which node.
        node: NodeId,
        /// What it did.
        reason: String,
    },
    /// Tell a node that leaves that it holds nothing any more.
    Dismiss {
        /// Which node.
        connection: NodeConnection,
    },
    /// Close a connection; its node, if it had joined, counts as lost already.
    Disconnect {
        /// Which.
        connection: NodeConnection,
        /// Why, for the log.
        reason: String,
    },
    /// For the engine: a replica serves.
    ReplicaUp(ReplicaUp),
    /// For the engine: a replica serves no longer.
    ReplicaDown {
        /// Which.
        replica: ReplicaId,
        /// For the clients whose requests it ends.
        reason: String,
    },
    /// For the engine: a replica takes no further sequence in, or does again.
    ReplicaDrains {
        /// Which.
        replica: ReplicaId,
        /// Whether.
        drains: bool,
    },
    /// For the engine: the replica that was lost lately was lost by a crash.
    ReplicaCrashed {
        /// Which.
        replica: ReplicaId,
        /// How, for clients.
        reason: String,
    },
    /// Why nothing can be served, has changed.
    Problem {
        /// Why.
        problem: Option<String>,
        /// Whether it takes more than time until that changes.
        lasting: bool,
    },
    /// A node or a gateway has accepted a higher term than ours: acquire one above it, or stop leading.
    Fenced {
        /// The term that the node has accepted.
        by: LeaseTerm,
    },
}
