//! Models in GGUF files: their configuration, and how their tensors are named and ordered.
//!
//! Architectures `llama` (also Mistral), `qwen2` and `qwen3`. Files of `llama` keep the two halves of each rotated head
//! interleaved; everything here speaks of the order that Hugging Face's files have, so rows are mapped while they are read.

use crate::config::{ConfigError, ModelConfig, RopeScaling, check_sizes};
use crate::pack::weight_type;
use ashlar_gguf::{Array, GgufError, GgufFiles, Value};
use ashlar_vocabulary::{FloatType, LayerVectors, LayerWeightTypes, ModelShape, WeightType, WeightTypes};
use std::path::{Path, PathBuf};

/// The GGUF file that `path` means: the file itself, or the only one (the first of a split set) in a directory without a
/// `config.json`.
pub fn file_of(path: &Path) -> Option<PathBuf> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension == "gguf");
    if path.is_file() {
        return is_gguf(path).then(|| path.to_owned());
    }
    if path.join("config.json").exists() {
        return None;
    }
    let mut files: Vec<PathBuf> = std::fs::read_dir(path)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|p| is_gguf(p))
        .collect();
    files.sort();
    let first = files.first()?.clone();
    let first_of_split = first.to_string_lossy().contains("-00001-of-");
    (files.len() == 1 || first_of_split).then_some(first)
}

/// The name in GGUF files of a tensor that Hugging Face's files call `name`.
pub(crate) fn name_of(name: &str) -> String {
    let (layer, rest) = match name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        Some((layer, rest)) => (Some(layer), rest),
        None => (None, name),
    };
    let (stem, suffix) = rest.rsplit_once('.').unwrap_or((rest, ""));
    let stem = match stem {
        "model.embed_tokens" => "token_embd",
        "model.norm" => "output_norm",
        "lm_head" => "output",
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => other,
    };
    match layer {
        Some(layer) => format!("blk.{layer}.{stem}.{suffix}"),
        None => format!("{stem}.{suffix}"),
    }
}

/// The size of the heads whose rows are interleaved in the tensor `name` of these files, if they are.
pub(crate) fn interleaved(files: &GgufFiles, name: &str) -> Option<usize> {
    let architecture: &str = files.metadata().get("general.architecture").ok()??;
    let rotated = name.contains(".q_proj.") || name.contains(".k_proj.");
    (architecture == "llama" && rotated).then(|| head_dim(files)).flatten()
}

fn head_dim(files: &GgufFiles) -> Option<usize> {
    let number = |key: &str| files.metadata().get::<u64>(&format!("llama.{key}")).ok()?;
    let split = || Some(number("embedding_length")? / number("attention.head_count")?.max(1));
    number("attention.key_length").or_else(split).map(|size| size as usize)
}

/// The architecture's name in GGUF files. Mistral is a `llama` with a window, and so is every model without head norms
/// but Qwen2, whose heads are not interleaved.
pub(crate) fn architecture_of(config: &ModelConfig) -> &'static str {
    if config.shape.vectors.head_norms {
        "qwen3"
    } else if config.architecture.to_ascii_lowercase().starts_with("qwen2") {
        "qwen2"
    } else {
        "llama"
    }
}

/// The parameters of `llama3` scaling, a key of ours: factor, low and high frequency factor, original context. Others
/// divide by the factors in `rope_freqs.weight`, and not every f32 frequency is a quotient of f32 numbers.
pub(crate) const LLAMA3_KEY: &str = "ashlar.rope.llama3";

/// The tensor with divisors of rotary frequencies, where there is one: a part of the configuration.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Where row `row` of heads of size `head_dim`, first halves before second ones, lies in an interleaved tensor.
pub(crate) fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, within) = (row / head_dim * head_dim, row % head_dim);
    let half = head_dim / 2;
    head + if within < half { 2 * within } else { 2 * (within - half) + 1 }
}

impl From<GgufError> for ConfigError {
    fn from(error: GgufError) -> ConfigError {
        ConfigError::Gguf(error)
    }
}

