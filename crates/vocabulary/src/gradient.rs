//! How much memory backward passes and losses work in: the kernels and trainers allocate by these figures, ledgers add them
//! up.

use crate::packed::LANES;

/// Outputs or elements of a panel.
const PANEL: usize = 4 * LANES;

/// Outputs whose weights are widened together: 64 rows' gradients by them take 32 KiB, and stay in the L1 cache.
pub const CHUNK_OUTPUTS: usize = 128;

/// Distance between rows of a chunk's memory: not a power of two, of which all rows would share a few lines of a cache.
pub const CHUNK_STRIDE: usize = CHUNK_OUTPUTS + LANES;

/// Most inputs of one task: enough that turning its rows around is a small part.
pub const TASK_INPUTS: usize = 8 * PANEL;

/// Most rows of one task: enough that widening the weights is a small part. With 512 inputs, the open sums of a part take 512 KiB.
pub const TASK_ROWS: usize = 4 * PANEL;

/// Rows of a weight gradient that are turned around together.
pub const WEIGHT_ROWS: usize = 512;

/// Open sums of the streaming tree: of 8 parts at most 3 wait while a fourth is computed.
pub const TREE_DEPTH: usize = 4;

/// Queries whose attention gradients are computed together.
pub const QUERIES: usize = 48;

/// Rows whose logits serving computes together.
const LOGIT_ROWS: usize = 32;

/// Memory of the logits of rows whose loss is computed together, unless those that serving computes together take more.
const LOSS_BYTES: usize = 64 << 20;

/// Most of these rows: more would gain nothing.
const LOSS_ROWS_MAX: usize = 512;

/// What gradients work in, by the threads that compute them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientMemory {
    /// Threads that compute.
    pub threads: usize,
}

impl GradientMemory {
    /// Bytes for gradients of products: each thread's largest task. What is turned around for weight gradients lies where products
    /// have their activations ([`GradientMemory::turned_words`]).
    pub fn products_bytes(&self) -> usize {
        let panel = (CHUNK_OUTPUTS * TASK_ROWS).max(WEIGHT_ROWS * PANEL);
        let sums = TREE_DEPTH * TASK_INPUTS * TASK_ROWS;
        let task = TASK_INPUTS * CHUNK_STRIDE + panel + sums + LANES * CHUNK_STRIDE;
        size_of::<f32>() * self.threads * task
    }

    /// Words in which the shorter side of a weight gradient over `rows` rows is turned around.
    pub fn turned_words(rows: usize, (outputs, inputs): (usize, usize)) -> usize {
        WEIGHT_ROWS.min(rows) * outputs.min(inputs)
    }

    /// Bytes for gradients of attention over sequences of up to `rows` rows.
    pub fn attention_bytes(&self, rows: usize, head_dim: usize) -> usize {
        let (keys, elements) = (rows.next_multiple_of(PANEL), head_dim.next_multiple_of(LANES));
        let of_keys = 2 * head_dim + 3 * elements + 2 * QUERIES;
        size_of::<f32>() * self.threads * (keys * of_keys + QUERIES * (2 * PANEL + elements))
    }
}

/// Rows whose logits lie in memory together while their loss is computed: as many as take 64 MiB on one of `ranks` ranks (at
/// least 32, at most 512), as every pass over the head widens it once more. The same on all ranks of a group.
pub fn loss_rows(vocabulary: usize, ranks: usize) -> usize {
    let row = size_of::<f32>() * vocabulary.div_ceil(ranks).max(1);
    (LOSS_BYTES / row).clamp(LOGIT_ROWS, LOSS_ROWS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_take_64_mib_of_logits_within_bounds() {
        assert_eq!(loss_rows(128_256, 1), 130);
        assert_eq!(loss_rows(128_256, 8), 512);
        assert_eq!(loss_rows(1_000_000, 1), 32);
        assert_eq!(loss_rows(0, 1), 512);
    }
}
