//! `ashlar drill`: kills, freezes and cuts off processes of a running cluster on purpose, under load, and says what clients noticed.
//!
//! Layout: [`target`] (the cluster), [`fault`] (what is done to it), [`load`] and [`stream`] (streams that are compared), [`jobs`]
//! (fine-tuning jobs that are), [`log`] (what a long drill has done so far), [`report`] (what it came to).

mod fault;
mod jobs;
mod load;
mod log;
mod report;
mod stream;
mod target;

use crate::bench::random::Random;
use crate::http::GatewayArgs;
use crate::processes::{self, Processes};
use crate::roles;
use anyhow::{Context, Result, bail};
use ashlar_service_kit::Shutdown;
use clap::Args;
pub(crate) use fault::Role;
use fault::{Fault, Kind, Lengths};
use indicatif::{ProgressBar, ProgressStyle};
use jobs::{Jobs, Recipe};
use load::Load;
use log::Log;
use report::{FaultRecord, Report, Rest};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use stream::Shape;
use target::Target;

/// What each of its streams asks for, in tokens.
const TOKENS: u32 = 200;

/// A client noticed.
#[derive(Debug, thiserror::Error)]
#[error("the drill has found something: see above")]
pub(crate) struct Noticed;

/// Arguments of `ashlar drill`.
#[derive(Debug, Args)]
#[command(
    after_help = "The cluster is one that `ashlar up` runs on this machine. First every stream is asked for undisturbed; then, while
they run again and again, one process at a time is killed or frozen, and each stream is compared with what it was
undisturbed, token by token and log-probability by log-probability.

Half of the streams are responses (/v1/responses), whose clients go on with the next event when their gateway is killed. Another
stream is cut off with it; it counts as an error only if asking again does not bring the same.

With --jobs, fine-tuning jobs run one after the other, too. The first one runs undisturbed; each of the others has to end with the
same adapter, by its SHA-256.

Where each role has a network of its own (`ashlar up --separate`; Linux, root), it can be cut off from the others for a while: both
ways (partition), or so that it hears nothing (deaf) or is not heard (mute). scripts/partition-drill does all of it.

Examples:
  ashlar drill                                        20 faults over all roles
  ashlar drill --faults 1000 --log drill.jsonl        goes on where it left off, if drill.jsonl is there
  ashlar drill --jobs 1                               fine-tuning meanwhile
  ashlar drill --kinds partition,deaf,mute            on a cluster of `ashlar up --separate`
  ashlar drill --roles scheduler --kinds freeze --json
Exit code: 0 if no client noticed more than a pause and every job came to the same, else 1."
)]
pub(crate) struct DrillArgs {
    /// State directory of the running cluster.
    #[arg(long, default_value = "./.ashlar")]
    state: PathBuf,
    #[command(flatten)]
    gateway: GatewayArgs,
    /// How many faults, those in the log included.
    #[arg(long, default_value_t = 20)]
    faults: usize,
    /// Streams at a time.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=256))]
    streams: u32,
    /// Whom to disturb.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Role::Node, Role::Scheduler, Role::Gateway])]
    roles: Vec<Role>,
    /// How.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Kill, Kind::Freeze])]
    kinds: Vec<Kind>,
    /// For how long a process is frozen, in milliseconds.
    #[arg(long, default_value_t = 2_500)]
    freeze_ms: u64,
    /// For how long a process is cut off, in milliseconds.
    #[arg(long, default_value_t = 2_500)]
    cut_ms: u64,
    /// Fine-tuning jobs at a time; default: 1 with --tune, else none.
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=64))]
    jobs: Option<u32>,
    /// Examples that they train on, as `ashlar tune` takes them; default: a few of the drill's own.
    #[arg(long, value_name = "FILE")]
    tune: Option<PathBuf>,
    /// Which processes, when and how follows from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A file that gets a line per fault; if it is there, the drill goes on after its last.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: DrillArgs) -> Result<()> {
    if args.roles.is_empty() || args.kinds.is_empty() {
        bail!("nothing to do: name at least one of --roles and one of --kinds");
    }
    roles::runtime()?.block_on(conduct(args))
}

