//! Why there is no plan, and what to do about it.

use ashlar_vocabulary::{Bytes, NodeId};

/// A refusal. Every message says what would help.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A number of the request, the shape or a device makes no sense.
    #[error("cannot plan: {0}")]
    Invalid(String),
    /// No node has reported.
    #[error("no node has joined: start at least one node and point it at the scheduler")]
    NoNodes,
    /// The tensor-parallel size is not possible for this model.
    #[error("tensor_parallel_size {size} is not possible: {reason}")]
    TensorParallel {
        /// As asked for.
        size: usize,
        /// Why not, and which sizes are.
        reason: String,
    },
    /// The flags need more nodes than there are.
    #[error(
        "{stages} stage(s) × {tensor_parallel_size} rank(s) × {replicas} replica(s) need {needed} nodes, {present} \
         joined: add nodes or lower one of them"
    )]
    TooFewNodes {
        /// Stages per replica.
        stages: usize,
        /// Ranks per stage.
        tensor_parallel_size: usize,
        /// Replicas.
        replicas: usize,
        /// Product of the three.
        needed: usize,
        /// Nodes present.
        present: usize,
    },
    /// More stages than layers.
    #[error(
        "{stages} stages for {layers} layers: a stage holds at least one layer, lower the number of stages"
    )]
    TooManyStages {
        /// As asked for.
        stages: usize,
        /// The model's.
        layers: usize,
    },
    /// The memory does not suffice, even with one sequence's KV cache.
    #[error(
        "the model does not fit: needs {needs} on stage {stage}, node {node} has {has} ({missing} missing at \
         {line}): add a node, give node {node} more memory, or lower max_context_tokens or max_num_batched_tokens"
    )]
    DoesNotFit {
        /// The stage that lacks most in the best possible cut.
        stage: usize,
        /// The node there.
        node: NodeId,
        /// The ledger line at which its memory ends.
        line: &'static str,
        /// Total of its ledger.
        needs: Bytes,
        /// What it offers.
        has: Bytes,
        /// The difference at that line.
        missing: Bytes,
    },
    /// Fewer replicas fit than were asked for.
    #[error("{wanted} replicas do not fit, {possible} do: add nodes or ask for {possible}")]
    TooFewReplicas {
        /// As asked for.
        wanted: usize,
        /// How many fit.
        possible: usize,
    },
    /// The layer ranges fixed for nodes do not make a layout.
    #[error("the layer ranges given for nodes do not make a layout: {0}")]
    Override(String),
}
