//! A plan's ledger against what ranks really hold: to the byte, for every type and mixture and for every cut.

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{ModelConfig, RankSlice, StageModel};
use ashlar_shard_plan::{PlanRequest, Position, Shares};
use ashlar_vocabulary::{Bytes, FloatType, HeadSlice, LayerRange, Quantization};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Superblocks fit the hidden axis; parts of the feed-forward (108 inputs) cut blocks; keys of a rank fill no panel. Ten
/// layers, so that mixtures have every kind of them.
const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":256,
    "intermediate_size":864,"num_hidden_layers":10,"num_attention_heads":8,"num_key_value_heads":4,"head_dim":24,
    "vocab_size":390,"max_position_embeddings":256,"rms_norm_eps":1e-5,"rope_theta":10000.0,
    "tie_word_embeddings":TIED}"#;

/// Bytes that each rank of a group shares with the others.
const EXCHANGED_BYTES: u64 = 2 * (32 << 10) * 4;

/// Loads every rank of the cut that has a first stage of `first` layers, and compares.
#[track_caller]
fn check(model: &Path, quantization: Option<Quantization>, first: usize, ranks: usize, spread_head: bool) {
    let shape = ModelConfig::open(model, quantization).expect("a model").shape;
    let ends = if first == shape.num_layers { vec![first] } else { vec![first, shape.num_layers] };
    let shares = Shares::new(&shape, ranks);
    for (stage, &end) in ends.iter().enumerate() {
        let start = if stage == 0 { 0 } else { first };
        let position = Position { stage, stages: ends.len(), spread_head };
        for rank in 0..ranks {
            let layers = LayerRange { start, end };
            let piece = position.piece(layers, rank, ranks);
            let (request, threads) = (PlanRequest::default(), 2);
            let ledger = piece.ledger(&shares, &request, 1, Bytes(1 << 40), threads);
            let slice = RankSlice {
                layers,
                first: piece.first,
                last: piece.last,
                tensor_rank: rank,
                tensor_parallel_size: ranks,
                head: piece.head,
            };
            let kernels = Arc::new(Kernels::new(Isa::best(), threads as usize));
            let loaded =
                StageModel::load(model, quantization, slice, kernels, &mut |_, _| {}).expect("loads");
            let planned = ledger.weights + ledger.embedding + ledger.head;
            assert_eq!(
                planned,
                loaded.bytes(),
                "{quantization:?}, {ends:?}, stage {stage}, rank {rank} of {ranks}"
            );
            let held = loaded.workspace(request.max_num_batched_tokens).bytes();
            // What travels between stages, and between ranks, has buffers beside those of a step.
            let exchanged = if rank == 0 && ranks > 1 { ranks as u64 * EXCHANGED_BYTES } else { 0 };
            let beside = ledger.activations.0.checked_sub(held.0 + exchanged);
            let stages = ends.len();
            assert!(
                if stages == 1 { beside == Some(0) } else { beside.is_some() },
                "{quantization:?}, {ends:?}, stage {stage}, rank {rank} of {ranks}: {ledger:?}, {held} held"
            );
        }
    }
}

#[test]
fn the_ledger_is_what_is_held_for_every_type_and_mixture() {
    let types = "f32 f16 bf16 q8_0 q4_0 q4_1 q5_0 q5_1 q4_k q5_k q6_k q4_k_s q4_k_m q5_k_m";
    for tied in [true, false] {
        let directory = tempfile::tempdir().expect("a directory");
        let config = directory.path().join("shape.json");
        std::fs::write(&config, CONFIG.replace("TIED", &tied.to_string())).expect("writes");
        let request = SynthRequest {
            shape: config.to_string_lossy().into_owned(),
            dtype: FloatType::F32,
            seed: 3,
            tokenizer: None,
        };
        synthesize(directory.path(), &request, &mut |_, _| {}).expect("a model");
        for name in types.split(' ') {
            // Quantising to K types is slow; a head of its own is counted alike for all of them.
            if !tied && !["bf16", "q8_0", "q4_k_m"].contains(&name) {
                continue;
            }
            let quantization = Some(name.parse().expect("a type"));
            check(directory.path(), quantization, 3, 1, false);
            check(directory.path(), quantization, 7, 2, true);
            check(directory.path(), quantization, 5, 4, false);
        }
    }
}

#[test]
fn the_ledger_counts_biases_and_head_norms() {
    let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../crates/model/tests/goldens");
    for name in ["llama-bias", "llama-bf16", "qwen2", "qwen3", "mistral"] {
        let model = goldens.join(name);
        let shape = ModelConfig::open(&model, None).expect("a model").shape;
        let spread = HeadSlice::can_spread(&shape, 2, 2);
        check(&model, None, shape.num_layers, 1, false);
        check(&model, None, shape.num_layers, 2, false);
        check(&model, None, 1, 2, spread);
    }
}
