//! `ashlar bench`: measurements beside the machine's own limits.
//!
//! Layout: [`model`] (one model on this machine), [`layouts`] (the same model cut three ways, interleaved in one run),
//! [`serve`] (a running service, from outside), [`quality`] (what quantisation costs). They share [`machine`] (limits
//! measured in the same run), [`peer`] (another program's benchmark in turn), [`rows`] (what a step computes), [`stats`],
//! [`random`] and [`table`].
//!
//! **Invariants:** everything but time is a function of the arguments and the seed. A comparison is interleaved within
//! one run and reported as the median of paired ratios, because absolute figures drift with the machine. Tables go to
//! standard output, progress to standard error; `--json` prints the same figures as one JSON document instead.

mod layouts;
mod machine;
mod model;
mod peer;
mod quality;
pub(crate) mod random;
mod rows;
pub(crate) mod serve;
pub(crate) mod stats;
pub(crate) mod table;

use anyhow::{Result, bail};
use ashlar_kernels::Isa;
use ashlar_service_kit::memory;
use ashlar_vocabulary::Bytes;
use clap::{Args, Subcommand};

/// Arguments of `ashlar bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  ashlar bench model --model ./llama-3.2-1b                      how near to the machine's limits
  ashlar bench layouts --model ./llama-3.2-1b                    one rank, two ranks, two stages
  ashlar bench serve --url http://127.0.0.1:8080 --rate 4        a running service under load
  ashlar bench quality --model m.gguf --text t.txt --quantize q4_0
                                                                 what quantisation costs")]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Prefill and decode speed of one model in this process, beside this machine's limits.
    Model(model::ModelArgs),
    /// One rank of two threads against two ranks and two stages of one thread each, over loopback TCP.
    Layouts(layouts::LayoutArgs),
    /// Load any OpenAI-compatible service and report latencies, throughput and goodput.
    Serve(Box<serve::ServeArgs>),
    /// Perplexity, KL divergence and agreement of quantised models against the original, on a text.
    Quality(quality::QualityArgs),
}

/// Measures and prints.
pub(crate) fn run(args: BenchArgs) -> Result<()> {
    match args.what {
        What::Model(args) => model::run(&args),
        What::Layouts(args) => layouts::run(&args),
        What::Serve(args) => serve::run(*args),
        What::Quality(args) => quality::run(&args),
    }
}

/// An instruction set by name, if this machine has it.
fn parse_isa(text: &str) -> Result<Isa, String> {
    let isa: Isa = text.parse().map_err(|error: ashlar_kernels::UnknownIsa| error.to_string())?;
    match isa.is_available() {
        true => Ok(isa),
        false => Err(format!("this machine cannot run {isa}")),
    }
}

/// What a run may take of the memory that is available: the rest is for page tables, buffers and neighbours.
const MEMORY_SHARE: (u64, u64) = (19, 20);

/// Memory that a run may plan with; unlimited where the system does not say.
fn memory_budget() -> Bytes {
    memory::available_memory().map_or(Bytes(u64::MAX), |free| Bytes(free.0 / MEMORY_SHARE.1 * MEMORY_SHARE.0))
}

/// Refuses a run that would drive the machine into swapping.
fn require_memory(needed: Bytes, advice: &str) -> Result<()> {
    let budget = memory_budget();
    if needed > budget {
        bail!("this needs {needed} of memory and {budget} can be used now: {advice}");
    }
    Ok(())
}

/// A progress bar on standard error, for `total` steps of known number.
fn progress_bar(total: u64, template: &str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(total);
    if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(250));
    bar
}

/// The template of a bar that counts measurements.
const MEASURING: &str = "{bar:30} {pos}/{len} {elapsed} (about {eta} left) {msg}";
/// The template of a bar that counts bytes of weights.
const LOADING: &str = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {msg}";
