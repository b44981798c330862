//! Models quantised while they are loaded: the same bits for every cut, close to the f32 model, within the ledger.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::Isa;
use ashlar_model::digest::model_digest;
use ashlar_model::stage::expected_bytes;
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{ModelConfig, RankSlice};
use ashlar_vocabulary::{FloatType, Precision, Quantization};
use common::{Grid, bits};
use std::path::Path;

/// Superblocks fit, and parts of the feed-forward (96 inputs) cut them.
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":768,"num_hidden_layers":4,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":32,
    "vocab_size":384,"max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":TIED}"#;

fn model(directory: &Path, tied: bool) {
    let config = directory.join("shape.json");
    std::fs::write(&config, CONFIG.replace("TIED", &tied.to_string())).unwrap();
    let request = SynthRequest {
        shape: config.to_string_lossy().into_owned(),
        dtype: FloatType::F32,
        seed: 3,
        tokenizer: None,
    };
    synthesize(directory, &request, &mut |_, _| {}).unwrap();
}

fn prompt() -> Vec<u32> {
    (0..37).map(|i| (i * 53 + 7) % 384).collect()
}

fn logits(grid: &mut Grid) -> Vec<Vec<f32>> {
    grid.greedy(&prompt(), 4).1
}

#[test]
fn every_cut_of_every_type_gives_the_same_bits() {
    for tied in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        model(directory.path(), tied);
        for name in ["f16", "bf16", "q8_0", "q4_0", "q5_1", "q4_k_m", "q6_k"] {
            let quantization: Quantization = name.parse().unwrap();
            let grid = |stages, size, isa, threads| {
                Grid::quantized(directory.path(), Some(quantization), stages, size, isa, threads)
            };
            let expected = logits(&mut grid(1, 1, Isa::best(), 1));
            let found = [
                (grid(2, 1, Isa::best(), 2), "2 stages"),
                (grid(1, 2, Isa::best(), 1), "2 ranks"),
                (grid(4, 4, Isa::best(), 1), "4 stages × 4 ranks"),
                (grid(1, 1, Isa::Portable, 3), "portable"),
                (
                    grid(1, 4, Isa::available()[Isa::available().len() / 2], 1),
                    "4 ranks, another instruction set",
                ),
            ];
            for (mut grid, what) in found {
                let same = logits(&mut grid).iter().zip(&expected).all(|(a, b)| bits(a) == bits(b));
                assert!(same, "{name}, tied {tied}: {what}");
            }
        }
    }
}

#[test]
fn every_cut_with_a_narrower_cache_gives_the_same_bits_close_to_the_wide_ones() {
    let directory = tempfile::tempdir().unwrap();
    model(directory.path(), true);
    let exact = logits(&mut Grid::whole(directory.path()));
    let scale = exact[36].iter().fold(0f32, |most, x| most.max(x.abs()));
    for (kv_cache, tolerance) in [(FloatType::Bf16, 0.02), (FloatType::F16, 0.002)] {
        let precision = Precision { kv_cache, ..Precision::default() };
        let grid = |stages, size, isa, threads| {
            Grid::quantized(directory.path(), precision, stages, size, isa, threads)
        };
        let expected = logits(&mut grid(1, 1, Isa::best(), 1));
        for (mut grid, what) in [
            (grid(2, 2, Isa::best(), 2), "2 stages × 2 ranks"),
            (grid(4, 4, Isa::best(), 1), "4 stages × 4 ranks"),
            (grid(1, 1, Isa::Portable, 3), "portable"),
        ] {
            let same = logits(&mut grid).iter().zip(&expected).all(|(a, b)| bits(a) == bits(b));
            assert!(same, "{kv_cache}: {what}");
        }
        let worst = expected[36].iter().zip(&exact[36]).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst > 0.0 && worst / scale < tolerance, "{kv_cache}: {}", worst / scale);
    }
}

