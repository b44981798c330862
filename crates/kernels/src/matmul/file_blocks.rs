//! Blocks as GGUF files hold them, on their way into a matrix: sixteen rows at a time, from bits to bits.
//!
//! A file has one row's blocks after another; a matrix has sixteen rows' words side by side. So most of packing is a
//! transposition of words, and what is left are fields of a few bits that change places within words or between them.

use super::blocks::{BlockMatrix, BlockScale};
use super::file_rows::{self, ReadRows};
use super::formats::{Basic, Format, Q4K, Q5K, Q6K, Q8_0, QUADS, VECTOR, with_format};
use crate::kernels::Kernels;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use ashlar_vocabulary::WeightType;
use ashlar_vocabulary::blocks::{BlockAxis, GROUP, Piece};

/// Bytes of the longest block in files, q6_k's.
const BLOCK_BYTES_MAX: usize = 210;
/// Bytes of the longest group of sixteen outputs: eight pieces of q8_0 with their scales.
const GROUP_BYTES_MAX: usize = GROUP * (2 * LANES + QUADS * VECTOR);

/// See [`PackedMatrix::pack_file_blocks`](super::PackedMatrix::pack_file_blocks).
pub(super) fn pack<E: Send>(
    kind: WeightType,
    axis: BlockAxis,
    n: usize,
    kernels: &Kernels,
    read: &ReadRows<'_, E>,
) -> Result<BlockMatrix, E> {
    let row_bytes = kind.bytes(axis.whole_blocks(kind.block_len()).len());
    let nothing = with_format!(kind, F => zero_row::<F>(row_bytes));
    let whole = with_format!(kind, F => whole_groups(&axis, F::PIECES));
    BlockMatrix::filled(kind, axis, n, |matrix, to| {
        file_rows::for_sixteens(n, row_bytes, &nothing, kernels, read, &|first, rows| {
            kernels.dispatch(Sixteen { matrix, n, first, rows, whole: &whole, to });
        })
    })
}

/// A row that weighs nothing: what outputs are that do not exist.
fn zero_row<F: FileFormat>(row_bytes: usize) -> Vec<u8> {
    let mut row = vec![0; row_bytes];
    for block in row.chunks_exact_mut(F::BYTES) {
        F::zero(block);
    }
    row
}

/// A format as files hold it.
trait FileFormat: Format {
    /// Bytes of a block.
    const BYTES: usize;
    /// How many times 32 inputs it has.
    const PIECES: usize;

    /// Makes a block of zero bytes one of weights that are zero.
    fn zero(block: &mut [u8]);
    /// The scales of the block's piece `index`.
    fn scale(block: &[u8], index: usize) -> BlockScale;
    /// Lays out one group of `pieces` whole pieces (for superblocks: one whole superblock) of sixteen rows.
    ///
    /// # Safety
    /// `rows` must be valid for so many blocks, `to` for a group of so many pieces.
    unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8);
}

/// Packs sixteen outputs.
struct Sixteen<'a> {
    matrix: &'a BlockMatrix,
    n: usize,
    first: usize,
    /// Where their rows begin, each as long as the axis's whole blocks.
    rows: [*const u8; LANES],
    /// Which groups have nothing but whole blocks.
    whole: &'a [bool],
    to: &'a DisjointMut<'a, u8>,
}

impl LaneKernel for Sixteen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        with_format!(self.matrix.kind(), F => self.pack::<F, S>())
    }
}

impl Sixteen<'_> {
    #[inline(always)]
    fn pack<F: FileFormat, S: Simd16>(self) {
        let axis = self.matrix.axis();
        let first_block = axis.whole_blocks(32 * F::PIECES).start / (32 * F::PIECES);
        for (index, group) in axis.groups().iter().enumerate() {
            let pieces = &axis.pieces()[group.pieces.clone()];
            // SAFETY: a group of sixteen outputs belongs to one task.
            let to = unsafe { self.to.range(self.matrix.group_bytes(self.n, self.first, index)) };
            let rows = advanced(&self.rows, (pieces[0].block / F::PIECES - first_block) * F::BYTES);
            if self.whole[index] {
                // SAFETY: the axis's whole blocks, which rows have, hold those of the group; `to` is as long as the group.
                unsafe { F::lay_out::<S>(&rows, pieces.len(), to.as_mut_ptr()) };
            } else {
                // SAFETY: as above.
                unsafe { lay_out_cut::<F, S>(axis, &rows, pieces, to) };
            }
        }
    }
}

