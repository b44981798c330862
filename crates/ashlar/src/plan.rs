//! `ashlar plan`: which node would hold what, the memory ledger, the predicted speed, and what a fine-tuning session would take
//! beside that. Starts nothing.

mod session;

use crate::precision::PrecisionArgs;
use anyhow::{Context, Result, bail};
use ashlar_kernels::measure::{self, QuantizedProduct};
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::{ModelConfig, hub, synth};
use ashlar_service_kit::memory;
use ashlar_shard_plan::{DeviceReport, Layout, Links, PlanRequest, plan, survivable_losses};
use ashlar_vocabulary::{Bytes, ModelShape, NodeId};
use clap::Args;
use serde::Serialize;
use session::{SessionArgs, SessionPlan};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Arguments of `ashlar plan`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar plan --model ./llama-3.2-1b --nodes 2
  ashlar plan --model llama-3.1-8b --device a=16GiB,40e9,500e9 --device b=16GiB,40e9,500e9
  ashlar plan --model ./llama-3.2-1b --lora-rank 64 --lora-targets q_proj,v_proj --micro-batch-rows 2048
  ashlar plan --model ./llama-3.2-1b --full         what training all weights would take
A device is NAME=MEMORY,BYTES_PER_S,FLOP_PER_S[,QUANTIZED_FLOP_PER_S]. The last is the speed of products with quantised
weights, by default 1.5 times the one before (AVX2 has 1.6, AVX-512 1.9). Without a device, this machine is measured and
shared out.")]
pub(crate) struct PlanArgs {
    /// Model directory, hub id, or the name of a shape (`llama-3.1-8b`).
    #[arg(long, value_name = "DIR|HUB_ID|SHAPE")]
    model: String,
    /// Nodes of this machine to plan for.
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    /// A device of another machine; may be repeated.
    #[arg(long, value_name = "NAME=MEM,BW,FLOPS[,QFLOPS]", value_parser = parse_device)]
    device: Vec<DeviceReport>,
    /// Pipeline stages.
    #[arg(long)]
    stages: Option<usize>,
    /// Tensor-parallel ranks per stage.
    #[arg(long)]
    tp: Option<usize>,
    /// Replicas.
    #[arg(long)]
    replicas: Option<usize>,
    /// Whether all stages share the head; default: where that is predicted to be faster.
    #[arg(long)]
    spread_head: Option<bool>,
    /// Longest sequence in tokens.
    #[arg(long, default_value_t = 4096)]
    max_context: usize,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Link round trip in microseconds.
    #[arg(long, default_value_t = 50.0)]
    round_trip_us: f64,
    /// Link speed in bytes per second.
    #[arg(long, default_value_t = 4e9)]
    link_bytes_per_s: f64,
    #[command(flatten)]
    session: SessionArgs,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed as JSON: the layout, and beside it what a session would take.
#[derive(Debug, Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    layout: &'a Layout,
    session: &'a SessionPlan,
}

