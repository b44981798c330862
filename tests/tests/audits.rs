//! Answers that are computed again on another replica: the bits are the same, and a node whose bits are not is found out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_tests::{Cluster, eventually, http, run_to_end};
use serde_json::{Value, json};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

fn audits(cluster: &Cluster, outcome: &str) -> f64 {
    cluster.metric(&format!("ashlar_audits_{outcome}_total"))
}

/// Nodes that are quarantined, and why.
fn quarantined(cluster: &Cluster) -> Vec<(String, String)> {
    let view = cluster.view();
    let nodes = view["nodes"].as_array().cloned().unwrap_or_default();
    let reason =
        |node: &Value| Some((node["node"].as_str()?.to_owned(), node["quarantined"].as_str()?.to_owned()));
    nodes.iter().filter_map(reason).collect()
}

fn seated(cluster: &Cluster, name: &str) -> bool {
    let view = cluster.view();
    let nodes = view["nodes"].as_array().cloned().unwrap_or_default();
    nodes.iter().any(|node| node["node"] == name && !node["place"].is_null())
}

/// Requests of all kinds, some at once; their answers.
fn answers(cluster: &Cluster) -> Vec<Value> {
    let long = "tell me what seven plus twelve is, ".repeat(10);
    let chat = |content: &str, more: Value| {
        let mut body = json!({
            "messages": [{"role": "user", "content": content}], "max_tokens": 24, "seed": 5,
            "logit_bias": {"258": -100},
        });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ("/v1/chat/completions", body)
    };
    let requests = [
        chat("what is 17 plus 29?", json!({"temperature": 0})),
        chat("what is 17 plus 29?", json!({"temperature": 1.3, "n": 3, "logprobs": true, "top_logprobs": 3})),
        chat(&long, json!({"temperature": 0.7, "frequency_penalty": 0.5})),
        chat(&long, json!({"temperature": 0, "response_format": {"type": "json_object"}})),
        (
            "/v1/completions",
            json!({"prompt": "reverse: stone", "max_tokens": 12, "echo": true, "logprobs": 2, "seed": 1}),
        ),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 1, "seed": 1})),
    ];
    std::thread::scope(|scope| {
        let running: Vec<_> = requests
            .iter()
            .map(|(path, body)| {
                scope.spawn(|| {
                    let body = serde_json::to_vec(body).unwrap();
                    http::post(cluster.address(), path, &body).expect("an answer").ok()["choices"].clone()
                })
            })
            .collect();
        running.into_iter().map(|request| request.join().unwrap()).collect()
    })
}

fn all_pass(args: &[&str]) {
    let cluster = Cluster::start(&[&["--replicas", "2", "--audit", "100%"], args].concat());
    let first = answers(&cluster);
    assert_eq!(answers(&cluster), first);
    // 16 sequences in all; a request for the first token alone has nothing that another one lacks. A machine that stands still
    // for a second costs a replica its audits: others take their place.
    let enough = || audits(&cluster, "passed") + audits(&cluster, "dropped") >= 16.0;
    eventually("all are audited", LIMIT, enough);
    eventually("as many pass", LIMIT, || {
        let passed = audits(&cluster, "passed") >= 16.0;
        if !passed {
            assert_eq!(answers(&cluster), first);
        }
        passed
    });
    assert_eq!(audits(&cluster, "differed"), 0.0, "{}", cluster.said());
    let stood_still = cluster.said().contains("replica is down");
    assert!(audits(&cluster, "dropped") == 0.0 || stood_still, "{}", cluster.said());
    assert_eq!(quarantined(&cluster), []);
}

#[test]
fn stages_compute_the_same_bits_on_another_replica_with_the_head_on_one_or_on_all() {
    all_pass(&["--stages", "2", "--set", "spread_head=false"]);
    all_pass(&["--stages", "2", "--set", "spread_head=true"]);
}

#[test]
fn ranks_compute_the_same_bits_on_another_replica() {
    all_pass(&["--stages", "1", "--tp", "2"]);
}

#[test]
fn a_node_that_flips_a_bit_now_and_then_is_found_out_and_replaced() {
    let cluster = Cluster::start(&[
        "--stages",
        "1",
        "--replicas",
        "2",
        "--nodes",
        "3",
        "--audit",
        "100%",
        "--set-node",
        "compute_faults.flip_bit_every=11",
        "--set-node",
        "compute_faults.node=\"node-0\"",
    ]);
    if !seated(&cluster, "node-0") {
        let drain = http::post(cluster.address(), "/admin/nodes/node-1/drain", b"").expect("an answer");
        drain.ok();
        eventually("it has a place", LIMIT, || seated(&cluster, "node-0"));
        // It is to be free again.
        let url = format!("http://{}", cluster.address());
        let undone = run_to_end(&["drain", "node-1", "--undo", "--url", &url], &[], LIMIT);
        assert!(undone.status.is_some_and(|status| status.success()), "{}", undone.said);
    }
    eventually("it is found out", LIMIT, || {
        answers(&cluster);
        !quarantined(&cluster).is_empty()
    });
    let found = quarantined(&cluster);
    assert!(found.iter().all(|(node, _)| node == "node-0"), "{found:?}");
    assert!(found[0].1.contains("other bits"), "{found:?}");
    assert!(cluster.said().contains("an audit has found other bits"), "{}", cluster.said());
    eventually("another one has its place", LIMIT, || !seated(&cluster, "node-0"));
    let differed = audits(&cluster, "differed");
    let before = audits(&cluster, "passed");
    eventually("audits pass", LIMIT, || {
        answers(&cluster);
        audits(&cluster, "passed") >= before + 8.0
    });
    assert_eq!(audits(&cluster, "differed"), differed, "{}", cluster.said());
}

#[test]
fn a_node_that_is_always_wrong_in_the_same_way_is_outvoted_by_two_others() {
    let cluster = Cluster::start(&[
        "--stages",
        "1",
        "--replicas",
        "3",
        "--nodes",
        "3",
        "--audit",
        "100%",
        "--set-node",
        "compute_faults.flip_bit_every=1",
        "--set-node",
        "compute_faults.node=\"node-1\"",
    ]);
    eventually("it is found out", LIMIT, || {
        answers(&cluster);
        !quarantined(&cluster).is_empty()
    });
    let found = quarantined(&cluster);
    assert!(found.iter().all(|(node, _)| node == "node-1"), "{found:?}");
    assert_eq!(audits(&cluster, "undecided"), 0.0);
}
