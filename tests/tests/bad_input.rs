//! What clients should not send and operators should not start: each gets a clear answer, and nobody else notices.

use ashlar_tests::{Answer, Cluster, Ended, Event, cluster, eventually, http, run_to_end, shared};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Each answer to a bad request; the machine may be busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const START_LIMIT: Duration = Duration::from_secs(30);

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// What is sent, and the status and parameter that the answer must have.
struct Bad {
    what: String,
    path: &'static str,
    body: Vec<u8>,
    status: u16,
    param: Option<&'static str>,
}

fn bad(path: &'static str, body: Value, status: u16, param: Option<&'static str>) -> Bad {
    let what = body.to_string().chars().take(120).collect();
    Bad { what, path, body: body.to_string().into_bytes(), status, param }
}

fn bad_bytes(what: &str, path: &'static str, body: Vec<u8>, status: u16) -> Bad {
    Bad { what: what.to_owned(), path, body, status, param: None }
}

fn bad_chats() -> Vec<Bad> {
    let messages = json!([{"role": "user", "content": "What is 12 + 34?"}]);
    let with = |name: &str, value: Value| {
        let mut body = json!({"messages": messages});
        body[name] = value;
        body
    };
    let schema = |schema: Value| {
        with(
            "response_format",
            json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}),
        )
    };
    let mut all = vec![
        bad(CHAT, json!({}), 400, Some("messages")),
        bad(CHAT, json!([]), 400, None),
        bad(CHAT, json!("text"), 400, None),
        bad(CHAT, json!(7), 400, None),
        bad(CHAT, json!({"messages": []}), 400, Some("messages")),
        bad(CHAT, json!({"messages": "hello"}), 400, Some("messages")),
        bad(CHAT, json!({"messages": [7]}), 400, Some("messages[0]")),
        bad(CHAT, json!({"messages": [{"content": "x"}]}), 400, Some("messages[0].role")),
        bad(CHAT, json!({"messages": [{"role": "king", "content": "x"}]}), 400, Some("messages[0].role")),
        bad(CHAT, json!({"messages": [{"role": "user"}]}), 400, Some("messages[0].content")),
        bad(CHAT, json!({"messages": [{"role": "user", "content": 7}]}), 400, Some("messages[0].content")),
        bad(CHAT, with("model", json!("gpt-9")), 404, Some("model")),
        bad(CHAT, with("model", json!(7)), 400, Some("model")),
        bad(CHAT, with("max_tokens", json!(1_000_000)), 400, Some("max_tokens")),
        bad(CHAT, with("max_tokens", json!(-1)), 400, Some("max_tokens")),
        bad(CHAT, with("max_tokens", json!(1e300)), 400, Some("max_tokens")),
        bad(CHAT, with("max_tokens", json!("many")), 400, Some("max_tokens")),
        bad(CHAT, with("temperature", json!("hot")), 400, Some("temperature")),
        bad(CHAT, with("temperature", json!(-0.1)), 400, Some("temperature")),
        bad(CHAT, with("top_p", json!([1])), 400, Some("top_p")),
        bad(CHAT, with("n", json!(1_000_000_000)), 400, Some("n")),
        bad(CHAT, with("n", json!(1.5)), 400, Some("n")),
        bad(CHAT, with("seed", json!("seven")), 400, Some("seed")),
        bad(CHAT, with("stop", json!(vec!["a"; 1000])), 400, Some("stop")),
        bad(CHAT, with("stop", json!([7])), 400, Some("stop")),
        bad(CHAT, with("stream", json!("yes")), 400, Some("stream")),
        bad(CHAT, with("stream_options", json!({"include_usage": true})), 400, Some("stream_options")),
        bad(CHAT, with("logit_bias", json!({"a": 1})), 400, Some("logit_bias")),
        bad(CHAT, with("logit_bias", json!({"999999999": 1})), 400, Some("logit_bias")),
        bad(CHAT, with("tools", json!({})), 400, Some("tools")),
        bad(CHAT, with("tools", json!([{"type": "function"}])), 400, Some("tools[0].function")),
        bad(CHAT, with("tool_choice", json!("required")), 400, Some("tool_choice")),
        bad(CHAT, with("response_format", json!({"type": "poem"})), 400, Some("response_format.type")),
        // `{` is its byte: the grammar asks for what `min_tokens` forbids.
        bad(
            CHAT,
            json!({"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"},
                   "min_tokens": 5, "stop_token_ids": [123]}),
            400,
            None,
        ),
        bad(CHAT, schema(json!({"type": "nothing"})), 400, Some("response_format")),
        bad(CHAT, schema(json!({"$ref": "http://127.0.0.1:1/"})), 400, Some("response_format")),
        bad(CHAT, schema(json!({"$ref": "file:///etc/passwd"})), 400, Some("response_format")),
        bad(CHAT, schema(json!({"type": "string", "pattern": "("})), 400, Some("response_format")),
        bad(CHAT, schema(json!("text")), 400, Some("response_format.json_schema.schema")),
        bad(
            CHAT,
            json!({"messages": [{"role": "user", "content": "x".repeat(2_000)}]}),
            400,
            Some("messages"),
        ),
    ];
    let deep = 100_000;
    let nested = format!("{}{}", "[".repeat(deep), "]".repeat(deep));
    let nested_schema = format!("{}{{}}{}", r#"{"type":"array","items":"#.repeat(deep), "}".repeat(deep));
    all.extend([
        bad_bytes("arrays nested 100,000 deep", CHAT, format!(r#"{{"messages":{nested}}}"#).into_bytes(), 400),
        bad_bytes(
            "a schema nested 100,000 deep",
            CHAT,
            format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"response_format":{{"type":"json_schema","json_schema":{{"name":"x","schema":{nested_schema}}}}}}}"#
            )
            .into_bytes(),
            400,
        ),
        bad_bytes("an empty body", CHAT, Vec::new(), 400),
        bad_bytes("no JSON", CHAT, b"messages=hello".to_vec(), 400),
        bad_bytes("JSON cut short", CHAT, br#"{"messages":[{"role":"user","#.to_vec(), 400),
        bad_bytes("invalid UTF-8", CHAT, b"{\"messages\":[{\"role\":\"user\",\"content\":\"\xff\xfe\"}]}".to_vec(), 400),
        bad_bytes(
            "half a surrogate",
            CHAT,
            br#"{"messages":[{"role":"user","content":"\ud800"}]}"#.to_vec(),
            400,
        ),
        bad_bytes("zero bytes", CHAT, vec![0; 4096], 400),
        bad_bytes("17 MiB", CHAT, vec![b' '; 17 << 20], 413),
    ]);
    all
}

