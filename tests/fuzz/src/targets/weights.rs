//! Files of models.

use super::{InputFile, LARGE, SMALL, subject, texts, words};
use crate::mutate::{Corpus, Seed};
use crate::{Memory, Subject, Target};
use anyhow::{Context, Result};
use ashlar_gguf::metadata::{Array, Value};
use ashlar_gguf::{GgufFiles, GgufHeader, GgufWriter, TensorType};
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::digest::model_digest;
use ashlar_model::partial::{header_needed, read_present};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{CachePlace, ModelConfig, PackedCopy, RankSlice, StageModel, WeightFiles};
use ashlar_tokenizer::{GgufVocabulary, Tokenizer};
use ashlar_vocabulary::{FloatType, Precision, Quantization};
use serde_json::json;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub(super) const SAFETENSORS: Target = Target {
    name: "safetensors",
    about: "a model's weights: header, shapes, rows",
    memory: SMALL,
    open: safetensors,
};

pub(super) const INDEX: Target =
    Target { name: "weight-index", about: "model.safetensors.index.json", memory: SMALL, open: index };

pub(super) const GGUF: Target = Target {
    name: "gguf",
    about: "a GGUF file: header, tensors, configuration, vocabulary",
    memory: LARGE,
    open: gguf,
};

pub(super) const MODEL_CONFIG: Target =
    Target { name: "model-config", about: "config.json of a model", memory: SMALL, open: model_config };

pub(super) const PRESENT: Target =
    Target { name: "present", about: "the journal beside a sparse file", memory: SMALL, open: present };

pub(super) const PACKED_COPY: Target = Target {
    name: "packed-copy",
    about: "the packed copy of a rank's weights",
    memory: Memory { fixed: 16 << 20, per_byte: 64 },
    open: packed_copy,
};

/// A file of safetensors with this header, and zeros as data.
pub(super) fn safetensors_file(header: &str, data: usize) -> Seed {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    Seed { bytes, json: vec![8..8 + header.len(); 1] }
}

/// Where the JSON object that begins at `start` ends.
pub(super) fn object_end(bytes: &[u8], start: usize) -> Option<usize> {
    let mut values =
        serde_json::Deserializer::from_slice(bytes.get(start..)?).into_iter::<serde::de::IgnoredAny>();
    values.next()?.ok()?;
    Some(start + values.byte_offset())
}

/// The header's length, as its JSON says.
fn repair_safetensors(bytes: &mut [u8]) {
    if let Some(end) = object_end(bytes, 8) {
        bytes[..8].copy_from_slice(&(end as u64 - 8).to_le_bytes());
    }
}

fn safetensors(directory: &Path) -> Result<Subject> {
    let tensor = |dtype: &str, shape: &[usize], offsets: Range<usize>| json!({"dtype": dtype, "shape": shape, "data_offsets": [offsets.start, offsets.end]});
    let small = json!({"__metadata__": {"format": "pt"}, "a": tensor("F32", &[2, 4], 0..32), "b": tensor("BF16", &[8], 32..48), "c": tensor("F16", &[2, 2, 2], 48..64)});
    let empty = json!({"a": tensor("U8", &[0, 9], 0..0), "b": tensor("I64", &[], 0..8)});
    let seeds = vec![
        safetensors_file(&small.to_string(), 64),
        safetensors_file(&empty.to_string(), 8),
        safetensors_file("{}", 0),
    ];
    let own = words(
        "F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL F8_E4M3 F8_E5M2 F4 F6_E2M3 C64 U64 __metadata__ dtype shape data_offsets 18446744073709551615 18446744073709551607 9223372036854775808 4611686018427387904 [0,0]",
    );
    let corpus = Corpus { seeds, words: own, repair: Some(repair_safetensors), ..Corpus::default() };
    let file = InputFile::new(directory, "model.safetensors")?;
    let directory = directory.to_owned();
    Ok(subject(corpus, move |input| {
        file.put(input);
        let mut have = 0;
        while let Ok(Some(more)) = header_needed(&file.path, have) {
            assert!(more > have, "a header that asks for {more} bytes where {have} are there");
            have = more;
        }
        let Ok(files) = WeightFiles::open(&directory) else { return false };
        read_all(&files);
        true
    }))
}

