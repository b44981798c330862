//! One split of keys for the queries of a task: scores, softmax, output; and how splits merge.

use super::SPLIT_KEYS;
use super::buffer::KvBuffer;
use super::layout::{BLOCK_TOKENS, KvLayout};
use super::tile::{ScoreTile, TILE_BLOCKS, ValueTile};
use crate::aligned::AlignedBuffer;
use crate::elements::{BrainFloat, Element, Half};
use crate::lanes::{LANES, Simd16};
use crate::math;
use ashlar_vocabulary::attention::{AttentionMemory, RUN_KEYS, SCORE_STRIDE, TILE_QUERIES};
use ashlar_vocabulary::{BlockId, FloatType};
use std::ops::Range;

/// Working memory of one task: as much as [`AttentionMemory::task_bytes`] says.
pub(super) struct Scratch {
    /// `[tile][head_dim][6]`: one element of the six queries of a tile side by side.
    queries: AlignedBuffer,
    /// Per query, the keys it attends to, relative to the split.
    pub(super) keys: Vec<Range<usize>>,
    /// `[query][key]`: scores, then probabilities.
    scores: AlignedBuffer,
    /// `[query]` [`Partial`]: the split's results.
    pub(super) partials: AlignedBuffer,
    /// `[query]` [`Partial`]: the splits merged so far.
    pub(super) merged: AlignedBuffer,
    /// Four blocks of keys or values, widened.
    widened: AlignedBuffer,
}

impl Default for Scratch {
    fn default() -> Scratch {
        let empty = || AlignedBuffer::zeroed(0);
        let (queries, scores, partials, merged, widened) = (empty(), empty(), empty(), empty(), empty());
        Scratch { queries, keys: Vec::new(), scores, partials, merged, widened }
    }
}

/// Makes room for `len` elements.
fn reserve(buffer: &mut AlignedBuffer, len: usize) {
    if buffer.len() < len {
        *buffer = AlignedBuffer::zeroed(len);
    }
}

impl Scratch {
    /// Makes room for `queries` queries and starts them with nothing merged.
    pub(super) fn begin(&mut self, queries: usize, layout: KvLayout) {
        let width = Partial::floats(layout.head_dim);
        reserve(&mut self.queries, queries.next_multiple_of(TILE_QUERIES) * layout.head_dim);
        reserve(&mut self.scores, queries * SCORE_STRIDE);
        reserve(&mut self.partials, queries * width);
        reserve(&mut self.merged, queries * width);
        reserve(&mut self.widened, TILE_BLOCKS * layout.elements_per_head());
        for merged in self.merged.chunks_exact_mut(width).take(queries) {
            Partial::nothing(merged);
        }
    }

    /// Takes a query's elements.
    #[inline(always)]
    pub(super) fn set_query(&mut self, query: usize, elements: &[f32]) {
        let tile = &mut self.queries[query / TILE_QUERIES * TILE_QUERIES * elements.len()..];
        let (slots, _) = tile.as_chunks_mut::<TILE_QUERIES>();
        for (slots, &element) in slots.iter_mut().zip(elements) {
            slots[query % TILE_QUERIES] = element;
        }
    }
}

/// The result of some keys for one query: the output not yet divided by the sum of p (up to whole vectors), then the
/// maximum score and the sum.
pub(super) struct Partial;

impl Partial {
    /// Elements of a partial result, in whole vectors.
    pub(super) const fn floats(head_dim: usize) -> usize {
        AttentionMemory::partial_floats(head_dim)
    }

    /// Marks that nothing is merged yet.
    pub(super) fn nothing(merged: &mut [f32]) {
        let at = merged.len() - LANES;
        (merged[at], merged[at + 1]) = (f32::NEG_INFINITY, 0.0);
    }

    /// The partial result of one query.
    #[inline(always)]
    pub(super) fn of(partials: &[f32], query: usize, head_dim: usize) -> &[f32] {
        &partials[query * Partial::floats(head_dim)..][..Partial::floats(head_dim)]
    }