async fn conduct(args: DrillArgs) -> Result<()> {
    let shutdown = Shutdown::listen().context("cannot listen to signals")?;
    let target = Target::open(&args.state, args.gateway.client()?)?;
    if args.kinds.iter().any(|kind| kind.cut().is_some()) {
        target.network()?;
    }
    let mut log = Log::open(args.log.as_deref())?;
    let bar = ProgressBar::new(args.faults as u64)
        .with_style(ProgressStyle::with_template("{msg:48} {bar:24} {pos}/{len}").context("progress bar")?);
    let preparing = prepare(&args, &target, &log, &bar);
    let (shapes, recipe) = tokio::select! {
        prepared = preparing => prepared?,
        _ = shutdown.requested() => bail!("interrupted before the first fault"),
    };
    let load = Load::start(&target.client, &shapes);
    let jobs = recipe.map(|recipe| Jobs::start(&target.client, &recipe, args.jobs_at_a_time()));
    let mut random = Random::new(args.seed, 0);
    // Faults that are in the log have had their numbers.
    for _ in 0..log.records.len() {
        args.choose(&Processes::new(), &mut random);
    }
    bar.set_position(log.records.len() as u64);
    while log.records.len() < args.faults && shutdown.reason().is_none() {
        let fault = args.choose(&processes::read(&target.state)?, &mut random);
        let Some(fault) = fault else {
            bail!("no process of {:?} runs", args.roles);
        };
        bar.set_message(format!("{} {}", fault.kind.describe(), fault.name));
        tokio::select! {
            () = tokio::time::sleep(fault.after) => {}
            // A fault that has begun is not left as it is: it ends first.
            _ = shutdown.requested() => break,
        }
        let number = log.records.len();
        let record = args.disturb(&target, &fault, number, &load, jobs.as_ref()).await?;
        bar.suspend(|| eprintln!("{}", record.line(number)));
        bar.inc(1);
        log.fault(record)?;
    }
    let noticed = load.stop(log.records.len()).await;
    // Alone, the last jobs have not long to go.
    bar.set_message("letting the last jobs end");
    let jobs = match jobs {
        None => None,
        Some(jobs) if log.records.len() < args.faults => Some(jobs.cancel().await),
        Some(jobs) => Some(jobs.finish().await),
    };
    log.rest(Rest { noticed, jobs })?;
    bar.finish_and_clear();
    let report = Report::of(&log.records);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    if report.is_clean() { Ok(()) } else { Err(Noticed.into()) }
}

/// What streams and jobs come to undisturbed.
async fn prepare(
    args: &DrillArgs,
    target: &Target,
    log: &Log,
    bar: &ProgressBar,
) -> Result<(Vec<Shape>, Option<Recipe>)> {
    bar.set_message("asking undisturbed");
    target.whole().await.context("before any fault")?;
    let shapes = Shape::ask_all(&target.client, args.streams, TOKENS).await?;
    if args.jobs_at_a_time() == 0 {
        return Ok((shapes, None));
    }
    bar.set_message("tuning undisturbed");
    let recipe = Recipe::prepare(target, args.tune.as_deref()).await?;
    if let Some(earlier) = log.records.iter().rev().find_map(FaultRecord::adapter) {
        recipe.check(earlier)?;
    }
    Ok((shapes, Some(recipe)))
}

impl DrillArgs {
    fn jobs_at_a_time(&self) -> u32 {
        self.jobs.unwrap_or(u32::from(self.tune.is_some()))
    }

    fn choose(&self, processes: &Processes, random: &mut Random) -> Option<Fault> {
        Fault::choose(&self.roles, &self.kinds, processes, random)
    }

    /// One fault, from its beginning until everything that it met has ended.
    async fn disturb(
        &self,
        target: &Target,
        fault: &Fault,
        number: usize,
        load: &Load,
        jobs: Option<&Jobs>,
    ) -> Result<FaultRecord> {
        let lengths = Lengths {
            freeze: Duration::from_millis(self.freeze_ms),
            cut: Duration::from_millis(self.cut_ms),
        };
        load.begin_fault(number, fault.cuts_clients());
        let began = Instant::now();
        let mut seen = None;
        {
            let mut inflicting = std::pin::pin!(fault.inflict(target, lengths));
            let mut missing = std::pin::pin!(target.misses_something());
            loop {
                tokio::select! {
                    done = &mut inflicting => break done?,
                    () = &mut missing, if seen.is_none() => seen = Some(began.elapsed()),
                }
            }
        }
        let what = || format!("after {} {}", fault.kind.describe(), fault.name);
        target.whole().await.with_context(what)?;
        let recovered = began.elapsed();
        // What was running has been compared.
        load.all_have_ended_since(number).await;
        let (noticed, jobs) = (load.end_fault(number), jobs.map(Jobs::take));
        Ok(FaultRecord::new(&fault.name, fault.kind, recovered, noticed, jobs).seen(seen))
    }
}
