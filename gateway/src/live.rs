//! What has happened lately, for people who look: latencies of the last minute, throughput by the second, requests that ended.
//!
//! Prometheus has the whole history in coarse buckets; this has a little of it, exactly. Everything is bounded: what is older or more
//! than fits is forgotten.

use ashlar_protocol::serving::{ChoiceId, FinishReason, Receipt};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Latencies older than this are not counted.
pub(crate) const WINDOW: Duration = Duration::from_secs(60);
/// Latencies that are remembered of each kind.
const SAMPLES_MAX: usize = 4096;
/// Seconds of throughput that are remembered.
const SECONDS_MAX: usize = 300;
/// Requests that are remembered.
const ENDED_MAX: usize = 100;
/// Longest part of an error that is remembered.
const ERROR_CHARS_MAX: usize = 300;

/// The recent past of a gateway, of all the models that it serves.
#[derive(Debug, Default)]
pub(crate) struct Live(Mutex<Past>);

#[derive(Debug, Default)]
struct Past {
    first_token: Recent,
    between_tokens: Recent,
    request: Recent,
    seconds: VecDeque<Second>,
    ended: VecDeque<Ended>,
}

/// Latencies, the latest last.
#[derive(Debug, Default)]
struct Recent(VecDeque<(Instant, Duration)>);

/// What happened in a second.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Second {
    /// Which, since 1970.
    pub(crate) unix_s: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generated_tokens: u64,
    /// Choices that ended well.
    pub(crate) requests: u64,
    /// Choices that failed.
    pub(crate) failed: u64,
}

/// How a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Stop,
    Length,
    Failed,
    /// Its client has gone, or wanted no more of it.
    Cancelled,
}

impl From<FinishReason> for Outcome {
    fn from(reason: FinishReason) -> Outcome {
        match reason {
            FinishReason::Stop => Outcome::Stop,
            FinishReason::Length => Outcome::Length,
        }
    }
}

impl Outcome {
    /// Its name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Failed => "failed",
            Outcome::Cancelled => "cancelled",
        }
    }
}

/// A choice that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) id: ChoiceId,
    /// The model or adapter that it asked for.
    pub(crate) model: String,
    /// Seconds since 1970.
    pub(crate) unix_s: f64,
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<String>,
    /// From its request's arrival to its end.
    pub(crate) took: Duration,
    pub(crate) first_token: Option<Duration>,
    pub(crate) receipt: Option<Receipt>,
}

/// Percentiles of one latency.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct Percentiles {
    pub(crate) count: usize,
    /// Medians and tails; absent where nothing was counted.
    pub(crate) p50: Option<Duration>,
    pub(crate) p90: Option<Duration>,
    pub(crate) p99: Option<Duration>,
}

/// The recent past at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Glimpse {
    /// Seconds since 1970.
    pub(crate) unix_s: f64,
    pub(crate) first_token: Percentiles,
    pub(crate) between_tokens: Percentiles,
    pub(crate) request: Percentiles,
    /// In order; seconds in which nothing happened are missing.
    pub(crate) seconds: Vec<Second>,
}

impl Live {
    /// A choice's first token, this long after its request's arrival.
    pub(crate) fn first_token(&self, after: Duration) {
        let mut past = self.lock();
        past.first_token.push(after);
        past.second().generated_tokens += 1;
    }

    /// A further token, this long after the one before it.
    pub(crate) fn next_token(&self, after: Duration) {
        let mut past = self.lock();
        past.between_tokens.push(after);
        past.second().generated_tokens += 1;
    }

    /// A request was refused before anything was done for it.
    pub(crate) fn turned_away(&self) {
        self.lock().second().failed += 1;
    }

    /// A choice has ended.
    pub(crate) fn ended(&self, mut ended: Ended) {
        let mut past = self.lock();
        let second = past.second();
        match ended.outcome {
            Outcome::Stop | Outcome::Length => second.requests += 1,
            Outcome::Failed => second.failed += 1,
            Outcome::Cancelled => {}
        }
        // Tokens from the prefix cache were not computed.
        let computed = |receipt: &Receipt| receipt.prompt_tokens.saturating_sub(receipt.cached_tokens);
        second.prompt_tokens += ended.receipt.as_ref().map_or(0, computed) as u64;
        past.request.push(ended.took);
        ended.error = ended.error.map(|error| error.chars().take(ERROR_CHARS_MAX).collect());
        past.ended.push_front(ended);
        past.ended.truncate(ENDED_MAX);
    }

