//! Adapters through the whole cluster: the same answers as in process, whatever else is computed and however the model is cut.

use ashlar_kernels::{BLOCK_TOKENS, Isa, Kernels, RowContext};
use ashlar_model::adapter::{AdaptedRows, Adapter, Target};
use ashlar_model::peft::PeftAdapter;
use ashlar_model::{ModelConfig, NoHeadRanks, RankSlice, SingleRank, StageInput, StageModel};
use ashlar_tests::cluster::START_LIMIT;
use ashlar_tests::material::{adapter, demo, write_adapter};
use ashlar_tests::{Answer, Cluster, Event, http, processes};
use ashlar_tokenizer::{SpecialTokens, TextStart, Tokenizer};
use ashlar_vocabulary::{BlockId, Quantization};
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

const PROMPT: &str = "The masons of the valley cut their stones by hand and carried them down";
const TOKENS: usize = 24;

fn poet() -> PeftAdapter {
    adapter(1, 0.2, &Target::ALL)
}

fn critic() -> PeftAdapter {
    adapter(2, 0.2, &[Target::Query, Target::Value, Target::Down])
}

/// A cluster beside which both adapters lie.
fn start(args: &[&str]) -> Cluster {
    let cluster = Cluster::start(args);
    write_adapter(&adapters(&cluster).join("poet"), &poet());
    write_adapter(&adapters(&cluster).join("critic"), &critic());
    cluster
}

fn adapters(cluster: &Cluster) -> PathBuf {
    cluster.state().join("adapters")
}

fn load(cluster: &Cluster, name: &str, path: &str) -> Answer {
    cluster.post("/v1/load_lora_adapter", &json!({"lora_name": name, "lora_path": path}))
}

#[track_caller]
fn loaded(cluster: &Cluster, name: &str, path: &str) {
    let answer = load(cluster, name, path);
    assert_eq!(
        (answer.status, answer.text()),
        (200, format!("Success: LoRA adapter '{name}' added successfully."))
    );
}

/// A refusal's status and message.
#[track_caller]
fn refused(answer: &Answer) -> (u16, String) {
    let message = answer.json()["error"]["message"].as_str().map(str::to_owned);
    (answer.status, message.unwrap_or_else(|| panic!("an error, not {}", answer.text())))
}

