//! What goes wrong with fine-tuning, and what of it anybody else notices: files that cannot be used, clients that leave, numbers
//! that are none, disks that are full. Each gets a clear answer, and the cluster serves on.

use ashlar_tests::tuning::{
    ask, create, create_with, ended, events, examples, job, learnt, upload, upload_bytes, upload_head,
    upload_request, uploaded,
};
use ashlar_tests::{Cluster, Event, eventually, http, run_to_end, tuning, wait};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::Duration;

const BASE: &str = "ashlar-demo";
const LIMIT: Duration = Duration::from_secs(30);
/// A disk that has room for a job beside the 256 MiB that the blob store leaves free.
const SMALL_DISK_BYTES: u64 = 384 << 20;

/// A file of twelve good examples with this line at the end.
fn with_line(line: &[u8]) -> Vec<u8> {
    [examples(12).as_bytes(), line, b"\n"].concat()
}

/// The message of an error object that is whole.
#[track_caller]
fn message(error: &Value) -> &str {
    for field in ["code", "message", "param"] {
        assert!(error.get(field).is_some(), "no `{field}`: {error}");
    }
    error["message"].as_str().unwrap_or_else(|| panic!("no message: {error}"))
}

#[test]
fn a_file_that_cannot_be_trained_fails_its_job_with_the_line_and_the_reason() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let before = ask(&cluster, BASE);
    let line = |value: Value| with_line(value.to_string().as_bytes());
    let chat = |messages: Value| line(json!({"messages": messages}));
    let user = json!({"role": "user", "content": "Hello?"});
    let long = "x".repeat((8 << 20) + 1);
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (examples(9).into_bytes(), "invalid_n_examples", "10"),
        (b"\n\n".to_vec(), "invalid_n_examples", "0"),
        (with_line(b"no json"), "invalid_training_file", "line 13: the line is not valid JSON"),
        (with_line(b"{\"messages\": ["), "invalid_training_file", "line 13: the line is not valid JSON"),
        (
            with_line(b"{\"messages\": \"\xff\xfe\"}"),
            "invalid_training_file",
            "line 13: the line is not UTF-8",
        ),
        (with_line(b"[1, 2]"), "invalid_training_file", "line 13: the line is an array"),
        (line(json!({"question": "?"})), "invalid_training_file", "line 13: the example has none of"),
        (line(json!({"text": "of another form"})), "invalid_training_file", "a file must keep to one format"),
        (line(json!({"messages": "hello"})), "invalid_training_file", "`messages` must be"),
        (chat(json!([])), "invalid_training_file", "line 13"),
        (chat(json!([user])), "invalid_training_file", "no assistant message"),
        (chat(json!([{"role": "assistant", "content": "Hi."}])), "invalid_training_file", "no user message"),
        (
            chat(json!([{"role": "pirate", "content": "arr"}])),
            "invalid_training_file",
            "`messages[0].role` must be",
        ),
        (
            chat(json!([user, {"role": "assistant", "content": 7}])),
            "invalid_training_file",
            "messages[1].content",
        ),
        (
            chat(json!([user, {"role": "assistant", "content": "Hi.", "weight": 2}])),
            "invalid_training_file",
            "messages[1].weight",
        ),
        (
            chat(json!([user, {"role": "assistant", "content": "Hi.", "weight": 0}])),
            "invalid_training_file",
            "every assistant message has weight 0",
        ),
        // What stands before the answer leaves no room for it.
        (
            chat(
                json!([{"role": "user", "content": "long ".repeat(1000)}, {"role": "assistant", "content": "Hi."}]),
            ),
            "invalid_training_file",
            "no token to learn is left",
        ),
        (
            line(json!({"messages": [user, {"role": "assistant", "content": long}]})),
            "invalid_training_file",
            "line 13: the line is longer than",
        ),
    ];
    for (bytes, code, part) in cases {
        let file = upload_bytes(&cluster, &bytes).ok()["id"].as_str().expect("an id").to_owned();
        let id = create(&cluster, &file, "never");
        let job = ended(&cluster, &id);
        assert_eq!(job["status"], "failed", "{part}: {job}");
        let error = &job["error"];
        assert!(message(error).contains(part), "{part}: {error}");
        assert_eq!((&error["code"], &error["param"]), (&json!(code), &json!("training_file")), "{error}");
        assert_eq!((&job["fine_tuned_model"], &job["trained_tokens"]), (&json!(null), &json!(0)), "{job}");
        let last = events(&cluster, &id).pop().expect("an event");
        assert_eq!(last["level"], "error", "{last}");
        // Nothing of what a line says is shown, only where it is.
        assert!(!last.to_string().contains("pirate"), "{last}");
    }
    assert_eq!(ask(&cluster, BASE), before);
}

