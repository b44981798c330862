//! What the gateway and the schedulers know, and what travels.

use ashlar_gateway::transcript::{TokenDecoder, Transcript};
use ashlar_vocabulary::TokenId;
use std::collections::VecDeque;
use std::hash::{Hash, Hasher};

/// Turns each token into one character.
#[derive(Debug, Clone)]
pub(super) struct Letters;

impl TokenDecoder for Letters {
    fn push(&mut self, token: TokenId) -> String {
        char::from_u32(u32::from('a') + token).map(String::from).unwrap_or_default()
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

/// The transcript, and what the client has of it.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    pub(super) transcript: Transcript<Letters>,
    pub(super) received: Vec<TokenId>,
    pub(super) finished: bool,
}

/// Without stop strings and incomplete characters, a transcript is what it has delivered and whether it has ended.
impl Hash for Choice {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.transcript.delivered(), self.transcript.ended(), &self.received, self.finished).hash(state);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Event {
    Token(u32, TokenId),
    Finished,
}

/// A step's result: layout, step, and what was sampled for which sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Answer {
    pub(super) sequence: u8,
    pub(super) revision: u8,
    pub(super) step: u8,
    pub(super) position: u8,
    pub(super) token: TokenId,
}

#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Scheduler {
    pub(super) sequence: Option<Sequence>,
    /// How many it has had: each has a number of its own.
    pub(super) sequences: u8,
    /// The connection on which the choice has ended, if it has.
    pub(super) ended: Option<u8>,
    pub(super) revision: u8,
    pub(super) is_up: bool,
    /// Steps sent in this layout, and whether the last of them is not answered.
    pub(super) steps: u8,
    pub(super) in_flight: bool,
    pub(super) answers: VecDeque<Answer>,
}

#[derive(Debug, Clone, Hash)]
pub(super) struct Sequence {
    /// Of the gateway's.
    pub(super) connection: u8,
    pub(super) tokens: Vec<TokenId>,
    /// The index of the next token event.
    pub(super) index: u32,
}

#[derive(Debug, Clone, Hash)]
pub(super) enum Stray {
    Submission(Vec<TokenId>),
    Event(Event),
    Answer(usize, Answer),
}

/// Everything.
#[derive(Debug, Clone, Hash)]
pub struct State {
    pub(super) choice: Choice,
    /// The scheduler, over the connection of this number.
    pub(super) link: Option<(usize, u8)>,
    pub(super) connections: u8,
    /// The connection of which the choice has heard.
    pub(super) heard_of: u8,
    pub(super) submitted: bool,
    pub(super) submissions: VecDeque<Vec<TokenId>>,
    /// Events on the connection, and those that have come and are not read.
    pub(super) wire: VecDeque<Event>,
    pub(super) mailbox: VecDeque<Event>,
    pub(super) schedulers: [Scheduler; 2],
    pub(super) stray: Option<Stray>,
    pub(super) faults: u8,
    pub(super) wrong: Option<&'static str>,
}
