//! Logits equal candle-transformers' over the same files within max|Δ| / max|logit| ≤ 1e-4.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../../crates/model/tests/common/mod.rs"]
mod common;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use common::{Grid, goldens, relative_error};
use serde::Deserialize;

const TOLERANCE: f32 = 1e-4;

#[derive(Deserialize)]
struct Golden {
    input_ids: Vec<Vec<u32>>,
}

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
    for name in ["llama", "llama3-rope"] {
        let config: llama::LlamaConfig = config(name, serde_json::json!({}));
        let config = config.into_config(false);
        let model = llama::Llama::load(weights(name), &config).unwrap();
        let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).unwrap();
        compare(name, &model.forward(&input(name), 0, &mut cache).unwrap());
    }
}

#[test]
fn mistral_equals_candle() {
    // Candle lets a query see `sliding_window` keys before its own; in Transformers its own is one of them.
    let extra = serde_json::json!({"use_flash_attn": false, "sliding_window": 7});
    let config: mistral::Config = config("mistral", extra);
    let mut model = mistral::Model::new(&config, weights("mistral")).unwrap();
    compare("mistral", &model.forward(&input("mistral"), 0).unwrap());
}

#[test]
fn qwen2_equals_candle() {
    let extra =
        serde_json::json!({"sliding_window": 4096, "max_window_layers": 99, "use_sliding_window": false});
    let config: qwen2::Config = config("qwen2", extra);
    let mut model = qwen2::ModelForCausalLM::new(&config, weights("qwen2")).unwrap();
    compare("qwen2", &model.forward(&input("qwen2"), 0).unwrap());
}

#[test]
fn qwen3_equals_candle() {
    let extra =
        serde_json::json!({"sliding_window": null, "max_window_layers": 99, "use_sliding_window": false});
    let config: qwen3::Config = config("qwen3", extra);
    let mut model = qwen3::ModelForCausalLM::new(&config, weights("qwen3")).unwrap();
    compare("qwen3", &model.forward(&input("qwen3"), 0).unwrap());
}