    /// Latencies and throughput as they are now.
    pub(crate) fn glimpse(&self) -> Glimpse {
        let past = self.lock();
        Glimpse {
            unix_s: unix_s(),
            first_token: past.first_token.percentiles(),
            between_tokens: past.between_tokens.percentiles(),
            request: past.request.percentiles(),
            seconds: past.seconds.iter().copied().collect(),
        }
    }

    /// Choices that have ended, the latest first.
    pub(crate) fn recent(&self) -> Vec<Ended> {
        self.lock().ended.iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Past> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Past {
    fn second(&mut self) -> &mut Second {
        let now = unix_s() as u64;
        if self.seconds.back().is_none_or(|last| last.unix_s < now) {
            self.seconds.push_back(Second { unix_s: now, ..Second::default() });
            while self.seconds.front().is_some_and(|first| first.unix_s + SECONDS_MAX as u64 <= now) {
                self.seconds.pop_front();
            }
        }
        // A clock that was set back writes into the latest second until it has caught up.
        let last = self.seconds.len() - 1;
        &mut self.seconds[last]
    }
}

impl Recent {
    fn push(&mut self, latency: Duration) {
        if self.0.len() == SAMPLES_MAX {
            self.0.pop_front();
        }
        self.0.push_back((Instant::now(), latency));
    }

    fn percentiles(&self) -> Percentiles {
        let recent = self.0.iter().rev().take_while(|(at, _)| at.elapsed() < WINDOW);
        let mut latencies: Vec<Duration> = recent.map(|(_, latency)| *latency).collect();
        latencies.sort_unstable();
        let count = latencies.len();
        // The nearest rank: one that has occurred.
        let at = |percent: usize| latencies.get((count * percent).div_ceil(100).max(1) - 1).copied();
        Percentiles { count, p50: at(50), p90: at(90), p99: at(99) }
    }
}

/// Seconds since 1970.
pub(crate) fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;
    use ashlar_vocabulary::RequestId;

    fn ended(n: u32, outcome: Outcome) -> Ended {
        Ended {
            id: ChoiceId { request: RequestId(u128::from(n)), choice: 0 },
            model: "m".into(),
            unix_s: unix_s(),
            outcome,
            error: Some("x".repeat(1000)),
            took: Duration::from_millis(u64::from(n)),
            first_token: None,
            receipt: Some(Receipt { prompt_tokens: 10, cached_tokens: 4, ..Receipt::default() }),
        }
    }

    #[test]
    fn percentiles_are_latencies_that_occurred() {
        let live = Live::default();
        (1..=100).for_each(|ms| live.next_token(Duration::from_millis(ms)));
        let itl = live.glimpse().between_tokens;
        let ms = |latency: Option<Duration>| latency.unwrap().as_millis();
        assert_eq!((itl.count, ms(itl.p50), ms(itl.p90), ms(itl.p99)), (100, 50, 90, 99));
        assert_eq!(live.glimpse().first_token, Percentiles::default());
    }

    #[test]
    fn the_past_is_bounded_and_the_latest_comes_first() {
        let live = Live::default();
        (0..3 * ENDED_MAX as u32).for_each(|n| live.ended(ended(n, Outcome::Stop)));
        (0..2 * SAMPLES_MAX).for_each(|_| live.first_token(Duration::from_millis(1)));
        let recent = live.recent();
        assert_eq!((recent.len(), recent[0].id.request), (ENDED_MAX, RequestId(3 * ENDED_MAX as u128 - 1)));
        assert_eq!(recent[0].error.as_deref().map(str::len), Some(ERROR_CHARS_MAX));
        assert_eq!(live.glimpse().first_token.count, SAMPLES_MAX);
    }

    #[test]
    fn a_second_counts_what_was_computed_and_what_failed() {
        let live = Live::default();
        live.ended(ended(1, Outcome::Length));
        live.ended(ended(2, Outcome::Failed));
        live.ended(ended(3, Outcome::Cancelled));
        let seconds = live.glimpse().seconds;
        let sum = |count: fn(&Second) -> u64| seconds.iter().map(count).sum::<u64>();
        assert_eq!((sum(|s| s.requests), sum(|s| s.failed), sum(|s| s.prompt_tokens)), (1, 1, 18));
    }
}
