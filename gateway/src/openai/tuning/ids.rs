//! Names of files, jobs, events and checkpoints in the API: a prefix and hexadecimal digits.

use crate::openai::error::ApiError;
use ashlar_vocabulary::{FileId, JobId};
use uuid::Uuid;

const FILE: &str = "file-";
const JOB: &str = "ftjob-";
const EVENT: &str = "ftevent-";
const CHECKPOINT: &str = "ftckpt_";
const DIGITS: usize = 32;

/// A name that nobody can guess.
pub(super) fn new_file_id() -> FileId {
    FileId(Uuid::new_v4().as_u128())
}

/// A name that nobody can guess.
pub(super) fn new_job_id() -> JobId {
    JobId(Uuid::new_v4().as_u128())
}

pub(super) fn file_name(id: FileId) -> String {
    format!("{FILE}{id}")
}

pub(super) fn job_name(id: JobId) -> String {
    format!("{JOB}{id}")
}

pub(super) fn event_name(job: JobId, number: u64) -> String {
    format!("{EVENT}{job}-{number}")
}

pub(super) fn checkpoint_name(job: JobId, number: u64) -> String {
    format!("{CHECKPOINT}{job}_{number}")
}

pub(super) fn read_file_name(text: &str) -> Option<FileId> {
    digits(text.strip_prefix(FILE)?).map(FileId)
}

pub(super) fn read_job_name(text: &str) -> Option<JobId> {
    digits(text.strip_prefix(JOB)?).map(JobId)
}

/// The number of an event of this job.
pub(super) fn read_event_name(text: &str, job: JobId) -> Option<u64> {
    numbered(text.strip_prefix(EVENT)?, '-', job)
}

/// The number of a checkpoint of this job.
pub(super) fn read_checkpoint_name(text: &str, job: JobId) -> Option<u64> {
    numbered(text.strip_prefix(CHECKPOINT)?, '_', job)
}

/// The file that a path names, or 404.
pub(super) fn file_of_path(text: &str) -> Result<FileId, ApiError> {
    read_file_name(text).ok_or_else(|| no_such_file(text))
}

/// The job that a path names, or 404.
pub(super) fn job_of_path(text: &str) -> Result<JobId, ApiError> {
    read_job_name(text).ok_or_else(|| no_such_job(text))
}

/// 404 for a file.
pub(super) fn no_such_file(name: &str) -> ApiError {
    let message = format!("No such File object: {}", shown(name));
    ApiError { param: Some("id".to_owned()), ..ApiError::not_found(message, "file_not_found") }
}

/// 404 for a job.
pub(super) fn no_such_job(name: &str) -> ApiError {
    let message = format!("Could not find fine tune: {}", shown(name));
    let code = "fine_tune_not_found";
    ApiError { param: Some("fine_tuning_job_id".to_owned()), ..ApiError::not_found(message, code) }
}

fn shown(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}

fn numbered(text: &str, separator: char, job: JobId) -> Option<u64> {
    let (id, number) = text.split_once(separator)?;
    if digits(id)? != job.0 || !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    number.parse().ok()
}

fn digits(text: &str) -> Option<u128> {
    let plain = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != DIGITS || !text.bytes().all(plain) {
        return None;
    }
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let (file, job) = (FileId(7), JobId(u128::MAX));
        assert_eq!(read_file_name(&file_name(file)), Some(file));
        assert_eq!(read_job_name(&job_name(job)), Some(job));
        assert_eq!(read_event_name(&event_name(job, 12), job), Some(12));
        assert_eq!(read_checkpoint_name(&checkpoint_name(job, 0), job), Some(0));
        assert_eq!(file_name(file), "file-00000000000000000000000000000007");
    }

    #[test]
    fn other_names_are_nobodys() {
        let hex = "0123456789abcdef0123456789abcdef";
        for wrong in [
            "",
            "file-",
            "file-7",
            hex,
            &format!("file-{}", hex.to_uppercase()),
            "file-+123456789abcdef0123456789abcdef",
        ] {
            assert_eq!(read_file_name(wrong), None, "{wrong}");
        }
        let job = JobId(1);
        assert_eq!(read_event_name(&event_name(JobId(2), 1), job), None);
        assert_eq!(read_event_name(&format!("{}x", event_name(job, 1)), job), None);
        assert_eq!(read_event_name(&event_name(job, 1).replace("-1", "-+1"), job), None);
    }
}
