//! A job's adapter is compared with what is served: the same examples to both, through the way that requests take.
//!
//! Comparisons come from the scheduler, over the connection, and figures go back; nothing is kept here, so any gateway may do it,
//! and do it again. Requests are of the lowest priority and few at a time: they take what clients leave.

use super::blob_io::BlobFile;
use super::questions::{Answer, Question, questions};
use crate::scheduler_client::{Heard, SchedulerClient};
use crate::text::ModelText;
use crate::transcript::TranscriptEvent;
use ashlar_dataset::{DatasetError, DatasetReader, TokenSequence};
use ashlar_protocol::admin::{Comparison, PromotionMetric};
use ashlar_protocol::serving::{ChoiceId, CompareAdapters, FailureKind, RequestFailure, Submit};
use ashlar_store::blobs::Blobs;
use ashlar_vocabulary::{AdapterId, BlobId, JobId, ModelDigest, RequestId, SamplingParams};
use futures::StreamExt as _;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;
use uuid::Uuid;

/// Comparisons that may wait.
pub(crate) const COMPARISONS_WAITING_MAX: usize = 64;
/// Comparisons that are known at once; of these one is worked on.
const COMPARISONS_MAX: usize = 16;
/// Most samples of a file that are compared on, the first ones.
const SAMPLES_MAX: u32 = 500;
/// Most answers that are asked for of them.
const QUESTIONS_MAX: usize = 500;
/// Requests in flight.
const IN_FLIGHT: usize = 4;
/// Behind everybody else.
const PRIORITY: i32 = i32::MAX;
/// A comparison that takes longer is given up, before the scheduler gives up this gateway.
const TIME_MAX: Duration = Duration::from_secs(3_000);
/// Before a request is made again for which there was no room.
const PAUSE: Duration = Duration::from_secs(1);

/// What comparing works with.
#[derive(Clone)]
pub(crate) struct Comparer {
    pub(crate) blobs: Blobs,
    pub(crate) text: Arc<ModelText>,
    pub(crate) scheduler: SchedulerClient,
    /// Of each request.
    pub(crate) deadline_ms: u64,
}

impl Comparer {
    /// Works on comparisons as they come, until it is dropped.
    pub(crate) async fn run(self, mut comparisons: mpsc::Receiver<Box<CompareAdapters>>) {
        let mut working: JoinSet<(JobId, Result<Comparison, String>)> = JoinSet::new();
        let mut at_work: HashMap<JobId, AbortHandle> = HashMap::new();
        let place = Arc::new(Semaphore::new(1));
        loop {
            tokio::select! {
                asked = comparisons.recv(), if at_work.len() < COMPARISONS_MAX => {
                    let Some(asked) = asked else { return };
                    let (comparer, place, job) = (self.clone(), place.clone(), asked.job);
                    let task = working.spawn(async move {
                        // The semaphore is never closed.
                        let _place = place.acquire_owned().await;
                        (job, comparer.compare(&asked).await)
                    });
                    // Asked again, as the connection was lost: something else may be served meanwhile.
                    if let Some(former) = at_work.insert(job, task) {
                        former.abort();
                    }
                }
                Some(done) = working.join_next() => match done {
                    Ok((job, outcome)) => {
                        at_work.remove(&job);
                        report(job, &outcome);
                        self.scheduler.compared(job, outcome);
                    }
                    // Aborted above, as a task of ours does not panic; if one did, the scheduler would ask again in time.
                    Err(_) => at_work.retain(|_, task| !task.is_finished()),
                },
            }
        }
    }

    async fn compare(&self, asked: &CompareAdapters) -> Result<Comparison, String> {
        match tokio::time::timeout(TIME_MAX, self.measure_both(asked)).await {
            Ok(outcome) => outcome,
            Err(_) => Err("the cluster was too busy to compare the adapter with what is served".to_owned()),
        }
    }

    async fn measure_both(&self, asked: &CompareAdapters) -> Result<Comparison, String> {
        let samples = self.samples(asked).await?;
        let (candidate, count) = self.measure(asked, &samples, Some(asked.candidate)).await?;
        let served = asked.served.map(|(_, adapter)| adapter);
        let (served, _) = self.measure(asked, &samples, served).await?;
        Ok(Comparison { candidate, served, against: asked.served.map(|(generation, _)| generation), count })
    }

    /// The samples to measure on.
    async fn samples(&self, asked: &CompareAdapters) -> Result<Vec<TokenSequence>, String> {
        let (blobs, id) = (self.blobs.clone(), asked.evaluation);
        let reading = tokio::task::spawn_blocking(move || read_samples(&blobs, id));
        match reading.await {
            Ok(samples) => samples.map_err(|error| format!("cannot read the samples to compare on: {error}")),
            Err(_) => Err("the server failed on the samples to compare on: please report it".to_owned()),
        }
    }

