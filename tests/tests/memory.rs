//! A node holds its slice of the model and what its ledger says, nothing more.

use ashlar_tests::{Cluster, processes, run_to_end};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// Beyond the ledger a node may hold its program, its stacks, its tokenizer and grammars.
const BEYOND_LEDGER_BYTES_MAX: u64 = 64 * MIB;
const SYNTH_LIMIT: Duration = Duration::from_secs(120);

/// Writes a model of random weights, a good 200 MB in float32, and returns the size of its weights.
fn synthesize(directory: &Path) -> u64 {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let shape = directory.join("config.json");
    std::fs::write(&shape, config.to_string()).expect("a configuration");
    let model = directory.join("model");
    let (shape, out) = (shape.to_string_lossy(), model.to_string_lossy());
    let ended = run_to_end(&["synth", &shape, "--dtype", "f32", "--out", &out], &[], SYNTH_LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}", ended.said);
    std::fs::metadata(model.join("model.safetensors")).expect("weights").len()
}

#[test]
fn a_node_holds_its_slice_and_what_its_ledger_says() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let whole = synthesize(directory.path());
    assert!(whole > 190 * MIB, "{whole} bytes");
    let model = directory.path().join("model");
    for layout in
        [["--stages", "2", "--tp", "1"], ["--stages", "1", "--tp", "2"], ["--stages", "2", "--tp", "2"]]
    {
        let model = model.to_string_lossy();
        let args = [&["--model", &*model, "--set", "max_num_seqs=4"], &layout[..]].concat();
        let cluster = Cluster::start(&args);
        for seed in 0..3 {
            let prompt = "A long prompt that fills some blocks. ".repeat(8);
            cluster.post("/v1/completions", &json!({"prompt": prompt, "seed": seed, "max_tokens": 16})).ok();
        }
        let view = cluster.view();
        let nodes = view["nodes"].as_array().expect("nodes");
        let share = whole / nodes.len() as u64;
        for node in nodes {
            let name = node["node"].as_str().expect("a name");
            let reserved = node["reserved"].as_u64().expect("its ledger");
            // As it is now: measuring the machine when joining takes and returns a working set of its own.
            let resident = processes::resident_bytes(cluster.pid(name)).expect("its memory");
            println!(
                "{layout:?} {name}: {} MiB resident, ledger {} MiB, model {} MiB",
                resident / MIB,
                reserved / MIB,
                whole / MIB
            );
            assert!(
                resident <= reserved + BEYOND_LEDGER_BYTES_MAX,
                "{layout:?} {name}: {resident} bytes resident, {reserved} reserved"
            );
            assert!(
                resident < whole * 3 / 4,
                "{layout:?} {name}: {resident} bytes resident of a model of {whole}"
            );
            // The ledger itself must be about a slice: shares differ by embedding and head, and there is the KV cache.
            assert!(
                reserved > share / 2,
                "{layout:?} {name}: {reserved} bytes reserved for a share of {share}"
            );
            assert!(reported_resident(node) <= resident, "{layout:?} {name}: {node}");
        }
    }
}

fn reported_resident(node: &Value) -> u64 {
    node["resident"].as_u64().expect("what it reports")
}
