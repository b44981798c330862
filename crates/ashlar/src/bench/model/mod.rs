//! `ashlar bench model`: prefill and decode of one model in this process, beside the machine's limits and, if asked for,
//! beside another program that takes turns with it.
//!
//! Layout: this file measures, [`report`] turns measurements into figures.

mod report;

use super::machine::{Limits, Machine};
use super::peer::{Figure, Peer, Phase, Sizes};
use super::rows::{Sequences, Work, fill_cache, kv_bytes_per_token, workspace_bytes};
use super::table::figure;
use super::{LOADING, MEASURING, memory_budget, progress_bar, require_memory};
use crate::cache::CacheArgs;
use crate::precision::PrecisionArgs;
use anyhow::{Context, Result, bail};
use ashlar_kernels::{Isa, Kernels, available_threads};
use ashlar_model::stage::{LOGIT_ROWS_MAX, expected_bytes};
use ashlar_model::{
    KvCache, ModelConfig, NoHeadRanks, Origin, PackedCopy, RankSlice, SingleRank, StageInput, StageModel,
    Workspace, digest, hub,
};
use ashlar_vocabulary::{Bytes, ModelShape};
use clap::Args;
use report::{PeerReport, Report};
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Arguments of `ashlar bench model`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar bench model --model ./llama-3.2-1b
  ashlar bench model --model ./llama-3.2-1b --threads 1 --batches 1,8 --prefill 128 --json
  ashlar bench model --model ./llama-3.2-1b --isa avx2 --context 2048
  ashlar bench model --model m.gguf --cache                      the second run loads the packed copy of the first
  ashlar bench model --model m.gguf --against 'llama-bench -m m.gguf -t {threads} -p {prefill} -n {decode} -r 1 -o jsonl'
  ashlar bench model --model m.gguf --prefill 128 --against 'llama-batched-bench -m m.gguf -t {threads} -c 8192 \
      -npp {context} -ntg {decode} -npl {batch} --output-format jsonl'
