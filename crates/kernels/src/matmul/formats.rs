//! The block formats: how sixteen outputs × one group of inputs lie in memory, and how they are taken apart.
//!
//! A group is a header with the scales of its pieces (up to eight), then the quants of piece after piece. Quants are
//! stored so that vector `j` of a piece (a *quad*) holds inputs 4j…4j+3 of sixteen outputs, four bytes per lane: what
//! a dot product of bytes takes. They are unsigned; the format's zero is subtracted through the activations' sum.

use crate::lanes::{Int16, LANES, Simd16};
use ashlar_vocabulary::WeightType;
use ashlar_vocabulary::blocks::GROUP;

/// Bytes of a vector.
pub(super) const VECTOR: usize = 4 * LANES;
/// Quads of a piece.
pub(super) const QUADS: usize = 8;

/// Scales of one piece of one output, as stored: which of them mean something depends on the type.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct BlockScale {
    /// Half-precision scale of the block or superblock.
    pub scale: u16,
    /// Half-precision minimum of the block (q4_1, q5_1), or scale of the superblock's minima.
    pub min: u16,
    /// Integer scale of the piece (q4_k, q5_k: the first; q6_k: of its halves of sixteen).
    pub sub_scales: [i8; 2],
    /// Integer minimum of the piece (q4_k, q5_k).
    pub sub_min: u8,
}

/// Which terms the product of a format has.
pub(super) trait Flavour {
    /// Each block adds a minimum times the sum of its activations.
    const MIN: bool = false;
    /// The two halves of a block have scales of their own.
    const HALVES: bool = false;
    /// Quants take all eight bits.
    const WIDE: bool = false;
}
pub(super) struct Plain;
impl Flavour for Plain {}
pub(super) struct Wide;
impl Flavour for Wide {
    const WIDE: bool = true;
}
pub(super) struct WithMin;
impl Flavour for WithMin {
    const MIN: bool = true;
}
pub(super) struct Halves;
impl Flavour for Halves {
    const HALVES: bool = true;
}

/// Scales of a group's pieces for sixteen outputs, in f32.
#[repr(align(64))]
pub(super) struct Scales {
    /// Of the piece, or of its first half.
    pub(super) first: [[f32; LANES]; GROUP],
    /// The minimum, or the scale of the second half.
    pub(super) second: [[f32; LANES]; GROUP],
}

impl Scales {
    pub(super) const ZERO: Scales = Scales { first: [[0.0; LANES]; GROUP], second: [[0.0; LANES]; GROUP] };
}

/// One block format.
pub(super) trait Format {
    type Flavour: Flavour;
    /// The quant that means 0.
    const ZERO: i32;
    /// Bytes of one piece's quants for sixteen outputs.
    const PIECE_BYTES: usize;
    /// Whether a piece's quads lie in memory as [`Format::quads`] gives them.
    const STORED_AS_QUADS: bool = false;

    /// Bytes of a group's scales for sixteen outputs.
    fn header_bytes(pieces: usize) -> usize;
    /// Lays out the scales, `[piece][output]`.
    fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]);
    /// Lays out one piece's quants, `[output][input]`.
    fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]);
    /// Widens the scales.
    ///
    /// # Safety
    /// `header` must be valid for `header_bytes(pieces)` bytes.
    unsafe fn scales<S: Simd16>(header: *const u8, pieces: usize, out: &mut Scales);
    /// Takes one piece's quants apart.
    ///
    /// # Safety
    /// `piece` must be valid for `PIECE_BYTES` bytes.
    unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS];
}

/// Calls `$body` with `$format` naming the format of a quantised `$kind`.
macro_rules! with_format {
    ($kind:expr, $format:ident => $body:expr) => {{
        use crate::matmul::formats::{Basic, Q4K, Q5K, Q6K, Q8_0};
        match $kind {
            WeightType::Q8_0 => {
                type $format = Q8_0;
                $body
            }
            WeightType::Q4_0 => {
                type $format = Basic<false, false>;
                $body
            }
            WeightType::Q4_1 => {
                type $format = Basic<false, true>;
                $body
            }
            WeightType::Q5_0 => {
                type $format = Basic<true, false>;
                $body
            }
            WeightType::Q5_1 => {
                type $format = Basic<true, true>;
                $body
            }
            WeightType::Q4K => {
                type $format = Q4K;
                $body
            }
            WeightType::Q5K => {
                type $format = Q5K;
                $body
            }
            WeightType::Q6K => {
                type $format = Q6K;
                $body
            }
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 => {
                unreachable!("{} is not a block format", $kind)
            }
        }
    }};
}
pub(super) use with_format;

/// The quant that means 0 in `kind`.
pub(super) fn zero_point(kind: WeightType) -> u8 {
    with_format!(kind, F => F::ZERO as u8)
}

