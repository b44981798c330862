//! What outlives every process: records under versions, and blobs under their names. What is written and deleted is checked
//! on the way.

use crate::process::Process;
use crate::random::Random;
use crate::weights::Content;
use ashlar_protocol::admin::{FileRecord, JobEvent, JobEventKind, JobStatus};
use ashlar_scheduler::adapters::AdapterRecord;
use ashlar_scheduler::jobs::{CHUNK_EVENTS, Loaded, References, StoredJob};
use ashlar_vocabulary::{BlobId, FileId, JobId, LeaseTerm};
use std::collections::{BTreeMap, BTreeSet};

/// What somebody wants of the store or of the blobs.
#[derive(Debug, Clone)]
pub(crate) enum Wish {
    /// A blob.
    Get(BlobId),
    /// Have this stored.
    Put(Content),
    /// Have a blob deleted.
    Delete(BlobId),
    /// All records, and this term in every job that has not ended.
    Claim(LeaseTerm),
    SaveFile(FileRecord),
    ForgetFile(FileId),
    SaveChunk {
        term: LeaseTerm,
        job: JobId,
        chunk: u64,
        events: Vec<JobEvent>,
    },
    SaveJob(Box<StoredJob>),
    /// Chunks of events.
    ReadEvents {
        job: JobId,
        from: u64,
        to: u64,
    },
    /// What is served, with versions.
    ReadAdapters,
    /// Have a name's record written where this version is there.
    PutAdapter {
        name: String,
        expected: Option<u64>,
        record: Option<AdapterRecord>,
    },
}

/// What came of a wish.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    Content(Content),
    Stored(BlobId),
    Done,
    Loaded(Box<Loaded>),
    Events(Vec<JobEvent>),
    Adapters(Vec<(String, u64, AdapterRecord)>),
    /// A name's record is written, under this version.
    Written(Option<u64>),
}

/// Why nothing came of it.
#[derive(Debug, Clone)]
pub(crate) enum Refusal {
    /// No answer in time. It may have been done all the same.
    Unavailable,
    NotFound,
    /// A later term has written.
    Superseded,
    /// Another version is there, with this record.
    Conflict(Option<(u64, AdapterRecord)>),
}

/// For a while the store answers late, or not at all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outage {
    pub(crate) until_us: u64,
    /// Whom it concerns; `None` is everybody.
    pub(crate) whom: Option<Process>,
    pub(crate) what: Half,
    /// Late instead of never.
    pub(crate) slow: bool,
}

/// The two stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    Records,
    Blobs,
    Both,
}

/// When a wish is done and answered.
pub(crate) struct Reach {
    /// When it is done, if it is.
    pub(crate) done_after_us: Option<u64>,
    /// Whether its answer comes.
    pub(crate) answered: bool,
}

/// How long a call without an answer waits.
pub(crate) const PATIENCE_US: u64 = 400_000;

/// The store and the blobs.
#[derive(Debug, Default)]
pub(crate) struct Durable {
    pub(crate) jobs: BTreeMap<JobId, StoredJob>,
    pub(crate) files: BTreeMap<FileId, FileRecord>,
    events: BTreeMap<(JobId, u64), Vec<JobEvent>>,
    adapters: BTreeMap<String, (u64, AdapterRecord)>,
    versions: u64,
    pub(crate) blobs: BTreeMap<BlobId, Content>,
    /// Every shard that a record has ever named.
    recorded: BTreeSet<BlobId>,
    outages: Vec<Outage>,
    /// Whether there has been one.
    pub(crate) any_outage: bool,
    /// Blobs deleted.
    pub(crate) deleted: u64,
}

impl Wish {
    fn half(&self) -> Half {
        match self {
            Wish::Get(_) | Wish::Put(_) | Wish::Delete(_) => Half::Blobs,
            _ => Half::Records,
        }
    }
}

impl Durable {
    pub(crate) fn begin_outage(&mut self, outage: Outage) {
        self.any_outage = true;
        self.outages.push(outage);
    }

    /// What becomes of a call of `process`.
    pub(crate) fn reach(&mut self, now_us: u64, process: Process, wish: &Wish, random: &mut Random) -> Reach {
        self.outages.retain(|outage| outage.until_us > now_us);
        let concerned = |outage: &&Outage| {
            outage.whom.is_none_or(|whom| whom == process)
                && (outage.what == Half::Both || outage.what == wish.half())
        };
        let usual = random.between(300, 4_000);
        let mut reach = Reach { done_after_us: Some(usual), answered: true };
        for outage in self.outages.iter().filter(concerned) {
            if outage.slow {
                reach.done_after_us = Some(random.between(50_000, 900_000));
            } else {
                // The answer may be what is lost.
                let done = random.chance(300_000);
                return Reach { done_after_us: done.then_some(usual), answered: false };
            }
        }
        reach
    }

