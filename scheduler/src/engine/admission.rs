//! Who is let in: what can be served at all, whose turn is when, and who would wait too long.

use super::events::Effect;
use super::queue::{Enqueued, Order};
use super::replica::Replica;
use super::sequence::{Audited, Sequence, State};
use super::{Engine, GatewayId};
use crate::time::Millis;
use ashlar_protocol::serving::{FailureKind, FromScheduler, RequestFailure, Submit};
use ashlar_vocabulary::SequenceId;

/// When to try again after a replica was lost, in milliseconds.
const RETRY_UNAVAILABLE_MS: u64 = 2_000;

impl Engine {
    /// Takes a choice in; its sequence, if it is new and was not refused.
    pub(super) fn submit(
        &mut self,
        now: Millis,
        gateway: GatewayId,
        submit: Box<Submit>,
        audit: Option<Audited>,
        effects: &mut Vec<Effect>,
    ) -> Option<SequenceId> {
        let choice = submit.id;
        // Whoever keeps choices knows which have ended, and has one computed again only where it wants that.
        if gateway != GatewayId::KEPT && self.ended.contains(&(gateway, choice)) {
            return None;
        }
        if let Some(&known) = self.by_choice.get(&choice) {
            if self.sequences.get(&known).is_some_and(|sequence| sequence.gateway == gateway) {
                return None;
            }
            // The gateway came back on another connection before the old one was seen to end.
            self.remove(known);
        }
        if let Err(error) = self.check_submit(now, &submit) {
            effects.push(Effect::ToGateway { gateway, message: FromScheduler::Failed { id: choice, error } });
            return None;
        }
        self.last_sequence += 1;
        let id = SequenceId(self.last_sequence);
        let key = submit.charge.map(|charge| charge.key);
        let turn = self.queue.next_turn(key);
        let order = Order { priority: submit.priority, turn, arrival: self.last_sequence };
        let patience =
            if submit.deadline_ms == 0 { self.config.deadline_default_ms } else { submit.deadline_ms };
        let deadline = now.plus(patience);
        if let Some(error) = self.too_long_a_wait(&submit, order, patience) {
            self.has_shed(now);
            effects.push(Effect::ToGateway { gateway, message: FromScheduler::Failed { id: choice, error } });
            return None;
        }
        match self.queue.push_new(order, id) {
            Enqueued::Waiting => {}
            Enqueued::Displaced(other) => {
                self.has_shed(now);
                let message = "the queue is full and more urgent requests arrived: try again later";
                self.fail(now, other, FailureKind::Overloaded, message.to_owned(), effects);
            }
            Enqueued::Full => {
                self.has_shed(now);
                let waiting = self.queue.len();
                let message = format!("{waiting} requests are waiting already: try again later");
                let error = self.failure(FailureKind::Overloaded, message);
                effects.push(Effect::ToGateway {
                    gateway,
                    message: FromScheduler::Failed { id: choice, error },
                });
                return None;
            }
        }
        let expected = self.expected_of(&submit);
        self.queue.take_turn(key, turn, expected);
        let digest = &self.config.model_digest;
        let sequence = Sequence::new(id, gateway, submit, order, (now, deadline), digest);
        let sequence = Sequence { audit, ..sequence };
        let nothing_wanted = sequence.submit.max_new_tokens == 0 && sequence.submit.sampling.prompt_logprobs;
        self.sequences.insert(id, sequence);
        self.by_choice.insert(choice, id);
        self.deadlines.insert((deadline, id));
        // A replay may be complete already.
        if let Some(reason) = self.end_reason(id, false).filter(|_| !nothing_wanted) {
            self.finish(now, id, reason, effects);
            return None;
        }
        Some(id)
    }

    /// Whether no replica has been up for so long, or will be, that those who have not begun are refused.
    pub(super) fn is_out_of_patience(&self, now: Millis) -> bool {
        let waited = |since| self.lasting_problem || now.since(since) >= self.config.repair_patience_ms;
        self.down_since.is_some_and(waited)
    }

    /// Ends what has waited for its first step all too long while no replica is up.
    pub(super) fn lose_patience(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if !self.is_out_of_patience(now) {
            return;
        }
        let not_begun = |sequence: &&Sequence| sequence.generated.is_empty();
        let waiting: Vec<SequenceId> =
            self.sequences.values().filter(not_begun).map(|sequence| sequence.id).collect();
        for id in waiting {
            let message = self.unavailable().message;
            self.fail(now, id, FailureKind::Unavailable, message, effects);
        }
    }