/// Sixteen halves, one per output.
fn pack_halves(values: impl Iterator<Item = u16>, to: &mut [u8]) {
    for (value, to) in values.zip(to.chunks_exact_mut(2)) {
        to.copy_from_slice(&value.to_le_bytes());
    }
}

/// Quad `index` of a row: four quants in one word.
#[inline(always)]
fn quad_of(row: &[u8; 32], index: usize) -> u32 {
    let at = 4 * index;
    u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]])
}

/// Writes one word per lane and vector: `word(row, vector)`.
#[inline(always)]
fn pack_words(quants: &[[u8; 32]; LANES], to: &mut [u8], word: impl Fn(&[u8; 32], usize) -> u32) {
    for (vector, to) in to.chunks_exact_mut(VECTOR).enumerate() {
        for (row, to) in quants.iter().zip(to.chunks_exact_mut(4)) {
            to.copy_from_slice(&word(row, vector).to_le_bytes());
        }
    }
}

/// Per vector the low four bits of quads `j` and `j + 4`.
fn pack_nibbles(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
    const LOW: u32 = 0x0f0f_0f0f;
    pack_words(quants, &mut to[..4 * VECTOR], |row, quad| {
        quad_of(row, quad) & LOW | (quad_of(row, quad + 4) & LOW) << 4
    });
}

/// Bit 4 of all quads: bit `j` of each byte is quad `j`'s.
fn pack_fifth_bits(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
    pack_words(quants, &mut to[..VECTOR], |row, _| {
        (0..QUADS).fold(0, |bits, quad| bits | (quad_of(row, quad) >> 4 & 0x0101_0101) << quad)
    });
}

/// # Safety
/// `piece` must be valid for four vectors.
#[inline(always)]
unsafe fn nibbles<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
    let mask = S::Int::splat(0x0f0f_0f0f);
    let mut quads = [mask; QUADS];
    for quad in 0..4 {
        // SAFETY: the caller's contract.
        let pair = unsafe { S::Int::load(piece.add(quad * VECTOR)) };
        quads[quad] = pair.and(mask);
        quads[quad + 4] = pair.shift_right::<4>().and(mask);
    }
    quads
}

/// [`nibbles`] with their fifth bits, which follow them.
///
/// # Safety
/// `piece` must be valid for five vectors.
#[inline(always)]
unsafe fn fives<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
    // SAFETY: the caller's contract.
    let (q, high) = unsafe { (nibbles::<S>(piece), S::Int::load(piece.add(4 * VECTOR))) };
    let mask = S::Int::splat(0x1010_1010);
    [
        q[0].or(high.shift_left::<4>().and(mask)),
        q[1].or(high.shift_left::<3>().and(mask)),
        q[2].or(high.shift_left::<2>().and(mask)),
        q[3].or(high.shift_left::<1>().and(mask)),
        q[4].or(high.and(mask)),
        q[5].or(high.shift_right::<1>().and(mask)),
        q[6].or(high.shift_right::<2>().and(mask)),
        q[7].or(high.shift_right::<3>().and(mask)),
    ]
}

/// A vector of halves at `header + 32·index` becomes `out`.
///
/// # Safety
/// The header must be that long.
#[inline(always)]
unsafe fn widen<S: Simd16>(header: *const u8, index: usize, out: &mut [f32; LANES]) {
    // SAFETY: the caller's contract.
    unsafe { S::load_half(header.add(2 * LANES * index).cast()) }.write(out);
}

/// Eight bits and a scale; the byte is the signed quant + 128.
pub(super) struct Q8_0;

impl Format for Q8_0 {
    type Flavour = Wide;
    const ZERO: i32 = 128;
    const PIECE_BYTES: usize = QUADS * VECTOR;
    const STORED_AS_QUADS: bool = true;

    fn header_bytes(pieces: usize) -> usize {
        2 * LANES * pieces
    }
    fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
        pack_halves(scales.iter().flatten().map(|s| s.scale), header);
    }
    fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
        pack_words(quants, &mut to[..Self::PIECE_BYTES], quad_of);
    }
    #[inline(always)]
    unsafe fn scales<S: Simd16>(header: *const u8, pieces: usize, out: &mut Scales) {
        for piece in 0..pieces {
            // SAFETY: the caller's contract.
            unsafe { widen::<S>(header, piece, &mut out.first[piece]) };
        }
    }
    #[inline(always)]
    unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
        let mut quads = [S::Int::splat(0); QUADS];
        for (index, quad) in quads.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            *quad = unsafe { S::Int::load(piece.add(index * VECTOR)) };
        }
        quads
    }
}

/// Four bits (`FIVE`: five) and a scale (`MIN`: and a minimum).
pub(super) struct Basic<const FIVE: bool, const MIN: bool>;

