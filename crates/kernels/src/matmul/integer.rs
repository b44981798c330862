//! Products of eight-bit activations with a panel of blocks.
//!
//! Per output and block: an exact integer dot product, made a float, times (scale of the weights · scale of the
//! activations), added by one fused multiply-add; then, for formats with minima, minimum · (scale · Σ of activations),
//! added the same way. Blocks ascend; a block of q6_k counts as two.

use super::activations::{Tiles, WORDS};
use super::axis::GROUP;
use super::blocks::BlockMatrix;
use super::formats::{Flavour, Format, QUADS, Scales, VECTOR};
use super::panel::Chain;
use crate::lanes::{Int16, LANES, Simd16};
use std::marker::PhantomData;
use std::ops::Range;

/// How far ahead of their use weights are asked for, in bytes.
const AHEAD: usize = 4096;

/// A panel and the quantised rows that meet it.
pub(super) struct IntegerChain<'a, F> {
    pub(super) format: PhantomData<F>,
    pub(super) matrix: &'a BlockMatrix,
    /// The panel's bytes.
    pub(super) panel: &'a [u8],
    /// Vectors of outputs that it spans.
    pub(super) vectors: usize,
    /// The whole call's rows, quantised tile by tile.
    pub(super) x: &'a [u32],
    pub(super) tiles: Tiles,
    /// The tiles of this block of rows.
    pub(super) block: Range<usize>,
}

/// Quants of a group for sixteen outputs, taken apart once for many rows.
#[repr(align(64))]
struct Quads([u8; GROUP * QUADS * VECTOR]);

impl<F: Format> Chain for IntegerChain<'_, F> {
    #[inline(always)]
    fn chain<S: Simd16>(&self, part: usize, sums: *mut f32) {
        if self.tiles.rows == 1 { self.single_row::<S>(part, sums) } else { self.many_rows::<S>(part, sums) }
    }
}

impl<F: Format> IntegerChain<'_, F> {
    /// Calls `visit` for each group of the part and each vector: the header's offset, that of the first piece wanted, the
    /// pieces, and whether a sum begins here.
    #[inline(always)]
    fn visit(&self, part: usize, mut visit: impl FnMut(&[u8], Run)) {
        let axis = self.matrix.axis();
        let wanted = axis.part_pieces(part);
        for (index, group) in axis.groups().iter().enumerate() {
            let pieces = group.pieces.start.max(wanted.start)..group.pieces.end.min(wanted.end);
            if pieces.is_empty() {
                continue;
            }
            let count = group.pieces.len();
            let header = F::header_bytes(count);
            for vector in 0..self.vectors {
                let at = self.matrix.locate(index, vector, self.vectors);
                let data = &self.panel[at..at + header + count * F::PIECE_BYTES];
                visit(
                    data,
                    Run {
                        group_pieces: count,
                        header,
                        slots: pieces.start - group.pieces.start..pieces.end - group.pieces.start,
                        first_piece: pieces.start,
                        vector,
                        begins: pieces.start == wanted.start,
                    },
                );
            }
        }
    }

    /// Quants go from memory through registers into the sums.
    #[inline(always)]
    fn single_row<S: Simd16>(&self, part: usize, sums: *mut f32) {
        let mut scales = Scales::ZERO;
        self.visit(part, |data, run| {
            // SAFETY: `data` is the group's; sums has a vector for each of the panel's; the row has all pieces.
            unsafe {
                F::scales::<S>(data.as_ptr(), run.group_pieces, &mut scales);
                let sums = sums.add(run.vector * LANES);
                let mut sum = [if run.begins { S::splat(0.0) } else { S::load(sums) }];
                for (index, slot) in run.slots.clone().enumerate() {
                    let piece = data.as_ptr().add(run.header + slot * F::PIECE_BYTES);
                    for line in 0..F::PIECE_BYTES / VECTOR {
                        S::prefetch(piece.wrapping_add(AHEAD + line * VECTOR).cast());
                    }
                    let quads = F::quads::<S>(piece);
                    let x = self.x.as_ptr().add((run.first_piece + index) * WORDS);
                    accumulate::<F::Flavour, S, 1>(
                        |quad| quads[quad],
                        &scales.first[slot],
                        &scales.second[slot],
                        x,
                        &mut sum,
                    );
                }
                sum[0].store(sums);
            }
        });
    }

    /// A group's quants are taken apart into a buffer, over which all tiles of rows pass.
    #[inline(always)]
    fn many_rows<S: Simd16>(&self, part: usize, sums: *mut f32) {
        let mut quads = Quads([0; GROUP * QUADS * VECTOR]);
        let mut scales = Scales::ZERO;
        let all_pieces = self.matrix.axis().pieces().len();
        let first_row = self.tiles.rows(self.block.start).start;
        self.visit(part, |data, run| {
            // SAFETY: as above; the buffer has room for a group.
            unsafe {
                F::scales::<S>(data.as_ptr(), run.group_pieces, &mut scales);
                for slot in run.slots.clone() {
                    let piece = data.as_ptr().add(run.header + slot * F::PIECE_BYTES);
                    for line in 0..F::PIECE_BYTES / VECTOR {
                        S::prefetch(piece.wrapping_add(AHEAD + line * VECTOR).cast());
                    }
                    for (quad, value) in F::quads::<S>(piece).into_iter().enumerate() {
                        value.store(quads.0.as_mut_ptr().add((slot * QUADS + quad) * VECTOR));
                    }
                }
                for tile in self.block.clone() {
                    let rows = self.tiles.rows(tile);
                    let tile = IntegerTile {
                        quads: quads.0.as_ptr().add(run.slots.start * QUADS * VECTOR),
                        scales: &scales,
                        slots: run.slots.clone(),
                        x: self
                            .x
                            .as_ptr()
                            .add((rows.start * all_pieces + run.first_piece * rows.len()) * WORDS),
                        sums: sums.add(((rows.start - first_row) * self.vectors + run.vector) * LANES),
                        stride: self.vectors * LANES,
                        begins: run.begins,
                    };
                    tile.run::<F::Flavour, S>(rows.len());
                }
            }
        });
    }
}

