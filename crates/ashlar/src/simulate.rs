//! `ashlar simulate`: what a cluster would do under a load, with faults, in virtual time. Starts nothing.
//!
//! Layout: [`setup`] (from arguments, or from a running cluster, to what is simulated), [`units`] (figures as people write them),
//! [`show`] (what comes of it).

mod setup;
mod show;
mod units;

use crate::bench::serve::Length;
use crate::drill::Role;
use crate::plan::{parse_bytes, parse_device};
use crate::precision::PrecisionArgs;
use anyhow::{Context, Result};
use ashlar_shard_plan::DeviceReport;
use ashlar_simulation::plan::{PlanReport, plan};
use ashlar_vocabulary::Bytes;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use units::{Kind, parse_rate, parse_seconds};

/// A bar is drawn for whatever takes longer than this.
const PATIENCE: Duration = Duration::from_secs(1);
const BAR_STEPS: u64 = 1_000;

/// Arguments of `ashlar simulate`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  ashlar simulate                                                  the demo model on eight nodes, with six faults per hour
  ashlar simulate --model llama-3.1-8b --quantize q4_0 --nodes 8 --stages 2 --bandwidth 80GB/s --flops 1T
  ashlar simulate --model llama-3.1-8b --nodes 9 --stages 4 --replicas 2 --runs 5        two replicas and a standby, five seeds
  ashlar simulate --model ./llama-3.2-1b --trace requests.jsonl --faults-per-hour 0 --json
  ashlar simulate --node-from http://127.0.0.1:8080 --requests-per-s 1 --duration 60s    the nodes and the cut of a running cluster