/// `4GiB`, `512MiB`, `16GB` or plain bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<Bytes, String> {
    let units = [("KiB", 1u64 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];
    let decimal = [("kB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("TB", 1_000_000_000_000)];
    let (number, factor) = units
        .iter()
        .chain(&decimal)
        .find_map(|(unit, factor)| text.strip_suffix(unit).map(|number| (number, *factor)))
        .unwrap_or((text, 1));
    match number.trim().parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(Bytes((value * factor as f64) as u64)),
        _ => Err(format!("`{text}` is no size: write for example 4GiB")),
    }
}

/// What products with quantised weights gain where nothing is said: a little less than AVX2's 1.6.
pub(crate) const QUANTIZED_GAIN: f64 = 1.5;

pub(crate) fn parse_device(text: &str) -> Result<DeviceReport, String> {
    let usage = || format!("`{text}` is no device: write NAME=16GiB,40e9,500e9");
    let number = |text: &str| text.parse::<f64>().map_err(|_| usage());
    let (name, figures) = text.split_once('=').ok_or_else(usage)?;
    let fields: Vec<&str> = figures.split(',').collect();
    let (memory, bandwidth, flops, quantized) = match fields[..] {
        [memory, bandwidth, flops] => (memory, bandwidth, flops, None),
        [memory, bandwidth, flops, quantized] => (memory, bandwidth, flops, Some(quantized)),
        _ => return Err(usage()),
    };
    let flops_per_s = number(flops)?;
    Ok(DeviceReport {
        node: NodeId(name.to_owned()),
        memory: parse_bytes(memory)?,
        bandwidth_bytes_per_s: number(bandwidth)?,
        flops_per_s,
        quantized_flops_per_s: quantized.map_or(Ok(QUANTIZED_GAIN * flops_per_s), number)?,
        threads: 1,
        layers: None,
    })
}

pub(crate) fn run(args: PlanArgs) -> Result<()> {
    if args.nodes == 0 {
        bail!("--nodes must be at least 1");
    }
    let shape = model_shape(&args.model, args.precision)?;
    let devices = if args.device.is_empty() { this_machine(args.nodes) } else { args.device.clone() };
    let links = Links {
        round_trip_s: args.round_trip_us * 1e-6,
        bytes_per_s: args.link_bytes_per_s,
        pairs: Vec::new(),
    };
    let request = PlanRequest {
        stages: args.stages,
        tensor_parallel_size: args.tp,
        replicas: args.replicas,
        spread_head: args.spread_head,
        max_context_tokens: args.max_context.min(shape.max_position_embeddings),
        ..PlanRequest::default()
    };
    let layout = plan(&shape, &devices, &links, &request)?;
    let session = args.session.plan(&shape, &layout, &devices)?;
    if args.json {
        let printed = Printed { layout: &layout, session: &session };
        println!("{}", serde_json::to_string_pretty(&printed).context("json")?);
        return Ok(());
    }
    print_layout(&layout, &devices);
    session.print();
    let survivable = survivable_losses(&shape, &devices, &links, &request, &layout);
    let names: Vec<String> = survivable.iter().map(ToString::to_string).collect();
    match names.is_empty() {
        true => println!("\nno node may be lost: add a standby or a replica"),
        false => println!("\nsurvives the loss of any one of: {}", names.join(", ")),
    }
    Ok(())
}

/// The shape of a model: of a directory, a hub id, or the name of a shape, served in this precision.
pub(crate) fn model_shape(model: &str, precision: PrecisionArgs) -> Result<ModelShape> {
    static ASKED: AtomicUsize = AtomicUsize::new(0);
    let mut config = match synth::named_config(model) {
        Some(config) => {
            let asked = ASKED.fetch_add(1, Ordering::Relaxed);
            let directory = std::env::temp_dir().join(format!("ashlar-plan-{}-{asked}", std::process::id()));
            std::fs::create_dir_all(&directory)?;
            let path = directory.join("config.json");
            std::fs::write(&path, config.to_string())?;
            let parsed = ModelConfig::from_file(&path);
            std::fs::remove_dir_all(&directory)?;
            parsed?
        }
        None => {
            let directory = hub::resolve(model, &mut |file| eprintln!("fetching {file}"))?;
            ModelConfig::open(&directory, None)?
        }
    };
    config.serve_in(precision.precision());
    Ok(config.shape)
}

/// This machine, measured and shared out over `nodes` equal nodes.
fn this_machine(nodes: usize) -> Vec<DeviceReport> {
    let threads = (ashlar_kernels::available_threads() / nodes).max(1);
    let kernels = Kernels::new(Isa::best(), threads);
    let duration = Duration::from_millis(200);
    let mut product = QuantizedProduct::new(&kernels, QuantizedProduct::TYPICAL);
    let (bandwidth, flops, quantized) = (
        measure::read_bandwidth_bytes_per_s(&kernels, 256 << 20, duration),
        measure::fma_flops_per_s(&kernels, duration),
        product.flops_per_s(&kernels, duration),
    );
    let memory = memory::available_memory().unwrap_or(Bytes(1 << 30)).0 / 10 * 9 / nodes as u64;
    (0..nodes)
        .map(|index| DeviceReport {
            node: NodeId(format!("node-{index}")),
            memory: Bytes(memory),
            bandwidth_bytes_per_s: bandwidth,
            flops_per_s: flops,
            quantized_flops_per_s: quantized,
            threads: threads as u32,
            layers: None,
        })
        .collect()
}

fn print_layout(layout: &Layout, devices: &[DeviceReport]) {
    for device in devices {
        println!(
            "{:<10} {:>11} memory, {:>6.1} GB/s, {:>7.1} GFLOP/s, {:>7.1} quantised",
            device.node,
            device.memory,
            device.bandwidth_bytes_per_s / 1e9,
            device.flops_per_s / 1e9,
            device.quantized_flops_per_s / 1e9
        );
    }
    for (index, replica) in layout.replicas.iter().enumerate() {
        println!("\nreplica {index}: {} KV blocks of 16 tokens", replica.kv_blocks);
        println!(
            "  {:<5} {:<4} {:<10} {:<8} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
            "stage",
            "rank",
            "node",
            "layers",
            "weights",
            "embedding",
            "head",
            "kv cache",
            "handed on",
            "activations",
            "total",
            "free"
        );
        for (stage, layout) in replica.stages.iter().enumerate() {
            for (rank, (node, ledger)) in layout.ranks.iter().zip(&layout.ledgers).enumerate() {
                println!(
                    "  {stage:<5} {rank:<4} {node:<10} {:<8} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}",
                    layout.layers,
                    ledger.weights,
                    ledger.embedding,
                    ledger.head,
                    ledger.kv_cache,
                    ledger.boundary_log,
                    ledger.activations,
                    ledger.total,
                    ledger.free
                );
            }
        }
        let p = &replica.prediction;
        println!(
            "  predicted: {:.1} ms per token, {:.2} s to the first token of 512, {:.1} tokens/s at batch 16 \
             (stage {} is the slowest)",
            p.seconds_per_token * 1e3,
            p.seconds_to_first_token,
            p.tokens_per_s_batch_16,
            p.slowest_stage
        );
    }
    if !layout.standbys.is_empty() {
        let names: Vec<String> = layout.standbys.iter().map(ToString::to_string).collect();
        println!("\nstandbys: {}", names.join(", "));
    }
}
