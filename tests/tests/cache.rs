//! `--cache`: the second start reads what the first one packed, and answers the same.

use ashlar_tests::{Cluster, eventually};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// The demo model's copies take milliseconds; the machine may be busy.
const WRITTEN_LIMIT: Duration = Duration::from_secs(60);

fn answer(cluster: &Cluster) -> String {
    let asked = json!({"messages": [{"role": "user", "content": "What is 12 + 34?"}], "temperature": 0});
    let answer = cluster.post("/v1/chat/completions", &asked).ok();
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned()
}

fn copies(directory: &Path) -> Vec<String> {
    let names = fs::read_dir(directory).into_iter().flatten().flatten();
    names.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn the_second_start_reads_the_copies_of_the_first() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let cache = format!("--cache={}", directory.path().join("copies").display());
    let args = ["--tp", "2", "--stages", "1", &cache];
    let first = Cluster::start(&args);
    let expected = answer(&first);
    eventually("a copy of each rank", WRITTEN_LIMIT, || {
        let names = copies(&directory.path().join("copies"));
        names.iter().filter(|name| name.ends_with(".packed")).count() == 2
    });
    assert!(!first.said().contains("read the packed copy"), "{}", first.said());
    drop(first);
    let second = Cluster::start(&args);
    assert_eq!(answer(&second), expected);
    let said = second.said();
    assert_eq!(said.matches("read the packed copy").count(), 2, "{said}");
}

#[test]
fn a_cache_that_cannot_be_written_to_is_one_warning_and_the_cluster_serves() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = directory.path().join("file");
    fs::write(&file, "no directory").expect("a file");
    let cluster = Cluster::start(&["--stages", "1", &format!("--cache={}", file.join("copies").display())]);
    assert_eq!(answer(&cluster).trim(), "46");
    let warned = || cluster.said().matches("cannot keep a packed copy").count();
    eventually("a warning", WRITTEN_LIMIT, || warned() > 0);
    assert_eq!(warned(), 1, "{}", cluster.said());
}
