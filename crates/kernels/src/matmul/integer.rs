//! Products of eight-bit activations with a panel of blocks.
//!
//! Per output and block: an exact integer dot product, made a float, times (scale of the weights · scale of the
//! activations), added by one fused multiply-add; then, for formats with minima, minimum · (scale · Σ of activations),
//! added the same way. Blocks ascend; a block of q6_k counts as two.

use super::activations::{Tiles, WORDS};
use super::blocks::BlockMatrix;
use super::formats::{Flavour, Format, QUADS, Scales, VECTOR};
use super::panel::Chain;
use crate::lanes::{Int16, LANES, Simd16};
use ashlar_vocabulary::blocks::GROUP;
use std::marker::PhantomData;
use std::ops::Range;

/// How far ahead of their use weights are asked for, in bytes.
const AHEAD: usize = 4096;

/// Tiles of rows that share the work of asking for the next weights.
const TILES_ASKING: usize = 2;

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
struct QuadBuffer([u8; GROUP * QUADS * VECTOR]);

impl<F: Format> Chain for IntegerChain<'_, F> {
    const MULTIPLIES_BYTES: bool = true;

    #[inline(always)]
    fn chain<S: Simd16>(&self, part: usize, sums: *mut f32) {
        // What a batch of decoding sequences usually is goes the short way.
        match self.tiles.rows {
            1 => self.few_rows::<S, 1>(part, sums),
            2 => self.few_rows::<S, 2>(part, sums),
            4 if S::Int::TILE_ROWS >= 4 => self.few_rows::<S, 4>(part, sums),
            8 if S::Int::TILE_ROWS >= 8 => self.few_rows::<S, 8>(part, sums),
            _ => self.many_rows::<S>(part, sums),
        }
    }
}

impl<F: Format> IntegerChain<'_, F> {
    /// The groups of the part, each for every vector of the panel, in the order in which they lie in memory.
    #[inline(always)]
    fn runs(&self, part: usize) -> impl Iterator<Item = Run> {
        let axis = self.matrix.axis();
        let wanted = axis.part_pieces(part);
        let vectors = self.vectors;
        let groups = axis.groups().iter().enumerate().filter_map(move |(index, group)| {
            let pieces = group.pieces.start.max(wanted.start)..group.pieces.end.min(wanted.end);
            (!pieces.is_empty()).then(|| Run {
                group: index,
                group_pieces: group.pieces.len(),
                slots: pieces.start - group.pieces.start..pieces.end - group.pieces.start,
                first_piece: pieces.start,
                vector: 0,
                begins: pieces.start == wanted.start,
            })
        });
        groups.flat_map(move |run| (0..vectors).map(move |vector| Run { vector, ..run.clone() }))
    }

    /// The bytes of a run's group for its vector: header and pieces.
    #[inline(always)]
    fn data(&self, run: &Run) -> (*const u8, *const u8) {
        let header = F::header_bytes(run.group_pieces);
        let at = self.matrix.locate(run.group, run.vector, self.vectors);
        let data = &self.panel[at..at + header + run.group_pieces * F::PIECE_BYTES];
        (data.as_ptr(), data[header..].as_ptr())
    }

    /// Quants go from memory through registers into the sums of the only tile.
    #[inline(always)]
    fn few_rows<S: Simd16, const ROWS: usize>(&self, part: usize, sums: *mut f32) {
        let mut scales = Scales::ZERO;
        let stride = self.vectors * LANES;
        for run in self.runs(part) {
            let (header, pieces) = self.data(&run);
            // SAFETY: the pointers are the group's; sums has the panel's vectors for each row; rows have all pieces.
            unsafe {
                F::scales::<S>(header, run.group_pieces, &mut scales);
                let sums = sums.add(run.vector * LANES);
                let mut sum = [S::splat(0.0); ROWS];
                if !run.begins {
                    for (row, sum) in sum.iter_mut().enumerate() {
                        *sum = S::load(sums.add(row * stride));
                    }
                }
                for (index, slot) in run.slots.clone().enumerate() {
                    let piece = pieces.add(slot * F::PIECE_BYTES);
                    for line in 0..F::PIECE_BYTES / VECTOR {
                        S::prefetch(piece.wrapping_add(AHEAD + line * VECTOR).cast());
                    }
                    let x = self.x.as_ptr().add((run.first_piece + index) * ROWS * WORDS);
                    let (first, second) = (&scales.first[slot], &scales.second[slot]);
                    accumulate::<F::Flavour, S, _, ROWS>(
                        Held(F::quads::<S>(piece)),
                        first,
                        second,
                        x,
                        &mut sum,
                    );
                }
                for (row, sum) in sum.into_iter().enumerate() {
                    sum.store(sums.add(row * stride));
                }
            }
        }
    }

    /// A group's quants are taken apart into a buffer (unless they lie as they are used), over which all tiles of rows pass.
    #[inline(always)]
    fn many_rows<S: Simd16>(&self, part: usize, sums: *mut f32) {
        let mut buffer = QuadBuffer([0; GROUP * QUADS * VECTOR]);
        let mut scales = Scales::ZERO;
        let all_pieces = self.matrix.axis().pieces().len();
        let first_row = self.tiles.rows(self.block.start).start;
        for run in self.runs(part) {
            let (header, pieces) = self.data(&run);
            // SAFETY: as above; the buffer has room for a group.
            unsafe {
                F::scales::<S>(header, run.group_pieces, &mut scales);
                let quads = if F::STORED_AS_QUADS {
                    pieces
                } else {
                    for slot in run.slots.clone() {
                        let piece = pieces.add(slot * F::PIECE_BYTES);
                        for (quad, value) in F::quads::<S>(piece).into_iter().enumerate() {
                            value.store(buffer.0.as_mut_ptr().add((slot * QUADS + quad) * VECTOR));
                        }
                    }
                    buffer.0.as_ptr()
                };
                // What comes next is asked for while the first tiles compute, a few lines at a time: all at once it would
                // wait for memory, and computing would wait with it.
                let asking = self.block.len().min(TILES_ASKING);
                let lines = F::PIECE_BYTES / VECTOR;
                let ahead = pieces.wrapping_add(run.slots.start * F::PIECE_BYTES + AHEAD);
                for (index, tile) in self.block.clone().enumerate() {
                    let rows = self.tiles.rows(tile);
                    let share = match index {
                        index if index < asking => index * lines / asking..(index + 1) * lines / asking,
                        _ => 0..0,
                    };
                    let at = (rows.start * all_pieces + run.first_piece * rows.len()) * WORDS;
                    let tile = IntegerTile {
                        quads: quads.add(run.slots.start * QUADS * VECTOR),
                        scales: &scales,
                        slots: run.slots.clone(),
                        x: self.x.as_ptr().add(at),
                        sums: sums.add(((rows.start - first_row) * self.vectors + run.vector) * LANES),
                        stride: self.vectors * LANES,
                        begins: run.begins,
                        ahead,
                        lines,
                        share,
                    };
                    tile.run::<F::Flavour, S>(rows.len());
                }
            }
        }
    }
}