macro_rules! basic {
    ($five:literal, $min:literal, $flavour:ty, $zero:literal) => {
        impl Format for Basic<$five, $min> {
            type Flavour = $flavour;
            const ZERO: i32 = $zero;
            const PIECE_BYTES: usize = (4 + $five as usize) * VECTOR;

            fn header_bytes(pieces: usize) -> usize {
                2 * LANES * pieces * (1 + $min as usize)
            }
            fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
                let (first, second) = header.split_at_mut(2 * LANES * scales.len());
                pack_halves(scales.iter().flatten().map(|s| s.scale), first);
                if $min {
                    pack_halves(scales.iter().flatten().map(|s| s.min), second);
                }
            }
            fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
                pack_nibbles(quants, to);
                if $five {
                    pack_fifth_bits(quants, &mut to[4 * VECTOR..]);
                }
            }
            #[inline(always)]
            unsafe fn scales<S: Simd16>(header: *const u8, pieces: usize, out: &mut Scales) {
                for piece in 0..pieces {
                    // SAFETY: the caller's contract.
                    unsafe {
                        widen::<S>(header, piece, &mut out.first[piece]);
                        if $min {
                            widen::<S>(header, pieces + piece, &mut out.second[piece]);
                        }
                    }
                }
            }
            #[inline(always)]
            unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
                // SAFETY: the caller's contract.
                unsafe { if $five { fives::<S>(piece) } else { nibbles::<S>(piece) } }
            }
        }
    };
}
basic!(false, false, Plain, 8);
basic!(false, true, WithMin, 0);
basic!(true, false, Plain, 16);
basic!(true, true, WithMin, 0);

/// The header of q4_k and q5_k: two halves, then sixteen 6-bit numbers in three 32-bit words per output. The words hold
/// scales 0…4 | scales 5…7, minima 0…1 | minima 2…6; the two bits left of each are minimum 7.
mod six_bits {
    use super::*;

    pub(super) const HEADER: usize = 2 * 2 * LANES + 3 * VECTOR;

    pub(super) fn pack(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
        let Some(super_scales) = scales.first() else { return };
        pack_halves(super_scales.iter().map(|s| s.scale), header);
        pack_halves(super_scales.iter().map(|s| s.min), &mut header[2 * LANES..]);
        for lane in 0..LANES {
            let number = |piece: usize| scales.get(piece).map_or(BlockScale::default(), |s| s[lane]);
            let scale = |piece: usize| u32::from(number(piece).sub_scales[0] as u8 & 63);
            let min = |piece: usize| u32::from(number(piece).sub_min & 63);
            let last = min(7);
            let words = [
                (0..5).fold(last << 30, |word, i| word | scale(i) << (6 * i)),
                (0..3).fold(last >> 2 << 30 | min(0) << 18 | min(1) << 24, |word, i| {
                    word | scale(5 + i) << (6 * i)
                }),
                (0..5).fold(last >> 4 << 30, |word, i| word | min(2 + i) << (6 * i)),
            ];
            for (index, word) in words.into_iter().enumerate() {
                let at = 4 * LANES + index * VECTOR + 4 * lane;
                header[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// # Safety
    /// `header` must be valid for [`HEADER`] bytes.
    #[inline(always)]
    pub(super) unsafe fn widen<S: Simd16>(header: *const u8, out: &mut Scales) {
        let mask = S::Int::splat(63);
        // SAFETY: the caller's contract.
        let (scale, min, [a, b, c]) = unsafe {
            let word = |index: usize| S::Int::load(header.add(4 * LANES + index * VECTOR));
            (
                S::load_half(header.cast()),
                S::load_half(header.add(2 * LANES).cast()),
                [word(0), word(1), word(2)],
            )
        };
        // A minimum is subtracted: w = scale·q − min.
        let min = S::splat(-1.0).mul(min);
        let scales = [
            a.and(mask),
            a.shift_right::<6>().and(mask),
            a.shift_right::<12>().and(mask),
            a.shift_right::<18>().and(mask),
            a.shift_right::<24>().and(mask),
            b.and(mask),
            b.shift_right::<6>().and(mask),
            b.shift_right::<12>().and(mask),
        ];
        let top = S::Int::splat(3);
        let last = a
            .shift_right::<30>()
            .or(b.shift_right::<30>().and(top).shift_left::<2>())
            .or(c.shift_right::<30>().and(top).shift_left::<4>());
        let mins = [
            b.shift_right::<18>().and(mask),
            b.shift_right::<24>().and(mask),
            c.and(mask),
            c.shift_right::<6>().and(mask),
            c.shift_right::<12>().and(mask),
            c.shift_right::<18>().and(mask),
            c.shift_right::<24>().and(mask),
            last,
        ];
        for piece in 0..GROUP {
            scales[piece].to_float().mul(scale).write(&mut out.first[piece]);
            mins[piece].to_float().mul(min).write(&mut out.second[piece]);
        }
    }
}

/// Superblocks with 6-bit scales and minima; four bits.
pub(super) struct Q4K;

impl Format for Q4K {
    type Flavour = WithMin;
    const ZERO: i32 = 0;
    const PIECE_BYTES: usize = 4 * VECTOR;

    fn header_bytes(_pieces: usize) -> usize {
        six_bits::HEADER
    }
    fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
        six_bits::pack(scales, header);
    }
    fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
        pack_nibbles(quants, to);
    }
    #[inline(always)]
    unsafe fn scales<S: Simd16>(header: *const u8, _pieces: usize, out: &mut Scales) {
        // SAFETY: the caller's contract.
        unsafe { six_bits::widen::<S>(header, out) };
    }
    #[inline(always)]
    unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
        // SAFETY: the caller's contract.
        unsafe { nibbles::<S>(piece) }
    }
}

/// Superblocks with 6-bit scales and minima; five bits.
pub(super) struct Q5K;

impl Format for Q5K {
    type Flavour = WithMin;
    const ZERO: i32 = 0;
    const PIECE_BYTES: usize = 5 * VECTOR;

