//! What is durable: records and events go to the store beside the training, one write per job at a time.

use super::admin::refused;
use super::events::{Effect, Loaded};
use super::job::{Call, Job, Snapshot};
use super::session::Session;
use super::{Jobs, names};
use ashlar_protocol::admin::{AdminFailureKind, AdminReply, FileRecord};
use ashlar_vocabulary::{BlobId, FileId, JobId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Time between two sweeps.
const SWEEP_EVERY_MS: u64 = 24 * 3600 * 1000;
/// Most blobs of former states that a record names; a session's ranks leave one each per step.
const SUPERSEDED_MAX: usize = 1024;
/// Most writes of files' records that are not yet durable.
const FILE_SAVES_MAX: usize = 256;

/// Writes of files' records that are not yet durable, with who waits for them.
#[derive(Debug, Default, Clone)]
pub(super) struct FileSaves {
    waiting: BTreeMap<FileId, VecDeque<Option<(Call, AdminReply)>>>,
    count: usize,
}

impl FileSaves {
    pub(super) fn is_full(&self) -> bool {
        self.count >= FILE_SAVES_MAX
    }

    pub(super) fn push(&mut self, file: FileId, then: Option<(Call, AdminReply)>) {
        self.waiting.entry(file).or_default().push_back(then);
        self.count += 1;
    }

    fn pop(&mut self, file: FileId) -> Option<(Call, AdminReply)> {
        let saves = self.waiting.get_mut(&file)?;
        let first = saves.pop_front();
        if saves.is_empty() {
            self.waiting.remove(&file);
        }
        self.count -= usize::from(first.is_some());
        first.flatten()
    }

    /// Those who wait, who wait no longer.
    fn take_calls(&mut self) -> Vec<Call> {
        let saves = self.waiting.values_mut().flatten();
        saves.filter_map(|save| save.take().map(|(call, _)| call)).collect()
    }
}

impl Jobs {
    /// Takes over what is stored.
    pub(super) fn load(&mut self, loaded: Loaded) {
        self.loaded = true;
        self.sweep_due = self.now;
        for file in loaded.files {
            self.files.insert(file.id, file);
        }
        for (stored, tail) in loaded.jobs {
            let id = stored.record.request.id;
            self.jobs.insert(id, Job::stored(stored, tail, 0, self.now));
        }
        let oldest_first: Vec<JobId> = self.jobs.oldest_first().map(|(id, _)| id).collect();
        for id in &oldest_first {
            self.take_up(*id);
        }
        // A former scheduler may not have come to it.
        for id in oldest_first {
            self.delete_superseded(id);
        }
    }

    /// Has a file's record saved; `then` is answered once it is.
    pub(super) fn save_file(&mut self, file: FileRecord, then: Option<(Call, AdminReply)>) {
        self.file_saves.push(file.id, then);
        self.files.insert(file.id, file.clone());
        self.effects.push(Effect::SaveFile(file));
    }

    pub(super) fn forget_file(&mut self, file: FileId, then: Option<(Call, AdminReply)>) {
        self.file_saves.push(file, then);
        self.files.remove(file);
        self.effects.push(Effect::ForgetFile(file));
    }

    pub(super) fn file_saved(&mut self, file: FileId) {
        if let Some((call, reply)) = self.file_saves.pop(file) {
            self.reply(call, reply);
        }
    }

    /// Answers a call with a job as soon as that is durable.
    pub(super) fn reply_when_durable(&mut self, id: JobId, call: Call) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let saving = &mut job.saving;
        match &mut saving.in_flight {
            _ if saving.dirty => saving.calls.push(call),
            Some(snapshot) => snapshot.calls.push(call),
            None => {
                let reply = AdminReply::Job(Box::new(job.record.clone()));
                self.reply(call, reply);
            }
        }
    }

    /// Gives the store what has changed, of each job one write at a time.
    pub(super) fn save_what_has_changed(&mut self) {
        let ids: Vec<JobId> = self.active.iter().copied().collect();
        for id in ids {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            if !job.saving.dirty || job.saving.in_flight.is_some() {
                continue;
            }
            job.saving.dirty = false;
            job.bound_superseded();
            job.saving.in_flight = Some(Snapshot {
                steps: job.record.steps,
                events: job.log.count(),
                calls: std::mem::take(&mut job.saving.calls),
            });
            let stored = Box::new(job.to_store(self.config.term));
            self.effects.push(Effect::SaveJob { job: stored, chunks: job.log.unsaved() });
        }
    }

    pub(super) fn job_saved(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(snapshot) = job.saving.in_flight.take() else { return };
        job.saving.steps = snapshot.steps;
        job.log.saved(snapshot.events, job.ended());
        let results =
            job.ended() && job.progress.results_due && !job.saving.results_asked && !job.saving.dirty;
        if results {
            job.saving.results_asked = true;
            self.effects.push(Effect::WriteResults { job: id, chunks: job.log.chunks() });
        }
        let reply = AdminReply::Job(Box::new(job.record.clone()));
        for call in snapshot.calls {
            self.reply(call, reply.clone());
        }
        self.delete_superseded(id);
        self.forget_if_done(id);
        // A step may have waited for this.
        self.commit(id);
    }

    /// Nothing more is to be done for a job that has ended once that is durable and nothing of it is left behind.
    fn forget_if_done(&mut self, id: JobId) {
        let done = |job: &Job| {
            let written = !job.saving.dirty && job.saving.in_flight.is_none() && !job.progress.results_due;
            job.ended() && written && job.progress.superseded.is_empty()
        };
        if self.jobs.get(id).is_some_and(done) {
            self.active.remove(&id);
        }
    }

    /// Has blobs of former states deleted that the durable record does not need, unless somebody else may refer to them: two jobs
    /// with equal settings may have equal states.
    pub(super) fn delete_superseded(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(id) else { return };
        let unwanted: Vec<BlobId> = job.unwanted().collect();
        if unwanted.is_empty() {
            return;
        }
        let settings = &job.record.settings;
        let others = self.active.iter().filter_map(|id| self.jobs.get(*id));
        let others: Vec<&Job> = others.filter(|other| other.record.request.id != id).collect();
        // The sweep finds them when both have ended.
        let twin = others.iter().any(|other| !other.ended() && other.record.settings == *settings);
        let needed = |blob: &BlobId| {
            twin || job.needs(*blob)
                || others.iter().any(|other| other.blobs().any(|held| held == *blob))
                // Somebody may have uploaded the same bytes.
                || self.files.values().any(|file| file.blob == *blob)
        };
        let (kept, gone): (BTreeSet<BlobId>, BTreeSet<BlobId>) = unwanted.into_iter().partition(needed);
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.progress.superseded.retain(|(_, blob)| !kept.contains(blob));
        if !kept.is_empty() && job.ended() {
            job.saving.dirty = true;
        }
        let gone: Vec<BlobId> = gone.into_iter().filter(|blob| job.saving.deleting.insert(*blob)).collect();
        if !gone.is_empty() {
            self.effects.push(Effect::DeleteBlobs { job: id, blobs: gone });
        }
    }

    /// Blobs are gone: the next record does not name them.
    pub(super) fn blobs_deleted(&mut self, id: JobId, blobs: &[BlobId]) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        for blob in blobs {
            job.saving.deleting.remove(blob);
        }
        job.progress.superseded.retain(|(_, blob)| !blobs.contains(blob));
        // There will be another record of one that goes on.
        job.saving.dirty |= job.ended();
    }

    pub(super) fn store_down(&mut self, reason: String) {
        self.store_down = Some(reason);
        let mut calls = self.file_saves.take_calls();
        for id in &self.active {
            let Some(job) = self.jobs.get_mut(*id) else { continue };
            calls.append(&mut job.saving.calls);
            if let Some(snapshot) = &mut job.saving.in_flight {
                calls.append(&mut snapshot.calls);
            }
        }
        for call in calls {
            let text =
                "the store does not answer, so the call may take effect later: look again, or repeat it";
            self.reply(call, refused(AdminFailureKind::Unavailable, text));
        }
    }

    pub(super) fn results_written(&mut self, id: JobId, outcome: Result<(BlobId, u64), String>) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.progress.results_due = false;
        job.saving.dirty = true;
        match outcome {
            Ok((blob, bytes)) => {
                let file = FileRecord {
                    id: names::results_file(id),
                    name: super::results::RESULTS_NAME.to_owned(),
                    purpose: super::results::RESULTS_PURPOSE.to_owned(),
                    bytes,
                    created_at: job.record.finished_at.unwrap_or(self.unix_s),
                    blob,
                    owner: job.record.request.owner.clone(),
                };
                self.save_file(file, None);
            }
            Err(why) => {
                job.record.result_files.retain(|file| *file != names::results_file(id));
                self.effects
                    .push(Effect::Warn(format!("job {id}: its table of steps cannot be written: {why}")));
            }
        }
    }

    /// Once a day blobs that nothing refers to are looked for.
    pub(super) fn sweep_if_due(&mut self) {
        if self.loaded && self.config.blobs && self.sweep_due <= self.now {
            self.sweep_due = self.now.plus(SWEEP_EVERY_MS);
            let references = Box::new(self.references());
            self.effects.push(Effect::Sweep(references));
        }
    }
}

