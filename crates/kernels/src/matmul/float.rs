//! Products of activations with a panel of plain elements.

use super::dense::Dense;
use super::panel::Chain;
use super::tile::{MAX_TILE_ROWS, Tile};
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use std::marker::PhantomData;
use std::ops::Range;

/// Bytes per output of the block over which a few tiles of rows pass: for 64 outputs 16 KiB, so that the block in use and
/// the next one, which is being fetched meanwhile, stay in the L1 cache together.
const BLOCK_BYTES_FEW_TILES: usize = 256;
/// The same when many tiles pass, and what counts is how rarely sums are stored and loaded.
const BLOCK_BYTES_MANY_TILES: usize = 512;
/// Most tiles that are few: up to here, fetching weights takes a good part of the time.
const FEW_TILES: usize = 6;
/// How far ahead of a single pass its weights are asked for, in bytes.
const AHEAD: usize = 8192;

/// A panel and the rows that meet it.
pub(super) struct FloatChain<'a, D> {
    pub(super) dense: PhantomData<D>,
    /// All rows of the call, `[rows][steps]`, `WORDS` of each.
    pub(super) x: &'a [u32],
    /// Steps of all parts.
    pub(super) all_steps: usize,
    /// Steps of each part.
    pub(super) steps: &'a [Range<usize>],
    /// The rows of this block.
    pub(super) rows: Range<usize>,
    /// The panel, `[step][width]`.
    pub(super) weights: &'a [u8],
    pub(super) width: usize,
}

impl<D: Dense> Chain for FloatChain<'_, D> {
    #[inline]
    fn dispatch<K: LaneKernel>(kernels: &Kernels, kernel: K) -> K::Output {
        D::dispatch(kernels, kernel)
    }

    #[inline(always)]
    fn chain<S: Simd16>(&self, part: usize, sums: *mut f32) {
        let part = self.steps[part].clone();
        let rows = self.rows.len();
        let tiles = rows.div_ceil(MAX_TILE_ROWS);
        let block = match tiles {
            1 => part.len(),
            2..=FEW_TILES => BLOCK_BYTES_FEW_TILES / D::BYTES,
            _ => BLOCK_BYTES_MANY_TILES / D::BYTES,
        };
        let step_bytes = self.width * D::BYTES;
        for start in part.clone().step_by(block) {
            let end = part.end.min(start + block);
            let weights = &self.weights[start * step_bytes..end * step_bytes];
            // While tiles pass over this block, they ask for the next one, sharing the requests among them.
            let mut asked = 0;
            for tile in 0..tiles {
                let (first, next) = (tile * rows / tiles, (tile + 1) * rows / tiles);
                let stride = self.all_steps * D::WORDS;
                let x = &self.x[(self.rows.start + first) * stride..(self.rows.start + next) * stride];
                let lines = match (tiles, tile) {
                    (1, _) => D::BYTES,
                    (2, _) | (3, 0) => D::BYTES / 2,
                    (3, _) | (_, 0..4) => 1,
                    _ => 0,
                };
                let ahead = if tiles == 1 { AHEAD } else { block * step_bytes + asked };
                let tile = Tile::<D> {
                    dense: PhantomData,
                    weights: weights.as_ptr(),
                    width: self.width,
                    steps: end - start,
                    x: x[start * D::WORDS..].as_ptr(),
                    x_stride: stride,
                    sums: sums.wrapping_add(first * self.width),
                    resume: start > part.start,
                    ahead: weights.as_ptr().wrapping_add(ahead),
                };
                asked += (end - start) * lines * 4 * LANES;
                // SAFETY: the slices above were bounds-checked: `steps` × `width` weights, and for each row of the tile
                // `steps` activations from `start`; `sums` has room for `rows` × `width`.
                unsafe {
                    match lines {
                        4 => tile.run::<S, 4>(next - first),
                        2 => tile.run::<S, 2>(next - first),
                        1 => tile.run::<S, 1>(next - first),
                        _ => tile.run::<S, 0>(next - first),
                    }
                }
            }
        }
    }
}
