//! From validation to the end: what owners and gateways do to a job, and what is begun when it can be.

use super::events::Effect;
use super::job::{self, Job, Next, Phase, Validation};
use super::{Jobs, names};
use crate::engine::GatewayId;
use crate::time::Millis;
use ashlar_protocol::admin::{DataReport, JobError, JobEventKind, JobStatus, PreparedJob};
use ashlar_protocol::serving::PrepareJob;
use ashlar_vocabulary::{BlobId, JobId};

/// Most jobs whose files are validated at once.
const VALIDATING_MAX: usize = 4;
/// How often a validation is begun before the job fails.
const VALIDATION_ATTEMPTS_MAX: u32 = 4;
/// How long a gateway may take to validate a job's files.
const VALIDATION_MS_MAX: u64 = 3_600_000;
/// Most warnings about a job's files that its record keeps.
const WARNINGS_MAX: usize = 32;

/// An error of a job.
pub(super) fn error(code: &str, message: impl Into<String>) -> JobError {
    JobError { code: code.to_owned(), message: message.into(), param: None }
}

impl Jobs {
    /// Takes up a job of an earlier term, the oldest first.
    pub(super) fn take_up(&mut self, id: JobId) {
        self.queue_places += 1;
        let (place, unix_s) = (self.queue_places, self.unix_s);
        let Some(job) = self.jobs.get_mut(id) else { return };
        match &mut job.phase {
            Phase::Ended if !job.progress.results_due && job.progress.superseded.is_empty() => return,
            // Only blobs are left to be deleted.
            Phase::Ended if !job.progress.results_due => {}
            Phase::Ended => {
                job.saving.results_asked = true;
                let chunks = job.log.chunks();
                self.effects.push(Effect::WriteResults { job: id, chunks });
            }
            Phase::Queued(queued) => *queued = place,
            Phase::Waiting { .. } => {
                job.happened(unix_s, JobEventKind::Interrupted("another scheduler took over".to_owned()));
            }
            Phase::Validating(_) | Phase::Training(_) | Phase::Paused => {}
            Phase::Publishing { .. } | Phase::Promoting(_) => {}
        }
        self.active.insert(id);
    }

    pub(super) fn gateway_gone(&mut self, gateway: GatewayId) {
        self.gateways.remove(&gateway);
        for job in self.active.iter() {
            match self.jobs.get_mut(*job).map(|job| &mut job.phase) {
                Some(Phase::Validating(validation)) => {
                    validation.with.take_if(|(with, _)| *with == gateway);
                }
                Some(Phase::Promoting(promoting)) => promoting.gateway_gone(gateway),
                _ => {}
            }
        }
        self.forget_calls_of(gateway);
    }

    /// Calls of a gateway that is gone are not answered; that is the shell's to notice, too.
    fn forget_calls_of(&mut self, gateway: GatewayId) {
        for id in &self.active {
            if let Some(job) = self.jobs.get_mut(*id) {
                job.saving.calls.retain(|(from, _)| *from != gateway);
            }
        }
    }