    fn header_bytes(_pieces: usize) -> usize {
        six_bits::HEADER
    }
    fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
        six_bits::pack(scales, header);
    }
    fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
        pack_nibbles(quants, to);
        pack_fifth_bits(quants, &mut to[4 * VECTOR..]);
    }
    #[inline(always)]
    unsafe fn scales<S: Simd16>(header: *const u8, _pieces: usize, out: &mut Scales) {
        // SAFETY: the caller's contract.
        unsafe { six_bits::widen::<S>(header, out) };
    }
    #[inline(always)]
    unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
        // SAFETY: the caller's contract.
        unsafe { fives::<S>(piece) }
    }
}

/// Superblocks with 8-bit scales of every sixteen inputs; six bits, zero at 32.
pub(super) struct Q6K;

impl Format for Q6K {
    type Flavour = Halves;
    const ZERO: i32 = 32;
    const PIECE_BYTES: usize = 6 * VECTOR;

    fn header_bytes(pieces: usize) -> usize {
        2 * LANES + 2 * LANES * pieces
    }
    fn pack_header(scales: &[[BlockScale; LANES]], header: &mut [u8]) {
        let Some(super_scales) = scales.first() else { return };
        let (halves, bytes) = header.split_at_mut(2 * LANES);
        pack_halves(super_scales.iter().map(|s| s.scale), halves);
        for (piece, to) in scales.iter().zip(bytes.chunks_exact_mut(2 * LANES)) {
            for (lane, scale) in piece.iter().enumerate() {
                to[lane] = scale.sub_scales[0] as u8;
                to[LANES + lane] = scale.sub_scales[1] as u8;
            }
        }
    }
    fn pack_piece(quants: &[[u8; 32]; LANES], to: &mut [u8]) {
        pack_nibbles(quants, to);
        // Bits 4 and 5: field f of vector h is quad 4h + f.
        pack_words(quants, &mut to[4 * VECTOR..6 * VECTOR], |row, vector| {
            (0..4).fold(0, |bits, field| {
                bits | (quad_of(row, 4 * vector + field) >> 4 & 0x0303_0303) << (2 * field)
            })
        });
    }
    #[inline(always)]
    unsafe fn scales<S: Simd16>(header: *const u8, pieces: usize, out: &mut Scales) {
        // SAFETY: the caller's contract.
        unsafe {
            let scale = S::load_half(header.cast());
            let sub = |index: usize| S::Int::load_bytes(header.add(2 * LANES + LANES * index).cast());
            for piece in 0..pieces {
                sub(2 * piece).to_float().mul(scale).write(&mut out.first[piece]);
                sub(2 * piece + 1).to_float().mul(scale).write(&mut out.second[piece]);
            }
        }
    }
    #[inline(always)]
    unsafe fn quads<S: Simd16>(piece: *const u8) -> [S::Int; QUADS] {
        // SAFETY: the caller's contract.
        let (q, a, b) = unsafe {
            (nibbles::<S>(piece), S::Int::load(piece.add(4 * VECTOR)), S::Int::load(piece.add(5 * VECTOR)))
        };
        let mask = S::Int::splat(0x3030_3030);
        [
            q[0].or(a.shift_left::<4>().and(mask)),
            q[1].or(a.shift_left::<2>().and(mask)),
            q[2].or(a.and(mask)),
            q[3].or(a.shift_right::<2>().and(mask)),
            q[4].or(b.shift_left::<4>().and(mask)),
            q[5].or(b.shift_left::<2>().and(mask)),
            q[6].or(b.and(mask)),
            q[7].or(b.shift_right::<2>().and(mask)),
        ]
    }
}
