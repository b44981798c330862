//! The tokens of a response in progress, and who follows them.

use crate::engine::GatewayId;
use crate::time::Millis;
use ashlar_protocol::serving::{ChoiceId, FromScheduler, Submit, TokenEvent, TokenHistory};
use ashlar_vocabulary::{TokenId, TokenLogprobs};
use std::collections::BTreeSet;

/// Tokens of one message.
const HISTORY_TOKENS_MAX: usize = 512;

/// All that has been said of one choice.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    id: ChoiceId,
    tokens: Vec<(TokenId, Option<TokenLogprobs>)>,
    cached_tokens: u32,
    queue_ms: u64,
    end: Option<FromScheduler>,
    pub(super) followers: BTreeSet<GatewayId>,
    /// Since when it has no follower.
    pub(super) idle_since: Option<Millis>,
}

impl Stream {
    /// A choice that is submitted for the first time in this term. What it has said before is forced.
    pub(super) fn new(submit: &Submit) -> Stream {
        let logprobs = submit.forced_logprobs.iter().cloned().chain(std::iter::repeat(None));
        Stream {
            id: submit.id,
            tokens: submit.forced.iter().copied().zip(logprobs).collect(),
            cached_tokens: 0,
            queue_ms: 0,
            end: None,
            followers: BTreeSet::new(),
            idle_since: None,
        }
    }

    /// Tells a gateway who knows the first `known` tokens the others; it follows, if there may be more.
    pub(super) fn follow(&mut self, gateway: GatewayId, known: usize, tell: &mut impl FnMut(FromScheduler)) {
        if !self.has_ended() {
            self.followers.insert(gateway);
            self.idle_since = None;
        }
        let unknown = self.tokens.get(known..).unwrap_or_default();
        let mut index = known as u32;
        for tokens in unknown.chunks(HISTORY_TOKENS_MAX) {
            let history = TokenHistory {
                id: self.id,
                index,
                tokens: tokens.to_vec(),
                cached_tokens: self.cached_tokens,
                queue_ms: self.queue_ms,
            };
            index += tokens.len() as u32;
            tell(FromScheduler::Tokens(history));
        }
        self.end.iter().cloned().for_each(tell);
    }

    pub(super) fn unfollow(&mut self, now: Millis, gateway: GatewayId) {
        if self.followers.remove(&gateway) && self.followers.is_empty() {
            self.idle_since = Some(now);
        }
    }

    /// Takes note of what the engine says.
    pub(super) fn note(&mut self, message: &FromScheduler) {
        match message {
            FromScheduler::Token(TokenEvent { index, token, logprobs, cached_tokens, queue_ms, .. }) => {
                if *index as usize == self.tokens.len() {
                    self.tokens.push((*token, logprobs.clone()));
                }
                (self.cached_tokens, self.queue_ms) = (*cached_tokens, *queue_ms);
            }
            FromScheduler::Finished { .. } | FromScheduler::Failed { .. } => self.end = Some(message.clone()),
            _ => {}
        }
    }

    /// Everybody has been told the end: nobody follows any more.
    pub(super) fn settle(&mut self, now: Millis) {
        if self.has_ended() {
            self.followers.clear();
            self.idle_since.get_or_insert(now);
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.is_some()
    }
}