/// The pieces of one group that a chain passes over, for one vector of outputs.
struct Run {
    /// Pieces of the whole group.
    group_pieces: usize,
    /// Bytes of its header.
    header: usize,
    /// Those wanted, counted within the group.
    slots: Range<usize>,
    /// The first of them, counted in the axis.
    first_piece: usize,
    /// Which vector of the panel.
    vector: usize,
    /// Whether the chain starts here.
    begins: bool,
}

/// A few rows × sixteen outputs over a run of pieces.
struct IntegerTile<'a> {
    quads: *const u8,
    scales: &'a Scales,
    slots: Range<usize>,
    x: *const u32,
    sums: *mut f32,
    stride: usize,
    begins: bool,
}

impl IntegerTile<'_> {
    /// # Safety
    /// The pointers must be valid for the run, for `rows` rows, and `sums` initialised unless the chain begins.
    #[inline(always)]
    unsafe fn run<K: Flavour, S: Simd16>(self, rows: usize) {
        // SAFETY (of all arms): the caller's contract.
        unsafe {
            match rows {
                1 => self.rows::<K, S, 1>(),
                2 => self.rows::<K, S, 2>(),
                3 => self.rows::<K, S, 3>(),
                4 => self.rows::<K, S, 4>(),
                _ if S::Int::TILE_ROWS <= 4 => unreachable!("a tile has one to four rows"),
                5 => self.rows::<K, S, 5>(),
                6 => self.rows::<K, S, 6>(),
                7 => self.rows::<K, S, 7>(),
                8 => self.rows::<K, S, 8>(),
                9 => self.rows::<K, S, 9>(),
                10 => self.rows::<K, S, 10>(),
                11 => self.rows::<K, S, 11>(),
                12 => self.rows::<K, S, 12>(),
                _ => unreachable!("a tile has one to twelve rows"),
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<K: Flavour, S: Simd16, const ROWS: usize>(self) {
        let mut sums = [S::splat(0.0); ROWS];
        // SAFETY: the caller's contract.
        unsafe {
            if !self.begins {
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum = S::load(self.sums.add(row * self.stride));
                }
            }
            for (index, slot) in self.slots.clone().enumerate() {
                let quads = self.quads.add(index * QUADS * VECTOR);
                accumulate::<K, S, ROWS>(
                    |quad| S::Int::load(quads.add(quad * VECTOR)),
                    &self.scales.first[slot],
                    &self.scales.second[slot],
                    self.x.add(index * ROWS * WORDS),
                    &mut sums,
                );
            }
            for (row, sum) in sums.into_iter().enumerate() {
                sum.store(self.sums.add(row * self.stride));
            }
        }
    }
}

/// Adds one piece to the sums of `ROWS` rows.
///
/// # Safety
/// `x` must be valid for `ROWS · WORDS` words.
#[inline(always)]
unsafe fn accumulate<K: Flavour, S: Simd16, const ROWS: usize>(
    quad: impl Fn(usize) -> S::Int,
    first: &[f32; LANES],
    second: &[f32; LANES],
    x: *const u32,
    sums: &mut [S; ROWS],
) {
    // SAFETY (of all four): the caller's contract.
    let byte_quad = |row: usize, at: usize| S::Int::splat(unsafe { *x.add(row * QUADS + at) } as i32);
    let scale = |row: usize| S::splat(f32::from_bits(unsafe { *x.add(ROWS * 8 + row) }));
    let extra = |which: usize, row: usize| unsafe { *x.add(ROWS * (9 + which) + row) };
    let dot = |sum: S::Int, w: S::Int, x: S::Int| {
        if K::WIDE { sum.dot_wide(w, x) } else { sum.dot_narrow(w, x) }
    };
    let halves = if K::HALVES { 2 } else { 1 };
    for half in 0..halves {
        let mut dots = [S::Int::splat(0); ROWS];
        for (row, dots) in dots.iter_mut().enumerate() {
            *dots = S::Int::splat(extra(half, row) as i32);
        }
        let quads = QUADS / halves;
        for at in half * quads..(half + 1) * quads {
            let w = quad(at);
            for (row, dots) in dots.iter_mut().enumerate() {
                *dots = dot(*dots, w, byte_quad(row, at));
            }
        }
        let w_scale = S::read(if half == 0 { first } else { second });
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = dots[row].to_float().mul_add(w_scale.mul(scale(row)), *sum);
        }
    }
    if K::MIN {
        let min = S::read(second);
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum = min.mul_add(S::splat(f32::from_bits(extra(1, row))), *sum);
        }
    }
}