#[test]
fn every_cut_with_narrower_activations_gives_the_same_bits_close_to_the_wide_ones() {
    let directory = tempfile::tempdir().unwrap();
    model(directory.path(), true);
    let exact = logits(&mut Grid::whole(directory.path()));
    let scale = exact[36].iter().fold(0f32, |most, x| most.max(x.abs()));
    for (activations, tolerance) in [(FloatType::Bf16, 0.02), (FloatType::F16, 0.003)] {
        let precision = Precision { activations, ..Precision::default() };
        let grid = |stages, size| {
            let isa = if stages == 4 { *Isa::available().last().unwrap() } else { Isa::best() };
            Grid::quantized(directory.path(), precision, stages, size, isa, stages)
        };
        let expected = logits(&mut grid(1, 1));
        for (stages, size) in [(1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2), (4, 4)] {
            let same = logits(&mut grid(stages, size)).iter().zip(&expected).all(|(a, b)| bits(a) == bits(b));
            assert!(same, "{activations}: {stages} stages × {size} ranks");
        }
        let worst = expected[36].iter().zip(&exact[36]).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst > 0.0 && worst / scale < tolerance, "{activations}: {}", worst / scale);
    }
    // Together with everything else that an owner can choose.
    let precision = Precision {
        quantization: Some("q4_k_m".parse().unwrap()),
        kv_cache: FloatType::F16,
        activations: FloatType::Bf16,
    };
    let expected = logits(&mut Grid::quantized(directory.path(), precision, 1, 1, Isa::best(), 1));
    let cut = logits(&mut Grid::with_spread_head(directory.path(), precision, 4, 2));
    assert!(cut.iter().zip(&expected).all(|(a, b)| bits(a) == bits(b)));
}

#[test]
fn every_choice_of_precision_has_a_digest_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    model(directory.path(), true);
    let mut digests = std::collections::BTreeSet::new();
    for quantization in [None, Some("q8_0".parse().unwrap())] {
        for kv_cache in FloatType::ALL {
            for activations in FloatType::ALL {
                let precision = Precision { quantization, kv_cache, activations };
                digests.insert(model_digest(directory.path(), precision).unwrap().0);
            }
        }
    }
    assert_eq!(digests.len(), 18);
}

#[test]
fn more_bits_are_closer_to_the_f32_model() {
    let directory = tempfile::tempdir().unwrap();
    model(directory.path(), true);
    let exact = logits(&mut Grid::whole(directory.path()));
    let scale = exact[36].iter().fold(0f32, |most, x| most.max(x.abs()));
    // Largest difference of any logit, against the largest logit; random weights make the most of every error.
    for (name, tolerance) in [
        ("f16", 1e-3),
        ("bf16", 0.02),
        ("q8_0", 0.02),
        ("q6_k", 0.05),
        ("q5_k_m", 0.1),
        ("q4_k_m", 0.2),
        ("q4_0", 0.3),
    ] {
        let quantization = name.parse().unwrap();
        let rows = logits(&mut Grid::quantized(directory.path(), Some(quantization), 1, 1, Isa::best(), 1));
        let worst = rows[36].iter().zip(&exact[36]).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(worst / scale < tolerance, "{name}: {}", worst / scale);
    }
}

#[test]
fn memory_is_what_the_types_say() {
    let directory = tempfile::tempdir().unwrap();
    model(directory.path(), false);
    for name in ["q8_0", "q4_0", "q4_k_m", "q6_k"] {
        let quantization: Quantization = name.parse().unwrap();
        let config = ModelConfig::open(directory.path(), Some(quantization)).unwrap();
        let expected = expected_bytes(&config.shape, &RankSlice::whole(&config.shape));
        let grid = Grid::quantized(directory.path(), Some(quantization), 1, 1, Isa::best(), 1);
        assert_eq!(grid.weight_bytes(), expected.0, "{name}");
    }
}
