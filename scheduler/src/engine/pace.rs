//! How fast replicas work while there is more to do than they can: tokens per millisecond, and what an answer comes to.
//!
//! Tokens, not answers: answers that begin together end together, so that their ends come in bursts and say little.

use crate::time::Millis;
use std::collections::VecDeque;

/// What is looked back upon, in milliseconds.
const WINDOW_MS: u64 = 5_000;
/// Least time between two samples, and that which has to be known before anything is said.
const SAMPLE_MS: u64 = 100;
const KNOWN_MS: u64 = 300;
/// Tokens that an answer is taken to have before any has ended, where it may have more; and the weight of a new one.
const ANSWER_TOKENS: f64 = 256.0;
const ANSWER_WEIGHT: f64 = 0.05;

/// The pace of the work.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    /// When so many tokens had been computed in all, since somebody waits.
    samples: VecDeque<(Millis, u64)>,
    answer_tokens: f64,
}

impl Pace {
    pub(super) fn new() -> Pace {
        Pace { samples: VecDeque::new(), answer_tokens: ANSWER_TOKENS }
    }

    /// So many tokens have been computed in all; whether somebody waits. While nobody does, the pace is that of those who come.
    pub(super) fn computed(&mut self, now: Millis, tokens: u64, waits: bool) {
        if !waits {
            return self.samples.clear();
        }
        if self.samples.back().is_none_or(|(last, _)| now.since(*last) >= SAMPLE_MS) {
            self.samples.push_back((now, tokens));
        }
        while self.samples.front().is_some_and(|(first, _)| now.since(*first) > WINDOW_MS) {
            self.samples.pop_front();
        }
    }

    /// An answer has ended with so many tokens.
    pub(super) fn ended(&mut self, tokens: usize) {
        self.answer_tokens += ANSWER_WEIGHT * (tokens as f64 - self.answer_tokens);
    }

    /// Tokens that an answer of at most `most` will have, as those before it had.
    pub(super) fn answer(&self, most: u32) -> u64 {
        u64::from(most).min(self.answer_tokens.ceil() as u64)
    }

    /// How long `tokens` take, in milliseconds, as far as that can be known.
    pub(super) fn takes_ms(&self, tokens: u64) -> Option<u64> {
        let ((first, before), (last, after)) = (self.samples.front()?, self.samples.back()?);
        let (time, computed) = (last.since(*first), after.saturating_sub(*before));
        (time >= KNOWN_MS && computed > 0).then(|| tokens.saturating_mul(time) / computed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pace_is_that_of_the_last_seconds_with_work_to_do() {
        let mut pace = Pace::new();
        for at in 0..100 {
            pace.computed(Millis(at * 100), at * 200, true);
        }
        assert_eq!(pace.takes_ms(1_000), Some(500));
        // Twice as slow from now on.
        for at in 100..200 {
            pace.computed(Millis(at * 100), 10_000 + at * 100, true);
        }
        assert_eq!(pace.takes_ms(1_000), Some(1_000));
        pace.computed(Millis(20_000), 40_000, false);
        assert_eq!(pace.takes_ms(1_000), None, "nobody waits");
        pace.computed(Millis(20_100), 40_000, true);
        pace.computed(Millis(20_300), 40_100, true);
        assert_eq!(pace.takes_ms(1_000), None, "too early to tell");
    }

    #[test]
    fn answers_are_expected_to_be_as_long_as_those_before() {
        let mut pace = Pace::new();
        assert_eq!((pace.answer(100), pace.answer(1_000)), (100, 256));
        (0..200).for_each(|_| pace.ended(10));
        assert_eq!((pace.answer(5), pace.answer(1_000)), (5, 11));
    }
}
