//! A model all of whose weights were trained: it is not served, but its files can be downloaded.

use super::results::RESULTS_PURPOSE;
use super::{Jobs, job, names};
use ashlar_protocol::admin::{FileRecord, JobEventKind, JobStatus, TrainedModel};
use ashlar_protocol::training::ExportedFile;
use ashlar_vocabulary::{BlobId, FileId, JobId};

impl Jobs {
    /// A model was made of the committed state.
    pub(super) fn model_exported(&mut self, id: JobId, manifest: BlobId, files: Vec<ExportedFile>) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let step = job.record.steps;
        job.record.trained_model = Some(TrainedModel { step, manifest, files });
        job.failures = 0;
        job.saving.dirty = true;
    }

    /// A job has succeeded: its model's files become result files. Their ids follow from the job's, so that doing it again, under
    /// another scheduler, changes nothing.
    pub(super) fn hand_out(&mut self, id: JobId) {
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(model) = job.record.trained_model.clone() else { return };
        let owner = job.record.request.owner.clone();
        let record = |ExportedFile { name, blob, bytes }| FileRecord {
            id: names::checkpoint_file(id, model.step, &name),
            name: job::short(name),
            purpose: RESULTS_PURPOSE.to_owned(),
            bytes,
            created_at: unix_s,
            blob,
            owner: owner.clone(),
        };
        let records: Vec<FileRecord> = model.files.into_iter().map(record).collect();
        let named = records.iter().map(|file| (file.id, file.name.clone())).collect();
        job.happened(unix_s, JobEventKind::ModelStored(named));
        let ids: Vec<FileId> = records.iter().map(|file| file.id).collect();
        records.into_iter().for_each(|file| self.save_file(file, None));
        self.end(id, JobStatus::Succeeded, JobEventKind::Succeeded);
        if let Some(job) = self.jobs.get_mut(id) {
            job.record.result_files.extend(ids);
        }
    }
}