    /// Output zero, with this maximum and sum.
    #[inline(always)]
    fn start<S: Simd16>(partial: &mut [f32], max: f32, sum: f32) {
        for vector in partial.chunks_exact_mut(LANES) {
            S::splat(0.0).write(vector);
        }
        let at = partial.len() - LANES;
        (partial[at], partial[at + 1]) = (max, sum);
    }

    /// merged ← merged · e^(max₁−max) + next · e^(max₂−max); the second product is fused. The first partial is copied.
    #[inline(always)]
    pub(super) fn merge<S: Simd16>(merged: &mut [f32], next: &[f32]) {
        let at = merged.len() - LANES;
        if merged[at] == f32::NEG_INFINITY && merged[at + 1] == 0.0 {
            merged.copy_from_slice(next);
            return;
        }
        // One of the two factors is e⁰ = 1.
        let (max, old, new) = if merged[at] > next[at] {
            (merged[at], 1.0, math::exp_f32(next[at] - merged[at]))
        } else {
            (next[at], math::exp_f32(merged[at] - next[at]), 1.0)
        };
        // The sum goes the same way as the output: both factors are lanes of one vector with it.
        for (merged, next) in merged.chunks_exact_mut(LANES).zip(next.chunks_exact(LANES)) {
            let (a, b) = (S::read(merged), S::read(next));
            b.mul_add(S::splat(new), a.mul(S::splat(old))).write(merged);
        }
        merged[at] = max;
    }

    /// out = output / sum.
    #[inline(always)]
    pub(super) fn finish<S: Simd16>(merged: &[f32], out: &mut [f32]) {
        let sum = S::splat(merged[merged.len() - LANES + 1]);
        for (merged, out) in merged.chunks_exact(LANES).zip(out.chunks_mut(LANES)) {
            S::read(merged).div(sum).write_tail(out);
        }
    }
}