fn asked(model: Option<&str>, with: &Value) -> Value {
    let mut body = json!({
        "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "logprobs": 5,
        "skip_special_tokens": false,
    });
    if let Some(model) = model {
        body["model"] = json!(model);
    }
    for (key, value) in with.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

/// The choices with every digit, as they are sent.
#[track_caller]
fn ask_with(cluster: &Cluster, model: Option<&str>, with: &Value) -> String {
    let answer = cluster.post("/v1/completions", &asked(model, with)).ok();
    if let Some(model) = model {
        assert_eq!(answer["model"], model);
    }
    answer["choices"].to_string()
}

#[track_caller]
fn ask(cluster: &Cluster, model: Option<&str>) -> String {
    ask_with(cluster, model, &json!({}))
}

/// What greedy decoding says in process.
fn in_process(adapter: Option<&PeftAdapter>) -> String {
    let config = ModelConfig::from_dir(&demo()).expect("the demo model");
    let slice = RankSlice::whole(&config.shape);
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    let none = None::<Quantization>;
    let model = StageModel::load(&demo(), none, slice.clone(), kernels.clone(), &mut |_, _| {})
        .expect("the demo model");
    let packed = adapter
        .map(|adapter| Adapter::pack(&adapter.cut(&config.shape, &slice), &config.shape, &slice, &kernels));
    let tokenizer = Tokenizer::open(demo()).expect("its tokenizer");
    let prompt = tokenizer.encode(PROMPT, true).expect("tokens");
    let table: Vec<BlockId> =
        (0..(prompt.len() + TOKENS).div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
    let (mut cache, mut work) = (model.kv_cache(table.len()), model.workspace(prompt.len()));
    let (mut tokens, mut computed) = (prompt.clone(), 0);
    while tokens.len() < prompt.len() + TOKENS {
        let rows: Vec<_> = (computed..tokens.len())
            .map(|position| RowContext { position: position as u32, block_table: &table })
            .collect();
        let adapted: Vec<_> =
            packed.iter().map(|adapter| AdaptedRows { rows: 0..rows.len(), adapter }).collect();
        let input = StageInput::Tokens(&tokens[computed..]);
        let group = &mut SingleRank;
        model
            .forward_adapted(&rows, input, &adapted, &mut cache, group, &mut work, &mut || {})
            .expect("a step");
        let last = [rows.len() - 1];
        let logits =
            model.logits(&last, group, &mut NoHeadRanks, &mut work).expect("logits").expect("logits");
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
        computed = tokens.len();
        tokens.push(best.expect("a token") as u32);
    }
    let mut decoder = tokenizer.incremental(SpecialTokens::Show, TextStart::Continuation);
    let mut text = decoder.push_all(&tokens[prompt.len()..]);
    text.push_str(&decoder.finish());
    text
}

fn text_of(choices: &str) -> String {
    let choices: Value = serde_json::from_str(choices).expect("JSON");
    choices[0]["text"].as_str().expect("text").to_owned()
}

#[test]
fn adapters_answer_as_in_process_alone_and_together_in_every_layout() {
    let mut first: Option<[String; 3]> = None;
    for args in [&["--stages", "1"][..], &["--stages", "2"], &["--stages", "1", "--tp", "2"]] {
        let cluster = start(args);
        let base_before = ask(&cluster, None);
        loaded(&cluster, "poet", "poet");
        loaded(&cluster, "critic", "critic");
        // Cold, then from the cache of each: equal bytes, and nobody's blocks are another's.
        let models = [None, Some("poet"), Some("critic")];
        let alone = models.map(|model| ask(&cluster, model));
        assert_eq!(models.map(|model| ask(&cluster, model)), alone, "{args:?}: from the prefix cache");
        assert_eq!(alone[0], base_before, "{args:?}: the base model");
        let rounds: Vec<usize> = (0..4).collect();
        std::thread::scope(|scope| {
            let asking = rounds.iter().flat_map(|_| 0..models.len()).map(|index| {
                let (cluster, alone) = (&cluster, &alone);
                scope.spawn(move || assert_eq!(ask(cluster, models[index]), alone[index]))
            });
            let asking: Vec<_> = asking.collect();
            asking.into_iter().for_each(|asking| asking.join().expect("an equal answer"));
        });
        match &first {
            None => {
                let expected = [None, Some(poet()), Some(critic())].map(|own| in_process(own.as_ref()));
                assert_eq!(alone.each_ref().map(|choices| text_of(choices)), expected);
                assert!(
                    expected[0] != expected[1] && expected[0] != expected[2] && expected[1] != expected[2]
                );
                first = Some(alone);
            }
            Some(first) => assert_eq!(&alone, first, "{args:?}"),
        }
    }
}

#[test]
fn an_adapter_is_loaded_listed_replaced_rolled_back_and_unloaded() {
    let cluster = start(&["--stages", "2"]);
    let models = || cluster.get("/v1/models").ok()["data"].as_array().cloned().unwrap_or_default();
    assert_eq!(models().len(), 1);
    let base = models()[0]["id"].clone();
    loaded(&cluster, "ft:demo:org::1", "poet");
    let name = Some("ft:demo:org::1");
    let card = cluster.get("/v1/models/ft:demo:org::1").ok();
    assert_eq!(models()[1], card);
    assert_eq!((&card["parent"], &card["root"], &card["generation"]), (&base, &json!("poet"), &json!(1)));
    let poem = ask(&cluster, name);
    let chat = json!({"model": "ft:demo:org::1", "messages": [{"role": "user", "content": "Who are you?"}]});
    assert_eq!(cluster.post("/v1/chat/completions", &chat).ok()["model"], "ft:demo:org::1");

    // Under way while the adapter is replaced: it ends as it began.
    let long = json!({"stream": true, "max_tokens": 300});
    let before = ask_with(&cluster, name, &json!({"max_tokens": 300}));
    let mut stream = cluster.stream("/v1/completions", &asked(name, &long));
    let first = stream.next_event();
    let replace = |expected: Option<u64>| {
        let mut body = json!({"lora_name": "ft:demo:org::1", "lora_path": "critic", "load_inplace": true});
        if let Some(expected) = expected {
            body["expected_generation"] = json!(expected);
        }
        cluster.post("/v1/load_lora_adapter", &body)
    };
    assert_eq!(refused(&replace(Some(7))).0, 409);
    assert_eq!(replace(Some(1)).status, 200);
    assert_eq!(cluster.get("/v1/models/ft:demo:org::1").ok()["generation"], 2);
    let critique = ask(&cluster, name);
    assert_ne!(critique, poem);
    let mut said = String::new();
    for event in std::iter::once(first).chain(stream.rest()) {
        if let Event::Data(data) = event {
            let data: Value = serde_json::from_str(&data).expect("JSON");
            said.push_str(data["choices"][0]["text"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(said, text_of(&before), "a request keeps the generation with which it began");

    let back = json!({"lora_name": "ft:demo:org::1", "to_generation": 1, "expected_generation": 2});
    assert_eq!(cluster.post("/v1/roll_back_lora_adapter", &back).status, 200);
    assert_eq!(ask(&cluster, name), poem);
    assert_eq!(cluster.get("/v1/models/ft:demo:org::1").ok()["generation"], 3);

    let unload = cluster.post("/v1/unload_lora_adapter", &json!({"lora_name": "ft:demo:org::1"}));
    assert_eq!(unload.text(), "Success: LoRA adapter 'ft:demo:org::1' removed successfully.");
    assert_eq!(cluster.post("/v1/completions", &asked(name, &json!({}))).status, 404);
    assert_eq!(models().len(), 1);

    loaded(&cluster, "poet", "poet");
    assert_eq!(ask(&cluster, Some("poet")), poem.clone());
    let delete = |id: &str| {
        let request = format!("DELETE /v1/models/{id} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        http::raw(cluster.address(), request.as_bytes()).expect("an answer")
    };
    assert_eq!(delete("poet").ok(), json!({"id": "poet", "object": "model", "deleted": true}));
    assert_eq!(delete("poet").status, 404);
    assert_eq!(delete(base.as_str().expect("a name")).status, 400);
}

#[test]
fn adapters_outlive_the_scheduler_and_make_room_for_each_other() {
    let cluster = start(&["--stages", "2", "--set", "max_adapters=1"]);
    loaded(&cluster, "poet", "poet");
    let poem = ask(&cluster, Some("poet"));
    loaded(&cluster, "critic", "critic");
    let critique = ask(&cluster, Some("critic"));
    // Only one is in memory at a time; each comes back when it is asked for.
    for _ in 0..3 {
        assert_eq!(ask(&cluster, Some("poet")), poem);
        assert_eq!(ask(&cluster, Some("critic")), critique);
    }
    let pid = cluster.pid("scheduler");
    processes::signal(pid, "KILL");
    assert!(ashlar_tests::until(START_LIMIT, || (cluster.pid("scheduler") != pid).then_some(())).is_some());
    cluster.await_ready(START_LIMIT);
    assert_eq!(ask(&cluster, Some("poet")), poem);
    assert_eq!(ask(&cluster, Some("critic")), critique);
    assert_eq!(cluster.get("/v1/models/poet").ok()["generation"], 1);
}

#[test]
fn what_cannot_be_served_is_refused_with_its_reason_and_harms_nobody() {
    let cluster = start(&["--stages", "2"]);
    let at = adapters(&cluster);
    let before = ask(&cluster, None);
    loaded(&cluster, "poet", "poet");
    let poem = ask(&cluster, Some("poet"));

    let outside = tempfile::tempdir().expect("a directory");
    write_adapter(&outside.path().join("stolen"), &poet());
    std::os::unix::fs::symlink(outside.path().join("stolen"), at.join("link")).expect("a link");
    fs::create_dir(at.join("linked-file")).expect("a directory");
    fs::copy(at.join("poet/adapter_config.json"), at.join("linked-file/adapter_config.json"))
        .expect("a copy");
    let tensors = outside.path().join("stolen/adapter_model.safetensors");
    std::os::unix::fs::symlink(tensors, at.join("linked-file/adapter_model.safetensors")).expect("a link");
    fs::create_dir(at.join("empty")).expect("a directory");
    let spoilt = |name: &str, change: &dyn Fn(&mut Vec<u8>, &mut Vec<u8>)| {
        let (mut config, mut tensors) = poet().files("demo").expect("files");
        change(&mut config, &mut tensors);
        fs::create_dir(at.join(name)).expect("a directory");
        fs::write(at.join(name).join("adapter_config.json"), config).expect("a file");
        fs::write(at.join(name).join("adapter_model.safetensors"), tensors).expect("a file");
    };
    let edit = |config: &mut Vec<u8>, key: &str, value: Value| {
        let mut edited: Value = serde_json::from_slice(config).expect("JSON");
        edited[key] = value;
        *config = edited.to_string().into_bytes();
    };
    spoilt("cut", &|_, tensors| tensors.truncate(tensors.len() / 2));
    spoilt("noise", &|_, tensors| tensors.iter_mut().for_each(|byte| *byte ^= 0x5a));
    spoilt("not-json", &|config, _| config.truncate(20));
    spoilt("saves-modules", &|config, _| edit(config, "modules_to_save", json!(["lm_head"])));
    spoilt("dora", &|config, _| edit(config, "use_dora", json!(true)));
    spoilt("other-rank", &|config, _| edit(config, "r", json!(8)));
    write_adapter(&at.join("no-effect"), &adapter(3, 0.0, &Target::ALL));
    let mut narrow = adapter(4, 0.2, &[Target::Query]);
    narrow.pairs.values_mut().for_each(|pair| pair.a.truncate(4 * 64));
    write_adapter(&at.join("narrow"), &narrow);

    let absolute = outside.path().join("stolen");
    for (path, because) in [
        ("../../stolen", "directory below"),
        (absolute.to_str().expect("text"), "directory below"),
        ("/etc", "directory below"),
        (".", "directory below"),
        ("link", "directory below"),
        ("nowhere", "directory below"),
        ("linked-file", "no regular file"),
        ("empty", "adapter_config.json cannot be read"),
        ("cut", "not valid"),
        ("noise", "not valid"),
        ("not-json", "not valid JSON"),
        ("saves-modules", "modules_to_save"),
        ("dora", "DoRA"),
        ("other-rank", "does not fit the model"),
        ("no-effect", "no effect"),
        ("narrow", "does not fit the model"),
    ] {
        let (status, message) = refused(&load(&cluster, "bad", path));
        assert!(status == 400 && message.contains(because), "{path}: {status} {message}");
    }
    for body in [
        json!({"lora_path": "poet"}),
        json!({"lora_name": "x"}),
        json!({"lora_name": "", "lora_path": "poet"}),
        json!({"lora_name": 3, "lora_path": "poet"}),
        json!({"lora_name": "poet", "lora_path": "critic"}),
        json!({"lora_name": "two words", "lora_path": "poet"}),
        json!({"lora_name": cluster.get("/v1/models").ok()["data"][0]["id"], "lora_path": "poet"}),
    ] {
        assert_eq!(refused(&cluster.post("/v1/load_lora_adapter", &body)).0, 400, "{body}");
    }
    assert_eq!(refused(&cluster.post("/v1/unload_lora_adapter", &json!({}))).0, 400);
    let unknown = json!({"lora_name": "nobody"});
    assert_eq!(refused(&cluster.post("/v1/unload_lora_adapter", &unknown)).0, 404);
    assert_eq!(cluster.post("/v1/completions", &asked(Some("bad"), &json!({}))).status, 404);
    assert_eq!((ask(&cluster, None), ask(&cluster, Some("poet"))), (before, poem));
}