fn bad_others() -> Vec<Bad> {
    let tokens: Vec<u32> = vec![1; 600];
    vec![
        bad(COMPLETIONS, json!({}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": []}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": {}}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": [-1]}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": [99_999_999]}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": [1, "x"]}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": tokens}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": vec!["x"; 1000]}), 400, Some("prompt")),
        bad(COMPLETIONS, json!({"prompt": vec!["x"; 100], "n": 100}), 400, Some("n")),
        bad(COMPLETIONS, json!({"prompt": "x", "max_tokens": 512}), 400, Some("max_tokens")),
        bad(COMPLETIONS, json!({"prompt": "x", "max_tokens": 4, "min_tokens": 5}), 400, Some("min_tokens")),
        bad(COMPLETIONS, json!({"prompt": "x", "logprobs": 21}), 400, Some("logprobs")),
        bad(COMPLETIONS, json!({"prompt": "x", "suffix": "y"}), 400, Some("suffix")),
        bad("/tokenize", json!({}), 400, Some("prompt")),
        bad("/tokenize", json!({"prompt": 7}), 400, Some("prompt")),
        bad("/detokenize", json!({"tokens": [-7]}), 400, Some("tokens")),
        bad("/detokenize", json!({"tokens": "x"}), 400, Some("tokens")),
        bad("/v1/nothing", json!({}), 404, None),
        bad("/v1/models", json!({}), 405, None),
    ]
}

