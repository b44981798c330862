//! A process that tries inputs of one target, one after the other.
//!
//! Before each input its number is written to a file, so that whoever started this process knows which one ended it. What is
//! found goes to standard output, a JSON object a line.

use crate::{Target, allocator};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// No process holds more: beyond it an allocation fails, which ends the process.
const MEMORY_MAX: usize = 1 << 30;
/// Longest time of the processor that an input may take.
pub const CPU_MAX: Duration = Duration::from_secs(5);
/// Longest time that an input may wait for anything.
const WALL_MAX: Duration = Duration::from_secs(120);
/// What all inputs together may leave behind, in bytes: caches have an end.
const KEPT_MAX: usize = 64 << 20;
/// Inputs until everything is there that is made once and kept.
const SETTLED: u64 = 256;
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// Faults of libraries that cannot be avoided by looking at the input first; the panic becomes an error where it is theirs. The
/// place, and what it is.
const CONTAINED: [(&str, &str); 2] = [
    ("minijinja-3.0.5/src/value/ops.rs:185", "an empty text taken backwards: `''[::-1]`"),
    ("llguidance-1.9.1/src/json/numeric.rs:1", "bounds of numbers at -2^63 and below"),
];

/// Which inputs a worker tries.
#[derive(Debug, Clone)]
pub struct Share {
    /// Of the campaign.
    pub seed: u64,
    /// The first number.
    pub from: u64,
    /// The distance to the next one.
    pub step: u64,
    /// The number behind the last.
    pub end: u64,
    /// When to stop in any case.
    pub time: Duration,
}

/// What a worker says, a line each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// An input failed, and the worker goes on.
    Finding(Finding),
    /// It has tried all of its share, or its time is over.
    Done(Summary),
}

/// An input that failed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finding {
    /// The input's number.
    pub index: u64,
    /// What it did.
    pub what: String,
}

/// What a worker's inputs came to.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Inputs tried.
    pub inputs: u64,
    /// Of them, those that were read to their end and found good.
    pub accepted: u64,
    /// Of them, those that met a fault of a library which is known and contained.
    pub contained: u64,
    /// Bytes of all inputs.
    pub bytes: u64,
    /// Most memory held for one input, in bytes.
    pub peak_bytes: usize,
    /// The input that held it.
    pub peak_index: u64,
    /// Most that the inputs of a process have left behind, in bytes.
    pub kept_bytes: usize,
    /// Longest time of one input, in microseconds.
    pub slowest_us: u64,
    /// The input that took it.
    pub slowest_index: u64,
}

impl Summary {
    /// Of both.
    pub fn add(&mut self, other: &Summary) {
        self.inputs += other.inputs;
        self.accepted += other.accepted;
        self.contained += other.contained;
        self.bytes += other.bytes;
        self.kept_bytes = self.kept_bytes.max(other.kept_bytes);
        if other.peak_bytes > self.peak_bytes {
            (self.peak_bytes, self.peak_index) = (other.peak_bytes, other.peak_index);
        }
        if other.slowest_us > self.slowest_us {
            (self.slowest_us, self.slowest_index) = (other.slowest_us, other.slowest_index);
        }
    }
}

