//! Blobs of jobs: superseded ones go, tables of steps are written, and what nobody refers to is swept.

use super::archive::{Answer, chunk_name};
use crate::jobs::results::ResultsTable;
use crate::jobs::{Effect, Event, References};
use ashlar_protocol::admin::JobEvent;
use ashlar_store::blobs::{Blobs, Roots};
use ashlar_store::{Store, job_events};
use ashlar_vocabulary::{BlobId, JobId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Wishes that may wait; what does not fit is left to a sweep.
const WISHES_MAX: usize = 1024;
/// Nothing younger is swept: it may be about to be referred to.
const SWEEP_GRACE: Duration = Duration::from_secs(24 * 3600);
/// Attempts to write a table, and to delete the blobs of one wish.
const ATTEMPTS_MAX: u32 = 5;
const RETRY: Duration = Duration::from_secs(2);

/// The sending side of the keeper's task.
pub(super) struct Keeper {
    wishes: mpsc::Sender<Effect>,
    task: JoinHandle<()>,
}

impl Keeper {
    pub(super) fn start(
        store: Arc<dyn Store>,
        blobs: Option<Blobs>,
        answers: mpsc::Sender<Answer>,
    ) -> Keeper {
        let (wishes, inbox) = mpsc::channel(WISHES_MAX);
        let task = Task { store, blobs, answers, sweep: None };
        Keeper { wishes, task: tokio::spawn(task.run(inbox)) }
    }

    /// Takes a wish; `false` if there are too many.
    pub(super) fn give(&self, wish: Effect) -> bool {
        self.wishes.try_send(wish).is_ok()
    }

    /// Stops; what is not done is done under the next term, or swept.
    pub(super) async fn finish(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Task {
    store: Arc<dyn Store>,
    blobs: Option<Blobs>,
    answers: mpsc::Sender<Answer>,
    /// Beside the other work: it may take long.
    sweep: Option<Sweeping>,
}

/// A sweep that ends with its task.
struct Sweeping(JoinHandle<()>);

impl Drop for Sweeping {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Task {
    async fn run(mut self, mut wishes: mpsc::Receiver<Effect>) {
        while let Some(wish) = wishes.recv().await {
            match wish {
                Effect::DeleteBlobs { job, blobs } => {
                    self.delete(&blobs).await;
                    let event = Box::new(Event::BlobsDeleted { job, blobs });
                    let _ = self.answers.send(Answer::Event(event)).await;
                }
                Effect::WriteResults { job, chunks } => {
                    let outcome = self.write_results(job, chunks).await;
                    let event = Box::new(Event::ResultsWritten { job, outcome });
                    let _ = self.answers.send(Answer::Event(event)).await;
                }
                Effect::Sweep(references) => self.begin_sweep(*references),
                _ => {}
            }
        }
    }

    async fn delete(&self, gone: &[BlobId]) {
        let Some(blobs) = &self.blobs else { return };
        let mut attempt = 1;
        for blob in gone {
            while let Err(error) = blobs.delete(*blob).await {
                if !error.is_retryable() || attempt >= ATTEMPTS_MAX {
                    tracing::warn!(%error, "a superseded blob is left to the sweep");
                    break;
                }
                tokio::time::sleep(RETRY * attempt).await;
                attempt += 1;
            }
        }
    }

    async fn write_results(&self, job: JobId, chunks: u64) -> Result<(BlobId, u64), String> {
        let Some(blobs) = &self.blobs else { return Err("no place for blobs is configured".to_owned()) };
        let mut attempt = 1;
        loop {
            let written = match self.table(job, chunks).await {
                Ok(table) => blobs.put(table.csv().as_bytes()).await.map_err(|error| error.to_string()),
                Err(error) => Err(error),
            };
            match written {
                Ok(info) => return Ok((info.id, info.bytes)),
                Err(error) if attempt == ATTEMPTS_MAX => return Err(error),
                Err(_) => tokio::time::sleep(RETRY * attempt).await,
            }
            attempt += 1;
        }
    }

    async fn table(&self, job: JobId, chunks: u64) -> Result<ResultsTable, String> {
        let mut table = ResultsTable::default();
        for chunk in 0..chunks {
            let events = job_events::<Vec<JobEvent>>(&*self.store).get(&chunk_name(job, chunk)).await;
            let events = events.map_err(|error| error.to_string())?;
            events.iter().flat_map(|(_, events)| events).for_each(|event| table.add(event));
        }
        Ok(table)
    }

    fn begin_sweep(&mut self, references: References) {
        let Some(blobs) = self.blobs.clone() else { return };
        let roots = Roots {
            blobs: references.blobs,
            manifests: references.adapters.into_iter().map(|adapter| adapter.0).collect(),
        };
        self.sweep = Some(Sweeping(tokio::spawn(async move {
            match blobs.sweep(&roots, SWEEP_GRACE).await {
                Ok(swept) => tracing::info!(blobs = swept.blobs, bytes = swept.bytes, "swept blobs"),
                Err(error) => tracing::warn!(%error, "blobs cannot be swept"),
            }
        })));
    }
}
