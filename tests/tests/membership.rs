//! Nodes that leave a running cluster, and come to it, while a stream runs: it stays what it is.

use ashlar_tests::streams::{assert_no_panic, disturb, undisturbed};
use ashlar_tests::{Answer, Cluster, eventually, http, processes, tuning};
use serde_json::Value;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What has been prepared takes its place in no time; other tests run at the same time.
const PAUSE_LIMIT: Duration = Duration::from_secs(5);
const CHANGE_LIMIT: Duration = Duration::from_secs(30);

/// These tests measure time: one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn node(cluster: &Cluster, name: &str) -> Option<Value> {
    let view = cluster.view();
    view["nodes"].as_array()?.iter().find(|node| node["node"] == name).cloned()
}

/// Nodes that have a place.
fn seated(cluster: &Cluster) -> Vec<String> {
    let view = cluster.view();
    let nodes = view["nodes"].as_array().cloned().unwrap_or_default();
    let seated = nodes.iter().filter(|node| !node["place"].is_null());
    seated.filter_map(|node| node["node"].as_str().map(str::to_owned)).collect()
}

fn is_ready(cluster: &Cluster) -> bool {
    http::get(cluster.address(), "/ready").is_ok_and(|answer| answer.status == 200)
}

fn request(cluster: &Cluster, method: &str, path: &str) -> Answer {
    let text =
        format!("{method} {path} HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    http::raw(cluster.address(), text.as_bytes()).expect("an answer")
}

fn drain(cluster: &Cluster, node: &str) -> Answer {
    request(cluster, "POST", &format!("/admin/nodes/{node}/drain"))
}

#[test]
fn a_node_that_is_told_to_stop_goes_once_a_standby_has_its_place() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let expected = undisturbed(&cluster);
    let leaving = seated(&cluster).remove(0);
    let pid = cluster.pid(&leaving);
    let pause = disturb(&cluster, &expected, || {
        assert!(processes::signal(pid, "TERM"));
        eventually("it ends", CHANGE_LIMIT, || !processes::alive(pid));
    });
    assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());
    assert!(!seated(&cluster).contains(&leaving), "{}", cluster.view());
    assert!(!cluster.said().contains("nobody has taken this node's place"), "{}", cluster.said());
    assert!(
        cluster.up_said().contains(&format!("{leaving} ended (exit status: 0)")),
        "{}",
        cluster.up_said()
    );
    println!("{leaving} left: the stream stood still for {pause:?}");
    assert_no_panic(&cluster);
}

#[test]
fn nodes_and_scheduler_are_started_again_one_after_the_other_without_a_stream_noticing_more_than_pauses() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let expected = undisturbed(&cluster);
    let pause = disturb(&cluster, &expected, || {
        for role in ["node-0", "node-1", "node-2", "scheduler"] {
            let pid = cluster.pid(role);
            assert!(processes::signal(pid, "TERM"), "{role}");
            eventually("it is started again", CHANGE_LIMIT, || {
                cluster.pids().get(role).is_some_and(|now| *now != pid)
            });
            eventually("it has joined", CHANGE_LIMIT, || {
                is_ready(&cluster) && (role == "scheduler" || node(&cluster, role).is_some())
            });
        }
    });
    assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());
    assert_eq!(undisturbed(&cluster), expected);
    assert_no_panic(&cluster);
}

