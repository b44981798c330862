//! `ashlar bench layouts`: one rank of all threads against two ranks and two stages of half the threads each.
//!
//! Layout: [`layout`] (a layout that runs: ranks, links, the window of steps in flight), [`rank`] (one rank's thread),
//! [`wiring`] (the links of real nodes), [`measure`] (what is measured in which order), [`report`] (ratios, bounds
//! and where the rest went).
//!
//! Ranks are threads of this process, each with kernels, weights and cache of its own, joined by the same links as the
//! nodes of a cluster. What a scheduler does is a channel here: a step of a micro-batch is issued to all ranks once its
//! step before has come back. Sampling and the network between hosts are left out, alike for every layout.

mod layout;
mod measure;
mod rank;
mod report;
mod wiring;

use super::machine::Machine;
use super::rows::{kv_bytes_per_token, workspace_bytes};
use super::{LOADING, memory_budget, progress_bar, require_memory};
use crate::precision::PrecisionArgs;
use anyhow::{Context, Result, bail};
use ashlar_kernels::{Isa, Kernels};
use ashlar_model::stage::expected_bytes;
use ashlar_model::{ModelConfig, RankSlice, hub};
use ashlar_protocol::data::LinkFaults;
use ashlar_shard_node::config::LinkConfig;
use ashlar_shard_node::links::LinkSettings;
use ashlar_shard_plan::{Position, Shares};
use ashlar_vocabulary::{Bytes, HeadSlice, LayerRange, ModelShape};
use clap::Args;
use layout::{Kind, RankSetup, Running};
use measure::{Measurement, Plan};
use std::path::Path;

/// Arguments of `ashlar bench layouts`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  ashlar bench layouts --model ./llama-3.2-1b
  ashlar bench layouts --model ./llama-3.2-1b --batches 16,32 --repeat 20 --prefill 0
  ashlar bench layouts --model ./llama-3.2-1b --only stages --cut 8 --json
Layouts take turns within each repeat (forwards, then backwards). A ratio is the layout's tokens/s over one rank's in the
same repeat; the median is reported. Two stages always have two micro-batches in flight: of half the batch each (the
same sequences in all) and of the whole batch each (twice as many). All layouts are held in memory at once if they fit,
else one rank stays and the others come after each other.")]
pub(crate) struct LayoutArgs {
    /// Model directory or hub id.
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: String,
    #[command(flatten)]
    precision: PrecisionArgs,
    /// Sequences per decode step.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,32")]
    batches: Vec<usize>,
    /// Repeats of the whole series.
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Decode steps that are counted per measurement.
    #[arg(long, default_value_t = 8)]
    decode: usize,
    /// Tokens in each sequence's cache.
    #[arg(long, default_value_t = 64)]
    context: usize,
    /// Tokens of the measured prompt; 0 leaves prefill out.
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Chunk of the prompt when a single one is pipelined.
    #[arg(long, default_value_t = 128)]
    chunk: usize,
    /// Threads of the one rank; the others have half each. Even.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Layers of the first stage; default: both stages read equally many bytes, their parts of the head included.
    #[arg(long)]
    cut: Option<usize>,
    /// Measure only this layout against one rank.
    #[arg(long, value_enum)]
    only: Option<Only>,
    /// How two tensor-parallel ranks exchange, and how logits of a shared head travel. Activations always go over loopback TCP.
    #[arg(long, value_enum, default_value_t = Transport::Shared)]
    transport: Transport,
    /// Instruction set: avx512, avx512bw, avx2 or portable; default: the best.
    #[arg(long, value_parser = super::parse_isa)]
    isa: Option<Isa>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Which layout to compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Only {
    /// Two tensor-parallel ranks.
    Tp,
    /// Two pipeline stages.
    Stages,
    /// Two pipeline stages which share the head.
    SpreadHead,
}

/// How a tensor-parallel group exchanges, and how slices of logits travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Transport {
    /// Through shared memory, as nodes on one host do.
    Shared,
    /// Over loopback TCP, as nodes on different hosts would over their network.
    Tcp,
}

