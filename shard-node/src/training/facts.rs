//! What the ranks of a step tell one another beside gradients: losses, and the terms of the gradient's norm. As 32-bit words,
//! which travel in the place of numbers.

use ashlar_model::stage::{BatchLoss, ExactSum};
use ashlar_training::NormTerms;

/// Most words of one message.
pub(super) const WORDS_MAX: usize = 16 << 20;

/// What has come together on the way along the stages.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Facts {
    /// Of the replica's samples, once the last stage has added it.
    pub(super) loss: BatchLoss,
    /// Per stage, per rank.
    pub(super) terms: Vec<Vec<NormTerms>>,
}

impl Facts {
    pub(super) fn encode(&self) -> Vec<f32> {
        let mut words = encode_loss(&self.loss);
        push(&mut words, self.terms.len() as u64);
        for ranks in &self.terms {
            push(&mut words, ranks.len() as u64);
            ranks.iter().for_each(|terms| encode_terms(terms, &mut words));
        }
        words
    }

    /// `None` for words that no rank writes.
    pub(super) fn decode(words: &[f32]) -> Option<Facts> {
        let mut words = Words(words);
        let loss = words.loss()?;
        let mut terms = Vec::new();
        for _ in 0..words.take()? {
            let mut ranks = Vec::new();
            for _ in 0..words.take()? {
                ranks.push(words.terms()?);
            }
            terms.push(ranks);
        }
        words.0.is_empty().then_some(Facts { loss, terms })
    }
}

pub(super) fn encode_loss(loss: &BatchLoss) -> Vec<f32> {
    let mut words = Vec::new();
    let numbers = [loss.correct, loss.judged, loss.not_finite].map(|count| count as u64);
    let [preferred, other] = loss.rewards;
    let sums = [loss.loss, loss.weight, preferred, other].map(|ExactSum(sum)| sum as u64);
    sums.into_iter().chain(numbers).for_each(|number| push(&mut words, number));
    words
}

pub(super) fn decode_loss(words: &[f32]) -> Option<BatchLoss> {
    let mut words = Words(words);
    words.loss().filter(|_| words.0.is_empty())
}

/// A rank's terms; ranks of one group have equally many words.
pub(super) fn encode_terms(terms: &NormTerms, words: &mut Vec<f32>) {
    push(words, terms.0.len() as u64);
    for tensor in &terms.0 {
        push(words, tensor.len() as u64);
        tensor.iter().for_each(|term| push(words, term.to_bits()));
    }
}

pub(super) fn decode_terms(words: &[f32]) -> Option<NormTerms> {
    let mut words = Words(words);
    words.terms().filter(|_| words.0.is_empty())
}

fn push(words: &mut Vec<f32>, number: u64) {
    words.extend([number as u32, (number >> 32) as u32].map(f32::from_bits));
}

struct Words<'w>(&'w [f32]);

impl Words<'_> {
    fn take(&mut self) -> Option<u64> {
        let ([low, high], rest) = self.0.split_first_chunk::<2>()?;
        self.0 = rest;
        Some(u64::from(high.to_bits()) << 32 | u64::from(low.to_bits()))
    }

    fn loss(&mut self) -> Option<BatchLoss> {
        let mut sum = || self.take().map(|sum| ExactSum(sum as i64));
        let (loss, weight, rewards) = (sum()?, sum()?, [sum()?, sum()?]);
        let mut count = || self.take().and_then(|count| usize::try_from(count).ok());
        Some(BatchLoss { loss, weight, correct: count()?, judged: count()?, not_finite: count()?, rewards })
    }

    /// Allocates only for words that are there.
    fn terms(&mut self) -> Option<NormTerms> {
        let mut tensors = Vec::new();
        for _ in 0..self.take()? {
            let mut terms = Vec::new();
            for _ in 0..self.take()? {
                terms.push(f64::from_bits(self.take()?));
            }
            tensors.push(terms);
        }
        Some(NormTerms(tensors))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn facts_arrive_bit_for_bit_and_cut_off_ones_are_refused() {
        let loss = BatchLoss {
            loss: ExactSum(-5),
            weight: ExactSum(i64::MAX),
            correct: 3,
            judged: 1 << 40,
            not_finite: 1,
            rewards: [ExactSum(7), ExactSum(i64::MIN)],
        };
        let terms = NormTerms(vec![vec![1.5, -0.0, f64::INFINITY], vec![], vec![f64::MIN_POSITIVE]]);
        let facts = Facts { loss, terms: vec![vec![terms.clone(), terms.clone()], vec![]] };
        let words = facts.encode();
        assert_eq!(Facts::decode(&words), Some(facts));
        assert_eq!(decode_loss(&encode_loss(&loss)), Some(loss));
        let mut own = Vec::new();
        encode_terms(&terms, &mut own);
        assert_eq!(decode_terms(&own), Some(terms));
        (0..words.len()).for_each(|end| assert_eq!(Facts::decode(&words[..end]), None));
    }
}
