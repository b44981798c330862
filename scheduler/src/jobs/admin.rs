//! Calls of gateways: files, jobs, lists.

use super::events::{CHUNK_EVENTS, Effect};
use super::job::{Call, Job, Phase};
use super::{FILES_MAX, JOBS_MAX, JOBS_UNFINISHED_MAX, Jobs};
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, AdminReply, AdminRequest, FileRecord, JobAction, JobEvent, JobEventKind,
    JobRequest, JobStatus, Page,
};
use ashlar_vocabulary::{FileId, JobId, Tenant};

/// Most jobs of one answer.
const JOBS_PAGE_MAX: u32 = 100;
/// Most events or checkpoints of one answer.
const EVENTS_PAGE_MAX: u32 = 1000;
/// Most lists of events that wait for the store.
const READS_MAX: usize = 256;
/// Longest texts of a request together, in bytes: a record must fit into a value of the store.
const REQUEST_BYTES_MAX: usize = 128 << 10;
/// Longest name and purpose of a file together, in bytes.
const FILE_TEXT_BYTES_MAX: usize = 2048;

/// A list of events that waits for the store.
#[derive(Debug, Clone)]
pub(super) struct Read {
    call: Call,
    /// What came from memory: newer than what is read.
    newer: Vec<JobEvent>,
    /// Events before this one are wanted.
    before: u64,
    limit: usize,
}

/// A refusal.
pub(super) fn refused(kind: AdminFailureKind, message: impl Into<String>) -> AdminReply {
    AdminReply::Refused(AdminFailure { kind, message: message.into() })
}

impl Jobs {
    pub(super) fn reply(&mut self, (gateway, call): Call, reply: AdminReply) {
        self.effects.push(Effect::Reply { gateway, call, reply: Box::new(reply) });
    }

    fn refuse(&mut self, call: Call, kind: AdminFailureKind, message: impl Into<String>) {
        self.reply(call, refused(kind, message));
    }

    pub(super) fn admin(&mut self, call: Call, tenant: Option<&Tenant>, request: AdminRequest) {
        use AdminRequest as R;
        if !self.loaded {
            let why = self.store_down.as_deref().unwrap_or("it is being read");
            let text = format!("files and jobs are not known yet ({why}): try again shortly");
            return self.refuse(call, AdminFailureKind::Unavailable, text);
        }
        let changes = match &request {
            R::PutFile(_) | R::DeleteFile(_) | R::CreateJob(_) | R::ControlJob(..) => true,
            R::GetFile(_) | R::ListFiles(_) | R::GetJob(_) | R::ListJobs(_) => false,
            R::ListEvents(..) | R::ListCheckpoints(..) => false,
            // Not for this core.
            R::Key(_)
            | R::LoadAdapter(_)
            | R::UnloadAdapter { .. }
            | R::RollBackAdapter { .. }
            | R::Response(_)
            | R::DeployModel(_)
            | R::ScaleModel(_)
            | R::RemoveModel { .. }
            | R::PlanWithout(_)
            | R::Replan { .. }
            | R::DrainNode(_) => {
                return;
            }
        };
        if let (true, Some(reason)) = (changes, &self.store_down) {
            let text = format!("the store does not answer ({reason}): try again when it is back");
            return self.refuse(call, AdminFailureKind::Unavailable, text);
        }
        // Of what belongs to others nothing is said, not even that it is there.
        let sees = |owner: &Option<Tenant>| tenant.is_none() || owner.as_ref() == tenant;
        let named = match &request {
            R::GetFile(id) | R::DeleteFile(id) => vec![*id],
            R::CreateJob(request) => request.files().collect(),
            _ => Vec::new(),
        };
        if let Some(foreign) =
            named.into_iter().find(|id| self.files.get(*id).is_some_and(|file| !sees(&file.owner)))
        {
            return self.no_such_file(call, foreign);
        }
        if let R::GetJob(id) | R::ControlJob(id, _) | R::ListEvents(id, _) | R::ListCheckpoints(id, _) =
            &request
            && self.jobs.get(*id).is_some_and(|job| !sees(&job.record.request.owner))
        {
            return self.no_such_job(call, *id);
        }
        match request {
            R::PutFile(file) => self.put_file(call, file),
            R::GetFile(id) => match self.files.get(id).cloned() {
                Some(file) => self.reply(call, AdminReply::File(file)),
                None => self.no_such_file(call, id),
            },
            R::ListFiles(page) => {
                let listed = self.files.page(page.after, page.limit as usize, |file| sees(&file.owner));
                let listed = listed.map(|(files, more)| (files.into_iter().cloned().collect(), more));
                match listed {
                    Some((files, more)) => self.reply(call, AdminReply::Files(files, more)),
                    None => self.no_such_place(call),
                }
            }
            R::DeleteFile(id) => self.delete_file(call, id),
            R::CreateJob(request) => self.create_job(call, *request),
            R::GetJob(id) => match self.jobs.get(id) {
                Some(job) => {
                    let record = Box::new(job.record.clone());
                    self.reply(call, AdminReply::Job(record));
                }
                None => self.no_such_job(call, id),
            },
            R::ListJobs(page) => {
                let listed = self.jobs.page(page.after, page.limit.min(JOBS_PAGE_MAX) as usize, |job| {
                    sees(&job.record.request.owner)
                });
                let records = |jobs: Vec<&Job>| jobs.into_iter().map(|job| job.record.clone()).collect();
                match listed.map(|(jobs, more)| (records(jobs), more)) {
                    Some((jobs, more)) => self.reply(call, AdminReply::Jobs(jobs, more)),
                    None => self.no_such_place(call),
                }
            }
            R::ControlJob(id, action) => self.control(call, id, action),
            R::ListEvents(id, page) => self.list_events(call, id, &page),
            R::ListCheckpoints(id, page) => self.list_checkpoints(call, id, &page),
            R::Key(_)
            | R::LoadAdapter(_)
            | R::UnloadAdapter { .. }
            | R::RollBackAdapter { .. }
            | R::Response(_)
            | R::DeployModel(_)
            | R::ScaleModel(_)
            | R::RemoveModel { .. }
            | R::PlanWithout(_)
            | R::Replan { .. }
            | R::DrainNode(_) => {}
        }
    }

