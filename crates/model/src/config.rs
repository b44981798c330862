//! A Hugging Face `config.json`, reduced to what the forward pass needs.
//!
//! Supported: Llama 2/3 (linear and `llama3` RoPE scaling), Qwen2/2.5 (QKV bias), Qwen3 (head norms), Mistral (sliding
//! window); tied or untied heads. Anything that would compute something else is refused with its name.

use crate::gguf;
use ashlar_gguf::GgufFiles;
use ashlar_vocabulary::{
    FloatType, LayerVectors, ModelShape, Precision, Quantization, WeightType, WeightTypes,
};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// Why a model's configuration cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read {path}: {source} (a model directory needs config.json, tokenizer.json and safetensors files)"
    )]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not the JSON it should be.
    #[error("cannot parse {path}: {source}")]
    Parse {
        /// Which file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A GGUF file that cannot be used.
    #[error(transparent)]
    Gguf(ashlar_gguf::GgufError),
    /// The architecture or one of its options is not supported.
    #[error("unsupported model: {0}")]
    Unsupported(String),
    /// Dimensions that contradict each other.
    #[error("inconsistent config.json: {0}")]
    Inconsistent(String),
}

/// Scaling of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// Every frequency divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Each frequency divided by a factor of its own.
    Factors(Vec<f32>),
    /// Llama 3's: low frequencies divided, high ones kept, a smooth band between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original/low` are scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original/high` are kept.
        high_freq_factor: f64,
        /// Context of the original training.
        original_max_position_embeddings: f64,
    },
}

/// Everything the forward pass needs to know about a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Dimensions.
    pub shape: ModelShape,
    /// Architecture name as in the file, for people.
    pub architecture: String,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f32,
    /// RoPE base.
    pub rope_theta: f64,
    /// RoPE scaling.
    pub rope_scaling: RopeScaling,
    /// Keys visible to a query, where limited.
    pub sliding_window: Option<u32>,
    /// First layer that uses the sliding window.
    pub first_window_layer: usize,
}

#[derive(Debug, Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct RawConfig {
    #[serde(default)]
    architectures: Vec<String>,
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    sliding_window: Option<u32>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    #[serde(alias = "dtype")]
    torch_dtype: Option<String>,
    quantization_config: Option<serde_json::Value>,
}

impl ModelConfig {
    /// Reads the configuration of the model in `directory` (or of the GGUF file that it names), to be served in
    /// `precision`.
    pub fn open(directory: &Path, precision: impl Into<Precision>) -> Result<ModelConfig, ConfigError> {
        let precision = precision.into();
        let mut config = match gguf::file_of(directory) {
            Some(file) => ModelConfig::from_gguf(&GgufFiles::open(&file)?)?,
            None => ModelConfig::from_dir(directory)?,
        };
        config.serve_in(precision);
        Ok(config)
    }

    /// Makes it the configuration of the same model served in `precision`.
    pub fn serve_in(&mut self, precision: Precision) {
        if let Some(quantization) = precision.quantization {
            self.shape.weights = self.stored(quantization);
        }
        self.shape.kv_cache = precision.kv_cache;
        self.shape.activations = precision.activations;
    }

    /// The types in which a file of the quantised model has its matrices.
    pub(crate) fn stored(&self, quantization: Quantization) -> WeightTypes {
        let shape = &self.shape;
        let attention = shape.num_heads * shape.head_dim;
        let (hidden, feed_forward) = (shape.hidden_size, shape.intermediate_size);
        quantization.types(shape.num_layers, hidden, attention, feed_forward, shape.tied_head)
    }

    /// Reads `config.json` in `directory`.
    pub fn from_dir(directory: &Path) -> Result<ModelConfig, ConfigError> {
        ModelConfig::from_file(&directory.join("config.json"))
    }

