//! The lines of `ashlar top`: text alone says everything; colours repeat it.

use super::facts::{Facts, JobFacts, ModelFacts, NodeFacts, NodeState};
use ashlar_vocabulary::Bytes;

const GREEN: &str = "32";
const YELLOW: &str = "33";
const RED: &str = "31";
const BOLD: &str = "1";
const SOFT: &str = "2";
/// Characters of a bar.
const BAR: usize = 10;
/// From this share on, memory is said to be short.
const NEARLY_FULL: f64 = 0.9;

/// What to print.
pub(super) fn lines(facts: &Facts, colours: bool) -> Vec<String> {
    let paint = Paint(colours);
    let mut lines = vec![head(facts, paint)];
    lines.extend(facts.problem.iter().map(|problem| paint.with(RED, &format!("problem: {problem}"))));
    lines.push(String::new());
    lines.push(paint.with(
        SOFT,
        &format!("{:<16} {:>7} {:>10} {:>10} {:>10}", "LATENCY, 60 s", "count", "p50", "p90", "p99"),
    ));
    for (name, count, percentiles) in &facts.latencies {
        let [p50, p90, p99] = percentiles.map(milliseconds);
        lines.push(format!("{name:<16} {count:>7} {p50:>10} {p90:>10} {p99:>10}"));
    }
    for model in &facts.models {
        lines.push(String::new());
        lines.extend(model_lines(model, paint));
    }
    if !facts.jobs.is_empty() {
        lines.push(String::new());
        lines.push(paint.with(
            SOFT,
            &format!("{:<40} {:<18} {:>14} {:>9} {:>8}", "JOB", "STATUS", "STEP", "LOSS", "LEFT"),
        ));
        lines.extend(facts.jobs.iter().map(job_line));
    }
    lines
}

fn head(facts: &Facts, paint: Paint) -> String {
    let state = match (facts.connected, &facts.problem) {
        (false, _) => paint.with(RED, "no scheduler"),
        (true, Some(_)) => paint.with(RED, "not ready"),
        (true, None) => paint.with(GREEN, "ready"),
    };
    format!(
        "{}  {state}  scheduler {} (term {})  gateways {}",
        paint.with(BOLD, "ashlar"),
        facts.holder,
        facts.term,
        facts.gateways
    )
}

fn model_lines(model: &ModelFacts, paint: Paint) -> Vec<String> {
    let hits = model.prefix_hits.map_or("-".to_owned(), percent);
    let kv = percent(model.kv_used);
    let kv =
        if model.kv_used >= NEARLY_FULL { paint.with(YELLOW, &format!("{kv} (nearly full)")) } else { kv };
    let mut lines = vec![
        format!(
            "{}  replicas {} of {}  running {}  waiting {}",
            paint.with(BOLD, &model.name),
            model.replicas.0,
            model.replicas.1,
            model.running,
            model.waiting
        ),
        format!(
            "tokens/s: {:.0} generated, {:.0} of prompts, {:.0} trained   KV blocks {kv}   prefix hits {hits}",
            model.generated_per_s, model.prompt_per_s, model.trained_per_s
        ),
    ];
    let width = model.nodes.iter().map(|node| node.name.chars().count()).max().unwrap_or(0).max(4);
    lines.push(paint.with(
        SOFT,
        &format!(
            "{:<width$}  {:<16} {:<9} {:<12} {:>11} {:>11}  {:<15} {:>5} {:>5} {:>6}",
            "NODE", "PLACE", "LAYERS", "STATE", "PLANNED", "RESIDENT", "COMPUTES", "EXCH.", "SENDS", "TRAINS"
        ),
    ));
    for node in &model.nodes {
        lines.push(node_line(node, width, paint));
        if let NodeState::Quarantined(reason) = &node.state {
            lines.push(format!("{:<width$}  {reason}", ""));
        }
    }
    lines
}

fn node_line(node: &NodeFacts, width: usize, paint: Paint) -> String {
    let place = node
        .place
        .map_or("-".to_owned(), |[replica, stage, rank]| format!("r{replica} stage {stage}.{rank}"));
    let layers =
        if node.place.is_some() { format!("{}..{}", node.layers.0, node.layers.1) } else { "-".into() };
    let (state, colour) = match &node.state {
        NodeState::Ready => ("ready".to_owned(), GREEN),
        NodeState::Loading(share) => (format!("loading {}", percent(*share)), YELLOW),
        NodeState::Standby => ("standby".to_owned(), SOFT),
        NodeState::Leaving => ("leaving".to_owned(), YELLOW),
        NodeState::Quarantined(_) => ("quarantined".to_owned(), RED),
    };
    let state = paint.with(colour, &format!("{state:<12}"));
    let planned = Bytes(node.planned_bytes).to_string();
    let resident = format!("{:>11}", Bytes(node.resident_bytes).to_string());
    let over = node.place.is_some() && node.resident_bytes > node.offered_bytes;
    let resident = if over { paint.with(RED, &resident) } else { resident };
    format!(
        "{:<width$}  {place:<16} {layers:<9} {state} {planned:>11} {resident}  {} {:>4} {:>5} {:>5} {:>6}",
        node.name,
        bar(node.compute),
        percent(node.compute),
        percent(node.exchange),
        percent(node.send),
        percent(node.train)
    )
}

fn job_line(job: &JobFacts) -> String {
    let step = match job.steps {
        Some(steps) => format!("{} of {steps}", job.step),
        None => job.step.to_string(),
    };
    let loss = job.loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
    let left = job.remaining_s.map_or("-".to_owned(), duration);
    format!("{:<40} {:<18} {step:>14} {loss:>9} {left:>8}", job.id, job.status)
}

