//! Activations as eight-bit integers: per row and block of 32, `q = round(x · 127/max|x|)`.
//!
//! The scale is `max|x| / 127`; a block of zeros, or of numbers so small that 127/max overflows, is all zero. A block
//! that holds an infinity or a NaN has the scale NaN, so that a model that has left its range shows it.
//!
//! Rows may be normed on their way: then no normed row is ever written to memory.

use super::input::RowNorm;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use crate::norm::row_scale;
use ashlar_vocabulary::blocks::{BLOCK, BlockAxis};
pub(super) use ashlar_vocabulary::packed::PIECE_WORDS as WORDS;
use std::ops::Range;

/// Rows of the tallest tile of any instruction set.
const ROWS_MAX: usize = 12;

/// Which two numbers a format needs beside the scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// Quantises some pieces of the rows of one tile into `[piece][words of its rows]`: 8 words of bytes per row, then the
/// scales of the rows, then each of the two extra numbers of the rows.
pub(super) struct QuantizeTile<'a> {
    /// `[rows][k]`.
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    pub(super) axis: &'a BlockAxis,
    /// The pieces wanted.
    pub(super) pieces: Range<usize>,
    pub(super) norm: Option<RowNorm<'a>>,
    pub(super) extra: Extra,
    pub(super) out: &'a mut [u32],
}

/// Sixteen blocks of one row on their way: divisions are made for all of them at once.
#[repr(align(64))]
struct Batch {
    values: [[f32; BLOCK]; LANES],
    /// The bits of each block's largest magnitude.
    largest: [i32; LANES],
}

impl LaneKernel for QuantizeTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let QuantizeTile { x, rows, axis, pieces, norm, extra, out } = self;
        let k = axis.k();
        let pieces = &axis.pieces()[pieces];
        assert_eq!((x.len(), out.len()), (rows * k, rows * pieces.len() * WORDS));
        let mut scales = [0.0; ROWS_MAX];
        if let Some(norm) = norm {
            for (row, scale) in scales[..rows].iter_mut().enumerate() {
                *scale = row_scale::<S>(&x[row * k..][..k], norm.eps);
            }
        }
        let mut batch = Batch { values: [[0.0; BLOCK]; LANES], largest: [0; LANES] };
        let batches = pieces.chunks(LANES).zip(out.chunks_mut(rows * WORDS * LANES));
        for (pieces, out) in batches {
            for row in 0..rows {
                let x = &x[row * k..][..k];
                for (index, piece) in pieces.iter().enumerate() {
                    let block = match norm {
                        Some(norm) => {
                            let weight = &norm.weight[piece.inputs.clone()];
                            normed_block::<S>(&x[piece.inputs.clone()], weight, scales[row])
                        }
                        None => read_block::<S>(&x[piece.inputs.clone()]),
                    };
                    block[0].write(&mut batch.values[index]);
                    block[1].write(&mut batch.values[index][LANES..]);
                    batch.largest[index] = magnitude(block[0]).max(magnitude(block[1])).max_lane();
                }
                batch.write::<S>(pieces.len(), row, rows, extra, out);
            }
        }
    }
}

/// The values of one piece, filled up with zeros.
#[inline(always)]
fn read_block<S: Simd16>(values: &[f32]) -> [S; 2] {
    if values.len() == BLOCK {
        return [S::read(values), S::read(&values[LANES..])];
    }
    let mut padded = [0.0; BLOCK];
    padded[..values.len()].copy_from_slice(values);
    [S::read(&padded), S::read(&padded[LANES..])]
}

/// `x · scale · weight` of one piece, filled up with zeros.
#[inline(always)]
fn normed_block<S: Simd16>(x: &[f32], weight: &[f32], scale: f32) -> [S; 2] {
    let scale = S::splat(scale);
    if x.len() == BLOCK {
        let first = S::read(x).mul(scale).mul(S::read(weight));
        return [first, S::read(&x[LANES..]).mul(scale).mul(S::read(&weight[LANES..]))];
    }
    // Zeros are put in afterwards: a scale that is not finite would turn them into NaNs.
    let (x, weight) = (read_block::<S>(x), (x.len(), read_block::<S>(weight)));
    let (len, weight) = weight;
    let mut normed = [0.0; BLOCK];
    x[0].mul(scale).mul(weight[0]).write(&mut normed);
    x[1].mul(scale).mul(weight[1]).write(&mut normed[LANES..]);
    read_block::<S>(&normed[..len])
}

/// The bits of the magnitudes: they compare like integers, NaNs above infinity, so that one exact maximum finds both.
#[inline(always)]
fn magnitude<S: Simd16>(values: S) -> S::Int {
    values.to_bits().and(S::Int::splat(0x7fff_ffff))
}

impl Batch {
    /// Writes the integers of the first `count` blocks as row `row` of `rows`.
    #[inline(always)]
    fn write<S: Simd16>(&self, count: usize, row: usize, rows: usize, extra: Extra, out: &mut [u32]) {
        let infinity = S::splat(f32::INFINITY);
        // SAFETY: sixteen words are 64 bytes.
        let largest = unsafe { S::Int::load(self.largest.as_ptr().cast()) }.as_float();
        let factor = S::splat(127.0).div(largest);
        // Comparisons with infinity: a factor that overflowed makes zeros, a block that is not finite the scale NaN.
        let usable = factor.select_less(infinity, factor, S::splat(0.0));
        let scale = factor.select_less(infinity, largest.div(S::splat(127.0)), S::splat(0.0));
        let scale = largest.select_less(infinity, scale, S::splat(f32::NAN)).to_array();
        let factor = usable.to_array();
        for (index, out) in out.chunks_exact_mut(rows * WORDS).take(count).enumerate() {
            let values = &self.values[index];
            let factor = S::splat(factor[index]);
            let mut quants =
                [S::read(values).mul(factor).round(), S::read(&values[LANES..]).mul(factor).round()];
            if scale[index].is_nan() {
                quants = [S::Int::splat(0); 2];
            }
            let bytes = &mut out[row * 8..][..8];
            // SAFETY: eight words are 32 bytes.
            unsafe {
                quants[0].store_bytes(bytes.as_mut_ptr().cast());
                quants[1].store_bytes(bytes.as_mut_ptr().cast::<i8>().add(LANES));
            }
            let (first, second) = match extra {
                Extra::WholeSum { zero } => {
                    let sum = quants[0].add(quants[1]).sum_lanes();
                    ((-zero * sum) as u32, (scale[index] * sum as f32).to_bits())
                }
                Extra::HalfSums { zero } => {
                    ((-zero * quants[0].sum_lanes()) as u32, (-zero * quants[1].sum_lanes()) as u32)
                }
            };
            out[rows * 8 + row] = scale[index].to_bits();
            out[rows * 9 + row] = first;
            out[rows * 10 + row] = second;
        }
    }
}
