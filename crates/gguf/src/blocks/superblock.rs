//! Blocks of 256 values: scales of the groups are themselves integers times one f16.
//!
//! First every group gets the scale that is best for it alone ([`search`](super::search)); the largest fixes the f16;
//! then each group takes the integer scale (and minimum) next to its wish that really loses least, and its values are
//! rounded again with what a reader will compute.

use super::UnpackedBlock;
use super::search::{self, Affine, AffineSearch, nearest};
use crate::types::TensorType;
use half::f16;

const GROUP: usize = 32;
const GROUPS: usize = 8;

/// The largest 6-bit scale or minimum.
const SIX_BITS_MAX: f32 = 63.0;

/// Q4_K and Q5_K.
pub(super) fn with_minima(tensor_type: TensorType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::zero(tensor_type);
    let quant_max = f32::from(tensor_type.quant_max());
    let search = match tensor_type {
        TensorType::Q5K => AffineSearch { quant_max, first: -0.5, guesses: 16 },
        _ => AffineSearch { quant_max, first: -1.0, guesses: 21 },
    };
    let mut weights = [[0f32; GROUP]; GROUPS];
    let mut wishes = [Affine { scale: 0.0, min: 0.0 }; GROUPS];
    for ((group, weights), wish) in values.chunks_exact(GROUP).zip(&mut weights).zip(&mut wishes) {
        // Large values matter more than small ones, but none is worthless: |x| plus the group's root mean square.
        let mean_square = group.iter().map(|value| value * value).sum::<f32>() / GROUP as f32;
        let floor = mean_square.sqrt();
        for (weight, value) in weights.iter_mut().zip(group) {
            *weight = floor + value.abs();
        }
        *wish = search::affine(group, weights, search);
    }
    let d = f16::from_f32(wishes.iter().fold(0f32, |most, wish| most.max(wish.scale)) / SIX_BITS_MAX);
    let m = f16::from_f32(wishes.iter().fold(0f32, |most, wish| most.max(wish.min)) / SIX_BITS_MAX);
    (block.d, block.m) = (d.to_bits(), m.to_bits());
    let (d, m) = (d.to_f32(), m.to_f32());
    for (at, group) in values.chunks_exact(GROUP).enumerate() {
        let (scale, min) = best_codes(group, &weights[at], wishes[at], (d, m), quant_max);
        (block.scales[at], block.mins[at]) = (scale as i8, min as u8);
        let (scale, min) = (d * scale, m * min);
        for (quant, value) in block.quants[GROUP * at..].iter_mut().zip(group) {
            *quant =
                if scale == 0.0 { 0 } else { nearest(((value + min) / scale).clamp(0.0, quant_max)) as u8 };
        }
    }
    block
}

/// The 6-bit scale and minimum, among those next to the wished ones, with the smallest error.
fn best_codes(
    group: &[f32],
    weights: &[f32],
    wish: Affine,
    (d, m): (f32, f32),
    quant_max: f32,
) -> (f32, f32) {
    let around = |wish: f32, unit: f32| {
        let code = if unit == 0.0 { 0.0 } else { nearest((wish / unit).clamp(0.0, SIX_BITS_MAX)) };
        [code, (code - 1.0).max(0.0), (code + 1.0).min(SIX_BITS_MAX)]
    };
    let (scales, mins) = (around(wish.scale, d), around(wish.min, m));
    let mut best = (scales[0], mins[0]);
    let mut best_error = f32::INFINITY;
    for scale in scales {
        for min in mins {
            let fit = Affine { scale: d * scale, min: m * min };
            let error = search::affine_error(group, weights, fit, quant_max);
            if error < best_error {
                (best, best_error) = ((scale, min), error);
            }
        }
    }
    best
}

/// Q6_K.
pub(super) fn symmetric(tensor_type: TensorType, values: &[f32]) -> UnpackedBlock {
    let mut block = UnpackedBlock::zero(tensor_type);
    let zero = f32::from(tensor_type.zero_point());
    let quant_max = zero - 1.0;
    let group_len = tensor_type.scale_group();
    let mut wishes = [0f32; 16];
    for (wish, group) in wishes.iter_mut().zip(values.chunks_exact(group_len)) {
        *wish = search::symmetric(group, quant_max);
    }
    // The scale of largest magnitude becomes −128, of which there is no positive twin.
    let extreme = wishes.iter().fold(0f32, |most, &wish| if wish.abs() > most.abs() { wish } else { most });
    let d = f16::from_f32(extreme / -128.0);
    block.d = d.to_bits();
    let d = d.to_f32();
    if d == 0.0 {
        return block;
    }
    for (at, group) in values.chunks_exact(group_len).enumerate() {
        let code = nearest((wishes[at] / d).clamp(-128.0, 127.0));
        let (mut best, mut best_error) = (code, f32::INFINITY);
        for code in [code, (code - 1.0).max(-128.0), (code + 1.0).min(127.0)] {
            let error = search::symmetric_error(group, d * code, quant_max);
            if error < best_error {
                (best, best_error) = (code, error);
            }
        }
        block.scales[at] = best as i8;
        let scale = d * best;
        for (quant, value) in block.quants[group_len * at..].iter_mut().zip(group) {
            let rounded = if scale == 0.0 { 0.0 } else { nearest((value / scale).clamp(-zero, quant_max)) };
            *quant = (rounded + zero) as u8;
        }
    }
    block
}
