//! What a configuration says, under the keys of GGUF files.

use crate::config::{ModelConfig, RopeScaling};
use crate::gguf::{LLAMA3_KEY, architecture_of};
use ashlar_gguf::{Array, Metadata, Value};
use ashlar_vocabulary::{Quantization, WeightType};

/// Keys that are written anew, because they speak of types.
const REPLACED: [&str; 2] = ["general.file_type", "general.quantization_version"];

/// Families of keys that are no longer true: the file is whole, and quantised by other means.
const DROPPED: [&str; 2] = ["split.", "quantize.imatrix."];

/// The version of the block formats.
const QUANTIZATION_VERSION: u32 = 2;

/// The keys of a GGUF file that stay true when its tensors change their types.
pub(super) fn kept(metadata: &Metadata) -> impl Iterator<Item = (&str, &Value)> {
    metadata
        .iter()
        .filter(|(key, _)| !REPLACED.contains(key) && !DROPPED.iter().any(|family| key.starts_with(family)))
}

/// The keys that say which types a file has.
pub(super) fn of_quantization(quantization: Quantization) -> [(&'static str, Value); 2] {
    [(REPLACED[0], Value::U32(file_type(quantization))), (REPLACED[1], Value::U32(QUANTIZATION_VERSION))]
}

/// llama.cpp's number for a quantisation (`llama_ftype`).
fn file_type(quantization: Quantization) -> u32 {
    match quantization {
        Quantization::Type(WeightType::F32) => 0,
        Quantization::Type(WeightType::F16) => 1,
        Quantization::Type(WeightType::Q4_0) => 2,
        Quantization::Type(WeightType::Q4_1) => 3,
        Quantization::Type(WeightType::Q8_0) => 7,
        Quantization::Type(WeightType::Q5_0) => 8,
        Quantization::Type(WeightType::Q5_1) => 9,
        Quantization::Type(WeightType::Q4K) | Quantization::Q4KS => 14,
        Quantization::Q4KM => 15,
        Quantization::Type(WeightType::Q5K) => 16,
        Quantization::Q5KM => 17,
        Quantization::Type(WeightType::Q6K) => 18,
        Quantization::Type(WeightType::Bf16) => 32,
    }
}

/// Everything but the types, the name and the tokenizer.
pub(super) fn of_config(config: &ModelConfig) -> Vec<(String, Value)> {
    let shape = &config.shape;
    let architecture = architecture_of(config);
    // Sizes were checked when the configuration was read and fit 32 bits.
    let size = |size: usize| Value::U32(u32::try_from(size).unwrap_or(u32::MAX));
    let mut own = vec![
        ("block_count", size(shape.num_layers)),
        ("context_length", size(shape.max_position_embeddings)),
        ("embedding_length", size(shape.hidden_size)),
        ("feed_forward_length", size(shape.intermediate_size)),
        ("attention.head_count", size(shape.num_heads)),
        ("attention.head_count_kv", size(shape.num_kv_heads)),
        ("attention.key_length", size(shape.head_dim)),
        ("attention.value_length", size(shape.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps)),
        ("rope.dimension_count", size(shape.head_dim)),
        ("rope.freq_base", Value::F32(config.rope_theta as f32)),
        ("vocab_size", size(shape.vocab_size)),
    ];
    if let Some(window) = window(config) {
        own.push(("attention.sliding_window", Value::U32(window)));
        if config.first_window_layer > 0 {
            let windowed = (0..shape.num_layers).map(|layer| config.window(layer).is_some()).collect();
            own.push(("attention.sliding_window_pattern", Value::Array(Array::Bool(windowed))));
        }
    }
    if let RopeScaling::Linear { factor } = config.rope_scaling {
        own.push(("rope.scaling.type", "linear".into()));
        own.push(("rope.scaling.factor", Value::F32(factor as f32)));
    }
    let mut all = vec![
        ("general.architecture".to_owned(), architecture.into()),
        ("general.type".to_owned(), "model".into()),
    ];
    all.extend(own.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)));
    if let &RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    } = &config.rope_scaling
    {
        let parameters = vec![factor, low_freq_factor, high_freq_factor, original_max_position_embeddings];
        all.push((LLAMA3_KEY.to_owned(), Value::Array(Array::F64(parameters))));
    }
    all
}

/// The window, if any layer has one.
fn window(config: &ModelConfig) -> Option<u32> {
    config.sliding_window.filter(|_| config.first_window_layer < config.shape.num_layers)
}

/// What a file cannot say exactly, or llama.cpp does not obey.
pub(super) fn notes(config: &ModelConfig) -> Vec<String> {
    let architecture = architecture_of(config);
    let mut notes = Vec::new();
    if let Some(window) = window(config).filter(|&w| (w as usize) < config.shape.max_position_embeddings) {
        notes.push(format!(
            "llama.cpp knows no window in `{architecture}`: past {window} tokens it attends to more than the model does"
        ));
    }
    if architecture != "llama" {
        if config.shape.vectors.output_bias || config.shape.vectors.feed_forward_bias {
            notes.push(format!(
                "llama.cpp knows no biases of projections back to the residual stream in `{architecture}`: it will \
                 refuse the file"
            ));
        }
        if matches!(config.rope_scaling, RopeScaling::Llama3 { .. } | RopeScaling::Factors(_)) {
            notes.push(format!(
                "llama.cpp knows no scaling of single frequencies in `{architecture}`: it will refuse the file"
            ));
        }
    }
    let scaling = match config.rope_scaling {
        RopeScaling::Linear { factor } => factor,
        _ => 1.0,
    };
    if [config.rope_theta, scaling].iter().any(|&number| f64::from(number as f32) != number) {
        notes.push(
            "the base or scale of the rotation is rounded to f32, which changes its angles a little".into(),
        );
    }
    notes
}
