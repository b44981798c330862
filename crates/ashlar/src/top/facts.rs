//! What a gateway says of its cluster at two moments, and the rates between them.

use serde_json::{Value, json};
use std::time::Instant;

/// A gateway's answers at one moment.
#[derive(Debug, Clone)]
pub(super) struct Look {
    pub(super) at: Instant,
    pub(super) cluster: Value,
    pub(super) live: Value,
    pub(super) jobs: Value,
}

/// The cluster between two looks.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Facts {
    pub(super) models: Vec<ModelFacts>,
    pub(super) connected: bool,
    pub(super) problem: Option<String>,
    pub(super) term: u64,
    pub(super) holder: String,
    pub(super) gateways: u64,
    /// Name, count, and p50, p90, p99 in milliseconds.
    pub(super) latencies: Vec<(&'static str, u64, [Option<f64>; 3])>,
    pub(super) jobs: Vec<JobFacts>,
}

/// One model of the cluster.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelFacts {
    pub(super) name: String,
    pub(super) generated_per_s: f64,
    pub(super) prompt_per_s: f64,
    pub(super) trained_per_s: f64,
    pub(super) running: u64,
    pub(super) waiting: u64,
    /// Shares, 0 to 1.
    pub(super) kv_used: f64,
    pub(super) prefix_hits: Option<f64>,
    pub(super) replicas: (usize, usize),
    pub(super) nodes: Vec<NodeFacts>,
}

/// A node.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NodeFacts {
    pub(super) name: String,
    /// Replica, stage and rank.
    pub(super) place: Option<[u64; 3]>,
    pub(super) layers: (u64, u64),
    pub(super) state: NodeState,
    pub(super) planned_bytes: u64,
    pub(super) resident_bytes: u64,
    pub(super) offered_bytes: u64,
    /// Shares of the time since the look before.
    pub(super) compute: f64,
    pub(super) exchange: f64,
    pub(super) send: f64,
    pub(super) train: f64,
}

/// How a node is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum NodeState {
    Ready,
    /// Loading, with the share that is there.
    Loading(f64),
    Standby,
    Leaving,
    Quarantined(String),
}

/// A fine-tuning job that has not ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct JobFacts {
    pub(super) id: String,
    pub(super) status: String,
    pub(super) step: u64,
    pub(super) steps: Option<u64>,
    pub(super) loss: Option<f64>,
    pub(super) remaining_s: Option<f64>,
}

impl Facts {
    pub(super) fn between(before: &Look, now: &Look) -> Facts {
        let elapsed_s = now.at.duration_since(before.at).as_secs_f64().max(1e-3);
        let own = (model_name(&now.cluster["cluster"]), &before.cluster["cluster"], &now.cluster["cluster"]);
        let deployed = now.cluster["models"].as_array().into_iter().flatten().map(|model| {
            let name = text(&model["request"]["name"]);
            let old = before.cluster["models"].as_array().into_iter().flatten();
            let old = old.into_iter().find(|old| old["request"]["name"] == model["request"]["name"]);
            (name, old.map_or(&Value::Null, |old| &old["cluster"]), &model["cluster"])
        });
        let models = [own].into_iter().chain(deployed);
        let latencies = [("first token", "ttft_ms"), ("between tokens", "itl_ms"), ("request", "e2e_ms")];
        Facts {
            models: models.map(|(name, old, new)| ModelFacts::between(name, old, new, elapsed_s)).collect(),
            connected: now.cluster["connected"] == true,
            problem: now.cluster["problem"].as_str().map(str::to_owned),
            term: number(&now.cluster["cluster"]["term"]),
            // Of the holder's name only the address is for people.
            holder: text(&now.cluster["cluster"]["holder"])
                .split("/pid-")
                .next()
                .unwrap_or_default()
                .to_owned(),
            gateways: number(&now.cluster["cluster"]["gateways"]),
            latencies: latencies.map(|(name, key)| latency(name, &now.live[key])).to_vec(),
            jobs: now.jobs["data"].as_array().into_iter().flatten().filter_map(JobFacts::read).collect(),
        }
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let latency = |(name, count, [p50, p90, p99]): &(&str, u64, [Option<f64>; 3])| json!({"of": name, "count": count, "p50_ms": p50, "p90_ms": p90, "p99_ms": p99});
        let job = |job: &JobFacts| {
            json!({
                "id": job.id, "status": job.status, "step": job.step, "steps": job.steps, "loss": job.loss,
                "remaining_s": job.remaining_s,
            })
        };
        json!({
            "connected": self.connected,
            "problem": self.problem,
            "term": self.term,
            "holder": self.holder,
            "gateways": self.gateways,
            "latencies": self.latencies.iter().map(latency).collect::<Vec<_>>(),
            "models": self.models.iter().map(ModelFacts::json).collect::<Vec<_>>(),
            "jobs": self.jobs.iter().map(job).collect::<Vec<_>>(),
        })
    }
}

