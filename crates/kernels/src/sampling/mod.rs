//! From logits to a token, deterministically.
//!
//! Order: log-probabilities of the raw logits; bias, repetition, presence and frequency penalties, tokens held back by
//! `min_tokens`, the grammar's mask; then arg-max (temperature 0), or temperature, `top_k`, `top_p`, `min_p` and a draw.
//!
//! Layout: `state` (counts, [`SamplerState::sample`]), `penalties` (what changes logits), `distribution` (truncation and
//! the draw), `logprobs` ([`score`]), `uniform` (the random number of a position).
//!
//! **Invariant:** a token depends on its sequence's logits, parameters, past tokens and position alone. Ties break by the
//! lower token id; nothing is iterated in a random order.

mod distribution;
mod logprobs;
mod penalties;
mod state;
mod uniform;

pub use logprobs::score;
pub use state::{Sampled, SamplerScratch, SamplerState};
pub use uniform::uniform;

use std::fmt;

/// Why no token could be sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleError {
    /// A raw logit is NaN or infinite: the model, its weights or a node's memory are broken.
    NotFinite,
    /// Bias, `min_tokens` and the mask together leave no token.
    NothingAllowed,
}

impl fmt::Display for SampleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SampleError::NotFinite => "the model produced logits that are not finite: check its weights",
            SampleError::NothingAllowed => {
                "no token is allowed here: relax the grammar, min_tokens or logit_bias"
            }
        })
    }
}

impl std::error::Error for SampleError {}