Tokens are random and not sampled. `of bandwidth` counts the weights that a step reads, `with KV` the cached keys and
values too; `of peak` counts two operations per weight and row, attention excluded. Both limits are measured before and after
every single measurement of the same run. `outside` is the share of a step in which the thread that computes it is in no kernel: what
lies between kernels, handing work to other threads, and waiting for them.
A peer (--against) runs in a shell once per repeat, after our measurements of that repeat; a ratio is ours over the peer's in
the same repeat, and the median is reported. {threads}, {prefill}, {decode}, {context} and {batch} (with commas) in the command
become ours. It prints `prefill 512 123.4` and `decode 8 61.0` (rows, tokens/s), or the JSON of llama-bench (-o json, jsonl), of
llama-batched-bench (--output-format jsonl) or of this command. Our model stays in memory meanwhile.")]
pub(crate) struct ModelArgs {
    /// Model directory or hub id.
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: String,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    cache: CacheArgs,
    /// Compute threads; default: all that this process may use.
    #[arg(long)]
    threads: Option<usize>,
    /// Tokens of the measured prompt; 0 leaves prefill out.
    #[arg(long, default_value_t = 512)]
    prefill: usize,
    /// Decode steps per measurement; 0 leaves decode out.
    #[arg(long, default_value_t = 32)]
    decode: usize,
    /// Sequences per decode step.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32")]
    batches: Vec<usize>,
    /// Tokens in each sequence's cache when decoding starts.
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// Measurements of each kind; medians are reported.
    #[arg(long, default_value_t = 3)]
    repeat: usize,
    /// Instruction set: avx512, avx512bw, avx2 or portable; default: the best.
    #[arg(long, value_parser = super::parse_isa)]
    isa: Option<Isa>,
    /// Shell command of a peer's benchmark, to run in turn with ours.
    #[arg(long, value_name = "CMD")]
    against: Option<String>,
    /// One run of the peer may take so long.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, requires = "against")]
    against_timeout_s: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A measurement before medians.
#[derive(Debug, Clone, Copy)]
struct Sample {
    step_s: f64,
    head_s: f64,
    /// Of a step, what the computing thread spent on kernels' tasks.
    kernels_s: f64,
    limits: Limits,
}

/// One thing to measure; a sample per repeat.
#[derive(Debug)]
struct Kind {
    work: Work,
    steps: usize,
    samples: Vec<Sample>,
}

pub(crate) fn run(args: &ModelArgs) -> Result<()> {
    let directory = hub::resolve(&args.model, &mut |file| eprintln!("fetching {file}"))?;
    let config = ModelConfig::open(&directory, args.precision.precision())?;
    let (shape, mut kinds) = (config.shape.clone(), kinds(args, &config.shape)?);
    let sequences = args.batches.iter().copied().max().unwrap_or(0);
    let decoding = std::iter::repeat_n(args.context + args.decode, sequences);
    let tables = Sequences::new(decoding.chain([args.prefill]));
    let slice = RankSlice::whole(&shape);
    let rows = kinds.iter().map(|kind| kind.work.rows()).max().unwrap_or(1);
    let kv = Bytes((tables.blocks() * ashlar_kernels::BLOCK_TOKENS * kv_bytes_per_token(&shape)) as u64);
    let needed = expected_bytes(&shape, &slice) + kv + Machine::BYTES + workspace_bytes(&shape, rows);
    require_memory(needed, "choose a smaller model, fewer --batches or a shorter --context")?;

    let kernels = Kernels::new(
        args.isa.unwrap_or_else(Isa::best),
        args.threads.unwrap_or_else(available_threads).max(1),
    );
    let kernels = Arc::new(kernels);
    let bar = progress_bar(0, LOADING).with_message("loading");
    let loading = Instant::now();
    let mut progress = |loaded: Bytes, total: Bytes| {
        bar.set_length(total.0);
        bar.set_position(loaded.0);
    };
    let copy = copy(args, &directory, &slice)?;
    let (model, origin) = match &copy {
        Some(copy) => copy.load_or_pack(&kernels, &mut progress)?,
        None => {
            let kernels = Arc::clone(&kernels);
            let model =
                StageModel::load(&directory, args.precision.precision(), slice, kernels, &mut progress)?;
            (model, Origin::Files)
        }
    };
    bar.finish_and_clear();
    let load_s = loading.elapsed().as_secs_f64();
    if let (Some(copy), Origin::Files) = (&copy, origin) {
        keep(copy, &model);
    }
    let mut bench = Bench {
        cache: model.kv_cache(tables.blocks()),
        work: model.workspace(rows),
        tables,
        machine: Machine::new(&kernels),
        model,
        kernels,
    };
    fill_cache(&mut bench.cache, shape.num_layers);
    let peer = args.against.as_deref().map(|command| peer(command, args, bench.kernels.threads()));
    if let Some(peer) = &peer {
        announce(peer, bench.model.bytes());
    }
    let memory_left = memory_budget();
    let peers = bench.repeat(args, &mut kinds, peer.as_ref())?;
    let held = bench.model.bytes();
    let report = Report {
        model: args.model.clone(),
        architecture: config.architecture.clone(),
        weight_bytes: report::step_bytes(&shape, 1, held).0,
        context: args.context,
        repeats: args.repeat,
        load_s,
        from_copy: origin == Origin::Copy,
        machine: bench.machine.report(&bench.kernels),
        peer: peer.map(|peer| PeerReport {
            command: peer.command().to_owned(),
            memory_left_bytes: memory_left.0,
            not_compared: report::not_compared(&kinds, &peers),
        }),
        results: kinds.iter().map(|kind| report::line(kind, &shape, held, &peers)).collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("json")?);
    } else {
        report.print();
    }
    Ok(())
}

/// The packed copy of the model, if one is asked for.
fn copy(args: &ModelArgs, directory: &Path, slice: &RankSlice) -> Result<Option<PackedCopy>> {
    let Some(place) = args.cache.place()? else { return Ok(None) };
    let digest = digest::model_digest(directory, args.precision.quantize)?;
    Ok(Some(PackedCopy::new(&place, directory, &digest, args.precision.precision(), slice.clone())))
}

/// Writes the copy before anything is measured.
fn keep(copy: &PackedCopy, model: &StageModel) {
    let writing = Instant::now();
    match copy.write(model, &|| false) {
        Ok(bytes) => {
            let path = copy.path().display();
            eprintln!("wrote {path} ({bytes}) in {:.1} s", writing.elapsed().as_secs_f64());
        }
        Err(error) => eprintln!("note: {error}"),
    }
}

fn peer(command: &str, args: &ModelArgs, threads: usize) -> Peer {
    let sizes = Sizes {
        threads,
        prefill: args.prefill,
        decode: args.decode,
        context: args.context,
        batches: &args.batches,
    };
    Peer::new(command, &sizes, Duration::from_secs(args.against_timeout_s))
}

/// Says what the peer has to live with: our model is not unloaded between turns.
fn announce(peer: &Peer, held: Bytes) {
    let left = memory_budget();
    if left == Bytes(u64::MAX) {
        eprintln!("in turn with: {}", peer.command());
        return;
    }
    let scarce = if left < held { "; less than ours, so the peer may swap or be killed" } else { "" };
    eprintln!(
        "in turn with: {}\nour {held} of weights stay in memory meanwhile: {left} are left to the peer{scarce}",
        peer.command()
    );
}

