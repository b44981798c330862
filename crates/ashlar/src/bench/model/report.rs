//! What `bench model` reports: medians, shares of the machine's limits, and the peer beside them.

use super::{Kind, Sample};
use crate::bench::machine::MachineReport;
use crate::bench::peer::{Beside, Figure, beside};
use crate::bench::rows::{Work, kv_bytes_per_token};
use crate::bench::stats::median;
use crate::bench::table::{Table, figure, percent};
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_vocabulary::{Bytes, ModelShape, WeightType};
use serde::Serialize;

/// One kind of measurement, medians over the repeats.
#[derive(Debug, Serialize)]
pub(super) struct Line {
    /// `prefill` or `decode`.
    phase: &'static str,
    /// Rows per step.
    rows: usize,
    /// Tokens per second, all sequences together.
    tokens_per_s: f64,
    /// Milliseconds per step.
    step_ms: f64,
    /// Of which the layers (attention and feed-forward).
    layers_ms: f64,
    /// Of which the head (final norm and vocabulary product).
    head_ms: f64,
    /// Share of a step's time in which the thread that computes it is in no kernel: glue, hand-offs to other threads, waiting for
    /// them.
    outside_kernels: f64,
    /// Bytes of weights read per second.
    weight_bytes_per_s: f64,
    /// Share of the read bandwidth measured beside it, weights alone.
    of_bandwidth: f64,
    /// The same with cached keys and values.
    of_bandwidth_with_kv: f64,
    /// Operations per second: two per weight and row.
    flops_per_s: f64,
    /// Share of the multiply-add rate measured beside it.
    of_peak: f64,
    /// The peer's speed, where it reported this kind.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<Beside>,
}

/// Everything that is reported.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) architecture: String,
    pub(super) weight_bytes: u64,
    pub(super) context: usize,
    pub(super) repeats: usize,
    pub(super) load_s: f64,
    /// Whether it was loaded from a packed copy.
    pub(super) from_copy: bool,
    pub(super) machine: MachineReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) peer: Option<PeerReport>,
    pub(super) results: Vec<Line>,
}

/// The program that took turns.
#[derive(Debug, Serialize)]
pub(super) struct PeerReport {
    /// Its command, as the shell got it.
    pub(super) command: String,
    /// Memory that could be used beside our model when it first ran.
    pub(super) memory_left_bytes: u64,
    /// What it reported that we did not measure.
    pub(super) not_compared: Vec<String>,
}

/// Bytes of weights that a step with `logit_rows` rows of logits reads, of a model that holds `held` bytes: all layers
/// once, the head once per [`LOGIT_ROWS_MAX`] rows. An embedding table of its own is not read.
pub(super) fn step_bytes(shape: &ModelShape, logit_rows: usize, held: Bytes) -> Bytes {
    let bytes = |kind: WeightType| shape.embedding_weights() * kind.block_bytes() / kind.block_len();
    let table = if shape.tied_head { 0 } else { bytes(shape.weights.embedding) };
    let layers = held.0.saturating_sub((table + bytes(shape.weights.head)) as u64);
    let reads = logit_rows.div_ceil(LOGIT_ROWS_MAX);
    Bytes(layers + (bytes(shape.weights.head) * reads) as u64)
}

/// Two operations per weight and row that meets it.
fn step_flops(shape: &ModelShape, work: &Work) -> f64 {
    let layers = work.rows() as f64 * (shape.num_layers * shape.layer_weights()) as f64;
    2.0 * (layers + work.logit_rows().len() as f64 * shape.embedding_weights() as f64)
}

/// Bytes of cached keys and values that a step reads at least: each sequence's once.
fn step_kv_bytes(shape: &ModelShape, work: &Work, steps: usize) -> f64 {
    let tokens = match *work {
        Work::Decode { rows, position, .. } => rows as f64 * (position as f64 + 0.5 * (steps + 1) as f64),
        Work::Prefill { start, rows, .. } => (start + rows) as f64,
    };
    tokens * kv_bytes_per_token(shape) as f64
}

