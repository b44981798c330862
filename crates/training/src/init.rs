//! What an adapter starts from: A uniform as PyTorch's `kaiming_uniform_(a=√5)` makes it, B zero.

use ashlar_model::RankSlice;
use ashlar_model::adapter::{AdapterWeights, LoraPair, LoraSpec, Target};
use ashlar_vocabulary::ModelShape;
use ashlar_vocabulary::random::{Purpose, random_bits};
use std::convert::Infallible;

/// A rank's share of the adapter that `seed` gives. Every number is a function of the seed and of its place in the whole
/// model: layer, target, row and column of A.
pub fn initial_adapter(spec: &LoraSpec, shape: &ModelShape, slice: &RankSlice, seed: u64) -> AdapterWeights {
    let whole = |layer: usize, target: Target| {
        let (outputs, inputs) = target.dimensions(shape);
        // Uniform in ±1/√inputs.
        let bound = 1.0 / (inputs as f64).sqrt();
        let stream = (layer * Target::ALL.len() + target as usize) as u32;
        let number = |index: usize| {
            let bits = random_bits(seed, Purpose::Initial, [index as u32, stream]);
            let uniform = (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64);
            ((2.0 * uniform - 1.0) * bound) as f32
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
