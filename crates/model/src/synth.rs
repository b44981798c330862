//! Random-weight models of a real shape, so that speed and fit are measured without a download.

use crate::config::{ConfigError, ModelConfig};
use ashlar_vocabulary::{Bytes, FloatType};
use half::{bf16, f16};
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Largest weight file written; larger models get an index of shards.
const SHARD_BYTES_MAX: u64 = 4 << 30;

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// No such shape.
    #[error("unknown shape `{0}`: choose one of {1}, or give the path of a config.json")]
    UnknownShape(String, String),
    /// The given configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Writing failed.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The shapes known by name.
pub const SHAPES: [&str; 5] = ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b", "mistral-7b"];

/// The `config.json` of a named shape.
pub fn named_config(name: &str) -> Option<Value> {
    let llama3_scaling = |factor: f64| {
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192})
    };
    // (family, hidden, ffn, layers, heads, kv heads, head dim, vocabulary, context, theta, eps, tied)
    let (family, dims, rope_theta, eps, tied) = match name {
        "llama-3.2-1b" => ("llama", [2048, 8192, 16, 32, 8, 64, 128_256, 131_072], 500_000.0, 1e-5, true),
        "llama-3.1-8b" => ("llama", [4096, 14_336, 32, 32, 8, 128, 128_256, 131_072], 500_000.0, 1e-5, false),
        "qwen2.5-0.5b" => ("qwen2", [896, 4864, 24, 14, 2, 64, 151_936, 32_768], 1_000_000.0, 1e-6, true),
        "qwen3-0.6b" => ("qwen3", [1024, 3072, 28, 16, 8, 128, 151_936, 40_960], 1_000_000.0, 1e-6, true),
        "mistral-7b" => ("mistral", [4096, 14_336, 32, 32, 8, 128, 32_768, 32_768], 1_000_000.0, 1e-5, false),
        _ => return None,
    };
    let architecture = match family {
        "llama" => "LlamaForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        "qwen3" => "Qwen3ForCausalLM",
        _ => "MistralForCausalLM",
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": family, "hidden_act": "silu",
        "hidden_size": dims[0], "intermediate_size": dims[1], "num_hidden_layers": dims[2],
        "num_attention_heads": dims[3], "num_key_value_heads": dims[4], "head_dim": dims[5],
        "vocab_size": dims[6], "max_position_embeddings": dims[7], "rope_theta": rope_theta,
        "rms_norm_eps": eps, "tie_word_embeddings": tied, "sliding_window": null,
    });
    match name {
        "llama-3.2-1b" => config["rope_scaling"] = llama3_scaling(32.0),
        "llama-3.1-8b" => config["rope_scaling"] = llama3_scaling(8.0),
        _ => {}
    }
    Some(config)
}

/// What to write.
#[derive(Debug, Clone)]
pub struct SynthRequest {
    /// A name of [`SHAPES`], or the path of a `config.json`.
    pub shape: String,
    /// Element type of the files.
    pub dtype: FloatType,
    /// Seed of the weights.
    pub seed: u64,
    /// A `tokenizer.json` to copy; else a byte-level one is made.
    pub tokenizer: Option<PathBuf>,
}

/// Writes a model into `directory` (created). `progress` hears (bytes written, bytes in all).
pub fn synthesize(
    directory: &Path,
    request: &SynthRequest,
    progress: &mut dyn FnMut(Bytes, Bytes),
) -> Result<ModelConfig, SynthError> {
    let mut json = match named_config(&request.shape) {
        Some(config) => config,
        None => read_config(&request.shape)?,
    };
    json["torch_dtype"] = json!(match request.dtype {
        FloatType::F32 => "float32",
        FloatType::F16 => "float16",
        FloatType::Bf16 => "bfloat16",
    });
    json["bos_token_id"] = json!(256);
    json["eos_token_id"] = json!(257);
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.join(name);
        fs::write(&path, bytes).map_err(|source| SynthError::Write { path, source })
    };
    fs::create_dir_all(directory)
        .map_err(|source| SynthError::Write { path: directory.to_owned(), source })?;
    write("config.json", pretty(&json).as_bytes())?;
    let config = ModelConfig::from_dir(directory)?;
    write("generation_config.json", pretty(&json!({"bos_token_id": 256, "eos_token_id": 257})).as_bytes())?;
    match &request.tokenizer {
        Some(path) => {
            fs::copy(path, directory.join("tokenizer.json"))
                .map_err(|source| SynthError::Write { path: path.clone(), source })?;
            let beside = path.with_file_name("tokenizer_config.json");
            if beside.is_file() {
                fs::copy(&beside, directory.join("tokenizer_config.json"))
                    .map_err(|source| SynthError::Write { path: beside, source })?;
            }
        }
        None => {
            write("tokenizer.json", byte_level_tokenizer(config.shape.vocab_size).to_string().as_bytes())?;
            write("tokenizer_config.json", pretty(&tokenizer_config()).as_bytes())?;
        }
    }
    write_weights(directory, &config, request, progress)?;
    Ok(config)
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn read_config(path: &str) -> Result<Value, SynthError> {
    if !Path::new(path).is_file() {
        return Err(SynthError::UnknownShape(path.to_owned(), SHAPES.join(", ")));
    }
    let text = fs::read_to_string(path)
        .map_err(|source| SynthError::Config(ConfigError::Read { path: path.into(), source }))?;
    serde_json::from_str(&text)
        .map_err(|source| SynthError::Config(ConfigError::Parse { path: path.into(), source }))
}

