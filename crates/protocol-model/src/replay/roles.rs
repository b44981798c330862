//! What the gateway and the schedulers do, and what goes wrong.

use super::state::{Answer, Event, Scheduler, Sequence, State, Stray};
use super::{Action, Kind, Replay, token_after};
use ashlar_gateway::transcript::{Effect, End, TranscriptEvent};
use ashlar_protocol::serving::{FinishReason, Receipt, TokenEvent};
use std::time::Duration;

/// Adds what can happen: an action, whether it is a fault, and what comes of it.
pub(super) type Add<'a> = dyn FnMut(Action, bool, &dyn Fn(&mut State)) + 'a;

impl Replay {
    pub(super) fn gateway_steps(&self, state: &State, add: &mut Add<'_>) {
        if state.choice.transcript.ended() {
            return;
        }
        match state.link {
            None => {
                for number in 0..2 {
                    add(Action::Connect(number), false, &|next| {
                        next.connections += 1;
                        next.link = Some((number, next.connections));
                    });
                }
            }
            Some((number, _)) => {
                if !state.submissions.is_empty() {
                    add(Action::Take, false, &|next| self.take(next, number));
                }
            }
        }
        // The first submission may be on its way to the connection of which the choice has not heard yet.
        if !state.submitted {
            add(Action::Submit, false, &|next| {
                next.submitted = true;
                if next.link.is_some() {
                    next.submissions.push_back(Vec::new());
                }
            });
        } else if state.heard_of < state.connections && self.rules.resubmits {
            add(Action::Back, false, &|next| {
                next.heard_of = next.connections;
                self.feed(next, TranscriptEvent::SchedulerBack);
            });
        }
        if !(state.mailbox.is_empty() && state.wire.is_empty()) {
            add(Action::Deliver, false, &|next| {
                let event = next.mailbox.pop_front().or_else(|| next.wire.pop_front());
                let Some(event) = event else { return };
                self.deliver(next, event);
            });
        }
    }

    pub(super) fn scheduler_steps(&self, state: &State, number: usize, add: &mut Add<'_>) {
        let scheduler = &state.schedulers[number];
        if let Some(sequence) = &scheduler.sequence {
            if state.link != Some((number, sequence.connection)) {
                add(Action::Forget(number), false, &|next| next.schedulers[number].sequence = None);
            }
            if scheduler.is_up && !scheduler.in_flight {
                add(Action::Ask(number), false, &|next| {
                    let scheduler = &mut next.schedulers[number];
                    let Some(sequence) = &scheduler.sequence else { return };
                    (scheduler.steps, scheduler.in_flight) = (scheduler.steps + 1, true);
                    scheduler.answers.push_back(Answer {
                        sequence: scheduler.sequences,
                        revision: scheduler.revision,
                        step: scheduler.steps,
                        position: sequence.tokens.len() as u8,
                        token: token_after(&sequence.tokens),
                    });
                });
            }
        }
        if !scheduler.answers.is_empty() {
            add(Action::Hear(number), false, &|next| self.hear(next, number));
        }
        if !scheduler.is_up {
            add(Action::Repair(number), false, &|next| {
                let scheduler = &mut next.schedulers[number];
                (scheduler.is_up, scheduler.revision, scheduler.steps) = (true, scheduler.revision + 1, 0);
            });
        }
    }

    /// A submission is ignored where the choice is known of the same connection, running or ended.
    fn take(&self, state: &mut State, number: usize) {
        let Some(forced) = state.submissions.pop_front() else { return };
        let Some((_, connection)) = state.link else { return };
        let scheduler = &mut state.schedulers[number];
        let known = scheduler.sequence.as_ref().map(|sequence| sequence.connection);
        if known == Some(connection) || scheduler.ended == Some(connection) {
            return;
        }
        scheduler.sequences += 1;
        let index = if self.rules.counts_forced { forced.len() as u32 } else { 0 };
        let tokens = if self.rules.forces_delivered { forced } else { Vec::new() };
        scheduler.sequence = Some(Sequence { connection, tokens, index });
        self.finish_if_complete(state, number);
    }

    fn finish_if_complete(&self, state: &mut State, number: usize) {
        let scheduler = &mut state.schedulers[number];
        let complete = |sequence: &mut Sequence| sequence.index as usize >= self.tokens;
        let Some(sequence) = scheduler.sequence.take_if(complete) else { return };
        scheduler.ended = Some(sequence.connection);
        if state.link == Some((number, sequence.connection)) {
            state.wire.push_back(Event::Finished);
        }
    }