    /// What a model comes to, and on how many answers or targets.
    async fn measure(
        &self,
        asked: &CompareAdapters,
        samples: &[TokenSequence],
        adapter: Option<AdapterId>,
    ) -> Result<(f64, u64), String> {
        let model = Model { digest: asked.model_digest, adapter };
        match asked.metric {
            PromotionMetric::ExactMatch => self.exact_matches(samples, model).await,
            PromotionMetric::Loss => self.loss(samples, model).await,
        }
    }

    /// The share of answers that are given to the byte.
    async fn exact_matches(&self, samples: &[TokenSequence], model: Model) -> Result<(f64, u64), String> {
        let tokenizer = &self.text.tokenizer;
        let is_end = |token| tokenizer.eos_token_ids().contains(&token);
        let questions: Vec<Question> = samples
            .iter()
            .flat_map(|sample| questions(sample, |token| tokenizer.token_bytes(token), is_end))
            .take(QUESTIONS_MAX)
            .collect();
        if questions.is_empty() {
            return Err("the file to compare on has no answer with something before it".to_owned());
        }
        let answers: Vec<_> = questions.iter().map(|question| self.is_matched(question, model)).collect();
        let mut answers = futures::stream::iter(answers).buffer_unordered(IN_FLIGHT);
        let mut matched = 0_u64;
        while let Some(answer) = answers.next().await {
            matched += u64::from(answer?);
        }
        let count = questions.len() as u64;
        Ok((matched as f64 / count as f64, count))
    }

    async fn is_matched(&self, question: &Question, model: Model) -> Result<bool, String> {
        let tokenizer = &self.text.tokenizer;
        let context = self.scheduler.link().cluster.map_or(u32::MAX, |cluster| cluster.max_context_tokens);
        let room = (context as usize).saturating_sub(question.prompt.len());
        // A token has a byte at least, but for those that end the answer.
        let most = (question.expected.len() + 1).min(room).max(1);
        let stop_tokens = tokenizer.eos_token_ids().to_vec();
        let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let wanted = Wanted { prompt: &question.prompt, max_new_tokens: most as u32, stop_tokens, sampling };
        let hear = |answer: &mut Answer<'_>, event: TranscriptEvent| match event {
            TranscriptEvent::Token(token) => {
                let ends = tokenizer.eos_token_ids().contains(&token.token);
                answer.token(token.index, tokenizer.token_bytes(token.token), ends)
            }
            _ => None,
        };
        let matched = self.ask(wanted, model, || Answer::new(question), hear).await?;
        // Cut off before it could go wrong.
        Ok(matched.unwrap_or(false))
    }

    /// Mean loss of the targets, in nats: what a job's validation measures.
    async fn loss(&self, samples: &[TokenSequence], model: Model) -> Result<(f64, u64), String> {
        let measured: Vec<_> = samples.iter().map(|sample| self.sample_loss(sample, model)).collect();
        // In their order, so that the sum is the same each time.
        let mut measured = futures::stream::iter(measured).buffered(IN_FLIGHT);
        let mut sum = 0.0_f64;
        while let Some(sample) = measured.next().await {
            sum += sample?;
        }
        let count: u64 = samples.iter().map(|sample| u64::from(sample.target_count())).sum();
        if count == 0 {
            return Err("the file to compare on has no target".to_owned());
        }
        Ok((sum / count as f64, count))
    }

    /// The sum of a sample's losses.
    async fn sample_loss(&self, sample: &TokenSequence, model: Model) -> Result<f64, String> {
        let sampling = SamplingParams {
            temperature: 0.0,
            top_logprobs: Some(0),
            prompt_logprobs: true,
            ..SamplingParams::default()
        };
        // What is described is the text itself: nothing is generated.
        let wanted = Wanted { prompt: sample.tokens(), max_new_tokens: 0, stop_tokens: Vec::new(), sampling };
        let hear = |described: &mut Vec<f64>, event: TranscriptEvent| match event {
            TranscriptEvent::PromptLogprobs { position, logprobs } => {
                // Nothing predicts the first token.
                described.resize(position.max(1) as usize, f64::NAN);
                described.extend(logprobs.iter().map(|of| f64::from(of.logprob)));
                (described.len() >= sample.tokens().len()).then(|| loss_of(sample, described))
            }
            _ => None,
        };
        let sum = self.ask(wanted, model, Vec::new, hear).await?;
        sum.ok_or_else(|| "the cluster described only a part of a sample".to_owned())
    }

    /// Makes a request, again and again where there is no room for it, and hears it until `hear` knows the answer or it has ended.
    async fn ask<S, T>(
        &self,
        wanted: Wanted<'_>,
        model: Model,
        begin: impl Fn() -> S,
        hear: impl Fn(&mut S, TranscriptEvent) -> Option<T>,
    ) -> Result<Option<T>, String> {
        loop {
            let submit = self.submit(&wanted, model);
            let until = Instant::now() + Duration::from_millis(self.deadline_ms) + PAUSE;
            let unread_max = wanted.prompt.len() + wanted.max_new_tokens as usize + 2;
            let failure = match self.scheduler.submit(vec![submit], unread_max) {
                Err(failure) => failure,
                Ok(mut events) => {
                    let mut state = begin();
                    loop {
                        // Leaving this drops the events, which cancels what is not finished.
                        match tokio::time::timeout_at(until, events.next()).await {
                            Ok(Heard::Event(_, TranscriptEvent::Finished { .. })) => return Ok(None),
                            Ok(Heard::Event(_, TranscriptEvent::Failed(failure))) => break failure,
                            Ok(Heard::Event(_, event)) => {
                                if let Some(known) = hear(&mut state, event) {
                                    return Ok(Some(known));
                                }
                            }
                            // It is asked again from its beginning: nobody has seen any of it.
                            Ok(Heard::SchedulerBack | Heard::GivenUp(_) | Heard::Lagged) | Err(_) => {
                                break lost();
                            }
                        }
                    }
                }
            };
            match failure.kind {
                FailureKind::Overloaded
                | FailureKind::Unavailable
                | FailureKind::Leaving
                | FailureKind::Cancelled
                | FailureKind::DeadlineExceeded => {
                    tokio::time::sleep(PAUSE).await;
                }
                FailureKind::Invalid
                | FailureKind::UnknownModel
                | FailureKind::RateLimited
                | FailureKind::UnknownKey
                | FailureKind::Internal
                | FailureKind::Suspect => {
                    return Err(failure.message);
                }
            }
        }
    }

    fn submit(&self, wanted: &Wanted<'_>, model: Model) -> Submit {
        Submit {
            id: ChoiceId { request: RequestId(Uuid::new_v4().as_u128()), choice: 0 },
            model_digest: model.digest,
            adapter: model.adapter,
            prompt: wanted.prompt.to_vec(),
            forced: Vec::new(),
            max_new_tokens: wanted.max_new_tokens,
            stop_tokens: wanted.stop_tokens.clone(),
            sampling: wanted.sampling.clone(),
            tenant_salt: 0,
            charge: None,
            priority: PRIORITY,
            deadline_ms: self.deadline_ms,
            forced_logprobs: Vec::new(),
            kept: false,
            traceparent: None,
        }
    }
}

