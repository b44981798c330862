//! Who may import whom, and what stays out of the repository: the rules of `docs/ARCHITECTURE.md`, checked.
#![allow(clippy::unwrap_used, missing_docs)]

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Normal (not dev) dependencies of every workspace package.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap();
            let normal = dependencies.iter().filter(|d| d["kind"].is_null());
            let names = normal.map(|d| d["name"].as_str().unwrap().to_owned()).collect();
            (package["name"].as_str().unwrap().to_owned(), names)
        })
        .collect()
}

fn ours(names: &BTreeSet<String>) -> BTreeSet<&str> {
    names.iter().map(String::as_str).filter(|name| name.starts_with("ashlar-")).collect()
}

#[test]
fn the_vocabulary_imports_nothing_of_ours_and_pure_crates_only_it() {
    let all = dependencies();
    assert_eq!(ours(&all["ashlar-vocabulary"]), BTreeSet::new());
    assert_eq!(ours(&all["ashlar-shared-memory"]), BTreeSet::new());
    assert_eq!(ours(&all["ashlar-identity"]), BTreeSet::from(["ashlar-vocabulary"]));
    assert_eq!(ours(&all["ashlar-protocol"]), BTreeSet::from(["ashlar-identity", "ashlar-vocabulary"]));
    for name in ["ashlar-shard-plan", "ashlar-kernels"] {
        assert_eq!(ours(&all[name]), BTreeSet::from(["ashlar-vocabulary"]), "{name}");
    }
    assert_eq!(ours(&all["ashlar-dataset"]), BTreeSet::from(["ashlar-tokenizer", "ashlar-vocabulary"]));
}

#[test]
fn services_never_import_one_another() {
    let all = dependencies();
    let services = ["ashlar-gateway", "ashlar-scheduler", "ashlar-shard-node"];
    for service in services {
        for other in services.into_iter().filter(|other| *other != service) {
            assert!(!all[service].contains(other), "{service} imports {other}");
        }
    }
    for (name, imports) in &all {
        let joins = services.into_iter().filter(|service| imports.contains(*service)).count();
        let may_join =
            matches!(name.as_str(), "ashlar" | "ashlar-simulation" | "ashlar-protocol-model" | "ashlar-fuzz");
        assert!(may_join || joins == 0, "{name} joins services");
        assert!(!imports.contains("ashlar-protocol-model"), "{name} imports a model that only tests explore");
    }
}

#[test]
fn each_heavy_library_is_known_to_few() {
    let all = dependencies();
    let known_by = |library: &str| -> BTreeSet<&str> {
        let knows = all.iter().filter(|(_, imports)| imports.contains(library));
        knows.map(|(name, _)| name.as_str()).collect()
    };
    assert_eq!(known_by("redis"), BTreeSet::from(["ashlar-store"]));
    assert_eq!(known_by("redb"), BTreeSet::from(["ashlar-store"]));
    assert_eq!(known_by("hyper-rustls"), BTreeSet::from(["ashlar-store"]));
    // Certificates are made, and connections encrypted, in one place.
    for library in ["rcgen", "rustls-webpki", "tokio-rustls"] {
        assert_eq!(known_by(library), BTreeSet::from(["ashlar-identity"]), "{library}");
    }
    assert_eq!(known_by("rustls"), BTreeSet::from(["ashlar-identity", "ashlar-store"]));
    assert_eq!(known_by("axum"), BTreeSet::from(["ashlar-gateway"]));
    assert_eq!(known_by("minijinja"), BTreeSet::from(["ashlar-tokenizer"]));
    assert_eq!(known_by("llguidance"), BTreeSet::from(["ashlar-grammar"]));
    assert_eq!(known_by("hf-hub"), BTreeSet::from(["ashlar-model"]));
    assert_eq!(known_by("candle-core"), BTreeSet::new(), "candle is an oracle of tests");
    let may_know_the_store = BTreeSet::from(["ashlar-gateway", "ashlar-scheduler", "ashlar-shard-node"]);
    let know_the_store = known_by("ashlar-store");
    assert!(know_the_store.is_subset(&may_know_the_store), "{know_the_store:?}");
}

