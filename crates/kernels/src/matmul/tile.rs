//! Register tiles: a few rows × a few vectors of outputs, chained over a run of inputs.

use crate::lanes::{LANES, Simd16};

/// Rows of the tallest tile.
pub(super) const MAX_TILE_ROWS: usize = 6;

/// A run of inputs for a few rows and all outputs of a panel.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// `[inputs][width]`.
    pub(super) weights: *const f32,
    /// Outputs of the panel: 16, 32, 48 or 64.
    pub(super) width: usize,
    /// Length of the run.
    pub(super) inputs: usize,
    /// The first row's first input of the run.
    pub(super) x: *const f32,
    /// Distance between rows.
    pub(super) x_stride: usize,
    /// `[rows][width]` running sums.
    pub(super) sums: *mut f32,
    /// Whether to go on from `sums`; otherwise chains start at +0.
    pub(super) resume: bool,
    /// What to ask for from memory meanwhile, `LINES` cache lines per input; need not be valid.
    pub(super) ahead: *const f32,
}

impl Tile {
    /// Advances the chains of `rows` rows (1…6); prefetches `LINES` (0…4) cache lines per input.
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
                    let (weights, sums) = (self.weights.add(vector * LANES), self.sums.add(vector * LANES));
                    let tile = Tile { weights, sums, ..self };
                    if vector == 0 {
                        tile.chains::<S, ROWS, 1, LINES>()
                    } else {
                        tile.chains::<S, ROWS, 1, 0>()
                    }
                }
            }
        }
    }

    /// The inner loop: per input, every sum takes one fused multiply-add.
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
            for input in 0..self.inputs {
                let from = self.weights.add(input * self.width);
                let mut weights = [S::splat(0.0); VECTORS];
                for (vector, weights) in weights.iter_mut().enumerate() {
                    *weights = S::load(from.add(vector * LANES));
                }
                for line in 0..LINES {
                    S::prefetch(self.ahead.wrapping_add((input * LINES + line) * LANES));
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let x = S::splat(*self.x.add(row * self.x_stride + input));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = weights.mul_add(x, *sum);
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
