//! Checkpoints, and the finished model: adapters under names (one that has to be better than what is served: `promoting`; a model
//! all of whose weights were trained: `handing_out`).
//!
//! Here jobs meet the adapters that are served: [`Effect::Publish`] and [`Effect::Withdraw`] are for whoever serves them.

use super::events::Effect;
use super::job::{self, Phase};
use super::lifecycle::error;
use super::results::RESULTS_PURPOSE;
use super::{Jobs, names};
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, Checkpoint, FileRecord, JobEventKind, JobStatus, LoadAdapter,
};
use ashlar_protocol::training::ExportedFile;
use ashlar_vocabulary::{AdapterId, JobId};

/// Checkpoints that a job keeps.
const CHECKPOINTS_MAX: usize = 3;
/// Most files of a checkpoint; a PEFT adapter has two.
const CHECKPOINT_FILES_MAX: usize = 64;
/// How often it is tried to have a finished model served.
const ATTEMPTS_MAX: u32 = 10;
/// The pause before the second attempt; it doubles with each.
const RETRY_MS: u64 = 1_000;
/// The longest such pause.
const RETRY_MS_MAX: u64 = 60_000;

/// The pause after so many attempts, at least one.
pub(super) fn retry_ms(attempts: u32) -> u64 {
    (RETRY_MS << attempts.saturating_sub(1).min(16)).min(RETRY_MS_MAX)
}

impl Jobs {
    /// An adapter was made of the committed state: a checkpoint, served under a name of its own, whose files can be read.
    pub(super) fn checkpoint(&mut self, id: JobId, adapter: AdapterId, files: Vec<ExportedFile>) {
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let step = job.record.steps;
        let Some(metrics) = job.record.last else { return };
        let model = names::checkpoint(&job.record.request, step);
        let owner = job.record.request.owner.clone();
        let record = |file: ExportedFile| FileRecord {
            id: names::checkpoint_file(id, step, &file.name),
            name: job::short(file.name),
            purpose: RESULTS_PURPOSE.to_owned(),
            bytes: file.bytes,
            created_at: unix_s,
            blob: file.blob,
            owner: owner.clone(),
        };
        let files: Vec<FileRecord> = files.into_iter().take(CHECKPOINT_FILES_MAX).map(record).collect();
        let validation = job.progress.evaluated.filter(|(measured, ..)| *measured == step);
        job.record.checkpoints.push(Checkpoint {
            number: job.progress.checkpoints,
            created_at: unix_s,
            step,
            adapter,
            files: files.iter().map(|file| file.id).collect(),
            model: model.clone(),
            metrics,
            validation: validation.map(|(_, loss, accuracy)| (loss, accuracy)),
        });
        job.progress.checkpoints += 1;
        job.failures = 0;
        let outdated = job.record.checkpoints.len().saturating_sub(CHECKPOINTS_MAX);
        let outdated: Vec<Checkpoint> = job.record.checkpoints.drain(..outdated).collect();
        job.happened(unix_s, JobEventKind::Checkpoint { step, model: model.clone() });
        for checkpoint in outdated {
            self.effects.push(Effect::Withdraw(checkpoint.model));
            for file in checkpoint.files {
                // One that its owner has deleted is gone already.
                if self.files.contains(file) {
                    self.forget_file(file, None);
                }
            }
        }
        files.into_iter().for_each(|file| self.save_file(file, None));
        self.effects.push(Effect::Publish(LoadAdapter { owner, ..load(model, adapter, id, unix_s) }));
    }

    /// A job is trained: its session is closed and its model is served, if it is good enough, or its files can be downloaded.
    pub(super) fn publish(&mut self, id: JobId) {
        self.close_session(id);
        if self.jobs.get(id).is_some_and(|job| job.record.trained_model.is_some()) {
            return self.hand_out(id);
        }
        if self.jobs.get(id).is_some_and(|job| job.record.request.promote.is_some()) {
            return self.promote(id);
        }
        let now = self.now;
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.phase = Phase::Publishing { asked: false, due: now, attempts: 0 };
        job.record.remaining_s = Some(0);
        job.saving.dirty = true;
        self.ask_to_publish(id);
    }

    pub(super) fn ask_to_publish(&mut self, id: JobId) {
        // Where nobody could load it, asking would only use up attempts.
        if self.replicas.is_empty() {
            return;
        }
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(adapter) = job.record.checkpoints.last().map(|last| last.adapter) else { return };
        let Phase::Publishing { asked, .. } = &mut job.phase else { return };
        *asked = true;
        let (name, owner) = (names::model(&job.record.request), job.record.request.owner.clone());
        self.effects.push(Effect::Publish(LoadAdapter { owner, ..load(name, adapter, id, unix_s) }));
    }

    /// The job whose model is about to be served under this name.
    fn publishing(&self, name: &str) -> Option<JobId> {
        let jobs = self.active.iter().filter_map(|id| self.jobs.get(*id));
        let mut waiting = jobs.filter(|job| matches!(job.phase, Phase::Publishing { .. }));
        waiting.find(|job| names::model(&job.record.request) == name).map(|job| job.record.request.id)
    }

    pub(super) fn published(&mut self, name: &str) {
        let unix_s = self.unix_s;
        let Some(id) = self.publishing(name) else { return };
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.record.fine_tuned_model = Some(name.to_owned());
        job.record.adapter = job.record.checkpoints.last().map(|last| last.adapter);
        job.happened(unix_s, JobEventKind::ModelCreated(name.to_owned()));
        self.effects.push(Effect::Note(format!("job {id} has ended: {name} is served")));
        self.end(id, JobStatus::Succeeded, JobEventKind::Succeeded);
    }

    pub(super) fn not_published(&mut self, name: &str, failure: &AdminFailure) {
        let now = self.now;
        let why = job::short(failure.message.clone());
        let Some(id) = self.publishing(name) else {
            return self.effects.push(Effect::Warn(format!("{name} is not served: {why}")));
        };
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Phase::Publishing { asked, due, attempts } = &mut job.phase else { return };
        *attempts += 1;
        let again = match failure.kind {
            AdminFailureKind::Unavailable | AdminFailureKind::Full | AdminFailureKind::Conflict => true,
            AdminFailureKind::Invalid | AdminFailureKind::NotFound | AdminFailureKind::Internal => false,
        };
        if again && *attempts < ATTEMPTS_MAX {
            *asked = false;
            *due = now.plus(retry_ms(*attempts));
            return;
        }
        let text = format!("the model is trained, but cannot be served: {why}");
        self.fail(id, error("model_not_served", text));
    }
}

/// What is to be served. Repeating it changes nothing but a generation: a new scheduler does not know what was asked for.
fn load(name: String, adapter: AdapterId, job: JobId, created_at: u64) -> LoadAdapter {
    LoadAdapter {
        name,
        adapter,
        root: names::root(job),
        created_at,
        replace: true,
        expected_generation: None,
        hold_back: false,
        owner: None,
    }
}