fn kinds(args: &ModelArgs, shape: &ModelShape) -> Result<Vec<Kind>> {
    if args.repeat == 0 || args.batches.contains(&0) {
        bail!("--repeat and --batches must be at least 1");
    }
    let longest = args.prefill.max(args.context + args.decode);
    if longest > shape.max_position_embeddings {
        bail!(
            "the model ends at {} tokens: choose a shorter --context or --prefill",
            shape.max_position_embeddings
        );
    }
    let kind = |work, steps| Kind { work, steps, samples: Vec::new() };
    let mut kinds = Vec::new();
    if args.prefill > 0 {
        // The prompt's sequence comes after those that decode.
        let sequence = args.batches.iter().copied().max().unwrap_or(0);
        kinds.push(kind(Work::Prefill { sequence, start: 0, rows: args.prefill, logits: true }, 1));
    }
    if args.decode > 0 {
        let decode = |&rows: &usize| Work::Decode { first: 0, rows, position: args.context };
        kinds.extend(args.batches.iter().map(decode).map(|work| kind(work, args.decode)));
    }
    if kinds.is_empty() {
        bail!("nothing to measure: give --prefill or --decode");
    }
    Ok(kinds)
}

impl Kind {
    fn phase(&self) -> Phase {
        if matches!(self.work, Work::Decode { .. }) { Phase::Decode } else { Phase::Prefill }
    }

    fn name(&self) -> String {
        format!("{} × {}", self.phase(), self.work.rows())
    }

    /// What a peer must report to be compared.
    fn wanted(&self) -> (Phase, usize) {
        (self.phase(), self.work.rows())
    }
}

/// The model and its buffers.
#[derive(Debug)]
struct Bench {
    model: StageModel,
    cache: KvCache,
    work: Workspace,
    tables: Sequences,
    machine: Machine,
    kernels: Arc<Kernels>,
}

impl Bench {
    /// Measures every kind once per repeat, and then runs the peer; its figures of each repeat are returned.
    fn repeat(
        &mut self,
        args: &ModelArgs,
        kinds: &mut [Kind],
        peer: Option<&Peer>,
    ) -> Result<Vec<Vec<Figure>>> {
        let turns = kinds.len() + usize::from(peer.is_some());
        let bar = progress_bar((args.repeat * turns) as u64, MEASURING);
        let say = |repeat: usize, name: &str, rate: f64| {
            if repeat == 0 && !args.json {
                let rate = figure(rate);
                bar.suspend(|| eprintln!("{name}: {rate} tokens/s (first of {})", args.repeat));
            }
        };
        let wanted: Vec<_> = kinds.iter().map(Kind::wanted).collect();
        let mut peers = Vec::new();
        for repeat in 0..args.repeat {
            for kind in kinds.iter_mut() {
                bar.set_message(kind.name());
                let sample = self.measure(&kind.work, kind.steps)?;
                say(repeat, &kind.name(), kind.work.rows() as f64 / sample.step_s);
                kind.samples.push(sample);
                bar.inc(1);
            }
            if let Some(peer) = peer {
                bar.set_message("the peer");
                let figures = peer.run(&wanted)?;
                for found in &figures {
                    say(repeat, &format!("peer, {} × {}", found.phase, found.rows), found.tokens_per_s);
                }
                peers.push(figures);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        Ok(peers)
    }

    /// Warms up with one step where steps are short, and times `steps` steps between two readings of the limits.
    fn measure(&mut self, work: &Work, steps: usize) -> Result<Sample> {
        let before = self.machine.read(&self.kernels);
        if steps > 1 {
            self.step(work)?;
        }
        let in_kernels = self.kernels.pool().callers_time_in_tasks();
        let (started, mut head_s) = (Instant::now(), 0.0);
        for step in 0..steps {
            let work = match *work {
                Work::Decode { first, rows, position } => {
                    Work::Decode { first, rows, position: position + step }
                }
                prefill => prefill,
            };
            head_s += self.step(&work)?;
        }
        let step_s = started.elapsed().as_secs_f64() / steps as f64;
        let in_kernels = self.kernels.pool().callers_time_in_tasks() - in_kernels;
        let limits = Limits::between(before, self.machine.read(&self.kernels));
        let kernels_s = in_kernels.as_secs_f64() / steps as f64;
        Ok(Sample { step_s, head_s: head_s / steps as f64, kernels_s, limits })
    }

    /// One step; answers the head's seconds.
    fn step(&mut self, work: &Work) -> Result<f64> {
        let (rows, tokens) = self.tables.rows(work, &self.model.config().shape);
        let input = StageInput::Tokens(&tokens);
        self.model.forward(&rows, input, &mut self.cache, &mut SingleRank, &mut self.work, &mut || ())?;
        let started = Instant::now();
        for chunk in work.logit_rows().chunks(LOGIT_ROWS_MAX) {
            black_box(self.model.logits(chunk, &mut SingleRank, &mut NoHeadRanks, &mut self.work)?);
        }
        Ok(started.elapsed().as_secs_f64())
    }
}