#[test]
fn cluster_state_is_the_schedulers_alone() {
    for place in ["gateway/src", "shard-node/src"] {
        for (file, line) in code_lines(place) {
            let mentions = line.matches("ashlar_store").count();
            let blobs = line.matches("ashlar_store::blobs").count();
            assert_eq!(mentions, blobs, "{}: more than blobs: {line}", file.display());
        }
    }
}

fn rust_files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Source lines of a file or folder, without comments and test modules.
fn code_lines(place: &str) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let path = root().join(place);
    if path.is_file() {
        files.push(path);
    } else {
        rust_files(&path, &mut files);
    }
    let mut lines = Vec::new();
    for file in files.into_iter().filter(|file| !file.ends_with("tests.rs")) {
        let text = fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let kept = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.extend(kept.map(|line| (file.clone(), line.to_owned())));
    }
    assert!(!lines.is_empty(), "{place} holds no code: has it moved?");
    lines
}

#[test]
fn pure_cores_have_no_runtime_clock_randomness_or_io() {
    let cores = [
        "scheduler/src/engine",
        "scheduler/src/cluster",
        "scheduler/src/jobs",
        "scheduler/src/adapters",
        "scheduler/src/fleet",
        "scheduler/src/director.rs",
        "gateway/src/transcript",
        "gateway/src/transcript.rs",
        "gateway/src/scheduler_client/terms.rs",
        "shard-node/src/sequencer.rs",
        "crates/shard-plan/src",
        "crates/dataset/src",
        "crates/protocol-model/src/lease",
        "crates/protocol-model/src/replay",
        "crates/protocol-model/src/vote",
        "crates/protocol-model/src/observed.rs",
    ];
    let banned = [
        "tokio",
        "std::net",
        "std::fs",
        "SystemTime",
        "Instant",
        "HashMap",
        "HashSet",
        "rand::",
        "std::thread",
    ];
    for core in cores {
        for (file, line) in code_lines(core) {
            for word in banned {
                assert!(!line.contains(word), "{}: `{word}` in a pure core: {line}", file.display());
            }
        }
    }
}

#[test]
fn unsafe_code_lives_in_the_kernels_and_the_shared_memory_alone() {
    let mut files = Vec::new();
    rust_files(&root(), &mut files);
    let roots = files.iter().filter(|file| file.ends_with("src/lib.rs") || file.ends_with("src/main.rs"));
    // What counts memory must be an allocator, whose trait is unsafe.
    let may =
        ["crates/kernels", "crates/shared-memory", "tests/fuzz/src/lib.rs"].map(|place| root().join(place));
    for file in roots.filter(|file| !may.iter().any(|place| file.starts_with(place))) {
        let text = fs::read_to_string(file).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{} does not forbid unsafe code", file.display());
    }
    // Of the shared memory's crate, one file.
    for (file, line) in code_lines("crates/shared-memory/src") {
        let mapping = file.ends_with("segment.rs");
        assert!(mapping || !line.contains("unsafe "), "{}: {line}", file.display());
    }
    for (file, line) in code_lines("tests/fuzz/src") {
        let counting = file.ends_with("allocator.rs");
        assert!(counting || !line.contains("unsafe "), "{}: {line}", file.display());
    }
}

#[test]
fn every_fault_has_tests_by_name() {
    let table = fs::read_to_string(root().join("docs/FAULTS.md")).unwrap();
    let mut files = Vec::new();
    for place in ["tests", "crates", "gateway", "scheduler", "shard-node"] {
        rust_files(&root().join(place), &mut files);
    }
    let sources: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let is_name = |word: &str| word.matches('_').count() >= 2 && !word.contains(['.', ' ']);
    let names: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|word| is_name(word)).collect();
    assert!(names.len() > 50, "the table names {} tests", names.len());
    for name in names {
        assert!(sources.contains(&format!("fn {name}(")), "docs/FAULTS.md names {name}, which is no test");
    }
    let rows = table.lines().filter(|line| line.starts_with("| "));
    let rows = rows.filter(|line| !line.starts_with("| Fault") && !line.starts_with("| Class"));
    assert_eq!(rows.count(), 20 + 12, "one row per fault, and per class of bugs");
}