impl ModelConfig {
    /// The configuration in the metadata of GGUF files.
    pub fn from_gguf(files: &GgufFiles) -> Result<ModelConfig, ConfigError> {
        let metadata = files.metadata();
        let architecture: &str = metadata.require("general.architecture")?;
        if !["llama", "qwen2", "qwen3"].contains(&architecture) {
            return Err(ConfigError::Unsupported(format!(
                "GGUF architecture `{architecture}` (llama, qwen2 and qwen3 are)"
            )));
        }
        let key = |name: &str| format!("{architecture}.{name}");
        let size = |name: &str| -> Result<usize, ConfigError> {
            let value: u64 = metadata.require(&key(name))?;
            match usize::try_from(value) {
                Ok(size) if size > 0 && size <= 1 << 32 => Ok(size),
                _ => Err(ConfigError::Inconsistent(format!("`{}` is {value}", key(name)))),
            }
        };
        let optional = |name: &str| -> Result<Option<usize>, ConfigError> {
            Ok(metadata.get::<u64>(&key(name))?.map(|value| value as usize))
        };
        if optional("expert_count")?.is_some_and(|experts| experts > 0) {
            return Err(ConfigError::Unsupported("a mixture of experts".into()));
        }
        let (hidden, heads, layers) =
            (size("embedding_length")?, size("attention.head_count")?, size("block_count")?);
        let kv_heads = optional("attention.head_count_kv")?.unwrap_or(heads);
        let head_dim = optional("attention.key_length")?;
        let divides = head_dim.is_some() || hidden.is_multiple_of(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) || !divides {
            return Err(ConfigError::Inconsistent(format!(
                "{heads} heads, {kv_heads} key/value heads and an embedding of {hidden} do not divide"
            )));
        }
        let head_dim = head_dim.unwrap_or(hidden / heads);
        let rotated = optional("rope.dimension_count")?.unwrap_or(head_dim);
        let values = optional("attention.value_length")?.unwrap_or(head_dim);
        if head_dim == 0 || head_dim % 2 == 1 || rotated != head_dim || values != head_dim {
            return Err(ConfigError::Unsupported(format!(
                "heads of {head_dim} with {rotated} rotated elements and values of {values}"
            )));
        }
        if layers > MAX_LAYERS {
            return Err(ConfigError::Inconsistent(format!("{layers} layers")));
        }
        let (feed_forward, context) = (size("feed_forward_length")?, size("context_length")?);
        check_sizes(&[
            ("embedding_length", hidden, 1 << 17),
            ("attention.head_count", heads, 4096),
            ("attention.key_length", head_dim, 4096),
            ("feed_forward_length", feed_forward, 1 << 19),
            ("context_length", context, 1 << 28),
        ])?;
        let embedding = files.tensor("token_embd.weight")?.info();
        let has = |name: &str| files.has(name);
        let tied_head = !has("output.weight");
        let shape = ModelShape {
            hidden_size: hidden,
            intermediate_size: feed_forward,
            num_layers: layers,
            num_heads: heads,
            num_kv_heads: kv_heads,
            head_dim,
            vocab_size: embedding.rows(),
            max_position_embeddings: context,
            tied_head,
            weights: types(files, layers, tied_head)?,
            kv_cache: FloatType::default(),
            activations: FloatType::default(),
            vectors: LayerVectors {
                qkv_bias: has("blk.0.attn_q.bias"),
                output_bias: has("blk.0.attn_output.bias"),
                feed_forward_bias: has("blk.0.ffn_gate.bias"),
                head_norms: has("blk.0.attn_q_norm.weight"),
            },
        };
        Ok(ModelConfig {
            rope_scaling: rope_scaling(files, architecture, head_dim)?,
            architecture: architecture.to_owned(),
            rms_norm_eps: metadata.require(&key("attention.layer_norm_rms_epsilon"))?,
            rope_theta: metadata.get::<f64>(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            sliding_window: optional("attention.sliding_window")?.filter(|&w| w > 0).map(|w| w as u32),
            first_window_layer: first_window_layer(files, &key("attention.sliding_window_pattern"))?,
            shape,
        })
    }
}

/// More than any model has; a corrupt count must not become memory.
const MAX_LAYERS: usize = 4096;

/// The types of all matrices as they are stored.
fn types(files: &GgufFiles, layers: usize, tied_head: bool) -> Result<WeightTypes, ConfigError> {
    let kind = |name: &str| -> Result<WeightType, ConfigError> {
        Ok(weight_type(files.tensor(name)?.info().tensor_type))
    };
    let layer = |index: usize| -> Result<LayerWeightTypes, ConfigError> {
        let kind = |name: &str| kind(&format!("blk.{index}.{name}.weight"));
        Ok(LayerWeightTypes {
            query: kind("attn_q")?,
            key: kind("attn_k")?,
            value: kind("attn_v")?,
            output: kind("attn_output")?,
            gate: kind("ffn_gate")?,
            up: kind("ffn_up")?,
            down: kind("ffn_down")?,
        })
    };
    let embedding = kind("token_embd.weight")?;
    Ok(WeightTypes {
        embedding,
        head: if tied_head { embedding } else { kind("output.weight")? },
        layers: (0..layers).map(layer).collect::<Result<_, _>>()?,
    })
}

/// From which layer on the window applies: a pattern may say so for each.
fn first_window_layer(files: &GgufFiles, key: &str) -> Result<usize, ConfigError> {
    let Some(Value::Array(Array::Bool(windowed))) = files.metadata().value(key) else { return Ok(0) };
    let first = windowed.iter().position(|&windowed| windowed).unwrap_or(windowed.len());
    if windowed[first..].contains(&false) {
        return Err(ConfigError::Unsupported("layers with and without a window take turns".into()));
    }
    Ok(first)
}

fn rope_scaling(files: &GgufFiles, architecture: &str, head_dim: usize) -> Result<RopeScaling, ConfigError> {
    if let Some(parameters) = files.metadata().get::<&[f64]>(LLAMA3_KEY)? {
        let valid = parameters.iter().all(|parameter| parameter.is_finite() && *parameter > 0.0);
        return match *parameters {
            [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings] if valid => {
                Ok(RopeScaling::Llama3 {
                    factor,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings,
                })
            }
            _ => Err(ConfigError::Inconsistent(format!("`{LLAMA3_KEY}` is not four positive numbers"))),
        };
    }
    if files.has(ROPE_FACTORS) {
        let factors = files.tensor(ROPE_FACTORS)?.dequantize_rows(0..1)?;
        if factors.len() != head_dim / 2 || !factors.iter().all(|factor| factor.is_finite() && *factor > 0.0)
        {
            return Err(ConfigError::Inconsistent("rope_freqs.weight does not fit the heads".into()));
        }
        return Ok(RopeScaling::Factors(factors));
    }
    let metadata = files.metadata();
    let kind: Option<&str> = metadata.get(&format!("{architecture}.rope.scaling.type"))?;
    let factor = metadata.get::<f64>(&format!("{architecture}.rope.scaling.factor"))?;
    match (kind, factor) {
        (None | Some("none"), _) | (Some("linear"), None) => Ok(RopeScaling::None),
        (Some("linear"), Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some(other), _) => {
            Err(ConfigError::Unsupported(format!("rope scaling `{other}` (linear and llama3's are)")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_rows_are_those_of_the_file_format() {
        assert_eq!(name_of("model.layers.12.self_attn.q_proj.weight"), "blk.12.attn_q.weight");
        assert_eq!(name_of("model.layers.0.mlp.down_proj.bias"), "blk.0.ffn_down.bias");
        assert_eq!(
            (name_of("lm_head.weight"), name_of("model.norm.weight")),
            ("output.weight".into(), "output_norm.weight".into())
        );
        let rows: Vec<_> = (0..16).map(|row| interleaved_row(row, 8)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    }
}
