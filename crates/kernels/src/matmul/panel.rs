//! One panel of outputs for one block of rows: parts in ascending order, their tree, the bias.

use super::packed::{PANEL, Panel};
use super::tile::{MAX_TILE_ROWS, Tile};
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows that pass over a panel together: enough that rereading the weights for the next block costs little bandwidth.
pub(super) const ROW_BLOCK: usize = 96;
/// Inputs per block when a few tiles of rows pass over them: 64 × 64 weights are 16 KiB, so that the block in use and the
/// next one, which is being fetched meanwhile, stay in the L1 cache together.
const K_BLOCK_FEW_TILES: usize = 64;
/// The same when many tiles pass, and what counts is how rarely sums are stored and loaded.
const K_BLOCK_MANY_TILES: usize = 128;
/// Most tiles that are few: up to here, fetching weights takes a good part of the time.
const FEW_TILES: usize = 6;
/// How far ahead of a single pass its weights are asked for, in elements.
const AHEAD: usize = 2048;
/// Open sums of the streaming tree: of 8 parts at most 3 wait while a fourth is computed.
const DEPTH: usize = 4;

/// The product of a block of rows with one panel.
pub(super) struct PanelProduct<'a> {
    /// All rows of the call, `[rows][k]`.
    pub(super) x: &'a [f32],
    pub(super) k: usize,
    /// The rows of this block, at most [`ROW_BLOCK`].
    pub(super) rows: Range<usize>,
    pub(super) parts: &'a [Range<usize>],
    pub(super) panel: Panel<'a>,
    /// Of all outputs.
    pub(super) bias: Option<&'a [f32]>,
    /// Distance between output rows.
    pub(super) n: usize,
}

impl<'a> PanelProduct<'a> {
    pub(super) fn into_output(self, y: &'a DisjointMut<'a>) -> PanelKernel<'a> {
        PanelKernel { product: self, y }
    }
}

/// A [`PanelProduct`] with the place of its result.
pub(super) struct PanelKernel<'a> {
    product: PanelProduct<'a>,
    y: &'a DisjointMut<'a>,
}

/// Running sums of the open subtrees, each `[rows][width]`.
#[repr(align(64))]
#[expect(dead_code, reason = "only its memory is used")]
struct Sums([[f32; ROW_BLOCK * PANEL]; DEPTH]);

impl LaneKernel for PanelKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let PanelKernel { product, y } = self;
        let size = product.rows.len() * product.panel.width;
        assert!(product.rows.len() <= ROW_BLOCK);
        let mut sums = MaybeUninit::<Sums>::uninit();
        let base = sums.as_mut_ptr().cast::<f32>();
        let level = |depth: usize| base.wrapping_add(depth * ROW_BLOCK * PANEL);
        // A binary counter: after part i, as many pairs close as i + 1 has trailing zeros. An entry tells whether its
        // subtree has any element.
        let (mut filled, mut depth) = ([false; DEPTH], 0);
        for (index, part) in product.parts.iter().enumerate() {
            filled[depth] = !part.is_empty();
            if filled[depth] {
                product.chain::<S>(part.clone(), level(depth));
            }
            depth += 1;
            let mut closed = index + 1;
            while closed % 2 == 0 {
                depth -= 1;
                let (left, right) = (level(depth - 1), level(depth));
                if filled[depth] {
                    // SAFETY: both levels hold `size` elements; the right one was computed, the left one if it is read.
                    unsafe { merge::<S>(left, right, size, filled[depth - 1]) };
                    filled[depth - 1] = true;
                }
                closed /= 2;
            }
        }
        product.finish::<S>(filled[0].then_some(level(0)), y);
    }
}

impl PanelProduct<'_> {
    /// One ascending chain over the inputs `part` (not empty) for every row and output; `sums` receives `[rows][width]`.
    #[inline(always)]
    fn chain<S: Simd16>(&self, part: Range<usize>, sums: *mut f32) {
        let rows = self.rows.len();
        let tiles = rows.div_ceil(MAX_TILE_ROWS);
        let step = match tiles {
            1 => part.len(),
            2..=FEW_TILES => K_BLOCK_FEW_TILES,
            _ => K_BLOCK_MANY_TILES,
        };
        let step_size = step * self.panel.width;
        for start in part.clone().step_by(step) {
            let end = part.end.min(start + step);
            let weights = &self.panel.weights[start * self.panel.width..end * self.panel.width];
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
                    width: self.panel.width,
                    inputs: end - start,
                    x: x[start..].as_ptr(),
                    x_stride: self.k,
                    sums: sums.wrapping_add(first * self.panel.width),
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

    /// Adds the bias and writes the outputs that exist; without any sum the product is −0 (see `Kernels::matmul`).
    #[inline(always)]
    fn finish<S: Simd16>(&self, sums: Option<*mut f32>, y: &DisjointMut<'_>) {
        let Panel { width, first, outputs, .. } = self.panel;
        for (index, row) in self.rows.clone().enumerate() {
            let start = row * self.n + first;
            // SAFETY: rows and panels of different tasks are disjoint.
            let out = unsafe { y.range(start..start + outputs) };
            for (vector, out) in out.chunks_mut(LANES).enumerate() {
                let sum = match sums {
                    // SAFETY: the root's `rows` × `width` sums were computed.
                    Some(sums) => unsafe { S::load(sums.add(index * width + vector * LANES)) },
                    None => S::splat(-0.0),
                };
                let sum = match self.bias {
                    Some(bias) => sum.add(S::read_tail(&bias[first + vector * LANES..][..out.len()], 0.0)),
                    None => sum,
                };
                if out.len() == LANES { sum.write(out) } else { sum.write_tail(out) }
            }
        }
    }
}

/// left ← left + right, or right where left is an empty subtree.
///
/// # Safety
/// Both point to `size` elements (a multiple of sixteen); `right` is initialised, and `left` if it is filled.
#[inline(always)]
unsafe fn merge<S: Simd16>(left: *mut f32, right: *const f32, size: usize, left_filled: bool) {
    for at in (0..size).step_by(LANES) {
        // SAFETY: the caller's contract.
        unsafe {
            let right = S::load(right.add(at));
            let sum = if left_filled { S::load(left.add(at)).add(right) } else { right };
            sum.store(left.add(at));
        }
    }
}
