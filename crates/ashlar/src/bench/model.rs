//! `ashlar bench model`: prefill and decode of one model in this process, beside the machine's limits.

use super::machine::{Limits, Machine, MachineReport};
use super::rows::{Sequences, Work, fill_cache, kv_bytes_per_token};
use super::stats::median;
use super::table::{Table, figure, percent};
use super::{LOADING, MEASURING, progress_bar, require_memory};
use anyhow::{Context, Result, bail};
use ashlar_kernels::{Isa, Kernels, available_threads};
use ashlar_model::stage::{LOGIT_ROWS_MAX, expected_bytes};
use ashlar_model::{KvCache, ModelConfig, RankSlice, SingleRank, StageInput, StageModel, Workspace, hub};
use ashlar_vocabulary::{Bytes, ModelShape, Quantization, WeightType};
use clap::Args;
use serde::Serialize;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

/// Arguments of `ashlar bench model`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar bench model --model ./llama-3.2-1b
  ashlar bench model --model ./llama-3.2-1b --threads 1 --batches 1,8 --prefill 128 --json
  ashlar bench model --model ./llama-3.2-1b --isa avx2 --context 2048
Tokens are random and not sampled. `of bandwidth` counts the weights that a step reads, `with KV` the cached keys and
values too; `of peak` counts two operations per weight and row, attention excluded. Both limits are measured before and after
every single measurement of the same run.")]
pub(crate) struct ModelArgs {
    /// Model directory or hub id.
    #[arg(long, value_name = "DIR|HUB_ID")]
    model: String,
    /// Quantise the weights while they are loaded: q8_0, q4_0, q4_k_m …
    #[arg(long, value_name = "TYPE")]
    quantize: Option<Quantization>,
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
    /// Instruction set: avx512, avx2 or portable; default: the best.
    #[arg(long, value_parser = super::parse_isa)]
    isa: Option<Isa>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One kind of measurement, medians over the repeats.
#[derive(Debug, Serialize)]
struct Line {
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
}

/// Everything that is reported.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    architecture: String,
    weight_bytes: u64,
    context: usize,
    repeats: usize,
    load_s: f64,
    machine: MachineReport,
    results: Vec<Line>,
}

/// A measurement before medians.
#[derive(Debug, Clone, Copy)]
struct Sample {
    step_s: f64,
    head_s: f64,
    limits: Limits,
}

/// One thing to measure.
#[derive(Debug)]
struct Kind {
    work: Work,
    steps: usize,
    samples: Vec<Sample>,
}