    /// Reads a configuration file.
    pub fn from_file(path: &Path) -> Result<ModelConfig, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let raw = serde_json::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        ModelConfig::from_raw(raw)
    }

    fn from_raw(raw: RawConfig) -> Result<ModelConfig, ConfigError> {
        let family = raw.model_type.as_str();
        if !matches!(family, "llama" | "qwen2" | "qwen3" | "mistral") {
            return Err(ConfigError::Unsupported(format!(
                "model_type `{family}` (llama, qwen2, qwen3 and mistral are)"
            )));
        }
        if let Some(quantization) = &raw.quantization_config {
            let method = quantization.get("quant_method").and_then(|m| m.as_str()).unwrap_or("unknown");
            return Err(ConfigError::Unsupported(format!(
                "weights quantised with `{method}`: use an f32, f16 or bf16 checkpoint"
            )));
        }
        let activation = raw.hidden_act.as_deref().unwrap_or("silu");
        if !matches!(activation, "silu" | "swish") {
            return Err(ConfigError::Unsupported(format!("hidden_act `{activation}` (silu is)")));
        }
        let bias = raw.attention_bias.unwrap_or(false);
        let vectors = LayerVectors {
            qkv_bias: family == "qwen2" || bias,
            output_bias: bias && family != "qwen2",
            feed_forward_bias: raw.mlp_bias.unwrap_or(false),
            head_norms: family == "qwen3",
        };
        let shape = ModelShape { vectors, ..shape_of(&raw)? };
        let rope = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref());
        let uses_window = match family {
            "mistral" => true,
            "qwen2" | "qwen3" => raw.use_sliding_window.unwrap_or(false),
            _ => false,
        };
        Ok(ModelConfig {
            architecture: raw.architectures.first().cloned().unwrap_or_else(|| raw.model_type.clone()),
            rms_norm_eps: raw.rms_norm_eps as f32,
            rope_theta: rope.and_then(|r| r.rope_theta).or(raw.rope_theta).unwrap_or(10_000.0),
            rope_scaling: rope.map_or(Ok(RopeScaling::None), |r| scaling_of(r, &shape))?,
            sliding_window: raw.sliding_window.filter(|_| uses_window),
            first_window_layer: match family {
                "mistral" => 0,
                _ => raw.max_window_layers.unwrap_or(0),
            },
            shape,
        })
    }

    /// The window of layer `layer`, if it has one.
    pub fn window(&self, layer: usize) -> Option<u32> {
        self.sliding_window.filter(|_| layer >= self.first_window_layer)
    }
}

/// Refuses sizes of which no model is: products of any few of those that pass can be counted.
pub(crate) fn check_sizes(sizes: &[(&str, usize, usize)]) -> Result<(), ConfigError> {
    match sizes.iter().find(|(_, value, max)| *value == 0 || value > max) {
        Some((name, value, max)) => {
            Err(ConfigError::Inconsistent(format!("{name} is {value}, expected 1 to {max}")))
        }
        None => Ok(()),
    }
}

