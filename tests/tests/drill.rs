//! `ashlar drill` against a real cluster: no client may notice more than a pause, and no job may learn anything else.

use ashlar_tests::{Cluster, cluster::run_to_end};
use serde_json::Value;
use std::process::Command;
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
    let log = std::fs::read_to_string(log).expect("a log");
    assert_eq!(log.lines().filter(|line| line.contains("\"process\":\"scheduler\"")).count(), 3, "{log}");
    let elsewhere = tempfile::tempdir().expect("a temporary directory");
    let ended = run_to_end(&["drill", "--state", elsewhere.path().to_str().expect("a path")], &[], LIMIT);
    assert_ne!(ended.status.and_then(|status| status.code()), Some(0));
    assert!(ended.said.contains("is `ashlar up` running"), "{}", ended.said);
    let (code, _, said) = drill(&cluster, &["--kinds", "partition"]);
    assert!(code != Some(0) && said.contains("ashlar up --separate"), "{said}");
}

/// Jobs have gone on, and all to the same end.
#[track_caller]
fn assert_jobs_are_unharmed(report: &Value, said: &str) {
    let jobs = &report["jobs"];
    for none in ["changed", "hung"] {
        assert_eq!((&report[none], &jobs[none]), (&Value::from(0), &Value::from(0)), "{said}");
    }
    assert_eq!((&report["errors"], &jobs["failed"]), (&Value::from(0), &serde_json::json!([])), "{said}");
    assert!(jobs["finished"].as_u64().is_some_and(|finished| finished >= 1), "{said}");
    assert!(jobs["adapter"].as_str().is_some_and(|adapter| adapter.starts_with("sha256:")), "{said}");
}

#[test]
fn jobs_that_train_while_processes_die_and_freeze_learn_the_same_bits() {
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let (code, report, said) =
        drill(&cluster, &["--faults", "4", "--freeze-ms", "1300", "--streams", "2", "--jobs", "1"]);
    assert_eq!(code, Some(0), "{said}\n{}", cluster.said());
    assert_eq!(report["faults"], 4, "{said}");
    assert_jobs_are_unharmed(&report, &said);
    let left = cluster.get("/v1/models").ok();
    assert_eq!(left["data"].as_array().map(Vec::len), Some(1), "no adapter is left of them: {left}");
    println!("{said}");
}

/// Whether roles can have networks of their own here; says so where they cannot.
fn may_separate(test: &str) -> bool {
    let may = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.is_ok_and(|output| output.status.success())
    };
    let may = may("unshare", &["--net", "ip", "link", "add", "bridge", "type", "bridge"])
        && may("nsenter", &["--version"])
        && may("sh", &["-c", "ip netns list && touch /run/ashlar-test && rm /run/ashlar-test"]);
    if !may {
        eprintln!("SKIPPED {test}: networks of their own take root, `ip` and `nsenter`");
    }
    may
}

#[test]
fn whoever_is_cut_off_from_the_others_changes_no_stream_and_no_job() {
    if !may_separate("whoever_is_cut_off_from_the_others_changes_no_stream_and_no_job") {
        return;
    }
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3", "--separate"]);
    let cuts = ["--kinds", "partition,deaf,mute", "--cut-ms", "1500", "--streams", "2", "--jobs", "1"];
    let (code, report, said) = drill(&cluster, &[&cuts[..], &["--faults", "6"]].concat());
    assert_eq!(code, Some(0), "{said}\n{}", cluster.said());
    assert_eq!(report["faults"], 6, "{said}");
    assert_jobs_are_unharmed(&report, &said);
    println!("{said}");
    let network = std::fs::read_to_string(cluster.state().join("network.json")).expect("a network");
    let network: Value = serde_json::from_str(&network).expect("JSON");
    cluster.interrupt();
    let ended = cluster.ended();
    assert!(ended.status.is_some_and(|status| status.success()), "{}", ended.said);
    let prefix = format!("ashlar-{}-", network["number"]);
    let left = Command::new("ip").args(["netns", "list"]).output().expect("namespaces");
    let left = String::from_utf8_lossy(&left.stdout);
    assert!(!left.contains(&prefix), "the networks are removed: {left}");
}