#[test]
fn what_no_job_can_be_is_refused_when_it_is_asked_for() {
    let cluster = Cluster::start(&["--stages", "1"]);
    let file = uploaded(&cluster, &examples(12));
    let refused = |fields: Value, status: u16, param: &str| {
        let mut body = json!({"model": BASE, "training_file": file});
        for (name, value) in fields.as_object().expect("an object") {
            body[name] = value.clone();
        }
        let answer = cluster.post("/v1/fine_tuning/jobs", &body);
        let error = &answer.json()["error"];
        assert_eq!((answer.status, &error["param"]), (status, &json!(param)), "{fields}: {error}");
        assert!(!message(error).is_empty(), "{error}");
    };
    let supervised =
        |hyper: Value| json!({"method": {"type": "supervised", "supervised": {"hyperparameters": hyper}}});
    refused(json!({"model": "nobody"}), 404, "model");
    refused(json!({"model": 7}), 400, "model");
    refused(json!({"training_file": "file-0"}), 400, "training_file");
    refused(json!({"training_file": format!("file-{}", "0".repeat(32))}), 400, "training_file");
    refused(json!({"lora": {"target_modules": ["nowhere"]}}), 400, "lora.target_modules");
    refused(json!({"lora": {"target_modules": []}}), 400, "lora.target_modules");
    refused(json!({"lora": {"r": 0}}), 400, "lora.r");
    refused(json!({"lora": {"r": 1_000_000}}), 400, "lora.r");
    refused(json!({"learning_rate": -1}), 400, "learning_rate");
    refused(json!({"max_seq_len": 1_000_000}), 400, "max_seq_len");
    refused(json!({"full": true, "lora": {"r": 4}}), 400, "lora");
    refused(json!({"method": {"type": "magic"}}), 400, "method.type");
    refused(supervised(json!({"n_epochs": 0})), 400, "method.supervised.hyperparameters.n_epochs");
    refused(supervised(json!({"batch_size": "all"})), 400, "method.supervised.hyperparameters.batch_size");
    let jobs = cluster.get("/v1/fine_tuning/jobs").ok();
    assert_eq!(jobs["data"], json!([]), "nothing is left of them");
    let body = |purpose: &str, file: &str| format!("{}{file}\r\n--edge--\r\n", upload_head(purpose));
    for (body, what) in [
        (body("assistants", &examples(12)), "purpose"),
        (body("fine-tune", ""), "file"),
        ("--edge\r\nno form".to_owned(), ""),
    ] {
        let answer =
            http::raw(cluster.address(), &upload_request(&cluster, body.as_bytes())).expect("an answer");
        assert_eq!(answer.status, 400, "{}", answer.text());
        let error = &answer.json()["error"];
        assert!(what.is_empty() || error["param"] == what, "{error}");
        assert!(!message(error).is_empty(), "{error}");
    }
    assert_eq!(cluster.get("/v1/files").ok()["data"].as_array().map(Vec::len), Some(1));
}

/// Files that are being written to the blob store.
fn incoming(cluster: &Cluster) -> usize {
    fs::read_dir(cluster.state().join("blobs/incoming")).expect("a directory").count()
}