#[track_caller]
fn check_envelope(what: &str, answer: &Answer, status: u16) -> Value {
    assert_eq!(answer.status, status, "{what}: {}", answer.text());
    let error = &answer.json()["error"];
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{what}: {}", answer.text());
    assert!(error["type"].is_string(), "{what}: {}", answer.text());
    assert!(error.get("param").is_some() && error.get("code").is_some(), "{what}: {}", answer.text());
    error.clone()
}

#[track_caller]
fn assert_no_panic(cluster: &Cluster) {
    let said = cluster.said();
    assert!(!said.contains("panicked at"), "{said}");
}

/// The bytes of a stream that others must not disturb.
fn witness(cluster: &Cluster) -> String {
    // The demo model's token for the end is 258: without it the text goes on.
    let asked = json!({
        "prompt": "Write", "temperature": 1, "seed": 42, "max_tokens": 160, "logit_bias": {"258": -100}, "logprobs": 3,
        "stream": true,
    });
    let events = cluster.stream(COMPLETIONS, &asked).rest();
    assert_eq!(events.last(), Some(&Event::Done), "{events:?}");
    let choices = |event: &Event| match event {
        Event::Data(data) => {
            data.split_once("\"choices\":").map(|(_, rest)| rest.split(",\"system").next().map(str::to_owned))
        }
        _ => None,
    };
    events.iter().filter_map(choices).flatten().collect::<Vec<_>>().join("\n")
}

/// Runs `mischief` while witness streams run; each must be what an undisturbed one is.
#[track_caller]
fn beside_a_witness(cluster: &Cluster, mischief: impl FnOnce()) {
    let undisturbed = witness(cluster);
    assert!(undisturbed.lines().count() > 100, "{undisturbed}");
    let over = AtomicBool::new(false);
    let disturbed = std::thread::scope(|scope| {
        let witnessing = scope.spawn(|| {
            let mut seen = vec![witness(cluster)];
            while !over.load(Ordering::Relaxed) {
                seen.push(witness(cluster));
            }
            seen
        });
        // A failing assertion must not leave the witness running for ever.
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(mischief));
        over.store(true, Ordering::Relaxed);
        let seen = witnessing.join().expect("the witness");
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        seen
    });
    for disturbed in disturbed {
        assert_eq!(disturbed, undisturbed);
    }
}

#[test]
fn each_bad_request_gets_the_error_envelope_quickly_and_disturbs_nobody() {
    let cluster = Cluster::demo();
    beside_a_witness(&cluster, || {
        for bad in bad_chats().into_iter().chain(bad_others()) {
            let start = Instant::now();
            let answer = http::post(cluster.address(), bad.path, &bad.body)
                .unwrap_or_else(|error| panic!("{}: {error}", bad.what));
            assert!(start.elapsed() < ANSWER_LIMIT, "{}: {:?}", bad.what, start.elapsed());
            let error = check_envelope(&bad.what, &answer, bad.status);
            if let Some(param) = bad.param {
                assert_eq!(error["param"], param, "{}: {error}", bad.what);
            }
        }
    });
    assert_no_panic(&cluster);
}

#[test]
fn malformed_http_is_refused_and_disturbs_nobody() {
    let cluster = Cluster::demo();
    let address = cluster.address();
    let heads: [&[u8]; 6] = [
        b"\r\n\r\n\x00\x01\x02\r\n\r\n",
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\nhello\r\n",
    ];
    beside_a_witness(&cluster, || {
        for head in heads {
            // A closed connection is an answer too; hanging or a 5xx is not.
            let start = Instant::now();
            match http::raw_half_closed(address, head) {
                Ok(answer) => assert!((400..500).contains(&answer.status), "{head:?}: {}", answer.text()),
                Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "{head:?} hangs"),
            }
            assert!(start.elapsed() < ANSWER_LIMIT, "{head:?}: {:?}", start.elapsed());
        }
        let flood = format!("GET / HTTP/1.1\r\nhost: x\r\nx-flood: {}\r\n\r\n", "a".repeat(2 << 20));
        if let Ok(answer) = http::raw(address, flood.as_bytes()) {
            assert!((400..500).contains(&answer.status), "{}", answer.text());
        }
    });
    assert_no_panic(&cluster);
}