/// Name, shape and standard deviation of every tensor of a configuration; deviation 0 means all ones (norms).
pub fn tensor_list(config: &ModelConfig) -> Vec<(String, Vec<usize>, f32)> {
    let s = &config.shape;
    let (h, q, kv, ff) =
        (s.hidden_size, s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.intermediate_size);
    let spread = |inputs: usize| 1.0 / (inputs as f32).sqrt();
    let mut list = vec![("model.embed_tokens.weight".to_owned(), vec![s.vocab_size, h], 1.0)];
    for layer in 0..s.num_layers {
        let mut add = |suffix: &str, shape: Vec<usize>, deviation: f32| {
            list.push((format!("model.layers.{layer}.{suffix}"), shape, deviation));
        };
        add("input_layernorm.weight", vec![h], 0.0);
        add("self_attn.q_proj.weight", vec![q, h], spread(h));
        add("self_attn.k_proj.weight", vec![kv, h], spread(h));
        add("self_attn.v_proj.weight", vec![kv, h], spread(h));
        if config.shape.vectors.qkv_bias {
            add("self_attn.q_proj.bias", vec![q], 0.1);
            add("self_attn.k_proj.bias", vec![kv], 0.1);
            add("self_attn.v_proj.bias", vec![kv], 0.1);
        }
        if config.shape.vectors.head_norms {
            add("self_attn.q_norm.weight", vec![s.head_dim], 0.0);
            add("self_attn.k_norm.weight", vec![s.head_dim], 0.0);
        }
        add("self_attn.o_proj.weight", vec![h, q], spread(q));
        if config.shape.vectors.output_bias {
            add("self_attn.o_proj.bias", vec![h], 0.1);
        }
        add("post_attention_layernorm.weight", vec![h], 0.0);
        add("mlp.gate_proj.weight", vec![ff, h], spread(h));
        add("mlp.up_proj.weight", vec![ff, h], spread(h));
        add("mlp.down_proj.weight", vec![h, ff], spread(ff));
        if config.shape.vectors.feed_forward_bias {
            add("mlp.gate_proj.bias", vec![ff], 0.1);
            add("mlp.up_proj.bias", vec![ff], 0.1);
            add("mlp.down_proj.bias", vec![h], 0.1);
        }
    }
    list.push(("model.norm.weight".into(), vec![h], 0.0));
    if !s.tied_head {
        list.push(("lm_head.weight".into(), vec![s.vocab_size, h], spread(h)));
    }
    list
}

