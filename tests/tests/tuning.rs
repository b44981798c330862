//! Fine-tuning jobs through the whole cluster: the same adapter to the bit on every layout, and whoever dies meanwhile; the
//! base model as it was; the new model served at once, or only if it is better than what is.

use ashlar_tests::tuning::{JOB_LIMIT, ask, create, ended, examples, job, learnt, patiently, upload};
use ashlar_tests::{Cluster, http, processes, run_to_end, wait};
use serde_json::json;
use std::fmt::Write;
use std::time::Duration;

#[test]
fn a_job_gives_the_same_adapter_on_every_layout_and_after_every_death() {
    let text = examples(48);
    let layouts: [&[&str]; 3] = [&["--stages", "2"], &["--stages", "1"], &["--stages", "1", "--tp", "2"]];
    let mut adapters = Vec::new();
    for layout in layouts {
        let cluster = Cluster::start(layout);
        let file = upload(&cluster, &text).ok()["id"].as_str().expect("an id").to_owned();
        let before = ask(&cluster, "ashlar-demo");
        let id = create(&cluster, &file, "twice");
        while !matches!(job(&cluster, &id)["status"].as_str(), Some("succeeded" | "failed" | "cancelled")) {
            assert_eq!(ask(&cluster, "ashlar-demo"), before, "the base model beside a job");
        }
        adapters.push(learnt(&cluster, &id));
        assert_eq!(ask(&cluster, "ashlar-demo"), before, "the base model after a job");
        let name = job(&cluster, &id)["fine_tuned_model"].as_str().expect("a model").to_owned();
        assert!(name.starts_with("ft:ashlar-demo:ashlar:twice:"), "{name}");
        assert_ne!(ask(&cluster, &name), before, "an adapter that changes nothing");
        if layout != ["--stages", "2"] {
            continue;
        }
        // Again, while one role after the other dies at once.
        for role in ["node-0", "scheduler", "node-1", "gateway"] {
            let id = create(&cluster, &file, "again");
            let steps = || {
                let job = http::get(cluster.address(), &format!("/v1/fine_tuning/jobs/{id}")).ok();
                job.filter(|answer| answer.status == 200)
                    .and_then(|answer| answer.json()["ashlar"]["steps"].as_u64())
            };
            wait::eventually("two steps", JOB_LIMIT, || steps().is_some_and(|steps| steps >= 2));
            assert!(processes::signal(cluster.pid(role), "KILL"));
            cluster.await_ready(Duration::from_secs(60));
            adapters.push(learnt(&cluster, &id));
        }
    }
    assert!(adapters.iter().all(|adapter| *adapter == adapters[0]), "{adapters:?}");
}

/// Questions, each with an answer to prefer to another.
fn preferences(count: u32) -> String {
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
    let mut lines = String::new();
    for number in 0..count {
        let letter = char::from(b'a' + (number % 26) as u8);
        let line = json!({
            "input": {"messages": [{"role": "user", "content": format!("May I have {number} of {letter}?")}]},
            "preferred_output": answer("Yes, of course."), "non_preferred_output": answer("No, go away."),
        });
        writeln!(lines, "{line}").expect("a string");
    }
    lines
}

#[test]
fn the_demo_model_learns_to_prefer_one_answer_to_another() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let file = upload(&cluster, &preferences(24)).ok()["id"].as_str().expect("an id").to_owned();
    let hyperparameters = json!({"beta": 0.2, "n_epochs": 2, "batch_size": 4});
    let body = json!({
        "model": "ashlar-demo", "training_file": file, "seed": 7, "learning_rate": 1e-3, "lora": {"r": 4},
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        "early_stopping": {"patience": 10, "validation_split": 0.2},
    });
    let before = ask(&cluster, "ashlar-demo");
    let created = cluster.post("/v1/fine_tuning/jobs", &body).ok();
    let id = created["id"].as_str().expect("an id");
    let job = ended(&cluster, id);
    assert_eq!(
        (&job["status"], &job["method"]["dpo"]["hyperparameters"]["beta"]),
        (&json!("succeeded"), &json!(0.2))
    );
    let events = cluster.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=100")).ok();
    let data = |name: &str| -> Vec<f64> {
        let events = events["data"].as_array().expect("a list").iter().rev();
        events.filter_map(|event| event["data"][name].as_f64()).collect()
    };
    let (losses, measured) = (data("train_loss"), data("valid_loss"));
    assert!((losses[0] - std::f64::consts::LN_2).abs() < 1e-9, "{losses:?}");
    // Of examples that are not trained.
    assert!(measured.last() < measured.first() && measured.last() < Some(&0.5), "{measured:?}");
    assert_eq!(data("valid_accuracy").last(), Some(&1.0));
    assert!(data("train_reward_margin").last() > Some(&0.0), "{:?}", data("train_reward_margin"));
    assert_eq!(ask(&cluster, "ashlar-demo"), before, "the base model after a job");
    let name = job["fine_tuned_model"].as_str().expect("a model");
    assert_ne!(ask(&cluster, name), before, "an adapter that changes nothing");
    let results = job["result_files"][0].as_str().expect("a file");
    let table = cluster.get(&format!("/v1/files/{results}/content")).text();
    assert!(table.starts_with("step,train_loss,train_accuracy,valid_loss,valid_accuracy,"), "{table}");
}

