//! The memory of one rank, line by line. Nothing may be resident that is not in it.

use crate::request::PlanRequest;
use ashlar_vocabulary::{Bytes, ModelShape};
use serde::{Deserialize, Serialize};

/// KV cache, activations and logits are f32.
const BYTES_PER_ACTIVATION: usize = 4;

/// Logits are computed for at most this many rows at a time.
const LOGIT_ROWS: usize = 64;

/// Bytes that one rank holds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLedger {
    /// Weights of its layers.
    pub weights: Bytes,
    /// The embedding: whole on every rank of the first stage, nowhere else.
    pub embedding: Bytes,
    /// The head: a vocabulary slice on every rank of the last stage. Nothing where it is tied and the first stage is
    /// also the last, for then it shares the embedding's bytes.
    pub head: Bytes,
    /// KV blocks.
    pub kv_cache: Bytes,
    /// Buffers of the largest step.
    pub activations: Bytes,
    /// Sum of the lines above.
    pub total: Bytes,
    /// What the node offers.
    pub capacity: Bytes,
    /// What remains.
    pub free: Bytes,
}

/// One line of a [`MemoryLedger`], for printing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct LedgerRow {
    /// What the bytes are for.
    pub name: &'static str,
    /// How many.
    pub bytes: Bytes,
}

impl MemoryLedger {
    /// The lines that add up to the total, in reading order.
    pub fn rows(&self) -> [LedgerRow; 5] {
        [
            LedgerRow { name: "weights", bytes: self.weights },
            LedgerRow { name: "embedding", bytes: self.embedding },
            LedgerRow { name: "head", bytes: self.head },
            LedgerRow { name: "activations", bytes: self.activations },
            LedgerRow { name: "kv_cache", bytes: self.kv_cache },
        ]
    }

    /// Whether the total is within the capacity.
    pub fn fits(&self) -> bool {
        self.total <= self.capacity
    }

    /// The line at which the running sum passes the capacity, with the bytes missing there; `None` if all fits.
    pub fn first_missing(&self) -> Option<(LedgerRow, Bytes)> {
        let mut sum = Bytes(0);
        self.rows().into_iter().find_map(|row| {
            sum += row.bytes;
            (sum > self.capacity).then(|| (row, sum - self.capacity))
        })
    }
}

/// Which piece of the model a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Number of layers.
    pub layers: usize,
    /// Whether the stage is the first (holds the embedding).
    pub first: bool,
    /// Whether the stage is the last (holds the head).
    pub last: bool,
    /// The rank within the stage.
    pub rank: usize,
    /// Ranks of the stage: 1, 2, 4 or 8.
    pub tensor_parallel_size: usize,
}

impl Piece {
    /// Weight elements of one layer on this rank: its slices of the cut axes, and both norms whole.
    pub fn layer_weights(&self, shape: &ModelShape) -> usize {
        let slice = |cut: ashlar_vocabulary::AxisCut| cut.rank(self.rank, self.tensor_parallel_size).len();
        let (q, kv) = (slice(shape.attention_cut()), slice(shape.key_cut()));
        shape.hidden_size * (2 * q + 2 * kv + 3 * slice(shape.feed_forward_cut()) + 2)
    }

    /// Weight elements that the head multiplies with on this rank; 0 where it is not the last stage.
    pub fn head_weights(&self, shape: &ModelShape) -> usize {
        let rows = shape.vocab_cut().rank(self.rank, self.tensor_parallel_size).len();
        if self.last { rows * shape.hidden_size } else { 0 }
    }

    /// Bytes of KV cache per token of context on this rank, all of its layers.
    pub fn kv_bytes_per_token(&self, shape: &ModelShape) -> usize {
        let kv = shape.key_cut().rank(self.rank, self.tensor_parallel_size).len();
        self.layers * 2 * kv * BYTES_PER_ACTIVATION
    }

    /// Bytes of the buffers that the largest step needs on this rank: residual stream and its copies, the projections
    /// of one layer, attention scores per thread, and on the last stage a chunk of logits.
    fn activation_bytes(&self, shape: &ModelShape, request: &PlanRequest, threads: u32) -> usize {
        let slice = |cut: ashlar_vocabulary::AxisCut| cut.rank(self.rank, self.tensor_parallel_size).len();
        let tokens = request.max_num_batched_tokens;
        let per_token = 4 * shape.hidden_size
            + 2 * slice(shape.attention_cut())
            + 2 * slice(shape.key_cut())
            + 3 * slice(shape.feed_forward_cut());
        let scores = threads.max(1) as usize * request.max_context_tokens;
        let logits = if self.last { tokens.min(LOGIT_ROWS) * shape.vocab_size } else { 0 };
        (tokens * per_token + scores + logits) * BYTES_PER_ACTIVATION
    }

    /// The ledger of this piece on a node with `capacity` and `threads`, with `kv_blocks` blocks.
    pub fn ledger(
        &self,
        shape: &ModelShape,
        request: &PlanRequest,
        kv_blocks: usize,
        capacity: Bytes,
        threads: u32,
    ) -> MemoryLedger {
        let weight = |elements: usize| Bytes((elements * request.bytes_per_weight) as u64);
        let final_norm = if self.last { shape.hidden_size } else { 0 };
        let weights = weight(self.layers * self.layer_weights(shape) + final_norm);
        let embedding = weight(if self.first { shape.embedding_weights() } else { 0 });
        let shared = shape.tied_head && self.first;
        let head = weight(if shared { 0 } else { self.head_weights(shape) });
        let kv_cache = Bytes((kv_blocks * request.block_tokens * self.kv_bytes_per_token(shape)) as u64);
        let activations = Bytes(self.activation_bytes(shape, request, threads) as u64);
        let total = weights + embedding + head + kv_cache + activations;
        MemoryLedger {
            weights,
            embedding,
            head,
            kv_cache,
            activations,
            total,
            capacity,
            free: capacity.saturating_sub(total),
        }
    }
}
