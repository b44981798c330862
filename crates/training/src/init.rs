//! What training starts from. Every number is a function of the seed and of its place in the whole model.

use ashlar_kernels::math;
use ashlar_model::adapter::{AdapterWeights, LoraPair, LoraSpec, Target};
use ashlar_model::tensors::{LayerTensor, TensorShare};
use ashlar_model::{RankSlice, TensorId, TensorLayout, Tensors};
use ashlar_vocabulary::ModelShape;
use ashlar_vocabulary::random::{Purpose, philox, random_bits};
use std::convert::Infallible;
use std::f64::consts::TAU;
use std::sync::Arc;

/// A rank's share of the adapter that `seed` gives: A uniform as PyTorch's `kaiming_uniform_(a=√5)` makes it, B zero. The place of
/// a number is its layer, target, row and column of A.
pub fn initial_adapter(spec: &LoraSpec, shape: &ModelShape, slice: &RankSlice, seed: u64) -> AdapterWeights {
    let whole = |layer: usize, target: Target| {
        let (outputs, inputs) = target.dimensions(shape);
        // Uniform in ±1/√inputs.
        let bound = 1.0 / (inputs as f64).sqrt();
        let stream = (layer * Target::ALL.len() + target as usize) as u32;
        let number = |index: usize| {
            let bits = random_bits(seed, Purpose::Initial, [index as u32, stream]);
            ((2.0 * unit(bits) - 1.0) * bound) as f32
        };
        Ok::<_, Infallible>(LoraPair {
            a: (0..spec.rank * inputs).map(number).collect(),
            b: vec![0.0; outputs * spec.rank],
        })
    };
    match AdapterWeights::cut(spec, shape, slice, whole) {
        Ok(weights) => weights,
        Err(never) => match never {},
    }
}

/// Standard deviation of a matrix, as most families of models have it (`initializer_range`).
const DEVIATION: f64 = 0.02;

/// A rank's share of the model that `seed` gives, of `layers` layers: matrices are normal with deviation 0.02, those back to the
/// residual stream with 0.02/√(2·layers) as in GPT-2 (Radford et al. 2019, section 2.3), weights of norms are 1, biases 0.
pub fn initial_model(layout: &Arc<TensorLayout>, layers: usize, seed: u64) -> Tensors {
    let numbers = |share: &TensorShare| {
        Ok::<_, Infallible>(match share.id {
            _ if !share.is_vector => {
                let back = 1.0 / ((2 * layers) as f64).sqrt();
                let deviation = if is_back(share.id) { DEVIATION * back } else { DEVIATION };
                normals(share, deviation, seed)
            }
            TensorId::Layer(_, LayerTensor::Bias(_)) => vec![0.0; share.numbers()],
            _ => vec![1.0; share.numbers()],
        })
    };
    match Tensors::build(layout, numbers) {
        Ok(tensors) => tensors,
        Err(never) => match never {},
    }
}

/// Whether a matrix leads back to the residual stream.
fn is_back(id: TensorId) -> bool {
    matches!(id, TensorId::Layer(_, LayerTensor::Weight(target)) if target.is_row_parallel())
}

/// Philox with the counter (column, row, purpose, tensor): four words are two uniform numbers, which make a normal one by Box
/// and Muller's formula. The table is tensor 0, the head 1, a layer's linears have eight each from 8 on; a tied head is the table.
fn normals(share: &TensorShare, deviation: f64, seed: u64) -> Vec<f32> {
    let tensor = match share.id {
        TensorId::Head if !share.is_copy => 1,
        TensorId::Layer(layer, LayerTensor::Weight(target)) => 8 * (layer as u32 + 1) + target as u32,
        _ => 0,
    };
    let key = [seed as u32, (seed >> 32) as u32];
    let mut numbers = Vec::with_capacity(share.numbers());
    for row in share.rows.clone() {
        numbers.extend(share.columns.clone().map(|column| {
            let counter = [column as u32, row as u32, Purpose::InitialModel as u32, tensor];
            let [a, b, c, d] = philox(counter, key);
            let (first, second) = (u64::from(b) << 32 | u64::from(a), u64::from(d) << 32 | u64::from(c));
            // In (0, 1], of which there is a logarithm.
            let radius = (-2.0 * math::log(1.0 - unit(first))).sqrt();
            let (_, cos) = math::sin_cos(TAU * unit(second));
            (deviation * (radius * cos)) as f32
        }));
    }
    numbers
}

/// A number in [0, 1) of 53 bits.
fn unit(bits: u64) -> f64 {
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}