/// Which groups of the axis, of a format with so many pieces per block, have nothing but whole blocks.
fn whole_groups(axis: &BlockAxis, per_block: usize) -> Vec<bool> {
    let is_whole = |pieces: &[Piece]| {
        pieces.len().is_multiple_of(per_block) && pieces.iter().all(|piece| piece.inputs.len() == 32)
    };
    axis.groups().iter().map(|group| is_whole(&axis.pieces()[group.pieces.clone()])).collect()
}

/// The same rows, `bytes` on.
#[inline(always)]
fn advanced(rows: &[*const u8; LANES], bytes: usize) -> [*const u8; LANES] {
    let mut rows = *rows;
    for row in &mut rows {
        *row = row.wrapping_add(bytes);
    }
    rows
}

/// Lays out a group that has a part of a block only, or of a superblock: every block is laid out whole elsewhere, and what the
/// group has of it copied. Few groups of few matrices are cut.
///
/// # Safety
/// `rows` must be valid for the blocks that `pieces` lie in.
#[inline(always)]
unsafe fn lay_out_cut<F: FileFormat, S: Simd16>(
    axis: &BlockAxis,
    rows: &[*const u8; LANES],
    pieces: &[Piece],
    to: &mut [u8],
) {
    let mut scales = [[BlockScale::default(); LANES]; GROUP];
    let (header, quants) = to.split_at_mut(F::header_bytes(pieces.len()));
    for ((piece, scales), to) in pieces.iter().zip(&mut scales).zip(quants.chunks_exact_mut(F::PIECE_BYTES)) {
        let at = (piece.block / F::PIECES - pieces[0].block / F::PIECES) * F::BYTES;
        let (blocks, index) = (advanced(rows, at), piece.block % F::PIECES);
        for (scale, &block) in scales.iter_mut().zip(&blocks) {
            // SAFETY: the caller's contract.
            *scale = F::scale(unsafe { std::slice::from_raw_parts(block, F::BYTES) }, index);
        }
        let mut whole = [0; GROUP_BYTES_MAX];
        let mut quads = [[0; VECTOR]; QUADS];
        // SAFETY: the caller's contract; no group is longer than `whole`, and the piece lies in it; a quad has 64 bytes.
        unsafe {
            F::lay_out::<S>(&blocks, F::PIECES, whole.as_mut_ptr());
            let laid_out = whole.as_ptr().add(F::header_bytes(F::PIECES) + index * F::PIECE_BYTES);
            for (quad, to) in F::quads::<S>(laid_out).into_iter().zip(&mut quads) {
                quad.store(to.as_mut_ptr());
            }
        }
        let mut cut = [[F::ZERO as u8; 32]; LANES];
        for (lane, cut) in cut.iter_mut().enumerate() {
            for (input, to) in (axis.within(piece)..).zip(&mut cut[..piece.inputs.len()]) {
                *to = quads[input / 4][4 * lane + input % 4];
            }
        }
        F::pack_piece(&cut, to);
    }
    F::pack_header(&scales[..pieces.len()], header);
}

/// Copies sixteen halves, `at` bytes on from where each row begins.
///
/// # Safety
/// Rows must be valid for reading them, and `to` for 32 bytes.
#[inline(always)]
unsafe fn copy_halves(rows: &[*const u8; LANES], at: usize, to: *mut u8) {
    for (lane, row) in rows.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { to.add(2 * lane).cast::<[u8; 2]>().write(row.add(at).cast::<[u8; 2]>().read()) };
    }
}

/// Eight columns of words: 32 bytes of every row, `at` bytes on from where it begins.
///
/// # Safety
/// Rows must be valid for reading them.
#[inline(always)]
unsafe fn eight_columns<I: Int16>(rows: &[*const u8; LANES], at: usize) -> [I; QUADS] {
    // SAFETY: the caller's contract.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (I::load_columns(rows, at), I::load_columns(rows, at + 16)) };
    [a, b, c, d, e, f, g, h]
}

/// Lays out the nibbles of two pieces whose values i share byte i of 32: the first has the low halves, the second the high.
///
/// # Safety
/// Rows must be valid for 32 bytes from `at` on, `low` and `high` for four vectors.
#[inline(always)]
unsafe fn lay_out_nibbles<I: Int16>(rows: &[*const u8; LANES], at: usize, low: *mut u8, high: *mut u8) {
    let (low_mask, high_mask) = (I::splat(0x0f0f_0f0f), I::splat(0xf0f0_f0f0_u32 as i32));
    // SAFETY: the caller's contract.
    unsafe {
        let words = eight_columns::<I>(rows, at);
        for quad in 0..4 {
            let (a, b) = (words[quad], words[quad + 4]);
            a.and(low_mask).or(b.and(low_mask).shift_left::<4>()).store(low.add(quad * VECTOR));
            a.shift_right::<4>().and(low_mask).or(b.and(high_mask)).store(high.add(quad * VECTOR));
        }
    }
}

