//! How far one model's predictions are from another's: the statistics, over logits.
//!
//! Everything is `f64`: differences between good quantisations are small against the logits themselves.

use crate::bench::stats::percentile;

/// What one position says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    /// Negative log-probability of the token that follows, by the reference.
    pub(super) nll: f64,
    /// The candidate beside it, if there is one.
    pub(super) candidate: Option<Compared>,
}

/// A candidate's prediction beside the reference's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Compared {
    /// Negative log-probability of the token that follows, by the candidate.
    pub(super) nll: f64,
    /// KL(reference ‖ candidate), in nats.
    pub(super) kl: f64,
    /// Whether both hold the same token for the likeliest.
    pub(super) same_top: bool,
}

/// Scores the logits of one position which `truth` follows. `None` where logits are not finite.
pub(super) fn score(reference: &[f32], candidate: Option<&[f32]>, truth: usize) -> Option<Reading> {
    let (top, most) = top(reference)?;
    let at = |logits: &[f32], most: f64| logits.get(truth).map(|&logit| f64::from(logit) - most);
    let Some(candidate) = candidate else {
        let sum: f64 = reference.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
        return Some(Reading { nll: sum.ln() - at(reference, most)?, candidate: None });
    };
    let (candidate_top, candidate_most) = self::top(candidate)?;
    // With a = logit − max and b likewise for the candidate: KL = Σ p (a − b) − ln Σ exp a + ln Σ exp b.
    let (mut sum, mut candidate_sum, mut apart) = (0.0, 0.0, 0.0);
    for (&a, &b) in reference.iter().zip(candidate) {
        let (a, b) = (f64::from(a) - most, f64::from(b) - candidate_most);
        let weight = a.exp();
        sum += weight;
        candidate_sum += b.exp();
        apart += weight * (a - b);
    }
    let (log_sum, candidate_log_sum) = (sum.ln(), candidate_sum.ln());
    let compared = Compared {
        nll: candidate_log_sum - at(candidate, candidate_most)?,
        // Below zero only by rounding.
        kl: (apart / sum - log_sum + candidate_log_sum).max(0.0),
        same_top: top == candidate_top,
    };
    Some(Reading { nll: log_sum - at(reference, most)?, candidate: Some(compared) })
}

/// The first of the largest values, if all are finite.
fn top(logits: &[f32]) -> Option<(usize, f64)> {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, &logit) in logits.iter().enumerate() {
        if !logit.is_finite() {
            return None;
        }
        if logit > best.1 {
            best = (index, logit);
        }
    }
    (!logits.is_empty()).then_some((best.0, f64::from(best.1)))
}

/// Mean and spread of a stream of values, without keeping them (Welford's recurrence).
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Moments {
    count: u64,
    mean: f64,
    /// Sum of squared distances from the mean.
    squares: f64,
}

impl Moments {
    fn push(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    /// The arithmetic mean; 0 of nothing.
    pub(super) fn mean(&self) -> f64 {
        self.mean
    }

    /// The standard error of the mean; 0 of fewer than two values.
    pub(super) fn error(&self) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            count => (self.squares / (count as f64 * (count - 1) as f64)).sqrt(),
        }
    }
}

/// The sum of what all positions say. Holds eight bytes per position.
#[derive(Debug, Default)]
pub(super) struct Totals {
    /// Negative log-probabilities, by the reference.
    pub(super) reference: Moments,
    /// The same by the candidate.
    pub(super) candidate: Moments,
    /// Candidate's minus reference's, position by position.
    pub(super) difference: Moments,
    /// KL(reference ‖ candidate).
    pub(super) kl: Moments,
    /// Squared change of the true token's probability.
    change_squared: Moments,
    kls: Vec<f64>,
    agreed: u64,
}

impl Totals {
    /// Adds one position.
    pub(super) fn push(&mut self, reading: &Reading) {
        self.reference.push(reading.nll);
        let Some(compared) = &reading.candidate else { return };
        self.candidate.push(compared.nll);
        self.difference.push(compared.nll - reading.nll);
        self.kl.push(compared.kl);
        self.kls.push(compared.kl);
        self.change_squared.push(((-compared.nll).exp() - (-reading.nll).exp()).powi(2));
        self.agreed += u64::from(compared.same_top);
    }

    /// Positions so far.
    pub(super) fn count(&self) -> u64 {
        self.reference.count
    }

    /// The KL below which `percent` of the positions lie.
    pub(super) fn kl_percentile(&self, percent: f64) -> f64 {
        percentile(&self.kls, percent)
    }

    /// Share of positions where both hold the same token for the likeliest.
    pub(super) fn agreement(&self) -> f64 {
        self.agreed as f64 / self.candidate.count.max(1) as f64
    }

