//! Values to blocks: the checks that all types share, and the types with blocks of 32.
//!
//! The latter follow ggml's reference exactly, so that files agree byte for byte with those of other writers. The scale
//! is computed in f32, integers are chosen with it, and only then is it rounded to f16.

use super::superblock;
use super::{BlockError, UnpackedBlock, pack};
use crate::types::TensorType;
use half::{bf16, f16};

/// Larger magnitudes exceed every type's f16 scale (the widest is 65504 · 127 · 32), and squares of smaller ones stay
/// far from f32's end.
const MAGNITUDE_MAX: f32 = 1e9;

/// Appends `values` as blocks. Floats are rounded to the nearest, ties to even, whatever they are (f16 overflows to
/// infinity); quantized types demand finite values whose scale fits an f16, and append nothing otherwise.
pub fn quantize(tensor_type: TensorType, values: &[f32], out: &mut Vec<u8>) -> Result<(), BlockError> {
    let block_len = tensor_type.block_len();
    if !values.len().is_multiple_of(block_len) {
        return Err(BlockError::Values { tensor_type, values: values.len() });
    }
    out.reserve(values.len() / block_len * tensor_type.block_bytes());
    let encode: fn(TensorType, &[f32]) -> UnpackedBlock = match tensor_type {
        TensorType::F32 => {
            out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            return Ok(());
        }
        TensorType::F16 => {
            out.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()));
            return Ok(());
        }
        TensorType::Bf16 => {
            out.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
            return Ok(());
        }
        TensorType::Q8_0 => q8_0,
        TensorType::Q4_0 | TensorType::Q5_0 => symmetric,
        TensorType::Q4_1 | TensorType::Q5_1 => with_minimum,
        TensorType::Q4K | TensorType::Q5K => superblock::with_minima,
        TensorType::Q6K => superblock::symmetric,
    };
    let start = out.len();
    for (number, block) in values.chunks_exact(block_len).enumerate() {
        let index = number * block_len;
        let appended = encode_block(tensor_type, index, block, encode).and_then(|block| pack(&block, out));
        if appended.is_err() {
            out.truncate(start);
            return appended;
        }
    }
    Ok(())
}

fn encode_block(
    tensor_type: TensorType,
    index: usize,
    values: &[f32],
    encode: fn(TensorType, &[f32]) -> UnpackedBlock,
) -> Result<UnpackedBlock, BlockError> {
    for (at, &value) in values.iter().enumerate() {
        if !value.is_finite() {
            return Err(BlockError::NotFinite { tensor_type, index: index + at, value });
        }
        if value.abs() > MAGNITUDE_MAX {
            return Err(BlockError::TooLarge { tensor_type, index });
        }
    }
    let block = encode(tensor_type, values);
    if f16::from_bits(block.d).is_finite() && f16::from_bits(block.m).is_finite() {
        Ok(block)
    } else {
        Err(BlockError::TooLarge { tensor_type, index })
    }
}

/// One divided by `scale`, or 0 where everything is zero.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The nearest integer, halves away from zero, as `f32::round` has it, which is a function call where SSE4.1 is not assumed.
fn nearest_away(value: f32) -> i8 {
    // The largest number below a half: with a half itself, the number just below it would round up.
    (value + 0.499_999_97_f32.copysign(value)) as i8
}

/// Q8_0: the largest magnitude becomes 127; halves round away from zero.
fn q8_0(tensor_type: TensorType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::zero(tensor_type);
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / 127.0;
    let inverse = inverse(scale);
    block.d = f16::from_f32(scale).to_bits();
    for (quant, value) in block.quants.iter_mut().zip(values) {
        *quant = nearest_away(value * inverse).cast_unsigned() ^ 0x80;
    }
    block
}

/// Q4_0 and Q5_0: the value of largest magnitude, with its sign, becomes the most negative integer, which exists once
/// more than the most positive.
fn symmetric(tensor_type: TensorType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::zero(tensor_type);
    let zero = f32::from(tensor_type.zero_point());
    let extreme =
        values.iter().fold(0f32, |most, &value| if value.abs() > most.abs() { value } else { most });
    let scale = extreme / -zero;
    let inverse = inverse(scale);
    block.d = f16::from_f32(scale).to_bits();
    for (quant, value) in block.quants.iter_mut().zip(values) {
        *quant = ((value * inverse + (zero + 0.5)) as u8).min(tensor_type.quant_max());
    }
    block
}

/// Q4_1 and Q5_1: smallest and largest value become the smallest and largest integer.
fn with_minimum(tensor_type: TensorType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::zero(tensor_type);
    let smallest = values.iter().copied().fold(f32::MAX, f32::min);
    let largest = values.iter().copied().fold(f32::MIN, f32::max);
    let scale = (largest - smallest) / f32::from(tensor_type.quant_max());
    let inverse = inverse(scale);
    block.d = f16::from_f32(scale).to_bits();
    block.m = f16::from_f32(smallest).to_bits();
    for (quant, value) in block.quants.iter_mut().zip(values) {
        *quant = (((value - smallest) * inverse + 0.5) as u8).min(tensor_type.quant_max());
    }
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_away_from_zero_and_their_neighbours_to_the_nearest() {
        for half in -260..=260 {
            let value = half as f32 / 2.0;
            for value in [value, value.next_up(), value.next_down()] {
                assert_eq!(nearest_away(value), value.round() as i8, "{value}");
            }
        }
        for bits in (0..u32::MAX).step_by(9973) {
            let value = f32::from_bits(bits);
            assert_eq!(nearest_away(value), value.round() as i8, "{value}");
        }
    }
}
