//! What a plan is made from.

use ashlar_vocabulary::{Bytes, LayerRange, NodeId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What one node offers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// Which node.
    pub node: NodeId,
    /// Memory that we may use on it.
    pub memory: Bytes,
    /// Measured speed of reading weights, bytes per second.
    pub bandwidth_bytes_per_s: f64,
    /// Measured speed of matrix products, floating-point operations per second (a multiply-add counts as two).
    pub flops_per_s: f64,
    /// Measured speed of products with quantised weights, counted the same.
    pub quantized_flops_per_s: f64,
    /// Compute threads.
    pub threads: u32,
    /// Layers that an operator has fixed for this node. If any node has such a range, the ranges alone decide the
    /// layout: see [`plan`](fn@crate::plan).
    pub layers: Option<LayerRange>,
}

/// The network between nodes: one default and, where measured, single pairs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Links {
    /// Seconds from a message to its reply, for pairs that are not listed.
    pub round_trip_s: f64,
    /// Bytes per second in one direction, for pairs that are not listed.
    pub bytes_per_s: f64,
    /// Measured pairs, in either order of the two nodes.
    pub pairs: Vec<LinkReport>,
}

/// One measured pair of nodes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinkReport {
    /// One end.
    #[schemars(with = "String")]
    pub a: NodeId,
    /// The other end.
    #[schemars(with = "String")]
    pub b: NodeId,
    /// Seconds from a message to its reply.
    pub round_trip_s: f64,
    /// Bytes per second in one direction.
    pub bytes_per_s: f64,
}

impl Default for Links {
    /// Processes of one host: 50 µs and 4 GB/s.
    fn default() -> Links {
        Links { round_trip_s: 50e-6, bytes_per_s: 4e9, pairs: Vec::new() }
    }
}

impl Links {
    /// Seconds that a message of `bytes` takes from one node to another.
    pub fn seconds(&self, from: &NodeId, to: &NodeId, bytes: f64) -> f64 {
        let pair = self.pairs.iter().find(|p| (&p.a == from && &p.b == to) || (&p.a == to && &p.b == from));
        let (round_trip_s, bytes_per_s) =
            pair.map_or((self.round_trip_s, self.bytes_per_s), |p| (p.round_trip_s, p.bytes_per_s));
        round_trip_s / 2.0 + bytes / bytes_per_s
    }
}

/// What the operator asks for; `None` leaves the choice to the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRequest {
    /// Pipeline stages per replica; by default the fewest that fit.
    pub stages: Option<usize>,
    /// Tensor-parallel ranks per stage (1, 2, 4 or 8); by default 1.
    pub tensor_parallel_size: Option<usize>,
    /// Replicas; by default as many as fit.
    pub replicas: Option<usize>,
    /// Whether all stages share the head, wherever a replica has several stages and 2, 4 or 8 ranks in all; by default where
    /// that is predicted to be faster.
    pub spread_head: Option<bool>,
    /// The longest sequence that must fit, prompt and answer together. A layout always holds at least one.
    pub max_context_tokens: usize,
    /// KV cache wished for per replica, in tokens of all sequences together. Where no layout has room for it, a
    /// layout with less is taken (see [`ReplicaLayout::kv_blocks`](crate::ReplicaLayout::kv_blocks)).
    pub kv_tokens_wanted: usize,
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// Most tokens of one step; sizes the activations.
    pub max_num_batched_tokens: usize,
    /// Whether every stage but the last shall keep what it hands on, for as many tokens as its KV cache has, where there is room for
    /// that beside everything else (see [`ReplicaLayout::boundary_log`](crate::ReplicaLayout::boundary_log)).
    pub boundary_log: bool,
}

impl Default for PlanRequest {
    fn default() -> PlanRequest {
        PlanRequest {
            stages: None,
            tensor_parallel_size: None,
            replicas: None,
            spread_head: None,
            max_context_tokens: 4096,
            kv_tokens_wanted: 8192,
            block_tokens: 16,
            max_num_batched_tokens: 512,
            boundary_log: true,
        }
    }
}