impl Transport {
    /// For people.
    fn name(self) -> &'static str {
        match self {
            Transport::Shared => "shared memory",
            Transport::Tcp => "loopback TCP",
        }
    }

    /// The links of ranks with `threads` threads each.
    fn settings(self, ranks: usize, threads: usize) -> LinkSettings {
        LinkSettings {
            faults: LinkFaults::default(),
            shared_memory: self == Transport::Shared,
            spin: LinkConfig::default().spin(ranks, threads),
        }
    }
}

pub(crate) fn run(args: &LayoutArgs) -> Result<()> {
    check(args)?;
    let directory = hub::resolve(&args.model, &mut |file| eprintln!("fetching {file}"))?;
    let config = ModelConfig::open(&directory, args.precision.precision())?;
    let others = others(args, &config.shape)?;
    let plan = Plan::new(args, &config.shape)?;
    let (one, needs) = (needs(&config, &plan, Kind::One), |kind| needs(&config, &plan, kind));
    let all: Bytes = one + others.iter().map(|&kind| needs(kind)).sum() + Machine::BYTES;
    let turns: Vec<Vec<Kind>> = match all <= memory_budget() {
        true => vec![others],
        false => others.into_iter().map(|kind| vec![kind]).collect(),
    };
    let most =
        turns.iter().map(|kinds| kinds.iter().map(|&kind| needs(kind)).sum()).max().unwrap_or_default();
    require_memory(
        one + most + Machine::BYTES,
        "every layout has weights of its own; choose a smaller model, --only, fewer --batches, or free some memory",
    )?;
    if turns.len() > 1 {
        eprintln!("{all} for all layouts at once do not fit: each takes its turn beside the one rank");
    }

    let kernels = Kernels::new(args.isa.unwrap_or_else(Isa::best), args.threads);
    let mut machine = Machine::new(&kernels);
    let first = load(&directory, &config, args, &plan, Kind::One)?;
    let mut comparisons: Vec<Vec<Measurement>> = Vec::new();
    for kinds in turns {
        let mut layouts = Vec::with_capacity(kinds.len());
        for kind in kinds {
            layouts.push(load(&directory, &config, args, &plan, kind)?);
        }
        comparisons.push(measure::run(&plan, &first, &layouts, &mut machine, &kernels)?);
    }
    let report = report::Report::new(args, &config.shape, machine.report(&kernels), &comparisons);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("json")?);
    } else {
        report.print();
    }
    Ok(())
}

fn check(args: &LayoutArgs) -> Result<()> {
    if args.threads < 2 || !args.threads.is_multiple_of(2) {
        bail!("--threads must be even, at least 2: half of them go to each of two ranks");
    }
    if args.repeat == 0
        || args.decode == 0
        || args.context == 0
        || args.chunk == 0
        || args.batches.contains(&0)
    {
        bail!("--repeat, --decode, --context, --chunk and --batches must be at least 1");
    }
    Ok(())
}

/// The layouts to compare with one rank; those that this model cannot have are left out with a word.
fn others(args: &LayoutArgs, shape: &ModelShape) -> Result<Vec<Kind>> {
    let mut kinds = Vec::new();
    let asked = |layout| args.only.is_none_or(|only| only == layout);
    if asked(Only::Tp) {
        match Kind::TensorParallel.slices(shape).iter().find_map(|slice| slice.problem(shape)) {
            None => kinds.push(Kind::TensorParallel),
            Some(problem) => eprintln!("without two ranks: {problem}"),
        }
    }
    for (only, spread_head) in [(Only::Stages, false), (Only::SpreadHead, true)] {
        if !asked(only) {
            continue;
        }
        let cut = args.cut.unwrap_or_else(|| balanced_cut(shape, spread_head));
        match cut > 0 && cut < shape.num_layers {
            true if spread_head && !HeadSlice::can_spread(shape, 2, 1) => {
                eprintln!("without a shared head: the vocabulary is too small");
            }
            true => kinds.push(Kind::Stages { cut, spread_head }),
            false if args.cut.is_some() => {
                bail!("--cut must leave each stage a layer of {}", shape.num_layers)
            }
            false => eprintln!("without two stages: the model has {} layer", shape.num_layers),
        }
    }
    if kinds.is_empty() {
        bail!("this model leaves no layout to compare with one rank");
    }
    Ok(kinds)
}