#[test]
fn an_operator_drains_a_node_and_uses_it_again() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let expected = undisturbed(&cluster);
    let drained = seated(&cluster).remove(0);
    let pause = disturb(&cluster, &expected, || {
        let answer = drain(&cluster, &drained).ok();
        assert_eq!(answer, serde_json::json!({"node": drained, "leaving": true}));
        eventually("it holds nothing", CHANGE_LIMIT, || {
            node(&cluster, &drained).is_some_and(|node| node["place"].is_null() && node["leaving"] == true)
        });
    });
    assert!(pause < PAUSE_LIMIT, "the stream stood still for {pause:?}\n{}", cluster.said());

    // A new scheduler hears of it from the node.
    let pid = cluster.pid("scheduler");
    assert!(processes::signal(pid, "KILL"));
    eventually("another one leads", CHANGE_LIMIT, || {
        cluster.pids().get("scheduler").is_some_and(|now| *now != pid) && is_ready(&cluster)
    });
    assert!(!seated(&cluster).contains(&drained), "{}", cluster.view());

    let other = seated(&cluster).remove(0);
    let refused = drain(&cluster, &other);
    assert_eq!(refused.status, 409, "{}", refused.text());
    assert!(refused.text().contains(&format!("node {other} is needed")), "{}", refused.text());
    let unknown = drain(&cluster, "nobody");
    assert_eq!(unknown.status, 404, "{}", unknown.text());

    request(&cluster, "DELETE", &format!("/admin/nodes/{drained}/drain")).ok();
    eventually("it is of use again", CHANGE_LIMIT, || {
        node(&cluster, &drained).is_some_and(|node| node["leaving"] == false)
    });
    drain(&cluster, &other).ok();
    eventually("it takes the other one's place", CHANGE_LIMIT, || seated(&cluster).contains(&drained));
    assert_eq!(undisturbed(&cluster), expected);
    assert_no_panic(&cluster);
}

#[test]
fn nodes_that_join_become_another_replica_where_their_number_is_left_open() {
    let _alone = alone();
    // With the number of nodes given and that of replicas not, there are as many as fit.
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "4"]);
    let replicas = |cluster: &Cluster| {
        let view = cluster.view();
        let replicas = view["replicas"].as_array().cloned().unwrap_or_default();
        replicas.iter().filter(|replica| replica["ready"] == true).count()
    };
    eventually("two replicas serve", CHANGE_LIMIT, || replicas(&cluster) == 2);
    let expected = undisturbed(&cluster);
    // Two that leave are two that join after that.
    for name in ["node-0", "node-1", "node-2", "node-3"] {
        let pause = disturb(&cluster, &expected, || {
            let pid = cluster.pid(name);
            assert!(processes::signal(pid, "TERM"));
            eventually("it ends", CHANGE_LIMIT, || !processes::alive(pid));
        });
        assert!(pause < PAUSE_LIMIT, "{name}: the stream stood still for {pause:?}\n{}", cluster.said());
        eventually("two replicas serve again", CHANGE_LIMIT, || replicas(&cluster) == 2);
    }
    assert_no_panic(&cluster);
}

#[test]
fn a_job_goes_on_with_a_standby_when_its_node_is_told_to_stop_and_learns_the_same() {
    let _alone = alone();
    let cluster = Cluster::start(&["--stages", "2", "--nodes", "3"]);
    let file = tuning::uploaded(&cluster, &tuning::examples(48));
    let expected = tuning::learnt(&cluster, &tuning::create(&cluster, &file, "calm"));
    let id = tuning::create(&cluster, &file, "moved");
    tuning::until(&cluster, &id, "second step", |job| job["ashlar"]["steps"].as_u64() >= Some(2));
    let leaving = seated(&cluster).remove(0);
    let pid = cluster.pid(&leaving);
    assert!(processes::signal(pid, "TERM"));
    eventually("it ends", CHANGE_LIMIT, || !processes::alive(pid));
    assert!(!tuning::is_over(&tuning::job(&cluster, &id)), "it ended before that");
    assert_eq!(tuning::learnt(&cluster, &id), expected);
    assert_no_panic(&cluster);
}

#[test]
fn a_slow_link_makes_a_job_slow_and_changes_nothing_else() {
    let _alone = alone();
    let learnt = |args: &[&str]| {
        let cluster = Cluster::start(args);
        let file = tuning::uploaded(&cluster, &tuning::examples(24));
        let digest = tuning::learnt(&cluster, &tuning::create(&cluster, &file, "slow"));
        assert_no_panic(&cluster);
        digest
    };
    let calm = learnt(&["--stages", "2"]);
    // Fifty milliseconds before each message from rank to rank. How slow that makes it depends on what else the machine does.
    assert_eq!(learnt(&["--stages", "2", "--set-node", "link_faults.delay_us=50000"]), calm);
}
