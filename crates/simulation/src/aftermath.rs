//! What must be true of jobs once everything is over.

use crate::durable::Durable;
use crate::tuning::{Flaw, Job, Tuning};
use ashlar_protocol::admin::{JobRecord, JobStatus};
use ashlar_scheduler::director::Director;
use ashlar_scheduler::jobs::{StoredJob, results_file};

/// Whether every job has ended and nothing is left to be written.
pub(crate) fn is_over(tuning: &Tuning, durable: &Durable, director: &Director) -> bool {
    let over = |job: &Job| {
        let (stored, present) = (durable.jobs.get(&job.id()), director.jobs().job(job.id()));
        stored.is_some_and(|stored| is_settled(stored) && Some(&stored.record) == present)
    };
    tuning.jobs.iter().all(over) && director.jobs().is_idle()
}

fn is_settled(stored: &StoredJob) -> bool {
    let results = stored.progress.results_due;
    stored.record.status.is_final() && !results && stored.progress.superseded.is_empty()
}

/// Why it is not over, for a report.
pub(crate) fn describe(tuning: &Tuning, durable: &Durable, director: &Director) -> String {
    let mut text = String::from("jobs have not come to an end although all faults are over:");
    for job in &tuning.jobs {
        let stored = durable.jobs.get(&job.id()).map(|stored| (stored.record.status, stored.record.steps));
        let present = director.jobs().job(job.id()).map(|record| (record.status, record.steps));
        text += &format!(" {} stored as {stored:?}, known as {present:?};", job.id());
    }
    text
}

/// Holds every job's end against what had to come of it.
///
/// # Errors
/// What is not so.
pub(crate) fn verify(tuning: &Tuning, durable: &Durable) -> Result<Ends, String> {
    let mut ends = Ends::default();
    for job in &tuning.jobs {
        let id = job.id();
        let stored = durable.jobs.get(&id).ok_or_else(|| format!("job {id} is lost"))?;
        let record = &stored.record;
        durable.verify_events(stored)?;
        for checkpoint in &record.checkpoints {
            if Some(checkpoint.adapter) != job.adapter(checkpoint.step) {
                return Err(format!("checkpoint {} is not what an undisturbed run has", checkpoint.model));
            }
        }
        if record.steps > 0 && !durable.files.contains_key(&results_file(id)) {
            return Err(format!("job {id} has no table of its steps"));
        }
        match record.status {
            JobStatus::Succeeded => {
                succeeded(job, record, durable)?;
                ends.succeeded += 1;
            }
            JobStatus::Cancelled if job.may_be_cancelled() => ends.cancelled += 1,
            JobStatus::Failed => {
                failed(job, record)?;
                ends.failed += 1;
            }
            status => return Err(format!("job {id} ended as {status:?}")),
        }
    }
    Ok(ends)
}

/// How jobs ended.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Ends {
    pub(crate) succeeded: u64,
    pub(crate) failed: u64,
    pub(crate) cancelled: u64,
}

/// It is what a run has that nobody disturbs, and it is served.
fn succeeded(job: &Job, record: &JobRecord, durable: &Durable) -> Result<(), String> {
    let id = job.id();
    let expected = job.adapter(job.steps());
    if job.flaw.is_some() || record.steps != job.steps() {
        return Err(format!("job {id} succeeded with {:?} after {} steps", job.flaw, record.steps));
    }
    if job.is_full() {
        let made = record.trained_model.as_ref().map(|model| model.manifest);
        return match made == expected.map(|adapter| adapter.0) {
            true => Ok(()),
            false => Err(format!("the model of job {id} is not what an undisturbed run has")),
        };
    }
    let name = job.name();
    let served = durable.served().find(|(served, _)| **served == name);
    let served = served.and_then(|(_, record)| record.generations.last()).map(|view| view.adapter);
    if record.adapter != expected || served != expected || record.fine_tuned_model.as_ref() != Some(&name) {
        return Err(format!("{name} is not served as what an undisturbed run has"));
    }
    Ok(())
}

/// It failed for the reason that it was given.
fn failed(job: &Job, record: &JobRecord) -> Result<(), String> {
    let error = record.error.as_ref();
    let code = error.map_or("", |error| error.code.as_str());
    let expected = match job.flaw {
        Some(Flaw::Unusable) => "no_effect",
        Some(Flaw::Refused) => "model_not_served",
        None => "",
    };
    let told = error.is_some_and(|error| error.message.contains("no effect"));
    if code != expected || !told {
        return Err(format!("job {} failed: {error:?}", job.id()));
    }
    Ok(())
}
