//! `ashlar drill`: kills and freezes processes of a running cluster on purpose, under load, and says what clients noticed.

mod load;
mod report;
mod stream;

use crate::bench::random::Random;
use crate::http::Client;
use crate::processes::{self, Processes, Signal};
use crate::roles;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use load::Load;
use report::{FaultRecord, Report};
use serde::{Deserialize, Serialize};
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use stream::Shape;

/// Longest wait for the cluster to be whole again after a fault.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
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

Examples:
  ashlar drill                                        20 faults over all roles
  ashlar drill --faults 1000 --log drill.jsonl        goes on where it left off, if drill.jsonl is there
  ashlar drill --roles scheduler --kinds freeze --json
Exit code: 0 if no client noticed more than a pause, else 1."
)]
pub(crate) struct DrillArgs {
    /// State directory of the running cluster.
    #[arg(long, default_value = "./.ashlar")]
    state: PathBuf,
    /// Address of the gateway.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
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
    /// Which processes, when and how follows from it.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A file that gets a line per fault; if it is there, the drill goes on after its last.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// API key, if the gateway wants one.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    key: Option<String>,
}

/// A kind of process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Shard nodes.
    Node,
    /// The scheduler.
    Scheduler,
    /// The gateway.
    Gateway,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// SIGKILL.
    Kill,
    /// SIGSTOP, and SIGCONT later.
    Freeze,
}

impl Role {
    fn of(name: &str) -> Role {
        match name {
            "gateway" => Role::Gateway,
            name if name.starts_with("scheduler") => Role::Scheduler,
            _ => Role::Node,
        }
    }
}

/// Nothing that serves needs the enrolment endpoint.
fn is_drilled(name: &str) -> bool {
    name != "enrolment"
}

pub(crate) fn run(args: DrillArgs) -> Result<()> {
    if args.roles.is_empty() || args.kinds.is_empty() {
        bail!("nothing to do: name at least one of --roles and one of --kinds");
    }
    roles::runtime()?.block_on(conduct(args))
}

async fn conduct(args: DrillArgs) -> Result<()> {
    let state = fs::canonicalize(&args.state)
        .with_context(|| format!("there is no state directory {}", args.state.display()))?;
    processes::read(&state)?;
    let client = Client::new(&args.url, args.key.clone())?;
    let mut records = args.log.as_deref().map_or_else(|| Ok(Vec::new()), report::read)?;
    let bar = ProgressBar::new(args.faults as u64)
        .with_style(ProgressStyle::with_template("{msg:48} {bar:24} {pos}/{len}").context("progress bar")?);
    bar.set_message("asking undisturbed");
    whole(&client, &state).await.context("before any fault")?;
    let shapes = Shape::ask_all(&client, args.streams, TOKENS).await?;
    let load = Load::start(&client, &shapes);
    let mut random = Random::new(args.seed, 0);
    // Faults that are in the log have had their numbers.
    for _ in 0..records.len() {
        choose(&args, &Processes::new(), &mut random);
    }
    bar.set_position(records.len() as u64);
    while records.len() < args.faults {
        let number = records.len();
        let fault = choose(&args, &processes::read(&state)?, &mut random);
        let Some(fault) = fault else {
            bail!("no process of {:?} runs", args.roles);
        };
        bar.set_message(format!("{} {}", fault.kind.describe(), fault.name));
        tokio::select! {
            () = tokio::time::sleep(fault.after) => {}
            _ = tokio::signal::ctrl_c() => break,
        }
        load.begin_fault(number, Role::of(&fault.name) == Role::Gateway);
        let began = Instant::now();
        inflict(&state, &fault, args.freeze_ms).await?;
        whole(&client, &state)
            .await
            .with_context(|| format!("after {} {}", fault.kind.describe(), fault.name))?;
        let recovered = began.elapsed();
        // What was running has been compared.
        load.all_have_ended_since(number).await;
        let record = FaultRecord::new(&fault.name, fault.kind, recovered, load.end_fault(number));
        bar.suspend(|| eprintln!("{}", record.line(number)));
        bar.inc(1);
        append(args.log.as_deref(), &record)?;
        records.push(record);
    }
    let rest = load.stop(records.len()).await;
    if let Some(last) = records.last_mut() {
        last.add(rest);
    }
    bar.finish_and_clear();
    let report = Report::of(&records);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => print!("{report}"),
    }
    if report.is_clean() { Ok(()) } else { Err(Noticed.into()) }
}