    /// The standard error of [`Totals::agreement`].
    pub(super) fn agreement_error(&self) -> f64 {
        let share = self.agreement();
        (share * (1.0 - share) / self.candidate.count.saturating_sub(1).max(1) as f64).sqrt()
    }

    /// Root of the mean squared change of the true token's probability.
    pub(super) fn change_rms(&self) -> f64 {
        self.change_squared.mean.sqrt()
    }
}

/// Perplexity and its standard error, to first order.
pub(super) fn perplexity(nll: &Moments) -> (f64, f64) {
    let perplexity = nll.mean.exp();
    (perplexity, perplexity * nll.error())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-7, "{found}, expected {expected}");
    }

    /// Logits of given probabilities, shifted: a shift changes nothing.
    fn logits(probabilities: &[f64], shift: f64) -> Vec<f32> {
        probabilities.iter().map(|p| (p.ln() + shift) as f32).collect()
    }

    #[test]
    fn a_position_is_scored_as_by_hand() {
        let (p, q) = (logits(&[0.5, 0.25, 0.25], 0.0), logits(&[0.25, 0.5, 0.25], 0.0));
        let reading = score(&p, Some(&q), 0).unwrap();
        let compared = reading.candidate.unwrap();
        near(reading.nll, 2f64.ln());
        near(compared.nll, 4f64.ln());
        // ½ ln 2 + ¼ ln ½ + ¼ ln 1.
        near(compared.kl, 0.25 * 2f64.ln());
        assert!(!compared.same_top);
        assert_eq!(score(&p, None, 0).unwrap(), Reading { nll: reading.nll, candidate: None });
    }

    #[test]
    fn a_shift_of_all_logits_changes_nothing_and_equal_logits_are_exactly_equal() {
        let (p, shifted) = (logits(&[0.7, 0.2, 0.1], 0.0), logits(&[0.7, 0.2, 0.1], 40.0));
        let compared = score(&p, Some(&shifted), 2).unwrap().candidate.unwrap();
        assert!(compared.kl < 1e-11 && compared.same_top, "{compared:?}");
        assert_eq!(score(&p, Some(&p), 2).unwrap().candidate.unwrap().kl, 0.0);
    }

    #[test]
    fn far_apart_logits_stay_finite_and_others_are_refused() {
        let reading = score(&[1e4, -1e4], Some(&[-1e4, 1e4]), 1).unwrap();
        assert_eq!((reading.nll, reading.candidate.unwrap().kl), (2e4, 2e4));
        assert_eq!(score(&[1.0, f32::NAN], None, 0), None);
        assert_eq!(score(&[1.0, 2.0], Some(&[f32::INFINITY, 2.0]), 0), None);
        assert_eq!(score(&[1.0, 2.0], None, 2), None);
        assert_eq!(score(&[], None, 0), None);
    }

    #[test]
    fn sums_are_those_by_hand() {
        let mut totals = Totals::default();
        let half = 2f64.ln();
        for (nll, other, kl, same_top) in [
            (half, half, 0.0, true),
            (half, 2.0 * half, 0.1, true),
            (2.0 * half, half, 0.2, true),
            (half, half, 0.3, false),
        ] {
            totals.push(&Reading { nll, candidate: Some(Compared { nll: other, kl, same_top }) });
        }
        // Logarithms to base 2 are 1, 1, 2, 1: mean 5/4, squared distances 3/4, error √(3/4 ÷ 12) = 1/4.
        near(totals.reference.mean(), 1.25 * half);
        near(totals.reference.error(), 0.25 * half);
        let (ppl, error) = perplexity(&totals.reference);
        near(ppl, 2f64.powf(1.25));
        near(error, ppl * 0.25 * half);
        near(totals.difference.mean(), 0.0);
        // Differences 0, 1, −1, 0: squares 2, error √(2 ÷ 12).
        near(totals.difference.error(), half * (1f64 / 6.0).sqrt());
        near(totals.kl.mean(), 0.15);
        near(totals.kl_percentile(100.0), 0.3);
        near(totals.kl_percentile(50.0), 0.15);
        near(totals.agreement(), 0.75);
        near(totals.agreement_error(), 0.25);
        // Probabilities ½→½, ½→¼, ¼→½, ½→½.
        near(totals.change_rms(), (2.0 / 16.0 / 4.0f64).sqrt());
        assert_eq!(totals.count(), 4);
    }

    #[test]
    fn nothing_and_one_value_have_no_error() {
        let mut moments = Moments::default();
        assert_eq!((moments.mean(), moments.error()), (0.0, 0.0));
        moments.push(3.0);
        assert_eq!((moments.mean(), moments.error()), (3.0, 0.0));
    }
}
