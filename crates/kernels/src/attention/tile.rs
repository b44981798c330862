//! Register tiles of attention's two products.

use super::layout::BLOCK_TOKENS;
use crate::lanes::{LANES, Simd16};
use std::ops::Range;

/// Scores of up to four queries for up to four blocks of sixteen keys.
pub(super) struct ScoreTile<'a> {
    pub(super) head_dim: usize,
    /// One to four pointers to head_dim elements.
    pub(super) queries: &'a [*const f32],
    /// One to four pointers to `[head_dim][16 keys]`.
    pub(super) keys: &'a [*const f32],
    /// As many pointers to what is needed next, to be fetched meanwhile.
    pub(super) ahead: Option<[*const f32; 4]>,
    /// The first query's score of the first key.
    pub(super) scores: *mut f32,
    /// Distance between queries' scores.
    pub(super) stride: usize,
}

impl ScoreTile<'_> {
    /// # Safety
    /// The pointers must be valid for the extents given.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd16>(self) {
        // SAFETY (of all arms): the caller's contract.
        unsafe {
            match self.queries.len() {
                1 => self.queries::<S, 1>(),
                2 => self.queries::<S, 2>(),
                3 => self.queries::<S, 3>(),
                _ => self.queries::<S, 4>(),
            }
        }
    }

    #[inline(always)]
    unsafe fn queries<S: Simd16, const QUERIES: usize>(self) {
        // SAFETY: the caller's contract; each step stays within the blocks given.
        unsafe {
            if S::TILE_VECTORS >= 4 && self.keys.len() == 4 {
                return match self.ahead {
                    Some(ahead) => self.chains::<S, QUERIES, 4, true>(ahead),
                    None => self.chains::<S, QUERIES, 4, false>([std::ptr::null(); 4]),
                };
            }
            for block in 0..self.keys.len() {
                let scores = self.scores.add(block * BLOCK_TOKENS);
                let tile = ScoreTile { keys: &self.keys[block..=block], scores, ..self };
                match self.ahead {
                    Some(ahead) => tile.chains::<S, QUERIES, 1, true>([ahead[block]; 4]),
                    None => tile.chains::<S, QUERIES, 1, false>([std::ptr::null(); 4]),
                }
            }
        }
    }

    /// Per element of the head, every score takes one fused multiply-add.
    #[inline(always)]
    unsafe fn chains<S: Simd16, const QUERIES: usize, const BLOCKS: usize, const AHEAD: bool>(
        self,
        ahead: [*const f32; 4],
    ) {
        let mut scores = [[S::splat(0.0); BLOCKS]; QUERIES];
        let queries: [*const f32; QUERIES] = std::array::from_fn(|query| self.queries[query]);
        let keys: [*const f32; BLOCKS] = std::array::from_fn(|block| self.keys[block]);
        // SAFETY: the caller's contract.
        unsafe {
            for element in 0..self.head_dim {
                let mut k = [S::splat(0.0); BLOCKS];
                for (k, keys) in k.iter_mut().zip(keys) {
                    *k = S::load(keys.add(element * BLOCK_TOKENS));
                }
                if AHEAD {
                    for ahead in ahead.iter().take(BLOCKS) {
                        S::prefetch(ahead.wrapping_add(element * BLOCK_TOKENS));
                    }
                }
                for (scores, query) in scores.iter_mut().zip(queries) {
                    let q = S::splat(*query.add(element));
                    for (score, k) in scores.iter_mut().zip(k) {
                        *score = k.mul_add(q, *score);
                    }
                }
            }
            for (query, scores) in scores.iter().enumerate() {
                for (block, score) in scores.iter().enumerate() {
                    score.store(self.scores.add(query * self.stride + block * BLOCK_TOKENS));
                }
            }
        }
    }
}

/// Σ p·v of up to four queries over a run of keys.
pub(super) struct ValueTile<'a> {
    pub(super) head_dim: usize,
    /// Per block of the split, `[16 keys][head_dim]`.
    pub(super) values: &'a [*const f32],
    /// Relative to the split.
    pub(super) keys: Range<usize>,
    /// The first query's probability of the split's first key.
    pub(super) p: *const f32,
    /// Distance between queries' probabilities.
    pub(super) p_stride: usize,
    /// Queries, one to four.
    pub(super) count: usize,
    /// How many keys further on values are asked for meanwhile; 0 for none.
    pub(super) ahead: usize,
}

impl ValueTile<'_> {
    /// Advances the chains at `output`, where queries lie `stride` apart.
    ///
    /// # Safety
    /// The pointers must be valid for the extents given, and `output` for `count` queries.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd16>(self, output: *mut f32, stride: usize) {
        if self.keys.is_empty() {
            return;
        }
        // SAFETY (of all arms): the caller's contract.
        unsafe {
            match self.count {
                1 => self.queries::<S, 1>(output, stride),
                2 => self.queries::<S, 2>(output, stride),
                3 => self.queries::<S, 3>(output, stride),
                _ => self.queries::<S, 4>(output, stride),
            }
        }
    }

    #[inline(always)]
    unsafe fn queries<S: Simd16, const QUERIES: usize>(self, output: *mut f32, stride: usize) {
        let mut element = 0;
        // SAFETY: the caller's contract; each step stays within the head.
        unsafe {
            while S::TILE_VECTORS >= 4 && element + 4 * LANES <= self.head_dim {
                self.chains::<S, QUERIES, 4>(element, output, stride);
                element += 4 * LANES;
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
            for key in self.keys.clone() {
                let value = self.values[key / BLOCK_TOKENS].add(key % BLOCK_TOKENS * self.head_dim + element);
                let mut v = [S::splat(0.0); VECTORS];
                for (vector, v) in v.iter_mut().enumerate() {
                    *v = S::load(value.add(vector * LANES));
                }
                let next = (key + self.ahead) / BLOCK_TOKENS;
                if self.ahead > 0 && next < self.values.len() {
                    let next = self.values[next].wrapping_add(key % BLOCK_TOKENS * self.head_dim + element);
                    for vector in 0..VECTORS {
                        S::prefetch(next.wrapping_add(vector * LANES));
                    }
                }
                for (query, sums) in sums.iter_mut().enumerate() {
                    let p = S::splat(*self.p.add(query * self.p_stride + key));
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = v.mul_add(p, *sum);
                    }
                }
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