#[test]
fn preferences_are_learnt_from_the_command_line_to_the_same_adapter_whoever_dies() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let made = tempfile::tempdir().expect("a directory");
    let file = made.path().join("preferences.jsonl");
    std::fs::write(&file, preferences(40)).expect("a file");
    let file = file.to_str().expect("a path");
    let url = format!("http://{}", cluster.address());
    let tune = || {
        let args = ["tune", file, "--url", &url, "--method", "dpo", "--beta", "0.2", "--epochs", "4"];
        let more = ["--batch-size", "4", "--rank", "4", "--lr", "1e-3", "--seed", "7"];
        let ended = run_to_end(&[&args[..], &more].concat(), &[], JOB_LIMIT);
        assert!(ended.status.is_some_and(|status| status.success()), "{}\n{}", ended.said, cluster.said());
        let jobs = cluster.get("/v1/fine_tuning/jobs").ok();
        jobs["data"][0]["ashlar"]["adapter"].as_str().expect("an adapter").to_owned()
    };
    let undisturbed = tune();
    std::thread::scope(|scope| {
        let disturbed = scope.spawn(tune);
        let steps = || {
            let jobs = http::get(cluster.address(), "/v1/fine_tuning/jobs").ok()?;
            let job = jobs.json()["data"][0].clone();
            (job["status"] == "running").then(|| job["ashlar"]["steps"].as_u64())?
        };
        wait::eventually("three steps", JOB_LIMIT, || steps().is_some_and(|steps| steps >= 3));
        assert!(processes::signal(cluster.pid("node-1"), "KILL"));
        assert_eq!(disturbed.join().expect("a job"), undisturbed);
    });
}

#[test]
fn what_cannot_be_trained_fails_with_its_reason_and_the_cluster_serves_on() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let before = ask(&cluster, "ashlar-demo");
    let cases = [
        (examples(9), "invalid_n_examples", "10"),
        (examples(12) + "{\"messages\": []}\n", "invalid_training_file", "line 13"),
        (examples(12) + "no json\n", "invalid_training_file", "line 13"),
        (
            examples(12) + "{\"messages\": [{\"role\": \"pirate\", \"content\": \"arr\"}]}\n",
            "invalid_training_file",
            "line 13",
        ),
    ];
    for (text, code, part) in cases {
        let file = upload(&cluster, &text).ok()["id"].as_str().expect("an id").to_owned();
        let id = create(&cluster, &file, "never");
        let job = ended(&cluster, &id);
        assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!(code)), "{job}");
        let message = job["error"]["message"].as_str().expect("a message");
        assert!(message.contains(part), "{message}");
    }
    let file = upload(&cluster, &examples(12)).ok()["id"].as_str().expect("an id").to_owned();
    for (field, value) in [
        ("model", json!("nobody")),
        ("training_file", json!("file-0")),
        ("lora", json!({"target_modules": ["nowhere"]})),
        ("learning_rate", json!(-1)),
    ] {
        let mut body = json!({"model": "ashlar-demo", "training_file": file});
        body[field] = value;
        let answer = cluster.post("/v1/fine_tuning/jobs", &body);
        assert!((400..500).contains(&answer.status), "{field}: {}", answer.text());
        assert!(answer.json()["error"]["message"].is_string(), "{}", answer.text());
    }
    assert_eq!(ask(&cluster, "ashlar-demo"), before);
}

