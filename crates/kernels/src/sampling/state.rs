//! The sampler of one sequence.

use super::distribution::{self, TruncationScratch};
use super::logprobs::likeliest;
use super::penalties::{SeenTokens, apply_mask, apply_penalties, hold_back_stops};
use super::{SampleError, uniform};
use crate::kernels::Kernels;
use ashlar_vocabulary::{SamplingParams, TokenId, TokenLogprobs};

/// What sampling needs to remember of a sequence. Replaying a sequence's tokens through [`SamplerState::observe`] restores
/// it exactly.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerState {
    params: SamplingParams,
    seen: SeenTokens,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The token.
    pub token: TokenId,
    /// Its log-probability and the likeliest alternatives under the raw logits, if the request asked for them.
    pub logprobs: Option<TokenLogprobs>,
}

/// Working memory of [`SamplerState::sample`], reusable for any sequence.
#[derive(Debug, Default)]
pub struct SamplerScratch {
    /// The raw logits, where log-probabilities are wanted of a token not yet known.
    raw: Vec<f32>,
    /// Sums over runs of tokens.
    pub(super) runs: Vec<f32>,
    pub(super) truncation: TruncationScratch,
}

impl SamplerState {
    /// The state before the first generated token.
    pub fn new(params: &SamplingParams, prompt: &[TokenId]) -> SamplerState {
        SamplerState { params: params.clone(), seen: SeenTokens::new(params, prompt) }
    }

    /// Takes note of a generated token.
    pub fn observe(&mut self, token: TokenId) {
        self.seen.observe(token);
    }

    /// Samples the token that will stand at `position`, after `generated` generated tokens. The caller reports it back by
    /// [`SamplerState::observe`].
    ///
    /// - `logits`: the whole vocabulary's; used as working memory.
    /// - `mask`: token t is allowed if bit t mod 32 of word t / 32 is set; without a mask all are.
    ///
    /// The draw is keyed by (seed, choice index, position) and walks the remaining tokens in ascending order of id.
    ///
    /// # Errors
    /// [`SampleError::NotFinite`] if a raw logit is NaN or infinite; [`SampleError::NothingAllowed`] if every token has been
    /// excluded.
    pub fn sample(
        &self,
        kernels: &Kernels,
        logits: &mut [f32],
        position: u32,
        generated: u32,
        mask: Option<&[u32]>,
        scratch: &mut SamplerScratch,
    ) -> Result<Sampled, SampleError> {
        if !kernels.all_finite(logits) {
            return Err(SampleError::NotFinite);
        }
        let raw_sum = self.params.top_logprobs.map(|top| (top, kernels.log_sum_exp(logits)));
        if raw_sum.is_some() {
            scratch.raw.clear();
            scratch.raw.extend_from_slice(logits);
        }
        apply_penalties(&self.params, &self.seen, logits);
        hold_back_stops(&self.params, generated, logits);
        if let Some(mask) = mask {
            apply_mask(mask, logits);
        }
        if kernels.max(logits) == f32::INFINITY {
            // Extreme penalties overflowed what the model left finite.
            return Err(SampleError::NotFinite);
        }
        let token = if self.params.temperature == 0.0 {
            distribution::argmax(kernels, logits)
        } else {
            let u = uniform(self.params.seed, self.params.choice_index, position);
            distribution::draw(kernels, &self.params, u, logits, scratch)
        };
        let token = token.ok_or(SampleError::NothingAllowed)?;
        let logprobs = raw_sum.map(|(top, sum)| TokenLogprobs {
            logprob: sum.logprob(scratch.raw[token as usize]),
            top: likeliest(&scratch.raw, sum, top),
        });
        Ok(Sampled { token, logprobs })
    }
}
