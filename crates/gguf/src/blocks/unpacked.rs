//! A block in pieces: scales, minima and stored integers, without the packing that a file uses.
//!
//! **Invariant:** [`pack`] and [`unpack`] are inverse for every block of every quantized type.

use super::BlockError;
use crate::types::{SUPERBLOCK_LEN, TensorType};
use half::f16;

/// One block of a quantized type. Entries that a type does not use are zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpackedBlock {
    /// The type, which says how to read the rest.
    pub tensor_type: TensorType,
    /// Bits of the block's f16 scale.
    pub d: u16,
    /// Bits of a second f16: what Q4_1 and Q5_1 *add* (their minimum), or what the minima of Q4_K and Q5_K are
    /// multiplied with before they are *subtracted*.
    pub m: u16,
    /// Integer scales of groups of [`TensorType::scale_group`] values: 0..=63 for Q4_K and Q5_K (8 used), any i8 for
    /// Q6_K (16 used), 1 in the first place for blocks of 32.
    pub scales: [i8; 16],
    /// Integer minima of groups of 32, 0..=63: Q4_K and Q5_K only.
    pub mins: [u8; 8],
    /// Stored integers in the order of the values, the first [`TensorType::block_len`] used. Those of a type with a
    /// [`TensorType::zero_point`] have it added, so Q8_0's −128..=127 are 0..=255 here.
    pub quants: [u8; SUPERBLOCK_LEN],
}

impl UnpackedBlock {
    /// A block of zeros.
    pub fn zero(tensor_type: TensorType) -> UnpackedBlock {
        let mut scales = [0; 16];
        if tensor_type.block_len() == 32 {
            scales[0] = 1;
        }
        let mut quants = [0; SUPERBLOCK_LEN];
        quants[..tensor_type.block_len()].fill(tensor_type.zero_point());
        UnpackedBlock { tensor_type, d: 0, m: 0, scales, mins: [0; 8], quants }
    }

    /// How many values the block has.
    pub fn len(&self) -> usize {
        self.tensor_type.block_len()
    }

    /// Always false; here because there is a length.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The value at `index`: `(d · scale) · (quant − zero)`, then `+ m` (Q4_1, Q5_1) or `− (m · min)` (Q4_K, Q5_K);
    /// every operation rounds to f32. Zero beyond the block's length.
    pub fn value(&self, index: usize) -> f32 {
        if index >= self.len() {
            return 0.0;
        }
        let zero = i32::from(self.tensor_type.zero_point());
        let scale = f32::from(self.scales[index / self.tensor_type.scale_group()]);
        let d = f16::from_bits(self.d).to_f32() * scale;
        let m = f16::from_bits(self.m).to_f32();
        let product = d * (i32::from(self.quants[index]) - zero) as f32;
        match self.tensor_type {
            TensorType::Q4_1 | TensorType::Q5_1 => product + m,
            TensorType::Q4K | TensorType::Q5K => product - m * f32::from(self.mins[index / 32]),
            _ => product,
        }
    }
}

