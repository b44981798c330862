//! Activations as eight-bit integers: per row and block of 32, `q = round(x · 127/max|x|)`.
//!
//! The scale is `max|x| / 127`; a block of zeros, or of numbers so small that 127/max overflows, is all zero. A block
//! that holds an infinity or a NaN has the scale NaN, so that a model that has left its range shows it.

use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use ashlar_vocabulary::blocks::{BLOCK, BlockAxis};
use std::ops::Range;

/// 32-bit words of one row of one piece: 32 bytes, the scale, and two numbers for the format's zero and minimum.
pub(super) const WORDS: usize = BLOCK / 4 + 3;

/// Which two numbers a format needs beside the scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Extra {
    /// −zero·Σq, and the scale times Σq.
    WholeSum {
        /// The format's zero.
        zero: i32,
    },
    /// −zero·Σq of either half.
    HalfSums {
        /// The format's zero.
        zero: i32,
    },
}

/// How `rows` rows fall into tiles of at most `tile_rows`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    pub(super) rows: usize,
    pub(super) count: usize,
}

impl Tiles {
    pub(super) fn new(rows: usize, tile_rows: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(tile_rows) }
    }

    #[inline(always)]
    pub(super) fn rows(&self, tile: usize) -> Range<usize> {
        tile * self.rows / self.count..(tile + 1) * self.rows / self.count
    }
}

/// Quantises the rows of one tile into `[piece][words of its rows]`: 8 words of bytes per row, then the scales of the
/// rows, then each of the two extra numbers of the rows.
pub(super) struct QuantizeTile<'a> {
    /// `[rows][k]`.
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    pub(super) axis: &'a BlockAxis,
    pub(super) extra: Extra,
    pub(super) out: &'a mut [u32],
}

impl LaneKernel for QuantizeTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let QuantizeTile { x, rows, axis, extra, out } = self;
        let k = axis.k();
        assert_eq!((x.len(), out.len()), (rows * k, rows * axis.pieces().len() * WORDS));
        for (piece, out) in axis.pieces().iter().zip(out.chunks_exact_mut(rows * WORDS)) {
            for row in 0..rows {
                let values = &x[row * k..][piece.inputs.clone()];
                let block = if values.len() == BLOCK {
                    [S::read(values), S::read(&values[LANES..])]
                } else {
                    let mut padded = [0.0; BLOCK];
                    padded[..values.len()].copy_from_slice(values);
                    [S::read(&padded), S::read(&padded[LANES..])]
                };
                let (scale, quants) = quantize::<S>(block);
                let bytes = &mut out[row * 8..][..8];
                // SAFETY: eight words are 32 bytes.
                unsafe {
                    quants[0].store_bytes(bytes.as_mut_ptr().cast());
                    quants[1].store_bytes(bytes.as_mut_ptr().cast::<i8>().add(LANES));
                }
                let sums = [quants[0].sum_lanes(), quants[1].sum_lanes()];
                let (first, second) = match extra {
                    Extra::WholeSum { zero } => {
                        let sum = sums[0] + sums[1];
                        ((-zero * sum) as u32, (scale * sum as f32).to_bits())
                    }
                    Extra::HalfSums { zero } => ((-zero * sums[0]) as u32, (-zero * sums[1]) as u32),
                };
                out[rows * 8 + row] = scale.to_bits();
                out[rows * 9 + row] = first;
                out[rows * 10 + row] = second;
            }
        }
    }
}

/// The scale of a block of two vectors, and its integers.
#[inline(always)]
fn quantize<S: Simd16>(block: [S; 2]) -> (f32, [S::Int; 2]) {
    // Not by `map` of an array: what it calls is compiled without the vector instructions, and then not inlined.
    let largest = f32::from_bits(largest::<S>(block[0]).max(largest::<S>(block[1])) as u32);
    let factor = 127.0 / largest;
    if !largest.is_finite() {
        (f32::NAN, [S::Int::splat(0); 2])
    } else if !factor.is_finite() {
        (0.0, [S::Int::splat(0); 2])
    } else {
        let factor = S::splat(factor);
        (largest / 127.0, [block[0].mul(factor).round(), block[1].mul(factor).round()])
    }
}

/// The bits of the largest magnitude: they compare like integers, NaNs above infinity, so that one exact maximum finds both.
#[inline(always)]
fn largest<S: Simd16>(values: S) -> i32 {
    values.to_bits().and(S::Int::splat(0x7fff_ffff)).max_lane()
}
