//! What a plan says.

use crate::ledger::MemoryLedger;
use ashlar_vocabulary::{LayerRange, NodeId};
use serde::{Deserialize, Serialize};

/// Who holds what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Layout {
    /// Ranks per stage, the same in every stage of every replica.
    pub tensor_parallel_size: usize,
    /// At least one.
    pub replicas: Vec<ReplicaLayout>,
    /// Nodes that hold nothing and can take the place of one that dies.
    pub standbys: Vec<NodeId>,
}

impl Layout {
    /// Every node that holds a part of the model, replica by replica, stage by stage, rank by rank.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.replicas.iter().flat_map(ReplicaLayout::nodes)
    }
}

/// One full set of stages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplicaLayout {
    /// In order; their layers tile the model.
    pub stages: Vec<StageLayout>,
    /// Whether every stage holds slices of the head; otherwise the last stage holds all of it.
    pub spread_head: bool,
    /// KV blocks that every rank of the replica has room for: what was wished for, or less where memory is short.
    pub kv_blocks: u32,
    /// Whether every stage but the last keeps what it hands on, so that a stage that is lost is the only one that computes again:
    /// where every rank has room for that, and there are several stages.
    pub boundary_log: bool,
    /// How fast it should be.
    pub prediction: Prediction,
}

impl ReplicaLayout {
    /// Every node of the replica, stage by stage, rank by rank.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.stages.iter().flat_map(|stage| &stage.ranks)
    }
}

/// One pipeline stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageLayout {
    /// Its layers; never empty.
    pub layers: LayerRange,
    /// Its tensor-parallel ranks, from rank 0.
    pub ranks: Vec<NodeId>,
    /// The memory of each rank, in the order of `ranks`.
    pub ledgers: Vec<MemoryLedger>,
}

/// Predicted speed of one replica, from measured bandwidth, compute and links.
#[derive(Debug, Default, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// Seconds between two tokens of a lone sequence at half of the longest context.
    pub seconds_per_token: f64,
    /// Seconds to the first token of a prompt of 512 tokens on an idle replica.
    pub seconds_to_first_token: f64,
    /// Tokens per second of 16 sequences together, with as many micro-batches in flight as serve best.
    pub tokens_per_s_batch_16: f64,
    /// Index of the stage that takes longest in a decode step of 16 sequences.
    pub slowest_stage: usize,
    /// Seconds that it takes for this step.
    pub slowest_stage_s: f64,
}