    /// Does what is wanted.
    ///
    /// # Errors
    /// What must never be asked for.
    pub(crate) fn perform(&mut self, wish: Wish) -> Result<Result<Answer, Refusal>, String> {
        let done = match wish {
            Wish::Get(blob) => self.blobs.get(&blob).cloned().map(Answer::Content).ok_or(Refusal::NotFound),
            Wish::Put(content) => {
                let id = content.id();
                self.blobs.insert(id, content);
                Ok(Answer::Stored(id))
            }
            Wish::Delete(blob) => {
                self.delete(blob)?;
                Ok(Answer::Done)
            }
            Wish::Claim(term) => {
                Ok(self.claim(term).map_or(Answer::Done, |all| Answer::Loaded(Box::new(all))))
            }
            Wish::SaveFile(file) => {
                self.files.insert(file.id, file);
                Ok(Answer::Done)
            }
            Wish::ForgetFile(id) => {
                self.files.remove(&id);
                Ok(Answer::Done)
            }
            Wish::SaveChunk { term, job, chunk, events } => self.save_chunk(term, (job, chunk), events)?,
            Wish::SaveJob(job) => self.save_job(*job)?,
            Wish::ReadEvents { job, from, to } => {
                let chunks = (from..to).filter_map(|chunk| self.events.get(&(job, chunk)));
                Ok(Answer::Events(chunks.flatten().cloned().collect()))
            }
            Wish::ReadAdapters => {
                let adapters = self.adapters.iter();
                let listed =
                    adapters.map(|(name, (version, record))| (name.clone(), *version, record.clone()));
                Ok(Answer::Adapters(listed.collect()))
            }
            Wish::PutAdapter { name, expected, record } => self.put_adapter(name, expected, record),
        };
        Ok(done)
    }

    /// A blob that a record of a job in progress needs is never deleted.
    fn delete(&mut self, blob: BlobId) -> Result<(), String> {
        if let Some(job) = self.unfinished().find(|job| job.record.shards.contains(&blob)) {
            let (id, steps) = (job.record.request.id, job.record.steps);
            return Err(format!("a shard is deleted that the record of job {id} at step {steps} needs"));
        }
        if !matches!(self.blobs.get(&blob), Some(Content::Shard { .. }) | None) {
            return Err("something else than a shard is deleted".to_owned());
        }
        self.deleted += u64::from(self.blobs.remove(&blob).is_some());
        Ok(())
    }

    fn unfinished(&self) -> impl Iterator<Item = &StoredJob> {
        self.jobs.values().filter(|job| !job.record.status.is_final())
    }

    /// `None` if a later term has claimed them.
    fn claim(&mut self, term: LeaseTerm) -> Option<Loaded> {
        if self.unfinished().any(|job| job.term > term) {
            return None;
        }
        for job in self.jobs.values_mut().filter(|job| !job.record.status.is_final()) {
            job.term = term;
        }
        let tail = |job: &StoredJob| {
            let (id, last) = (job.record.request.id, job.record.events.saturating_sub(1) / CHUNK_EVENTS);
            let chunks = (last.saturating_sub(1)..=last).filter_map(|chunk| self.events.get(&(id, chunk)));
            match job.record.status.is_final() {
                true => Vec::new(),
                false => chunks.flatten().cloned().collect(),
            }
        };
        let jobs = self.jobs.values().map(|job| (job.clone(), tail(job))).collect();
        Some(Loaded { files: self.files.values().cloned().collect(), jobs })
    }

    fn save_chunk(
        &mut self,
        term: LeaseTerm,
        (job, chunk): (JobId, u64),
        events: Vec<JobEvent>,
    ) -> Result<Result<Answer, Refusal>, String> {
        if self.jobs.get(&job).is_some_and(|stored| stored.term > term) {
            return Ok(Err(Refusal::Superseded));
        }
        let numbers = events.iter().map(|event| event.number);
        if !numbers.eq((chunk * CHUNK_EVENTS..).take(events.len())) {
            return Err(format!("chunk {chunk} of the events of job {job} has a gap"));
        }
        self.events.insert((job, chunk), events);
        Ok(Ok(Answer::Done))
    }

