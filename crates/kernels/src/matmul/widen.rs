//! Packed weights as plain numbers, sixteen outputs at a time: what a product with the transposed matrix takes.

use super::blocks::BlockMatrix;
use super::dense::DenseMatrix;
use super::formats::{Flavour, Format, Scales, with_format};
use super::packed::{PANEL, PackedMatrix, Store, locate};
use crate::lanes::{Int16, LANES, Simd16};
use ashlar_vocabulary::WeightType;
use std::ops::Range;

/// Inputs of sixteen outputs on their way: `[input][output]`.
#[repr(align(64))]
pub(super) struct Sixteen([f32; PANEL * LANES]);

impl Sixteen {
    pub(super) const ZERO: Sixteen = Sixteen([0.0; PANEL * LANES]);
}

impl PackedMatrix {
    /// Writes the weights of `outputs` for up to 64 inputs, `columns`, as `[output][width]`; beyond the columns, zeros.
    /// They are what [`PackedMatrix::row`] gives.
    #[inline(always)]
    pub(super) fn widen<S: Simd16>(
        &self,
        outputs: Range<usize>,
        columns: Range<usize>,
        width: usize,
        sixteen: &mut Sixteen,
        to: &mut [f32],
    ) {
        assert!(columns.len() <= width && width <= PANEL && to.len() >= outputs.len() * width);
        let start = outputs.start;
        for segment in self.segments() {
            let wanted = outputs.start.max(segment.first)..outputs.end.min(segment.first + segment.n);
            let mut next = wanted.start;
            while next < wanted.end {
                let first = (next - segment.first) / LANES * LANES;
                let end = wanted.end.min(segment.first + first + LANES);
                match &segment.store {
                    Store::Dense(matrix) => matrix.widen::<S>(segment.n, first, columns.clone(), sixteen),
                    Store::Blocks(matrix) => {
                        matrix.widen::<S>(segment.n, first, columns.clone(), sixteen);
                    }
                }
                for output in next..end {
                    let lane = output - segment.first - first;
                    let row = &mut to[(output - start) * width..][..width];
                    let (row, padding) = row.split_at_mut(columns.len());
                    for (to, from) in row.iter_mut().zip(sixteen.0.chunks_exact(LANES)) {
                        *to = from[lane];
                    }
                    padding.fill(0.0);
                }
                next = end;
            }
        }
    }
}

impl DenseMatrix {
    /// The weights of the sixteen outputs from `first` on.
    #[inline(always)]
    fn widen<S: Simd16>(&self, n: usize, first: usize, columns: Range<usize>, to: &mut Sixteen) {
        let (start, width) = locate(n, self.all_steps(), first);
        let data = self.data();
        for (part, steps) in self.parts().iter().zip(&self.steps) {
            for input in part.start.max(columns.start)..part.end.min(columns.end) {
                let at = input - part.start;
                let to = &mut to.0[(input - columns.start) * LANES..][..LANES];
                match self.kind {
                    WeightType::F32 => {
                        let from = &data[(start + (steps.start + at) * width) * 4..][..4 * LANES];
                        // SAFETY: the slice holds sixteen elements.
                        unsafe { S::load(from.as_ptr().cast()) }.write(to);
                    }
                    WeightType::F16 => {
                        let from = &data[(start + (steps.start + at) * width) * 2..][..2 * LANES];
                        // SAFETY: as above.
                        unsafe { S::load_half(from.as_ptr().cast()) }.write(to);
                    }
                    _ => {
                        // Pairs, the earlier input in the high half.
                        let from = &data[(start + (steps.start + at / 2) * width) * 4..][..4 * LANES];
                        // SAFETY: the slice holds sixteen pairs.
                        let pairs = unsafe { S::Int::load(from.as_ptr()) };
                        let high = S::Int::splat(0xffff_0000u32 as i32);
                        let half = if at % 2 == 0 { pairs.and(high) } else { pairs.shift_left::<16>() };
                        half.as_float().write(to);
                    }
                }
            }
        }
    }
}

impl BlockMatrix {
    /// The weights of the sixteen outputs from `first` on: `scale·(q − zero) + min`, each operation rounded.
    #[inline(always)]
    fn widen<S: Simd16>(&self, n: usize, first: usize, columns: Range<usize>, to: &mut Sixteen) {
        with_format!(self.kind(), F => self.widen_as::<F, S>(n, first, columns, to));
    }

    #[inline(always)]
    fn widen_as<F: Format, S: Simd16>(
        &self,
        n: usize,
        first: usize,
        columns: Range<usize>,
        to: &mut Sixteen,
    ) {
        let axis = self.axis();
        let panel_first = first / PANEL * PANEL;
        let vectors = (n - panel_first).min(PANEL).div_ceil(LANES);
        let panel = self.panel(panel_first, vectors);
        let mut scales = Scales::ZERO;
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
                let (one, two) = (S::read(&scales.first[slot]), S::read(&scales.second[slot]));
                for input in low..high {
                    let at = input - piece.inputs.start;
                    let quad = quads[at / 4];
                    let quant = match at % 4 {
                        0 => quad,
                        1 => quad.shift_right::<8>(),
                        2 => quad.shift_right::<16>(),
                        _ => quad.shift_right::<24>(),
                    };
                    let quant = quant.and(S::Int::splat(0xff)).to_float().sub(S::splat(F::ZERO as f32));
                    let scale = if F::Flavour::HALVES && at >= 16 { two } else { one };
                    let value = scale.mul(quant);
                    let value = if F::Flavour::MIN { value.add(two) } else { value };
                    value.write(&mut to.0[(input - columns.start) * LANES..][..LANES]);
                }
            }
        }
    }
}
