//! Fine-tuning jobs that run one after the other while a cluster is disturbed, each compared with one that nobody disturbed: the
//! same seed, file and settings give an adapter with the same SHA-256.

mod watch;

use super::target::Target;
use crate::http::Client;
use crate::tune;
use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;

/// A job that commits no step for this long hangs.
const GAP_MAX: Duration = Duration::from_secs(120);
/// After an end that was asked for, what runs may take so long.
const END_MAX: Duration = Duration::from_secs(300);
/// Before another job is tried after one that failed.
const PAUSE: Duration = Duration::from_secs(1);
/// Examples of the drill's own file, and how they are trained: 48 steps, some seconds on the demo model.
const EXAMPLES: u32 = 96;
const EPOCHS: u32 = 4;
const BATCH: u32 = 8;
const SEED: u32 = 7;

/// What was noticed of jobs.
#[derive(Debug, Default, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Noticed {
    /// Jobs with the adapter of an undisturbed one.
    pub(super) finished: u64,
    /// Jobs with another one.
    pub(super) changed: u64,
    /// Jobs that committed no step for [`GAP_MAX`].
    pub(super) hung: u64,
    /// Why jobs failed, or could not be created.
    pub(super) failed: Vec<String>,
    /// Longest time without another committed step in which a job was there, in seconds.
    pub(super) longest_gap_s: f64,
    /// The undisturbed job's adapter.
    pub(super) adapter: String,
}

impl Noticed {
    pub(super) fn add(&mut self, other: Noticed) {
        self.finished += other.finished;
        self.changed += other.changed;
        self.hung += other.hung;
        self.failed.extend(other.failed);
        self.longest_gap_s = self.longest_gap_s.max(other.longest_gap_s);
        self.adapter = other.adapter;
    }

    /// Whether every job came to the same.
    pub(super) fn is_clean(&self) -> bool {
        self.changed == 0 && self.hung == 0 && self.failed.is_empty()
    }
}

/// What all jobs ask for, and what they have to come to.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    request: Value,
    adapter: String,
}

impl Recipe {
    /// Uploads the examples (of the drill's own, without a file) and lets a job run undisturbed.
    pub(super) async fn prepare(target: &Target, examples: Option<&Path>) -> Result<Recipe> {
        let client = &target.client;
        let model = tune::first_model(client).await?;
        let (file, settings) = match examples {
            Some(file) => (file.to_owned(), json!({})),
            None => (own_examples(&target.state)?, own_settings()),
        };
        let opened = File::open(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let (form, bar) = ([("purpose", "fine-tune")], ProgressBar::hidden());
        let uploaded = client.upload("/v1/files", &form, "drill.jsonl", opened, &bar).await;
        let uploaded = uploaded.with_context(|| format!("cannot upload {}", file.display()))?;
        let mut request = json!({"model": model, "training_file": uploaded["id"], "seed": SEED});
        if let (Value::Object(request), Value::Object(settings)) = (&mut request, settings) {
            request.extend(settings);
        }
        let board = Board::default();
        let adapter =
            watch::run(client, &request, &label(0), &board, 0).await.context("an undisturbed job")?;
        if let Some(adapter) = adapter {
            return Ok(Recipe { request, adapter });
        }
        bail!("an undisturbed job committed no step for {} s", GAP_MAX.as_secs())
    }

    /// Refuses to count on where an earlier drill has had another adapter from its undisturbed job.
    pub(super) fn check(&self, earlier: &str) -> Result<()> {
        if !earlier.is_empty() && earlier != self.adapter {
            bail!(
                "an undisturbed job now comes to {}, and to {earlier} in the log: is that of another model, file or release? \
                 Give another --log",
                self.adapter
            );
        }
        Ok(())
    }
}

/// What jobs and the one who disturbs them share.
#[derive(Debug, Default)]
struct Board(Mutex<Written>);

#[derive(Debug, Default)]
struct Written {
    noticed: Noticed,
    /// Each worker's job, with when it committed its last step, or was asked for.
    running: Vec<Option<Running>>,
}

#[derive(Debug, Clone)]
struct Running {
    /// Once it is created.
    id: Option<String>,
    since: Instant,
}

impl Board {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker's job begins, or has an id.
    fn begins(&self, worker: usize, id: Option<&str>) {
        let mut board = self.lock();
        if board.running.len() <= worker {
            board.running.resize(worker + 1, None);
        }
        let since = board.running[worker].as_ref().map_or_else(Instant::now, |running| running.since);
        board.running[worker] = Some(Running { id: id.map(str::to_owned), since });
    }

    /// It has committed a step, or ended.
    fn steps(&self, worker: usize, goes_on: bool) {
        let mut board = self.lock();
        let Written { noticed, running } = &mut *board;
        if let Some(place) = running.get_mut(worker) {
            if let Some(running) = place {
                noticed.longest_gap_s = noticed.longest_gap_s.max(running.since.elapsed().as_secs_f64());
                running.since = Instant::now();
            }
            if !goes_on {
                *place = None;
            }
        }
    }

    fn gap(&self, worker: usize) -> Duration {
        let board = self.lock();
        board.running.get(worker).and_then(Option::as_ref).map_or(Duration::ZERO, |job| job.since.elapsed())
    }

