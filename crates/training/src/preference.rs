//! Direct preference optimisation (Rafailov et al., 2023, arXiv:2305.18290): which of two answers to give.
//!
//! With Δ = (ln π(preferred) − ln π₀(preferred)) − (ln π(other) − ln π₀(other)), where π is the model with the adapter and π₀ the
//! same model without, a pair's loss is −ln σ(β·Δ). Its derivative by ln π of an answer is ∓β·σ(−β·Δ): the gradient of the answer's
//! cross-entropy, times one number. So the pass over the head is the supervised one, and its rows are multiplied afterwards.
//!
//! Log-probabilities of tokens add up in units of 2⁻³², exactly, and Δ is a difference of such sums: neither the order of
//! tokens nor the cut into micro-batches shows, and an adapter that changes nothing has a margin of exactly 0.

use ashlar_kernels::math;
use ashlar_model::stage::{BatchLoss, ExactSum, MicroBatch, TargetRow, TargetScore};

/// The log-probability of an answer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct AnswerScore {
    /// Σ ln p(token) over its targets, in nats.
    pub logprob: ExactSum,
    /// Targets whose log-probability is no number.
    pub not_finite: usize,
}

/// The scores of a micro-batch's sequences, in their order, from those of its targets.
pub fn answer_scores(batch: &MicroBatch, targets: &[TargetRow], scores: &[TargetScore]) -> Vec<AnswerScore> {
    let sequences = batch.sequences();
    let mut answers = vec![AnswerScore::default(); sequences.len()];
    for (target, score) in targets.iter().zip(scores) {
        let sequence = sequences.partition_point(|rows| rows.end <= target.row);
        if let Some(answer) = answers.get_mut(sequence) {
            answer.logprob.add(f64::from(score.logprob));
            answer.not_finite += usize::from(!score.logprob.is_finite());
        }
    }
    answers
}

/// What a job of preferences learns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preference {
    beta: f64,
}

/// What a pair of answers comes to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// β·Δ: how much more the preferred answer has gained than the other.
    pub margin: f64,
    /// −ln σ(margin), in nats.
    pub loss: f64,
    /// −∂loss/∂ln π(preferred) = ∂loss/∂ln π(other) = β·σ(−margin).
    pub slope: f64,
    /// β·(ln π − ln π₀) of the preferred answer, and of the other.
    pub rewards: [f64; 2],
}

impl Preference {
    /// Preferences under this β, which says how closely the model stays at the one that it starts from. `None` unless it is a
    /// positive finite number.
    pub fn new(beta: f64) -> Option<Preference> {
        (beta.is_finite() && beta > 0.0).then_some(Preference { beta })
    }

    /// A pair: the preferred answer first, under the model with the adapter and under the one without.
    pub fn pair(self, policy: [AnswerScore; 2], reference: [AnswerScore; 2]) -> PairLoss {
        let gain = |answer: usize| {
            let (with, without) = (policy[answer].logprob, reference[answer].logprob);
            ExactSum(with.0.saturating_sub(without.0))
        };
        let gains = [gain(0), gain(1)];
        let margin = self.beta * ExactSum(gains[0].0.saturating_sub(gains[1].0)).value();
        // Of the two forms of each, the one whose exponential is at most 1.
        let small = math::exp(-margin.abs());
        let sigma = if margin < 0.0 { 1.0 / (1.0 + small) } else { small / (1.0 + small) };
        PairLoss {
            margin,
            loss: (-margin).max(0.0) + math::log(1.0 + small),
            slope: self.beta * sigma,
            rewards: gains.map(|gain| self.beta * gain.value()),
        }
    }

