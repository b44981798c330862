//! Products with panels of plain `f32` that a kernel has made for itself.

use super::dense::F32;
use super::tile::{MAX_TILE_ROWS, Tile};
use crate::Isa;
use crate::lanes::{self, LaneKernel, Simd16};
use std::marker::PhantomData;

/// Steps over which all tiles of rows pass before the next ones: of 64 outputs 32 KiB.
const BLOCK_STEPS: usize = 128;

/// sums ← (sums +) x·weights for some rows and up to 64 outputs: per element one ascending chain over the steps.
#[derive(Clone, Copy)]
pub(crate) struct PanelRun {
    /// Rows of `x` and of `sums`.
    pub(crate) rows: usize,
    /// Length of the chains.
    pub(crate) steps: usize,
    /// The first row's first factor.
    pub(crate) x: *const f32,
    /// Distance between rows of `x`.
    pub(crate) x_stride: usize,
    /// `[steps][width]`.
    pub(crate) weights: *const f32,
    /// 16, 32, 48 or 64.
    pub(crate) width: usize,
    /// `[rows][width]`.
    pub(crate) sums: *mut f32,
    /// Whether the chains go on from `sums`; otherwise they start at +0.
    pub(crate) resume: bool,
}

impl PanelRun {
    /// Computes it: a function of its own for each instruction set, however many kernels call it.
    ///
    /// # Safety
    /// The pointers must be valid for the extents given, and `sums` initialised if the run resumes. This machine must be able to
    /// run `isa`.
    #[inline]
    pub(crate) unsafe fn run(self, isa: Isa) {
        // SAFETY: the caller's contract.
        unsafe { lanes::dispatch(isa, Valid(self)) }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn tiles<S: Simd16>(self) {
        let PanelRun { rows, steps, width, .. } = self;
        if steps == 0 && !self.resume {
            // SAFETY: the caller's contract.
            unsafe { std::slice::from_raw_parts_mut(self.sums, rows * width) }.fill(0.0);
        }
        let tiles = rows.div_ceil(MAX_TILE_ROWS);
        let mut start = 0;
        while start < steps {
            let end = steps.min(start + BLOCK_STEPS);
            for tile in 0..tiles {
                let (first, next) = (tile * rows / tiles, (tile + 1) * rows / tiles);
                // SAFETY: the caller's contract; rows and steps stay within the extents.
                unsafe {
                    let tile = Tile::<F32> {
                        dense: PhantomData,
                        weights: self.weights.add(start * width).cast(),
                        width,
                        steps: end - start,
                        x: self.x.add(first * self.x_stride + start).cast(),
                        x_stride: self.x_stride,
                        sums: self.sums.add(first * width),
                        resume: self.resume || start > 0,
                        ahead: self.weights.cast(),
                    };
                    tile.run::<S, 0>(next - first);
                }
            }
            start = end;
        }
    }
}

/// A run whose pointers its maker vouches for.
struct Valid(PanelRun);

impl LaneKernel for Valid {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        // SAFETY: `PanelRun::run` makes it, under this contract.
        unsafe { self.0.tiles::<S>() }
    }
}
