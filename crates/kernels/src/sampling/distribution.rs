//! Truncation of a distribution and the draw from it.
//!
//! Probabilities stay unnormalised: p = e^((logit − max) / temperature), so that the likeliest token has 1. They compare
//! as the `f32` they round to, ties by token id. `top_k` and `top_p` need tokens in descending order, but only the first
//! few of a vocabulary: a histogram over the leading bits of p, which order like p itself, tells which tokens can be
//! among them, and only those are sorted.

use super::state::SamplerScratch;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::math;
use ashlar_vocabulary::{SamplingParams, TokenId};

/// Leading bits of p that select a bin: exponent and three bits of mantissa.
const BIN_SHIFT: u32 = 20;
/// p is at most 1.
const BINS: usize = (1.0f32.to_bits() >> BIN_SHIFT) as usize + 1;
/// Tokens whose sum the draw steps over at once.
const RUN: usize = 256;

/// Working memory of the truncation.
#[derive(Debug, Default)]
pub(super) struct TruncationScratch {
    counts: Vec<u32>,
    masses: Vec<f64>,
    kept: Vec<(TokenId, f32)>,
}

/// The token with the largest logit, the lowest id among equals; `None` if all are −∞.
pub(super) fn argmax(kernels: &Kernels, logits: &[f32]) -> Option<TokenId> {
    let max = kernels.max(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    logits.iter().position(|&logit| logit == max).map(|token| token as TokenId)
}

/// Draws with `u` in [0, 1) from the truncated distribution; `logits` become unnormalised probabilities. `None` if all
/// are −∞. The temperature is positive.
pub(super) fn draw(
    kernels: &Kernels,
    params: &SamplingParams,
    u: f64,
    logits: &mut [f32],
    scratch: &mut SamplerScratch,
) -> Option<TokenId> {
    let max = kernels.max(logits);
    if max == f32::NEG_INFINITY {
        return None;
    }
    let runs = &mut scratch.runs;
    runs.clear();
    runs.resize(logits.len().div_ceil(RUN), 0.0);
    let whole = params.top_k == 0 && params.top_p >= 1.0;
    // The mass that `top_p` refers to counts what `min_p` drops afterwards.
    let min_p = if whole { params.min_p } else { 0.0 };
    kernels.dispatch(Probabilities { logits, max, temperature: params.temperature, min_p, runs });
    if whole {
        return pick(logits, runs, u);
    }
    let kept = truncate(params, logits, &mut scratch.truncation);
    // Ascending token ids, as in a draw from the whole vocabulary.
    kept.sort_unstable_by_key(|&(token, _)| token);
    let total: f64 = kept.iter().map(|&(_, p)| f64::from(p)).sum();
    let mut rest = u * total;
    for &(token, p) in kept.iter() {
        rest -= f64::from(p);
        if rest < 0.0 {
            return Some(token);
        }
    }
    kept.last().map(|&(token, _)| token)
}

/// Walks the whole vocabulary in ascending token ids, first by the sums of runs, then within one.
fn pick(p: &[f32], runs: &[f32], u: f64) -> Option<TokenId> {
    let total: f64 = runs.iter().map(|&sum| f64::from(sum)).sum();
    let mut rest = u * total;
    let mut chosen = None;
    for (run, &sum) in runs.iter().enumerate() {
        if sum > 0.0 {
            chosen = Some(run);
            if rest < f64::from(sum) {
                break;
            }
            rest -= f64::from(sum);
        }
    }
    // Rounding can leave a rest beyond the last token: then it is the last one that has any probability.
    let start = chosen? * RUN;
    let mut token = None;
    for (index, &p) in p[start..].iter().take(RUN).enumerate().filter(|&(_, &p)| p > 0.0) {
        token = Some((start + index) as TokenId);
        rest -= f64::from(p);
        if rest < 0.0 {
            break;
        }
    }
    token
}

/// The tokens that `top_k`, then `top_p` of their mass, then `min_p` keep.
fn truncate<'a>(
    params: &SamplingParams,
    p: &[f32],
    scratch: &'a mut TruncationScratch,
) -> &'a mut Vec<(TokenId, f32)> {
    let TruncationScratch { counts, masses, kept } = scratch;
    counts.clear();
    counts.resize(BINS, 0);
    masses.clear();
    masses.resize(BINS, 0.0);
    let top_k = params.top_k as usize;
    for &p in p {
        let bin = ((p.to_bits() >> BIN_SHIFT) as usize).min(BINS - 1);
        // One of both suffices.
        if top_k > 0 { counts[bin] += 1 } else { masses[bin] += f64::from(p) }
    }
    // Down to this bin there are `top_k` tokens, or, without it, mass enough for `top_p`, with some to spare because sums
    // in another order round differently.
    let enough = f64::from(params.top_p) * masses.iter().sum::<f64>() * (1.0 + 1e-9);
    let (mut count, mut mass, mut lowest) = (0, 0.0, 0);
    for bin in (0..BINS).rev() {
        count += counts[bin] as usize;
        mass += masses[bin];
        let reached = if top_k > 0 { count >= top_k } else { mass >= enough };
        if reached {
            lowest = bin;
            break;
        }
    }
    let floor = f32::from_bits((lowest as u32) << BIN_SHIFT);
    kept.clear();
    let tokens = p.iter().enumerate().filter(|&(_, &p)| p >= floor && p > 0.0);
    kept.extend(tokens.map(|(token, &p)| (token as TokenId, p)));
    kept.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = if top_k > 0 {
        kept.truncate(top_k);
        kept.iter().map(|&(_, p)| f64::from(p)).sum()
    } else {
        masses.iter().sum()
    };
    if params.top_p < 1.0 {
        // The smallest set that reaches the mass; the first token is always in it.
        let (enough, mut mass) = (f64::from(params.top_p) * total, 0.0);
        let reached = kept.iter().position(|&(_, p)| {
            mass += f64::from(p);
            mass >= enough
        });
        kept.truncate(reached.map_or(kept.len(), |last| last + 1));
    }
    kept.retain(|&(_, p)| p >= params.min_p);
    kept
}

/// Logits to unnormalised probabilities, in place (0 below `min_p`), and their sums over runs of 256 tokens.
struct Probabilities<'a> {
    logits: &'a mut [f32],
    max: f32,
    temperature: f32,
    min_p: f32,
    runs: &'a mut [f32],
}

impl LaneKernel for Probabilities<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let (max, temperature, zero) = (S::splat(self.max), S::splat(self.temperature), S::splat(0.0));
        for (logits, run) in self.logits.chunks_mut(RUN).zip(self.runs) {
            let mut sum = zero;
            for logits in logits.chunks_mut(LANES) {
                let logit = S::read_tail(logits, f32::NEG_INFINITY);
                let p = math::exp_lanes(logit.sub(max).div(temperature));
                let p = p.select_less(S::splat(self.min_p), zero, p);
                p.write_tail(logits);
                sum = sum.add(p);
            }
            *run = sum.sum_lanes();
        }
    }
}
