//! Refusals that hold for a moment: who asks right after the scheduler has refused a request for its load need not be asked about.
//!
//! What waits before a request falls no faster than it is computed, so that the next one of the same key, no more urgent, would be refused
//! like the one before it, unless a place became free in between; and who is refused was told to come back after a second in any case.
//! Ten times the load then costs the scheduler a question every [`HOLD`], not ten times the questions, and the gateway neither
//! templates nor tokenizers. Other keys are not touched: whose turn is when stays the scheduler's.

use crate::openai::error::ApiError;
use ashlar_protocol::access::Quota;
use ashlar_protocol::serving::{FailureKind, RequestFailure};
use ashlar_vocabulary::KeyId;
use serde::Deserialize;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a refusal holds. In this time a cluster that has seconds of work before it does little of that.
const HOLD: Duration = Duration::from_millis(20);
/// Longer bodies are read where that disturbs no stream, and so go the usual way.
const BODY_BYTES_MAX: usize = 64 << 10;

/// The refusals that hold, by key; those without one are alike.
#[derive(Debug, Default)]
pub(crate) struct Refusals {
    held: Mutex<HashMap<Option<KeyId>, Held>>,
}

#[derive(Debug)]
struct Held {
    /// Of what was refused: what is less urgent would be, too.
    priority: i32,
    until: Instant,
    failure: RequestFailure,
    /// What was left of the key's limits.
    quota: Option<Quota>,
}

impl Refusals {
    /// A request of a key was refused. Those that are past are forgotten, so that there are no more than keys.
    pub(crate) fn heard(
        &self,
        now: Instant,
        (key, priority): (Option<KeyId>, i32),
        failure: &RequestFailure,
        quota: Option<&Quota>,
    ) {
        if failure.kind != FailureKind::Overloaded {
            return;
        }
        let mut held = self.lock();
        held.retain(|_, held| now < held.until);
        let refusal = Held { priority, until: now + HOLD, failure: failure.clone(), quota: quota.copied() };
        // The more urgent one says more.
        match held.get(&key) {
            Some(other) if other.priority < priority => {}
            _ => drop(held.insert(key, refusal)),
        }
    }

    /// The refusal that holds for a request of this key with this body, whose priority is reckoned by `priority` from what it asks for;
    /// and what was left of the key's limits.
    pub(crate) fn holding(
        &self,
        now: Instant,
        key: Option<KeyId>,
        body: &[u8],
        priority: impl FnOnce(i32) -> i32,
    ) -> Option<(ApiError, Option<Quota>)> {
        let held = self.lock();
        let held = held.get(&key).filter(|held| now < held.until && body.len() <= BODY_BYTES_MAX)?;
        // What is wrong with a body is said by whoever reads all of it.
        let urgency: Urgency = serde_json::from_slice(body).ok()?;
        (priority(urgency.priority.unwrap_or(0)) >= held.priority)
            .then(|| (held.failure.clone().into(), held.quota))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<KeyId>, Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How urgent a request is, whatever else is in it.
#[derive(Deserialize)]
struct Urgency {
    priority: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: FailureKind) -> RequestFailure {
        RequestFailure { kind, message: "busy".to_owned(), retry_after_ms: Some(3_000) }
    }

    const OVERLOADED: FailureKind = FailureKind::Overloaded;
    const BODY: &[u8] = br#"{"prompt": "a", "max_tokens": 9}"#;

    fn is_held(refusals: &Refusals, now: Instant, key: Option<KeyId>, body: &[u8]) -> bool {
        refusals.holding(now, key, body, |asked| asked).is_some()
    }

    #[test]
    fn a_refusal_holds_for_a_moment_and_for_its_key_alone() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        let (one, other) = (Some(KeyId(1)), Some(KeyId(2)));
        assert!(!is_held(&refusals, now, one, BODY));
        refusals.heard(now, (one, 0), &failure(OVERLOADED), None);
        assert!(is_held(&refusals, now, one, BODY));
        assert!(!is_held(&refusals, now, other, BODY));
        assert!(!is_held(&refusals, now, None, BODY));
        assert!(!is_held(&refusals, now + HOLD, one, BODY));
        let (error, _) = refusals.holding(now, one, BODY, |asked| asked).unwrap_or_else(|| panic!("held"));
        assert_eq!((error.status.as_u16(), error.retry_after_s), (429, Some(3)));
    }

    #[test]
    fn only_what_is_no_more_urgent_is_held() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        refusals.heard(now, (None, 2), &failure(OVERLOADED), None);
        assert!(!is_held(&refusals, now, None, BODY));
        assert!(is_held(&refusals, now, None, br#"{"priority": 2}"#));
        assert!(!is_held(&refusals, now, None, br#"{"priority": 1}"#));
        // One that is less urgent says nothing of the others.
        refusals.heard(now, (None, 0), &failure(OVERLOADED), None);
        refusals.heard(now, (None, 5), &failure(OVERLOADED), None);
        assert!(is_held(&refusals, now, None, BODY));
        assert!(!is_held(&refusals, now, None, br#"{"priority": -1}"#));
    }

    #[test]
    fn what_is_refused_for_another_reason_or_cannot_be_read_goes_the_usual_way() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        for kind in [FailureKind::RateLimited, FailureKind::Invalid, FailureKind::Unavailable] {
            refusals.heard(now, (None, 0), &failure(kind), None);
        }
        assert!(!is_held(&refusals, now, None, BODY));
        refusals.heard(now, (None, 0), &failure(OVERLOADED), None);
        for body in [&b"{"[..], b"", br#"{"priority": "x"}"#, br#"{"priority": 99999999999}"#] {
            assert!(!is_held(&refusals, now, None, body));
        }
        let long = format!(r#"{{"prompt": "{}"}}"#, "a".repeat(BODY_BYTES_MAX));
        assert!(!is_held(&refusals, now, None, long.as_bytes()));
    }

    #[test]
    fn what_is_past_is_forgotten() {
        let (refusals, now) = (Refusals::default(), Instant::now());
        (0..100).for_each(|key| refusals.heard(now, (Some(KeyId(key)), 0), &failure(OVERLOADED), None));
        assert_eq!(refusals.lock().len(), 100);
        refusals.heard(now + HOLD, (None, 0), &failure(OVERLOADED), None);
        assert_eq!(refusals.lock().len(), 1);
    }
}