    fn save_job(&mut self, job: StoredJob) -> Result<Result<Answer, Refusal>, String> {
        let record = &job.record;
        let id = record.request.id;
        if let Some(former) = self.jobs.get(&id) {
            if former.term > job.term {
                return Ok(Err(Refusal::Superseded));
            }
            let is_full = record.settings.as_ref().is_some_and(|settings| settings.full.is_some());
            if !is_full && former.record.steps > record.steps {
                return Err(format!("the record of job {id} goes back to step {}", record.steps));
            }
            if former.record.status.is_final() && former.record.status != record.status {
                return Err(format!("job {id} was {:?} and is {:?}", former.record.status, record.status));
            }
            if former.record.steps + 1 < record.steps && former.record.settings.is_some() {
                return Err(format!("two steps of job {id} were committed before one was durable"));
            }
        }
        if !record.status.is_final()
            && let Some(lost) = record.shards.iter().find(|shard| !self.blobs.contains_key(shard))
        {
            return Err(format!(
                "the record of job {id} at step {} names {lost}, which is gone",
                record.steps
            ));
        }
        self.recorded.extend(&record.shards);
        self.jobs.insert(id, job);
        Ok(Ok(Answer::Done))
    }

    fn put_adapter(
        &mut self,
        name: String,
        expected: Option<u64>,
        record: Option<AdapterRecord>,
    ) -> Result<Answer, Refusal> {
        let found = self.adapters.get(&name);
        if found.map(|(version, _)| *version) != expected {
            return Err(Refusal::Conflict(found.cloned()));
        }
        match record {
            Some(record) => {
                self.versions += 1;
                self.adapters.insert(name, (self.versions, record));
                Ok(Answer::Written(Some(self.versions)))
            }
            None => {
                self.adapters.remove(&name);
                Ok(Answer::Written(None))
            }
        }
    }

    /// A sweep spares what durable records need.
    ///
    /// # Errors
    /// What it would take.
    pub(crate) fn check_references(&self, references: &References) -> Result<(), String> {
        let lacking = |job: &StoredJob| {
            job.record.shards.iter().find(|shard| !references.blobs.contains(shard)).copied()
        };
        match self.unfinished().find_map(lacking) {
            Some(shard) => Err(format!("a sweep would take {shard}, which a record needs")),
            None => Ok(()),
        }
    }

    /// Names that are served, as they are recorded.
    pub(crate) fn served(&self) -> impl Iterator<Item = (&String, &AdapterRecord)> {
        self.adapters.iter().map(|(name, (_, record))| (name, record))
    }

    /// Once every job has ended: no shard that a record ever named is left; how many others are, for the sweep.
    ///
    /// # Errors
    /// What is left.
    pub(crate) fn verify_blobs(&self) -> Result<u64, String> {
        let is_shard = |content: &Content| matches!(content, Content::Shard { .. });
        let shards = self.blobs.iter().filter(|(_, content)| is_shard(content));
        let (left, orphans): (Vec<_>, Vec<_>) = shards.partition(|(id, _)| self.recorded.contains(id));
        match left.first() {
            Some((_, Content::Shard { job, steps, .. })) => {
                Err(format!("{} superseded shards are left, one of job {job} at step {steps}", left.len()))
            }
            _ => Ok(orphans.len() as u64),
        }
    }

    /// A job's stored events: numbered without a gap, in the order of time, every step told once and in turn, its end last.
    ///
    /// # Errors
    /// What is not so.
    pub(crate) fn verify_events(&self, stored: &StoredJob) -> Result<(), String> {
        let (record, id) = (&stored.record, stored.record.request.id);
        let events = self.events.range((id, 0)..=(id, u64::MAX)).flat_map(|(_, events)| events);
        let events: Vec<&JobEvent> = events.take_while(|event| event.number < record.events).collect();
        if !events.iter().map(|event| event.number).eq(0..record.events) {
            return Err(format!("job {id} has {} events, not {}", events.len(), record.events));
        }
        if !events.is_sorted_by_key(|event| event.created_at) {
            return Err(format!("the events of job {id} go back in time"));
        }
        let repeats = record.settings.as_ref().is_some_and(|settings| settings.full.is_some());
        let mut told = 0;
        for event in &events {
            let JobEventKind::Step { step, .. } = event.what else { continue };
            if step != told + 1 && !(repeats && step <= told) {
                return Err(format!("job {id} tells of step {step} after step {told}"));
            }
            told = step;
        }
        let ends = |event: &&JobEvent| {
            let what = &event.what;
            matches!(what, JobEventKind::Succeeded | JobEventKind::Cancelled | JobEventKind::Failed(_))
        };
        let last = events.last().is_some_and(ends);
        // One that is cancelled after it fell back to its last durable state has told of steps that it has no longer, and of
        // none that could not have been lost with it.
        let full = record.settings.as_ref().and_then(|settings| settings.full);
        let fell_back = record.status == JobStatus::Cancelled
            && told > record.steps
            && full.is_some_and(|full| {
                record.steps >= told.saturating_sub(1) / full.durable_every * full.durable_every
            });
        if told != record.steps && !fell_back
            || !last
            || events.iter().filter(|event| ends(event)).count() != 1
        {
            return Err(format!("the events of job {id} end at step {told} of {}, or not", record.steps));
        }
        Ok(())
    }
}