/// Layers of the first of two stages, so that what the slower of both reads is least; the head counts.
fn balanced_cut(shape: &ModelShape, spread_head: bool) -> usize {
    let shares = Shares::new(shape, 1);
    let bytes = |start: usize, end: usize, stage: usize| {
        let position = Position { stage, stages: 2, spread_head };
        position.piece(LayerRange { start, end }, 0, 1).product_bytes(&shares)
    };
    let slower = |cut: usize| bytes(0, cut, 0).max(bytes(cut, shape.num_layers, 1));
    (1..shape.num_layers).min_by_key(|&cut| slower(cut)).unwrap_or(0)
}

/// Memory of a layout: weights, cache and buffers of all its ranks.
fn needs(config: &ModelConfig, plan: &Plan, kind: Kind) -> Bytes {
    let shape = &config.shape;
    let slices = kind.slices(shape);
    let weights: Bytes = slices.iter().map(|slice| expected_bytes(shape, slice)).sum();
    let kv = plan.cache_blocks() * ashlar_kernels::BLOCK_TOKENS * kv_bytes_per_token(shape);
    weights + Bytes(kv as u64) + workspace_bytes(shape, plan.rows_max()) * slices.len() as u64
}

fn load(
    directory: &Path,
    config: &ModelConfig,
    args: &LayoutArgs,
    plan: &Plan,
    kind: Kind,
) -> Result<Running> {
    let slices: Vec<RankSlice> = kind.slices(&config.shape);
    let ranks = slices.len();
    let threads = args.threads / ranks;
    let bar = progress_bar(0, LOADING).with_message(format!("loading {}", kind.name()));
    let layout = Running::start(
        kind,
        directory,
        slices,
        RankSetup {
            threads,
            isa: args.isa.unwrap_or_else(Isa::best),
            links: args.transport.settings(ranks, threads),
        },
        plan,
        &mut |loaded, total| {
            bar.set_length(total.0);
            bar.set_position(loaded.0);
        },
    );
    bar.finish_and_clear();
    layout.with_context(|| format!("cannot start {}", kind.name()))
}

impl Kind {
    /// What each rank of this layout holds, stage after stage.
    fn slices(self, shape: &ModelShape) -> Vec<RankSlice> {
        let whole = RankSlice::whole(shape);
        match self {
            Kind::One => vec![whole],
            Kind::TensorParallel => (0..2)
                .map(|tensor_rank| RankSlice {
                    tensor_rank,
                    tensor_parallel_size: 2,
                    head: Some(HeadSlice { index: tensor_rank, of: 2 }),
                    ..whole.clone()
                })
                .collect(),
            Kind::Stages { cut, spread_head } => {
                let head = |stage| HeadSlice::of_rank(spread_head, (stage, 2), (0, 1));
                let (front, back) =
                    (LayerRange { start: 0, end: cut }, LayerRange { start: cut, end: shape.num_layers });
                vec![
                    RankSlice { layers: front, last: false, head: head(0), ..whole.clone() },
                    RankSlice { layers: back, first: false, head: head(1), ..whole },
                ]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::rows::llama_1b;

    #[test]
    fn the_head_of_the_1b_shape_moves_the_cut_to_ten_layers() {
        assert_eq!(balanced_cut(&llama_1b(), false), 10);
        assert_eq!(balanced_cut(&llama_1b(), true), 8);
        assert_eq!(balanced_cut(&ModelShape { num_layers: 1, ..llama_1b() }, false), 0);
    }

    #[test]
    fn slices_cover_the_model_once() {
        let shape = llama_1b();
        let stages = Kind::Stages { cut: 10, spread_head: false }.slices(&shape);
        assert_eq!(
            (stages[0].first, stages[0].last, stages[1].first, stages[1].last),
            (true, false, false, true)
        );
        assert_eq!(stages[0].layers.len() + stages[1].layers.len(), 16);
        let ranks = Kind::TensorParallel.slices(&shape);
        assert_eq!(ranks[0].vocabulary(&shape).end, ranks[1].vocabulary(&shape).start);
    }
}
