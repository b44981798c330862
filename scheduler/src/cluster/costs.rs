//! From the plan's inputs to the engine's: predicted stage times, and how many KV blocks a replica gets.

use super::events::ClusterConfig;
use super::place::{Node, Replica, Seat};
use crate::engine::{BLOCK_TOKENS, StageCost};
use ashlar_shard_plan::ledger::Piece;
use ashlar_shard_plan::{PlanRequest, Position, ReplicaLayout, Shares};
use ashlar_vocabulary::NodeId;
use std::collections::BTreeMap;

/// The KV cache need not hold every sequence at the full length of a long context.
const TYPICAL_CONTEXT_TOKENS: usize = 4096;
/// Several rows of one sequence read the KV cache together.
const POSITIONS_SHARED: f64 = 8.0;

/// What is asked of the plan.
pub(super) fn plan_request(config: &ClusterConfig) -> PlanRequest {
    let context = config.max_context_tokens as usize;
    PlanRequest {
        stages: config.stages,
        tensor_parallel_size: config.tensor_parallel_size,
        replicas: config.replicas,
        spread_head: config.spread_head,
        max_context_tokens: context,
        kv_tokens_wanted: config.max_num_seqs * context.min(TYPICAL_CONTEXT_TOKENS),
        block_tokens: BLOCK_TOKENS,
        max_num_batched_tokens: config.max_num_batched_tokens as usize,
        boundary_log: config.boundary_log,
    }
}

/// The piece of the model that a seat holds.
pub(super) fn piece(seat: &Seat, replica: &Replica) -> Piece {
    let position = replica.position(seat.place.stage.0 as usize);
    position.piece(seat.place.layers, seat.place.rank.0 as usize, replica.tensor_parallel_size)
}

/// KV blocks of a replica: what the plan found room for, but on no node more than its share of memory, and always
/// enough for one sequence of full length.
pub(super) fn kv_blocks(
    config: &ClusterConfig,
    layout: &ReplicaLayout,
    memory: impl Fn(&NodeId) -> u64,
) -> u32 {
    let num_stages = layout.stages.len();
    let mut blocks = u64::from(layout.kv_blocks);
    let one_sequence = (config.max_context_tokens as usize).div_ceil(BLOCK_TOKENS) as u64;
    for (stage, cut) in layout.stages.iter().enumerate() {
        for (rank, node) in cut.ranks.iter().enumerate() {
            let position = Position { stage, stages: num_stages, spread_head: layout.spread_head };
            let piece = position.piece(cut.layers, rank, cut.ranks.len());
            let block_bytes = (piece.kv_bytes_per_token(&config.shape) * BLOCK_TOKENS).max(1) as u64;
            let share = (memory(node) as f64 * config.kv_memory_share) as u64 / block_bytes;
            blocks = blocks.min(share.max(one_sequence));
        }
    }
    u32::try_from(blocks).unwrap_or(u32::MAX)
}

/// Predicted times of a seated replica, stage by stage: of each stage its slowest rank.
pub(super) fn stage_costs(
    config: &ClusterConfig,
    replica: &Replica,
    nodes: &BTreeMap<NodeId, Node>,
) -> Vec<StageCost> {
    let shape = &config.shape;
    let shares = Shares::new(shape, replica.tensor_parallel_size);
    let mut stages = vec![StageCost::default(); replica.num_stages];
    for seat in &replica.seats {
        let Some(cost) = stages.get_mut(seat.place.stage.0 as usize) else { continue };
        let Some(node) = nodes.get(&seat.node) else { continue };
        let piece = piece(seat, replica);
        let query = shape.attention_cut().rank(piece.rank, piece.tensor_parallel_size).len();
        let attention = 4.0 * (piece.layers.len() * query) as f64;
        let kv_bytes = piece.kv_bytes_per_token(shape) as f64;
        let (bandwidth, flops) = (node.join.bandwidth_bytes_per_s.max(1.0), node.join.flops_per_s.max(1.0));
        let quantized_flops = node.join.quantized_flops_per_s.max(1.0);
        let layers = shares.of(piece.rank, piece.layers);
        let row_s =
            2.0 * (layers.plain_weights as f64 / flops + layers.quantized_weights as f64 / quantized_flops);
        cost.weights_us = cost.weights_us.max(1e6 * piece.product_bytes(&shares) as f64 / bandwidth);
        cost.row_us = cost.row_us.max(1e6 * row_s);
        let position_s = (attention / flops).max(kv_bytes / bandwidth / POSITIONS_SHARED);
        cost.position_us = cost.position_us.max(1e6 * position_s);
    }
    stages
}
