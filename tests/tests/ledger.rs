//! A plan's ledger against what ranks really hold: to the byte, for every type and mixture and for every cut. And what sessions of
//! fine-tuning jobs reserve, against what nodes really take.

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::synth::{SynthRequest, synthesize};
use ashlar_model::{ModelConfig, RankSlice, StageModel};
use ashlar_shard_plan::{PlanRequest, Position, Shares};
use ashlar_tests::tuning::{self, JOB_LIMIT, create_with, uploaded};
use ashlar_tests::{Cluster, Event, eventually, http, processes, run_to_end};
use ashlar_vocabulary::{Bytes, FloatType, HeadSlice, LayerRange, Quantization};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

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

/// Beyond what a session has reserved a node may take: stacks of its threads, buffers of its connections and of the blob store,
/// samples on their way, and what the allocator keeps between two sizes.
const BEYOND_SESSION_BYTES_MAX: u64 = 32 << 20;
const SYNTH_LIMIT: Duration = Duration::from_secs(120);

/// A model of random weights of which a session takes a good 100 MB per stage.
fn wide_model(directory: &Path) -> PathBuf {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1024, "max_position_embeddings": 512,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let (shape, model) = (directory.join("shape.json"), directory.join("model"));
    std::fs::write(&shape, config.to_string()).expect("a configuration");
    let (shape, out) = (shape.to_string_lossy(), model.to_string_lossy());
    let ended = run_to_end(&["synth", &shape, "--dtype", "f32", "--out", &out], &[], SYNTH_LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}", ended.said);
    model
}

/// Texts of some 128 tokens: a batch of 32 has micro-batches of a full 512.
fn texts(count: u32) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let letter = |place: u32| char::from(b'a' + ((number * 11 + place * (number % 7 + 3)) % 26) as u8);
        let text: String = (0..127).map(letter).collect();
        writeln!(lines, "{}", json!({"text": text})).expect("a string");
    }
    lines
}

/// What sessions have reserved, by node.
fn reserved(cluster: &Cluster) -> BTreeMap<String, u64> {
    let name = |node: &Value| node["node"].as_str().expect("a name").to_owned();
    let view = cluster.view();
    let nodes = view["nodes"].as_array().expect("nodes").iter();
    nodes.map(|node| (name(node), node["jobs"].as_u64().expect("what sessions have reserved"))).collect()
}

#[test]
fn a_session_takes_what_it_has_reserved_and_gives_it_back_however_it_ends() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let model = wide_model(directory.path());
    let cluster =
        Cluster::start(&["--model", &model.to_string_lossy(), "--stages", "2", "--set", "max_num_seqs=4"]);
    let name = cluster.get("/v1/models").ok()["data"][0]["id"].as_str().expect("a name").to_owned();
    let serve = || tuning::ask(&cluster, &name);
    let before = serve();
    let file = uploaded(&cluster, &texts(64));
    let with = |epochs: u32| {
        let hyperparameters = json!({"n_epochs": epochs, "batch_size": 32});
        json!({
            "seed": 7, "lora": {"r": 8},
            "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        })
    };
    for (how, epochs) in [("cancelled", 50), ("succeeded", 1)] {
        assert!(reserved(&cluster).values().all(|bytes| *bytes == 0), "nothing is reserved without a job");
        let resident = |node: &str| processes::resident_bytes(cluster.pid(node)).expect("its memory");
        let nodes: Vec<String> = reserved(&cluster).into_keys().collect();
        let at_rest: BTreeMap<&str, u64> = nodes.iter().map(|node| (&node[..], resident(node))).collect();
        let forgets = nodes.iter().all(|node| processes::forget_resident_max(cluster.pid(node)));
        assert!(forgets, "the largest memory of a process can be measured anew");
        let id = create_with(&cluster, &name, &file, &with(epochs));
        // Its client follows it and leaves in the middle, which is nothing to the job or its memory.
        let path = format!("/v1/fine_tuning/jobs/{id}/events?stream=true");
        let mut follows = http::get_stream(cluster.address(), &path).expect("a stream");
        let mut steps = 0;
        while steps < 1 {
            let Event::Data(data) = follows.next_event() else {
                panic!("a stream that ends: {}", cluster.said())
            };
            steps += u32::from(data.contains("training loss"));
        }
        let promised = reserved(&cluster);
        drop(follows);
        assert!(
            promised.values().all(|bytes| *bytes > 32 << 20),
            "every node has promised memory: {promised:?}"
        );
        if how == "cancelled" {
            let seen = tuning::steps(&cluster, &id);
            tuning::until(&cluster, &id, "next step", |job| job["ashlar"]["steps"].as_u64() > Some(seen));
            assert_eq!(reserved(&cluster), promised, "it is held as long as the job runs, followed or not");
            cluster.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), &json!({})).ok();
        }
        assert_eq!(tuning::ended(&cluster, &id)["status"], how);
        let given_back = || reserved(&cluster).values().all(|bytes| *bytes == 0);
        eventually("what was reserved is given back", JOB_LIMIT, given_back);
        for node in &nodes {
            let most = processes::resident_bytes_max(cluster.pid(node)).expect("its memory");
            let (grown, promised) = (most.saturating_sub(at_rest[&node[..]]), promised[node]);
            println!("{how}, {node}: {} MiB at most, {} MiB promised", grown >> 20, promised >> 20);
            assert!(
                grown <= promised + BEYOND_SESSION_BYTES_MAX,
                "{how}, {node}: {grown} bytes more than at rest, {promised} promised"
            );
        }
        assert_eq!(serve(), before, "what is served does not notice");
    }
}
