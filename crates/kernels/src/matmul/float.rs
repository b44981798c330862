//! Products of f32 activations with a panel of f32 weights.

use super::panel::Chain;
use super::tile::{MAX_TILE_ROWS, Tile};
use crate::lanes::{LANES, Simd16};
use std::ops::Range;

/// Inputs per block when a few tiles of rows pass over them: 64 × 64 weights are 16 KiB, so that the block in use and the
/// next one, which is being fetched meanwhile, stay in the L1 cache together.
const K_BLOCK_FEW_TILES: usize = 64;
/// The same when many tiles pass, and what counts is how rarely sums are stored and loaded.
const K_BLOCK_MANY_TILES: usize = 128;
/// Most tiles that are few: up to here, fetching weights takes a good part of the time.
const FEW_TILES: usize = 6;
/// How far ahead of a single pass its weights are asked for, in elements.
const AHEAD: usize = 2048;

/// A panel and the rows that meet it.
pub(super) struct FloatChain<'a> {
    /// All rows of the call, `[rows][k]`.
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    /// The rows of this block.
    pub(super) rows: Range<usize>,
    pub(super) parts: &'a [Range<usize>],
    /// The panel, `[k][width]`.
    pub(super) weights: &'a [f32],
    pub(super) width: usize,
}

impl Chain for FloatChain<'_> {
    #[inline(always)]
    fn chain<S: Simd16>(&self, part: usize, sums: *mut f32) {
        let part = self.parts[part].clone();
        let rows = self.rows.len();
        let tiles = rows.div_ceil(MAX_TILE_ROWS);
        let step = match tiles {
            1 => part.len(),
            2..=FEW_TILES => K_BLOCK_FEW_TILES,
            _ => K_BLOCK_MANY_TILES,
        };
        let step_size = step * self.width;
        for start in part.clone().step_by(step) {
            let end = part.end.min(start + step);
            let weights = &self.weights[start * self.width..end * self.width];
            // While tiles pass over this block, they ask for the next one, sharing the requests among them.
            let mut asked = 0;
            for tile in 0..tiles {
                let (first, next) = (tile * rows / tiles, (tile + 1) * rows / tiles);
                let x = &self.x[(self.rows.start + first) * self.k..(self.rows.start + next) * self.k];
                let lines = match (tiles, tile) {
                    (1, _) => 4,
                    (2, _) | (3, 0) => 2,
                    (3, _) | (_, 0..4) => 1,
                    _ => 0,
                };
                let tile = Tile {
                    weights: weights.as_ptr(),
                    width: self.width,
                    inputs: end - start,
                    x: x[start..].as_ptr(),
                    x_stride: self.k,
                    sums: sums.wrapping_add(first * self.width),
                    resume: start > part.start,
                    ahead: weights.as_ptr().wrapping_add(if tiles == 1 { AHEAD } else { step_size + asked }),
                };
                asked += (end - start) * lines * LANES;
                // SAFETY: the slices above were bounds-checked: `inputs` × `width` weights, and for each row of the tile
                // `inputs` activations from `start`; `sums` has room for `rows` × `width`.
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
