//! Register tiles of attention's two products.

use super::layout::BLOCK_TOKENS;
use crate::lanes::{LANES, Simd16};
use ashlar_vocabulary::attention::{RUN_KEYS, TILE_QUERIES};
use std::ops::Range;

/// Blocks of sixteen keys of a register tile at most.
pub(super) const TILE_BLOCKS: usize = RUN_KEYS / BLOCK_TOKENS;

/// Elements of a head between two rounds of asking for what comes next.
const AHEAD_RUN: usize = 4;

/// Calls a method with the number of queries as a constant.
macro_rules! for_queries {
    ($count:expr, $self:ident . $method:ident ::<$S:ident>($($argument:expr),*)) => {
        match $count {
            1 => $self.$method::<$S, 1>($($argument),*),
            2 => $self.$method::<$S, 2>($($argument),*),
            3 => $self.$method::<$S, 3>($($argument),*),
            4 => $self.$method::<$S, 4>($($argument),*),
            5 => $self.$method::<$S, 5>($($argument),*),
            _ => $self.$method::<$S, TILE_QUERIES>($($argument),*),
        }
    };
}

/// Scores of up to six queries for up to four blocks of sixteen keys.
pub(super) struct ScoreTile<'a> {
    pub(super) head_dim: usize,
    /// Queries, one to six.
    pub(super) count: usize,
    /// `[head_dim][6]`: one element of six queries side by side.
    pub(super) queries: *const f32,
    /// One to four pointers to `[head_dim][16 keys]`.
    pub(super) keys: &'a [*const f32],
    /// Pointers to as many blocks that are needed next, to be fetched meanwhile.
    pub(super) ahead: Option<[*const f32; TILE_BLOCKS]>,
    /// Factor of the scores.
    pub(super) scale: f32,
    /// The first query's score of the first key.
    pub(super) scores: *mut f32,
    /// Distance between queries' scores.
    pub(super) stride: usize,
}

impl ScoreTile<'_> {
    /// # Safety
    /// The pointers must be valid for the extents given.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd16>(&self) {
        // SAFETY (of all arms): the caller's contract.
        unsafe { for_queries!(self.count, self.queries::<S>()) }
    }

    #[inline(always)]
    unsafe fn queries<S: Simd16, const QUERIES: usize>(&self) {
        // SAFETY (of all arms): the caller's contract; each step stays within the blocks given.
        unsafe {
            match self.keys.len() {
                4 if S::TILE_VECTORS >= 4 => self.chains::<S, QUERIES, 4>(0),
                count => {
                    let mut block = 0;
                    while S::TILE_VECTORS >= 4 && block + 2 <= count {
                        self.chains::<S, QUERIES, 2>(block);
                        block += 2;
                    }
                    while block < count {
                        self.chains::<S, QUERIES, 1>(block);
                        block += 1;
                    }
                }
            }
        }
    }

    /// Per element of the head, every score takes one fused multiply-add.
    #[inline(always)]
    unsafe fn chains<S: Simd16, const QUERIES: usize, const BLOCKS: usize>(&self, first: usize) {
        let mut scores = [[S::splat(0.0); BLOCKS]; QUERIES];
        let keys: [*const f32; BLOCKS] = std::array::from_fn(|block| self.keys[first + block]);
        // SAFETY: the caller's contract.
        unsafe {
            let mut element = 0;
            while element < self.head_dim {
                let run = element..self.head_dim.min(element + AHEAD_RUN);
                if let Some(ahead) = self.ahead {
                    for ahead in &ahead[first..first + BLOCKS] {
                        for element in run.clone() {
                            S::prefetch(ahead.wrapping_add(element * BLOCK_TOKENS));
                        }
                    }
                }
                element = run.end;
                for element in run {
                    let mut k = [S::splat(0.0); BLOCKS];
                    for (k, keys) in k.iter_mut().zip(keys) {
                        *k = S::load(keys.add(element * BLOCK_TOKENS));
                    }
                    for (query, scores) in scores.iter_mut().enumerate() {
                        let q = S::splat(*self.queries.add(element * TILE_QUERIES + query));
                        for (score, k) in scores.iter_mut().zip(k) {
                            *score = k.mul_add(q, *score);
                        }
                    }
                }
            }
            for (query, scores) in scores.iter().enumerate() {
                for (block, score) in scores.iter().enumerate() {
                    let to = self.scores.add(query * self.stride + (first + block) * BLOCK_TOKENS);
                    score.mul(S::splat(self.scale)).store(to);
                }
            }
        }
    }
}

