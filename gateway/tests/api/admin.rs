//! Files and jobs of a scheduler, in memory.

use ashlar_protocol::access::{KeyCall, KeyRecord};
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, AdminReply, AdminRequest, Checkpoint, Comparison, FileRecord, JobAction,
    JobError, JobEvent, JobEventKind, JobRecord, JobRequest, JobStatus, Page, PreparedJob,
};
use ashlar_protocol::serving::PrepareJob;
use ashlar_vocabulary::JobId;

/// What a scheduler keeps, newest last.
#[derive(Debug, Default)]
pub(crate) struct Admin {
    pub(crate) files: Vec<FileRecord>,
    pub(crate) jobs: Vec<JobRecord>,
    pub(crate) events: Vec<(JobId, JobEvent)>,
    /// Answers to what was to be validated.
    pub(crate) prepared: Vec<(JobId, Result<PreparedJob, JobError>)>,
    /// Answers to what was to be compared.
    pub(crate) compared: Vec<(JobId, Result<Comparison, String>)>,
    /// Keys that are let in.
    pub(crate) keys: Vec<KeyRecord>,
    /// The next call is refused so.
    pub(crate) refuse: Option<AdminFailure>,
}

impl Admin {
    pub(crate) fn call(&mut self, request: AdminRequest) -> AdminReply {
        if let Some(failure) = self.refuse.take() {
            return AdminReply::Refused(failure);
        }
        match request {
            AdminRequest::Key(KeyCall::Create(record)) => {
                self.keys.push((*record).clone());
                AdminReply::Key(record)
            }
            AdminRequest::Key(KeyCall::Revoke(id)) => {
                let at = self.keys.iter().position(|key| key.id == id);
                at.map_or_else(not_found, |at| AdminReply::Key(Box::new(self.keys.remove(at))))
            }
            AdminRequest::PutFile(file) => {
                self.files.push(file);
                AdminReply::Done
            }
            AdminRequest::GetFile(id) => self
                .files
                .iter()
                .find(|file| file.id == id)
                .map_or_else(not_found, |file| AdminReply::File(file.clone())),
            AdminRequest::ListFiles(page) => {
                let (files, more) = paged(&self.files, page, |file| file.id);
                AdminReply::Files(files, more)
            }
            AdminRequest::DeleteFile(id) => {
                self.files.retain(|file| file.id != id);
                AdminReply::Done
            }
            AdminRequest::CreateJob(request) => {
                let job = new_job(*request);
                self.tell(job.request.id, JobEventKind::Created);
                self.tell(job.request.id, JobEventKind::Validating);
                self.jobs.push(job.clone());
                AdminReply::Job(Box::new(job))
            }
            AdminRequest::GetJob(id) => match self.job(id) {
                Some(job) => AdminReply::Job(Box::new(job.clone())),
                None => not_found(),
            },
            AdminRequest::ListJobs(page) => {
                let (jobs, more) = paged(&self.jobs, page, |job| job.request.id);
                AdminReply::Jobs(jobs, more)
            }
            AdminRequest::ControlJob(id, action) => {
                let Some(job) = self.job(id) else { return not_found() };
                if job.status.is_final() {
                    let message = "the job has ended".to_owned();
                    return AdminReply::Refused(AdminFailure { kind: AdminFailureKind::Conflict, message });
                }
                (job.status, job.finished_at) = match action {
                    JobAction::Cancel => (JobStatus::Cancelled, Some(9)),
                    JobAction::Pause => (JobStatus::Paused, None),
                    JobAction::Resume => (JobStatus::Running, None),
                };
                AdminReply::Job(Box::new(job.clone()))
            }
            AdminRequest::ListEvents(id, page) => {
                let own: Vec<JobEvent> = self
                    .events
                    .iter()
                    .filter(|(job, _)| *job == id)
                    .map(|(_, event)| event.clone())
                    .collect();
                let (events, more) = paged(&own, page, |event| event.number);
                AdminReply::Events(events, more)
            }
            AdminRequest::ListCheckpoints(id, page) => {
                let Some(job) = self.job(id) else { return not_found() };
                let (checkpoints, more): (Vec<Checkpoint>, bool) =
                    paged(&job.checkpoints, page, |one| one.number);
                AdminReply::Checkpoints(checkpoints, more)
            }
            _ => AdminReply::Refused(AdminFailure { kind: AdminFailureKind::Invalid, message: "no".into() }),
        }
    }

    pub(crate) fn job(&mut self, id: JobId) -> Option<&mut JobRecord> {
        self.jobs.iter_mut().find(|job| job.request.id == id)
    }

    pub(crate) fn tell(&mut self, id: JobId, what: JobEventKind) {
        let number = self.events.iter().filter(|(job, _)| *job == id).count() as u64;
        self.events.push((id, JobEvent { number, created_at: 100 + number, what }));
    }

    /// What a gateway is asked to validate.
    pub(crate) fn prepare(&self, id: JobId) -> PrepareJob {
        let request = self.jobs.iter().find(|job| job.request.id == id).unwrap().request.clone();
        let file = |id| self.files.iter().find(|file| file.id == id).unwrap().clone();
        PrepareJob {
            training_file: file(request.training_file),
            validation_file: request.validation_file.map(file),
            evaluation_file: request.promote.map(|promote| file(promote.file)),
            request,
        }
    }

    pub(crate) fn prepared(&mut self, id: JobId, outcome: Result<PreparedJob, JobError>) {
        self.prepared.push((id, outcome.clone()));
        let Some(job) = self.job(id) else { return };
        match outcome {
            Ok(prepared) => {
                job.status = JobStatus::Queued;
                let data = prepared.data.clone();
                (job.settings, job.data) = (Some(prepared.settings), Some(prepared.data));
                self.tell(id, JobEventKind::Queued(data));
            }
            Err(error) => {
                (job.status, job.error, job.finished_at) =
                    (JobStatus::Failed, Some(error.clone()), Some(200));
                self.tell(id, JobEventKind::Failed(error));
            }
        }
    }
}

fn new_job(request: JobRequest) -> JobRecord {
    JobRecord {
        request,
        status: JobStatus::Validating,
        settings: None,
        data: None,
        steps: 0,
        shards: Vec::new(),
        steps_since_shards: 0,
        last: None,
        trained_tokens: 0,
        trained_ms: 0,
        remaining_s: None,
        fine_tuned_model: None,
        adapter: None,
        evaluation: None,
        candidate: None,
        trained_model: None,
        result_files: Vec::new(),
        error: None,
        finished_at: None,
        events: 0,
        checkpoints: Vec::new(),
    }
}

fn not_found() -> AdminReply {
    AdminReply::Refused(AdminFailure { kind: AdminFailureKind::NotFound, message: "there is none".into() })
}

/// Newest first.
fn paged<T: Clone, Id: PartialEq>(all: &[T], page: Page<Id>, id: impl Fn(&T) -> Id) -> (Vec<T>, bool) {
    let newest_first: Vec<&T> = all.iter().rev().collect();
    let start = match page.after {
        None => 0,
        Some(after) => {
            newest_first.iter().position(|one| id(one) == after).map_or(newest_first.len(), |at| at + 1)
        }
    };
    let rest = &newest_first[start..];
    let taken = rest.iter().take(page.limit as usize).map(|one| (*one).clone()).collect();
    (taken, rest.len() > page.limit as usize)
}