/// What a request asks for.
struct Wanted<'a> {
    prompt: &'a [u32],
    max_new_tokens: u32,
    stop_tokens: Vec<u32>,
    sampling: SamplingParams,
}

/// Who is asked.
#[derive(Debug, Clone, Copy)]
struct Model {
    digest: ModelDigest,
    adapter: Option<AdapterId>,
}

/// The first samples of a file; those of a preference, which none of ours writes there, have no one answer.
fn read_samples(blobs: &Blobs, id: BlobId) -> Result<Vec<TokenSequence>, DatasetError> {
    let mut reader = DatasetReader::open(BlobFile::open(blobs, id)?)?;
    let count = (reader.sizes().len() as u32).min(SAMPLES_MAX);
    let mut sequences = Vec::new();
    for index in 0..count {
        sequences.extend(reader.read(index)?.sequences);
    }
    Ok(sequences)
}

/// The sum over a sample's targets, of whose tokens the log-probabilities are known.
fn loss_of(sample: &TokenSequence, logprobs: &[f64]) -> f64 {
    let of = |(row, _): (u32, u32)| logprobs.get(row as usize + 1).copied().unwrap_or(f64::NAN);
    -sample.labels().map(of).sum::<f64>()
}

/// No word in time.
fn lost() -> RequestFailure {
    RequestFailure {
        kind: FailureKind::Unavailable,
        message: "the scheduler did not answer in time".to_owned(),
        retry_after_ms: None,
    }
}

fn report(job: JobId, outcome: &Result<Comparison, String>) {
    match outcome {
        Ok(Comparison { candidate, served, count, .. }) => {
            tracing::info!(%job, candidate, served, count, "a job's adapter is compared with what is served");
        }
        Err(error) => tracing::warn!(%job, error, "a job's adapter cannot be compared with what is served"),
    }
}
