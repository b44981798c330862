#![allow(clippy::unwrap_used)]
use super::setup::{Found, Setup};
use super::units::{Fault, parse_fault, parse_rate, parse_seconds};
use super::*;
use ashlar_simulation::plan::FaultKind;
use clap::Parser;
use serde_json::json;

#[derive(Debug, Parser)]
struct Command {
    #[command(flatten)]
    simulate: SimulateArgs,
}

fn args(more: &[&str]) -> SimulateArgs {
    let words = [&["simulate", "--model", "llama-3.2-1b"][..], more].concat();
    Command::try_parse_from(words).unwrap().simulate
}

#[test]
fn figures_are_read_as_people_write_them() {
    assert_eq!(parse_rate("40GB/s"), Ok(40e9));
    assert_eq!(parse_rate("300G"), Ok(300e9));
    assert_eq!(parse_rate("1.5TFLOP/s"), Ok(1.5e12));
    assert_eq!(parse_rate("2GiB/s"), Ok(2.0 * (1u64 << 30) as f64));
    assert_eq!(parse_rate("1e9"), Ok(1e9));
    assert_eq!(
        (parse_seconds("10m"), parse_seconds("90s"), parse_seconds("2")),
        (Ok(600.0), Ok(90.0), Ok(2.0))
    );
    assert_eq!(parse_seconds("500ms"), Ok(0.5));
    for wrong in ["", "-1s", "fast", "G", "0"] {
        assert!(parse_rate(wrong).is_err() && parse_seconds(wrong).is_err(), "{wrong}");
    }
    let fault = Fault { role: Role::Node, index: 3, kind: Kind::Kill, at_s: 30.0 };
    assert_eq!(parse_fault("node:3:kill@30s"), Ok(fault));
    for wrong in ["node:3:kill", "node:kill@3s", "disk:0:kill@3s", "node:0:melt@3s"] {
        assert!(parse_fault(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn rates_are_shared_out_over_roles_and_kinds() {
    let args = args(&["--faults-per-hour", "12", "--roles", "node,gateway", "--duration", "1m"]);
    let plan = Setup::new(&args).unwrap().plan(&args, 1).unwrap();
    assert_eq!((plan.nodes.len(), plan.fault_rates.len()), (8, 4));
    assert!(plan.fault_rates.iter().all(|rate| rate.mean_time_between_s == 1200.0));
    assert_eq!(plan.fault_rates[1].kind, FaultKind::Freeze { for_us: 2_500_000 });
    assert!(plan.requests.iter().all(|request| (request.prompt_tokens, request.output_tokens) == (512, 256)));
    assert!(plan.requests.last().unwrap().at_us < 60_000_000);
}

#[test]
fn a_bad_line_of_a_trace_is_refused_with_its_number() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trace.jsonl");
    let good = "{\"at_s\": 0, \"prompt_tokens\": 3, \"output_tokens\": 2}\n";
    std::fs::write(&path, format!("{good}{good}{{\"at_s\": 1, \"prompt_tokens\": 3}}\n")).unwrap();
    let args = args(&["--trace", path.to_str().unwrap()]);
    let error = format!("{:#}", Setup::new(&args).unwrap().plan(&args, 0).unwrap_err());
    assert!(error.contains("line 3") && error.contains("output_tokens"), "{error}");
    std::fs::write(&path, good).unwrap();
    assert_eq!(Setup::new(&args).unwrap().plan(&args, 0).unwrap().requests.len(), 1);
}

#[test]
fn a_running_cluster_gives_its_nodes_and_its_cut() {
    let timing = serde_json::to_value(ashlar_protocol::step::StepTiming::default()).unwrap();
    let trained = serde_json::to_value(ashlar_protocol::training::TrainingTiming::default()).unwrap();
    let node = |name: &str, place: serde_json::Value, start: usize, end: usize| {
        json!({"node": name, "address": "10.0.0.1:7403", "threads": 2, "isa": "avx2", "ledger": {}, "memory": 1u64 << 34, "bandwidth_bytes_per_s": 4e10, "flops_per_s": 3e11, "place": place,
               "layers": {"start": start, "end": end}, "loaded": 1.0, "leaving": false, "quarantined": null, "reserved": 0, "adapters": 0, "jobs": 0,
               "resident": 0, "busy": timing, "trained": trained})
    };
    let cluster = json!({"model": "m", "max_context_tokens": 2048, "nodes": [
        node("node-0", json!([0, 0, 0]), 0, 9), node("node-1", json!([0, 1, 0]), 9, 16), node("node-2", json!(null), 0, 0)]});
    let found = Found::read(&cluster).unwrap();
    assert_eq!(
        (found.cut.stages, found.cut.tensor_parallel_size, found.cut.replicas),
        (Some(2), Some(1), Some(1))
    );
    let layers: Vec<Option<usize>> =
        found.nodes.iter().map(|node| node.layers.map(|range| range.len())).collect();
    assert_eq!(layers, [Some(9), Some(7), None]);
    assert!(Found::read(&json!(null)).is_err());
}

#[test]
fn what_does_not_go_together_is_refused() {
    let refused = |more: &[&str]| Command::try_parse_from([&["simulate"][..], more].concat()).is_err();
    assert!(refused(&["--trace", "t.jsonl", "--requests-per-s", "2"]));
    assert!(refused(&["--node-from", "http://x", "--stages", "2"]));
    assert!(refused(&["--nodes", "0"]));
    assert!(!refused(&["--trace", "t.jsonl", "--duration", "10m"]));
}