/// What will happen.
struct Fault {
    name: String,
    pid: u32,
    kind: Kind,
    after: Duration,
}

impl Kind {
    fn describe(self) -> &'static str {
        match self {
            Kind::Kill => "killing",
            Kind::Freeze => "freezing",
        }
    }
}

/// The next fault. As many random numbers are taken whoever runs.
fn choose(args: &DrillArgs, processes: &Processes, random: &mut Random) -> Option<Fault> {
    let (role, process, kind) = (random.next(), random.next(), random.next());
    let after = Duration::from_millis(random.between(50, 1_000));
    let pick = |number: u64, count: usize| usize::try_from(number % count.max(1) as u64).unwrap_or(0);
    let role = args.roles.get(pick(role, args.roles.len()))?;
    let candidates: Vec<_> =
        processes.iter().filter(|(name, _)| is_drilled(name) && Role::of(name) == *role).collect();
    let (name, pid) = candidates.get(pick(process, candidates.len()))?;
    let kind = *args.kinds.get(pick(kind, args.kinds.len()))?;
    Some(Fault { name: (*name).clone(), pid: **pid, kind, after })
}

async fn inflict(state: &Path, fault: &Fault, freeze_ms: u64) -> Result<()> {
    match fault.kind {
        Kind::Kill => {
            processes::signal(state, &fault.name, fault.pid, Signal::Kill)?;
            let began = Instant::now();
            // Its supervisor has seen it and started another one.
            while processes::read(state)?.get(&fault.name).is_none_or(|pid| *pid == fault.pid) {
                if began.elapsed() > RECOVERY_MAX {
                    bail!("{} was not started again within {} s", fault.name, RECOVERY_MAX.as_secs());
                }
                tokio::time::sleep(POLL).await;
            }
            Ok(())
        }
        Kind::Freeze => {
            processes::signal(state, &fault.name, fault.pid, Signal::Stop)?;
            tokio::time::sleep(Duration::from_millis(freeze_ms)).await;
            // A supervisor may have killed it meanwhile.
            let _ = processes::signal(state, &fault.name, fault.pid, Signal::Continue);
            Ok(())
        }
    }
}

/// Waits until every process runs, has joined, and every replica serves.
async fn whole(client: &Client, state: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        let expected = processes::read(state)?
            .keys()
            .filter(|name| is_drilled(name) && Role::of(name) == Role::Node)
            .count();
        // A gateway that is frozen does not answer at all.
        let asked = tokio::time::timeout(Duration::from_secs(1), client.get("/admin/cluster")).await;
        if let Ok(Ok((200, view))) = asked {
            let list = |field: &str| view["cluster"][field].as_array().cloned().unwrap_or_default();
            let ready = list("replicas").iter().all(|replica| replica["ready"] == true);
            if view["ready"] == true && ready && list("nodes").len() >= expected {
                return Ok(());
            }
        }
        if began.elapsed() > RECOVERY_MAX {
            bail!("the cluster is not whole within {} s", RECOVERY_MAX.as_secs());
        }
        tokio::time::sleep(POLL).await;
    }
}

fn append(log: Option<&Path>, record: &FaultRecord) -> Result<()> {
    let Some(path) = log else { return Ok(()) };
    let write = || -> Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        writeln!(file, "{}", serde_json::to_string(record)?)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
