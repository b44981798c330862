//! The transcript of one choice: what was asked, what has been delivered, and what may still be said.
//!
//! It is all that a choice needs to outlive whatever computes it: when a scheduler is reached again, the choice is submitted with
//! the tokens that have been delivered, which are forced, and goes on with the next one.
//!
//! A pure core: [`Transcript::handle`] takes the time and an event and pushes effects; it has no clock, no I/O, no
//! randomness and no async. A shell feeds it events of the scheduler and performs the effects.
//!
//! **Invariants:** only the next token index is accepted, so a duplicate never reaches the client and a gap ends the
//! choice with an error. A character is never split. The text of a stop string, the stop token and everything after
//! them is absent from text, log-probabilities and usage. After [`Effect::End`] there are no more effects.

mod stop;

pub use stop::{Released, StopMatcher};

use ashlar_protocol::access::Quota;
use ashlar_protocol::serving::{
    ChoiceId, FailureKind, FinishReason, FromScheduler, Receipt, RequestFailure, TokenEvent,
};
use ashlar_vocabulary::{TokenId, TokenLogprobs};
use std::sync::Arc;
use std::time::Duration;

/// Turns tokens into text, a whole character at a time.
pub trait TokenDecoder {
    /// The text that `token` completes; empty while a character is incomplete.
    fn push(&mut self, token: TokenId) -> String;
    /// What is left of an incomplete character, as replacement characters.
    fn finish(&mut self) -> String;
}

/// What a transcript needs to know of its request.
#[derive(Debug, Clone)]
pub struct TranscriptSpec {
    /// Which choice.
    pub id: ChoiceId,
    /// Its prompt.
    pub prompt: Arc<[TokenId]>,
    /// Strings that end the answer.
    pub stop_strings: Vec<String>,
    /// Whether stop strings and stop tokens are themselves output.
    pub include_stop: bool,
    /// Tokens that end the answer; the scheduler stops on them, the transcript hides them.
    pub stop_tokens: Vec<TokenId>,
    /// Stop strings are not looked for in this many first tokens.
    pub min_tokens: u32,
    /// Whether log-probabilities that have been delivered are needed again, for whoever takes the choice up.
    pub keep_logprobs: bool,
}

/// What can happen to a choice.
#[derive(Debug, Clone, PartialEq)]
pub enum TranscriptEvent {
    /// The scheduler delivered a token.
    Token(TokenEvent),
    /// The scheduler described prompt tokens, from `position` on.
    PromptLogprobs {
        /// Position of the first described token.
        position: u32,
        /// One per position.
        logprobs: Vec<TokenLogprobs>,
    },
    /// The scheduler ended the choice.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        receipt: Receipt,
    },
    /// What is left of the limits of the key that asks. It changes nothing about the answer.
    Quota(Quota),
    /// The choice failed, at the scheduler or on the way to it.
    Failed(RequestFailure),
    /// The scheduler was lost, and one has been reached again.
    SchedulerBack,
    /// Nobody is listening any more.
    ClientGone,
}

impl TranscriptEvent {
    /// What a message of the scheduler says to which choice; `None` where it says nothing to any, or several things. A choice that a leaving scheduler
    /// does not take is not told: it is submitted to the next one.
    pub fn of(message: FromScheduler) -> Option<(ChoiceId, TranscriptEvent)> {
        match message {
            FromScheduler::Token(token) => Some((token.id, TranscriptEvent::Token(token))),
            FromScheduler::PromptLogprobs { id, position, logprobs } => {
                Some((id, TranscriptEvent::PromptLogprobs { position, logprobs }))
            }
            FromScheduler::Finished { id, reason, receipt } => {
                Some((id, TranscriptEvent::Finished { reason, receipt }))
            }
            FromScheduler::Failed { error, .. } if error.kind == FailureKind::Leaving => None,
            FromScheduler::Failed { id, error } => Some((id, TranscriptEvent::Failed(error))),
            FromScheduler::Quota { id, quota } => Some((id, TranscriptEvent::Quota(quota))),
            FromScheduler::Cluster(_)
            | FromScheduler::Keys(_)
            | FromScheduler::Models(_)
            | FromScheduler::Beat
            | FromScheduler::Admin { .. }
            | FromScheduler::Prepare(_)
            | FromScheduler::Compare(_)
            | FromScheduler::Adopt(_)
            | FromScheduler::Tokens(_) => None,
        }
    }

    /// Whether nothing follows.
    pub fn is_last(&self) -> bool {
        matches!(self, TranscriptEvent::Finished { .. } | TranscriptEvent::Failed(_))
    }
}

/// What the shell has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Give this to the client.
    Deliver(Delta),
    /// Tell the scheduler to stop this choice.
    Cancel,
    /// Submit the choice again, with these tokens forced.
    Resubmit {
        /// What has been delivered.
        forced: Vec<TokenId>,
    },
    /// The choice is over; no effect follows.
    End(End),
}