    fn hear(&self, state: &mut State, number: usize) {
        let scheduler = &mut state.schedulers[number];
        let Some(answer) = scheduler.answers.pop_front() else { return };
        let current =
            scheduler.in_flight && (answer.revision, answer.step) == (scheduler.revision, scheduler.steps);
        if self.rules.drops_stale_results && !current {
            return;
        }
        scheduler.in_flight = false;
        // One that has ended, or was replaced, is not known any more.
        let known = answer.sequence == scheduler.sequences;
        let Some(sequence) = scheduler.sequence.as_mut().filter(|_| known) else { return };
        if usize::from(answer.position) != sequence.tokens.len() {
            state.wrong = Some("a rank sampled another position than the sequence is at");
            return;
        }
        sequence.tokens.push(answer.token);
        let event = Event::Token(sequence.index, answer.token);
        sequence.index += 1;
        if state.link == Some((number, sequence.connection)) {
            state.wire.push_back(event);
        }
        self.finish_if_complete(state, number);
    }

    fn deliver(&self, state: &mut State, event: Event) {
        let id = state.choice.transcript.id();
        let event = match event {
            Event::Token(index, token) => {
                let next = state.choice.transcript.delivered().len() as u32;
                let index = if self.rules.index_counts { index } else { next };
                let logprobs = None;
                TranscriptEvent::Token(TokenEvent {
                    id,
                    index,
                    token,
                    logprobs,
                    cached_tokens: 0,
                    queue_ms: 0,
                })
            }
            Event::Finished => {
                TranscriptEvent::Finished { reason: FinishReason::Length, receipt: Receipt::default() }
            }
        };
        self.feed(state, event);
    }

    /// Gives the transcript an event, and does what it wants.
    fn feed(&self, state: &mut State, event: TranscriptEvent) {
        let mut effects = Vec::new();
        state.choice.transcript.handle(Duration::ZERO, event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Deliver(delta) => {
                    state.choice.received.extend(delta.tokens.into_iter().map(|token| token.token));
                }
                Effect::Resubmit { forced } => {
                    if state.link.is_some() {
                        state.submissions.push_back(forced);
                    }
                }
                Effect::End(End::Finished { .. }) => state.choice.finished = true,
                Effect::End(End::Failed(_)) => state.wrong = Some("the choice ended with an error"),
                Effect::Cancel => {}
            }
        }
    }

    pub(super) fn faults(&self, state: &State, add: &mut Add<'_>) {
        if state.choice.transcript.ended() {
            return;
        }
        let silent = state.wire.is_empty() && state.submissions.is_empty();
        for heard in [true, false] {
            if heard && silent {
                continue;
            }
            if state.link.is_some() {
                add(Action::Cut(heard), true, &|next| self.cut(next, heard));
            }
            for number in 0..2 {
                let here = state.link.is_some_and(|(scheduler, _)| scheduler == number);
                if here || (state.schedulers[number].sequence.is_some() && !heard) {
                    add(Action::CrashScheduler(number, heard), true, &|next| {
                        if here {
                            self.cut(next, heard);
                        }
                        // Its successor has connections of its own: no result of a former life reaches it.
                        let revision = next.schedulers[number].revision + 1;
                        next.schedulers[number] = Scheduler { is_up: true, revision, ..Scheduler::default() };
                    });
                }
            }
        }
        for number in 0..2 {
            if state.schedulers[number].is_up && state.schedulers[number].sequence.is_some() {
                add(Action::LoseReplica(number), true, &|next| {
                    self.lose_replica(&mut next.schedulers[number]);
                });
            }
        }
        if state.stray.is_some() {
            return;
        }
        if let Some(forced) = state.submissions.front() {
            add(Action::Copy(Kind::Submission), true, &|next| {
                next.stray = Some(Stray::Submission(forced.clone()));
            });
        }
        if let Some(event @ Event::Token(..)) = state.wire.front() {
            add(Action::Copy(Kind::Event), true, &|next| next.stray = Some(Stray::Event(*event)));
        }
        for number in 0..2 {
            if let Some(answer) = state.schedulers[number].answers.front() {
                add(Action::Copy(Kind::Result(number)), true, &|next| {
                    next.stray = Some(Stray::Answer(number, *answer));
                });
            }
        }
    }

    /// The sequence keeps its tokens and waits; what was asked is not answered, or too late.
    fn lose_replica(&self, scheduler: &mut Scheduler) {
        (scheduler.is_up, scheduler.in_flight) = (false, false);
    }

    fn cut(&self, state: &mut State, heard: bool) {
        let Some((number, _)) = state.link else { return };
        if heard {
            while !state.submissions.is_empty() {
                self.take(state, number);
            }
            state.mailbox.append(&mut state.wire);
        }
        state.link = None;
        state.submissions.clear();
        state.wire.clear();
    }
}