impl Job {
    /// Blobs of former states that the durable record does not need: it has more steps, or the job has ended.
    fn unwanted(&self) -> impl Iterator<Item = BlobId> {
        let ended = self.ended() && !self.saving.dirty && self.saving.in_flight.is_none();
        let durable = self.saving.steps;
        let superseded = self.progress.superseded.iter();
        superseded.filter(move |(steps, _)| ended || *steps < durable).map(|(_, blob)| *blob)
    }

    /// Whether its present state, or the one that is about to be committed, has this blob.
    fn needs(&self, blob: BlobId) -> bool {
        let held = self.held.iter().flat_map(|held| &held.shards);
        let prepared = self.session().into_iter().flat_map(Session::prepared);
        self.record.shards.iter().chain(held).copied().chain(prepared).any(|needed| needed == blob)
    }

    /// No more are remembered than a record has room for; older ones are left to the sweep.
    pub(super) fn bound_superseded(&mut self) {
        let over = self.progress.superseded.len().saturating_sub(SUPERSEDED_MAX);
        self.progress.superseded.drain(..over);
    }

    /// Blobs that it needs to go on, or that a commit of its present step would make it need.
    pub(super) fn blobs(&self) -> impl Iterator<Item = BlobId> {
        use ashlar_protocol::training::ValidationData;
        let settings = self.record.settings.iter();
        let data = settings.flat_map(|settings| {
            let validation = match settings.validation {
                ValidationData::File(blob) => Some(blob),
                ValidationData::None | ValidationData::Split { .. } => None,
            };
            [Some(settings.dataset), validation].into_iter().flatten()
        });
        let data = data.chain(self.record.evaluation);
        // What is superseded is referred to by the durable record until a later one is.
        let superseded = self.progress.superseded.iter().map(|(_, blob)| *blob);
        let prepared = self.session().into_iter().flat_map(|session| session.prepared());
        let held = self.held.iter().flat_map(|held| held.shards.iter().copied());
        data.chain(self.record.shards.iter().copied()).chain(superseded).chain(prepared).chain(held)
    }
}