#[test]
fn clients_that_leave_in_the_middle_of_an_upload_leave_nothing_behind() {
    let cluster = Cluster::start(&["--stages", "1"]);
    let body = format!("{}{}", upload_head("fine-tune"), examples(4000));
    let request = upload_request(&cluster, body.as_bytes());
    // More of them than there are places for uploads.
    for client in 0..20 {
        let mut socket = http::connect(cluster.address()).expect("a connection");
        let sent = request.len() * (client + 1) / 24;
        socket.write_all(&request[..sent]).expect("a part of an upload");
        drop(socket);
    }
    // One that closes in order, but before what it has announced; 429 while the places of the others are not free yet.
    let half = || http::raw_half_closed(cluster.address(), &request[..request.len() / 2]);
    eventually("a place for half an upload", LIMIT, || match half() {
        Ok(answer) if answer.status == 429 => false,
        Ok(answer) => {
            assert_eq!(answer.status, 400, "{}", answer.text());
            true
        }
        Err(_) => true,
    });
    eventually("no unfinished file", LIMIT, || incoming(&cluster) == 0);
    assert_eq!(cluster.get("/v1/files").ok()["data"], json!([]));
    eventually("a place for an upload", LIMIT, || upload(&cluster, &examples(12)).status == 200);
    let files = cluster.get("/v1/files").ok();
    assert_eq!(files["data"].as_array().map(Vec::len), Some(1), "{files}");
    assert_eq!(incoming(&cluster), 0);
}

#[test]
fn clients_that_stop_following_a_job_change_nothing() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let file = uploaded(&cluster, &examples(48));
    let alone = learnt(&cluster, &create(&cluster, &file, "alone"));
    let id = create(&cluster, &file, "followed");
    let path = format!("/v1/fine_tuning/jobs/{id}/events?stream=true");
    let mut stays = http::get_stream(cluster.address(), &path).expect("a stream");
    assert_eq!(stays.status, 200);
    for read in 0..12 {
        let mut leaves = http::get_stream(cluster.address(), &path).expect("a stream");
        for _ in 0..read % 4 {
            assert!(matches!(leaves.next_event(), Event::Data(_)));
        }
    }
    assert_eq!(learnt(&cluster, &id), alone);
    let mut seen = Vec::new();
    while let Event::Data(data) = stays.next_event() {
        let event: Value = serde_json::from_str(&data).expect("an event");
        seen.push(event["message"].as_str().expect("a message").to_owned());
    }
    assert_eq!(seen.last().map(String::as_str), Some("The job has successfully completed"), "{seen:?}");
    let steps = seen.iter().filter(|message| message.starts_with("Step ")).count();
    assert_eq!(steps, 12, "whoever stays misses nothing and hears nothing twice: {seen:?}");
}

#[test]
fn a_job_that_learns_far_too_fast_harms_nobody() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let before = ask(&cluster, BASE);
    let file = uploaded(&cluster, &examples(48));
    let alone = learnt(&cluster, &create(&cluster, &file, "alone"));
    // As fast as it may be asked for, and nothing holds it back.
    let hyperparameters = json!({"n_epochs": 4, "batch_size": 8, "learning_rate_multiplier": 1000});
    let with = json!({
        "seed": 7, "learning_rate": 1, "grad_clip": 0, "schedule": "constant", "lora": {"r": 16, "alpha": 4096},
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    });
    let job = ended(&cluster, &create_with(&cluster, BASE, &file, &with));
    match job["error"].is_null() {
        // A model that says nothing is what was asked for, as long as it is made of numbers.
        true => drop(ask(&cluster, job["fine_tuned_model"].as_str().expect("a model"))),
        false => assert!(message(&job["error"]).contains("learning rate"), "{job}"),
    }
    assert_eq!(ask(&cluster, BASE), before);
    assert_eq!(learnt(&cluster, &create(&cluster, &file, "again")), alone, "the next job is none the worse");
}

/// Writes a model of random weights whose embedding is no number for one token.
fn poisoned(directory: &Path, token: u64) -> std::path::PathBuf {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
    });
    let (shape, model) = (directory.join("shape.json"), directory.join("model"));
    fs::write(&shape, config.to_string()).expect("a file");
    let (shape, out) = (shape.to_string_lossy(), model.to_string_lossy());
    let made = run_to_end(&["synth", &shape, "--dtype", "f32", "--out", &out], &[], LIMIT);
    assert!(made.status.is_some_and(|status| status.success()), "{}", made.said);
    let path = model.join("model.safetensors");
    let mut file = fs::OpenOptions::new().read(true).write(true).open(path).expect("weights");
    let mut length = [0; 8];
    file.read_exact(&mut length).expect("a length");
    let length = u64::from_le_bytes(length);
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).expect("a header");
    let header: Value = serde_json::from_slice(&header).expect("JSON");
    let start = header["model.embed_tokens.weight"]["data_offsets"][0].as_u64().expect("an offset");
    file.seek(SeekFrom::Start(8 + length + start + token * 64 * 4)).expect("a place");
    file.write_all(&f32::NAN.to_le_bytes()).expect("a number");
    model
}