fn write_weights(
    directory: &Path,
    config: &ModelConfig,
    request: &SynthRequest,
    progress: &mut dyn FnMut(Bytes, Bytes),
) -> Result<(), SynthError> {
    let width = request.dtype.bytes();
    let bytes_of = |shape: &[usize]| (shape.iter().product::<usize>() * width) as u64;
    let tensors = tensor_list(config);
    let total: u64 = tensors.iter().map(|(_, shape, _)| bytes_of(shape)).sum();
    let mut shards: Vec<Vec<&(String, Vec<usize>, f32)>> = vec![Vec::new()];
    let mut shard_bytes = 0;
    for tensor in &tensors {
        let bytes = bytes_of(&tensor.1);
        if shard_bytes > 0 && shard_bytes + bytes > SHARD_BYTES_MAX {
            shards.push(Vec::new());
            shard_bytes = 0;
        }
        shard_bytes += bytes;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    let mut weight_map = Map::new();
    let mut written = 0;
    for (index, shard) in shards.iter().enumerate() {
        let name = match shards.len() {
            1 => "model.safetensors".to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let path = directory.join(&name);
        write_shard(&path, shard, request, &mut |bytes| {
            written += bytes;
            progress(Bytes(written), Bytes(total));
        })
        .map_err(|source| SynthError::Write { path, source })?;
        weight_map.extend(shard.iter().map(|(tensor, _, _)| (tensor.clone(), json!(name))));
    }
    if shards.len() > 1 {
        let path = directory.join("model.safetensors.index.json");
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        fs::write(&path, pretty(&index)).map_err(|source| SynthError::Write { path, source })?;
    }
    Ok(())
}

fn write_shard(
    path: &Path,
    tensors: &[&(String, Vec<usize>, f32)],
    request: &SynthRequest,
    written: &mut dyn FnMut(u64),
) -> io::Result<()> {
    let width = request.dtype.bytes();
    let name = match request.dtype {
        FloatType::F32 => "F32",
        FloatType::F16 => "F16",
        FloatType::Bf16 => "BF16",
    };
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut offset = 0;
    for (tensor, shape, _) in tensors {
        let end = offset + shape.iter().product::<usize>() * width;
        header.insert(tensor.clone(), json!({"dtype": name, "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    const CHUNK: usize = 1 << 18;
    let mut bytes = Vec::with_capacity(CHUNK * width);
    for (tensor, shape, deviation) in tensors {
        let stream = Weights::new(request.seed, tensor);
        let count: usize = shape.iter().product();
        for start in (0..count).step_by(CHUNK) {
            bytes.clear();
            for index in start..(start + CHUNK).min(count) {
                let value = if *deviation == 0.0 { 1.0 } else { stream.uniform(index as u64) * deviation };
                match request.dtype {
                    FloatType::F32 => bytes.extend(value.to_le_bytes()),
                    FloatType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                    FloatType::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                }
            }
            file.write_all(&bytes)?;
            written(bytes.len() as u64);
        }
    }
    file.into_inner().map_err(|error| error.into_error())?.sync_all()
}

/// Counter-based weights: a value depends on seed, tensor name and index alone.
struct Weights(u64);

impl Weights {
    fn new(seed: u64, tensor: &str) -> Weights {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(tensor.as_bytes());
        let digest = hasher.finalize();
        let mut key = [0u8; 8];
        key.copy_from_slice(&digest.as_bytes()[..8]);
        Weights(u64::from_le_bytes(key))
    }

    /// Uniform with deviation 1: ±√3.
    fn uniform(&self, index: u64) -> f32 {
        // SplitMix64's finaliser over a Weyl sequence.
        let mut z = self.0.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        let unit = (z >> 40) as f32 / (1u64 << 24) as f32;
        (2.0 * unit - 1.0) * 1.732_050_8
    }
}

/// Names of the tokens after the 256 bytes.
const SPECIALS: [&str; 5] = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"];

fn tokenizer_config() -> Value {
    json!({
        "bos_token": SPECIALS[0], "eos_token": SPECIALS[1],
        "chat_template": "{{ bos_token }}{% for m in messages %}<|{{ m.role if m.role in ['user', 'assistant', 'system'] \
            else 'user' }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    })
}

/// A byte-level tokenizer without merges: 256 bytes, five specials, then words that no text encodes to, so that every id
/// of the vocabulary decodes to something.
fn byte_level_tokenizer(vocab_size: usize) -> Value {
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        vocab.insert(byte_character(byte).to_string(), json!(byte));
    }
    let mut added = Vec::new();
    for (index, name) in SPECIALS.iter().enumerate() {
        // Also here: an added token that the vocabulary lacks is numbered after its last.
        vocab.insert((*name).to_owned(), json!(256 + index));
        added.push(json!({"id": 256 + index, "content": name, "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}));
    }
    for id in 256 + SPECIALS.len()..vocab_size {
        let mut word = String::from("Ġ");
        let mut rest = id;
        while rest > 0 {
            word.push(char::from(b'a' + (rest % 26) as u8));
            rest /= 26;
        }
        vocab.insert(word, json!(id));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []},
    })
}

/// GPT-2's printable stand-in for a byte.
fn byte_character(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + rank).unwrap_or('?')
}
