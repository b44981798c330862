//! One split of keys for the queries of a task: scores, softmax, output; and how splits merge.

use super::SPLIT_KEYS;
use super::layout::{BLOCK_TOKENS, KvLayout};
use super::tile::{ScoreTile, ValueTile};
use crate::lanes::{LANES, Simd16};
use crate::math;
use ashlar_vocabulary::BlockId;
use std::ops::Range;

/// Blocks of a split.
const SPLIT_BLOCKS: usize = SPLIT_KEYS / BLOCK_TOKENS;
/// Keys whose values stay in the L1 cache while all queries pass over them.
const VALUE_RUN: usize = 64;
/// Queries of a register tile.
const TILE_QUERIES: usize = 4;

/// Working memory of one task.
#[derive(Default)]
pub(super) struct Scratch {
    /// Query vectors, head_dim elements each; valid for one task.
    pub(super) queries: Vec<*const f32>,
    /// Per query, the keys it attends to, relative to the split.
    pub(super) keys: Vec<Range<usize>>,
    /// `[query][256]`: scores, then probabilities.
    scores: Vec<f32>,
    /// `[query]` [`Partial`]: the split's results.
    pub(super) partials: Vec<f32>,
    /// `[query]` [`Partial`]: the splits merged so far.
    pub(super) merged: Vec<f32>,
}

impl Scratch {
    /// Makes room for `queries` queries and starts them with nothing merged.
    #[inline(always)]
    pub(super) fn begin(&mut self, queries: usize, head_dim: usize) {
        let width = Partial::floats(head_dim);
        self.scores.resize(queries * SPLIT_KEYS, 0.0);
        self.partials.resize(queries * width, 0.0);
        self.merged.resize(queries * width, 0.0);
        for merged in self.merged.chunks_exact_mut(width) {
            merged[0] = f32::NEG_INFINITY;
            merged[1..].fill(0.0);
        }
    }
}

/// The result of some keys for one query: maximum score, sum of p, output not yet divided by it.
pub(super) struct Partial;

impl Partial {
    /// Elements of a partial result: maximum, sum, output.
    pub(super) const fn floats(head_dim: usize) -> usize {
        head_dim + 2
    }

    /// The partial result of one query.
    #[inline(always)]
    pub(super) fn of(partials: &[f32], query: usize, head_dim: usize) -> &[f32] {
        &partials[query * Partial::floats(head_dim)..][..Partial::floats(head_dim)]
    }

    /// merged ← merged · e^(max₁−max) + next · e^(max₂−max); the second product is fused. The first partial is copied.
    #[inline(always)]
    pub(super) fn merge<S: Simd16>(merged: &mut [f32], next: &[f32]) {
        if merged[0] == f32::NEG_INFINITY && merged[1] == 0.0 {
            merged.copy_from_slice(next);
            return;
        }
        let max = if merged[0] > next[0] { merged[0] } else { next[0] };
        let (old, new) = (math::exp_f32(merged[0] - max), math::exp_f32(next[0] - max));
        merged[0] = max;
        for (merged, next) in merged[1..].chunks_mut(LANES).zip(next[1..].chunks(LANES)) {
            let (a, b) = (S::read_tail(merged, 0.0), S::read_tail(next, 0.0));
            b.mul_add(S::splat(new), a.mul(S::splat(old))).write_tail(merged);
        }
    }

    /// out = output / sum.
    #[inline(always)]
    pub(super) fn finish<S: Simd16>(merged: &[f32], out: &mut [f32]) {
        let sum = S::splat(merged[1]);
        for (merged, out) in merged[2..].chunks(LANES).zip(out.chunks_mut(LANES)) {
            S::read_tail(merged, 0.0).div(sum).write_tail(out);
        }
    }
}

/// The keys and values of a split.
pub(super) struct SplitInputs<'a> {
    pub(super) layout: KvLayout,
    pub(super) kv_head: usize,
    pub(super) scale: f32,
    pub(super) table: &'a [BlockId],
    /// Of the split, in the table.
    pub(super) first_block: usize,
    pub(super) k_cache: &'a [f32],
    pub(super) v_cache: &'a [f32],
}