#[test]
fn a_sample_that_meets_a_poisoned_weight_costs_its_step_and_no_more() {
    let directory = tempfile::tempdir().expect("a directory");
    // The byte-level tokenizer's token of a byte is the byte.
    let model = poisoned(directory.path(), u64::from(b'~'));
    let cluster = Cluster::start(&["--stages", "2", "--model", &model.to_string_lossy()]);
    let name = cluster.get("/v1/models").ok()["data"][0]["id"].as_str().expect("a name").to_owned();
    let tokens =
        cluster.post("/tokenize", &json!({"model": name, "prompt": "~", "add_special_tokens": false})).ok();
    assert_eq!(tokens["tokens"], json!([u32::from(b'~')]), "{tokens}");
    let before = ask(&cluster, &name);
    let mut text = String::new();
    for number in 0..24 {
        let end = if number == 5 { "~" } else { "." };
        writeln!(text, "{}", json!({"text": format!("{number} times one is {number}{end}")}))
            .expect("a string");
    }
    let with = json!({
        "seed": 7, "lora": {"r": 4}, "learning_rate": 1e-3,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 6}}},
    });
    let id = create_with(&cluster, &name, &uploaded(&cluster, &text), &with);
    let job = ended(&cluster, &id);
    assert_eq!(job["status"], "succeeded", "{job}");
    let steps = |id: &str, skipped: bool| -> Vec<Value> {
        let of = |event: &Value| event["data"]["skipped"] == skipped;
        events(&cluster, id).into_iter().filter(of).collect()
    };
    let skipped = steps(&id, true);
    assert_eq!((skipped.len(), steps(&id, false).len()), (2, 6), "once per epoch: {skipped:?}");
    let said = skipped[0]["message"].to_string();
    assert!(said.contains("was no number") && said.contains("changed nothing"), "{said}");
    // Where every sample meets it, the job fails and says why.
    let poisoned: String = text.lines().map(|line| line.replace("\"}", "~\"}") + "\n").collect();
    let never = create_with(&cluster, &name, &uploaded(&cluster, &poisoned), &with);
    let failed = ended(&cluster, &never);
    assert_eq!((&failed["status"], &failed["error"]["code"]), (&json!("failed"), &json!("loss_not_finite")));
    assert!(message(&failed["error"]).contains("lower the learning rate"), "{failed}");
    let skipped = steps(&never, true);
    assert_eq!((skipped.len(), steps(&never, false).len()), (4, 0), "{skipped:?}");
    assert!(skipped.iter().all(|step| step["level"] == "warn"), "{skipped:?}");
    assert_eq!(ask(&cluster, &name), before, "the model that is served");
    let tuned = job["fine_tuned_model"].as_str().expect("a model");
    assert_ne!(ask(&cluster, tuned), before, "the other steps were taken");
}