#[test]
fn half_sent_requests_cost_nobody_anything() {
    let cluster = Cluster::demo();
    let body =
        json!({"prompt": "What is", "max_tokens": 400, "ignore_eos": true, "stream": true}).to_string();
    let whole = http::post_bytes(cluster.address(), COMPLETIONS, body.as_bytes());
    beside_a_witness(&cluster, || {
        let mut waiting = Vec::new();
        for sent in [0, 1, 20, whole.len() - body.len(), whole.len() - 1] {
            // Some stay, some go away.
            for stays in [true, false] {
                let mut socket = http::connect(cluster.address()).expect("a connection");
                socket.write_all(&whole[..sent]).expect("a part");
                if stays {
                    waiting.push(socket);
                }
            }
        }
        // A body that ends early is told so.
        let answer = http::raw_half_closed(cluster.address(), &whole[..whole.len() - 1]);
        if let Ok(answer) = answer {
            check_envelope("a body that ends early", &answer, 400);
        }
        for _ in 0..8 {
            drop(cluster.stream(COMPLETIONS, &serde_json::from_str(&body).expect("JSON")));
        }
    });
    eventually("nothing runs any more", Duration::from_secs(5), || {
        cluster.metric("vllm:num_requests_running") + cluster.metric("vllm:num_requests_waiting") == 0.0
    });
    assert_no_panic(&cluster);
}

/// A copy of the demo model, changed by `change`, and the temporary directory that it lies in.
fn broken_model(change: impl FnOnce(&Path)) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let model = directory.path().join("broken");
    fs::create_dir(&model).expect("a directory");
    let demo = shared::workspace().join("crates/model/demo");
    for file in [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        fs::copy(demo.join(file), model.join(file)).expect("a copy");
    }
    change(&model);
    (directory, model)
}

/// `up` must end by itself, with an error that contains all of `parts`.
#[track_caller]
fn refused(args: &[&str], environment: &[(&str, &str)], parts: &[&str]) -> Ended {
    let state = tempfile::tempdir().expect("a temporary directory");
    let listen = format!("127.0.0.1:{}", cluster::free_port());
    let mut all = vec!["up"];
    for (name, value) in [("--state", state.path().to_string_lossy().into_owned()), ("--listen", listen)] {
        if !args.contains(&name) {
            all.extend([name, String::leak(value)]);
        }
    }
    all.extend(args);
    let ended = run_to_end(&all, environment, START_LIMIT);
    assert_clear(&ended, parts);
    ended
}

#[track_caller]
fn assert_clear(ended: &Ended, parts: &[&str]) {
    let code = ended.status.unwrap_or_else(|| panic!("does not end:\n{}", ended.said)).code();
    assert!(code.is_some_and(|code| code != 0), "ends with {code:?}:\n{}", ended.said);
    for part in parts {
        assert!(ended.said.contains(part), "does not say {part:?}:\n{}", ended.said);
    }
    assert!(!ended.said.contains("panicked at"), "{}", ended.said);
}

/// `up` keeps running; `/ready` answers 503 with all of `parts`, requests the same as an error.
#[track_caller]
fn not_ready(args: &[&str], parts: &[&str]) {
    let cluster = Cluster::launch(args);
    let says = |text: String| parts.iter().all(|part| text.contains(part));
    eventually(&format!("/ready says {parts:?}"), START_LIMIT, || {
        http::get(cluster.address(), "/ready").is_ok_and(|answer| answer.status == 503 && says(answer.text()))
    });
    let answer = cluster.post(COMPLETIONS, &json!({"prompt": "x"}));
    check_envelope("a request", &answer, 503);
    assert!(answer.header("retry-after").is_some());
    assert_no_panic(&cluster);
}

