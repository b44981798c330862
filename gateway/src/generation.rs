//! One client request in flight: its choices' transcripts, fed by the scheduler, watched by a deadline.

use crate::access::Caller;
use crate::app::{App, Phase, reached};
use crate::live::{Ended, Outcome, unix_s};
use crate::openai::error::ApiError;
use crate::scheduler_client::{Heard, RequestEvents};
use crate::text::AnswerDecoder;
use crate::transcript::{Delta, Effect, End, Transcript, TranscriptEvent, TranscriptSpec};
use ashlar_protocol::access::Charge;
use ashlar_protocol::serving::{ChoiceId, ClusterSnapshot, FailureKind, Receipt, RequestFailure, Submit};
use ashlar_tokenizer::{SpecialTokens, TextStart};
use ashlar_vocabulary::{AdapterId, ModelDigest, RequestId, SamplingParams, TokenId, TokenLogprobs};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::Span;

/// The scheduler enforces the deadline; the gateway does too, a little later, should the scheduler hang.
const DEADLINE_SLACK: Duration = Duration::from_secs(2);

/// A validated request, complete.
#[derive(Debug)]
pub(crate) struct GenerationSpec {
    pub(crate) id: RequestId,
    /// The adapter that changes the model; pinned.
    pub(crate) adapter: Option<AdapterId>,
    pub(crate) prompts: Vec<PromptSpec>,
    /// Choices per prompt.
    pub(crate) n: u32,
    /// As for choice 0.
    pub(crate) sampling: SamplingParams,
    pub(crate) stop_strings: Vec<String>,
    pub(crate) include_stop: bool,
    pub(crate) stop_tokens: Vec<TokenId>,
    pub(crate) special: SpecialTokens,
    pub(crate) start: TextStart,
    pub(crate) priority: i32,
    /// Whether it belongs to a stored response: dropping it only stops following it.
    pub(crate) kept: bool,
    /// Whether it has been let in before: it counts among what its key asks for already.
    pub(crate) resumed: bool,
    pub(crate) traceparent: Option<String>,
}

/// One prompt of a request.
#[derive(Debug)]
pub(crate) struct PromptSpec {
    pub(crate) tokens: Arc<[TokenId]>,
    pub(crate) max_new_tokens: u32,
}

/// Something for the client; `choice` counts over all prompts.
#[derive(Debug)]
pub(crate) enum Output {
    Delta { choice: usize, delta: Delta },
    End { choice: usize, end: End },
}

/// A request in flight. Dropping it cancels what is still running.
#[derive(Debug)]
pub(crate) struct Generation {
    app: Arc<App>,
    events: RequestEvents,
    transcripts: Vec<Transcript<AnswerDecoder>>,
    outputs: VecDeque<Output>,
    effects: Vec<Effect>,
    /// By choice, once ended.
    receipts: Vec<Option<Receipt>>,
    /// What was asked for: enough to submit any choice again.
    spec: GenerationSpec,
    model_digest: ModelDigest,
    deadline: Instant,
    phase: watch::Receiver<Phase>,
    started: Duration,
    span: Span,
}

/// Token counts of a whole request so far.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenCounts {
    /// Each prompt counts once, however many choices it has.
    pub(crate) prompt: usize,
    pub(crate) generated: usize,
    /// Prompt tokens found in the prefix cache by the first choice of each prompt.
    pub(crate) cached: usize,
}

/// What a generation waits for.
enum Happened {
    Heard(Heard),
    Deadline,
    Ending,
}

impl Generation {
    /// Submits all choices.
    pub(crate) fn start(
        app: &Arc<App>,
        cluster: &ClusterSnapshot,
        spec: GenerationSpec,
    ) -> Result<Generation, ApiError> {
        let now = app.now();
        let mut submits = Vec::new();
        let mut transcripts = Vec::new();
        let mut unread_max = 0;
        for prompt in &spec.prompts {
            // Descriptions of the prompt's tokens arrive in bursts before anything else can.
            let described = if spec.sampling.prompt_logprobs { prompt.tokens.len() } else { 0 };
            for choice_index in 0..spec.n {
                let id = ChoiceId { request: spec.id, choice: submits.len() as u32 };
                let most = prompt.max_new_tokens as usize + 2;
                // What is kept may have been said already, and then arrives at once.
                unread_max +=
                    described + if spec.kept { most } else { app.config.unread_tokens_max.min(most) };
                submits.push(spec.submit(
                    id,
                    prompt,
                    choice_index,
                    cluster.model_digest,
                    app.config.deadline(),
                    &app.caller,
                ));
                let decoder = app.text.decoder(spec.special, spec.start);
                transcripts.push(Transcript::new(now, spec.transcript(id, prompt), decoder));
            }
        }
        let events = app.scheduler.submit(submits, unread_max)?;
        Ok(Generation {
            app: app.clone(),
            events,
            receipts: vec![None; transcripts.len()],
            transcripts,
            outputs: VecDeque::new(),
            effects: Vec::new(),
            spec,
            model_digest: cluster.model_digest,
            deadline: Instant::now() + app.config.deadline() + DEADLINE_SLACK,
            phase: app.phase.clone(),
            started: now,
            span: Span::current(),
        })
    }