fn shape_of(raw: &RawConfig) -> Result<ModelShape, ConfigError> {
    let heads = raw.num_attention_heads;
    let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
    let sizes = [
        ("hidden_size", raw.hidden_size, 1 << 17),
        ("intermediate_size", raw.intermediate_size, 1 << 19),
        ("num_hidden_layers", raw.num_hidden_layers, 4096),
        ("num_attention_heads", heads, 4096),
        ("num_key_value_heads", kv_heads, 4096),
        ("vocab_size", raw.vocab_size, 1 << 24),
        ("max_position_embeddings", raw.max_position_embeddings, 1 << 28),
        ("head_dim", raw.head_dim.unwrap_or(1), 4096),
    ];
    check_sizes(&sizes)?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(ConfigError::Inconsistent(format!(
            "{heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )));
    }
    if raw.head_dim.is_none() && !raw.hidden_size.is_multiple_of(heads) {
        return Err(ConfigError::Inconsistent(format!(
            "hidden_size {} is not a multiple of {heads} heads",
            raw.hidden_size
        )));
    }
    let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / heads);
    if !head_dim.is_multiple_of(2) {
        return Err(ConfigError::Inconsistent(format!(
            "head_dim {head_dim} is odd; rotary embedding pairs elements"
        )));
    }
    Ok(ModelShape {
        hidden_size: raw.hidden_size,
        intermediate_size: raw.intermediate_size,
        num_layers: raw.num_hidden_layers,
        num_heads: heads,
        num_kv_heads: kv_heads,
        head_dim,
        vocab_size: raw.vocab_size,
        max_position_embeddings: raw.max_position_embeddings,
        tied_head: raw.tie_word_embeddings.unwrap_or(false),
        // What the files hold; a matrix of another type than this says is converted.
        weights: WeightTypes::uniform(
            match raw.torch_dtype.as_deref() {
                Some("float16") => WeightType::F16,
                Some("bfloat16") => WeightType::Bf16,
                _ => WeightType::F32,
            },
            raw.num_hidden_layers,
        ),
        kv_cache: FloatType::default(),
        activations: FloatType::default(),
        vectors: LayerVectors::default(),
    })
}

fn scaling_of(rope: &RawRope, shape: &ModelShape) -> Result<RopeScaling, ConfigError> {
    let missing = |name: &str| ConfigError::Inconsistent(format!("rope scaling lacks `{name}`"));
    match rope.rope_type.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear { factor: rope.factor.ok_or_else(|| missing("factor"))? }),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: rope.factor.ok_or_else(|| missing("factor"))?,
            low_freq_factor: rope.low_freq_factor.ok_or_else(|| missing("low_freq_factor"))?,
            high_freq_factor: rope.high_freq_factor.ok_or_else(|| missing("high_freq_factor"))?,
            original_max_position_embeddings: rope
                .original_max_position_embeddings
                .unwrap_or(shape.max_position_embeddings as f64),
        }),
        Some(other) => {
            Err(ConfigError::Unsupported(format!("rope scaling `{other}` (linear and llama3 are)")))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_whose_products_cannot_be_counted_are_refused() {
        let heads = |size| check_sizes(&[("head_dim", size, 4096)]);
        assert!(
            heads(4096).is_ok() && heads(4097).is_err() && heads(0).is_err() && heads(usize::MAX).is_err()
        );
    }

    fn parse(extra: &str) -> Result<ModelConfig, ConfigError> {
        let base = r#""hidden_size":64,"intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":8,
            "vocab_size":100,"max_position_embeddings":64,"rms_norm_eps":1e-5"#;
        ModelConfig::from_raw(serde_json::from_str(&format!("{{{base},{extra}}}")).unwrap())
    }

    #[test]
    fn an_unknown_architecture_is_refused_by_name() {
        let error = parse(r#""model_type":"gpt2""#).unwrap_err().to_string();
        assert!(error.contains("gpt2"), "{error}");
    }

    #[test]
    fn both_spellings_of_rope_parameters_are_read() {
        let old =
            parse(r#""model_type":"llama","rope_theta":5.0,"rope_scaling":{"type":"linear","factor":2.0}"#)
                .unwrap();
        let new = parse(
            r#""model_type":"llama","rope_parameters":{"rope_theta":5.0,"rope_type":"linear","factor":2.0}"#,
        )
        .unwrap();
        assert_eq!(old, new);
        assert_eq!(old.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn a_qwen_window_needs_its_switch_and_starts_at_its_layer() {
        let off = parse(r#""model_type":"qwen2","sliding_window":8"#).unwrap();
        assert_eq!(off.window(1), None);
        let on = parse(
            r#""model_type":"qwen2","sliding_window":8,"use_sliding_window":true,"max_window_layers":1"#,
        )
        .unwrap();
        assert_eq!((on.window(0), on.window(1)), (None, Some(8)));
    }

    #[test]
    fn heads_that_do_not_divide_are_refused() {
        assert!(parse(r#""model_type":"llama","num_key_value_heads":3"#).is_err());
    }
}
