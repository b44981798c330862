//! What comes back from the ranks, and how sequences end.

use super::Engine;
use super::events::Effect;
use super::replica::InFlight;
use super::sequence::{Sequence, State};
use crate::audit::{self, Transcript};
use crate::time::Millis;
use ashlar_protocol::serving::{FailureKind, FinishReason, FromScheduler, RequestFailure, TokenEvent};
use ashlar_protocol::step::{PromptLogprobs, SampledToken, StepResult, StepTiming};
use ashlar_vocabulary::{ReplicaId, ReplicaRevision, SequenceId, StageIndex, StepId};

impl Engine {
    /// Applies the answer to a step. A stale or repeated one changes nothing; one that skips a step means that an answer
    /// is lost, and with it tokens: the replica is given up.
    pub(super) fn step_result(
        &mut self,
        now: Millis,
        id: ReplicaId,
        result: StepResult,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        let Some(oldest) = replica.in_flight.front().map(|flight| flight.step) else { return };
        if result.term != replica.term || result.revision != replica.revision || result.step < oldest {
            return;
        }
        if result.step > oldest {
            let reason = format!("step {} was answered before step {oldest}", result.step);
            let revision = replica.revision;
            self.replica_down(now, id, effects);
            effects.push(Effect::ReplicaFault { replica: id, revision, reason });
            return;
        }
        let Some(mut flight) = replica.in_flight.pop_front() else { return };
        replica.steps += 1;
        let last_stage = replica.num_stages - 1;
        replica.cost.observe(last_stage, flight.work_of(last_stage), busy_us(&result.timing));
        flight.note(last_stage, &result.timing);
        self.account(&flight);
        self.counters.steps += 1;
        self.pace.computed(now, self.counters.scheduled_tokens, !self.queue.is_empty());
        for logprobs in result.prompt_logprobs {
            self.prompt_logprobs(logprobs, effects);
        }
        for failed in result.failed {
            self.forget_blocks(failed.id);
            if self.sequences.get(&failed.id).is_some_and(|sequence| sequence.replica() == Some(id)) {
                self.fail(now, failed.id, failed.kind, failed.message, effects);
            }
        }
        for sampled in result.sampled {
            self.sampled(now, flight.step, sampled, effects);
        }
        self.unanswered(now, &flight, effects);
    }