/// Exchanges the bits of `mask`, `DISTANCE` higher, of one word with the bits of `mask` of another.
#[inline(always)]
fn exchange<I: Int16, const DISTANCE: u32>(a: I, b: I, mask: u32) -> (I, I) {
    let change = a.shift_right::<DISTANCE>().xor(b).and(I::splat(mask as i32));
    (a.xor(change.shift_left::<DISTANCE>()), b.xor(change))
}

/// Exchanges bits within a word: those of `mask` and the ones `DISTANCE` higher.
#[inline(always)]
fn exchange_within<I: Int16, const DISTANCE: u32>(word: I, mask: u32) -> I {
    let change = word.shift_right::<DISTANCE>().xor(word).and(I::splat(mask as i32));
    word.xor(change).xor(change.shift_left::<DISTANCE>())
}

/// Bit 4j + b, the fifth of value 4j + b, goes to bit 8b + j: each step exchanges two digits of a bit's number.
#[inline(always)]
fn fifth_bits_by_place<I: Int16>(word: I) -> I {
    let word = exchange_within::<I, 3>(word, 0x0a0a_0a0a);
    let word = exchange_within::<I, 6>(word, 0x00cc_00cc);
    let word = exchange_within::<I, 12>(word, 0x0000_f0f0);
    exchange_within::<I, 8>(word, 0x0000_ff00)
}

/// A half in a block.
fn half_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

impl FileFormat for Q8_0 {
    const BYTES: usize = 34;
    const PIECES: usize = 1;

    /// Signed: zero as it is.
    fn zero(_block: &mut [u8]) {}
    fn scale(block: &[u8], _index: usize) -> BlockScale {
        BlockScale { scale: half_at(block, 0), ..BlockScale::default() }
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8) {
        let sign = S::Int::splat(0x8080_8080_u32 as i32);
        for piece in 0..pieces {
            // SAFETY: the caller's contract.
            unsafe {
                copy_halves(rows, piece * Self::BYTES, to.add(2 * LANES * piece));
                let to = to.add(Self::header_bytes(pieces) + piece * Self::PIECE_BYTES);
                let quads = eight_columns::<S::Int>(rows, piece * Self::BYTES + 2);
                for (index, quad) in quads.into_iter().enumerate() {
                    quad.xor(sign).store(to.add(index * VECTOR));
                }
            }
        }
    }
}

/// A scale, a minimum (`MIN`), the fifth bits of all values (`FIVE`), and their nibbles, in words just as a matrix has them.
macro_rules! basic {
    ($five:literal, $min:literal, $zero:expr) => {
        impl FileFormat for Basic<$five, $min> {
            const BYTES: usize = 2 + 2 * $min as usize + 4 * $five as usize + 16;
            const PIECES: usize = 1;

            fn zero(block: &mut [u8]) {
                let zero: fn(&mut [u8]) = $zero;
                zero(block);
            }
            fn scale(block: &[u8], _index: usize) -> BlockScale {
                let min = if $min { half_at(block, 2) } else { 0 };
                BlockScale { scale: half_at(block, 0), min, ..BlockScale::default() }
            }
            #[inline(always)]
            unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8) {
                for piece in 0..pieces {
                    let mut at = piece * Self::BYTES;
                    // SAFETY: the caller's contract.
                    unsafe {
                        copy_halves(rows, at, to.add(2 * LANES * piece));
                        at += 2;
                        if $min {
                            copy_halves(rows, at, to.add(2 * LANES * (pieces + piece)));
                            at += 2;
                        }
                        let to = to.add(Self::header_bytes(pieces) + piece * Self::PIECE_BYTES);
                        if $five {
                            let [fifth_bits, ..] = S::Int::load_columns(rows, at);
                            fifth_bits_by_place(fifth_bits).store(to.add(4 * VECTOR));
                            at += 4;
                        }
                        let words = S::Int::load_columns(rows, at);
                        for (index, word) in words.into_iter().enumerate() {
                            word.store(to.add(index * VECTOR));
                        }
                    }
                }
            }
        }
    };
}
basic!(false, false, |block| block[2..].fill(0x88));
basic!(false, true, |_| ());
basic!(true, false, |block| block[2..6].fill(0xff));
basic!(true, true, |_| ());