    /// The next output; `None` once every choice has ended. Cancellation-safe.
    pub(crate) async fn next(&mut self) -> Option<Output> {
        loop {
            if let Some(output) = self.outputs.pop_front() {
                return Some(output);
            }
            if self.transcripts.iter().all(Transcript::ended) {
                return None;
            }
            let happened = tokio::select! {
                heard = self.events.next() => Happened::Heard(heard),
                () = tokio::time::sleep_until(self.deadline) => Happened::Deadline,
                () = reached(&mut self.phase, Phase::Ending) => Happened::Ending,
            };
            match happened {
                Happened::Heard(Heard::Event(id, event)) => self.handle(id.choice as usize, event),
                Happened::Heard(Heard::SchedulerBack) => {
                    (0..self.transcripts.len())
                        .for_each(|choice| self.handle(choice, TranscriptEvent::SchedulerBack));
                }
                Happened::Heard(Heard::GivenUp(problem)) => {
                    self.fail_where(
                        |transcript| transcript.delivered().is_empty(),
                        FailureKind::Unavailable,
                        &problem,
                    );
                }
                Happened::Heard(Heard::Lagged) => self.fail_all(
                    FailureKind::Unavailable,
                    "the connection was too slow to take the answer: read faster, or ask for less",
                ),
                Happened::Deadline => self.fail_all(
                    FailureKind::DeadlineExceeded,
                    "the request took too long: ask for less, or retry later",
                ),
                Happened::Ending => self.fail_all(
                    FailureKind::Unavailable,
                    "the server is shutting down: retry elsewhere or in a moment",
                ),
            }
        }
    }

    /// Prompt log-probabilities of a choice, by position.
    pub(crate) fn prompt_logprobs(&self, choice: usize) -> &[Option<TokenLogprobs>] {
        self.transcripts.get(choice).map_or(&[], Transcript::prompt_logprobs)
    }

    /// Token counts so far.
    pub(crate) fn counts(&self) -> TokenCounts {
        // The first choice of each prompt found what was cached before; the others share what it computed.
        let first_choices = self.transcripts.iter().zip(&self.receipts).step_by(self.choices_per_prompt());
        let cached = first_choices.map(|(transcript, receipt)| {
            receipt.as_ref().map_or(transcript.cached_tokens(), |receipt| receipt.cached_tokens) as usize
        });
        TokenCounts {
            prompt: self.spec.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            generated: self.transcripts.iter().map(|transcript| transcript.delivered().len()).sum(),
            cached: cached.sum(),
        }
    }

    /// Receipts of the choices that have ended.
    pub(crate) fn receipts(&self) -> impl Iterator<Item = &Receipt> {
        self.receipts.iter().flatten()
    }

    fn choices_per_prompt(&self) -> usize {
        self.spec.n.max(1) as usize
    }

    fn fail_all(&mut self, kind: FailureKind, message: &str) {
        self.fail_where(|_| true, kind, message);
    }

    fn fail_where(
        &mut self,
        shall: impl Fn(&Transcript<AnswerDecoder>) -> bool,
        kind: FailureKind,
        message: &str,
    ) {
        for choice in 0..self.transcripts.len() {
            let fails = |transcript: &Transcript<AnswerDecoder>| !transcript.ended() && shall(transcript);
            if self.transcripts.get(choice).is_some_and(fails) {
                let failure = RequestFailure { kind, message: message.to_owned(), retry_after_ms: None };
                self.handle(choice, TranscriptEvent::Failed(failure));
            }
        }
    }

