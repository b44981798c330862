//! A machine that joins and has no model: it fetches what its stage takes, keeps it, and serves the same bytes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_tests::cluster::START_LIMIT;
use ashlar_tests::machines::{Machine, answer, first_token, open_cluster};
use ashlar_tests::{Cluster, eventually};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The weights that a machine has fetched.
fn fetched(disk: &Path) -> PathBuf {
    let models = fs::read_dir(disk.join("state/models")).unwrap().flatten();
    let weights: Vec<PathBuf> =
        models.map(|model| model.path().join("model.safetensors")).filter(|path| path.exists()).collect();
    assert_eq!(weights.len(), 1, "{weights:?}");
    weights[0].clone()
}

#[test]
fn a_machine_without_the_model_fetches_its_slice_and_serves_the_same_bytes() {
    let alone = Cluster::start(&["--stages", "2"]);
    let expected = answer(&alone);
    let model = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(alone.state().join("models/ashlar-demo")).unwrap().flatten() {
        fs::copy(entry.path(), model.path().join(entry.file_name())).unwrap();
    }
    drop(alone);
    let args = ["--stages", "2", "--nodes", "1", "--model", model.path().to_str().unwrap()];
    let (cluster, port) = open_cluster(&args);
    let machine = Machine::join_with(port, &first_token(&cluster, port), "far", &["--fetch"]);
    cluster.await_ready(START_LIMIT);
    assert_eq!(answer(&cluster), expected, "the same bits from a part of the files");
    machine.says("has the model");

    let weights = fetched(machine.folder.path());
    let (own, whole) =
        (fs::metadata(&weights).unwrap(), fs::metadata(model.path().join("model.safetensors")).unwrap());
    assert_eq!(own.len(), whole.len());
    // In units of 512 bytes, as the system counts what is on the disk.
    assert!(own.blocks() * 512 < whole.len() * 9 / 10, "{} of {} bytes", own.blocks() * 512, whole.len());

    // From its disk it comes back and fetches nothing, with nobody to fetch it from.
    let disk = machine.killed();
    eventually("the cluster sees that it is gone", START_LIMIT, || cluster.get("/ready").status == 503);
    fs::remove_file(disk.path().join("stderr")).unwrap();
    let machine = Machine::start(disk, &["--fetch"]);
    cluster.await_ready(START_LIMIT);
    assert_eq!(answer(&cluster), expected);
    let said = machine.said();
    assert!(!said.contains("fetching") && !said.contains("has the model"), "{said}");
    assert!(!said.contains("panicked") && !cluster.said().contains("panicked"), "{}", cluster.said());
}
