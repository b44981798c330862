//! The scheduler's snapshot in Prometheus' text format, rendered afresh for each scrape: a node that has left leaves no
//! stale series behind.

use crate::degradation::Degradation;
use crate::live::unix_s;
use ashlar_protocol::serving::{ClusterSnapshot, NodeView, ReplicaView, RequestState, RequestView};
use std::collections::BTreeSet;
use std::fmt::Write;

/// Renders `snapshot` for the model served as `model_name`; where that is `deployed` beside others, all is labelled with it.
pub(super) fn render(snapshot: &ClusterSnapshot, model_name: &str, deployed: bool) -> String {
    let model = escaped(model_name);
    let labels = if deployed { format!("{{model_name=\"{model}\"}}") } else { String::new() };
    let mut page = Page { text: String::new(), model, labels };
    let counters = &snapshot.counters;
    page.model("vllm:num_requests_running", "gauge", "Sequences being computed.", counters.running as f64);
    page.model("vllm:num_requests_waiting", "gauge", "Sequences waiting for room.", counters.waiting as f64);
    page.model("vllm:kv_cache_usage_perc", "gauge", "Share of KV blocks in use, 0 to 1.", kv_usage(snapshot));
    page.model("vllm:num_preemptions_total", "counter", "Preemptions.", counters.preemptions as f64);
    page.model(
        "vllm:prefix_cache_queries_total",
        "counter",
        "Prompt tokens looked up in the prefix cache.",
        counters.prefix_cache_queries as f64,
    );
    page.model(
        "vllm:prefix_cache_hits_total",
        "counter",
        "Prompt tokens found in the prefix cache.",
        counters.prefix_cache_hits as f64,
    );
    page.plain(
        "ashlar_replays_total",
        "counter",
        "Sequences taken up again after their replica was lost.",
        counters.replays as f64,
    );
    page.plain(
        "ashlar_refilled_tokens_total",
        "counter",
        "Positions that only the stages computed again which had been lost.",
        counters.refilled_tokens as f64,
    );
    page.plain(
        "ashlar_shed_requests_total",
        "counter",
        "Choices refused because more came than could be computed.",
        counters.shed as f64,
    );
    page.plain(
        "ashlar_predicted_wait_seconds",
        "gauge",
        "How long all that waits will take.",
        counters.predicted_wait_ms.unwrap_or(0) as f64 / 1_000.0,
    );
    page.degraded(snapshot);
    page.hops(&snapshot.replicas);
    page.adapters(snapshot);
    let audits = &counters.audits;
    page.plain(
        "ashlar_audits_passed_total",
        "counter",
        "Answers computed again, with the same bits.",
        audits.passed as f64,
    );
    page.plain(
        "ashlar_audits_differed_total",
        "counter",
        "Answers computed again, with other bits.",
        audits.differed as f64,
    );
    page.plain(
        "ashlar_audits_undecided_total",
        "counter",
        "Of these, those in which nobody could tell who is wrong.",
        audits.undecided as f64,
    );
    page.plain(
        "ashlar_audits_dropped_total",
        "counter",
        "Audits that could not be completed.",
        audits.dropped as f64,
    );
    page.plain("ashlar_lease_term", "gauge", "The scheduler's lease term.", snapshot.term.0 as f64);
    page.plain("ashlar_nodes", "gauge", "Joined nodes.", snapshot.nodes.len() as f64);
    page.plain(
        "ashlar_replicas",
        "gauge",
        "Replicas, whole or in the making.",
        snapshot.replicas.len() as f64,
    );
    let ready = snapshot.replicas.iter().filter(|replica| replica.ready).count();
    page.plain("ashlar_replicas_ready", "gauge", "Replicas that serve.", ready as f64);
    page.plain("ashlar_steps_total", "counter", "Scheduler steps.", counters.steps as f64);
    page.plain(
        "ashlar_scheduled_tokens_total",
        "counter",
        "Tokens computed, of prompts and answers.",
        counters.scheduled_tokens as f64,
    );

    page.plain(
        "ashlar_training_steps_total",
        "counter",
        "Committed steps of fine-tuning jobs.",
        counters.training_steps as f64,
    );
    page.plain(
        "ashlar_training_tokens_total",
        "counter",
        "Tokens that these computed.",
        counters.trained_tokens as f64,
    );

    if let Some(loss) = counters.training_loss {
        page.plain(
            "ashlar_training_loss",
            "gauge",
            "Mean loss of the latest step of the job that trains, in nats.",
            loss,
        );
    }

    let bytes: [NodeSeries; 6] = [
        ("ashlar_node_memory_offered_bytes", "Memory that the node offered.", |n| n.memory.0 as f64),
        ("ashlar_ledger_reserved_bytes", "Memory that the ledger has reserved for serving.", |n| {
            n.reserved.0 as f64
        }),
        ("ashlar_ledger_adapters_bytes", "Memory that adapters take on the replica's fullest rank.", |n| {
            n.adapters.0 as f64
        }),
        ("ashlar_ledger_jobs_bytes", "Memory that is reserved for fine-tuning jobs.", |n| n.jobs.0 as f64),
        ("ashlar_ledger_resident_bytes", "Memory that is really resident.", |n| n.resident.0 as f64),
        ("ashlar_node_loaded_ratio", "Share of the node's weights that is loaded.", |n| f64::from(n.loaded)),
    ];
    for series in bytes {
        page.nodes(&snapshot.nodes, "gauge", series);
    }
    let serving: [NodeSeries; 5] = [
        ("ashlar_stage_compute_seconds_total", "Time spent computing.", |n| n.busy.compute_us as f64 / 1e6),
        ("ashlar_stage_wait_seconds_total", "Time spent waiting for work (bubbles).", |n| {
            n.busy.wait_us as f64 / 1e6
        }),
        ("ashlar_stage_collective_seconds_total", "Time spent exchanging within the stage.", |n| {
            n.busy.collective_us as f64 / 1e6
        }),
        ("ashlar_stage_send_seconds_total", "Time spent sending activations on.", |n| {
            n.busy.send_us as f64 / 1e6
        }),
        ("ashlar_link_sent_bytes_total", "Bytes of activations handed on to the next stage.", |n| {
            n.busy.sent_bytes as f64
        }),
    ];
    let training: [NodeSeries; 4] = [
        (
            "ashlar_training_compute_seconds_total",
            "Time that training computed, interruptions included.",
            |n| n.trained.compute_us as f64 / 1e6,
        ),
        ("ashlar_training_wait_seconds_total", "Time that training waited for another stage.", |n| {
            n.trained.wait_us as f64 / 1e6
        }),
        ("ashlar_training_exchange_seconds_total", "Time that training exchanged with other ranks.", |n| {
            n.trained.exchange_us as f64 / 1e6
        }),
        ("ashlar_training_durable_seconds_total", "Time that training took to store its state.", |n| {
            n.trained.durable_us as f64 / 1e6
        }),
    ];
    for series in serving.into_iter().chain(training) {
        page.nodes(&snapshot.nodes, "counter", series);
    }
    page.text
}

