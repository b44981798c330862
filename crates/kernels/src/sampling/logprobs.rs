//! Log-probabilities under the unmodified distribution.

use super::SampleError;
use crate::kernels::Kernels;
use crate::softmax::LogSumExp;
use ashlar_vocabulary::{TokenId, TokenLogprob, TokenLogprobs};

/// The log-probability of `token` and the `top` likeliest tokens under raw `logits` of the whole vocabulary.
///
/// # Errors
/// [`SampleError::NotFinite`] if a logit is NaN or infinite.
///
/// # Panics
/// If `token` is not in the vocabulary.
pub fn score(
    kernels: &Kernels,
    logits: &[f32],
    token: TokenId,
    top: u32,
) -> Result<TokenLogprobs, SampleError> {
    if !kernels.all_finite(logits) {
        return Err(SampleError::NotFinite);
    }
    let sum = kernels.log_sum_exp(logits);
    Ok(TokenLogprobs { logprob: sum.logprob(logits[token as usize]), top: likeliest(logits, sum, top) })
}

/// The `count` largest logits, largest first, ties by token id, with their log-probabilities.
pub(super) fn likeliest(logits: &[f32], sum: LogSumExp, count: u32) -> Vec<TokenLogprob> {
    let count = (count as usize).min(logits.len());
    let mut best: Vec<(f32, TokenId)> = Vec::with_capacity(count + 1);
    let mut floor = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if best.len() == count && logit <= floor {
            continue;
        }
        let place = best.partition_point(|&(other, _)| other >= logit);
        best.insert(place, (logit, token as TokenId));
        best.truncate(count);
        floor = best.last().map_or(f32::INFINITY, |&(logit, _)| logit);
    }
    best.into_iter().map(|(logit, token)| TokenLogprob { token, logprob: sum.logprob(logit) }).collect()
}