    /// What was noticed since the last time, gaps that go on included.
    fn take(&self) -> Noticed {
        let mut board = self.lock();
        let mut noticed = std::mem::take(&mut board.noticed);
        for running in board.running.iter().flatten() {
            noticed.longest_gap_s = noticed.longest_gap_s.max(running.since.elapsed().as_secs_f64());
        }
        noticed
    }
}

/// The jobs.
pub(super) struct Jobs {
    client: Client,
    adapter: String,
    board: Arc<Board>,
    stop: Sender<bool>,
    tasks: JoinSet<()>,
}

impl Jobs {
    /// Keeps so many jobs running.
    pub(super) fn start(client: &Client, recipe: &Recipe, count: u32) -> Jobs {
        let board = Arc::new(Board::default());
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let mut tasks = JoinSet::new();
        for worker in 0..count as usize {
            let worker = Worker {
                worker,
                count: count as usize,
                client: client.clone(),
                recipe: recipe.clone(),
                board: board.clone(),
                stopped: stopped.clone(),
            };
            tasks.spawn(worker.run());
        }
        Jobs { client: client.clone(), adapter: recipe.adapter.clone(), board, stop, tasks }
    }

    /// What was noticed since the last time.
    pub(super) fn take(&self) -> Noticed {
        Noticed { adapter: self.adapter.clone(), ..self.board.take() }
    }

    /// Waits for what runs; what was noticed since the last time.
    pub(super) async fn finish(mut self) -> Noticed {
        self.stop.send_replace(true);
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(END_MAX, all).await.is_err() {
            let mut board = self.board.lock();
            board.noticed.hung += board.running.iter().flatten().count() as u64;
        }
        self.take()
    }

    /// Cancels what runs, which counts for nothing; what was noticed since the last time.
    pub(super) async fn cancel(mut self) -> Noticed {
        self.tasks.shutdown().await;
        let ids: Vec<_> = self.board.lock().running.drain(..).flatten().filter_map(|job| job.id).collect();
        for id in ids {
            watch::cancel(&self.client, &id).await;
        }
        self.take()
    }
}

struct Worker {
    worker: usize,
    count: usize,
    client: Client,
    recipe: Recipe,
    board: Arc<Board>,
    stopped: Receiver<bool>,
}

impl Worker {
    async fn run(self) {
        let mut number = 1 + self.worker;
        while !*self.stopped.borrow() {
            let ended =
                watch::run(&self.client, &self.recipe.request, &label(number), &self.board, self.worker)
                    .await;
            number += self.count;
            let failed = ended.is_err();
            {
                let mut board = self.board.lock();
                let noticed = &mut board.noticed;
                match ended {
                    Ok(Some(adapter)) if adapter == self.recipe.adapter => noticed.finished += 1,
                    Ok(Some(_)) => noticed.changed += 1,
                    Ok(None) => noticed.hung += 1,
                    Err(error) => noticed.failed.push(format!("{error:#}")),
                }
            }
            if failed {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// A suffix that no other job has, so that one is found again whose creation was not answered.
fn label(number: usize) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("drill-{:x}-{number}", now.as_millis())
}

/// Words and their letters in reverse, a chat per line.
fn own_examples(state: &Path) -> Result<PathBuf> {
    let path = state.join("drill-examples.jsonl");
    let mut text = String::new();
    for number in 0..EXAMPLES {
        let letter = |place: u32| char::from(b'a' + ((number * 11 + place * (3 + number % 7)) % 26) as u8);
        let word: String = (0..4 + number % 5).map(letter).collect();
        let reversed: String = word.chars().rev().collect();
        let example = json!({"messages": [
            {"role": "user", "content": format!("Spell {word} backwards.")},
            {"role": "assistant", "content": reversed},
        ]});
        writeln!(text, "{example}")?;
    }
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

fn own_settings() -> Value {
    let hyperparameters = json!({"n_epochs": EPOCHS, "batch_size": BATCH});
    json!({
        "learning_rate": 3e-3, "lora": {"r": 4},
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_board_hands_everything_out_once_and_gaps_as_long_as_they_last() {
        let board = Board::default();
        board.begins(1, None);
        board.begins(1, Some("ftjob-1"));
        board.lock().noticed.finished = 3;
        board.lock().running[1].as_mut().unwrap().since = Instant::now() - Duration::from_secs(5);
        assert!(board.gap(1) >= Duration::from_secs(5) && board.gap(0) == Duration::ZERO);
        for finished in [3, 0] {
            let noticed = board.take();
            assert_eq!(noticed.finished, finished);
            assert!(noticed.longest_gap_s >= 5.0);
        }
        board.steps(1, true);
        assert!(board.take().longest_gap_s >= 5.0);
        assert!(board.take().longest_gap_s < 5.0);
        board.steps(1, false);
        assert_eq!(board.gap(1), Duration::ZERO);
        board.take();
        assert_eq!(board.take(), Noticed::default(), "no gap without a job");
    }

    #[test]
    fn the_drill_has_examples_of_its_own_which_are_always_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = own_examples(directory.path()).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), EXAMPLES as usize);
        let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(first["messages"][0]["content"], "Spell adgj backwards.");
        assert_eq!(first["messages"][1]["content"], "jgda");
        assert_eq!(fs::read_to_string(own_examples(directory.path()).unwrap()).unwrap(), text);
    }

    #[test]
    fn a_log_of_another_adapter_is_refused() {
        let recipe = Recipe { request: json!({}), adapter: "sha256:1".into() };
        assert!(recipe.check("").is_ok() && recipe.check("sha256:1").is_ok());
        assert!(recipe.check("sha256:2").unwrap_err().to_string().contains("--log"));
    }
}
