//! What a running cluster says of itself, read as somebody would who operates it.

use crate::findings::Finding;
use ashlar_vocabulary::Bytes;
use serde_json::Value;

/// Share of the KV cache in use from which requests are soon preempted.
const KV_FULL: f64 = 0.9;
/// A stage that computes so many times as long as the others' median holds all of them up.
const STRAGGLER: f64 = 2.0;
/// Computing time below which nothing can be said about that, in microseconds.
const COMPUTED_MIN: u64 = 2_000_000;
/// What a process takes beside its ledger.
const BESIDE_LEDGER: u64 = 512 << 20;

/// Looks at what `GET /admin/cluster` says.
pub(super) fn examine(answer: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    if answer["connected"] == false {
        findings.push(Finding::problem(
            "the gateway does not reach the scheduler",
            "Start the scheduler, and look whether `scheduler` in the gateway's configuration names its gateway port (7402); \
             `ashlar doctor --link HOST:PORT` says whether that is reached.",
        ));
    }
    findings.push(match answer["problem"].as_str() {
        _ if answer["ready"] == true => Finding::good("requests would be computed now"),
        Some(problem) => {
            Finding::problem(format!("requests are refused or wait: {problem}"), remedy(problem))
        }
        None => Finding::problem("requests are refused or wait", "The scheduler's log says why."),
    });
    if answer["cluster"].is_object() {
        findings.extend(of_model(&answer["cluster"]));
    }
    for model in answer["models"].as_array().into_iter().flatten() {
        let name = model["request"]["name"].as_str().unwrap_or("a deployed model");
        let named = |finding: Finding| Finding { what: format!("{name}: {}", finding.what), ..finding };
        findings.extend(of_model(&model["cluster"]).into_iter().map(named));
    }
    findings
}

/// What to do about a problem that the scheduler names: it says itself where it knows.
fn remedy(problem: &str) -> &'static str {
    if problem.contains("node") {
        "Start the nodes that are missing; their logs say why one has not joined."
    } else {
        ""
    }
}

fn of_model(cluster: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    let nodes: Vec<&Value> = cluster["nodes"].as_array().into_iter().flatten().collect();
    if nodes.is_empty() {
        findings.push(Finding::problem(
            "no node has joined",
            "Start one, and look whether its `scheduler` names the scheduler's node port (7401).",
        ));
    }
    let standbys = nodes.iter().filter(|node| node["place"].is_null()).count();
    if !nodes.is_empty() {
        let standbys =
            if standbys == 0 { String::new() } else { format!(", {standbys} of them standing by") };
        findings.push(Finding::good(format!("{} nodes{standbys}, term {}", nodes.len(), cluster["term"])));
    }
    findings.extend(nodes.iter().flat_map(|node| of_node(node)));
    findings.extend(stragglers(&nodes));
    findings.extend(cluster["replicas"].as_array().into_iter().flatten().flat_map(of_replica));
    findings.extend(of_counters(&cluster["counters"]));
    findings
}

fn of_node(node: &Value) -> Vec<Finding> {
    let name = node["node"].as_str().unwrap_or("a node");
    let bytes = |key: &str| node[key].as_u64().unwrap_or(0);
    let mut findings = Vec::new();
    if let Some(reason) = node["quarantined"].as_str() {
        findings.push(Finding::problem(
            format!("{name} is kept away from requests: {reason}"),
            "Look at that machine (memory errors, temperature, its node's log); its node may take part again once it was restarted.",
        ));
    }
    if node["leaving"] == true {
        findings.push(Finding::warning(
            format!("{name} is leaving: others take its place"),
            format!("Stop it when it holds nothing, or use it again: ashlar drain {name} --undo"),
        ));
    }
    let loaded = node["loaded"].as_f64().unwrap_or(1.0);
    if !node["place"].is_null() && loaded < 1.0 {
        findings.push(Finding::warning(
            format!("{name} has loaded {:.0} % of its weights", loaded * 100.0),
            "Its replica serves once all its stages have loaded.",
        ));
    }
    let (planned, resident) = (bytes("reserved") + bytes("adapters") + bytes("jobs"), bytes("resident"));
    if resident > bytes("memory") {
        findings.push(Finding::problem(
            format!("{name} takes {}, more than the {} that it offered", Bytes(resident), Bytes(bytes("memory"))),
            "The system may end it for that: lower `memory_bytes` or `kv_memory_share`, or give the machine more.",
        ));
    } else if planned > 0 && resident > planned / 5 * 6 + BESIDE_LEDGER {
        findings.push(Finding::warning(
            format!("{name} takes {}, planned were {}", Bytes(resident), Bytes(planned)),
            "What else runs in its process is not in the ledger: watch it (`ashlar top`), and report it if it grows.",
        ));
    }
    findings
}

/// Stages that hold the others of their replica up.
fn stragglers(nodes: &[&Value]) -> Vec<Finding> {
    let computed = |node: &Value| node["busy"]["compute_us"].as_u64().unwrap_or(0);
    let mut findings = Vec::new();
    for node in nodes.iter().filter(|node| !node["place"].is_null() && computed(node) > COMPUTED_MIN) {
        let replica = &node["place"][0];
        let mut others: Vec<u64> = nodes
            .iter()
            .filter(|other| other["place"][0] == *replica && other["node"] != node["node"])
            .map(|other| computed(other))
            .collect();
        others.sort_unstable();
        let Some(median) = others.get(others.len() / 2).copied().filter(|median| *median > 0) else {
            continue;
        };
        let times = computed(node) as f64 / median as f64;
        if times > STRAGGLER {
            let name = node["node"].as_str().unwrap_or("a node");
            findings.push(Finding::warning(
                format!("{name} computes {times:.1} times as long as the other stages of replica {replica}"),
                format!(
                    "All wait for it: look whether others compute on its machine (`ashlar doctor` there), give it fewer `layers`, or \
                     have another node take its place (ashlar drain {name})."
                ),
            ));
        }
    }
    findings
}