impl SplitInputs<'_> {
    /// Computes the partial results of all queries of the task that attend to keys of this split.
    #[inline(always)]
    pub(super) fn run<S: Simd16>(&self, scratch: &mut Scratch) {
        let attended = scratch.keys.iter().filter(|keys| !keys.is_empty());
        let (low, high) =
            attended.fold((SPLIT_KEYS, 0), |(low, high), keys| (low.min(keys.start), high.max(keys.end)));
        if low >= high {
            return;
        }
        let blocks = low / BLOCK_TOKENS..high.div_ceil(BLOCK_TOKENS);
        let (mut k, mut v) = ([std::ptr::null(); SPLIT_BLOCKS], [std::ptr::null(); SPLIT_BLOCKS]);
        for block in blocks.clone() {
            let start = self.layout.head_start(self.table[self.first_block + block], self.kv_head);
            k[block] = self.k_cache[start..][..self.layout.floats_per_head()].as_ptr();
            v[block] = self.v_cache[start..][..self.layout.floats_per_head()].as_ptr();
        }
        self.scores::<S>(scratch, &k, &v, blocks);
        for query in 0..scratch.keys.len() {
            self.softmax::<S>(scratch, query);
        }
        self.outputs::<S>(scratch, &v, low..high);
    }

    /// Raw scores of all queries for some blocks. Keys that a query does not attend to get some number, or NaN.
    #[inline(always)]
    fn scores<S: Simd16>(
        &self,
        scratch: &mut Scratch,
        k: &[*const f32; SPLIT_BLOCKS],
        v: &[*const f32; SPLIT_BLOCKS],
        blocks: Range<usize>,
    ) {
        let queries = scratch.queries.len();
        let step = S::TILE_VECTORS.min(4);
        for first in blocks.clone().step_by(step) {
            let count = step.min(blocks.end - first);
            // A block of one head is a page, where the hardware's own prefetching ends: ask for the next keys, and in
            // the end for the first values.
            let next: [*const f32; 4] = std::array::from_fn(|index| match first + step + index {
                block if block < blocks.end => k[block],
                block => v[(blocks.start + block - blocks.end.max(first + step)).min(blocks.end - 1)],
            });
            for query in (0..queries).step_by(TILE_QUERIES) {
                let tile = ScoreTile {
                    head_dim: self.layout.head_dim,
                    queries: &scratch.queries[query..queries.min(query + TILE_QUERIES)],
                    keys: &k[first..first + count],
                    ahead: (query == 0).then_some(next),
                    scores: scratch.scores[query * SPLIT_KEYS + first * BLOCK_TOKENS..].as_mut_ptr(),
                    stride: SPLIT_KEYS,
                };
                // SAFETY: queries point to head_dim elements (`Task` sliced them), keys to whole heads of blocks
                // (sliced above), scores to rows of 256 of which these blocks are a part.
                unsafe { tile.run::<S>() };
            }
        }
    }

    /// Scores to probabilities for the keys that the query attends to, and zeros up to whole blocks; maximum and sum.
    #[inline(always)]
    fn softmax<S: Simd16>(&self, scratch: &mut Scratch, query: usize) {
        let keys = scratch.keys[query].clone();
        if keys.is_empty() {
            return;
        }
        let scores = &mut scratch.scores[query * SPLIT_KEYS..][..SPLIT_KEYS];
        let (start, end) = (keys.start / LANES * LANES, keys.end.div_ceil(LANES) * LANES);
        scores[start..keys.start].fill(f32::NEG_INFINITY);
        scores[keys.end..end].fill(f32::NEG_INFINITY);
        let scale = S::splat(self.scale);
        let mut max = S::splat(f32::NEG_INFINITY);
        for scores in scores[start..end].chunks_exact_mut(LANES) {
            let scaled = S::read(scores).mul(scale);
            scaled.write(scores);
            max = max.max(scaled);
        }
        let max = max.max_lane();
        let mut sum = S::splat(0.0);
        for scores in scores[start..end].chunks_exact_mut(LANES) {
            let p = math::exp_lanes(S::read(scores).sub(S::splat(max)));
            p.write(scores);
            sum = sum.add(p);
        }
        let width = Partial::floats(self.layout.head_dim);
        let partial = &mut scratch.partials[query * width..][..width];
        partial[0] = max;
        partial[1] = sum.sum_lanes();
        partial[2..].fill(0.0);
    }

    /// Σ p·v over the keys that each query attends to, ascending.
    #[inline(always)]
    fn outputs<S: Simd16>(&self, scratch: &mut Scratch, v: &[*const f32; SPLIT_BLOCKS], keys: Range<usize>) {
        let queries = scratch.queries.len();
        let width = Partial::floats(self.layout.head_dim);
        let all_end = keys.end;
        for run in keys.clone().step_by(VALUE_RUN) {
            let run = run..keys.end.min(run + VALUE_RUN);
            for first in (0..queries).step_by(TILE_QUERIES) {
                let tile = first..queries.min(first + TILE_QUERIES);
                // Keys that all queries of the tile attend to go together; those before and after, query by query.
                let clamp = |keys: &Range<usize>| keys.start.max(run.start)..keys.end.min(run.end);
                let (mut low, mut high) = (run.start, run.end);
                for keys in &scratch.keys[tile.clone()] {
                    low = low.max(keys.start);
                    high = high.min(keys.end);
                }
                let shared = low..high.max(low);
                let values = |query: usize, count: usize, keys: Range<usize>| ValueTile {
                    head_dim: self.layout.head_dim,
                    values: v,
                    keys,
                    p: scratch.scores[query * SPLIT_KEYS..][..count * SPLIT_KEYS].as_ptr(),
                    p_stride: SPLIT_KEYS,
                    count,
                    ahead: if query == 0 && run.end < all_end { VALUE_RUN } else { 0 },
                };
                for query in tile.clone() {
                    let own = clamp(&scratch.keys[query]);
                    let before = own.start..own.end.min(shared.start);
                    let output = scratch.partials[query * width + 2..].as_mut_ptr();
                    // SAFETY: the keys lie in the query's range, whose blocks `run` looked up; the output has head_dim
                    // elements, p 256.
                    unsafe { values(query, 1, before).run::<S>(output, width) };
                }
                if !shared.is_empty() {
                    let output = scratch.partials[first * width + 2..].as_mut_ptr();
                    // SAFETY: as above, for every query of the tile.
                    unsafe { values(first, tile.len(), shared.clone()).run::<S>(output, width) };
                }
                for query in tile {
                    let own = clamp(&scratch.keys[query]);
                    let after = own.start.max(shared.start).max(shared.end)..own.end;
                    let output = scratch.partials[query * width + 2..].as_mut_ptr();
                    // SAFETY: as above.
                    unsafe { values(query, 1, after).run::<S>(output, width) };
                }
            }
        }
    }
}
