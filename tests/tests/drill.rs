//! `ashlar drill` against a real cluster: no client may notice more than a pause.

use ashlar_tests::{Cluster, cluster::run_to_end};
use serde_json::Value;
use std::time::Duration;

/// Faults of the suite's drill; OPERATING.md has the command for a long one.
const FAULTS: &str = "20";
const LIMIT: Duration = Duration::from_secs(240);

/// Runs a drill to its end; its exit code, and what it found.
fn drill(cluster: &Cluster, args: &[&str]) -> (Option<i32>, Value, String) {
    let (state, url) = (cluster.state(), format!("http://{}", cluster.address()));
    let mut all = vec!["drill", "--json", "--state", state.to_str().expect("a path"), "--url", &url];
    all.extend(args);
    let ended = run_to_end(&all, &[], LIMIT);
    let json = ended.said.find("\n{").map(|at| &ended.said[at..]).unwrap_or(&ended.said);
    let report = json.find('{').map(|at| &json[at..]).and_then(|json| {
        serde_json::Deserializer::from_str(json).into_iter::<Value>().next().and_then(Result::ok)
    });
    (ended.status.and_then(|status| status.code()), report.unwrap_or_default(), ended.said)
}

#[test]
fn twenty_faults_over_all_roles_change_no_stream() {
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let (code, report, said) = drill(&cluster, &["--faults", FAULTS, "--freeze-ms", "1300"]);
    assert_eq!(code, Some(0), "{said}\n{}", cluster.said());
    assert_eq!(report["faults"], 20, "{said}");
    for none in ["changed", "hung", "errors"] {
        assert_eq!(report[none], 0, "{said}");
    }
    let kinds = report["by_fault"].as_array().expect("rows");
    assert!(kinds.len() >= 4, "{said}");
    assert!(report["completed"].as_u64().is_some_and(|completed| completed >= 20), "{said}");
    assert!(!cluster.said().contains("panicked at"), "{}", cluster.said());
    println!("{said}");
}

#[test]
fn a_drill_goes_on_where_its_log_ends_and_says_what_is_wrong() {
    let cluster = Cluster::start(&["--stages", "1"]);
    let log = cluster.state().join("drill.jsonl");
    let log = log.to_str().expect("a path");
    let kill = ["--roles", "scheduler", "--kinds", "kill", "--log", log];
    for faults in ["2", "3"] {
        let (code, report, said) = drill(&cluster, &[&kill[..], &["--faults", faults]].concat());
        assert_eq!((code, report["faults"].to_string().as_str()), (Some(0), faults), "{said}");
    }
    assert_eq!(std::fs::read_to_string(log).expect("a log").lines().count(), 3);
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let ended = run_to_end(&["drill", "--state", elsewhere.path().to_str().expect("a path")], &[], LIMIT);
    assert_ne!(ended.status.and_then(|status| status.code()), Some(0));
    assert!(ended.said.contains("is `ashlar up` running"), "{}", ended.said);
}
