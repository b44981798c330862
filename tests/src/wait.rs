//! Waiting for conditions: polled, with a deadline, never a fixed sleep.

use std::time::{Duration, Instant};

const POLL: Duration = Duration::from_millis(5);

/// Polls until `condition` gives something; `None` once `limit` is over.
pub fn until<T>(limit: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if start.elapsed() > limit {
            return None;
        }
        std::thread::sleep(POLL);
    }
}

/// Polls until `condition` holds and returns how long that took; panics with `what` once `limit` is over.
#[track_caller]
pub fn eventually(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    if until(limit, || condition().then_some(())).is_none() {
        panic!("not within {limit:?}: {what}");
    }
    start.elapsed()
}
