//! Processes that try inputs, and what they find.

use crate::Target;
use crate::worker::{Finding, Said, Share, Summary, TOO_LONG, progress};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// So many different failures end a target's campaign: there is enough to look at.
const FINDINGS_MAX: usize = 20;

/// How a target is tried.
#[derive(Debug, Clone)]
pub struct Plan {
    /// This program.
    pub program: PathBuf,
    /// What inputs are made of.
    pub seed: u64,
    /// The first number.
    pub from: u64,
    /// How many.
    pub inputs: u64,
    /// Until when, where that comes first.
    pub time: Duration,
    /// Processes at once.
    pub jobs: u64,
    /// Where failing inputs are put.
    pub failures: PathBuf,
}

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Outcome {
    /// The target.
    pub target: &'static str,
    /// What inputs were made of.
    pub seed: u64,
    /// What it took, in seconds.
    pub seconds: f64,
    /// All workers together.
    #[serde(flatten)]
    pub summary: Summary,
    /// Inputs that failed: the first one of each kind.
    pub findings: Vec<Finding>,
}

/// Tries a target.
///
/// # Errors
/// If workers cannot be started, or the target cannot be got ready.
pub fn run(target: &'static Target, plan: &Plan) -> Result<Outcome> {
    let begin = Instant::now();
    let end = plan.from.saturating_add(plan.inputs);
    let found = Mutex::new((Summary::default(), BTreeMap::new()));
    std::thread::scope(|scope| {
        let job = |job| {
            let found = &found;
            scope.spawn(move || {
                let mut next = plan.from + job;
                while next < end && begin.elapsed() < plan.time && !is_enough(found) {
                    let time = plan.time.saturating_sub(begin.elapsed());
                    let share = Share { seed: plan.seed, from: next, step: plan.jobs, end, time };
                    match follow(target, &share, &plan.program, found)? {
                        Some(ended_by) => next = ended_by + plan.jobs,
                        None => break,
                    }
                }
                Ok(())
            })
        };
        let jobs: Vec<_> = (0..plan.jobs.min(plan.inputs).max(1)).map(job).collect();
        jobs.into_iter().try_for_each(|job| job.join().unwrap_or_else(|_| anyhow::bail!("a thread panicked")))
    })?;
    let (summary, findings) = found.into_inner().unwrap_or_default();
    let findings: Vec<Finding> = findings.into_values().collect();
    keep(target, plan, &findings)?;
    Ok(Outcome {
        target: target.name,
        seed: plan.seed,
        seconds: begin.elapsed().as_secs_f64(),
        summary,
        findings,
    })
}

/// What has been found so far, by what is alike.
type Found = Mutex<(Summary, BTreeMap<String, Finding>)>;

fn is_enough(found: &Found) -> bool {
    found.lock().is_ok_and(|found| found.1.len() >= FINDINGS_MAX)
}

/// Follows one worker to its end; gives the number of the input that ended it before its time.
fn follow(target: &Target, share: &Share, program: &Path, found: &Found) -> Result<Option<u64>> {
    let directory = scratch()?;
    let mut worker = Command::new(program)
        .arg("worker")
        .args(["--target", target.name])
        .args(["--seed", &share.seed.to_string()])
        .args(["--from", &share.from.to_string()])
        .args(["--step", &share.step.to_string()])
        .args(["--end", &share.end.to_string()])
        .args(["--time", &share.time.as_secs_f64().to_string()])
        .arg("--directory")
        .arg(directory.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a worker")?;
    let stderr = worker.stderr.take();
    let last_words = std::thread::spawn(move || {
        let lines = stderr.map(BufReader::new).into_iter().flat_map(BufRead::lines);
        let lines: Vec<String> = lines.map_while(Result::ok).filter(|line| !line.is_empty()).collect();
        lines.join(" | ")
    });
    let mut done = false;
    for line in worker.stdout.take().map(BufReader::new).into_iter().flat_map(BufRead::lines) {
        // What a target prints itself is none of ours.
        let Ok(said) = serde_json::from_str::<Said>(&line.context("a worker cannot be heard")?) else {
            continue;
        };
        let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match said {
            Said::Finding(finding) => {
                found.1.entry(kind(&finding.what)).or_insert(finding);
            }
            Said::Done(summary) => {
                found.0.add(&summary);
                done = true;
            }
        }
    }
    let status = worker.wait().context("a worker cannot be waited for")?;
    let last_words = last_words.join().unwrap_or_default();
    if done && status.success() {
        return Ok(None);
    }
    let index = progress(directory.path());
    ensure!(index.is_some(), "{}: {last_words}", target.name);
    let index = index.unwrap_or(share.from);
    let mut found = found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    // What it had tried before, of which it could not tell any more.
    found.0.inputs += (index - share.from) / share.step + 1;
    if status.code() != Some(TOO_LONG) {
        let words: String = last_words.chars().take(400).collect();
        let what = format!("ended the process ({status}): {words}");
        found.1.entry(kind(&what)).or_insert(Finding { index, what });
    }
    Ok(Some(index))
}

/// Failures whose words differ in numbers alone are one.
fn kind(what: &str) -> String {
    let without_numbers: String = what.chars().filter(|c| !c.is_ascii_digit()).take(160).collect();
    match what.rsplit_once(" at ") {
        Some((_, place)) if what.starts_with("panicked") => place.to_owned(),
        _ => without_numbers,
    }
}

/// A directory in memory, where there is one: files are written for every input.
fn scratch() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("ashlar-fuzz-");
        builder
    };
    let made = match memory.is_dir() {
        true => builder().tempdir_in(memory),
        false => builder().tempdir(),
    };
    made.context("cannot make a directory")
}

/// Puts the inputs that failed into files.
fn keep(target: &Target, plan: &Plan, findings: &[Finding]) -> Result<()> {
    if findings.is_empty() {
        return Ok(());
    }
    let directory = scratch()?;
    let corpus = (target.open)(directory.path())?.corpus;
    std::fs::create_dir_all(&plan.failures).context("cannot make a directory for failing inputs")?;
    for finding in findings {
        let file = plan.failures.join(format!("{}-{}-{}", target.name, plan.seed, finding.index));
        std::fs::write(&file, corpus.input(plan.seed, finding.index))
            .context("cannot keep a failing input")?;
    }
    Ok(())
}