/// What q4_k and q5_k begin with: two halves, then eight scales and eight minima of six bits in twelve bytes, of which the
/// last four of each are split.
mod six_bits {
    use super::*;

    pub(super) fn scale(block: &[u8], index: usize) -> BlockScale {
        let bytes = &block[4..16];
        let (scale, min) = match index {
            0..4 => (bytes[index] & 63, bytes[index + 4] & 63),
            _ => {
                let (low, scale, min) = (bytes[index + 4], bytes[index - 4], bytes[index]);
                (low & 15 | scale >> 6 << 4, low >> 4 | min >> 6 << 4)
            }
        };
        let sub_scales = [scale as i8, 0];
        BlockScale { scale: half_at(block, 0), min: half_at(block, 2), sub_scales, sub_min: min }
    }

    /// # Safety
    /// Rows must be valid for a superblock, `to` for a group's header.
    #[inline(always)]
    pub(super) unsafe fn lay_out<I: Int16>(rows: &[*const u8; LANES], to: *mut u8) {
        // SAFETY: the caller's contract.
        let [a, b, c, _] = unsafe {
            copy_halves(rows, 0, to);
            copy_halves(rows, 2, to.add(2 * LANES));
            I::load_columns(rows, 4)
        };
        let (six, four, two) = (I::splat(63), I::splat(15), I::splat(3));
        let top = I::splat(48);
        // The upper two bits of the last four lie above the first four, byte by byte.
        let scale4 = c.and(four).or(a.shift_right::<2>().and(top));
        let scale5 = c.shift_right::<8>().and(four).or(a.shift_right::<10>().and(top));
        let scale6 = c.shift_right::<16>().and(four).or(a.shift_right::<18>().and(top));
        let scale7 = c.shift_right::<24>().and(four).or(a.shift_right::<26>().and(top));
        let min4 = c.shift_right::<4>().and(four).or(b.shift_right::<2>().and(top));
        let min5 = c.shift_right::<12>().and(four).or(b.shift_right::<10>().and(top));
        let min6 = c.shift_right::<20>().and(four).or(b.shift_right::<18>().and(top));
        let min7 = c.shift_right::<28>().and(four).or(b.shift_right::<26>().and(top));
        let first = a.and(six);
        let first = first.or(a.shift_right::<8>().and(six).shift_left::<6>());
        let first = first.or(a.shift_right::<16>().and(six).shift_left::<12>());
        let first = first.or(a.shift_right::<24>().and(six).shift_left::<18>());
        let first = first.or(scale4.shift_left::<24>()).or(min7.shift_left::<30>());
        let second = scale5.or(scale6.shift_left::<6>()).or(scale7.shift_left::<12>());
        let second = second.or(b.and(six).shift_left::<18>());
        let second = second.or(b.shift_right::<8>().and(six).shift_left::<24>());
        let second = second.or(min7.shift_right::<2>().and(two).shift_left::<30>());
        let third = b.shift_right::<16>().and(six);
        let third = third.or(b.shift_right::<24>().and(six).shift_left::<6>());
        let third = third.or(min4.shift_left::<12>()).or(min5.shift_left::<18>()).or(min6.shift_left::<24>());
        let third = third.or(min7.shift_right::<4>().shift_left::<30>());
        // SAFETY: the caller's contract.
        unsafe {
            first.store(to.add(4 * LANES));
            second.store(to.add(4 * LANES + VECTOR));
            third.store(to.add(4 * LANES + 2 * VECTOR));
        }
    }
}

impl FileFormat for Q4K {
    const BYTES: usize = 144;
    const PIECES: usize = 8;

    fn zero(_block: &mut [u8]) {}
    fn scale(block: &[u8], index: usize) -> BlockScale {
        six_bits::scale(block, index)
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe {
            six_bits::lay_out::<S::Int>(rows, to);
            let to = to.add(Self::header_bytes(pieces));
            for pair in 0..4 {
                let low = to.add(2 * pair * Self::PIECE_BYTES);
                lay_out_nibbles::<S::Int>(rows, 16 + 32 * pair, low, low.add(Self::PIECE_BYTES));
            }
        }
    }
}

impl FileFormat for Q5K {
    const BYTES: usize = 176;
    const PIECES: usize = 8;