A trace has a line per request, {\"at_s\": 0.5, \"prompt_tokens\": 300, \"output_tokens\": 120}; Azure's and Mooncake's are read, too.
The same seed, rate, lengths and duration give the arrivals of `ashlar bench serve`.

What is simulated: the code of scheduler, nodes and gateways that decides (admission, batching, KV blocks, placement, fences,
recovery), message by message, and every process, connection, kill and freeze. A step takes what the cost model of `ashlar plan`
says of its stage, a slice the time to load its bytes, a message half a round trip and its bytes.
What is not: tokenizer, HTTP, grammars, sampling, disks, neighbours that take the machine's time, and any change of speed with heat
or load: costs are constant. Prompts share nothing, so the prefix cache helps only where something is computed again.")]
pub(crate) struct SimulateArgs {
    /// Model directory, hub id, or the name of a shape (`llama-3.2-1b`); default: the demo model.
    #[arg(long, value_name = "DIR|HUB_ID|SHAPE")]
    model: Option<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Nodes; those that the layout has no place for are standbys.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    nodes: u32,
    /// Pipeline stages; default: the fewest that fit.
    #[arg(long)]
    stages: Option<usize>,
    /// Tensor-parallel ranks per stage.
    #[arg(long)]
    tp: Option<usize>,
    /// Replicas; default: as many as fit.
    #[arg(long)]
    replicas: Option<usize>,
    /// Whether all stages share the head; default: where that is predicted to be faster.
    #[arg(long)]
    spread_head: Option<bool>,
    /// Memory of each node.
    #[arg(long, value_name = "SIZE", default_value = "16GiB", value_parser = parse_bytes)]
    memory: Bytes,
    /// Speed at which each node reads weights.
    #[arg(long, value_name = "BYTES/S", default_value = "40GB/s", value_parser = parse_rate)]
    bandwidth: f64,
    /// Speed of each node's products, in operations per second.
    #[arg(long, value_name = "FLOP/S", default_value = "300G", value_parser = parse_rate)]
    flops: f64,
    /// The same with quantised weights; default: 1.5 times that.
    #[arg(long, value_name = "FLOP/S", value_parser = parse_rate)]
    quantized_flops: Option<f64>,
    /// A node with figures of its own, as for `ashlar plan`; may be repeated, instead of --nodes.
    #[arg(long, value_name = "NAME=MEM,BW,FLOPS[,QFLOPS]", value_parser = parse_device, conflicts_with_all = ["memory", "bandwidth", "flops"])]
    device: Vec<DeviceReport>,
    /// Take nodes, their speeds, layout, model and context from a running cluster.
    #[arg(long, value_name = "URL", conflicts_with_all = ["device", "stages", "tp", "replicas"])]
    node_from: Option<String>,
    /// API key for that, if its gateway wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
    /// Gateways.
    #[arg(long, default_value_t = 1)]
    gateways: usize,
    /// Longest sequence in tokens.
    #[arg(long, value_name = "TOKENS")]
    max_context: Option<u32>,
    /// Most sequences running per replica.
    #[arg(long, default_value_t = 64)]
    max_num_seqs: usize,
    /// Most tokens computed in a step.
    #[arg(long, default_value_t = 512)]
    max_num_batched_tokens: u32,
    /// How long a step should take at most.
    #[arg(long, value_name = "MS", default_value_t = 100)]
    step_target_ms: u64,
    /// Round trip between any two processes, in microseconds.
    #[arg(long, default_value_t = 50.0)]
    round_trip_us: f64,
    /// Link speed.
    #[arg(long, value_name = "BYTES/S", default_value = "4GB/s", value_parser = parse_rate)]
    link_bandwidth: f64,
    /// What a step takes on every rank beside the cost model, in microseconds.
    #[arg(long, default_value_t = 200)]
    step_overhead_us: u64,
    /// Speed at which a slice of the model is loaded.
    #[arg(long, value_name = "BYTES/S", default_value = "2GB/s", value_parser = parse_rate)]
    load_bandwidth: f64,
    /// From the kill of a process until it runs again, in milliseconds.
    #[arg(long, default_value_t = 100)]
    restart_ms: u64,
    /// Requests per second on average, with Poisson arrivals.
    #[arg(long, value_name = "RATE", default_value_t = 2.0, value_parser = units::positive)]
    requests_per_s: f64,
    /// Recorded lengths and times instead.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["requests_per_s", "prompt_tokens", "output_tokens"])]
    trace: Option<PathBuf>,
    /// Tokens of a prompt: a number, or a range as 64..512.
    #[arg(long, value_name = "TOKENS", default_value = "512")]
    prompt_tokens: Length,
    /// Tokens of an answer: a number, or a range.
    #[arg(long, value_name = "TOKENS", default_value = "256")]
    output_tokens: Length,
    /// For how long requests arrive, as 10m, 90s or 1h; default: 10m, or all of a trace.
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    duration: Option<f64>,
    /// Faults per hour in the whole cluster, at random; 0 for none.
    #[arg(long, value_name = "RATE", default_value_t = 6.0, value_parser = units::not_negative)]
    faults_per_hour: f64,
    /// A fault at a chosen moment, ROLE:NUMBER:KIND@TIME as node:0:kill@30s; may be repeated.
    #[arg(long, value_name = "FAULT", value_parser = units::parse_fault)]
    fault: Vec<units::Fault>,
    /// Whom faults at random happen to.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Role::Node])]
    roles: Vec<Role>,
    /// What they are.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Kill, Kind::Freeze])]
    kinds: Vec<Kind>,
    /// For how long a process is frozen, in milliseconds.
    #[arg(long, default_value_t = 2_500)]
    freeze_ms: u64,
    /// Objective: time to the first token.
    #[arg(long, value_name = "MS", default_value_t = 2000.0)]
    slo_ttft_ms: f64,
    /// Objective: time per output token after the first.
    #[arg(long, value_name = "MS", default_value_t = 100.0)]
    slo_tpot_ms: f64,
    /// Decides arrivals, lengths and faults.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Runs, each with the next seed.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    runs: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A run, and what it took.
#[derive(Debug, Serialize)]
struct Run {
    #[serde(flatten)]
    report: PlanReport,
    /// Seconds that the simulation took.
    real_s: f64,
    /// How many times faster than the real thing that is.
    times_real_time: f64,
}

pub(crate) fn run(args: SimulateArgs) -> Result<()> {
    let mut setup = setup::Setup::new(&args)?;
    let mut runs = Vec::new();
    for number in 0..args.runs {
        let settings = setup.plan(&args, args.seed + number)?;
        if number == 0 && !args.json {
            setup.print(&settings);
        }
        let started = Instant::now();
        let mut bar = Bar::new(started, number, args.runs);
        let report = plan(&settings, &mut |share| bar.show(share));
        bar.clear();
        let report = report?;
        let real_s = started.elapsed().as_secs_f64();
        let times_real_time = report.virtual_s / real_s.max(1e-9);
        runs.push(Run { report, real_s, times_real_time });
        if let Some(run) = runs.last().filter(|_| !args.json) {
            show::print(run);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&runs).context("json")?);
    } else if runs.len() > 1 {
        show::print_all(&runs);
    }
    Ok(())
}

/// A progress bar on a terminal, once it takes long.
struct Bar {
    started: Instant,
    bar: Option<ProgressBar>,
    label: String,
}

impl Bar {
    fn new(started: Instant, number: u64, runs: u64) -> Bar {
        let label = if runs > 1 { format!("run {} of {runs}", number + 1) } else { String::new() };
        Bar { started, bar: None, label }
    }

    fn show(&mut self, share: f64) {
        if self.started.elapsed() < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            // It draws on standard error, and only where that is a terminal.
            let bar = ProgressBar::new(BAR_STEPS);
            if let Ok(style) =
                ProgressStyle::with_template("{bar:30} {percent} % {elapsed} (about {eta} left) {msg}")
            {
                bar.set_style(style);
            }
            bar.set_message(self.label.clone());
            bar
        });
        bar.set_position((share * BAR_STEPS as f64) as u64);
    }

    fn clear(&self) {
        self.bar.iter().for_each(ProgressBar::finish_and_clear);
    }
}

#[cfg(test)]
mod tests;