/// Σ p·v of up to six queries over a run of keys.
pub(super) struct ValueTile<'a> {
    pub(super) head_dim: usize,
    /// Per block, `[16 keys][head_dim]`.
    pub(super) values: &'a [*const f32; TILE_BLOCKS],
    /// Blocks that are needed next, to be fetched meanwhile.
    pub(super) ahead: Option<[*const f32; TILE_BLOCKS]>,
    /// Counted from the first block.
    pub(super) keys: Range<usize>,
    /// The first query's probability of the first block's first key.
    pub(super) p: *const f32,
    /// Distance between queries' probabilities.
    pub(super) p_stride: usize,
    /// Queries, one to six.
    pub(super) count: usize,
}

impl ValueTile<'_> {
    /// Advances the chains at `output`, where queries lie `stride` apart.
    ///
    /// # Safety
    /// The pointers must be valid for the extents given, and `output` for `count` queries.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd16>(&self, output: *mut f32, stride: usize) {
        if self.keys.is_empty() {
            return;
        }
        // SAFETY (of all arms): the caller's contract.
        unsafe { for_queries!(self.count, self.queries::<S>(output, stride)) }
    }

    #[inline(always)]
    unsafe fn queries<S: Simd16, const QUERIES: usize>(&self, output: *mut f32, stride: usize) {
        let mut element = 0;
        // SAFETY: the caller's contract; each step stays within the head.
        unsafe {
            while S::TILE_VECTORS >= 4 && element + 4 * LANES <= self.head_dim {
                self.chains::<S, QUERIES, 4>(element, output, stride);
                element += 4 * LANES;
            }
            while S::TILE_VECTORS >= 4 && element + 2 * LANES <= self.head_dim {
                self.chains::<S, QUERIES, 2>(element, output, stride);
                element += 2 * LANES;
            }
            while element + LANES <= self.head_dim {
                self.chains::<S, QUERIES, 1>(element, output, stride);
                element += LANES;
            }
            for element in element..self.head_dim {
                for query in 0..QUERIES {
                    self.chain(element, query, output.add(query * stride + element));
                }
            }
        }
    }

    /// Per key, every element of the tile takes one fused multiply-add.
    #[inline(always)]
    unsafe fn chains<S: Simd16, const QUERIES: usize, const VECTORS: usize>(
        &self,
        element: usize,
        output: *mut f32,
        stride: usize,
    ) {
        let at = |query: usize, vector: usize| output.wrapping_add(query * stride + element + vector * LANES);
        let mut sums = [[S::splat(0.0); VECTORS]; QUERIES];
        // SAFETY: the caller's contract.
        unsafe {
            for (query, sums) in sums.iter_mut().enumerate() {
                for (vector, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(at(query, vector));
                }
            }
            // Block by block: within one, neighbouring keys lie head_dim apart.
            let mut key = self.keys.start;
            while key < self.keys.end {
                let (block, slot) = (key / BLOCK_TOKENS, key % BLOCK_TOKENS);
                let count = (BLOCK_TOKENS - slot).min(self.keys.end - key);
                let values = self.values[block].add(slot * self.head_dim + element);
                if let Some(next) = self.ahead.map(|ahead| ahead[block]).filter(|next| !next.is_null()) {
                    for index in slot..slot + count {
                        for vector in 0..VECTORS {
                            let at = index * self.head_dim + element + vector * LANES;
                            S::prefetch(next.wrapping_add(at));
                        }
                    }
                }
                for index in 0..count {
                    let value = values.add(index * self.head_dim);
                    let mut v = [S::splat(0.0); VECTORS];
                    for (vector, v) in v.iter_mut().enumerate() {
                        *v = S::load(value.add(vector * LANES));
                    }
                    for (query, sums) in sums.iter_mut().enumerate() {
                        let p = S::splat(*self.p.add(query * self.p_stride + key + index));
                        for (sum, v) in sums.iter_mut().zip(v) {
                            *sum = v.mul_add(p, *sum);
                        }
                    }
                }
                key += count;
            }
            for (query, sums) in sums.iter().enumerate() {
                for (vector, sum) in sums.iter().enumerate() {
                    sum.store(at(query, vector));
                }
            }
        }
    }

    /// One element of a head whose width is no multiple of sixteen.
    #[inline(always)]
    unsafe fn chain(&self, element: usize, query: usize, output: *mut f32) {
        // SAFETY: the caller's contract.
        unsafe {
            let mut sum = *output;
            for key in self.keys.clone() {
                let v = *self.values[key / BLOCK_TOKENS].add(key % BLOCK_TOKENS * self.head_dim + element);
                sum = v.mul_add(*self.p.add(query * self.p_stride + key), sum);
            }
            *output = sum;
        }
    }
}
