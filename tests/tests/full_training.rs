//! All weights through the whole cluster: a job from the command line, its files on disk, a cluster that serves them.

use ashlar_tests::tuning::{JOB_LIMIT, examples};
use ashlar_tests::{Cluster, http, processes, run_to_end, wait};
use serde_json::{Value, json};
use std::path::Path;

fn ask(cluster: &Cluster) -> String {
    let body = json!({"prompt": "Double every letter of stone.", "max_tokens": 16, "temperature": 0, "logprobs": 5, "logit_bias": {"258": -100}});
    cluster.post("/v1/completions", &body).ok()["choices"].to_string()
}

/// Trains with `ashlar tune` and leaves the model in `directory`.
fn tune(cluster: &Cluster, file: &Path, directory: &Path, more: &[&str]) {
    let url = format!("http://{}", cluster.address());
    let (file, directory) = (file.to_str().expect("a path"), directory.to_str().expect("a path"));
    let mut args = vec!["tune", file, "--url", &url, "--full", "--download", directory, "--seed", "7"];
    args.extend(["--epochs", "2", "--batch-size", "8", "--lr", "1e-3"]);
    args.extend(more);
    let ended = run_to_end(&args, &[], JOB_LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}\n{}", ended.said, cluster.said());
}

#[test]
fn a_model_trained_whole_is_the_same_files_on_every_layout_and_after_a_death_and_can_be_served() {
    let made = tempfile::tempdir().expect("a directory");
    let file = made.path().join("train.jsonl");
    std::fs::write(&file, examples(48)).expect("a file");
    let weights =
        |name: &str| std::fs::read(made.path().join(name).join("model.safetensors")).expect("weights");

    let cluster = Cluster::start(&["--stages", "1"]);
    let before = ask(&cluster);
    tune(&cluster, &file, &made.path().join("one"), &[]);
    tune(&cluster, &file, &made.path().join("random"), &["--init", "random"]);
    assert_eq!(ask(&cluster), before, "the model that is served does not move");
    let jobs = cluster.get("/v1/fine_tuning/jobs").ok();
    // Both may have come in the same second: then either may be the first of the list.
    let of_model = |job: &&Value| job["ashlar"]["init"] == "model";
    let job = jobs["data"].as_array().and_then(|jobs| jobs.iter().find(of_model)).expect("the first job");
    assert_eq!((&job["status"], &job["fine_tuned_model"]), (&json!("succeeded"), &json!(null)));
    assert_eq!(job["ashlar"]["full"], true);
    drop(cluster);

    let cluster = Cluster::start(&["--stages", "2", "--tp", "2"]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let started = || {
                let jobs = http::get(cluster.address(), "/v1/fine_tuning/jobs").ok();
                let steps = |answer: http::Answer| answer.json()["data"][0]["ashlar"]["steps"].as_u64();
                jobs.filter(|answer| answer.status == 200).and_then(steps).is_some_and(|steps| steps >= 2)
            };
            wait::eventually("two steps", JOB_LIMIT, started);
            assert!(processes::signal(cluster.pid("node-1"), "KILL"));
        });
        tune(&cluster, &file, &made.path().join("four"), &[]);
    });
    drop(cluster);
    assert!(weights("one") == weights("four"), "the same weights on one rank and on four, one of which died");
    assert!(weights("one") != weights("random"));

    let served =
        Cluster::start(&["--model", made.path().join("one").to_str().expect("a path"), "--stages", "1"]);
    assert_ne!(ask(&served), before);
}