    /// What the pairs of a micro-batch lose: its sequences two by two, with their scores. `gradient` (rows × hidden), that of the
    /// targets' Σ −ln p, becomes the gradient of the mean loss over the `pairs` of the whole batch; it may be empty.
    pub fn loss(
        self,
        batch: &MicroBatch,
        policy: &[AnswerScore],
        reference: &[AnswerScore],
        pairs: u64,
        gradient: &mut [f32],
    ) -> BatchLoss {
        let hidden = gradient.len().checked_div(batch.rows()).unwrap_or(0);
        let (policy, reference) = (policy.as_chunks::<2>().0, reference.as_chunks::<2>().0);
        let rows = batch.sequences().as_chunks::<2>().0;
        let mut sum = BatchLoss::default();
        for (rows, (&policy, &reference)) in rows.iter().zip(policy.iter().zip(reference)) {
            let pair = self.pair(policy, reference);
            sum.loss.add(pair.loss);
            sum.weight.add(1.0);
            sum.correct += usize::from(pair.margin > 0.0);
            sum.judged += 1;
            sum.not_finite += policy.iter().chain(&reference).map(|answer| answer.not_finite).sum::<usize>();
            sum.rewards.iter_mut().zip(pair.rewards).for_each(|(sum, reward)| sum.add(reward));
            let factor = (pair.slope / pairs as f64) as f32;
            for (rows, factor) in rows.iter().zip([factor, -factor]) {
                let gradient = gradient.get_mut(rows.start * hidden..rows.end * hidden).unwrap_or_default();
                gradient.iter_mut().for_each(|x| *x *= factor);
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn answer(logprob: f64) -> AnswerScore {
        let mut sum = ExactSum::default();
        sum.add(logprob);
        AnswerScore { logprob: sum, not_finite: 0 }
    }

    #[test]
    fn a_pair_that_nothing_has_changed_loses_ln_2_exactly() {
        let scores = [answer(-31.7), answer(-8.25)];
        for beta in [1e-6, 0.1, 2.0] {
            let pair = Preference::new(beta).unwrap().pair(scores, scores);
            assert_eq!((pair.margin, pair.loss, pair.slope), (0.0, math::log(2.0), beta / 2.0));
            assert_eq!(pair.loss.to_bits(), std::f64::consts::LN_2.to_bits());
        }
    }

    #[test]
    fn loss_and_slope_are_the_formulas_and_the_slope_is_the_losss_derivative() {
        let preference = Preference::new(0.3).unwrap();
        let reference = [answer(-20.0), answer(-24.0)];
        let at = |preferred: f64| preference.pair([answer(preferred), answer(-23.0)], reference);
        for step in -400..400 {
            let preferred = -20.0 + f64::from(step) * 0.5;
            let pair = at(preferred);
            let margin = 0.3 * ((preferred + 20.0) - 1.0);
            assert!((pair.margin - margin).abs() < 1e-8, "{pair:?}");
            let expected = (1.0 + (-margin).exp()).ln();
            assert!((pair.loss - expected).abs() < 1e-8 * expected.max(1.0), "{pair:?} {expected}");
            let difference = (at(preferred - 1e-3).loss - at(preferred + 1e-3).loss) / 2e-3;
            assert!((pair.slope - difference).abs() < 1e-6, "{pair:?} {difference}");
            assert!((pair.rewards[0] - 0.3 * (preferred + 20.0)).abs() < 1e-8);
            assert!((pair.rewards[1] - 0.3).abs() < 1e-8);
        }
        // Far away nothing overflows.
        assert_eq!(at(-1e6).slope, 0.3);
        assert!((at(-1e6).loss - 0.3 * (1e6 - 19.0)).abs() < 1e-3);
        assert_eq!((at(1e6).loss, at(1e6).slope), (0.0, 0.0));
    }

    #[test]
    fn a_gradient_is_pushed_one_way_for_the_preferred_answer_and_the_other_way_for_the_other() {
        let batch = MicroBatch::new(&[2, 1, 1, 2]);
        let target = |row| TargetRow { row, token: 0, weight: 1.0 };
        let targets = [0, 1, 2, 3, 5].map(target);
        let logprobs = [-1.0, -2.0, -4.0, -8.0, f32::NAN];
        let scores = logprobs.map(|logprob| TargetScore { logprob, best: false });
        let policy = answer_scores(&batch, &targets, &scores);
        let sums: Vec<f64> = policy.iter().map(|answer| answer.logprob.value()).collect();
        assert_eq!(sums, [-3.0, -4.0, -8.0, 0.0]);
        assert_eq!(policy.iter().map(|answer| answer.not_finite).collect::<Vec<_>>(), [0, 0, 0, 1]);
        let mut gradient = [1.0; 12];
        let preference = Preference::new(0.5).unwrap();
        let loss = preference.loss(&batch, &policy, &policy, 4, &mut gradient);
        let push = 0.25 / 4.0;
        let expected = [[push; 4].as_slice(), &[-push; 2], &[push; 2], &[-push; 4]].concat();
        assert_eq!(gradient.as_slice(), expected);
        assert_eq!((loss.judged, loss.correct, loss.not_finite), (2, 0, 2), "both models' numbers count");
        assert_eq!(loss.weight.value(), 2.0);
    }

    #[test]
    fn a_beta_that_is_no_positive_number_is_refused() {
        for beta in [0.0, -0.1, f64::NAN, f64::INFINITY] {
            assert_eq!(Preference::new(beta), None);
        }
    }
}
