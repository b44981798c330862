//! Logits and greedy continuations against Hugging Face Transformers (goldens in `goldens/`, made by `generate.py`), and
//! against candle-transformers in process.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use common::{Grid, goldens, relative_error};
use serde::Deserialize;

/// What the issue of parity demands of f32: max|Δ| / max|logit|.
const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    input_ids: Vec<Vec<u32>>,
    shape: Vec<usize>,
    logits: String,
    greedy: Vec<u32>,
}

fn check(name: &str) {
    let directory = goldens().join(name);
    let text = std::fs::read_to_string(directory.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let prompt = &golden.input_ids[0];
    let expected = decode_base64_f32(&golden.logits);
    assert_eq!(expected.len(), golden.shape.iter().product::<usize>());
    let (greedy, logits) = Grid::whole(&directory).greedy(prompt, golden.greedy.len());
    let found: Vec<f32> = logits[..prompt.len()].concat();
    assert_eq!(found.len(), expected.len(), "{name}: logits of every prompt position");
    let error = relative_error(&found, &expected);
    assert!(error <= TOLERANCE, "{name}: max|Δ|/max|logit| = {error:e}");
    assert_eq!(greedy, golden.greedy, "{name}: greedy continuation");
}

/// Standard alphabet, padding optional.
fn decode_base64_f32(text: &str) -> Vec<f32> {
    let mut bytes = Vec::new();
    let (mut buffer, mut filled) = (0u32, 0);
    for symbol in text.bytes().filter(|&b| b != b'=') {
        let value = match symbol {
            b'A'..=b'Z' => symbol - b'A',
            b'a'..=b'z' => symbol - b'a' + 26,
            b'0'..=b'9' => symbol - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            other => panic!("not base64: {other}"),
        };
        buffer = buffer << 6 | u32::from(value);
        filled += 6;
        if filled >= 8 {
            filled -= 8;
            bytes.push((buffer >> filled) as u8);
            buffer &= (1 << filled) - 1;
        }
    }
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

macro_rules! parity {
    ($($test:ident: $name:literal,)*) => {
        $(#[test]
        fn $test() {
            check($name);
        })*
    };
}

parity! {
    llama_equals_transformers: "llama",
    llama_in_bf16_files_equals_transformers: "llama-bf16",
    llama_in_f16_files_equals_transformers: "llama-f16",
    llama_with_biases_equals_transformers: "llama-bias",
    llama_in_several_files_equals_transformers: "llama-sharded",
    llama3_rope_scaling_equals_transformers: "llama3-rope",
    mistral_with_a_sliding_window_equals_transformers: "mistral",
    qwen2_equals_transformers: "qwen2",
    qwen3_equals_transformers: "qwen3",
}

/// The same files through candle-transformers.
mod candle_oracle {
    use super::*;
    use candle_core::{DType, Device, Tensor};
    use candle_nn::VarBuilder;
    use candle_transformers::models::{llama, qwen2, qwen3};

    fn logits_of_last_token(name: &str) -> (Vec<f32>, Vec<u32>) {
        let directory = goldens().join(name);
        let text = std::fs::read_to_string(directory.join("golden.json")).unwrap();
        let golden: Golden = serde_json::from_str(&text).unwrap();
        let prompt = golden.input_ids[0].clone();
        let logits = Grid::whole(&directory).greedy(&prompt, 1).1.pop().unwrap();
        (logits, prompt)
    }

    fn weights(name: &str) -> VarBuilder<'static> {
        let bytes = std::fs::read(goldens().join(name).join("model.safetensors")).unwrap();
        VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap()
    }

    fn config<C: serde::de::DeserializeOwned>(name: &str, extra: serde_json::Value) -> C {
        let text = std::fs::read_to_string(goldens().join(name).join("config.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        // Transformers 5 moved RoPE's parameters; candle reads the older spelling.
        json["rope_theta"] = json["rope_parameters"]["rope_theta"].clone();
        for (key, value) in extra.as_object().unwrap() {
            json[key] = value.clone();
        }
        serde_json::from_value(json).unwrap()
    }

    fn compare(name: &str, candle: &Tensor) {
        let (ours, _) = logits_of_last_token(name);
        let theirs: Vec<f32> = candle.flatten_all().unwrap().to_vec1().unwrap();
        let theirs = &theirs[theirs.len() - ours.len()..];
        let error = relative_error(&ours, theirs);
        assert!(error <= TOLERANCE, "{name}: max|Δ|/max|logit| = {error:e} against candle");
    }

    fn input(name: &str) -> Tensor {
        let (_, prompt) = logits_of_last_token(name);
        Tensor::new(prompt.as_slice(), &Device::Cpu).unwrap().unsqueeze(0).unwrap()
    }

    #[test]
    fn llama_equals_candle() {
        let config: llama::LlamaConfig = config("llama", serde_json::json!({"rope_scaling": null}));
        let config = config.into_config(false);
        let model = llama::Llama::load(weights("llama"), &config).unwrap();
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        compare("llama", &model.forward(&input("llama"), 0, &mut cache).unwrap());
    }

    #[test]
    fn qwen2_equals_candle() {
        let extra = serde_json::json!({"sliding_window": 4096, "max_window_layers": 99, "use_sliding_window": false});
        let config: qwen2::Config = config("qwen2", extra);
        let mut model = qwen2::ModelForCausalLM::new(&config, weights("qwen2")).unwrap();
        compare("qwen2", &model.forward(&input("qwen2"), 0).unwrap());
    }

    #[test]
    fn qwen3_equals_candle() {
        let extra = serde_json::json!({"sliding_window": null, "max_window_layers": 99, "use_sliding_window": false});
        let config: qwen3::Config = config("qwen3", extra);
        let mut model = qwen3::ModelForCausalLM::new(&config, weights("qwen3")).unwrap();
        compare("qwen3", &model.forward(&input("qwen3"), 0).unwrap());
    }
}