    fn handle(&mut self, choice: usize, event: TranscriptEvent) {
        if let TranscriptEvent::Quota(quota) = event {
            // The first word counts: the answer's head tells how it was when the request was let in.
            let _ = self.app.quota.set(quota);
            return;
        }
        let Some(transcript) = self.transcripts.get_mut(choice) else { return };
        let now = self.app.now();
        let (before, last_token_at) = (transcript.delivered().len(), transcript.last_token_at());
        transcript.handle(now, event, &mut self.effects);
        if transcript.delivered().len() > before {
            match last_token_at {
                None => {
                    let after = now.saturating_sub(self.started);
                    self.app.metrics.first_token(after);
                    self.app.live.first_token(after);
                }
                Some(last) => {
                    let after = now.saturating_sub(last);
                    self.app.metrics.next_token(after);
                    self.app.live.next_token(after);
                }
            }
        }
        let id = transcript.id();
        let mut resubmitted = None;
        for effect in self.effects.drain(..) {
            match effect {
                Effect::Deliver(delta) => self.outputs.push_back(Output::Delta { choice, delta }),
                Effect::Cancel => self.events.cancel(id),
                Effect::Resubmit { forced } => resubmitted = Some(forced),
                Effect::End(end) => {
                    match &end {
                        End::Failed(failure) => {
                            // Whatever failed it, the scheduler may still be computing.
                            self.events.cancel(id);
                            let whose = self.app.caller.key_id();
                            let urgency = self.app.caller.priority(self.spec.priority);
                            let quota = self.app.quota.get();
                            let at = std::time::Instant::now();
                            self.app.refusals.heard(at, (whose, urgency), failure, quota);
                        }
                        End::Finished { receipt, .. } => {
                            if let Some(place) = self.receipts.get_mut(choice) {
                                *place = Some(receipt.clone());
                            }
                        }
                    }
                    let took = now.saturating_sub(self.started);
                    self.app.metrics.ended(&end, took);
                    let (outcome, error, receipt) = match &end {
                        End::Finished { reason, receipt } => ((*reason).into(), None, Some(receipt.clone())),
                        End::Failed(failure) => (Outcome::Failed, Some(failure.message.clone()), None),
                    };
                    self.app.live.ended(Ended {
                        id,
                        model: self.app.name_of(self.spec.adapter),
                        unix_s: unix_s(),
                        outcome,
                        error,
                        took,
                        first_token: transcript.time_to_first_token(),
                        receipt,
                    });
                    self.outputs.push_back(Output::End { choice, end });
                }
            }
        }
        if let Some(forced) = resubmitted {
            self.resubmit(id, forced);
        }
    }

    /// Submits a choice again, with what it has received and what is left of its time.
    fn resubmit(&mut self, id: ChoiceId, forced: Vec<TokenId>) {
        let n = self.choices_per_prompt();
        let (prompt, choice_index) = (id.choice as usize / n, id.choice as usize % n);
        let Some(prompt) = self.spec.prompts.get(prompt) else { return };
        let left = self.deadline.saturating_duration_since(Instant::now()).saturating_sub(DEADLINE_SLACK);
        let left = left.max(Duration::from_millis(1));
        let caller = &self.app.caller;
        let submit = self.spec.submit(id, prompt, choice_index as u32, self.model_digest, left, caller);
        let charge = submit.charge.map(|charge| Charge { resumed: true, ..charge });
        let transcript = self.transcripts.get(id.choice as usize);
        let forced_logprobs = transcript.map_or(Vec::new(), |known| known.delivered_logprobs().to_vec());
        self.app.metrics.resubmitted();
        self.events.resubmit(Submit { forced, forced_logprobs, charge, ..submit });
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        let took = self.app.now().saturating_sub(self.started);
        // A stored response goes on without who follows it.
        for transcript in self.transcripts.iter().filter(|transcript| !transcript.ended() && !self.spec.kept)
        {
            self.app.live.ended(Ended {
                id: transcript.id(),
                model: self.app.name_of(self.spec.adapter),
                unix_s: unix_s(),
                outcome: Outcome::Cancelled,
                error: None,
                took,
                first_token: transcript.time_to_first_token(),
                receipt: None,
            });
        }
        let counts = self.counts();
        self.span
            .record("gen_ai.usage.input_tokens", counts.prompt)
            .record("gen_ai.usage.output_tokens", counts.generated);
    }
}

impl GenerationSpec {
    fn submit(
        &self,
        id: ChoiceId,
        prompt: &PromptSpec,
        choice_index: u32,
        model_digest: ModelDigest,
        deadline: Duration,
        caller: &Caller,
    ) -> Submit {
        // What several choices share is paid for once.
        let requests = u32::from(id.choice == 0);
        let prompt_tokens = if choice_index == 0 { prompt.tokens.len() as u32 } else { 0 };
        Submit {
            adapter: self.adapter,
            id,
            model_digest,
            prompt: prompt.tokens.to_vec(),
            forced: Vec::new(),
            forced_logprobs: Vec::new(),
            kept: self.kept,
            max_new_tokens: prompt.max_new_tokens,
            stop_tokens: self.stop_tokens.clone(),
            sampling: SamplingParams { choice_index, ..self.sampling.clone() },
            tenant_salt: caller.salt(),
            charge: caller.charge(requests, prompt_tokens, self.resumed),
            priority: caller.priority(self.priority),
            deadline_ms: deadline.as_millis() as u64,
            traceparent: self.traceparent.clone(),
        }
    }

    fn transcript(&self, id: ChoiceId, prompt: &PromptSpec) -> TranscriptSpec {
        TranscriptSpec {
            id,
            prompt: prompt.tokens.clone(),
            stop_strings: self.stop_strings.clone(),
            include_stop: self.include_stop,
            stop_tokens: self.stop_tokens.clone(),
            min_tokens: self.sampling.min_tokens,
            keep_logprobs: self.kept,
        }
    }
}