/// The keys and values of a split.
pub(super) struct SplitInputs<'a> {
    pub(super) layout: KvLayout,
    pub(super) kv_head: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) table: &'a [BlockId],
    /// Of the split, in the table.
    pub(super) first_block: usize,
    pub(super) k_cache: &'a KvBuffer,
    pub(super) v_cache: &'a KvBuffer,
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
        self.scores::<S>(scratch, blocks);
        for query in 0..scratch.keys.len() {
            self.softmax::<S>(scratch, query);
        }
        self.outputs::<S>(scratch, low..high);
    }

    /// Where up to four blocks of the split lie, as `f32`: in the cache itself, or widened in `widened`. Blocks up to `end`
    /// will be asked for next.
    #[inline(always)]
    fn blocks<S: Simd16>(
        &self,
        cache: &KvBuffer,
        blocks: Range<usize>,
        end: usize,
        widened: &mut AlignedBuffer,
    ) -> [*const f32; TILE_BLOCKS] {
        match cache.kind() {
            FloatType::F32 => std::array::from_fn(|index| match blocks.start + index {
                block if block < blocks.end => self.head::<f32>(cache, block),
                _ => std::ptr::null(),
            }),
            FloatType::Bf16 => self.widen::<S, BrainFloat>(cache, blocks, end, widened),
            FloatType::F16 => self.widen::<S, Half>(cache, blocks, end, widened),
        }
    }

    /// One head of one block of the split, as it is stored.
    #[inline(always)]
    fn head<E: Element>(&self, cache: &KvBuffer, block: usize) -> *const E {
        let start = self.layout.head_start(self.table[self.first_block + block], self.kv_head);
        cache.elements::<E>()[start..][..self.layout.elements_per_head()].as_ptr()
    }

    /// Widens up to four blocks, side by side.
    #[inline(always)]
    fn widen<S: Simd16, E: Element>(
        &self,
        cache: &KvBuffer,
        blocks: Range<usize>,
        end: usize,
        widened: &mut AlignedBuffer,
    ) -> [*const f32; TILE_BLOCKS] {
        let elements = self.layout.elements_per_head();
        let from = widened.as_ptr();
        for (block, to) in blocks.zip(widened.chunks_exact_mut(elements)) {
            let head = self.head::<E>(cache, block);
            let ahead = self.head::<E>(cache, (block + TILE_BLOCKS).min(end - 1));
            for (vector, to) in to.chunks_exact_mut(LANES).enumerate() {
                S::prefetch(ahead.wrapping_add(vector * LANES).cast());
                // SAFETY: a head of a block is whole vectors.
                unsafe { E::load::<S>(head.add(vector * LANES)) }.write(to);
            }
        }
        std::array::from_fn(|block| from.wrapping_add(block * elements))
    }

    /// What will be read after some blocks of keys: a block of one head is about a page, where the hardware's own
    /// prefetching ends, so that the next keys are asked for, and in the end the first values. Only where the cache is read
    /// in place: `widen` asks for itself.
    #[inline(always)]
    fn after(&self, next: usize, blocks: &Range<usize>) -> Option<[*const f32; TILE_BLOCKS]> {
        (self.k_cache.kind() == FloatType::F32).then(|| {
            std::array::from_fn(|index| match next + index {
                block if block < blocks.end => self.head::<f32>(self.k_cache, block),
                block => {
                    let value = blocks.start + block - blocks.end.max(next);
                    self.head::<f32>(self.v_cache, value.min(blocks.end - 1))
                }
            })
        })
    }

    /// Scores of all queries for some blocks. Keys that a query does not attend to get some number, or NaN.
    #[inline(always)]
    fn scores<S: Simd16>(&self, scratch: &mut Scratch, blocks: Range<usize>) {
        let queries = scratch.keys.len();
        for first in blocks.clone().step_by(TILE_BLOCKS) {
            let count = TILE_BLOCKS.min(blocks.end - first);
            let keys = self.blocks::<S>(self.k_cache, first..first + count, blocks.end, &mut scratch.widened);
            let ahead = self.after(first + TILE_BLOCKS, &blocks);
            for query in (0..queries).step_by(TILE_QUERIES) {
                let tile = ScoreTile {
                    head_dim: self.layout.head_dim,
                    count: TILE_QUERIES.min(queries - query),
                    queries: scratch.queries[query * self.layout.head_dim..].as_ptr(),
                    keys: &keys[..count],
                    ahead: ahead.filter(|_| query == 0),
                    scale: self.scale,
                    scores: scratch.scores[query * SCORE_STRIDE + first * BLOCK_TOKENS..].as_mut_ptr(),
                    stride: SCORE_STRIDE,
                };
                // SAFETY: `begin` made room for whole tiles of queries, keys point to whole heads of blocks (sliced by
                // `head`), scores to rows of 256 of which these blocks are a part.
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
        let scores = &mut scratch.scores[query * SCORE_STRIDE..][..SPLIT_KEYS];
        let (start, end) = (keys.start / LANES * LANES, keys.end.div_ceil(LANES) * LANES);
        if let Some(softcap) = self.softcap {
            for scores in scores[start..end].chunks_exact_mut(LANES) {
                let share = S::read(scores).div(S::splat(softcap));
                math::tanh_lanes(share).mul(S::splat(softcap)).write(scores);
            }
        }
        scores[start..keys.start].fill(f32::NEG_INFINITY);
        scores[keys.end..end].fill(f32::NEG_INFINITY);
        let lowest = S::splat(f32::NEG_INFINITY);
        // Four maxima, so that none waits for the one before; the largest is the same in any order.
        let (wide, rest) = scores[start..end].as_chunks_mut::<{ 4 * LANES }>();
        let mut max = [lowest; 4];
        for scores in wide {
            for (vector, max) in max.iter_mut().enumerate() {
                *max = S::read(&scores[vector * LANES..]).max(*max);
            }
        }
        for scores in rest.chunks_exact(LANES) {
            max[0] = S::read(scores).max(max[0]);
        }
        let max = max[0].max(max[1]).max(max[2].max(max[3])).max_lane();
        let mut sum = S::splat(0.0);
        for scores in scores[start..end].chunks_exact_mut(LANES) {
            let p = math::exp_lanes_nonpositive(S::read(scores).sub(S::splat(max)));
            p.write(scores);
            sum = sum.add(p);
        }
        let width = Partial::floats(self.layout.head_dim);
        Partial::start::<S>(&mut scratch.partials[query * width..][..width], max, sum.sum_lanes());
    }

    /// Σ p·v over the keys that each query attends to, ascending.
    #[inline(always)]
    fn outputs<S: Simd16>(&self, scratch: &mut Scratch, keys: Range<usize>) {
        let mut start = keys.start;
        while start < keys.end {
            let run = start..keys.end.min((start / RUN_KEYS + 1) * RUN_KEYS);
            start = run.end;
            let blocks = run.start / BLOCK_TOKENS..run.end.div_ceil(BLOCK_TOKENS);
            let end = keys.end.div_ceil(BLOCK_TOKENS);
            let values = self.blocks::<S>(self.v_cache, blocks.clone(), end, &mut scratch.widened);
            let next = blocks.end..end.min(blocks.end + TILE_BLOCKS);
            let ahead = (self.v_cache.kind() == FloatType::F32 && !next.is_empty())
                .then(|| self.blocks::<S>(self.v_cache, next, end, &mut scratch.widened));
            self.value_tiles::<S>(scratch, &values, ahead, blocks.start, run);
        }
    }

    /// The same over a run of keys, for all queries: `values` are its blocks, of which the first is `first_block` of the
    /// split.
    #[inline(always)]
    fn value_tiles<S: Simd16>(
        &self,
        scratch: &mut Scratch,
        values: &[*const f32; TILE_BLOCKS],
        ahead: Option<[*const f32; TILE_BLOCKS]>,
        first_block: usize,
        run: Range<usize>,
    ) {
        let queries = scratch.keys.len();
        let width = Partial::floats(self.layout.head_dim);
        for first in (0..queries).step_by(TILE_QUERIES) {
            let tile = first..queries.min(first + TILE_QUERIES);
            // Keys that all queries of the tile attend to go together; those before and after, query by query.
            let range = |start: usize, end: usize| start..end.max(start);
            let clamp = |keys: &Range<usize>| range(keys.start.max(run.start), keys.end.min(run.end));
            let (mut low, mut high) = (run.start, run.end);
            for keys in &scratch.keys[tile.clone()] {
                low = low.max(keys.start);
                high = high.min(keys.end);
            }
            let shared = range(low, high);
            let first_key = first_block * BLOCK_TOKENS;
            let values = |query: usize, count: usize, keys: Range<usize>| ValueTile {
                head_dim: self.layout.head_dim,
                values,
                ahead: ahead.filter(|_| query == 0),
                keys: keys.start - first_key..keys.end - first_key,
                p: scratch.scores[query * SCORE_STRIDE..][..count * SCORE_STRIDE][first_key..].as_ptr(),
                p_stride: SCORE_STRIDE,
                count,
            };
            for query in tile.clone() {
                let own = clamp(&scratch.keys[query]);
                let before = range(own.start, own.end.min(shared.start));
                let output = scratch.partials[query * width..].as_mut_ptr();
                // SAFETY: the keys lie in the run, whose blocks `head` sliced; the output has head_dim elements, p those
                // of the split from the run on.
                unsafe { values(query, 1, before).run::<S>(output, width) };
            }
            if !shared.is_empty() {
                let output = scratch.partials[first * width..].as_mut_ptr();
                // SAFETY: as above, for every query of the tile.
                unsafe { values(first, tile.len(), shared.clone()).run::<S>(output, width) };
            }
            for query in tile {
                let own = clamp(&scratch.keys[query]);
                let after = range(own.start.max(shared.end), own.end);
                let output = scratch.partials[query * width..].as_mut_ptr();
                // SAFETY: as above.
                unsafe { values(query, 1, after).run::<S>(output, width) };
            }
        }
    }
}
