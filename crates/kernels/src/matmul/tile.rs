//! Register tiles: a few rows × a few vectors of outputs, chained over a run of inputs.

use super::dense::Dense;
use crate::lanes::{LANES, Simd16};
use std::marker::PhantomData;

/// Rows of the tallest tile.
pub(super) const MAX_TILE_ROWS: usize = 6;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// A run of steps for a few rows and all outputs of a panel.
pub(super) struct Tile<D> {
    pub(super) dense: PhantomData<D>,
    /// `[steps][width]`.
    pub(super) weights: *const u8,
    /// Outputs of the panel: 16, 32, 48 or 64.
    pub(super) width: usize,
    /// Length of the run, in steps.
    pub(super) steps: usize,
    /// The first row's activations of the first step of the run.
    pub(super) x: *const u32,
    /// Distance between rows, in words.
    pub(super) x_stride: usize,
    /// `[rows][width]` running sums.
    pub(super) sums: *mut f32,
    /// Whether to go on from `sums`; otherwise chains start at +0.
    pub(super) resume: bool,
    /// What to ask for from memory meanwhile, `LINES` cache lines per step; need not be valid.
    pub(super) ahead: *const u8,
}

impl<D: Dense> Tile<D> {
    /// Advances the chains of `rows` rows (1…6); prefetches `LINES` (0…4) cache lines per step.
    ///
    /// # Safety
    /// The pointers must be valid for the extents given, for `rows` rows, and `sums` initialised if the tile resumes.
    #[inline(always)]
    pub(super) unsafe fn run<S: Simd16, const LINES: usize>(self, rows: usize) {
        // SAFETY (of all arms): the caller's contract.
        unsafe {
            match rows {
                1 => self.one_row::<S, LINES>(),
                2 => self.rows::<S, 2, LINES>(),
                3 => self.rows::<S, 3, LINES>(),
                4 => self.rows::<S, 4, LINES>(),
                5 => self.rows::<S, 5, LINES>(),
                6 => self.rows::<S, 6, LINES>(),
                _ => unreachable!("a tile has one to six rows"),
            }
        }
    }

    /// One row takes all vectors of the panel at once: the weights are read as one stream.
    #[inline(always)]
    unsafe fn one_row<S: Simd16, const LINES: usize>(self) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.width / LANES {
                1 => self.chains::<S, 1, 1, 0>(),
                2 => self.chains::<S, 1, 2, 0>(),
                3 => self.chains::<S, 1, 3, 0>(),
                _ => self.chains::<S, 1, 4, LINES>(),
            }
        }
    }

    /// Several rows take as many vectors as the registers afford.
    #[inline(always)]
    unsafe fn rows<S: Simd16, const ROWS: usize, const LINES: usize>(self) {
        // SAFETY: the caller's contract; each step stays within the panel's width.
        unsafe {
            if S::TILE_VECTORS >= 4 {
                match self.width / LANES {
                    1 => self.chains::<S, ROWS, 1, 0>(),
                    2 => self.chains::<S, ROWS, 2, 0>(),
                    3 => self.chains::<S, ROWS, 3, 0>(),
                    _ => self.chains::<S, ROWS, 4, LINES>(),
                }
            } else {
                for vector in 0..self.width / LANES {
                    let weights = self.weights.add(vector * LANES * D::BYTES);
                    let tile = Tile { weights, sums: self.sums.add(vector * LANES), ..self };
                    if vector == 0 {
                        tile.chains::<S, ROWS, 1, LINES>()
                    } else {
                        tile.chains::<S, ROWS, 1, 0>()
                    }
                }
            }
        }
    }

    /// The inner loop: per step, every sum takes one term or a pair of them.
    #[inline(always)]
    unsafe fn chains<S: Simd16, const ROWS: usize, const VECTORS: usize, const LINES: usize>(self) {
        let mut sums = [[S::splat(0.0); VECTORS]; ROWS];
        // SAFETY: the caller's contract; a prefetched address need not be valid.
        unsafe {
            if self.resume {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = S::load(self.sums.add(row * self.width + vector * LANES));
                    }
                }
            }
            for step in 0..self.steps {
                let from = self.weights.add(step * self.width * D::BYTES);
                let mut weights = [D::load::<S>(from); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate().skip(1) {
                    *weights = D::load::<S>(from.add(vector * LANES * D::BYTES));
                }
                for line in 0..LINES {
                    S::prefetch(self.ahead.wrapping_add((step * LINES + line) * LINE_BYTES).cast());
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = self.x.add(row * self.x_stride + step * D::WORDS);
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = D::add::<S>(weights, x, *sum);
                    }
                }
            }
            for (row, sums) in sums.iter().enumerate() {
                for (vector, sum) in sums.iter().enumerate() {
                    sum.store(self.sums.add(row * self.width + vector * LANES));
                }
            }
        }
    }
}