/// Name, help, and value of one node.
type NodeSeries = (&'static str, &'static str, fn(&NodeView) -> f64);

struct Page {
    text: String,
    model: String,
    /// Of series that have no others.
    labels: String,
}

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a string does not fail.
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn model(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let _ = writeln!(self.text, "{name}{{model_name=\"{}\",engine=\"0\"}} {value}", self.model);
    }

    fn plain(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        let _ = writeln!(self.text, "{name}{} {value}", self.labels);
    }

    fn hops(&mut self, replicas: &[ReplicaView]) {
        let name = "ashlar_hop_seconds";
        self.head(name, "gauge", "Time that rows lately took from a stage to the next.");
        for replica in replicas {
            for (stage, hop) in replica.hops_us.iter().enumerate() {
                let Some(hop) = hop else { continue };
                let seconds = *hop as f64 / 1e6;
                let _ = writeln!(
                    self.text,
                    "{name}{{replica=\"{}\",from_stage=\"{stage}\"}} {seconds}",
                    replica.replica
                );
            }
        }
    }

    fn degraded(&mut self, snapshot: &ClusterSnapshot) {
        let name = "ashlar_degraded";
        self.head(name, "gauge", "Whether it is less than it should be, in this way, while it serves.");
        for way in Degradation::ALL {
            let labels = match self.labels.strip_prefix('{') {
                None => format!("{{reason=\"{}\"}}", way.name()),
                Some(rest) => format!("{{reason=\"{}\",{rest}", way.name()),
            };
            let _ = writeln!(self.text, "{name}{labels} {}", u8::from(way.is_in(snapshot)));
        }
    }

    /// vLLM's: names as labels, the time as the value. Of the choices in progress that a snapshot tells of.
    fn adapters(&mut self, snapshot: &ClusterSnapshot) {
        let names = |waiting: bool| {
            let in_state = |request: &&RequestView| (request.state == RequestState::Waiting) == waiting;
            let asked: BTreeSet<_> =
                snapshot.requests.iter().filter(in_state).filter_map(|request| request.adapter).collect();
            let named = snapshot.adapters.iter().filter(|view| asked.contains(&view.adapter));
            named.map(|view| escaped(&view.name)).collect::<Vec<_>>().join(",")
        };
        let name = "vllm:lora_requests_info";
        self.head(name, "gauge", "Adapters of running and waiting requests.");
        let _ = writeln!(
            self.text,
            "{name}{{model_name=\"{}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\",max_lora=\"{}\"}} {}",
            self.model,
            names(false),
            names(true),
            snapshot.adapters.len(),
            unix_s()
        );
    }

    fn nodes(&mut self, nodes: &[NodeView], kind: &str, (name, help, value): NodeSeries) {
        self.head(name, kind, help);
        for node in nodes {
            let (replica, stage, rank) = match node.place {
                Some((replica, stage, rank)) => (replica.to_string(), stage.to_string(), rank.to_string()),
                None => (String::new(), "standby".to_owned(), String::new()),
            };
            let _ = writeln!(
                self.text,
                "{name}{{node=\"{}\",replica=\"{replica}\",stage=\"{stage}\",rank=\"{rank}\"}} {}",
                escaped(&node.node.0),
                value(node)
            );
        }
    }
}

fn kv_usage(snapshot: &ClusterSnapshot) -> f64 {
    let total: u64 = snapshot.replicas.iter().map(|replica| u64::from(replica.kv_blocks.0)).sum();
    let used: u64 = snapshot.replicas.iter().map(|replica| u64::from(replica.kv_blocks.1)).sum();
    if total == 0 { 0.0 } else { used as f64 / total as f64 }
}

fn escaped(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
