//! `ashlar-fuzz`: tries any bytes on everything that reads bytes of others.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, bail};
use ashlar_fuzz::allocator::Counting;
use ashlar_fuzz::campaign::{self, Outcome, Plan};
use ashlar_fuzz::targets::{self, ALL};
use ashlar_fuzz::worker::{self, Share};
use ashlar_fuzz::{Target, allocator};
use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tries any bytes on everything that reads bytes of others. Without --target, on each in turn.
#[derive(Debug, Parser)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  ashlar-fuzz --list
  ashlar-fuzz --target gguf --inputs 10000000 --jobs 2
  ashlar-fuzz --time 3600                  an hour each
  ashlar-fuzz --target gguf --seed 1 --from 4711 --inputs 1
                                           one input again
  ashlar-fuzz --target gguf --file FILE    an input from a file"
)]
struct Args {
    #[command(subcommand)]
    worker: Option<Worker>,
    /// What is tried; may be given several times.
    #[arg(long)]
    target: Vec<String>,
    /// Lists the targets.
    #[arg(long)]
    list: bool,
    /// How many inputs each.
    #[arg(long, default_value_t = u64::MAX)]
    inputs: u64,
    /// How many seconds each; 60 where no number of inputs is given.
    #[arg(long)]
    time: Option<f64>,
    /// Processes at once.
    #[arg(long, default_value_t = 2)]
    jobs: u64,
    /// What inputs are made of.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The first input's number.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// A JSON object a target instead of text.
    #[arg(long)]
    json: bool,
    /// Reads this file, and makes no inputs.
    #[arg(long)]
    file: Option<PathBuf>,
    /// Writes the bytes of the first input to standard output instead of trying any.
    #[arg(long)]
    print: bool,
    /// Where inputs that fail are put.
    #[arg(long, default_value = "target/fuzz")]
    failures: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Worker {
    /// Tries a share of a campaign's inputs: what this program starts itself.
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        target: String,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        from: u64,
        #[arg(long)]
        step: u64,
        #[arg(long)]
        end: u64,
        #[arg(long)]
        time: f64,
        #[arg(long)]
        directory: PathBuf,
    },
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if let Some(Worker::Worker { target, seed, from, step, end, time, directory }) = args.worker {
        let share = Share { seed, from, step, end, time: Duration::from_secs_f64(time) };
        worker::work(named(&target)?, &share, &directory)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.list {
        ALL.iter().for_each(|target| println!("{:<20} {}", target.name, target.about));
        return Ok(ExitCode::SUCCESS);
    }
    let targets = match args.target.as_slice() {
        [] => ALL.iter().collect(),
        names => names.iter().map(|name| named(name)).collect::<Result<Vec<_>>>()?,
    };
    if let Some(file) = &args.file {
        return read_file(&targets, file);
    }
    if args.print {
        for target in targets {
            let directory = tempfile::tempdir()?;
            let corpus = (target.open)(directory.path())?.corpus;
            std::io::stdout().write_all(&corpus.input(args.seed, args.from))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    // Without a number of inputs the time ends it.
    let seconds = args.time.unwrap_or(if args.inputs == u64::MAX { 60.0 } else { 1e9 });
    let plan = Plan {
        program: std::env::current_exe().context("this program is nowhere")?,
        seed: args.seed,
        from: args.from,
        inputs: args.inputs,
        time: Duration::from_secs_f64(seconds.clamp(0.0, 1e9)),
        jobs: args.jobs.max(1),
        failures: args.failures,
    };
    let mut failed = false;
    for target in targets {
        let outcome = campaign::run(target, &plan)?;
        failed |= !outcome.findings.is_empty();
        match args.json {
            true => println!("{}", serde_json::to_string(&outcome)?),
            false => show(&outcome, &plan),
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn named(name: &str) -> Result<&'static Target> {
    match targets::named(name) {
        Some(target) => Ok(target),
        None => bail!("there is no target `{name}`: see --list"),
    }
}

fn show(outcome: &Outcome, plan: &Plan) {
    let summary = &outcome.summary;
    println!(
        "{:<20} {:>10} inputs in {:>6.1} s, {:>5.1} % accepted; most memory {:.1} MiB (input {}), {:.1} MiB kept, longest {:.1} ms (input {}); {} findings",
        outcome.target,
        summary.inputs,
        outcome.seconds,
        100.0 * summary.accepted as f64 / summary.inputs.max(1) as f64,
        summary.peak_bytes as f64 / f64::from(1 << 20),
        summary.peak_index,
        summary.kept_bytes as f64 / f64::from(1 << 20),
        summary.slowest_us as f64 / 1e3,
        summary.slowest_index,
        outcome.findings.len(),
    );
    for finding in &outcome.findings {
        let (target, seed, index) = (outcome.target, outcome.seed, finding.index);
        println!("  {}", finding.what);
        println!("    again: --target {target} --seed {seed} --from {index} --inputs 1");
        println!("    input: {}", plan.failures.join(format!("{target}-{seed}-{index}")).display());
    }
}

/// Reads one file as the input of each target, in this process: what fails fails here.
fn read_file(targets: &[&'static Target], file: &std::path::Path) -> Result<ExitCode> {
    let input = std::fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    for target in targets {
        let directory = tempfile::tempdir()?;
        let mut subject = (target.open)(directory.path())?;
        let held = allocator::start();
        let began = std::time::Instant::now();
        let accepted = (subject.read)(&input);
        println!(
            "{}: {}, {} bytes held, {:.1} ms",
            target.name,
            if accepted { "accepted" } else { "refused" },
            allocator::peak().saturating_sub(held),
            began.elapsed().as_secs_f64() * 1e3,
        );
    }
    Ok(ExitCode::SUCCESS)
}