    pub(super) fn prepared(&mut self, id: JobId, outcome: Result<PreparedJob, JobError>) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        // An answer that comes late, from a gateway that was given up, is as good.
        if !matches!(job.phase, Phase::Validating(_)) {
            return;
        }
        let outcome = outcome.and_then(|prepared| match job::check(&prepared.settings) {
            Ok(()) => Ok(prepared),
            Err(why) => Err(error("invalid_hyperparameters", why)),
        });
        match outcome {
            Ok(PreparedJob { settings, data, evaluation }) => {
                let data = bounded(data);
                job.record.settings = Some(settings);
                job.record.evaluation = evaluation;
                job.record.data = Some(data.clone());
                job.happened(self.unix_s, JobEventKind::Queued(data));
                if job.progress.pause { self.stop_here(id) } else { self.enqueue(id) }
            }
            Err(error) => self.fail(id, error),
        }
    }

    fn enqueue(&mut self, id: JobId) {
        self.queue_places += 1;
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.phase = Phase::Queued(self.queue_places);
        job.record.status = JobStatus::Queued;
        job.saving.dirty = true;
    }

    /// Stops a job that has no work in progress; its session is closed.
    pub(super) fn stop_here(&mut self, id: JobId) {
        self.close_session(id);
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        job.phase = Phase::Paused;
        job.record.status = JobStatus::Paused;
        job.progress.pause = false;
        job.happened(unix_s, JobEventKind::Paused);
    }

    pub(super) fn pause(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        match &job.phase {
            Phase::Queued(_) | Phase::Waiting { .. } => self.stop_here(id),
            Phase::Validating(_) | Phase::Training(_) => {
                job.progress.pause = true;
                job.saving.dirty = true;
                self.advance(id);
            }
            Phase::Publishing { .. } | Phase::Promoting(_) | Phase::Paused | Phase::Ended => {}
        }
    }

    pub(super) fn resume(&mut self, id: JobId) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        match &job.phase {
            Phase::Paused => {
                job.failures = 0;
                job.happened(self.unix_s, JobEventKind::Resumed);
                self.enqueue(id);
            }
            _ if job.progress.pause => {
                job.progress.pause = false;
                job.saving.dirty = true;
            }
            _ => {}
        }
    }

    pub(super) fn cancel(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(id).filter(|job| !job.ended()) else { return };
        if matches!(job.phase, Phase::Publishing { .. }) {
            let name = names::model(&job.record.request);
            self.effects.push(Effect::Withdraw(name));
        }
        self.end(id, JobStatus::Cancelled, JobEventKind::Cancelled);
    }

    pub(super) fn fail(&mut self, id: JobId, error: JobError) {
        let error = JobError {
            code: job::short(error.code),
            message: job::short(error.message),
            param: error.param.map(job::short),
        };
        if let Some(job) = self.jobs.get_mut(id) {
            job.record.error = Some(error.clone());
        }
        self.effects.push(Effect::Warn(format!("job {id} has failed: {}", error.message)));
        self.end(id, JobStatus::Failed, JobEventKind::Failed(error));
    }

    /// Ends a job. Its state is not needed any more; its checkpoints stay.
    pub(super) fn end(&mut self, id: JobId, status: JobStatus, what: JobEventKind) {
        let prepared: Vec<BlobId> =
            self.jobs.get(id).and_then(Job::session).into_iter().flat_map(|open| open.prepared()).collect();
        self.close_session(id);
        let (unix_s, blobs) = (self.unix_s, self.config.blobs);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let record = &mut job.record;
        record.status = status;
        record.finished_at = Some(unix_s);
        record.remaining_s = None;
        let held = job.held.take().map(|held| held.shards).unwrap_or_default();
        let shards = std::mem::take(&mut record.shards).into_iter().chain(held).chain(prepared);
        job.progress.superseded.extend(shards.map(|shard| (record.steps, shard)));
        if record.steps > 0 && blobs {
            record.result_files = vec![names::results_file(id)];
            if let (JobStatus::Succeeded, Some(last)) = (status, record.checkpoints.last()) {
                record.result_files.extend(&last.files);
            }
            job.progress.results_due = true;
        }
        job.phase = Phase::Ended;
        job.happened(unix_s, what);
    }

    pub(super) fn tick(&mut self) {
        self.sweep_if_due();
        let now = self.now;
        for id in self.active.clone() {
            let Some(job) = self.jobs.get_mut(id) else { continue };
            match &mut job.phase {
                Phase::Validating(validation) => {
                    validation.with.take_if(|(_, since)| now.since(*since) > VALIDATION_MS_MAX);
                }
                Phase::Training(_) => self.interrupt_if_silent(id),
                Phase::Promoting(_) => self.compare_anew_if_late(id),
                _ => {}
            }
        }
    }

    /// Begins validations, sessions, comparisons and publications that can be begun.
    pub(super) fn begin_what_can_begin(&mut self) {
        self.begin_validations();
        self.begin_jobs();
        for id in self.active.clone() {
            let Some(job) = self.jobs.get(id) else { continue };
            match job.phase {
                Phase::Waiting { .. } if job.next() == Next::Finish => self.publish(id),
                Phase::Waiting { due } if due <= self.now => self.open_session(id),
                Phase::Publishing { asked: false, due, .. } if due <= self.now => self.ask_to_publish(id),
                Phase::Promoting(_) => self.promote_on(id),
                _ => {}
            }
        }
    }

    fn begin_validations(&mut self) {
        let mut busy: Vec<GatewayId> = Vec::new();
        let mut idle: Vec<(u64, JobId)> = Vec::new();
        for job in self.active.iter().filter_map(|id| self.jobs.get(*id)) {
            match &job.phase {
                Phase::Validating(Validation { with: Some((gateway, _)), .. }) => busy.push(*gateway),
                Phase::Validating(_) => {
                    idle.push((job.record.request.created_at, job.record.request.id));
                }
                _ => {}
            }
        }
        idle.sort_unstable();
        for (_, id) in idle {
            if busy.len() >= VALIDATING_MAX {
                return;
            }
            if let Some(gateway) = self.begin_validation(id, &busy) {
                busy.push(gateway);
            }
        }
    }

    fn begin_validation(&mut self, id: JobId, busy: &[GatewayId]) -> Option<GatewayId> {
        let load = |gateway: &GatewayId| busy.iter().filter(|other| *other == gateway).count();
        let least = self.gateways.iter().copied().min_by_key(load);
        let job = self.jobs.get_mut(id)?;
        let Phase::Validating(validation) = &mut job.phase else { return None };
        let wish = validation.wish.filter(|gateway| self.gateways.contains(gateway));
        let gateway = wish.or(least)?;
        validation.attempts += 1;
        if validation.attempts > VALIDATION_ATTEMPTS_MAX {
            let text = "no gateway could finish validating the files: create the job again";
            self.fail(id, error("validation_interrupted", text));
            return None;
        }
        validation.with = Some((gateway, self.now));
        // Where the first attempt ends, somebody else tries.
        validation.wish = None;
        let request = job.record.request.clone();
        let training_file = self.files.get(request.training_file).cloned();
        let validation_file = request.validation_file.map(|id| self.files.get(id).cloned());
        let evaluation_file = request.promote.map(|promote| self.files.get(promote.file).cloned());
        let (Some(training_file), None | Some(Some(_)), None | Some(Some(_))) =
            (training_file, &validation_file, &evaluation_file)
        else {
            self.fail(
                id,
                error("file_not_found", "a file was deleted before it was validated: upload it again"),
            );
            return None;
        };
        let (validation_file, evaluation_file) = (validation_file.flatten(), evaluation_file.flatten());
        let job = Box::new(PrepareJob { request, training_file, validation_file, evaluation_file });
        self.effects.push(Effect::Prepare { gateway, job });
        Some(gateway)
    }

    /// Lets jobs out of the queue, the first first.
    fn begin_jobs(&mut self) {
        if self.replicas.is_empty() {
            return;
        }
        let jobs = || self.active.iter().filter_map(|id| self.jobs.get(*id));
        let running = jobs().filter(|job| job.takes_a_place()).count();
        let mut queue: Vec<(u64, JobId)> = jobs()
            .filter_map(|job| match job.phase {
                Phase::Queued(place) => Some((place, job.record.request.id)),
                _ => None,
            })
            .collect();
        queue.sort_unstable();
        let mut places = self.config.max_jobs_running.saturating_sub(running);
        for (_, id) in queue {
            if places == 0 {
                return;
            }
            let trained = self.jobs.get(id).is_some_and(|job| job.next() == Next::Finish);
            if !trained && self.allot(id).is_none() {
                match self.jobs.get(id).is_some_and(Job::ended) {
                    true => continue,
                    // Nobody overtakes it: a large job would wait for ever.
                    false => return,
                }
            }
            places -= 1;
            self.begin_job(id);
            if !trained {
                self.open_session(id);
            }
        }
    }

    fn begin_job(&mut self, id: JobId) {
        let now: Millis = self.now;
        if let Some(job) = self.jobs.get_mut(id) {
            job.phase = Phase::Waiting { due: now };
            job.record.status = JobStatus::Running;
            job.saving.dirty = true;
        }
    }
}

/// A report with bounded texts, for a record and an event.
fn bounded(mut data: DataReport) -> DataReport {
    data.warnings.truncate(WARNINGS_MAX);
    data.warnings = data.warnings.into_iter().map(job::short).collect();
    data
}
