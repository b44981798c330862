//! Fine-tuning jobs through the whole cluster: the same adapter to the bit on every layout, and whoever dies meanwhile; the
//! base model as it was; the new model served at once.

use ashlar_tests::tuning::{JOB_LIMIT, ask, create, ended, examples, job, learnt, upload};
use ashlar_tests::{Cluster, http, processes, wait};
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