    fn no_such_file(&mut self, call: Call, id: FileId) {
        self.refuse(call, AdminFailureKind::NotFound, format!("there is no file {id}"));
    }

    fn no_such_job(&mut self, call: Call, id: JobId) {
        self.refuse(call, AdminFailureKind::NotFound, format!("there is no job {id}"));
    }

    fn no_such_place(&mut self, call: Call) {
        let text = "`after` names nothing that is there: list from the beginning";
        self.refuse(call, AdminFailureKind::Invalid, text);
    }

    /// Whether there is a place for blobs; refuses the call if not.
    fn has_blobs(&mut self, call: Call) -> bool {
        if !self.config.blobs {
            let text = "files and jobs need a place for blobs: set `blobs` in the scheduler's configuration";
            self.refuse(call, AdminFailureKind::Unavailable, text);
        }
        self.config.blobs
    }

    fn put_file(&mut self, call: Call, file: FileRecord) {
        if !self.has_blobs(call) {
            return;
        }
        match self.files.get(file.id) {
            // The same call again. The first one may not be durable yet, so it is saved again, too.
            Some(known) if *known == file => {}
            Some(_) => {
                let text = format!("there is another file {}", file.id);
                return self.refuse(call, AdminFailureKind::Conflict, text);
            }
            None if self.files.len() >= FILES_MAX => {
                let text = format!("there are {FILES_MAX} files: delete some");
                return self.refuse(call, AdminFailureKind::Full, text);
            }
            None if file.name.len() + file.purpose.len() > FILE_TEXT_BYTES_MAX => {
                return self.refuse(call, AdminFailureKind::Invalid, "the file's name is too long");
            }
            None => {}
        }
        if self.too_many_writes(call) {
            return;
        }
        let reply = AdminReply::File(file.clone());
        self.save_file(file, Some((call, reply)));
    }

    fn too_many_writes(&mut self, call: Call) -> bool {
        let full = self.file_saves.is_full();
        if full {
            self.refuse(call, AdminFailureKind::Full, "too many changes of files at once: try again shortly");
        }
        full
    }

    fn delete_file(&mut self, call: Call, id: FileId) {
        if !self.files.contains(id) {
            return self.no_such_file(call, id);
        }
        if !self.too_many_writes(call) {
            self.forget_file(id, Some((call, AdminReply::Done)));
        }
    }

    fn create_job(&mut self, call: Call, request: JobRequest) {
        if !self.has_blobs(call) {
            return;
        }
        let id = request.id;
        if let Some(known) = self.jobs.get(id) {
            if known.record.request == request {
                return self.reply_when_durable(id, call);
            }
            return self.refuse(call, AdminFailureKind::Conflict, format!("there is another job {id}"));
        }
        if request.model_digest != self.config.model_digest {
            let text = format!("model {} is not served here: name the one that is", request.model);
            return self.refuse(call, AdminFailureKind::NotFound, text);
        }
        for file in request.files() {
            if !self.files.contains(file) {
                return self.no_such_file(call, file);
            }
        }
        if let Some(why) = self.trained_enough(&request) {
            return self.refuse(call, AdminFailureKind::Full, why);
        }
        let notes: usize = request.metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
        let suffix = request.suffix.as_ref().map_or(0, String::len);
        if request.settings.len() + request.model.len() + suffix + notes > REQUEST_BYTES_MAX {
            let text = format!("the job's texts are longer than {REQUEST_BYTES_MAX} bytes together");
            return self.refuse(call, AdminFailureKind::Invalid, text);
        }
        let unfinished = self.active.iter().filter_map(|id| self.jobs.get(*id)).filter(|job| !job.ended());
        if unfinished.count() >= JOBS_UNFINISHED_MAX {
            let text = format!("{JOBS_UNFINISHED_MAX} jobs have not ended: cancel some, or wait");
            return self.refuse(call, AdminFailureKind::Full, text);
        }
        self.forget_the_oldest();
        let mut job = Job::new(request, call.0);
        job.happened(self.unix_s, JobEventKind::Created);
        job.happened(self.unix_s, JobEventKind::Validating);
        self.jobs.insert(id, job);
        self.active.insert(id);
        self.reply_when_durable(id, call);
    }