/// The figures of one kind. `peers` has the peer's of each repeat, if there is one.
pub(super) fn line(kind: &Kind, shape: &ModelShape, held: Bytes, peers: &[Vec<Figure>]) -> Line {
    let of = |value: &dyn Fn(&Sample) -> f64| median(&kind.samples.iter().map(value).collect::<Vec<f64>>());
    let logit_rows = kind.work.logit_rows().len();
    let (bytes, flops) = (step_bytes(shape, logit_rows, held).0 as f64, step_flops(shape, &kind.work));
    let kv = step_kv_bytes(shape, &kind.work, kind.steps);
    let step_s = of(&|sample| sample.step_s);
    let rates: Vec<f64> = kind.samples.iter().map(|sample| kind.work.rows() as f64 / sample.step_s).collect();
    let (phase, rows) = kind.wanted();
    Line {
        phase: phase.name(),
        rows,
        tokens_per_s: rows as f64 / step_s,
        step_ms: 1e3 * step_s,
        layers_ms: 1e3 * of(&|sample| sample.step_s - sample.head_s),
        head_ms: 1e3 * of(&|sample| sample.head_s),
        outside_kernels: of(&|sample| 1.0 - sample.kernels_s / sample.step_s),
        weight_bytes_per_s: bytes / step_s,
        of_bandwidth: of(&|sample| bytes / sample.step_s / sample.limits.bytes_per_s),
        of_bandwidth_with_kv: of(&|sample| (bytes + kv) / sample.step_s / sample.limits.bytes_per_s),
        flops_per_s: flops / step_s,
        of_peak: of(&|sample| flops / sample.step_s / sample.limits.flops_per_s),
        peer: beside(&rates, peers, phase, rows),
    }
}

/// What the peer reported beyond `kinds`, each once.
pub(super) fn not_compared(kinds: &[Kind], peers: &[Vec<Figure>]) -> Vec<String> {
    let mut names = Vec::new();
    for found in peers.iter().flatten() {
        let name = format!("{} × {}", found.phase, found.rows);
        if !names.contains(&name) && kinds.iter().all(|kind| kind.name() != name) {
            names.push(name);
        }
    }
    names
}

impl Report {
    /// Prints a table.
    pub(super) fn print(&self) {
        println!(
            "{} ({}): {} of weights per step, loaded{} in {:.2} s; decode after {} tokens of context",
            self.model,
            self.architecture,
            Bytes(self.weight_bytes),
            if self.from_copy { " from a packed copy" } else { "" },
            self.load_s,
            self.context
        );
        println!("{}", self.machine.line());
        if let Some(peer) = &self.peer {
            println!("peer: {}", peer.command);
        }
        println!();
        let ours = [
            "",
            "tokens/s",
            "ms/step",
            "layers ms",
            "head ms",
            "outside",
            "GB/s",
            "of bandwidth",
            "with KV",
            "GFLOP/s",
            "of peak",
        ];
        let peers = self.peer.as_ref().map(|_| ["peer tok/s", "ours/peer"]);
        let mut table = Table::new(ours.into_iter().chain(peers.into_iter().flatten()));
        for line in &self.results {
            let ours = [
                format!("{} × {}", line.phase, line.rows),
                figure(line.tokens_per_s),
                figure(line.step_ms),
                figure(line.layers_ms),
                figure(line.head_ms),
                format!("{:.1} %", 100.0 * line.outside_kernels),
                figure(line.weight_bytes_per_s / 1e9),
                percent(line.of_bandwidth),
                percent(line.of_bandwidth_with_kv),
                figure(line.flops_per_s / 1e9),
                percent(line.of_peak),
            ];
            let peers = self.peer.as_ref().map(|_| Beside::cells(line.peer.as_ref()));
            table.row(ours.into_iter().chain(peers.into_iter().flatten()));
        }
        print!("{}", table.render());
        if let Some(peer) = self.peer.as_ref().filter(|peer| !peer.not_compared.is_empty()) {
            println!("the peer also measured {}", peer.not_compared.join(", "));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows::llama_1b;

    /// Weight elements that take part in products.
    fn weights(shape: &ModelShape) -> usize {
        shape.num_layers * shape.layer_weights() + shape.embedding_weights()
    }

    #[test]
    fn a_step_reads_the_layers_once_and_the_head_once_per_share_of_its_rows() {
        let shape = llama_1b();
        let held = Bytes(4 * weights(&shape) as u64);
        assert!((4.9e9..5.0e9).contains(&(held.0 as f64)), "the 1B shape is 4.94 GB in f32, not {held}");
        let head = 4 * shape.embedding_weights() as u64;
        assert!(step_bytes(&shape, LOGIT_ROWS_MAX, held).0.abs_diff(held.0) <= 2);
        assert!(step_bytes(&shape, LOGIT_ROWS_MAX + 1, held).0.abs_diff(held.0 + head) <= 2);
    }

    #[test]
    fn operations_count_the_head_only_where_there_are_logits() {
        let shape = llama_1b();
        let prompt = |logits| Work::Prefill { sequence: 0, start: 0, rows: 4, logits };
        let head = 2.0 * shape.embedding_weights() as f64;
        assert_eq!(step_flops(&shape, &prompt(true)) - step_flops(&shape, &prompt(false)), head);
        let decode = Work::Decode { first: 0, rows: 3, position: 0 };
        assert_eq!(step_flops(&shape, &decode), 6.0 * weights(&shape) as f64);
    }
}
