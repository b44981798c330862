//! Packed weights as plain numbers, sixteen outputs at a time: what a product with the transposed matrix takes.

use super::blocks::BlockMatrix;
use super::dense::DenseMatrix;
use super::formats::{Flavour, Format, QUADS, Scales, with_format};
use super::packed::{PANEL, Segment, Store, locate};
use crate::lanes::{Int16, LANES, Simd16};
use ashlar_vocabulary::WeightType;
use ashlar_vocabulary::blocks::BLOCK;
use std::ops::Range;

/// Where sixteen outputs' weights go: input after input, `stride` elements apart.
#[derive(Clone, Copy)]
struct Target {
    to: *mut f32,
    stride: usize,
}

/// A piece on its way where only some of its inputs are wanted.
#[repr(align(64))]
struct Piece([f32; BLOCK * LANES]);

impl Segment {
    /// Writes the weights of the sixteens from output `first` (a multiple of sixteen, counted in the segment) on, as many as
    /// `sixteens` says, for the inputs `columns`: `to[input][output]`, with `stride` elements from input to input. They are what
    /// [`PackedMatrix::row`](super::PackedMatrix::row) gives; outputs that do not exist are zero.
    #[inline(always)]
    pub(super) fn widen<S: Simd16>(
        &self,
        first: usize,
        sixteens: usize,
        columns: Range<usize>,
        to: &mut [f32],
        stride: usize,
    ) {
        assert!(sixteens * LANES <= stride && to.len() >= columns.len() * stride);
        assert!(first.is_multiple_of(LANES) && first + sixteens * LANES < self.n + LANES);
        for sixteen in 0..sixteens {
            // SAFETY: of every row of `to`, which has `stride` elements, `sixteens` × sixteen are written.
            let target = Target { to: unsafe { to.as_mut_ptr().add(sixteen * LANES) }, stride };
            let first = first + sixteen * LANES;
            match &self.store {
                Store::Dense(matrix) => matrix.widen::<S>(self.n, first, columns.clone(), target),
                Store::Blocks(matrix) => {
                    with_format!(matrix.kind(), F => matrix.widen::<F, S>(self.n, first, columns.clone(), target));
                }
            }
        }
    }
}

impl DenseMatrix {
    /// The weights of the sixteen outputs from `first` on.
    #[inline(always)]
    fn widen<S: Simd16>(&self, n: usize, first: usize, columns: Range<usize>, target: Target) {
        let (start, width) = locate(n, self.all_steps(), first);
        let data = self.data();
        for (part, steps) in self.parts().iter().zip(&self.steps) {
            for input in part.start.max(columns.start)..part.end.min(columns.end) {
                let at = input - part.start;
                let weights = match self.kind {
                    WeightType::F32 => {
                        let from = &data[(start + (steps.start + at) * width) * 4..][..4 * LANES];
                        // SAFETY: the slice holds sixteen elements.
                        unsafe { S::load(from.as_ptr().cast()) }
                    }
                    WeightType::F16 => {
                        let from = &data[(start + (steps.start + at) * width) * 2..][..2 * LANES];
                        // SAFETY: as above.
                        unsafe { S::load_half(from.as_ptr().cast()) }
                    }
                    _ => {
                        // Pairs, the earlier input in the high half.
                        let from = &data[(start + (steps.start + at / 2) * width) * 4..][..4 * LANES];
                        // SAFETY: the slice holds sixteen pairs.
                        let pairs = unsafe { S::Int::load(from.as_ptr()) };
                        let high = S::Int::splat(0xffff_0000u32 as i32);
                        let half = if at % 2 == 0 { pairs.and(high) } else { pairs.shift_left::<16>() };
                        half.as_float()
                    }
                };
                // SAFETY: the caller's target has room for every column.
                unsafe { weights.store(target.to.add((input - columns.start) * target.stride)) };
            }
        }
    }
}

impl BlockMatrix {
    /// The weights of the sixteen outputs from `first` on: `scale·(q − zero) + min`, each operation rounded.
    #[inline(always)]
    fn widen<F: Format, S: Simd16>(&self, n: usize, first: usize, columns: Range<usize>, target: Target) {
        let axis = self.axis();
        let panel_first = first / PANEL * PANEL;
        let vectors = (n - panel_first).min(PANEL).div_ceil(LANES);
        let panel = self.panel(panel_first, vectors);
        let mut scales = Scales::ZERO;
        let mut part_of_piece = Piece([0.0; BLOCK * LANES]);
        let groups = axis.groups();
        // Groups are consecutive: the first that ends behind the first column.
        let begin =
            groups.partition_point(|group| axis.pieces()[group.pieces.end - 1].inputs.end <= columns.start);
        for (index, group) in groups.iter().enumerate().skip(begin) {
            let pieces = &axis.pieces()[group.pieces.clone()];
            if pieces[0].inputs.start >= columns.end {
                break;
            }
            let data = &panel[self.locate(index, (first - panel_first) / LANES, vectors)..]
                [..F::header_bytes(pieces.len()) + pieces.len() * F::PIECE_BYTES];
            // SAFETY: the slice is as long as the header.
            unsafe { F::scales::<S>(data.as_ptr(), pieces.len(), &mut scales) };
            for (slot, piece) in pieces.iter().enumerate() {
                let (low, high) = (piece.inputs.start.max(columns.start), piece.inputs.end.min(columns.end));
                if low >= high {
                    continue;
                }
                let quants = &data[F::header_bytes(pieces.len()) + slot * F::PIECE_BYTES..][..F::PIECE_BYTES];
                // SAFETY: the slice is as long as a piece.
                let quads = unsafe { F::quads::<S>(quants.as_ptr()) };
                let scales = (S::read(&scales.first[slot]), S::read(&scales.second[slot]));
                // SAFETY: the caller's target has room for every column.
                let to = unsafe { target.to.add((low - columns.start) * target.stride) };
                if high - low == BLOCK {
                    // SAFETY: as above.
                    unsafe { widen_piece::<F, S>(quads, scales, Target { to, ..target }) };
                } else {
                    let all = Target { to: part_of_piece.0.as_mut_ptr(), stride: LANES };
                    // SAFETY: the buffer has room for a piece.
                    unsafe { widen_piece::<F, S>(quads, scales, all) };
                    for input in low..high {
                        let from = S::read(&part_of_piece.0[(input - piece.inputs.start) * LANES..]);
                        // SAFETY: as above.
                        unsafe { from.store(to.add((input - low) * target.stride)) };
                    }
                }
            }
        }
    }
}

/// All 32 inputs of a piece.
///
/// # Safety
/// The target must have room for them.
#[inline(always)]
unsafe fn widen_piece<F: Format, S: Simd16>(quads: [S::Int; QUADS], scales: (S, S), target: Target) {
    let (byte, zero) = (S::Int::splat(0xff), S::splat(F::ZERO as f32));
    for (index, quad) in quads.into_iter().enumerate() {
        let scale = if F::Flavour::HALVES && index >= QUADS / 2 { scales.1 } else { scales.0 };
        let quants = [
            quad.and(byte),
            quad.shift_right::<8>().and(byte),
            quad.shift_right::<16>().and(byte),
            quad.shift_right::<24>(),
        ];
        for (at, quant) in quants.into_iter().enumerate() {
            let value = scale.mul(quant.to_float().sub(zero));
            let value = if F::Flavour::MIN { value.add(scales.1) } else { value };
            // SAFETY: the caller's contract.
            unsafe { value.store(target.to.add((4 * index + at) * target.stride)) };
        }
    }
}
