//! Records of files and jobs in the store: read once per term, written in order, tried again while the store is away.
//!
//! A job's record names the lease under which it was written. Whoever takes over writes its own into every job that has not
//! ended, before it goes on with one. A former leader that does not know yet then finds a version that is not its own, and
//! writes nothing more; nor does it delete blobs, as it does so only after a write.

use crate::jobs::{CHUNK_EVENTS, Effect, Event, Loaded, SaveId, StoredJob};
use ashlar_protocol::admin::{FileRecord, JobEvent};
use ashlar_store::{Expected, Store, StoreError, Version, files, job_events, jobs};
use ashlar_vocabulary::{JobId, LeaseTerm};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Answers that may wait for the owner of all state; the archive waits then.
pub(super) const ANSWERS_MAX: usize = 1024;
/// Wishes that may wait for the store. The cores have fewer under way.
const WISHES_MAX: usize = 4096;
/// Pauses while the store is away.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// How long the end of a term waits for what is still to be written.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// What the archive answers.
#[derive(Debug)]
pub(super) enum Answer {
    /// For the jobs core.
    Event(Box<Event>),
    /// Another scheduler has taken over: this term is over.
    Superseded,
}

/// The sending side of the archive's task.
pub(super) struct Archive {
    wishes: Option<mpsc::Sender<Effect>>,
    task: JoinHandle<()>,
}

impl Archive {
    /// Begins to read what is stored.
    pub(super) fn start(store: Arc<dyn Store>, term: LeaseTerm, answers: mpsc::Sender<Answer>) -> Archive {
        let (wishes, inbox) = mpsc::channel(WISHES_MAX);
        let records = Records { store, term, versions: BTreeMap::new(), chunks: BTreeMap::new() };
        let task = Task { records, answers, away: false };
        Archive { wishes: Some(wishes), task: tokio::spawn(task.run(inbox)) }
    }

    /// Takes a wish, in order; `false` if there are too many.
    pub(super) fn give(&self, wish: Effect) -> bool {
        self.wishes.as_ref().is_some_and(|wishes| wishes.try_send(wish).is_ok())
    }