/// More of an answer.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Delta {
    /// New text.
    pub text: String,
    /// Tokens whose text is now complete.
    pub tokens: Vec<OutputToken>,
}

/// A token that is part of the answer.
#[derive(Debug, Clone, PartialEq)]
pub struct OutputToken {
    /// The token.
    pub token: TokenId,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Characters of the answer before this token.
    pub text_offset: usize,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// With an answer.
    Finished {
        /// Why it is not longer.
        reason: FinishReason,
        /// What it took; after a stop string, as far as the gateway can tell.
        receipt: Receipt,
    },
    /// With an error.
    Failed(RequestFailure),
}

/// The state of one choice.
#[derive(Debug, Clone)]
pub struct Transcript<D> {
    spec: TranscriptSpec,
    decoder: D,
    matcher: StopMatcher,
    delivered: Vec<TokenId>,
    delivered_logprobs: Vec<Option<TokenLogprobs>>,
    cached_tokens: u32,
    queue_ms: u64,
    prompt_logprobs: Vec<Option<TokenLogprobs>>,
    unreleased: Vec<Group>,
    open: Group,
    decoded: Position,
    released_bytes: usize,
    stop_token_seen: bool,
    resubmissions: u32,
    ended: bool,
    started_at: Duration,
    first_token_at: Option<Duration>,
    last_token_at: Option<Duration>,
}

/// Tokens that together make whole characters.
#[derive(Debug, Default, Clone)]
struct Group {
    tokens: Vec<OutputToken>,
    start_bytes: usize,
    end_bytes: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Position {
    bytes: usize,
    chars: usize,
}

impl<D: TokenDecoder> Transcript<D> {
    /// A transcript of a choice that is submitted `now`.
    pub fn new(now: Duration, spec: TranscriptSpec, decoder: D) -> Transcript<D> {
        Transcript {
            matcher: StopMatcher::new(&spec.stop_strings, spec.include_stop),
            spec,
            decoder,
            delivered: Vec::new(),
            delivered_logprobs: Vec::new(),
            cached_tokens: 0,
            queue_ms: 0,
            prompt_logprobs: Vec::new(),
            unreleased: Vec::new(),
            open: Group::default(),
            decoded: Position::default(),
            released_bytes: 0,
            stop_token_seen: false,
            resubmissions: 0,
            ended: false,
            started_at: now,
            first_token_at: None,
            last_token_at: None,
        }
    }

    /// Takes one event at time `now` and appends what is to be done.
    pub fn handle(&mut self, now: Duration, event: TranscriptEvent, effects: &mut Vec<Effect>) {
        if self.ended {
            return;
        }
        match event {
            TranscriptEvent::Token(event) => self.token(now, event, effects),
            TranscriptEvent::PromptLogprobs { position, logprobs } => {
                self.describe_prompt(position, logprobs, effects);
            }
            TranscriptEvent::Finished { reason, receipt } => self.finish(reason, receipt, effects),
            TranscriptEvent::Quota(_) => {}
            TranscriptEvent::Failed(failure) => self.end(End::Failed(failure), effects),
            TranscriptEvent::SchedulerBack => {
                self.resubmissions += 1;
                effects.push(Effect::Resubmit { forced: self.delivered.clone() });
            }
            TranscriptEvent::ClientGone => {
                self.ended = true;
                effects.push(Effect::Cancel);
            }
        }
    }

    /// Which choice this is.
    pub fn id(&self) -> ChoiceId {
        self.spec.id
    }

    /// The prompt.
    pub fn prompt(&self) -> &[TokenId] {
        &self.spec.prompt
    }

    /// Tokens accepted so far: what a re-submission forces, and what usage counts.
    pub fn delivered(&self) -> &[TokenId] {
        &self.delivered
    }

    /// What was said of these tokens, where that is kept; else nothing.
    pub fn delivered_logprobs(&self) -> &[Option<TokenLogprobs>] {
        &self.delivered_logprobs
    }

    /// Prompt tokens that came from the prefix cache, as far as known: from the first token on.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens
    }

    /// Log-probabilities of the prompt by position, as far as received; `None` where there are none (the first).
    pub fn prompt_logprobs(&self) -> &[Option<TokenLogprobs>] {
        &self.prompt_logprobs
    }

    /// Whether the choice is over.
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// From submission to the first token, once there is one.
    pub fn time_to_first_token(&self) -> Option<Duration> {
        self.first_token_at.map(|at| at.saturating_sub(self.started_at))
    }

    /// When the last token arrived.
    pub fn last_token_at(&self) -> Option<Duration> {
        self.last_token_at
    }

