//! A job's files become samples: read from blobs, checked, tokenised, stored as blobs.
//!
//! Jobs come from the scheduler, over the connection; a few are worked on at once, each on a thread of its own. The work
//! may be done any number of times, by any gateway: the same files and choices give the same blobs and settings.

use super::blob_io::{BlobFile, BlobSink, BlobSource, Stop};
use super::settings::{Choices, Samples, longest_sample};
use crate::scheduler_client::SchedulerClient;
use crate::text::ModelText;
use ashlar_dataset::{
    DatasetError, DatasetReader, DatasetWriter, FileRefusal, Format, Method, Options, PrepareError, Report,
    SampleSize, prepare,
};
use ashlar_protocol::admin::{DataReport, FileRecord, JobError, PreparedJob, Promotion, PromotionMetric};
use ashlar_protocol::serving::PrepareJob;
use ashlar_store::blobs::{BlobError, BlobInfo, Blobs};
use ashlar_tokenizer::TemplateTime;
use ashlar_vocabulary::{BlobId, JobId};
use std::collections::HashSet;
use std::error::Error;
use std::io::{self, BufWriter};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// Jobs that may wait.
pub(crate) const JOBS_WAITING_MAX: usize = 256;
/// Jobs that are worked on at once.
const JOBS_AT_ONCE: usize = 2;
/// How often a blob store that does not answer is tried, with this pause in between.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);
/// Written at once.
const BUFFER_BYTES: usize = 64 << 10;

/// What validation works with.
#[derive(Clone)]
pub(crate) struct Validator {
    pub(crate) blobs: Blobs,
    pub(crate) text: Arc<ModelText>,
    pub(crate) scheduler: SchedulerClient,
}

impl Validator {
    /// Works on jobs as they come, until it is dropped.
    pub(crate) async fn run(self, mut jobs: mpsc::Receiver<Box<PrepareJob>>) {
        let (mut working, mut at_work) = (JoinSet::new(), HashSet::new());
        loop {
            tokio::select! {
                job = jobs.recv(), if at_work.len() < JOBS_AT_ONCE => {
                    let Some(job) = job else { return };
                    let id = job.request.id;
                    // Asked again while it is worked on: the one answer does.
                    if at_work.insert(id) {
                        let validator = self.clone();
                        working.spawn(async move { (id, validator.validate(job).await) });
                    }
                }
                Some(done) = working.join_next() => {
                    let Ok((id, outcome)) = done else {
                        // A task of ours does not panic, and nobody aborts it; still, nothing may stand for ever.
                        at_work.clear();
                        working.shutdown().await;
                        continue;
                    };
                    at_work.remove(&id);
                    report(id, &outcome);
                    self.scheduler.prepared(id, outcome);
                }
            }
        }
    }