fn bar(share: f64) -> String {
    let full = (share.clamp(0.0, 1.0) * BAR as f64).round() as usize;
    "█".repeat(full) + &"░".repeat(BAR - full)
}

fn percent(share: f64) -> String {
    format!("{:.0}%", share * 100.0)
}

fn milliseconds(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(ms) if ms < 10.0 => format!("{ms:.1} ms"),
        Some(ms) if ms < 10_000.0 => format!("{ms:.0} ms"),
        Some(ms) => format!("{:.1} s", ms / 1e3),
    }
}

fn duration(seconds: f64) -> String {
    match seconds as u64 {
        s @ 0..60 => format!("{s} s"),
        s @ 60..3600 => format!("{} min", s / 60),
        s => format!("{} h {} min", s / 3600, s % 3600 / 60),
    }
}

/// Whether to write colours.
#[derive(Debug, Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::super::facts::Look;
    use super::*;
    use serde_json::{Value, json};
    use std::time::{Duration, Instant};

    fn cluster(generated: u64, compute_us: u64, quarantined: Option<&str>) -> Value {
        json!({"connected": true, "problem": null, "models": [], "cluster": {
            "model": "/models/small/", "term": 3, "holder": "10.0.0.1:7401/pid-1/started-2", "gateways": 2,
            "counters": {"generated_tokens": generated, "scheduled_tokens": 3 * generated, "running": 5, "waiting": 1,
                "prefix_cache_queries": 200, "prefix_cache_hits": 50},
            "replicas": [{"ready": true, "kv_blocks": [100, 95]}],
            "nodes": [
                {"node": "a", "place": [0, 1, 0], "layers": {"start": 2, "end": 4}, "loaded": 1.0, "leaving": false,
                 "quarantined": quarantined, "memory": 4096, "resident": 1024, "adapters": 0, "jobs": 0,
                 "ledger": {"weights": 1024, "kv_cache": 1024}, "busy": {"compute_us": compute_us}, "trained": {}},
                {"node": "spare", "place": null, "layers": {"start": 0, "end": 0}, "loaded": 0.0, "leaving": false,
                 "quarantined": null, "memory": 4096, "resident": 10, "ledger": {}, "busy": {}, "trained": {}},
            ],
        }})
    }

    fn facts(quarantined: Option<&str>) -> Facts {
        let at = Instant::now();
        let live = json!({"ttft_ms": {"count": 2, "p50": 8.06, "p90": 123.4, "p99": 12345.6}});
        let jobs = json!({"data": [
            {"id": "ftjob-1", "status": "running",
             "ashlar": {"steps": 12, "total_steps": 40, "remaining_seconds": 75.0, "metrics": {"train_loss": 0.51234}}},
            {"id": "ftjob-0", "status": "succeeded"},
        ]});
        let before =
            Look { at, cluster: cluster(100, 0, quarantined), live: live.clone(), jobs: jobs.clone() };
        let later = at + Duration::from_secs(2);
        let now = Look { at: later, cluster: cluster(300, 600_000, quarantined), live, jobs };
        Facts::between(&before, &now)
    }

    #[test]
    fn rates_are_those_between_two_looks() {
        let facts = facts(None);
        let model = &facts.models[0];
        assert_eq!((model.generated_per_s, model.prompt_per_s), (100.0, 200.0));
        assert!((model.nodes[0].compute - 0.3).abs() < 1e-9);
        assert_eq!(facts.json()["models"][0]["nodes"][1]["state"], "standby");
        assert_eq!(facts.jobs.len(), 1);
    }

    #[test]
    fn the_page_says_who_computes_what() {
        let page = lines(&facts(None), false).join("\n");
        for part in [
            "ashlar  ready  scheduler 10.0.0.1:7401 (term 3)  gateways 2",
            "first token            2     8.1 ms     123 ms     12.3 s",
            "small  replicas 1 of 1  running 5  waiting 1",
            "KV blocks 95% (nearly full)   prefix hits 25%",
            "a      r0 stage 1.0     2..4      ready",
            "███░░░░░░░  30%",
            "spare  -                -         standby",
            "12 of 40    0.5123    1 min",
        ] {
            assert!(page.contains(part), "{part}\n{page}");
        }
        assert!(!page.contains('\x1b'));
        assert!(lines(&facts(None), true).join("\n").contains("\x1b[32mready"));
    }

    #[test]
    fn a_node_that_does_harm_is_shown_with_the_reason() {
        let page = lines(&facts(Some("its bits differ")), false).join("\n");
        assert!(page.contains("quarantined") && page.contains("its bits differ"), "{page}");
    }

    #[test]
    fn a_new_scheduler_or_node_has_no_rates_yet() {
        let at = Instant::now();
        let empty = json!({"connected": false, "problem": "no scheduler", "models": [], "cluster": null});
        let look = |cluster: Value, at| Look { at, cluster, live: Value::Null, jobs: Value::Null };
        let facts = Facts::between(
            &look(empty.clone(), at),
            &look(cluster(300, 9_000_000, None), at + Duration::from_secs(1)),
        );
        assert_eq!((facts.models[0].generated_per_s, facts.models[0].nodes[0].compute), (0.0, 0.0));
        let gone = Facts::between(&look(cluster(1, 1, None), at), &look(empty, at + Duration::from_secs(1)));
        assert!(lines(&gone, false)[0].contains("no scheduler"));
    }
}
