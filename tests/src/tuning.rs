//! Fine-tuning jobs as a client has them: files uploaded, jobs created, followed to their end.

use crate::cluster::Cluster;
use crate::{http, wait};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// A job of a few steps, on a machine that is busy with other tests.
pub const JOB_LIMIT: Duration = Duration::from_secs(240);

/// Words, and the same with every letter doubled: a chat per line.
pub fn examples(count: u32) -> String {
    let mut lines = String::new();
    for number in 0..count {
        let letter = |place: u32| char::from(b'a' + ((number * 7 + place * (number % 5 + 3)) % 26) as u8);
        let word: String = (0..3 + number % 4).map(letter).collect();
        let doubled: String = word.chars().flat_map(|c| [c, c]).collect();
        let line = json!({"messages": [
            {"role": "user", "content": format!("Double every letter of {word}.")},
            {"role": "assistant", "content": doubled},
        ]});
        writeln!(lines, "{line}").expect("a string");
    }
    lines
}

/// Words, doubled as they are to be, and as they are not: a preference per line.
pub fn preferences(count: u32) -> String {
    let mut lines = String::new();
    for (number, example) in examples(count).lines().enumerate() {
        let example: Value = serde_json::from_str(example).expect("JSON");
        let [question, answer] = [&example["messages"][0], &example["messages"][1]];
        let other = json!({"role": "assistant", "content": format!("I do not know {number}.")});
        let input = json!({"messages": [question]});
        let pair = json!({"input": input, "preferred_output": [answer], "non_preferred_output": [other]});
        writeln!(lines, "{pair}").expect("a string");
    }
    lines
}

/// The body of `POST /v1/files`, as a browser or a client library sends it, up to where the file begins.
pub fn upload_head(purpose: &str) -> String {
    format!(
        "--edge\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
         --edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\n\
         content-type: application/jsonl\r\n\r\n"
    )
}

/// A request of `POST /v1/files` with this body.
pub fn upload_request(cluster: &Cluster, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-type: multipart/form-data; \
         boundary=edge\r\ncontent-length: {}\r\n\r\n",
        cluster.address(),
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// Uploads a file for fine-tuning.
#[track_caller]
pub fn upload(cluster: &Cluster, text: &str) -> http::Answer {
    upload_bytes(cluster, text.as_bytes())
}

/// The same of bytes that need not be text.
#[track_caller]
pub fn upload_bytes(cluster: &Cluster, bytes: &[u8]) -> http::Answer {
    let body = [upload_head("fine-tune").as_bytes(), bytes, b"\r\n--edge--\r\n"].concat();
    http::raw(cluster.address(), &upload_request(cluster, &body)).expect("an answer")
}

/// The id of a file that is uploaded.
#[track_caller]
pub fn uploaded(cluster: &Cluster, text: &str) -> String {
    upload(cluster, text).ok()["id"].as_str().expect("an id").to_owned()
}

/// What is answered once nobody is away any more: a role that died a moment ago may not be missed yet.
#[track_caller]
pub fn patiently(ask: impl Fn() -> std::io::Result<http::Answer>) -> Value {
    let answer = wait::until(Duration::from_secs(60), || ask().ok().filter(|answer| answer.status != 503));
    answer.expect("an answer other than 503").ok()
}

/// Creates a job of two epochs over a file, and gives its id.
#[track_caller]
pub fn create(cluster: &Cluster, file: &str, suffix: &str) -> String {
    let with = json!({
        "suffix": suffix, "seed": 7, "learning_rate": 3e-3, "lora": {"r": 4},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
    });
    create_with(cluster, "ashlar-demo", file, &with)
}

/// Creates a job with these fields beside the model and the file, and gives its id.
#[track_caller]
pub fn create_with(cluster: &Cluster, model: &str, file: &str, with: &Value) -> String {
    let mut body = with.clone();
    body["model"] = json!(model);
    body["training_file"] = json!(file);
    let create = || http::post(cluster.address(), "/v1/fine_tuning/jobs", body.to_string().as_bytes());
    patiently(create)["id"].as_str().expect("an id").to_owned()
}

/// The job as it is.
#[track_caller]
pub fn job(cluster: &Cluster, id: &str) -> Value {
    patiently(|| http::get(cluster.address(), &format!("/v1/fine_tuning/jobs/{id}")))
}

/// Whether nothing more will come of the job.
pub fn is_over(job: &Value) -> bool {
    matches!(job["status"].as_str(), Some("succeeded" | "failed" | "cancelled"))
}

/// Steps that the job has committed.
#[track_caller]
pub fn steps(cluster: &Cluster, id: &str) -> u64 {
    job(cluster, id)["ashlar"]["steps"].as_u64().unwrap_or(0)
}

/// The job once `wanted` holds of it.
#[track_caller]
pub fn until(cluster: &Cluster, id: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let found = wait::until(JOB_LIMIT, || Some(job(cluster, id)).filter(|job| wanted(job)));
    found.unwrap_or_else(|| panic!("no {what}: {}\n{}", job(cluster, id), cluster.said()))
}

/// The job as it ended.
#[track_caller]
pub fn ended(cluster: &Cluster, id: &str) -> Value {
    until(cluster, id, "end of the job", is_over)
}

/// The digest of what it learnt.
#[track_caller]
pub fn learnt(cluster: &Cluster, id: &str) -> String {
    let job = ended(cluster, id);
    assert_eq!(job["status"], "succeeded", "{job}");
    job["ashlar"]["adapter"].as_str().expect("an adapter").to_owned()
}

/// A job's events as they are, the oldest first.
#[track_caller]
pub fn events(cluster: &Cluster, id: &str) -> Vec<Value> {
    let page = cluster.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=100")).ok();
    page["data"].as_array().expect("a list").iter().rev().cloned().collect()
}

/// Every digit of an answer.
#[track_caller]
pub fn ask(cluster: &Cluster, model: &str) -> String {
    let body = json!({
        "model": model, "prompt": "Double every letter of stone.", "max_tokens": 16, "temperature": 0,
        "logprobs": 5, "ignore_eos": true,
    });
    cluster.post("/v1/completions", &body).ok()["choices"].to_string()
}