/// Takes one block apart. `block` must be exactly [`TensorType::block_bytes`] long.
pub fn unpack(tensor_type: TensorType, block: &[u8]) -> Result<UnpackedBlock, BlockError> {
    if block.len() != tensor_type.block_bytes() {
        return Err(BlockError::Bytes { tensor_type, bytes: block.len(), blocks: 1 });
    }
    let mut out = UnpackedBlock::zero(tensor_type);
    let half_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    match tensor_type {
        TensorType::F32 | TensorType::F16 | TensorType::Bf16 => {
            return Err(BlockError::NotQuantized { tensor_type });
        }
        TensorType::Q8_0 => {
            out.d = half_at(0);
            for (quant, &byte) in out.quants.iter_mut().zip(&block[2..]) {
                // Two's complement with the sign flipped is the value plus 128.
                *quant = byte ^ 0x80;
            }
        }
        TensorType::Q4_0 => {
            out.d = half_at(0);
            low_bits_of_32(&block[2..], &mut out.quants);
        }
        TensorType::Q4_1 => {
            (out.d, out.m) = (half_at(0), half_at(2));
            low_bits_of_32(&block[4..], &mut out.quants);
        }
        TensorType::Q5_0 => {
            out.d = half_at(0);
            low_bits_of_32(&block[6..], &mut out.quants);
            fifth_bits_of_32(&block[2..6], &mut out.quants);
        }
        TensorType::Q5_1 => {
            (out.d, out.m) = (half_at(0), half_at(2));
            low_bits_of_32(&block[8..], &mut out.quants);
            fifth_bits_of_32(&block[4..8], &mut out.quants);
        }
        TensorType::Q4K => {
            (out.d, out.m) = (half_at(0), half_at(2));
            six_bit_scales(&block[4..16], &mut out.scales, &mut out.mins);
            low_bits_of_256(&block[16..], &mut out.quants);
        }
        TensorType::Q5K => {
            (out.d, out.m) = (half_at(0), half_at(2));
            six_bit_scales(&block[4..16], &mut out.scales, &mut out.mins);
            low_bits_of_256(&block[48..], &mut out.quants);
            // Bit g of byte i belongs to value i of group g.
            for (at, quant) in out.quants.iter_mut().enumerate() {
                *quant |= (block[16 + at % 32] >> (at / 32) & 1) << 4;
            }
        }
        TensorType::Q6K => {
            let (low, rest) = block.split_at(128);
            let (high, rest) = rest.split_at(64);
            out.d = half_at(208);
            for (scale, &byte) in out.scales.iter_mut().zip(rest) {
                *scale = byte as i8;
            }
            for (at, quant) in out.quants.iter_mut().enumerate() {
                let place = SixBitPlace::of(at);
                *quant = (low[place.low] >> place.low_shift & 0x0f)
                    | (high[place.high] >> place.high_shift & 3) << 4;
            }
        }
    }
    Ok(out)
}

/// Appends the bytes of a block. Bits of an entry beyond its field's width are dropped; a type without blocks (a float)
/// is an error.
pub fn pack(block: &UnpackedBlock, out: &mut Vec<u8>) -> Result<(), BlockError> {
    let quants = &block.quants;
    match block.tensor_type {
        tensor_type @ (TensorType::F32 | TensorType::F16 | TensorType::Bf16) => {
            return Err(BlockError::NotQuantized { tensor_type });
        }
        TensorType::Q8_0 => {
            out.extend(block.d.to_le_bytes());
            out.extend(quants[..32].iter().map(|quant| quant ^ 0x80));
        }
        TensorType::Q4_0 => {
            out.extend(block.d.to_le_bytes());
            push_low_bits(&quants[..32], 16, out);
        }
        TensorType::Q4_1 => {
            out.extend(block.d.to_le_bytes());
            out.extend(block.m.to_le_bytes());
            push_low_bits(&quants[..32], 16, out);
        }
        TensorType::Q5_0 => {
            out.extend(block.d.to_le_bytes());
            out.extend(fifth_bits(&quants[..32]).to_le_bytes());
            push_low_bits(&quants[..32], 16, out);
        }
        TensorType::Q5_1 => {
            out.extend(block.d.to_le_bytes());
            out.extend(block.m.to_le_bytes());
            out.extend(fifth_bits(&quants[..32]).to_le_bytes());
            push_low_bits(&quants[..32], 16, out);
        }
        TensorType::Q4K | TensorType::Q5K => {
            out.extend(block.d.to_le_bytes());
            out.extend(block.m.to_le_bytes());
            out.extend(packed_six_bit_scales(&block.scales, &block.mins));
            if block.tensor_type == TensorType::Q5K {
                for at in 0..32 {
                    out.push(
                        (0..8).fold(0, |byte, group| byte | (quants[32 * group + at] >> 4 & 1) << group),
                    );
                }
            }
            push_low_bits(quants, 32, out);
        }
        TensorType::Q6K => {
            let (mut low, mut high) = ([0u8; 128], [0u8; 64]);
            for (at, quant) in quants.iter().enumerate() {
                let place = SixBitPlace::of(at);
                low[place.low] |= (quant & 0x0f) << place.low_shift;
                high[place.high] |= (quant >> 4 & 3) << place.high_shift;
            }
            out.extend(low);
            out.extend(high);
            out.extend(block.scales.iter().map(|scale| *scale as u8));
            out.extend(block.d.to_le_bytes());
        }
    }
    Ok(())
}