#[test]
fn missing_weights_are_named() {
    let (_directory, model) =
        broken_model(|model| fs::remove_file(model.join("model.safetensors")).expect("removed"));
    refused(&["--model", &model.to_string_lossy()], &[], &["no model.safetensors", &model.to_string_lossy()]);
}

#[test]
fn a_missing_tokenizer_is_named() {
    let (_directory, model) =
        broken_model(|model| fs::remove_file(model.join("tokenizer.json")).expect("removed"));
    refused(
        &["--model", &model.to_string_lossy()],
        &[],
        &["tokenizer.json is missing", &model.to_string_lossy()],
    );
}

#[test]
fn a_malformed_model_configuration_is_named() {
    let (_directory, model) =
        broken_model(|model| fs::write(model.join("config.json"), "{").expect("written"));
    refused(&["--model", &model.to_string_lossy()], &[], &["config.json"]);
}

#[test]
fn a_corrupt_weights_header_is_named_and_nothing_is_served() {
    let (_directory, model) = broken_model(|model| {
        let file = model.join("model.safetensors");
        let mut bytes = fs::read(&file).expect("weights");
        bytes[8..72].fill(0xff);
        fs::write(file, bytes).expect("written");
    });
    not_ready(
        &["--model", &model.to_string_lossy()],
        &["model.safetensors is corrupt", "header", "fetch it again"],
    );
}

#[test]
fn truncated_weights_are_named_with_tensor_and_offset() {
    let (_directory, model) = broken_model(|model| {
        let file = fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).expect("weights");
        file.set_len(3_000_000).expect("truncated");
    });
    not_ready(
        &["--model", &model.to_string_lossy()],
        &[
            "model.safetensors is corrupt",
            "tensor `model.",
            "ends at byte",
            "3000000 (truncated)",
            "fetch it again",
        ],
    );
}

#[test]
fn a_model_that_does_not_fit_is_answered_with_what_is_missing() {
    not_ready(&["--memory", "1MiB"], &["does not fit", "1.00 MiB", "missing at", "add a node"]);
}

#[test]
fn unknown_keys_are_refused_by_every_role_with_the_line() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("role.toml");
    fs::write(&file, "\nmodle = \"x\"\n").expect("written");
    let file = file.to_string_lossy();
    for role in ["gateway", "scheduler", "node"] {
        let ended = run_to_end(&[role, "--config", &file], &[], START_LIMIT);
        assert_clear(&ended, &[&format!("{file}:2: unknown key `modle`; did you mean `model`?")]);
        let ended = run_to_end(&[role, "--config", "/nowhere/role.toml"], &[], START_LIMIT);
        assert_clear(&ended, &["/nowhere/role.toml"]);
    }
    refused(&["--set", "max_num_sequences=4"], &[], &["unknown key `max_num_sequences`", "max_num_seqs"]);
    refused(&["--set", "max_num_seqs=0"], &[], &["max_num_seqs must be at least 1"]);
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    refused(&["--listen", &address], &[], &["cannot listen on", &address, "--listen"]);
}

#[test]
fn none_of_something_is_refused() {
    for flag in ["--stages", "--tp", "--replicas", "--nodes", "--threads"] {
        refused(&[flag, "0"], &[], &[flag, "1..=1024"]);
    }
}

#[test]
fn a_state_directory_in_use_is_named() {
    let cluster = Cluster::demo();
    let state = cluster.state();
    refused(&["--state", &state.to_string_lossy()], &[], &["in use by another", "--state"]);
    assert_eq!(cluster.get("/ready").status, 200, "the first is not disturbed");
}

#[test]
fn a_model_that_is_neither_here_nor_in_the_cache_is_named() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let home = home.path().to_string_lossy();
    let offline = [("HF_HUB_OFFLINE", "1"), ("HF_HOME", &*home)];
    refused(&["--model", "no-such/model"], &offline, &["`no-such/model`", "HF_HUB_OFFLINE"]);
    refused(&["--model", "./no-such-directory"], &offline, &["`./no-such-directory`", "model directory"]);
}