/// Reads a row of each tensor.
fn read_all(files: &WeightFiles) {
    for (name, shape, _) in files.list() {
        let Ok(reader) = files.tensor(name, shape) else { continue };
        let columns = reader.columns().min(4096);
        let _ = reader.read_bytes(0..1, 0..columns);
    }
}

fn index(directory: &Path) -> Result<Subject> {
    let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    std::fs::write(directory.join("x.safetensors"), safetensors_file(header, 8).bytes)?;
    let seeds = [
        json!({"metadata": {"total_size": 8}, "weight_map": {"a": "x.safetensors"}}).to_string(),
        json!({"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}}).to_string(),
    ];
    let own = "weight_map metadata total_size x.safetensors .. / ../x.safetensors /dev/zero .hidden ./x.safetensors x.safetensors/.. progress";
    let corpus = texts(seeds.map(Seed::json), own);
    let file = InputFile::new(directory, "model.safetensors.index.json")?;
    let directory = directory.to_owned();
    Ok(subject(corpus, move |input| {
        file.put(input);
        WeightFiles::open(&directory).is_ok()
    }))
}

/// A whole model of two layers in a GGUF file, with a vocabulary.
fn gguf_file(architecture: &str, vocabulary: &GgufVocabulary, kind: TensorType) -> Result<Vec<u8>> {
    let mut header = GgufHeader::new();
    let key = |name: &str| format!("{architecture}.{name}");
    header.metadata("general.architecture", &Value::from(architecture))?;
    let sizes = [
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 32),
        ("context_length", 64),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 16),
    ];
    for (name, size) in sizes {
        header.metadata(&key(name), &Value::U32(size))?;
    }
    header.metadata(&key("attention.layer_norm_rms_epsilon"), &Value::F32(1e-5))?;
    header.metadata(&key("rope.freq_base"), &Value::F64(1e4))?;
    header.metadata("ashlar.rope.llama3", &Value::Array(Array::F64(vec![8.0, 1.0, 4.0, 64.0])))?;
    for (name, value) in vocabulary.to_metadata() {
        header.metadata(name, &value)?;
    }
    let vocabulary = vocabulary.tokens.len().max(1) as u64;
    let matrices = [
        ("token_embd", vocabulary),
        ("blk.0.attn_q", 32),
        ("blk.0.attn_k", 16),
        ("blk.0.attn_v", 16),
        ("blk.0.attn_output", 32),
        ("blk.0.ffn_gate", 32),
        ("blk.0.ffn_up", 32),
        ("blk.0.ffn_down", 32),
    ];
    for (name, rows) in matrices {
        header.tensor(&format!("{name}.weight"), kind, &[32, rows])?;
    }
    header.tensor("output_norm.weight", TensorType::F32, &[32])?;
    let mut writer = GgufWriter::new(Vec::new(), &header)?;
    let names = matrices.iter().map(|(name, _)| format!("{name}.weight"));
    for name in names.chain(["output_norm.weight".to_owned()]) {
        writer.tensor(&name, |tensor| {
            let zeros = vec![0; tensor.bytes_left() as usize];
            tensor.write(&zeros)
        })?;
    }
    Ok(writer.finish()?)
}