/// Blocks of 32: the low half of byte `i` is value `i`, the high half value `i + 16`.
fn low_bits_of_32(bytes: &[u8], quants: &mut [u8; SUPERBLOCK_LEN]) {
    for (at, byte) in bytes.iter().enumerate() {
        quants[at] = byte & 0x0f;
        quants[at + 16] = byte >> 4;
    }
}

/// Bit `i` of a little-endian 32-bit word is bit 4 of value `i`.
fn fifth_bits_of_32(bytes: &[u8], quants: &mut [u8; SUPERBLOCK_LEN]) {
    for (at, quant) in quants[..32].iter_mut().enumerate() {
        *quant |= (bytes[at / 8] >> (at % 8) & 1) << 4;
    }
}

fn fifth_bits(quants: &[u8]) -> u32 {
    quants.iter().enumerate().fold(0, |word, (at, quant)| word | u32::from(quant >> 4 & 1) << at)
}

/// Blocks of 256: 32 bytes hold 64 values, the first 32 in the low halves and the next 32 in the high ones.
fn low_bits_of_256(bytes: &[u8], quants: &mut [u8; SUPERBLOCK_LEN]) {
    for (bytes, quants) in bytes.chunks_exact(32).zip(quants.chunks_exact_mut(64)) {
        for (at, byte) in bytes.iter().enumerate() {
            quants[at] = byte & 0x0f;
            quants[at + 32] = byte >> 4;
        }
    }
}

/// Pairs each value with the one `distance` after it, runs of `2 · distance` at a time.
fn push_low_bits(quants: &[u8], distance: usize, out: &mut Vec<u8>) {
    for run in quants.chunks_exact(2 * distance) {
        let (low, high) = run.split_at(distance);
        out.extend(low.iter().zip(high).map(|(low, high)| (low & 0x0f) | (high & 0x0f) << 4));
    }
}

/// Eight scales and eight minima of six bits in twelve bytes. The first four of each fill the low six bits of bytes 0–3
/// and 4–7. The last four keep their low half in bytes 8–11 (scale low, minimum high) and their top two bits in the
/// bits that the first four left free.
fn six_bit_scales(bytes: &[u8], scales: &mut [i8; 16], mins: &mut [u8; 8]) {
    for at in 0..4 {
        scales[at] = (bytes[at] & 63) as i8;
        mins[at] = bytes[at + 4] & 63;
        scales[at + 4] = (bytes[at + 8] & 0x0f | bytes[at] >> 6 << 4) as i8;
        mins[at + 4] = bytes[at + 8] >> 4 | bytes[at + 4] >> 6 << 4;
    }
}

fn packed_six_bit_scales(scales: &[i8; 16], mins: &[u8; 8]) -> [u8; 12] {
    let mut bytes = [0; 12];
    for at in 0..4 {
        let (scale, min) = (scales[at + 4] as u8, mins[at + 4]);
        bytes[at] = scales[at] as u8 & 63 | (scale >> 4 & 3) << 6;
        bytes[at + 4] = mins[at] & 63 | (min >> 4 & 3) << 6;
        bytes[at + 8] = scale & 0x0f | (min & 0x0f) << 4;
    }
    bytes
}

/// Where a value of Q6_K keeps its bits. A half of 128 values has 64 bytes of low bits (values 0–63 in the low halves,
/// 64–127 in the high ones) and 32 bytes of high bits (value `32 q + i` in bits `2 q` of byte `i`).
struct SixBitPlace {
    low: usize,
    low_shift: usize,
    high: usize,
    high_shift: usize,
}

impl SixBitPlace {
    fn of(at: usize) -> SixBitPlace {
        let (half, within) = (at / 128, at % 128);
        SixBitPlace {
            low: 64 * half + within % 64,
            low_shift: 4 * (within / 64),
            high: 32 * half + within % 32,
            high_shift: 2 * (within / 32),
        }
    }
}