pub(crate) fn run(args: &ModelArgs) -> Result<()> {
    let directory = hub::resolve(&args.model, &mut |file| eprintln!("fetching {file}"))?;
    let config = ModelConfig::open(&directory, args.quantize)?;
    let (shape, mut kinds) = (config.shape.clone(), kinds(args, &config.shape)?);
    let sequences = args.batches.iter().copied().max().unwrap_or(0);
    let decoding = std::iter::repeat_n(args.context + args.decode, sequences);
    let tables = Sequences::new(decoding.chain([args.prefill]));
    let slice = RankSlice::whole(&shape);
    let rows = kinds.iter().map(|kind| kind.work.rows()).max().unwrap_or(1);
    let kv = Bytes((tables.blocks() * ashlar_kernels::BLOCK_TOKENS * kv_bytes_per_token(&shape)) as u64);
    let needed = expected_bytes(&config, &slice) + kv + Machine::BYTES + workspace_bytes(&shape, rows);
    require_memory(needed, "choose a smaller model, fewer --batches or a shorter --context")?;

    let kernels = Kernels::new(
        args.isa.unwrap_or_else(Isa::best),
        args.threads.unwrap_or_else(available_threads).max(1),
    );
    let kernels = Arc::new(kernels);
    let bar = progress_bar(0, LOADING).with_message("loading");
    let loading = Instant::now();
    let model =
        StageModel::load(&directory, args.quantize, slice, Arc::clone(&kernels), &mut |loaded, total| {
            bar.set_length(total.0);
            bar.set_position(loaded.0);
        })?;
    bar.finish_and_clear();
    let load_s = loading.elapsed().as_secs_f64();
    let mut bench = Bench {
        cache: model.kv_cache(tables.blocks()),
        work: model.workspace(rows),
        tables,
        machine: Machine::new(&kernels),
        model,
        kernels,
    };
    fill_cache(&mut bench.cache, shape.num_layers);
    let bar = progress_bar((args.repeat * kinds.len()) as u64, MEASURING);
    for repeat in 0..args.repeat {
        for kind in &mut kinds {
            bar.set_message(name(&kind.work));
            let sample = bench.measure(&kind.work, kind.steps)?;
            if repeat == 0 && !args.json {
                let rate = kind.work.rows() as f64 / sample.step_s;
                bar.suspend(|| {
                    eprintln!("{}: {} tokens/s (first of {})", name(&kind.work), figure(rate), args.repeat)
                });
            }
            kind.samples.push(sample);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let report = Report {
        model: args.model.clone(),
        architecture: config.architecture.clone(),
        weight_bytes: step_bytes(&shape, 1, bench.model.bytes()).0,
        context: args.context,
        repeats: args.repeat,
        load_s,
        machine: bench.machine.report(&bench.kernels),
        results: kinds.iter().map(|kind| line(kind, &shape, bench.model.bytes())).collect(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).context("json")?);
    } else {
        print(&report);
    }
    Ok(())
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

fn name(work: &Work) -> String {
    match work {
        Work::Prefill { rows, .. } => format!("prefill {rows}"),
        Work::Decode { rows, .. } => format!("decode × {rows}"),
    }
}

/// An upper bound of a rank's step buffers, for the memory check.
pub(super) fn workspace_bytes(shape: &ModelShape, rows: usize) -> Bytes {
    let wide = 2 * shape.intermediate_size + shape.num_heads * shape.head_dim;
    let per_row = 5 * shape.hidden_size + 2 * wide;
    Bytes((4 * (rows * per_row + 3 * LOGIT_ROWS_MAX * shape.vocab_size)) as u64)
}

/// Bytes of weights that a step with `logit_rows` rows of logits reads, of a model that holds `held` bytes: all layers
/// once, the head once per [`LOGIT_ROWS_MAX`] rows. An embedding table of its own is not read.
fn step_bytes(shape: &ModelShape, logit_rows: usize, held: Bytes) -> Bytes {
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

fn line(kind: &Kind, shape: &ModelShape, held: Bytes) -> Line {
    let of = |value: &dyn Fn(&Sample) -> f64| median(&kind.samples.iter().map(value).collect::<Vec<f64>>());
    let logit_rows = kind.work.logit_rows().len();
    let (bytes, flops) = (step_bytes(shape, logit_rows, held).0 as f64, step_flops(shape, &kind.work));
    let kv = step_kv_bytes(shape, &kind.work, kind.steps);
    let step_s = of(&|sample| sample.step_s);
    Line {
        phase: if matches!(kind.work, Work::Decode { .. }) { "decode" } else { "prefill" },
        rows: kind.work.rows(),
        tokens_per_s: kind.work.rows() as f64 / step_s,
        step_ms: 1e3 * step_s,
        layers_ms: 1e3 * of(&|sample| sample.step_s - sample.head_s),
        head_ms: 1e3 * of(&|sample| sample.head_s),
        weight_bytes_per_s: bytes / step_s,
        of_bandwidth: of(&|sample| bytes / sample.step_s / sample.limits.bytes_per_s),
        of_bandwidth_with_kv: of(&|sample| (bytes + kv) / sample.step_s / sample.limits.bytes_per_s),
        flops_per_s: flops / step_s,
        of_peak: of(&|sample| flops / sample.step_s / sample.limits.flops_per_s),
    }
}

fn print(report: &Report) {
    println!(
        "{} ({}): {} of weights per step, loaded in {:.1} s; decode after {} tokens of context",
        report.model,
        report.architecture,
        Bytes(report.weight_bytes),
        report.load_s,
        report.context
    );
    println!("{}\n", report.machine.line());
    let mut table = Table::new([
        "",
        "tokens/s",
        "ms/step",
        "layers ms",
        "head ms",
        "GB/s",
        "of bandwidth",
        "with KV",
        "GFLOP/s",
        "of peak",
    ]);
    for line in &report.results {
        table.row([
            format!("{} × {}", line.phase, line.rows),
            figure(line.tokens_per_s),
            figure(line.step_ms),
            figure(line.layers_ms),
            figure(line.head_ms),
            figure(line.weight_bytes_per_s / 1e9),
            percent(line.of_bandwidth),
            percent(line.of_bandwidth_with_kv),
            figure(line.flops_per_s / 1e9),
            percent(line.of_peak),
        ]);
    }
    print!("{}", table.render());
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
    /// Warms up with one step where steps are short, and times `steps` steps between two readings of the limits.
    fn measure(&mut self, work: &Work, steps: usize) -> Result<Sample> {
        let before = self.machine.read(&self.kernels);
        if steps > 1 {
            self.step(work)?;
        }
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
        let limits = Limits::between(before, self.machine.read(&self.kernels));
        Ok(Sample { step_s, head_s: head_s / steps as f64, limits })
    }

    /// One step; answers the head's seconds.
    fn step(&mut self, work: &Work) -> Result<f64> {
        let (rows, tokens) = self.tables.rows(work, &self.model.config().shape);
        let input = StageInput::Tokens(&tokens);
        self.model.forward(&rows, input, &mut self.cache, &mut SingleRank, &mut self.work, &mut || ())?;
        let started = Instant::now();
        for chunk in work.logit_rows().chunks(LOGIT_ROWS_MAX) {
            black_box(self.model.logits(chunk, &mut SingleRank, &mut self.work)?);
        }
        Ok(started.elapsed().as_secs_f64())
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
    fn a_step_reads_the_layers_once_and_the_head_once_per_thirty_two_rows() {
        let shape = llama_1b();
        let held = Bytes(4 * weights(&shape) as u64);
        assert!((4.9e9..5.0e9).contains(&(held.0 as f64)), "the 1B shape is 4.94 GB in f32, not {held}");
        let head = 4 * shape.embedding_weights() as u64;
        assert!(step_bytes(&shape, 1, held).0.abs_diff(held.0) <= 2);
        assert!(step_bytes(&shape, 33, held).0.abs_diff(held.0 + head) <= 2);
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