    async fn validate(&self, job: Box<PrepareJob>) -> Result<PreparedJob, JobError> {
        let served = self.scheduler.link().cluster.map(|cluster| cluster.model_digest);
        if served.is_some_and(|served| served != job.request.model_digest) {
            let message = "another model is served now: create the job again for it";
            return Err(job_error("model_not_found", message, Some("model")));
        }
        let job = Arc::new(job);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let stop = StopWhenDropped(Stop::default());
            let (work, job) = (Work { validator: self.clone(), stop: stop.0.clone() }, job.clone());
            let done = tokio::task::spawn_blocking(move || work.run(&job)).await;
            match done {
                Ok(Ok(prepared)) => return Ok(prepared),
                Ok(Err(Trouble::Job(error))) => return Err(error),
                Ok(Err(Trouble::Storage { error, retry })) if !retry || attempt == ATTEMPTS => {
                    tracing::warn!(error, "a job's files cannot be validated");
                    return Err(job_error("server_error", &error, None));
                }
                Ok(Err(Trouble::Storage { error, .. })) => {
                    tracing::info!(error, "a job's files cannot be read now; trying again");
                }
                Err(panic) => {
                    tracing::error!(%panic, "validating a job's files panicked");
                    let message = "the server failed on this job's files: please report it";
                    return Err(job_error("server_error", message, None));
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Ends the blocking half when the asynchronous one goes.
struct StopWhenDropped(Stop);

impl Drop for StopWhenDropped {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Why there are no samples.
enum Trouble {
    /// The job is at fault.
    Job(JobError),
    /// The blob store is.
    Storage { error: String, retry: bool },
}

impl From<BlobError> for Trouble {
    fn from(error: BlobError) -> Trouble {
        match error.is_full() {
            true => Trouble::no_room(),
            false => Trouble::Storage { retry: error.is_retryable(), error: error.to_string() },
        }
    }
}

impl Trouble {
    /// Trying again at once is of no use. Where files lie is the operator's business.
    fn no_room() -> Trouble {
        let message = "there is no room left for the job's samples: delete files, or ask the operator, then create the job again";
        tracing::warn!("the blob store has no room for a job's samples");
        Trouble::Job(job_error("insufficient_storage", message, None))
    }
}

impl From<FileRefusal> for Trouble {
    fn from(refusal: FileRefusal) -> Trouble {
        Trouble::Job(job_error(refusal.code, &refusal.message, Some(refusal.param)))
    }
}

impl From<PrepareError> for Trouble {
    fn from(error: PrepareError) -> Trouble {
        match &error {
            PrepareError::Write(DatasetError::Io(cause)) if is_full(cause) => Trouble::no_room(),
            PrepareError::Read(cause) | PrepareError::Write(DatasetError::Io(cause)) => {
                Trouble::Storage { retry: is_retryable(cause), error: error.to_string() }
            }
            PrepareError::Write(DatasetError::TooLarge) => {
                Trouble::Job(job_error("invalid_training_file", &error.to_string(), Some("training_file")))
            }
            PrepareError::Write(_) => Trouble::Storage { retry: false, error: error.to_string() },
        }
    }
}

impl From<DatasetError> for Trouble {
    fn from(error: DatasetError) -> Trouble {
        PrepareError::Write(error).into()
    }
}

fn is_retryable(error: &io::Error) -> bool {
    blob_error(error).is_some_and(BlobError::is_retryable)
}

fn is_full(error: &io::Error) -> bool {
    blob_error(error).is_some_and(BlobError::is_full)
}

fn blob_error(error: &io::Error) -> Option<&BlobError> {
    let cause = error.get_ref().map(|cause| cause as &(dyn Error + 'static));
    cause.and_then(|cause| cause.downcast_ref::<BlobError>())
}

/// The blocking half.
struct Work {
    validator: Validator,
    stop: Stop,
}

/// A file's samples, stored.
struct Tokenised {
    report: Report,
    blob: BlobInfo,
    sizes: Vec<SampleSize>,
}

impl Work {
    fn run(&self, job: &PrepareJob) -> Result<PreparedJob, Trouble> {
        let choices: Choices = serde_json::from_str(&job.request.settings).map_err(|error| {
            let message = format!("the job's settings are of another version ({error}): create it again");
            Trouble::Job(job_error("server_error", &message, None))
        })?;
        let mut options = Options::new(choices.dataset_method(), choices.max_seq_len as usize);
        // Not the clock: whoever validates the job, and whenever, comes to the same samples.
        options.now = TemplateTime::from_unix_seconds(job.request.created_at);
        let training = self.tokenise(&job.training_file, &options, Report::verdict)?;
        let validation = match &job.validation_file {
            Some(file) => Some(self.tokenise(file, &options, Report::verdict_as_validation)?),
            None => None,
        };
        let settings = choices
            .settle(&training.samples(), validation.as_ref().map(Tokenised::samples).as_ref())
            .map_err(|error| {
                Trouble::Job(job_error("invalid_training_file", &error.to_string(), Some("training_file")))
            })?;
        let data = data_report(&training, validation.as_ref(), choices.max_seq_len);
        let evaluation = match (&job.evaluation_file, job.request.promote) {
            (Some(file), Some(promote)) => Some(self.evaluation(file, &promote, options)?),
            _ => None,
        };
        Ok(PreparedJob { settings, data, evaluation })
    }

    /// What a finished adapter is compared on with what is served: whatever the job's method is, examples with one right answer.
    fn evaluation(
        &self,
        file: &FileRecord,
        promote: &Promotion,
        options: Options,
    ) -> Result<BlobId, Trouble> {
        let options = Options { method: Method::Supervised, ..options };
        let verdict = |report: &Report| match (report.verdict_as_evaluation(), report.format) {
            (Ok(()), Some((Format::Text, _))) if promote.metric == PromotionMetric::ExactMatch => {
                let message = "a text has no answer to compare with: give chats or prompts with completions, or compare by loss";
                Err(FileRefusal {
                    code: "invalid_evaluation_file",
                    param: "promote.file",
                    message: message.to_owned(),
                })
            }
            (verdict, _) => verdict,
        };
        Ok(self.tokenise(file, &options, verdict)?.blob.id)
    }

    /// Samples of a file that can be used.
    fn tokenise(
        &self,
        file: &FileRecord,
        options: &Options,
        verdict: impl Fn(&Report) -> Result<(), FileRefusal>,
    ) -> Result<Tokenised, Trouble> {
        let Validator { blobs, text, .. } = &self.validator;
        let source = BlobSource::open(blobs, file.blob, self.stop.clone())?;
        let sink = BufWriter::with_capacity(BUFFER_BYTES, BlobSink::new(blobs));
        let mut writer = DatasetWriter::new(sink, options.method)?;
        let report = prepare(source, &text.tokenizer, options, &mut writer)?;
        // Samples of a refused file are never finished, so nothing is left of them.
        verdict(&report)?;
        let (sink, _) = writer.finish()?;
        let sink = sink.into_inner().map_err(|error| DatasetError::Io(error.into_error()))?;
        let blob = sink.finish()?;
        let sizes = DatasetReader::open(BlobFile::new(blobs, blob))?.sizes().to_vec();
        Ok(Tokenised { report, blob, sizes })
    }
}

impl Tokenised {
    fn samples(&self) -> Samples<'_> {
        Samples { blob: self.blob.id, examples: self.report.examples, sizes: &self.sizes }
    }
}

fn data_report(training: &Tokenised, validation: Option<&Tokenised>, max_seq_len: u32) -> DataReport {
    let report = &training.report;
    let mut warnings = warnings("", report, max_seq_len);
    if let Some(validation) = validation {
        warnings.extend(self::warnings("validation file: ", &validation.report, max_seq_len));
    }
    DataReport {
        examples: report.examples,
        samples: report.samples,
        tokens: report.tokens,
        target_tokens: report.target_tokens,
        longest_sample_rows: longest_sample(&training.samples(), validation.map(Tokenised::samples).as_ref()),
        truncated_examples: report.truncated.examples,
        truncated_tokens: report.truncated.tokens,
        warnings,
    }
}

/// What an owner should know although it is no error.
fn warnings(file: &str, report: &Report, max_seq_len: u32) -> Vec<String> {
    let mut warnings = Vec::new();
    if report.truncated.examples > 0 {
        let longest = report.longest.map_or(String::new(), |longest| {
            format!("; the longest has {} tokens, in line {}", longest.tokens, longest.line)
        });
        warnings.push(format!(
            "{file}{} example(s) are longer than {max_seq_len} tokens and were cut off ({} tokens, {} of them to be \
             learnt{longest}): raise `max_seq_len`, or split them",
            report.truncated.examples, report.truncated.tokens, report.truncated.target_tokens
        ));
    }
    if report.unterminated_turns > 0 {
        warnings.push(format!(
            "{file}after {} answer(s) the model's chat template writes no token that ends an answer: the model may not \
             learn to stop there",
            report.unterminated_turns
        ));
    }
    if report.split_examples > 0 {
        warnings.push(format!(
            "{file}{} conversation(s) became several samples, because the chat template rewrites earlier messages as a \
             conversation goes on",
            report.split_examples
        ));
    }
    warnings
}

fn job_error(code: &str, message: &str, param: Option<&str>) -> JobError {
    JobError { code: code.to_owned(), message: message.to_owned(), param: param.map(str::to_owned) }
}

fn report(job: JobId, outcome: &Result<PreparedJob, JobError>) {
    match outcome {
        Ok(prepared) => {
            let (examples, steps) = (prepared.data.examples, prepared.settings.steps);
            tracing::info!(%job, examples, steps, "a job's files are validated");
        }
        // Messages name lines and fields, and show nothing of their text.
        Err(error) => tracing::info!(%job, code = error.code, "a job's files are refused"),
    }
}