    fn token(&mut self, now: Duration, event: TokenEvent, effects: &mut Vec<Effect>) {
        let next = self.delivered.len() as u32;
        if event.index < next {
            return;
        }
        if event.index > next || self.stop_token_seen {
            let message = format!("expected token {next} of the answer and received {}", event.index);
            return self.abandon(message, effects);
        }
        self.first_token_at.get_or_insert(now);
        self.last_token_at = Some(now);
        self.delivered.push(event.token);
        if self.spec.keep_logprobs {
            self.delivered_logprobs.push(event.logprobs.clone());
        }
        (self.cached_tokens, self.queue_ms) = (event.cached_tokens, event.queue_ms);
        if self.spec.stop_tokens.contains(&event.token) {
            self.stop_token_seen = true;
            if !self.spec.include_stop {
                return;
            }
        }
        self.open.tokens.push(OutputToken {
            token: event.token,
            logprobs: event.logprobs,
            text_offset: self.decoded.chars,
        });
        let piece = self.decoder.push(event.token);
        let looks_for_stops = event.index >= self.spec.min_tokens && !self.stop_token_seen;
        self.text(&piece, looks_for_stops, effects);
    }

    /// Takes text that the decoder has completed and delivers what is certain of it.
    fn text(&mut self, piece: &str, looks_for_stops: bool, effects: &mut Vec<Effect>) {
        if piece.is_empty() {
            return;
        }
        self.decoded.bytes += piece.len();
        self.decoded.chars += piece.chars().count();
        self.open.end_bytes = self.decoded.bytes;
        let next = Group { start_bytes: self.decoded.bytes, ..Group::default() };
        self.unreleased.push(std::mem::replace(&mut self.open, next));

        let released = if looks_for_stops {
            self.matcher.push(piece)
        } else {
            Released { text: self.matcher.finish() + piece, stopped: false }
        };
        self.released_bytes += released.text.len();
        if !released.stopped {
            return self.deliver(released.text, Group::is_released_whole, effects);
        }
        self.deliver(released.text, Group::is_released_in_part, effects);
        let receipt = self.receipt_so_far();
        effects.push(Effect::Cancel);
        self.end(End::Finished { reason: FinishReason::Stop, receipt }, effects);
    }

    fn deliver(&mut self, text: String, may_go: fn(&Group, usize) -> bool, effects: &mut Vec<Effect>) {
        let go = self.unreleased.iter().take_while(|group| may_go(group, self.released_bytes)).count();
        let tokens: Vec<_> = self.unreleased.drain(..go).flat_map(|group| group.tokens).collect();
        if !text.is_empty() || !tokens.is_empty() {
            effects.push(Effect::Deliver(Delta { text, tokens }));
        }
    }

    fn describe_prompt(&mut self, position: u32, logprobs: Vec<TokenLogprobs>, effects: &mut Vec<Effect>) {
        let start = position as usize;
        if start + logprobs.len() > self.spec.prompt.len() {
            return self.abandon("received log-probabilities beyond the prompt".to_owned(), effects);
        }
        // After a resubmission they come again, perhaps in other pieces.
        let known = self.prompt_logprobs.len().saturating_sub(start);
        if known < logprobs.len() {
            self.prompt_logprobs.resize(start + known, None);
            self.prompt_logprobs.extend(logprobs.into_iter().skip(known).map(Some));
        }
    }

    fn finish(&mut self, reason: FinishReason, receipt: Receipt, effects: &mut Vec<Effect>) {
        let rest = self.decoder.finish();
        self.text(&rest, !self.stop_token_seen, effects);
        if self.ended {
            return;
        }
        let text = self.matcher.finish();
        self.released_bytes += text.len();
        let last = std::mem::take(&mut self.open);
        self.unreleased.push(last);
        self.deliver(text, |_, _| true, effects);
        let receipt = Receipt { replays: receipt.replays + self.resubmissions, ..receipt };
        self.end(End::Finished { reason, receipt }, effects);
    }

    /// Ends the choice because the scheduler broke the contract.
    fn abandon(&mut self, message: String, effects: &mut Vec<Effect>) {
        effects.push(Effect::Cancel);
        let failure = RequestFailure { kind: FailureKind::Internal, message, retry_after_ms: None };
        self.end(End::Failed(failure), effects);
    }

    fn end(&mut self, end: End, effects: &mut Vec<Effect>) {
        self.ended = true;
        effects.push(Effect::End(end));
    }

    fn receipt_so_far(&self) -> Receipt {
        let decode =
            self.last_token_at.zip(self.first_token_at).map(|(last, first)| last.saturating_sub(first));
        Receipt {
            prompt_tokens: self.spec.prompt.len() as u32,
            generated_tokens: self.delivered.len() as u32,
            cached_tokens: self.cached_tokens,
            queue_ms: self.queue_ms,
            prefill_ms: self.time_to_first_token().unwrap_or_default().as_millis() as u64,
            decode_ms: decode.unwrap_or_default().as_millis() as u64,
            replays: self.resubmissions,
            ..Receipt::default()
        }
    }
}

impl Group {
    fn is_released_whole(&self, released_bytes: usize) -> bool {
        self.end_bytes <= released_bytes
    }

    fn is_released_in_part(&self, released_bytes: usize) -> bool {
        self.start_bytes < released_bytes
    }
}

#[cfg(test)]
mod tests;