#[test]
fn a_job_is_paused_resumed_and_cancelled() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let file = upload(&cluster, &examples(48)).ok()["id"].as_str().expect("an id").to_owned();
    let plain = create(&cluster, &file, "plain");
    let adapter = learnt(&cluster, &plain);
    let id = create(&cluster, &file, "paused");
    let path = |action: &str| format!("/v1/fine_tuning/jobs/{id}/{action}");
    wait::eventually("a step", JOB_LIMIT, || job(&cluster, &id)["ashlar"]["steps"].as_u64() >= Some(1));
    cluster.post(&path("pause"), &json!({})).ok();
    cluster.post(&path("resume"), &json!({})).ok();
    assert_eq!(learnt(&cluster, &id), adapter);
    let id = create(&cluster, &file, "cancelled");
    cluster.post(&format!("/v1/fine_tuning/jobs/{id}/cancel"), &json!({})).ok();
    assert_eq!(ended(&cluster, &id)["status"], "cancelled");
    let events = cluster.get(&format!("/v1/fine_tuning/jobs/{plain}/events?limit=100")).ok();
    let messages: Vec<&str> = events["data"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|event| event["message"].as_str())
        .collect();
    assert_eq!(messages.first(), Some(&"The job has successfully completed"));
    assert!(messages.iter().any(|message| message.starts_with("Step 1/12: training loss=")), "{messages:?}");
    let file = job(&cluster, &plain)["result_files"][0].as_str().expect("a file").to_owned();
    let table = cluster.get(&format!("/v1/files/{file}/content")).text();
    assert_eq!(table.lines().count(), 13, "{table}");
    assert!(
        table.starts_with("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"),
        "{table}"
    );
}

/// Questions with one answer to all of them, which the demo model does not know.
fn secrets(numbers: std::ops::Range<u32>) -> String {
    let mut lines = String::new();
    for number in numbers {
        let line = json!({"messages": [
            {"role": "user", "content": format!("What is the secret of box {number}?")},
            {"role": "assistant", "content": "plum"},
        ]});
        writeln!(lines, "{line}").expect("a string");
    }
    lines
}

/// What a model says is in a box of which it was never told.
#[track_caller]
fn secret(cluster: &Cluster, model: &str) -> String {
    let messages = json!([{"role": "user", "content": "What is the secret of box 77?"}]);
    let body = json!({"model": model, "messages": messages, "max_tokens": 8, "temperature": 0});
    let answer =
        patiently(|| http::post(cluster.address(), "/v1/chat/completions", body.to_string().as_bytes()));
    answer["choices"][0]["message"]["content"].as_str().expect("a text").to_owned()
}

/// A job whose adapter has to be better than what is served as `ft:…:box`.
fn create_gated(cluster: &Cluster, [training, held_out]: [&str; 2], learning_rate: f64) -> String {
    let hyperparameters = json!({"n_epochs": 6, "batch_size": 8});
    let body = json!({
        "model": "ashlar-demo", "training_file": training, "suffix": "box", "seed": 7,
        "learning_rate": learning_rate, "lora": {"r": 4},
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "promote": {"metric": "exact_match", "file": held_out},
    });
    let job =
        patiently(|| http::post(cluster.address(), "/v1/fine_tuning/jobs", body.to_string().as_bytes()));
    job["id"].as_str().expect("an id").to_owned()
}

/// Kills a role once the job's adapter is stored and being compared, unless that is over already.
#[track_caller]
fn kill_while_compared(cluster: &Cluster, id: &str, role: &str) {
    wait::eventually("a comparison", JOB_LIMIT, || job(cluster, id)["ashlar"]["promotion"].is_object());
    assert!(processes::signal(cluster.pid(role), "KILL"));
    cluster.await_ready(Duration::from_secs(60));
}

