//! Models and adapters of random numbers, small enough to be made by a test.

use crate::{run_to_end, shared};
use ashlar_model::ModelConfig;
use ashlar_model::adapter::{LoraPair, LoraSpec, Target};
use ashlar_model::peft::PeftAdapter;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// The demo model's directory.
pub fn demo() -> PathBuf {
    shared::workspace().join("crates/model/demo")
}

/// Writes a small model of random weights; another seed, another model.
#[track_caller]
pub fn synthesized(directory: &Path, name: &str, seed: u32) -> String {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let (shape, model) = (directory.join(format!("{name}.json")), directory.join(name));
    fs::write(&shape, config.to_string()).expect("a file");
    let (shape, out) = (shape.to_string_lossy(), model.to_string_lossy());
    let seed = seed.to_string();
    let made = run_to_end(&["synth", &shape, "--dtype", "f32", "--seed", &seed, "--out", &out], &[], LIMIT);
    assert!(made.status.is_some_and(|status| status.success()), "{}", made.said);
    out.into_owned()
}

/// An adapter of the demo model with numbers of our own; `strength` 0 has no effect.
#[track_caller]
pub fn adapter(seed: u64, strength: f32, targets: &[Target]) -> PeftAdapter {
    let shape = ModelConfig::from_dir(&demo()).expect("the demo model").shape;
    let spec = LoraSpec { rank: 4, alpha: 8.0, rank_stabilized: false, targets: targets.to_vec() };
    let mut state = seed;
    let mut number = |scale: f32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) * scale
    };
    let mut pairs = BTreeMap::new();
    for layer in 0..shape.num_layers {
        for &target in targets {
            let (outputs, inputs) = target.dimensions(&shape);
            let a = (0..spec.rank * inputs).map(|_| number(0.4)).collect();
            let b = (0..outputs * spec.rank).map(|_| number(strength)).collect();
            pairs.insert((layer, target), LoraPair { a, b });
        }
    }
    PeftAdapter { spec, pairs }
}

/// Writes an adapter of the demo model as PEFT does.
#[track_caller]
pub fn write_adapter(directory: &Path, adapter: &PeftAdapter) {
    fs::create_dir_all(directory).expect("a directory");
    let (config, tensors) = adapter.files("demo").expect("files");
    fs::write(directory.join("adapter_config.json"), config).expect("a file");
    fs::write(directory.join("adapter_model.safetensors"), tensors).expect("a file");
}
