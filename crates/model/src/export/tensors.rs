//! Which tensors a file has: their names, their order and their types.

use crate::config::{ModelConfig, RopeScaling};
use crate::gguf;
use crate::pack::weight_type;
use crate::stage::inverse_frequencies;
use crate::synth::tensor_list;
use ashlar_gguf::GgufFiles;
use ashlar_kernels::inv_freq;
use ashlar_vocabulary::{Bytes, WeightType, WeightTypes};

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Planned {
    /// Its name in the file.
    pub(super) name: String,
    /// Outermost axis first.
    pub(super) shape: Vec<usize>,
    /// Its type in the file.
    pub(super) kind: WeightType,
    pub(super) origin: Origin,
}

/// What a tensor is made of.
#[derive(Debug)]
pub(super) enum Origin {
    /// A tensor of safetensors files, whose heads of this size are to be interleaved.
    Checkpoint { name: String, interleaved: Option<usize> },
    /// The tensor of the same name in a GGUF file, in the same order of rows.
    Gguf,
    /// Numbers that follow from the configuration.
    Values(Vec<f32>),
}

impl Planned {
    pub(super) fn weights(&self) -> usize {
        self.shape.iter().product()
    }

    pub(super) fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    pub(super) fn is_matrix(&self) -> bool {
        self.shape.len() > 1
    }

    pub(super) fn bytes(&self) -> Bytes {
        Bytes(self.kind.bytes(self.weights()) as u64)
    }
}

/// The type of the matrix that GGUF files call `name`; `None` for vectors and what no model has.
fn matrix_type(types: &WeightTypes, name: &str) -> Option<WeightType> {
    match name {
        "token_embd.weight" => return Some(types.embedding),
        "output.weight" => return Some(types.head),
        _ => {}
    }
    let (layer, stem) = name.strip_prefix("blk.")?.strip_suffix(".weight")?.split_once('.')?;
    let layer = types.layers.get(layer.parse::<usize>().ok()?)?;
    match stem {
        "attn_q" => Some(layer.query),
        "attn_k" => Some(layer.key),
        "attn_v" => Some(layer.value),
        "attn_output" => Some(layer.output),
        "ffn_gate" => Some(layer.gate),
        "ffn_up" => Some(layer.up),
        "ffn_down" => Some(layer.down),
        _ => None,
    }
}

/// The tensors of a checkpoint, in the order in which llama.cpp's converter has them: by the name in the checkpoint, what
/// belongs to no layer first (the last norm excepted).
pub(super) fn of_checkpoint(config: &ModelConfig, types: &WeightTypes) -> Vec<Planned> {
    let interleaved = (gguf::architecture_of(config) == "llama").then_some(config.shape.head_dim);
    let mut list = tensor_list(config);
    list.sort_by_cached_key(|(name, ..)| place(name));
    let factors = rope_factors(config).map(|factors| Planned {
        name: "rope_freqs.weight".into(),
        shape: vec![factors.len()],
        kind: WeightType::F32,
        origin: Origin::Values(factors),
    });
    let stored = list.into_iter().map(|(stored, shape, _)| {
        let name = gguf::name_of(&stored);
        let rotated = stored.contains(".q_proj.") || stored.contains(".k_proj.");
        Planned {
            kind: matrix_type(types, &name).unwrap_or(WeightType::F32),
            name,
            shape,
            origin: Origin::Checkpoint { name: stored, interleaved: interleaved.filter(|_| rotated) },
        }
    });
    factors.into_iter().chain(stored).collect()
}

/// Sorts by name, but layers by number.
fn place(name: &str) -> (u8, usize, String) {
    match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => (1, layer.parse().unwrap_or(usize::MAX), rest.to_owned()),
        None if name == "model.norm.weight" => (2, 0, name.to_owned()),
        None => (0, 0, name.to_owned()),
    }
}

/// The tensors of a GGUF file in its order. What is no matrix of the model stays as it is.
pub(super) fn of_gguf(files: &GgufFiles, types: &WeightTypes) -> Vec<Planned> {
    let tensors = files.tensors().iter().map(|tensor| Planned {
        kind: matrix_type(types, &tensor.name).unwrap_or(weight_type(tensor.tensor_type)),
        name: tensor.name.clone(),
        shape: tensor.shape(),
        origin: Origin::Gguf,
    });
    tensors.collect()
}

/// What each frequency is divided by, where that differs from frequency to frequency.
fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    if !matches!(config.rope_scaling, RopeScaling::Llama3 { .. } | RopeScaling::Factors(_)) {
        return None;
    }
    let plain = inv_freq(config.rope_theta, config.shape.head_dim);
    let scaled = inverse_frequencies(config);
    Some(plain.iter().zip(&scaled).map(|(&plain, &scaled)| divisor(plain, scaled)).collect())
}

/// A number by which `plain` divided is `scaled`, or next to it: there is not always one.
fn divisor(plain: f32, scaled: f32) -> f32 {
    let near = plain / scaled;
    let candidates = [near, near.next_up(), near.next_down(), near.next_up().next_up()];
    candidates.into_iter().find(|divisor| plain / divisor == scaled).unwrap_or(near)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_ordered_by_name_and_layers_by_number() {
        let mut names = [
            "model.norm.weight",
            "model.layers.10.mlp.up_proj.weight",
            "model.layers.2.self_attn.q_proj.weight",
            "model.layers.2.self_attn.q_proj.bias",
            "model.embed_tokens.weight",
            "lm_head.weight",
        ];
        names.sort_by_cached_key(|name| place(name));
        assert_eq!(names[0], "lm_head.weight");
        assert_eq!(names[2], "model.layers.2.self_attn.q_proj.bias");
        assert_eq!(names[4], "model.layers.10.mlp.up_proj.weight");
        assert_eq!(names[5], "model.norm.weight");
    }

    #[test]
    fn dividing_by_the_divisor_gives_the_scaled_frequency_or_its_neighbour() {
        for (plain, scaled) in [(0.0123f32, 0.0123f32), (0.37, 0.37 / 8.0)] {
            assert_eq!(plain / divisor(plain, scaled), scaled);
        }
        for step in 1..1000u16 {
            let (plain, scaled) = (0.05f32, 0.05 / (1.0 + 7.0 * f32::from(step) / 1000.0));
            let found = plain / divisor(plain, scaled);
            assert!(found.to_bits().abs_diff(scaled.to_bits()) <= 1, "{found} instead of {scaled}");
        }
    }
}