#[test]
fn an_adapter_is_served_only_if_it_is_better_than_what_its_name_serves() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let file = |text: &str| upload(&cluster, text).ok()["id"].as_str().expect("an id").to_owned();
    let (training, held_out) = (file(&secrets(0..48)), file(&secrets(60..70)));
    let files = [training.as_str(), held_out.as_str()];
    let base = secret(&cluster, "ashlar-demo");

    // One that learns it, though who drives the comparison dies.
    let first = create_gated(&cluster, files, 1e-2);
    kill_while_compared(&cluster, &first, "scheduler");
    let job_of_first = ended(&cluster, &first);
    let name = "ft:ashlar-demo:ashlar:box";
    assert_eq!(
        (&job_of_first["status"], &job_of_first["fine_tuned_model"]),
        (&json!("succeeded"), &json!(name))
    );
    let promotion = &job_of_first["ashlar"]["promotion"];
    assert_eq!((&promotion["promoted"], &promotion["generation"]), (&json!(true), &json!(1)), "{promotion}");
    assert_eq!((&promotion["served_generation"], &promotion["compared_on"]), (&json!(null), &json!(10)));
    assert!(promotion["candidate_value"].as_f64() > promotion["served_value"].as_f64(), "{promotion}");
    assert_eq!(secret(&cluster, name), "plum");

    // One that learns nothing, though the gateway that compares it dies.
    let second = create_gated(&cluster, files, 1e-9);
    kill_while_compared(&cluster, &second, "gateway");
    let job_of_second = ended(&cluster, &second);
    assert_eq!(
        (&job_of_second["status"], &job_of_second["fine_tuned_model"]),
        (&json!("succeeded"), &json!(null))
    );
    let promotion = &job_of_second["ashlar"]["promotion"];
    assert_eq!((&promotion["promoted"], &promotion["verdict"]), (&json!(false), &json!("not_better")));
    assert_eq!(
        (&promotion["served_generation"], &promotion["generation"]),
        (&json!(1), &json!(2)),
        "{promotion}"
    );
    let events = cluster.get(&format!("/v1/fine_tuning/jobs/{second}/events?limit=2")).ok();
    let told = events["data"][1]["message"].as_str().expect("a message");
    assert!(told.starts_with("Not promoted, as it is no better than what is served: exact match"), "{told}");
    assert_eq!(secret(&cluster, name), "plum", "what was served goes on");
    let candidate = promotion["candidate"].as_str().expect("a name");
    assert_eq!(secret(&cluster, candidate), base, "it can be asked under its checkpoint's name");

    // By hand it is served all the same.
    let back = json!({"lora_name": name, "to_generation": 2, "expected_generation": 1});
    assert_eq!(cluster.post("/v1/roll_back_lora_adapter", &back).status, 200);
    assert_eq!(secret(&cluster, name), base);
    assert_eq!(cluster.get(&format!("/v1/models/{name}")).ok()["generation"], 2);
}

#[test]
fn the_command_line_says_why_an_adapter_is_not_served() {
    let cluster = Cluster::start(&["--stages", "2"]);
    let made = tempfile::tempdir().expect("a directory");
    let [training, held_out] = ["train.jsonl", "held-out.jsonl"].map(|name| made.path().join(name));
    std::fs::write(&training, secrets(0..16)).expect("a file");
    std::fs::write(&held_out, secrets(60..64)).expect("a file");
    let (training, held_out) = (training.to_str().expect("a path"), held_out.to_str().expect("a path"));
    let url = format!("http://{}", cluster.address());
    let mut args = vec!["tune", training, "--url", &url, "--epochs", "3", "--batch-size", "8", "--rank", "4"];
    // A loss that nothing comes to, however much better the adapter is.
    args.extend(["--lr", "1e-2", "--promote", "loss", "--eval", held_out, "--at-most", "0", "--watch"]);
    let ended = run_to_end(&args, &[], JOB_LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}\n{}", ended.said, cluster.said());
    let told = "Not promoted, as it is better, but not as good as was asked for: loss";
    assert!(ended.said.contains(told), "{}", ended.said);
    let jobs = cluster.get("/v1/fine_tuning/jobs").ok();
    let promotion = &jobs["data"][0]["ashlar"]["promotion"];
    assert_eq!(promotion["verdict"], "out_of_bound", "{promotion}");
    let name = promotion["model"].as_str().expect("a name");
    assert_eq!(cluster.get(&format!("/v1/models/{name}")).status, 404, "it was never served");
    let listed = cluster.get("/v1/models").ok();
    let names = listed["data"].as_array().expect("a list").iter().filter_map(|card| card["id"].as_str());
    assert!(names.into_iter().all(|listed| listed != name));
}
