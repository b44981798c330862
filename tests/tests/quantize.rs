//! `ashlar quantize`: a file that is served like the model it was made of.

use ashlar_tests::{Cluster, run_to_end, shared};
use serde_json::json;
use std::fs;
use std::time::Duration;

/// The demo model takes a fraction of a second; the machine may be busy.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_quantised_model_in_one_file_is_written_once_and_served() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let model = shared::workspace().join("crates/model/demo").to_string_lossy().into_owned();
    let file = directory.path().join("demo-q8_0.gguf");
    let out = file.to_string_lossy().into_owned();
    let quantize = ["quantize", "--model", &model, "--type", "q8_0", "--out", &out];

    let ended = run_to_end(&quantize, &[], LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}", ended.said);
    assert!(ended.said.contains(&format!("ashlar up --model {out}")), "{}", ended.said);
    let written = fs::read(&file).expect("the file");

    let ended = run_to_end(&quantize, &[], LIMIT);
    assert!(ended.status.is_some_and(|status| !status.success()), "{}", ended.said);
    assert!(ended.said.contains("--force"), "{}", ended.said);
    let ended = run_to_end(&[&quantize[..], &["--force", "--json"]].concat(), &[], LIMIT);
    assert!(ended.status.is_some_and(|status| status.success()), "{}", ended.said);
    assert!(ended.said.contains("\"bits_per_weight\""), "{}", ended.said);
    assert!(fs::read(&file).expect("the file") == written, "the same model gives the same bytes");
    let names: Vec<_> = fs::read_dir(directory.path()).expect("a directory").flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");

    let cluster = Cluster::start(&["--model", &out, "--stages", "2"]);
    let asked = json!({"messages": [{"role": "user", "content": "What is 12 + 34?"}], "temperature": 0});
    let answer = cluster.post("/v1/chat/completions", &asked).ok();
    let text = answer["choices"][0]["message"]["content"].as_str().unwrap_or_default();
    assert_eq!(text.trim(), "46");
}