/// The pieces of one group that a chain passes over, for one vector of outputs.
#[derive(Clone)]
struct Run {
    /// Which group.
    group: usize,
    /// Pieces of the whole group.
    group_pieces: usize,
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
    /// What lies a fixed distance further on in the weights.
    ahead: *const u8,
    /// Lines of a stored piece, and which of each piece's are asked for meanwhile.
    lines: usize,
    share: Range<usize>,
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
                let quads = Stored(self.quads.add(index * QUADS * VECTOR));
                let (first, second) = (&self.scales.first[slot], &self.scales.second[slot]);
                let x = self.x.add(index * ROWS * WORDS);
                for line in self.share.clone() {
                    S::prefetch(self.ahead.wrapping_add((index * self.lines + line) * VECTOR).cast());
                }
                accumulate::<K, S, _, ROWS>(quads, first, second, x, &mut sums);
            }
            for (row, sum) in sums.into_iter().enumerate() {
                sum.store(self.sums.add(row * self.stride));
            }
        }
    }
}

/// Where a piece's quads are.
trait Quads<S: Simd16> {
    fn quad(&self, index: usize) -> S::Int;
}

/// In registers.
struct Held<I>([I; QUADS]);

impl<S: Simd16> Quads<S> for Held<S::Int> {
    #[inline(always)]
    fn quad(&self, index: usize) -> S::Int {
        self.0[index]
    }
}

/// In a buffer of eight vectors, which whoever made this vouches for.
struct Stored(*const u8);

impl<S: Simd16> Quads<S> for Stored {
    #[inline(always)]
    fn quad(&self, index: usize) -> S::Int {
        // SAFETY: the buffer has eight vectors.
        unsafe { S::Int::load(self.0.add(index * VECTOR)) }
    }
}

/// Adds one piece to the sums of `ROWS` rows.
///
/// # Safety
/// `x` must be valid for `ROWS · WORDS` words.
#[inline(always)]
unsafe fn accumulate<K: Flavour, S: Simd16, Q: Quads<S>, const ROWS: usize>(
    quads: Q,
    first: &[f32; LANES],
    second: &[f32; LANES],
    x: *const u32,
    sums: &mut [S; ROWS],
) {
    let halves = if K::HALVES { 2 } else { 1 };
    for half in 0..halves {
        let mut dots = [S::Int::splat(0); ROWS];
        // SAFETY (of all three): the caller's contract.
        for (row, dots) in dots.iter_mut().enumerate() {
            *dots = S::Int::splat(unsafe { *x.add((9 + half) * ROWS + row) } as i32);
        }
        let count = QUADS / halves;
        for at in half * count..(half + 1) * count {
            let w = quads.quad(at);
            for (row, dots) in dots.iter_mut().enumerate() {
                let x = S::Int::splat(unsafe { *x.add(row * QUADS + at) } as i32);
                *dots = if K::WIDE { dots.dot_wide(w, x) } else { dots.dot_narrow(w, x) };
            }
        }
        let w_scale = S::read(if half == 0 { first } else { second });
        for (row, sum) in sums.iter_mut().enumerate() {
            let x_scale = S::splat(f32::from_bits(unsafe { *x.add(8 * ROWS + row) }));
            *sum = dots[row].to_float().mul_add(w_scale.mul(x_scale), *sum);
        }
    }
    if K::MIN {
        let min = S::read(second);
        for (row, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            let x_sum = S::splat(f32::from_bits(unsafe { *x.add(10 * ROWS + row) }));
            *sum = min.mul_add(x_sum, *sum);
        }
    }
}