    fn zero(_block: &mut [u8]) {}
    fn scale(block: &[u8], index: usize) -> BlockScale {
        six_bits::scale(block, index)
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe {
            six_bits::lay_out::<S::Int>(rows, to);
            let to = to.add(Self::header_bytes(pieces));
            for pair in 0..4 {
                let low = to.add(2 * pair * Self::PIECE_BYTES);
                lay_out_nibbles::<S::Int>(rows, 48 + 32 * pair, low, low.add(Self::PIECE_BYTES));
            }
            // Bit p of column j is of quad j of piece p, and becomes bit j of the piece's word.
            let [a, b, c, d, e, f, g, h] = eight_columns::<S::Int>(rows, 16);
            let (a, e) = exchange::<S::Int, 4>(a, e, 0x0f0f_0f0f);
            let (b, f) = exchange::<S::Int, 4>(b, f, 0x0f0f_0f0f);
            let (c, g) = exchange::<S::Int, 4>(c, g, 0x0f0f_0f0f);
            let (d, h) = exchange::<S::Int, 4>(d, h, 0x0f0f_0f0f);
            let (a, c) = exchange::<S::Int, 2>(a, c, 0x3333_3333);
            let (b, d) = exchange::<S::Int, 2>(b, d, 0x3333_3333);
            let (e, g) = exchange::<S::Int, 2>(e, g, 0x3333_3333);
            let (f, h) = exchange::<S::Int, 2>(f, h, 0x3333_3333);
            let (a, b) = exchange::<S::Int, 1>(a, b, 0x5555_5555);
            let (c, d) = exchange::<S::Int, 1>(c, d, 0x5555_5555);
            let (e, f) = exchange::<S::Int, 1>(e, f, 0x5555_5555);
            let (g, h) = exchange::<S::Int, 1>(g, h, 0x5555_5555);
            for (piece, word) in [a, b, c, d, e, f, g, h].into_iter().enumerate() {
                word.store(to.add(piece * Self::PIECE_BYTES + 4 * VECTOR));
            }
        }
    }
}

impl FileFormat for Q6K {
    const BYTES: usize = BLOCK_BYTES_MAX;
    const PIECES: usize = 8;

    fn zero(block: &mut [u8]) {
        block[128..192].fill(0xaa);
    }
    fn scale(block: &[u8], index: usize) -> BlockScale {
        let sub_scales = [block[192 + 2 * index] as i8, block[193 + 2 * index] as i8];
        BlockScale { scale: half_at(block, 208), sub_scales, ..BlockScale::default() }
    }
    #[inline(always)]
    unsafe fn lay_out<S: Simd16>(rows: &[*const u8; LANES], pieces: usize, to: *mut u8) {
        // SAFETY: the caller's contract.
        unsafe {
            copy_halves(rows, 208, to);
            for (index, scales) in S::Int::load_columns(rows, 192).into_iter().enumerate() {
                let to = to.add(2 * LANES + 4 * LANES * index).cast::<i8>();
                scales.store_bytes(to);
                scales.shift_right::<8>().store_bytes(to.add(LANES));
                scales.shift_right::<16>().store_bytes(to.add(2 * LANES));
                scales.shift_right::<24>().store_bytes(to.add(3 * LANES));
            }
            for half in 0..2 {
                let to = to.add(Self::header_bytes(pieces) + 4 * half * Self::PIECE_BYTES);
                for piece in 0..2 {
                    let low = to.add(piece * Self::PIECE_BYTES);
                    let high = low.add(2 * Self::PIECE_BYTES);
                    lay_out_nibbles::<S::Int>(rows, 64 * half + 32 * piece, low, high);
                }
                for vector in 0..2 {
                    // Field p of column j is of quad j of piece p, and becomes field j of the piece's word.
                    let [a, b, c, d] = S::Int::load_columns(rows, 128 + 32 * half + 16 * vector);
                    let (a, c) = exchange::<S::Int, 4>(a, c, 0x0f0f_0f0f);
                    let (b, d) = exchange::<S::Int, 4>(b, d, 0x0f0f_0f0f);
                    let (a, b) = exchange::<S::Int, 2>(a, b, 0x3333_3333);
                    let (c, d) = exchange::<S::Int, 2>(c, d, 0x3333_3333);
                    let to = to.add((4 + vector) * VECTOR);
                    a.store(to);
                    b.store(to.add(Self::PIECE_BYTES));
                    c.store(to.add(2 * Self::PIECE_BYTES));
                    d.store(to.add(3 * Self::PIECE_BYTES));
                }
            }
        }
    }
}
