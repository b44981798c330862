//! What changes logits before the draw.

use ashlar_vocabulary::{SamplingParams, TokenId};
use std::collections::BTreeMap;

/// Tokens that a sequence has seen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct SeenTokens {
    /// Distinct tokens of the prompt, ascending; kept only if a parameter asks for them.
    prompt: Vec<TokenId>,
    /// How often each token has been generated.
    generated: BTreeMap<TokenId, u32>,
}

impl SeenTokens {
    pub(super) fn new(params: &SamplingParams, prompt: &[TokenId]) -> SeenTokens {
        let mut distinct = if params.repetition_penalty == 1.0 { Vec::new() } else { prompt.to_vec() };
        distinct.sort_unstable();
        distinct.dedup();
        SeenTokens { prompt: distinct, generated: BTreeMap::new() }
    }

    pub(super) fn observe(&mut self, token: TokenId) {
        *self.generated.entry(token).or_default() += 1;
    }
}

/// Adds the bias; applies the repetition penalty (a positive logit is divided, another multiplied) to tokens of prompt and
/// answer; subtracts presence + frequency · count for tokens of the answer.
pub(super) fn apply_penalties(params: &SamplingParams, seen: &SeenTokens, logits: &mut [f32]) {
    for &(token, bias) in &params.logit_bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    if params.repetition_penalty != 1.0 {
        let answer_only = seen.generated.keys().filter(|token| seen.prompt.binary_search(token).is_err());
        for &token in seen.prompt.iter().chain(answer_only) {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / params.repetition_penalty
                } else {
                    *logit * params.repetition_penalty
                };
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        for (&token, &count) in &seen.generated {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * count as f32;
            }
        }
    }
}

/// Forbids stop tokens before `min_tokens` have been generated.
pub(super) fn hold_back_stops(params: &SamplingParams, generated: u32, logits: &mut [f32]) {
    if generated < params.min_tokens {
        for &token in &params.stop_token_ids {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Forbids tokens whose bit is clear (token t: bit t mod 32 of word t / 32), and tokens beyond the mask.
pub(super) fn apply_mask(mask: &[u32], logits: &mut [f32]) {
    for (word, logits) in logits.chunks_mut(32).enumerate() {
        match mask.get(word).copied().unwrap_or(0) {
            u32::MAX => {}
            0 => logits.fill(f32::NEG_INFINITY),
            bits => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if bits >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}