fn of_replica(replica: &Value) -> Vec<Finding> {
    let name = &replica["replica"];
    let mut findings = Vec::new();
    if replica["ready"] == false {
        findings.push(Finding::warning(
            format!("replica {name} does not serve yet"),
            "Its stages load, or one is missing: `ashlar top` shows which.",
        ));
    }
    let (blocks, used) = (&replica["kv_blocks"][0], &replica["kv_blocks"][1]);
    if let (Some(blocks), Some(used)) = (blocks.as_f64().filter(|blocks| *blocks > 0.0), used.as_f64())
        && used / blocks > KV_FULL
    {
        findings.push(Finding::warning(
            format!("the KV cache of replica {name} is {:.0} % full", used / blocks * 100.0),
            "Requests wait or are preempted: raise `kv_memory_share`, take `kv_cache_type = \"bf16\"`, lower `max_num_seqs`, or add a \
             replica.",
        ));
    }
    findings
}

fn of_counters(counters: &Value) -> Vec<Finding> {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let (running, waiting) = (number(&counters["running"]), number(&counters["waiting"]));
    let mut findings = Vec::new();
    if waiting > running.max(4) {
        findings.push(Finding::warning(
            format!("{waiting} requests wait, {running} are computed"),
            "More come than are computed: add a replica, or raise `max_num_seqs` if the KV cache has room.",
        ));
    }
    let audits = &counters["audits"];
    if number(&audits["differed"]) > 0 {
        findings.push(Finding::problem(
            format!("{} answers that were computed again had other bits", audits["differed"]),
            "A machine computes wrongly: the scheduler's log names it; look at its memory, and replace it.",
        ));
    } else if number(&audits["passed"]) > 0 {
        findings
            .push(Finding::good(format!("{} answers computed again had the same bits", audits["passed"])));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::findings::{Mark, any_problem};
    use serde_json::json;

    fn node(name: &str, stage: u32, compute_us: u64) -> Value {
        json!({
            "node": name, "memory": 8_u64 << 30, "place": [0, stage, 0], "loaded": 1.0, "leaving": false, "quarantined": null,
            "reserved": 1_u64 << 30, "adapters": 0, "jobs": 0, "resident": 1_u64 << 30, "busy": {"compute_us": compute_us},
        })
    }

    fn answer(nodes: Vec<Value>) -> Value {
        json!({
            "connected": true, "ready": true, "problem": null, "models": [],
            "cluster": {
                "term": 3, "nodes": nodes, "counters": {"running": 1, "waiting": 0, "audits": {"passed": 0, "differed": 0}},
                "replicas": [{"replica": 0, "ready": true, "kv_blocks": [100, 10]}],
            },
        })
    }

    fn text(answer: &Value) -> String {
        crate::findings::list(&examine(answer), false)
    }

    #[test]
    fn a_cluster_that_is_well_has_nothing_to_be_done() {
        let answer = answer(vec![node("a", 0, 9_000_000), node("b", 1, 8_000_000)]);
        let found = examine(&answer);
        assert!(found.iter().all(|finding| finding.mark == Mark::Good), "{found:?}");
        assert!(text(&answer).contains("2 nodes, term 3"));
    }

    #[test]
    fn nodes_that_do_harm_or_leave_or_take_too_much_are_named() {
        let mut nodes = vec![node("a", 0, 0), node("b", 1, 0), node("c", 2, 0), node("d", 3, 0)];
        nodes[0]["quarantined"] = json!("it computes wrong bits");
        nodes[1]["leaving"] = json!(true);
        nodes[2]["resident"] = json!(9_u64 << 30);
        nodes[3]["resident"] = json!(3_u64 << 30);
        let text = text(&answer(nodes));
        for part in [
            "✗ a is kept away from requests: it computes wrong bits",
            "! b is leaving",
            "ashlar drain b --undo",
            "✗ c takes 9.00 GiB, more than the 8.00 GiB that it offered",
            "! d takes 3.00 GiB, planned were 1.00 GiB",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_stage_that_holds_others_up_and_a_full_cache_are_warned_about() {
        let mut answer =
            answer(vec![node("a", 0, 30_000_000), node("b", 1, 9_000_000), node("c", 2, 8_000_000)]);
        answer["cluster"]["replicas"] = json!([{"replica": 0, "ready": false, "kv_blocks": [100, 95]}]);
        answer["cluster"]["counters"]["waiting"] = json!(40);
        let text = text(&answer);
        for part in [
            "! a computes 3.3 times as long as the other stages of replica 0",
            "! replica 0 does not serve yet",
            "! the KV cache of replica 0 is 95 % full",
            "! 40 requests wait, 1 are computed",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("! b computes"), "{text}");
    }

    #[test]
    fn a_cluster_without_scheduler_or_nodes_is_not_well() {
        let away = json!({"connected": false, "ready": false, "problem": "no scheduler", "cluster": null, "models": []});
        assert!(any_problem(&examine(&away)) && text(&away).contains("does not reach the scheduler"));
        let mut empty = answer(Vec::new());
        empty["ready"] = json!(false);
        empty["problem"] = json!("no node has joined");
        assert!(text(&empty).contains("✗ no node has joined\n    Start one"));
    }
}
