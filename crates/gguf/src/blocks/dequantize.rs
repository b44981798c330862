//! Blocks to f32, type by type, straight from the bytes.
//!
//! Written on its own rather than over [`super::unpack`], so that a test can hold one against the other.

use super::BlockError;
use crate::types::TensorType;
use half::{bf16, f16};

/// Decodes `bytes` into `out`, whose length says how many values there are. Every f16 scale widens exactly; operations
/// round to f32 one by one.
pub fn dequantize(tensor_type: TensorType, bytes: &[u8], out: &mut [f32]) -> Result<(), BlockError> {
    let block_len = tensor_type.block_len();
    if !out.len().is_multiple_of(block_len) {
        return Err(BlockError::Values { tensor_type, values: out.len() });
    }
    let blocks = out.len() / block_len;
    if blocks.checked_mul(tensor_type.block_bytes()) != Some(bytes.len()) {
        return Err(BlockError::Bytes { tensor_type, bytes: bytes.len(), blocks });
    }
    let decode: fn(&[u8], &mut [f32]) = match tensor_type {
        TensorType::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        TensorType::F16 => |b, y| y[0] = half_at(b, 0),
        TensorType::Bf16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        TensorType::Q8_0 => q8_0,
        TensorType::Q4_0 => |b, y| of_32(half_at(b, 0), 8, None, None, &b[2..], y),
        TensorType::Q4_1 => |b, y| of_32(half_at(b, 0), 0, Some(half_at(b, 2)), None, &b[4..], y),
        TensorType::Q5_0 => |b, y| of_32(half_at(b, 0), 16, None, Some(&b[2..6]), &b[6..], y),
        TensorType::Q5_1 => |b, y| of_32(half_at(b, 0), 0, Some(half_at(b, 2)), Some(&b[4..8]), &b[8..], y),
        TensorType::Q4K => |b, y| with_minima(b, None, &b[16..], y),
        TensorType::Q5K => |b, y| with_minima(b, Some(&b[16..48]), &b[48..], y),
        TensorType::Q6K => q6_k,
    };
    for (block, values) in bytes.chunks_exact(tensor_type.block_bytes()).zip(out.chunks_exact_mut(block_len))
    {
        decode(block, values);
    }
    Ok(())
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (value, &byte) in out.iter_mut().zip(&block[2..]) {
        *value = f32::from(byte as i8) * d;
    }
}

fn of_32(d: f32, zero: i32, min: Option<f32>, fifth: Option<&[u8]>, nibbles: &[u8], out: &mut [f32]) {
    let fifth = fifth.map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    for (at, value) in out.iter_mut().enumerate() {
        let nibble = if at < 16 { nibbles[at] & 0x0f } else { nibbles[at - 16] >> 4 };
        let quant = i32::from(nibble) + ((fifth >> at & 1) << 4) as i32;
        let product = (quant - zero) as f32 * d;
        *value = min.map_or(product, |min| product + min);
    }
}

/// Q4_K and Q5_K: four runs of 64 values, each with two scales and two minima.
fn with_minima(block: &[u8], fifth: Option<&[u8]>, nibbles: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    for (group, values) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_min) = six_bit_pair(&block[4..16], group);
        let (d, min) = (d * f32::from(group_scale), min * f32::from(group_min));
        let bytes = &nibbles[32 * (group / 2)..];
        for (at, value) in values.iter_mut().enumerate() {
            let nibble = if group % 2 == 0 { bytes[at] & 0x0f } else { bytes[at] >> 4 };
            let fifth = fifth.map_or(0, |bits| (bits[at] >> group & 1) << 4);
            *value = d * f32::from(nibble + fifth) - min;
        }
    }
}

/// Scale and minimum of a group of 32 out of their twelve bytes.
fn six_bit_pair(bytes: &[u8], group: usize) -> (u8, u8) {
    if group < 4 {
        return (bytes[group] & 0x3f, bytes[group + 4] & 0x3f);
    }
    let (low, above) = (bytes[group + 4], [bytes[group - 4] >> 6, bytes[group] >> 6]);
    ((low & 0x0f) + 16 * above[0], (low >> 4) + 16 * above[1])
}

/// Q6_K: two halves of 128 values; four values share a byte of high bits.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 208);
    for (half, values) in out.chunks_exact_mut(128).enumerate() {
        let low = &block[64 * half..64 * half + 64];
        let high = &block[128 + 32 * half..160 + 32 * half];
        let scales = &block[192 + 8 * half..200 + 8 * half];
        for at in 0..32 {
            let quants = [
                (low[at] & 0x0f) | (high[at] & 3) << 4,
                (low[at + 32] & 0x0f) | (high[at] >> 2 & 3) << 4,
                (low[at] >> 4) | (high[at] >> 4 & 3) << 4,
                (low[at + 32] >> 4) | (high[at] >> 6) << 4,
            ];
            for (quarter, quant) in quants.into_iter().enumerate() {
                let scale = scales[2 * quarter + at / 16] as i8;
                values[32 * quarter + at] = d * f32::from(scale) * (f32::from(quant) - 32.0);
            }
        }
    }
}
