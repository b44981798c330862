//! How much memory attention works in: the kernels allocate by these figures, the plan's ledger adds them up.

use crate::packed::LANES;
use std::ops::Range;

/// Keys that share one softmax before splits are merged.
pub const SPLIT_KEYS: usize = 256;

/// Distance between queries' scores: a power of two would crowd them into a few sets of the L1 cache.
pub const SCORE_STRIDE: usize = SPLIT_KEYS + LANES;

/// Queries whose scores are computed together.
pub const TILE_QUERIES: usize = 6;

/// Keys whose values stay in the L1 cache while all queries of a task pass over them.
pub const RUN_KEYS: usize = 64;

/// Queries of one task: neighbouring rows of a sequence times the query heads of one KV head.
const TASK_QUERIES: usize = 48;

/// What the memory depends on; the context is not among it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionMemory {
    /// Threads that compute.
    pub threads: usize,
    /// The rank's query heads.
    pub query_heads: usize,
    /// Its KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
}

impl AttentionMemory {
    /// Query heads per KV head.
    fn group(&self) -> usize {
        self.query_heads.checked_div(self.kv_heads).unwrap_or(0)
    }

    /// Rows of one task.
    pub fn task_rows(&self) -> usize {
        TASK_QUERIES.checked_div(self.group()).unwrap_or(0).max(1)
    }

    /// Splits that are computed before they are merged, where `tiles` runs of rows are cut into splits: enough tasks for all
    /// threads to finish together.
    pub fn window(&self, tiles: usize) -> usize {
        (8 * self.threads).div_ceil((tiles * self.kv_heads).max(1))
    }

    /// Whether `tiles` runs of rows are too few to keep all threads busy, so that splits are tasks of their own.
    pub fn cuts_splits(&self, tiles: usize) -> bool {
        tiles * self.kv_heads < 2 * self.threads
    }

    /// Elements of the result of some keys for one query, in whole vectors: the output, and one vector more for the largest
    /// score and the sum.
    #[inline]
    pub const fn partial_floats(head_dim: usize) -> usize {
        head_dim.next_multiple_of(LANES) + LANES
    }

    /// Elements that suffice for the results that wait to be merged in a call of at most `rows` rows. In constant time: a
    /// plan asks for it very often.
    pub fn waiting_floats(&self, rows: usize) -> usize {
        // Most runs that are cut into splits; of t of them, t · (window + 1) is at most the window of one and 2 · t.
        let tiles_max =
            (2 * self.threads).saturating_sub(1).checked_div(self.kv_heads).unwrap_or(0).min(rows);
        if tiles_max == 0 {
            return 0;
        }
        let of_one = self.window(1);
        let places = (rows * (of_one + 1)).min(self.task_rows() * (of_one + 2 * tiles_max));
        places * self.query_heads * AttentionMemory::partial_floats(self.head_dim)
    }

    /// Bytes of each thread's own memory: the queries and scores of a task, its results before and after a merge, and widened
    /// keys or values.
    pub fn task_bytes(&self) -> usize {
        let queries = self.task_rows() * self.group();
        let floats = queries.next_multiple_of(TILE_QUERIES) * self.head_dim
            + queries * (SCORE_STRIDE + 2 * AttentionMemory::partial_floats(self.head_dim))
            + RUN_KEYS * self.head_dim;
        floats * size_of::<f32>() + queries * size_of::<Range<usize>>()
    }

    /// Bytes of all of it for calls of at most `rows` rows.
    pub fn bytes(&self, rows: usize) -> usize {
        if self.kv_heads == 0 {
            return 0;
        }
        self.waiting_floats(rows) * size_of::<f32>()
            + rows * size_of::<Range<usize>>()
            + self.threads * self.task_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_with_threads_but_never_with_the_context() {
        let of = |threads| AttentionMemory { threads, query_heads: 32, kv_heads: 8, head_dim: 64 };
        // Eight heads keep two threads busy: splits are never tasks of their own.
        assert_eq!(of(2).waiting_floats(512), 0);
        // Sixteen threads cut up to three runs of twelve rows; of one they compute sixteen splits at a time.
        for (tiles, window) in [(1, 16), (2, 8), (3, 6)] {
            assert!(of(16).cuts_splits(tiles) && of(16).window(tiles) == window);
            assert!(of(16).waiting_floats(512) >= 12 * tiles * 32 * (window + 1) * 80);
        }
        assert!(!of(16).cuts_splits(4));
        assert_eq!(of(16).waiting_floats(512), 12 * (16 + 2 * 3) * 32 * 80);
        assert_eq!(of(16).waiting_floats(5), 5 * 32 * 17 * 80);
        assert!(of(64).bytes(512) > of(16).bytes(512));
        assert_eq!(AttentionMemory { kv_heads: 0, query_heads: 0, ..of(4) }.bytes(512), 0);
    }
}