    /// Corrects the prediction by what a stage other than the last reports.
    pub(super) fn step_done(
        &mut self,
        id: ReplicaId,
        revision: ReplicaRevision,
        stage: StageIndex,
        step: StepId,
        timing: &StepTiming,
    ) {
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| replica.revision == revision) else {
            return;
        };
        let stage = stage.0 as usize;
        let Some(flight) = replica.in_flight.iter_mut().find(|flight| flight.step == step) else { return };
        flight.note(stage, timing);
        replica.cost.observe(stage, flight.work_of(stage), busy_us(timing));
    }

    /// Puts a step down in the receipts of its sequences.
    fn account(&mut self, flight: &InFlight) {
        for id in &flight.members {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            if sequence.stages.len() < flight.spent.len() {
                sequence.stages.resize(flight.spent.len(), StepTiming::default());
            }
            for (sum, spent) in sequence.stages.iter_mut().zip(&flight.spent) {
                sum.add(spent);
            }
        }
    }

    fn sampled(&mut self, now: Millis, step: StepId, sampled: SampledToken, effects: &mut Vec<Effect>) {
        // An ended sequence, or a token that was answered before.
        let Some(sequence) = self.sequences.get_mut(&sampled.id) else { return };
        if !sequence.end_sampling(step) {
            return;
        }
        if sampled.position as usize != sequence.len() {
            let message =
                format!("the last stage sampled position {} of {}", sampled.position, sequence.len());
            self.fail(now, sampled.id, FailureKind::Internal, message, effects);
            return;
        }
        if sequence.generated.len() >= sequence.submit.max_new_tokens as usize {
            // Only the prompt's log-probabilities were wanted.
            self.finish(now, sampled.id, FinishReason::Length, effects);
            return;
        }
        let index = sequence.generated.len() as u32;
        sequence.push(sampled.token, now);
        let gateway = sequence.gateway;
        if let Some(key) = sequence.key() {
            *self.generated.entry(key).or_default() += 1;
        }
        let (cached_tokens, queue_ms) = (sequence.history.cached_tokens, sequence.queue_ms(now));
        let event = TokenEvent {
            id: sequence.submit.id,
            index,
            token: sampled.token,
            logprobs: sampled.logprobs,
            cached_tokens,
            queue_ms,
        };
        self.counters.generated_tokens += 1;
        effects.push(Effect::ToGateway { gateway, message: FromScheduler::Token(event) });
        if let Some(reason) = self.end_reason(sampled.id, sampled.grammar_complete) {
            self.finish(now, sampled.id, reason, effects);
        }
    }

    /// Why a sequence is complete, if it is.
    pub(super) fn end_reason(&self, id: SequenceId, grammar_complete: bool) -> Option<FinishReason> {
        let sequence = self.sequences.get(&id)?;
        let stopped =
            sequence.generated.last().is_some_and(|last| sequence.submit.stop_tokens.contains(last));
        if stopped || grammar_complete {
            return Some(FinishReason::Stop);
        }
        let capacity = sequence.replica().and_then(|replica| self.replicas.get(&replica));
        let capacity = capacity.map_or(usize::MAX, super::replica::Replica::capacity_tokens);
        let longest = (self.config.max_context_tokens as usize).min(capacity);
        let complete = sequence.generated.len() >= sequence.submit.max_new_tokens as usize;
        (complete || sequence.len() >= longest).then_some(FinishReason::Length)
    }

    /// Delivers prompt log-probabilities that have not been delivered; a recomputed prompt brings them again.
    fn prompt_logprobs(&mut self, answer: PromptLogprobs, effects: &mut Vec<Effect>) {
        let Some(sequence) = self.sequences.get_mut(&answer.id) else { return };
        let end = answer.position + answer.logprobs.len() as u32;
        let from = sequence.prompt_logprobs_from.max(answer.position);
        if !sequence.submit.sampling.prompt_logprobs || from >= end {
            return;
        }
        let logprobs = answer.logprobs.into_iter().skip((from - answer.position) as usize).collect();
        sequence.prompt_logprobs_from = end;
        let id = sequence.submit.id;
        let message = FromScheduler::PromptLogprobs { id, position: from, logprobs };
        effects.push(Effect::ToGateway { gateway: sequence.gateway, message });
    }

    /// Sequences whose token was expected in this step and did not come.
    fn unanswered(&mut self, now: Millis, flight: &InFlight, effects: &mut Vec<Effect>) {
        for &id in &flight.sampling {
            let sampling = self.sequences.get(&id).and_then(Sequence::sampling);
            if sampling == Some(flight.step) {
                let message = format!("the last stage answered step {} without a token", flight.step);
                self.fail(now, id, FailureKind::Internal, message, effects);
            }
        }
    }

    /// Nobody may hit the blocks of a sequence whose computation failed.
    fn forget_blocks(&mut self, id: SequenceId) {
        let Some(running) = self.sequences.get(&id).and_then(Sequence::running) else { return };
        if let Some(replica) = self.replicas.get_mut(&running.replica) {
            running.blocks.iter().for_each(|&block| replica.pool.forget(block));
        }
    }

    pub(super) fn finish(
        &mut self,
        now: Millis,
        id: SequenceId,
        reason: FinishReason,
        effects: &mut Vec<Effect>,
    ) {
        let replica = self.sequences.get(&id).and_then(Sequence::replica);
        let Some(sequence) = self.take_out(id) else { return };
        self.note_end(now, &sequence);
        if sequence.audit.is_some() {
            let transcript = replica.map(|replica| Transcript {
                replica,
                submit: sequence.submit.clone(),
                generated: sequence.generated.clone(),
            });
            effects.push(Effect::Audit(audit::Event::Ended { sequence: id, transcript }));
        }
        let message =
            FromScheduler::Finished { id: sequence.submit.id, reason, receipt: sequence.receipt(now) };
        effects.push(Effect::ToGateway { gateway: sequence.gateway, message });
    }

    pub(super) fn fail(
        &mut self,
        now: Millis,
        id: SequenceId,
        kind: FailureKind,
        message: String,
        effects: &mut Vec<Effect>,
    ) {
        let Some(sequence) = self.remove(id) else { return };
        self.note_end(now, &sequence);
        let error = RequestFailure { kind, message, retry_after_ms: self.retry_after_ms(kind) };
        let message = FromScheduler::Failed { id: sequence.submit.id, error };
        effects.push(Effect::ToGateway { gateway: sequence.gateway, message });
    }

    /// Takes a sequence out of every list before it is complete.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        let sequence = self.take_out(id)?;
        if sequence.audit.is_some() {
            self.audits_ended.push(id);
        }
        Some(sequence)
    }

    /// Takes a sequence out of every list; its blocks go back, and its ranks will be told.
    fn take_out(&mut self, id: SequenceId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.by_choice.remove(&sequence.submit.id);
        self.deadlines.remove(&(sequence.deadline, id));
        self.queue.remove(sequence.order);
        let introduced = sequence.introduced();
        if let Some(replica) = sequence.replica().and_then(|replica| self.replicas.get_mut(&replica)) {
            replica.running.remove(&sequence.order);
            if introduced {
                replica.ended.push(id);
            }
            if let State::Running(running) = &mut sequence.state {
                for block in std::mem::take(&mut running.blocks).into_iter().rev() {
                    replica.pool.release(block);
                }
            }
        }
        Some(sequence)
    }
}

/// Time that a rank was busy with a step, as opposed to waiting for it.
fn busy_us(timing: &StepTiming) -> u64 {
    timing.compute_us + timing.collective_us
}
