//! What a request asks of the sampler, and what the sampler answers.

use crate::ids::TokenId;
use serde::{Deserialize, Serialize};

/// Sampling of one sequence. The gateway has validated the ranges given here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 means greedy; else 0 < t ≤ 2.
    pub temperature: f32,
    /// Nucleus mass, 0 < p ≤ 1.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 means all.
    pub top_k: u32,
    /// Keep tokens at least this likely relative to the likeliest, 0 ≤ p ≤ 1.
    pub min_p: f32,
    /// Added penalty once a token has been generated, −2…2.
    pub presence_penalty: f32,
    /// Added penalty per generated occurrence, −2…2.
    pub frequency_penalty: f32,
    /// Multiplied penalty for tokens in prompt or answer, > 0; 1 means none.
    pub repetition_penalty: f32,
    /// Added to these tokens' logits, −100…100. Sorted by token.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the counter-based generator, with the choice index and the position.
    pub seed: u64,
    /// Which of the request's choices this is.
    pub choice_index: u32,
    /// How many alternatives to report per token; `None` reports no log-probabilities at all.
    pub top_logprobs: Option<u32>,
    /// Report log-probabilities of prompt tokens too (`echo` with `logprobs`).
    pub prompt_logprobs: bool,
    /// Do not sample an end-of-sequence token before this many generated tokens.
    pub min_tokens: u32,
    /// Tokens that `min_tokens` holds back (end of sequence and `stop_token_ids`).
    pub stop_token_ids: Vec<TokenId>,
    /// Constraint on the answer.
    pub grammar: Option<GrammarSpec>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            choice_index: 0,
            top_logprobs: None,
            prompt_logprobs: false,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            grammar: None,
        }
    }
}

/// A constraint on generated text, in source form; compiled where it is used.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum GrammarSpec {
    /// Any JSON object.
    JsonObject,
    /// JSON that conforms to this schema (serialised).
    JsonSchema(String),
    /// A Lark grammar in llguidance's dialect.
    Lark(String),
}

/// A token with its log-probability under the unmodified distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// The token.
    pub token: TokenId,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// The log-probabilities reported for one position.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprobs {
    /// Of the token that stands here.
    pub logprob: f32,
    /// The likeliest tokens, most likely first, ties by token id.
    pub top: Vec<TokenLogprob>,
}
