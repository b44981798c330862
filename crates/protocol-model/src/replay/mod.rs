//! What a stream's client receives: one choice, the gateway that owns its transcript, two schedulers, their replicas.
//!
//! Layout: `state`, `roles` (what the gateway and the schedulers do, and the faults), this file (bounds, properties).
//!
//! The gateway's part is the real [`Transcript`]. Whoever computes, the next token is a function of the tokens before it, so a
//! sequence that is resumed with a wrong past says something else, and that is noticed. Connections are queues in order; one that
//! ends loses what is on its way, in whole or not at all. Copies of a submission, a token event, a step's result may turn up at any
//! time later.

mod roles;
mod state;

pub use state::State;

use crate::checker::{Model, Step};
use ashlar_gateway::transcript::{Transcript, TranscriptSpec};
use ashlar_protocol::serving::ChoiceId;
use ashlar_vocabulary::{RequestId, TokenId};
use state::{Choice, Letters, Scheduler, Stray};
use std::collections::VecDeque;
use std::time::Duration;

/// Rules that can be switched off, to see the checker find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// The transcript takes the next index and no other.
    pub index_counts: bool,
    /// A sequence that is submitted with delivered tokens goes on counting behind them.
    pub counts_forced: bool,
    /// Delivered tokens are part of what a resubmitted sequence is computed from.
    pub forces_delivered: bool,
    /// The scheduler drops results of former layouts, and of steps that have been answered.
    pub drops_stale_results: bool,
    /// With a new connection the choice is submitted again.
    pub resubmits: bool,
}

impl Rules {
    /// As the protocol has them.
    pub const ALL: Rules = Rules {
        index_counts: true,
        counts_forced: true,
        forces_delivered: true,
        drops_stale_results: true,
        resubmits: true,
    };
}

/// The model and its bounds.
#[derive(Debug, Clone, Copy)]
pub struct Replay {
    /// Tokens of the whole answer.
    pub tokens: usize,
    /// Faults, of whatever kinds.
    pub faults: u8,
    /// Which rules are in force.
    pub rules: Rules,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The gateway reaches a scheduler.
    Connect(usize),
    /// The choice is submitted for the first time.
    Submit,
    /// The choice hears that a scheduler has been reached, and is submitted again.
    Back,
    /// The scheduler takes the next submission.
    Take,
    /// The scheduler sends a step; its result is on the way.
    Ask(usize),
    /// The scheduler hears a result.
    Hear(usize),
    /// The choice hears the next event.
    Deliver,
    /// The scheduler sees that a gateway's connection has ended.
    Forget(usize),
    /// A replica is laid out again.
    Repair(usize),
    /// A copy of a message turns up.
    StrayArrives,
    /// A copy is made of the next message of a kind.
    Copy(Kind),
    /// A scheduler dies; whether its last words arrive.
    CrashScheduler(usize, bool),
    /// The connection ends; whether what is on its way arrives.
    Cut(bool),
    /// A scheduler's replica is lost.
    LoseReplica(usize),
}

/// Kinds of messages of which there may be copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Gateway to scheduler.
    Submission,
    /// Scheduler to gateway.
    Event,
    /// Rank to this scheduler.
    Result(usize),
}

type Steps = Vec<Step<Action, State>>;

/// The token that follows `past`: another one wherever the past or its length is another.
fn token_after(past: &[TokenId]) -> TokenId {
    past.iter().fold(3 + past.len() as u32, |sum, token| (sum * 5 + token * 7 + 1) % 23)
}

/// What an undisturbed stream says.
fn undisturbed(tokens: usize) -> Vec<TokenId> {
    let mut said = Vec::new();
    for _ in 0..tokens {
        said.push(token_after(&said));
    }
    said
}

impl Model for Replay {
    type State = State;
    type Action = Action;

    fn start(&self) -> State {
        let spec = TranscriptSpec {
            id: ChoiceId { request: RequestId(1), choice: 0 },
            prompt: [1].into(),
            stop_strings: Vec::new(),
            include_stop: false,
            stop_tokens: Vec::new(),
            min_tokens: 0,
            keep_logprobs: false,
        };
        let transcript = Transcript::new(Duration::ZERO, spec, Letters);
        let scheduler = Scheduler { is_up: true, revision: 1, ..Scheduler::default() };
        State {
            choice: Choice { transcript, received: Vec::new(), finished: false },
            link: None,
            connections: 0,
            heard_of: 0,
            submitted: false,
            submissions: VecDeque::new(),
            wire: VecDeque::new(),
            mailbox: VecDeque::new(),
            schedulers: [scheduler.clone(), scheduler],
            stray: None,
            faults: self.faults,
            wrong: None,
        }
    }

    fn steps(&self, state: &State, steps: &mut Steps) {
        let mut add = |action, fault: bool, change: &dyn Fn(&mut State)| {
            let mut to = state.clone();
            to.faults -= u8::from(fault);
            change(&mut to);
            steps.push(Step { action, to, fault });
        };
        self.gateway_steps(state, &mut add);
        for number in 0..2 {
            self.scheduler_steps(state, number, &mut add);
        }
        if let Some(stray) = &state.stray {
            add(Action::StrayArrives, false, &|next| {
                next.stray = None;
                match stray.clone() {
                    Stray::Submission(forced) => next.submissions.push_back(forced),
                    Stray::Event(event) => next.mailbox.push_back(event),
                    Stray::Answer(number, answer) => next.schedulers[number].answers.push_back(answer),
                }
            });
        }
        if state.faults > 0 {
            self.faults(state, &mut add);
        }
    }

    fn check(&self, state: &State) -> Result<(), String> {
        if let Some(wrong) = state.wrong {
            return Err(wrong.to_owned());
        }
        let (said, received) = (undisturbed(self.tokens), &state.choice.received);
        if !said.starts_with(received) {
            return Err(format!("the client received {received:?} of {said:?}"));
        }
        if state.choice.finished && received.len() < said.len() {
            return Err(format!("the stream ended after {received:?} of {said:?}"));
        }
        Ok(())
    }

    fn is_settled(&self, state: &State) -> bool {
        state.choice.finished
    }
}
