//! Attempts to reach one of several addresses, one after the other.

use crate::Addresses;
use std::time::Duration;

/// How long an answer is waited for at first: who is cut off answers as soon as the cut is over, and nobody shall sleep through that.
const ANSWER_SHORT: Duration = Duration::from_millis(500);
/// And once so many attempts in a row have failed: somebody may be far away, or slow.
const ANSWER_LONG: Duration = Duration::from_secs(2);
const SHORT_ATTEMPTS: usize = 6;

/// Which address is next, how long to wait for its answer, and for how long to pause between attempts.
#[derive(Debug, Clone)]
pub struct Retries {
    addresses: Addresses,
    attempts: usize,
    failed_in_a_row: usize,
    pause: Duration,
    pause_min: Duration,
    pause_max: Duration,
}

impl Retries {
    /// From the first address on; pauses grow from the shortest to the longest as long as nobody answers.
    pub fn new(addresses: Addresses, pause_min: Duration, pause_max: Duration) -> Retries {
        let pause_max = pause_max.max(pause_min);
        Retries { addresses, attempts: 0, failed_in_a_row: 0, pause: pause_min, pause_min, pause_max }
    }

    /// Whom to try now.
    pub fn address(&self) -> &str {
        self.addresses.of_attempt(self.attempts)
    }

    /// Whether there are several.
    pub fn has_others(&self) -> bool {
        self.addresses.count() > 1
    }

    /// How long to wait for the answer.
    pub fn patience(&self) -> Duration {
        if self.failed_in_a_row < SHORT_ATTEMPTS { ANSWER_SHORT } else { ANSWER_LONG }
    }

    /// The attempt has succeeded.
    pub fn succeeded(&mut self) {
        self.failed_in_a_row = 0;
        self.pause = self.pause_min;
    }

    /// The attempt has failed, or what it led to is over: the next one is due after this pause.
    pub fn over(&mut self) -> Duration {
        let pause = self.pause;
        self.attempts += 1;
        self.failed_in_a_row += 1;
        // Only when none of them answers is there a reason to wait longer.
        if self.attempts.is_multiple_of(self.addresses.count()) {
            self.pause = (2 * pause).min(self.pause_max);
        }
        pause
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
    use super::*;

    fn retries() -> Retries {
        let addresses = Addresses::new(vec!["a:1".to_owned(), "b:1".to_owned()]).unwrap();
        Retries::new(addresses, Duration::from_millis(10), Duration::from_millis(40))
    }

    #[test]
    fn addresses_take_turns_and_pauses_grow_once_all_have_been_tried() {
        let mut retries = retries();
        let mut seen = Vec::new();
        for _ in 0..8 {
            let address = retries.address().to_owned();
            seen.push((address, retries.over().as_millis()));
        }
        let expected = [10, 10, 20, 20, 40, 40, 40, 40];
        let addresses = ["a:1", "b:1"].into_iter().cycle();
        assert!(
            seen.iter()
                .zip(addresses.zip(expected))
                .all(|(seen, (address, pause))| *seen == (address.to_owned(), pause)),
            "{seen:?}"
        );
    }

    #[test]
    fn answers_are_waited_for_briefly_at_first_and_again_after_a_success() {
        let mut retries = retries();
        for _ in 0..SHORT_ATTEMPTS {
            assert_eq!(retries.patience(), ANSWER_SHORT);
            retries.over();
        }
        assert_eq!(retries.patience(), ANSWER_LONG);
        retries.succeeded();
        assert_eq!(retries.over(), Duration::from_millis(10));
        assert_eq!(retries.patience(), ANSWER_SHORT);
    }
}