fn gguf(directory: &Path) -> Result<Subject> {
    let by_scores = GgufVocabulary {
        model: "llama".into(),
        tokens: ["<unk>", "<s>", "</s>", "▁", "a", "▁a", "b", "<0x0A>"].map(String::from).to_vec(),
        scores: Some((0..8u8).map(|score| -f32::from(score)).collect()),
        token_types: Some(vec![2, 3, 3, 1, 1, 1, 1, 6]),
        bos: Some(1),
        eos: Some(2),
        unknown: Some(0),
        chat_template: Some("{% for m in messages %}{{ m.content }}{% endfor %}".into()),
        ..GgufVocabulary::default()
    };
    let by_merges = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("qwen2".into()),
        tokens: ["a", "b", "ab", "Ġ", "Ġa", "<|end|>"].map(String::from).to_vec(),
        token_types: Some(vec![1, 1, 1, 1, 1, 3]),
        merges: Some(["a b", "Ġ a"].map(String::from).to_vec()),
        eos: Some(5),
        ..GgufVocabulary::default()
    };
    let seeds = vec![
        Seed::from(gguf_file("llama", &by_scores, TensorType::Q8_0)?),
        Seed::from(gguf_file("qwen2", &by_merges, TensorType::F32)?),
        Seed::from(gguf_file("qwen3", &by_merges, TensorType::Q4_0)?),
    ];
    let own = words(
        "GGUF general.architecture general.alignment split.count split.no split.tensors.count llama qwen2 qwen3 rope_freqs.weight tokenizer.ggml.tokens tokenizer.ggml.merges tokenizer.huggingface.json llama.attention.key_length llama.rope.dimension_count llama.attention.value_length llama.expert_count llama.attention.sliding_window_pattern",
    );
    let file = InputFile::new(directory, "model.gguf")?;
    Ok(subject(Corpus { seeds, words: own, ..Corpus::default() }, move |input| {
        file.put(input);
        let _ = header_needed(&file.path, input.len() as u64);
        let Ok(files) = GgufFiles::open(&file.path) else { return false };
        for info in files.tensors() {
            if let Ok(reader) = files.tensor(&info.name)
                && info.columns() <= 4096
            {
                let _ = reader.dequantize_rows(0..1);
            }
        }
        for precision in precisions() {
            let _ = ModelConfig::open(&file.path, precision);
        }
        let vocabulary = GgufVocabulary::from_metadata(files.metadata());
        let Ok(tokenizer) = vocabulary.map_err(drop).and_then(|own| Tokenizer::from_gguf(own).map_err(drop))
        else {
            return false;
        };
        super::text::use_tokenizer(&tokenizer);
        true
    }))
}

/// Every precision that changes what is computed of a configuration.
fn precisions() -> impl Iterator<Item = Precision> {
    let types = [None, Some("q8_0"), Some("q4_k_m"), Some("q5_k_m")];
    types.into_iter().map(|name| {
        let quantization: Option<Quantization> = name.and_then(|name| name.parse().ok());
        Precision { quantization, ..Precision::default() }
    })
}

pub(super) const MODEL_SHAPE: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":32,"intermediate_size":32,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,"head_dim":16,"vocab_size":32,"max_position_embeddings":64,"rms_norm_eps":1e-5,"rope_theta":10000.0,"tie_word_embeddings":true}"#;

fn model_config(directory: &Path) -> Result<Subject> {
    let llama3 = r#"{"model_type":"llama","hidden_size":4096,"intermediate_size":14336,"num_hidden_layers":32,"num_attention_heads":32,"num_key_value_heads":8,"vocab_size":128256,"max_position_embeddings":131072,"rms_norm_eps":1e-5,"rope_theta":500000.0,"rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192},"torch_dtype":"bfloat16","hidden_act":"silu"}"#;
    let qwen = r#"{"model_type":"qwen3","hidden_size":1024,"intermediate_size":3072,"num_hidden_layers":28,"num_attention_heads":16,"num_key_value_heads":8,"head_dim":128,"vocab_size":151936,"max_position_embeddings":40960,"rms_norm_eps":1e-6,"use_sliding_window":true,"sliding_window":4096,"max_window_layers":28,"attention_bias":false,"mlp_bias":false}"#;
    let own = "llama qwen2 qwen3 mistral silu linear default llama3 rope_parameters rope_type type dtype float16 quantization_config 4097 131073 4096 16777216 268435456 0";
    let corpus = texts([MODEL_SHAPE, llama3, qwen].map(Seed::json), own);
    let file = InputFile::new(directory, "config.json")?;
    let directory = directory.to_owned();
    Ok(subject(corpus, move |input| {
        file.put(input);
        let mut good = true;
        for precision in precisions() {
            let Ok(config) = ModelConfig::open(&directory, precision) else { return false };
            // What is reckoned from it before any weight is read.
            good &= RankSlice::whole(&config.shape).problem(&config.shape).is_none();
        }
        good
    }))
}