#[test]
fn a_full_disk_pauses_the_job_with_its_reason_and_the_cluster_serves_on() {
    let test = "a_full_disk_pauses_the_job";
    let Some(cluster) = Cluster::start_on_small_disk(test, &["--stages", "2"], "blobs", SMALL_DISK_BYTES)
    else {
        return;
    };
    let before = ask(&cluster, BASE);
    let file = uploaded(&cluster, &examples(48));
    let undisturbed = learnt(&cluster, &create(&cluster, &file, "plain"));
    let id = create(&cluster, &file, "full");
    let path = |action: &str| format!("/v1/fine_tuning/jobs/{id}/{action}");
    tuning::until(&cluster, &id, "first step", |job| job["ashlar"]["steps"].as_u64() >= Some(1));
    cluster.post(&path("pause"), &json!({})).ok();
    let paused = tuning::until(&cluster, &id, "pause", |job| job["status"] == "paused");
    let steps = paused["ashlar"]["steps"].as_u64().expect("steps");
    assert!(steps < 12, "{paused}");
    let filler = cluster.fill_disk("blobs");
    cluster.post(&path("resume"), &json!({})).ok();
    let why = |event: &Value| event["message"].as_str().is_some_and(|message| message.contains("no room"));
    let told = || events(&cluster, &id).iter().any(why);
    eventually("the reason among the job's events", tuning::JOB_LIMIT, told);
    let paused = tuning::until(&cluster, &id, "second pause", |job| job["status"] == "paused");
    assert_eq!(paused["ashlar"]["steps"].as_u64(), Some(steps), "what it has learnt stays: {paused}");
    let shown = events(&cluster, &id).into_iter().find(why).expect("the reason").to_string();
    assert!(!shown.contains("blobs/"), "where files lie is the operator's business: {shown}");
    // Serving needs no disk, and what does is refused with a reason.
    assert_eq!(ask(&cluster, BASE), before);
    let answer = upload(&cluster, &examples(400));
    assert_eq!(answer.status, 507, "{}", answer.text());
    assert!(message(&answer.json()["error"]).contains("no room"), "{}", answer.text());
    let never = create(&cluster, &file, "never");
    let failed = ended(&cluster, &never);
    assert_eq!(
        (&failed["status"], &failed["error"]["code"]),
        (&json!("failed"), &json!("insufficient_storage"))
    );
    // With room again, it goes on from where it was, to the same bits.
    fs::remove_file(filler).expect("room");
    cluster.post(&path("resume"), &json!({})).ok();
    assert_eq!(learnt(&cluster, &id), undisturbed);
    assert_eq!(upload(&cluster, &examples(400)).status, 200);
}

#[test]
fn a_cluster_whose_whole_state_lies_on_a_full_disk_serves_on_and_recovers() {
    let test = "a_cluster_whose_whole_state_lies_on_a_full_disk";
    let Some(cluster) = Cluster::start_on_small_disk(test, &["--stages", "2"], ".", SMALL_DISK_BYTES) else {
        return;
    };
    let before = ask(&cluster, BASE);
    let file = uploaded(&cluster, &examples(48));
    let undisturbed = learnt(&cluster, &create(&cluster, &file, "plain"));
    let id = create(&cluster, &file, "full");
    let filler = cluster.fill_disk(".");
    assert_eq!(ask(&cluster, BASE), before);
    let answer = upload(&cluster, &examples(400));
    assert_eq!(answer.status, 507, "{}", answer.text());
    assert!(message(&answer.json()["error"]).contains("no room"), "{}", answer.text());
    // Records of jobs fill what the state file has left.
    let metadata: serde_json::Map<String, Value> =
        (0..16).map(|key| (key.to_string(), json!("x".repeat(500)))).collect();
    let body = json!({"model": BASE, "training_file": file, "metadata": metadata}).to_string();
    let create =
        || http::post(cluster.address(), "/v1/fine_tuning/jobs", body.as_bytes()).expect("an answer");
    let refused = wait::until(LIMIT, || Some(create()).filter(|answer| answer.status != 200));
    let refused = refused.expect("a store that is full");
    assert_eq!(refused.status, 503, "{}", refused.text());
    assert!(message(&refused.json()["error"]).contains("store"), "{}", refused.text());
    assert_eq!(ask(&cluster, BASE), before);
    fs::remove_file(filler).expect("room");
    // The job was still running, or it is paused; records that could not be written are written now.
    let resumed = || {
        let now = job(&cluster, &id);
        if now["status"] == "paused" {
            let path = format!("/v1/fine_tuning/jobs/{id}/resume");
            let _ = http::post(cluster.address(), &path, b"{}");
        }
        tuning::is_over(&now)
    };
    eventually("the end of the job", tuning::JOB_LIMIT, resumed);
    eventually("a store that takes records again", LIMIT, || create().status == 200);
    assert_eq!(learnt(&cluster, &id), undisturbed);
    assert_eq!(ask(&cluster, BASE), before);
}