/// Tries inputs. `directory` is for the target's files and for `progress`.
///
/// # Errors
/// If the target cannot be got ready.
pub fn work(target: &Target, share: &Share, directory: &Path) -> Result<()> {
    let progress = File::create(directory.join(PROGRESS)).context("cannot write progress")?;
    let mut subject = (target.open)(directory).context("the target cannot be got ready")?;
    let panics = hear_panics();
    let watch = Watch::start();
    allocator::limit(MEMORY_MAX);
    let begin = Instant::now();
    let mut summary = Summary::default();
    let mut settled = None;
    let mut index = share.from;
    while index < share.end && begin.elapsed() < share.time {
        let input = subject.corpus.input(share.seed, index);
        progress.write_all_at(&index.to_le_bytes(), 0).context("cannot write progress")?;
        watch.index.store(index, Ordering::Relaxed);
        let held = allocator::start();
        if summary.inputs == SETTLED {
            settled = Some(held);
        }
        let started = Instant::now();
        let read = catch_unwind(AssertUnwindSafe(|| (subject.read)(&input)));
        let took = started.elapsed();
        let cost = allocator::peak().saturating_sub(held);
        let panicked = panics.lock().unwrap_or_else(PoisonError::into_inner).take();
        let what = match (panicked, read) {
            (Some(panicked), Ok(_)) if CONTAINED.iter().any(|(place, _)| panicked.contains(place)) => {
                summary.contained += 1;
                None
            }
            (Some(panicked), _) => Some(format!("panicked: {panicked}")),
            (None, Err(_)) => Some("panicked without a message".to_owned()),
            (None, Ok(_)) if cost > target.memory.of(input.len()) => {
                Some(format!("held {cost} bytes for an input of {}", input.len()))
            }
            (None, Ok(accepted)) => {
                summary.accepted += u64::from(accepted);
                None
            }
        };
        if let Some(what) = what {
            say(&Said::Finding(Finding { index, what }));
        }
        let (slowest_us, peak_bytes) = (took.as_micros() as u64, cost);
        summary.add(&Summary {
            inputs: 1,
            bytes: input.len() as u64,
            peak_bytes,
            peak_index: index,
            slowest_us,
            slowest_index: index,
            ..Summary::default()
        });
        let kept = held.saturating_sub(settled.unwrap_or(held));
        if kept > KEPT_MAX && summary.kept_bytes <= KEPT_MAX {
            let what = format!("this and {} inputs before it have left {kept} bytes behind", summary.inputs);
            say(&Said::Finding(Finding { index, what }));
        }
        summary.kept_bytes = summary.kept_bytes.max(kept);
        index = index.saturating_add(share.step);
    }
    watch.over.store(true, Ordering::Relaxed);
    say(&Said::Done(summary));
    Ok(())
}

/// The file with the number of the input that is being tried.
pub const PROGRESS: &str = "progress";

/// The number of the input that a worker was trying.
pub fn progress(directory: &Path) -> Option<u64> {
    let bytes = std::fs::read(directory.join(PROGRESS)).ok()?;
    bytes.try_into().ok().map(u64::from_le_bytes)
}

fn say(said: &Said) {
    // Plain data is always JSON.
    println!("{}", serde_json::to_string(said).unwrap_or_default());
}

/// From here on panics of any thread are kept instead of shown.
fn hear_panics() -> Arc<Mutex<Option<String>>> {
    let heard = Arc::new(Mutex::new(None));
    let hearing = heard.clone();
    panic::set_hook(Box::new(move |info| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
        let text = text.unwrap_or("no message");
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        *hearing.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{text} at {place}"));
    }));
    heard
}

/// Ends the process when an input takes too long.
struct Watch {
    index: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
}

impl Watch {
    fn start() -> Watch {
        let watch = Watch { index: Arc::new(AtomicU64::new(u64::MAX)), over: Arc::default() };
        let (index, over) = (watch.index.clone(), watch.over.clone());
        std::thread::spawn(move || {
            let mut seen = (u64::MAX, cpu(), Instant::now());
            while !over.load(Ordering::Relaxed) {
                std::thread::sleep(WATCH_INTERVAL);
                let now = index.load(Ordering::Relaxed);
                if now != seen.0 {
                    seen = (now, cpu(), Instant::now());
                    continue;
                }
                let (used, waited) = (cpu().saturating_sub(seen.1), seen.2.elapsed());
                if now != u64::MAX && (used > CPU_MAX || waited > WALL_MAX) {
                    let what = format!(
                        "took {:.1} s of the processor, {:.1} s in all, and went on",
                        used.as_secs_f64(),
                        waited.as_secs_f64()
                    );
                    say(&Said::Finding(Finding { index: now, what }));
                    std::process::exit(TOO_LONG);
                }
            }
        });
        watch
    }
}

/// The exit code of a worker whose input took too long, which it has said.
pub const TOO_LONG: i32 = 17;

/// Time of the processor that this process has used.
fn cpu() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