impl ModelFacts {
    fn between(name: String, old: &Value, new: &Value, elapsed_s: f64) -> ModelFacts {
        let rate = |counter: &str| {
            let (before, now) = (old["counters"][counter].as_u64(), number(&new["counters"][counter]));
            // Another scheduler counts from nothing.
            before.map_or(0.0, |before| now.saturating_sub(before) as f64 / elapsed_s)
        };
        let generated_per_s = rate("generated_tokens");
        let blocks = |index: usize| {
            let replicas = new["replicas"].as_array().into_iter().flatten();
            replicas.map(|replica| number(&replica["kv_blocks"][index])).sum::<u64>() as f64
        };
        let replicas = new["replicas"].as_array().map(Vec::as_slice).unwrap_or_default();
        let looked_up = number(&new["counters"]["prefix_cache_queries"]) as f64;
        let nodes = new["nodes"].as_array().into_iter().flatten().map(|node| {
            let mut known = old["nodes"].as_array().into_iter().flatten();
            let before = known.find(|before| before["node"] == node["node"]);
            NodeFacts::between(before.unwrap_or(&Value::Null), node, elapsed_s)
        });
        ModelFacts {
            name,
            generated_per_s,
            // Each generated token but the last of an answer is computed once more than it is generated.
            prompt_per_s: (rate("scheduled_tokens") - generated_per_s).max(0.0),
            trained_per_s: rate("trained_tokens"),
            running: number(&new["counters"]["running"]),
            waiting: number(&new["counters"]["waiting"]),
            kv_used: if blocks(0) > 0.0 { blocks(1) / blocks(0) } else { 0.0 },
            prefix_hits: (looked_up > 0.0)
                .then(|| number(&new["counters"]["prefix_cache_hits"]) as f64 / looked_up),
            replicas: (replicas.iter().filter(|replica| replica["ready"] == true).count(), replicas.len()),
            nodes: nodes.collect(),
        }
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "generated_tokens_per_s": self.generated_per_s,
            "prompt_tokens_per_s": self.prompt_per_s,
            "trained_tokens_per_s": self.trained_per_s,
            "running": self.running,
            "waiting": self.waiting,
            "kv_used": self.kv_used,
            "prefix_hits": self.prefix_hits,
            "replicas_ready": self.replicas.0,
            "replicas": self.replicas.1,
            "nodes": self.nodes.iter().map(NodeFacts::json).collect::<Vec<_>>(),
        })
    }
}

impl NodeFacts {
    fn between(old: &Value, new: &Value, elapsed_s: f64) -> NodeFacts {
        let share = |table: &str, keys: &[&str]| {
            let sum = |value: &Value| keys.iter().map(|key| number(&value[table][key])).sum::<u64>();
            // A new assignment counts from nothing.
            let spent_us = sum(new).saturating_sub(if old.is_null() { sum(new) } else { sum(old) });
            (spent_us as f64 / 1e6 / elapsed_s).min(1.0)
        };
        let ledger = new["ledger"].as_object().into_iter().flatten();
        let planned = ledger.map(|(_, bytes)| number(bytes)).sum::<u64>();
        let place =
            new["place"].as_array().map(|place| [0, 1, 2].map(|part| place.get(part).map_or(0, number)));
        let loaded = new["loaded"].as_f64().unwrap_or(0.0);
        let state = match (new["quarantined"].as_str(), new["leaving"] == true, place) {
            (Some(reason), ..) => NodeState::Quarantined(reason.to_owned()),
            (None, true, _) => NodeState::Leaving,
            (None, false, None) => NodeState::Standby,
            (None, false, Some(_)) if loaded < 1.0 => NodeState::Loading(loaded),
            (None, false, Some(_)) => NodeState::Ready,
        };
        NodeFacts {
            name: text(&new["node"]),
            place,
            layers: (number(&new["layers"]["start"]), number(&new["layers"]["end"])),
            state,
            planned_bytes: planned + number(&new["adapters"]) + number(&new["jobs"]),
            resident_bytes: number(&new["resident"]),
            offered_bytes: number(&new["memory"]),
            compute: share("busy", &["compute_us"]),
            exchange: share("busy", &["collective_us"]),
            send: share("busy", &["send_us"]),
            train: share("trained", &["compute_us", "exchange_us", "durable_us"]),
        }
    }

    fn json(&self) -> Value {
        json!({
            "node": self.name,
            "place": self.place,
            "layers": [self.layers.0, self.layers.1],
            "state": self.state.name(),
            "planned_bytes": self.planned_bytes,
            "resident_bytes": self.resident_bytes,
            "offered_bytes": self.offered_bytes,
            "compute": self.compute,
            "exchange": self.exchange,
            "send": self.send,
            "train": self.train,
        })
    }
}

impl NodeState {
    pub(super) fn name(&self) -> &'static str {
        match self {
            NodeState::Ready => "ready",
            NodeState::Loading(_) => "loading",
            NodeState::Standby => "standby",
            NodeState::Leaving => "leaving",
            NodeState::Quarantined(_) => "quarantined",
        }
    }
}

impl JobFacts {
    fn read(job: &Value) -> Option<JobFacts> {
        let status = text(&job["status"]);
        if ["succeeded", "failed", "cancelled"].contains(&status.as_str()) {
            return None;
        }
        let more = &job["ashlar"];
        Some(JobFacts {
            id: text(&job["id"]),
            status,
            step: number(&more["steps"]),
            steps: more["total_steps"].as_u64(),
            loss: more["metrics"]["train_loss"].as_f64(),
            remaining_s: more["remaining_seconds"].as_f64(),
        })
    }
}

fn latency(name: &'static str, of: &Value) -> (&'static str, u64, [Option<f64>; 3]) {
    (name, number(&of["count"]), ["p50", "p90", "p99"].map(|percentile| of[percentile].as_f64()))
}

/// The last part of where a model lies.
fn model_name(cluster: &Value) -> String {
    let model = cluster["model"].as_str().unwrap_or_default();
    model.trim_end_matches('/').rsplit('/').next().unwrap_or_default().to_owned()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
