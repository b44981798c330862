//! Logits and greedy continuations against Hugging Face Transformers (goldens in `goldens/`, made by `generate.py`).
//! The in-process oracle, candle-transformers, is in the `tests` package.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::Isa;
use ashlar_vocabulary::{Quantization, WeightType};
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

/// The same for weights that are held in bf16: activations are rounded to eight bits, in every product.
const BF16_TOLERANCE: f32 = 2e-2;

fn check(name: &str) {
    check_held(name, None, TOLERANCE);
}

/// Weights may be held in another type than the files have.
fn check_held(name: &str, quantization: Option<Quantization>, tolerance: f32) {
    let directory = goldens().join(name);
    let text = std::fs::read_to_string(directory.join("golden.json")).unwrap();
    let golden: Golden = serde_json::from_str(&text).unwrap();
    let prompt = &golden.input_ids[0];
    let expected = decode_base64_f32(&golden.logits);
    assert_eq!(expected.len(), golden.shape.iter().product::<usize>());
    let (greedy, logits) =
        Grid::quantized(&directory, quantization, 1, 1, Isa::best(), 1).greedy(prompt, golden.greedy.len());
    let found: Vec<f32> = logits[..prompt.len()].concat();
    assert_eq!(found.len(), expected.len(), "{name}: logits of every prompt position");
    let error = relative_error(&found, &expected);
    assert!(error <= tolerance, "{name}: max|Δ|/max|logit| = {error:e}");
    if tolerance > TOLERANCE {
        return;
    }
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
    llama_in_f16_files_equals_transformers: "llama-f16",
    llama_with_biases_equals_transformers: "llama-bias",
    llama_in_several_files_equals_transformers: "llama-sharded",
    llama3_rope_scaling_equals_transformers: "llama3-rope",
    mistral_with_a_sliding_window_equals_transformers: "mistral",
    qwen2_equals_transformers: "qwen2",
    qwen3_equals_transformers: "qwen3",
}

#[test]
fn llama_in_bf16_files_equals_transformers_in_f32_and_comes_close_in_bf16() {
    check_held("llama-bf16", Some(Quantization::Type(WeightType::F32)), TOLERANCE);
    check_held("llama-bf16", None, BF16_TOLERANCE);
}