    /// Why a job may not train any longer, if its owner's jobs have trained for as long as they may.
    pub(super) fn trained_enough(&self, request: &JobRequest) -> Option<String> {
        let (owner, most) = (request.owner.as_ref()?, request.training_minutes_max?);
        let enough = self.trained_minutes(owner) >= most.into();
        enough.then(|| format!("the jobs of {owner} have trained for the {most} minutes that they may"))
    }

    /// Makes room for one more job.
    fn forget_the_oldest(&mut self) {
        if self.jobs.len() < JOBS_MAX {
            return;
        }
        let forgotten = |job: &Job| job.ended() && !self.active.contains(&job.record.request.id);
        let oldest = self.jobs.oldest_first().find(|(_, job)| forgotten(job));
        if let Some((id, chunks)) = oldest.map(|(id, job)| (id, job.log.chunks())) {
            self.jobs.remove(id);
            self.effects.push(Effect::ForgetJob { job: id, chunks });
        }
    }

    fn control(&mut self, call: Call, id: JobId, action: JobAction) {
        let Some(job) = self.jobs.get(id) else { return self.no_such_job(call, id) };
        let status = job.record.status;
        let (publishing, promoting, being_served) = match &job.phase {
            Phase::Publishing { .. } => (true, false, false),
            Phase::Promoting(promoting) => (false, true, promoting.is_being_served()),
            _ => (false, false, false),
        };
        let conflict = match action {
            JobAction::Cancel if status == JobStatus::Cancelled => None,
            _ if status.is_final() => Some("the job has ended"),
            JobAction::Pause if publishing => Some("the job is trained, its model is about to be served"),
            JobAction::Pause if promoting => {
                Some("the job is trained, its adapter is compared with what is served")
            }
            // The name may be others' as well: it is not taken back.
            JobAction::Cancel if being_served => {
                Some("the job's adapter is about to be served: roll its name back when it is")
            }
            JobAction::Cancel | JobAction::Pause | JobAction::Resume => None,
        };
        if let Some(why) = conflict {
            return self.refuse(call, AdminFailureKind::Conflict, why);
        }
        match action {
            JobAction::Cancel => self.cancel(id),
            JobAction::Pause => self.pause(id),
            JobAction::Resume => self.resume(id),
        }
        self.reply_when_durable(id, call);
    }

    fn list_events(&mut self, call: Call, id: JobId, page: &Page<u64>) {
        let Some(job) = self.jobs.get(id) else { return self.no_such_job(call, id) };
        let before = page.after.unwrap_or(u64::MAX).min(job.log.count());
        let limit = page.limit.min(EVENTS_PAGE_MAX) as usize;
        let newer: Vec<JobEvent> = job.log.newest_before(before).take(limit).cloned().collect();
        // The store is asked only for what is not in memory.
        let before = newer.last().map_or(before, |last| last.number).min(before);
        if newer.len() == limit || before == 0 {
            return self.reply(call, AdminReply::Events(newer, before > 0));
        }
        if let Some(reason) = &self.store_down {
            let text = format!("the store does not answer ({reason}): try again when it is back");
            return self.refuse(call, AdminFailureKind::Unavailable, text);
        }
        if self.reads.len() >= READS_MAX {
            return self.refuse(call, AdminFailureKind::Full, "too many lists at once: try again shortly");
        }
        let wanted = (limit - newer.len()) as u64;
        let (from, to) = (before.saturating_sub(wanted) / CHUNK_EVENTS, before.div_ceil(CHUNK_EVENTS));
        self.reads_made += 1;
        self.reads.insert(self.reads_made, Read { call, newer, before, limit });
        self.effects.push(Effect::ReadEvents { read: self.reads_made, job: id, from, to });
    }

    pub(super) fn events_read(&mut self, read: u64, events: Option<Vec<JobEvent>>) {
        let Some(Read { call, mut newer, before, limit }) = self.reads.remove(&read) else { return };
        let Some(events) = events else {
            let text = "the store does not answer: try again when it is back";
            return self.refuse(call, AdminFailureKind::Unavailable, text);
        };
        let older = events.into_iter().rev().filter(|event| event.number < before);
        newer.extend(older.take(limit - newer.len()));
        let more = newer.last().is_some_and(|last| last.number > 0);
        self.reply(call, AdminReply::Events(newer, more));
    }

    fn list_checkpoints(&mut self, call: Call, id: JobId, page: &Page<u64>) {
        let Some(job) = self.jobs.get(id) else { return self.no_such_job(call, id) };
        let before = page.after.unwrap_or(u64::MAX);
        let all = job.record.checkpoints.iter().rev().filter(|checkpoint| checkpoint.number < before);
        let limit = page.limit.min(EVENTS_PAGE_MAX) as usize;
        let more = all.clone().count() > limit;
        let listed = all.take(limit).cloned().collect();
        self.reply(call, AdminReply::Checkpoints(listed, more));
    }
}