    /// Whether a submission can be served at all.
    fn check_submit(&self, now: Millis, submit: &Submit) -> Result<(), RequestFailure> {
        if submit.model_digest != self.config.model_digest {
            let message = format!(
                "this cluster serves model {}, not {}: submit again with the current digest",
                self.config.model_digest, submit.model_digest
            );
            return Err(self.failure(FailureKind::UnknownModel, message));
        }
        if let Some(adapter) = submit.adapter.filter(|adapter| !self.adapters.contains(adapter)) {
            let message =
                format!("the adapter {adapter} is not served any more: submit again with the current one");
            return Err(self.failure(FailureKind::UnknownModel, message));
        }
        if self.draining {
            let message = "this scheduler is shutting down: try again shortly".to_owned();
            return Err(self.failure(FailureKind::Leaving, message));
        }
        let prompt = submit.prompt.len();
        let context = self.config.max_context_tokens as usize;
        if prompt == 0 {
            return Err(
                self.failure(FailureKind::Invalid, "the prompt is empty: send at least one token".into())
            );
        }
        if prompt >= context && submit.max_new_tokens > 0 || prompt > context {
            let message = format!(
                "the prompt has {prompt} tokens, the context {context} with the answer: shorten the prompt"
            );
            return Err(self.failure(FailureKind::Invalid, message));
        }
        let mut tokens = submit.prompt.iter().chain(&submit.forced);
        if let Some(token) = tokens.find(|token| **token >= self.config.vocab_size) {
            let message = format!(
                "token {token} is not among the model's {}: the text names a token that the model lacks, or the gateway \
                 has the tokenizer of another model",
                self.config.vocab_size
            );
            return Err(self.failure(FailureKind::Invalid, message));
        }
        match self.capacity() {
            None if submit.forced.is_empty() && self.is_out_of_patience(now) => Err(self.unavailable()),
            Some(capacity) if submit.forced.is_empty() && prompt >= capacity => {
                Err(self.failure(FailureKind::Invalid, too_long(prompt, capacity)))
            }
            // One that has begun fitted once: it waits for a replica with room.
            None | Some(_) => Ok(()),
        }
    }

    /// Tokens that the largest cache of a replica holds; `None` while none is up.
    fn capacity(&self) -> Option<usize> {
        self.replicas.values().map(Replica::capacity_tokens).max()
    }

    fn unavailable(&self) -> RequestFailure {
        let problem = self.problem.clone();
        let message = problem.unwrap_or_else(|| "no replica is ready yet: try again shortly".to_owned());
        self.failure(FailureKind::Unavailable, message)
    }

    pub(super) fn failure(&self, kind: FailureKind, message: String) -> RequestFailure {
        RequestFailure { kind, message, retry_after_ms: self.retry_after_ms(kind) }
    }

    /// When trying again may help: after a loss, soon; after an overload, once a quarter of those waiting should be gone.
    pub(super) fn retry_after_ms(&self, kind: FailureKind) -> Option<u64> {
        match kind {
            FailureKind::Overloaded => {
                let quarter = self.predicted_wait_ms().map(|all| all / 4);
                let wait_ms = quarter.unwrap_or(250 * self.queue.len() as u64);
                Some(wait_ms.clamp(1_000, 60_000))
            }
            FailureKind::Unavailable | FailureKind::Leaving => Some(RETRY_UNAVAILABLE_MS),
            FailureKind::Invalid
            | FailureKind::UnknownModel
            | FailureKind::RateLimited
            | FailureKind::UnknownKey
            | FailureKind::DeadlineExceeded
            | FailureKind::Internal
            | FailureKind::Suspect
            | FailureKind::Cancelled => None,
        }
    }

    fn has_shed(&mut self, now: Millis) {
        self.counters.shed += 1;
        self.shed_at = Some(now);
    }

    /// How long all that waits will take, as far as that can be known.
    pub(super) fn predicted_wait_ms(&self) -> Option<u64> {
        self.pace.takes_ms(self.expected(self.queue.iter()))
    }

    /// Tokens that are still to be computed of these, as far as that can be known.
    fn expected(&self, waiting: impl Iterator<Item = SequenceId>) -> u64 {
        let waiting = waiting.filter_map(|id| self.sequences.get(&id));
        waiting.map(|sequence| self.expected_of(&sequence.submit)).sum()
    }

    fn expected_of(&self, submit: &Submit) -> u64 {
        submit.prompt.len() as u64 + self.pace.answer(submit.max_new_tokens)
    }

    /// Refuses a new sequence that would wait for a place longer than anybody shall, or than it has time.
    fn too_long_a_wait(&self, submit: &Submit, order: Order, patience_ms: u64) -> Option<RequestFailure> {
        if !submit.forced.is_empty() || submit.charge.is_some_and(|charge| charge.resumed) {
            return None;
        }
        let before = self.queue.before(order).count();
        let wait_ms = self.pace.takes_ms(self.expected(self.queue.before(order)))?;
        let most = self.config.queue_wait_ms_max.min(patience_ms);
        (wait_ms > most).then(|| RequestFailure {
            kind: FailureKind::Overloaded,
            message: format!(
                "{before} requests wait before this one, which will take about {} s: try again later",
                wait_ms.div_ceil(1_000)
            ),
            retry_after_ms: Some((wait_ms - most).clamp(1_000, 60_000)),
        })
    }

    /// Ends waiting sequences that have not begun and fit into no replica that is up.
    pub(super) fn refuse_too_long(&mut self, now: Millis, kind: FailureKind, effects: &mut Vec<Effect>) {
        let Some(capacity) = self.capacity() else { return };
        let is_too_long = |sequence: &&Sequence| {
            let waits = matches!(sequence.state, State::Waiting) && sequence.generated.is_empty();
            waits && sequence.len() >= capacity
        };
        let refused: Vec<(SequenceId, usize)> = self
            .sequences
            .values()
            .filter(is_too_long)
            .map(|sequence| (sequence.id, sequence.len()))
            .collect();
        for (id, len) in refused {
            self.fail(now, id, kind, too_long(len, capacity), effects);
        }
    }
}

fn too_long(tokens: usize, capacity: usize) -> String {
    format!(
        "the prompt has {tokens} tokens, the KV cache room for {capacity} with the answer: shorten the prompt or give the \
         nodes more memory"
    )
}