fn present(directory: &Path) -> Result<Subject> {
    let seeds = [
        "ashlar ranges 1\nend 0\n",
        "ashlar ranges 1\n0 8\n16 1024\nend 2\n",
        "ashlar ranges 1\n0 18446744073709551615\nend 1\n",
    ];
    let corpus = texts(seeds, "18446744073709551615 18446744073709551614 end 0 1 9223372036854775808");
    let model = directory.join("model.safetensors");
    let file = InputFile::new(directory, "model.safetensors.present")?;
    Ok(subject(corpus, move |input| {
        file.put(input);
        let Ok(Some(ranges)) = read_present(&model) else { return false };
        let _ = (ranges.bytes(), ranges.covers(&(3..u64::MAX)), ranges.count());
        true
    }))
}

fn packed_copy(directory: &Path) -> Result<Subject> {
    let model = directory.join("model");
    let shape = directory.join("shape.json");
    std::fs::write(&shape, MODEL_SHAPE)?;
    let shape = shape.to_string_lossy().into_owned();
    let request = SynthRequest { shape, dtype: FloatType::F32, seed: 1, tokenizer: None };
    synthesize(&model, &request, &mut |_, _| {}).context("a model")?;
    let config = ModelConfig::open(&model, None::<Quantization>)?;
    let slice = RankSlice::whole(&config.shape);
    let digest = model_digest(&model, None)?;
    let copy =
        PackedCopy::new(&CachePlace::BesideModel, &model, &digest, None::<Quantization>, slice.clone());
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    let stage = StageModel::load(&model, None::<Quantization>, slice, kernels.clone(), &mut |_, _| {})?;
    copy.write(&stage, &|| false)?;
    let bytes = std::fs::read(copy.path())?;
    let manifest_at = u64::from_le_bytes(bytes[32..40].try_into()?) as usize;
    let seed = Seed { json: vec![manifest_at..bytes.len(); 1], bytes };
    let own = words("name kind n k exponent offset bytes checksum F32 Bf16 4096 128 18446744073709551615");
    let corpus = Corpus { seeds: vec![seed], words: own, repair: Some(repair_copy), ..Corpus::default() };
    let file = InputFile::new(
        &directory.join("model/.ashlar"),
        &copy.path().file_name().unwrap_or_default().to_string_lossy(),
    )?;
    Ok(subject(corpus, move |input| {
        file.put(input);
        copy.load(&kernels, &mut |_, _| {}).is_ok()
    }))
}

/// The length and the manifest's checksum, wherever it begins.
fn repair_copy(bytes: &mut [u8]) {
    if bytes.len() < 128 {
        return;
    }
    let length = bytes.len() as u64;
    bytes[24..32].copy_from_slice(&length.to_le_bytes());
    let mut at = [0; 8];
    at.copy_from_slice(&bytes[32..40]);
    if let Some(manifest) = usize::try_from(u64::from_le_bytes(at)).ok().and_then(|at| bytes.get(at..)) {
        let checksum = *blake3::hash(manifest).as_bytes();
        bytes[96..128].copy_from_slice(&checksum);
    }
}