    /// Writes what is still to be written, if that does not take long.
    pub(super) async fn finish(&mut self) {
        self.wishes = None;
        let _ = tokio::time::timeout(FINISH_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Task {
    records: Records,
    answers: mpsc::Sender<Answer>,
    /// Whether the store did not answer when last asked.
    away: bool,
}

/// Why something was not done.
enum Trouble {
    Store(StoreError),
    Superseded,
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Trouble {
        Trouble::Store(error)
    }
}

impl Task {
    async fn run(mut self, mut wishes: mpsc::Receiver<Effect>) {
        let mut pause = RETRY_MIN;
        let loaded = loop {
            match self.records.load().await {
                Ok(loaded) => break loaded,
                Err(trouble) => {
                    if !self.wait(trouble, &mut pause).await {
                        return;
                    }
                }
            }
        };
        self.is_back().await;
        self.answer(Event::Loaded(Box::new(loaded))).await;
        while let Some(wish) = wishes.recv().await {
            if !self.perform(wish).await {
                return;
            }
        }
    }

    /// Performs a wish however long the store is away; `false` if this term is over.
    async fn perform(&mut self, wish: Effect) -> bool {
        let mut pause = RETRY_MIN;
        loop {
            match self.records.perform(&wish).await {
                Ok(event) => {
                    self.is_back().await;
                    if let Some(event) = event {
                        self.answer(event).await;
                    }
                    return true;
                }
                Err(trouble) => {
                    if let (Effect::ReadEvents { read, .. }, Trouble::Store(_)) = (&wish, &trouble) {
                        self.answer(Event::EventsRead { read: *read, events: None }).await;
                        return true;
                    }
                    if let Trouble::Store(error @ (StoreError::TooLarge { .. } | StoreError::Invalid(_))) =
                        &trouble
                    {
                        // It never will be: the cores bound what they want stored, so this is a fault of ours.
                        tracing::error!(%error, "a record cannot be stored");
                        return true;
                    }
                    if !self.wait(trouble, &mut pause).await {
                        return false;
                    }
                }
            }
        }
    }

    /// Waits before another attempt; `false` if this term is over.
    async fn wait(&mut self, trouble: Trouble, pause: &mut Duration) -> bool {
        match trouble {
            Trouble::Superseded => {
                tracing::warn!("another scheduler has written a job's record: this term is over");
                let _ = self.answers.send(Answer::Superseded).await;
                return false;
            }
            Trouble::Store(error) => {
                if !self.away {
                    tracing::warn!(%error, "files and jobs cannot be stored; serving on");
                    self.away = true;
                    self.answer(Event::StoreDown(error.to_string())).await;
                }
            }
        }
        tokio::time::sleep(*pause).await;
        *pause = (*pause * 2).min(RETRY_MAX);
        true
    }

    async fn is_back(&mut self) {
        if std::mem::take(&mut self.away) {
            tracing::info!("files and jobs can be stored again");
            self.answer(Event::StoreUp).await;
        }
    }

    async fn answer(&self, event: Event) {
        // Nobody listens once the term is over.
        let _ = self.answers.send(Answer::Event(Box::new(event))).await;
    }
}

/// The collections, and which version of each entry is ours.
struct Records {
    store: Arc<dyn Store>,
    term: LeaseTerm,
    /// Of jobs' records.
    versions: BTreeMap<JobId, Version>,
    /// Of the last chunk of events of each job, with its number.
    chunks: BTreeMap<JobId, (u64, Version)>,
}

/// The name of a chunk of events.
pub(super) fn chunk_name(job: JobId, chunk: u64) -> String {
    format!("{job}/{chunk:08}")
}

impl Records {
    async fn load(&mut self) -> Result<Loaded, Trouble> {
        let store = self.store.clone();
        let files = files::<FileRecord>(&*store).list_parts().await?;
        let mut loaded =
            Loaded { files: files.into_iter().map(|(_, _, file)| file).collect(), jobs: Vec::new() };
        for (name, version, job) in jobs::<StoredJob>(&*store).list_parts().await? {
            let id = job.record.request.id;
            if job.record.status.is_final() {
                self.versions.insert(id, version);
                loaded.jobs.push((job, Vec::new()));
                continue;
            }
            let job = self.claim(&name, version, job).await?;
            let count = job.record.events;
            let last = count.saturating_sub(1) / CHUNK_EVENTS;
            let mut tail = Vec::new();
            for chunk in last.saturating_sub(1)..=last {
                let stored = job_events::<Vec<JobEvent>>(&*store).get(&chunk_name(id, chunk)).await?;
                if let Some((version, mut events)) = stored {
                    self.chunks.insert(id, (chunk, version));
                    tail.append(&mut events);
                }
            }
            loaded.jobs.push((job, tail));
        }
        Ok(loaded)
    }

    /// Writes this term into a job that has not ended, so that a former leader writes nothing more. What it wrote until
    /// then counts.
    async fn claim(
        &mut self,
        name: &str,
        mut version: Version,
        mut job: StoredJob,
    ) -> Result<StoredJob, Trouble> {
        let store = self.store.clone();
        let jobs = jobs::<StoredJob>(&*store);
        loop {
            if job.term > self.term {
                return Err(Trouble::Superseded);
            }
            job.term = self.term;
            match jobs.put(name, Expected::At(version), &job).await {
                Ok(version) => {
                    self.versions.insert(job.record.request.id, version);
                    return Ok(job);
                }
                Err(StoreError::Conflict { .. }) => {
                    // It was written in between, or deleted by hand; then there is nothing left to claim.
                    (version, job) = jobs.get(name).await?.ok_or(Trouble::Superseded)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn perform(&mut self, wish: &Effect) -> Result<Option<Event>, Trouble> {
        let store = self.store.clone();
        match wish {
            Effect::SaveFile(file) => {
                files(&*store).put(&file.id.to_string(), Expected::Any, file).await?;
                Ok(Some(Event::Saved(SaveId::File(file.id))))
            }
            Effect::ForgetFile(id) => {
                files::<FileRecord>(&*store).delete(&id.to_string(), Expected::Any).await?;
                Ok(Some(Event::Saved(SaveId::File(*id))))
            }
            Effect::SaveJob { job, chunks } => {
                let id = job.record.request.id;
                for (chunk, events) in chunks {
                    self.save_chunk(id, *chunk, events).await?;
                }
                self.save_job(job).await?;
                Ok(Some(Event::Saved(SaveId::Job(id))))
            }
            Effect::ForgetJob { job, chunks } => {
                jobs::<StoredJob>(&*store).delete(&job.to_string(), Expected::Any).await?;
                for chunk in 0..*chunks {
                    let events = job_events::<Vec<JobEvent>>(&*store);
                    events.delete(&chunk_name(*job, chunk), Expected::Any).await?;
                }
                self.versions.remove(job);
                self.chunks.remove(job);
                Ok(None)
            }
            Effect::ReadEvents { read, job, from, to } => {
                let mut events = Vec::new();
                for chunk in *from..*to {
                    let stored = job_events::<Vec<JobEvent>>(&*store).get(&chunk_name(*job, chunk)).await?;
                    events.extend(stored.into_iter().flat_map(|(_, events)| events));
                }
                Ok(Some(Event::EventsRead { read: *read, events: Some(events) }))
            }
            _ => Ok(None),
        }
    }

    /// Which version of a job's record a write of ours expects.
    fn expected(&self, id: JobId) -> Expected {
        self.versions.get(&id).map_or(Expected::Absent, |version| Expected::At(*version))
    }

    async fn save_chunk(&mut self, id: JobId, chunk: u64, events: &Vec<JobEvent>) -> Result<(), Trouble> {
        let store = self.store.clone();
        let (name, collection) = (chunk_name(id, chunk), job_events::<Vec<JobEvent>>(&*store));
        let expected = match self.chunks.get(&id) {
            Some((known, version)) if *known == chunk => Expected::At(*version),
            _ => Expected::Absent,
        };
        let written = match collection.put(&name, expected, events).await {
            // A write of ours that the store did not confirm, or one of a former leader that did not know yet: whoever owns
            // the record owns the events.
            Err(StoreError::Conflict { .. }) => {
                let owned = jobs::<StoredJob>(&*store).get(&id.to_string()).await?;
                let now = owned.as_ref().map(|(version, _)| *version);
                let ours = owned.as_ref().is_none_or(|(_, job)| job.term == self.term);
                if now != self.versions.get(&id).copied() && !ours {
                    return Err(Trouble::Superseded);
                }
                collection.put(&name, Expected::Any, events).await?
            }
            written => written?,
        };
        self.chunks.insert(id, (chunk, written));
        Ok(())
    }

    async fn save_job(&mut self, job: &StoredJob) -> Result<(), Trouble> {
        let store = self.store.clone();
        let id = job.record.request.id;
        let (name, collection) = (id.to_string(), jobs::<StoredJob>(&*store));
        let written = match collection.put(&name, self.expected(id), job).await {
            Err(StoreError::Conflict { .. }) => match collection.get(&name).await? {
                // Our own write, which the store did not confirm.
                Some((version, stored)) if stored == *job => version,
                _ => return Err(Trouble::Superseded),
            },
            written => written?,
        };
        self.versions.insert(id, written);
        Ok(())
    }
}
