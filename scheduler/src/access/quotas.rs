//! What keys may still ask for: a bucket of requests and one of tokens for each, which fill evenly up to what a minute allows.
//!
//! A prompt is paid for when it comes, an answer token by token as it is computed: what it takes beyond the bucket is owed, and the key
//! is let in again once that is paid. What was let in is never cut off. Buckets are full when a term begins.

use crate::time::Millis;
use ashlar_protocol::access::{Charge, KeyLimits, Quota, QuotaLine};
use ashlar_vocabulary::KeyId;
use std::collections::BTreeMap;

const MINUTE_MS: i128 = 60_000;

/// Every key's buckets.
#[derive(Debug, Default, Clone)]
pub struct Quotas {
    meters: BTreeMap<KeyId, Meter>,
}

/// Buckets of one key.
#[derive(Debug, Clone)]
struct Meter {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// What was decided about a choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admission {
    /// What is left afterwards; `None` where the key has no limit by the minute.
    pub quota: Option<Quota>,
    /// Why it is not let in, and when that may be over, in milliseconds.
    pub refusal: Option<(String, u64)>,
}

impl Quotas {
    /// Decides about a choice of a key with these limits, of which `in_progress` choices are computed or wait. `None` where
    /// nothing limits it.
    pub fn admit(
        &mut self,
        now: Millis,
        charge: &Charge,
        limits: &KeyLimits,
        in_progress: usize,
    ) -> Option<Admission> {
        if *limits == KeyLimits::default() {
            return None;
        }
        let meter = self.meter(now, charge.key, limits);
        let refusal = if charge.resumed { None } else { meter.refusal(charge, limits, in_progress) };
        if refusal.is_none() && !charge.resumed {
            meter.take(charge);
        }
        Some(Admission { quota: meter.quota(), refusal })
    }

    /// Tokens have been generated on a key's account.
    pub fn generated(&mut self, now: Millis, key: KeyId, limits: &KeyLimits, tokens: u64) {
        if limits.tokens_per_minute.is_none() {
            return;
        }
        if let Some(bucket) = &mut self.meter(now, key, limits).tokens {
            bucket.take(tokens);
        }
    }

    /// Forgets the buckets that are full: a new one would be, too.
    pub fn forget_full(&mut self, now: Millis) {
        self.meters.retain(|_, meter| {
            let buckets = [&mut meter.requests, &mut meter.tokens];
            !buckets.into_iter().flatten().all(|bucket| {
                bucket.fill(now);
                bucket.level == bucket.capacity()
            })
        });
    }

    fn meter(&mut self, now: Millis, key: KeyId, limits: &KeyLimits) -> &mut Meter {
        let fresh = |limit: Option<u32>| limit.map(|limit| Bucket::full(limit, now));
        let meter = self.meters.entry(key).or_insert_with(|| Meter {
            requests: fresh(limits.requests_per_minute),
            tokens: fresh(limits.tokens_per_minute),
        });
        for bucket in [&mut meter.requests, &mut meter.tokens].into_iter().flatten() {
            bucket.fill(now);
        }
        meter
    }
}

impl Meter {
    fn refusal(&self, charge: &Charge, limits: &KeyLimits, in_progress: usize) -> Option<(String, u64)> {
        if let Some(most) = limits.concurrency.filter(|most| in_progress >= *most as usize) {
            let message = format!("this key has {most} choices in progress, as many as it may: wait for one");
            return Some((message, 1_000));
        }
        if let Some(bucket) = self.requests.as_ref().filter(|_| charge.requests > 0)
            && let Some(wait_ms) = bucket.wait_ms(charge.requests.into())
        {
            let message = format!("this key may ask {} times per minute: wait", bucket.per_minute);
            return Some((message, wait_ms));
        }
        if let Some(bucket) = self.tokens.as_ref().filter(|_| charge.requests > 0 || charge.prompt_tokens > 0)
        {
            if charge.prompt_tokens > bucket.per_minute {
                let message = format!(
                    "the prompt has {} tokens, this key {} per minute: shorten it",
                    charge.prompt_tokens, bucket.per_minute
                );
                return Some((message, MINUTE_MS as u64));
            }
            // At least one: what is owed is paid first.
            if let Some(wait_ms) = bucket.wait_ms(charge.prompt_tokens.max(1).into()) {
                let message = format!("this key has {} tokens per minute: wait", bucket.per_minute);
                return Some((message, wait_ms));
            }
        }
        None
    }

    fn take(&mut self, charge: &Charge) {
        if let Some(bucket) = &mut self.requests {
            bucket.take(charge.requests.into());
        }
        if let Some(bucket) = &mut self.tokens {
            bucket.take(charge.prompt_tokens.into());
        }
    }

    fn quota(&self) -> Option<Quota> {
        let line = |bucket: &Option<Bucket>| bucket.as_ref().map(Bucket::line);
        let quota = Quota { requests: line(&self.requests), tokens: line(&self.tokens) };
        (quota != Quota::default()).then_some(quota)
    }
}

/// So much per minute, evenly. Its level counts in shares of `1 / 60 000`, so that each millisecond adds a whole number.
#[derive(Debug, Clone)]
struct Bucket {
    per_minute: u32,
    /// Below zero where something is owed.
    level: i128,
    at: Millis,
}

impl Bucket {
    fn full(per_minute: u32, at: Millis) -> Bucket {
        Bucket { per_minute, level: i128::from(per_minute) * MINUTE_MS, at }
    }

    fn capacity(&self) -> i128 {
        i128::from(self.per_minute) * MINUTE_MS
    }

    fn fill(&mut self, now: Millis) {
        let passed = i128::from(now.since(self.at));
        self.level = (self.level + passed * i128::from(self.per_minute)).min(self.capacity());
        self.at = now;
    }

    fn take(&mut self, count: u64) {
        self.level -= i128::from(count) * MINUTE_MS;
    }

    /// Until so much is there; `None` where it is.
    fn wait_ms(&self, count: u64) -> Option<u64> {
        let missing = i128::from(count) * MINUTE_MS - self.level;
        (missing > 0).then(|| self.ms(missing))
    }

    fn ms(&self, missing: i128) -> u64 {
        let rate = i128::from(self.per_minute).max(1);
        u64::try_from((missing + rate - 1) / rate).unwrap_or(u64::MAX)
    }

    fn line(&self) -> QuotaLine {
        let remaining = u32::try_from((self.level / MINUTE_MS).max(0)).unwrap_or(u32::MAX);
        QuotaLine { limit: self.per_minute, remaining, reset_ms: self.ms(self.capacity() - self.level) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    const KEY: KeyId = KeyId(7);

    fn charge(requests: u32, prompt_tokens: u32) -> Charge {
        Charge { key: KEY, requests, prompt_tokens, resumed: false }
    }

    fn limits(requests: Option<u32>, tokens: Option<u32>) -> KeyLimits {
        KeyLimits { requests_per_minute: requests, tokens_per_minute: tokens, ..KeyLimits::default() }
    }

    #[test]
    fn requests_come_back_evenly_over_the_minute() {
        let (mut quotas, limits) = (Quotas::default(), limits(Some(3), None));
        for left in [2, 1, 0] {
            let admission = quotas.admit(Millis(0), &charge(1, 10), &limits, 0).unwrap();
            assert_eq!(admission.refusal, None);
            assert_eq!(admission.quota.unwrap().requests.unwrap().remaining, left);
        }
        let (_, wait_ms) = quotas.admit(Millis(0), &charge(1, 10), &limits, 0).unwrap().refusal.unwrap();
        assert_eq!(wait_ms, 20_000);
        assert!(quotas.admit(Millis(19_999), &charge(1, 10), &limits, 0).unwrap().refusal.is_some());
        assert!(quotas.admit(Millis(20_000), &charge(1, 10), &limits, 0).unwrap().refusal.is_none());
        // The other choices of a request cost none.
        assert!(quotas.admit(Millis(20_000), &charge(0, 0), &limits, 0).unwrap().refusal.is_none());
    }

    #[test]
    fn an_answer_is_never_cut_off_but_owed() {
        let (mut quotas, limits) = (Quotas::default(), limits(None, Some(600)));
        assert!(quotas.admit(Millis(0), &charge(1, 100), &limits, 0).unwrap().refusal.is_none());
        quotas.generated(Millis(0), KEY, &limits, 700);
        let admission = quotas.admit(Millis(0), &charge(1, 100), &limits, 0).unwrap();
        // 200 are owed, 100 wanted, and 10 come back each second.
        assert_eq!(admission.refusal.unwrap().1, 30_000);
        assert_eq!(
            admission.quota.unwrap().tokens,
            Some(QuotaLine { limit: 600, remaining: 0, reset_ms: 80_000 })
        );
        assert!(quotas.admit(Millis(30_000), &charge(1, 100), &limits, 0).unwrap().refusal.is_none());
    }

    #[test]
    fn what_was_let_in_goes_on_under_another_scheduler() {
        let (mut quotas, limits) = (Quotas::default(), limits(Some(1), Some(10)));
        assert!(quotas.admit(Millis(0), &charge(1, 10), &limits, 0).unwrap().refusal.is_none());
        let again = Charge { resumed: true, ..charge(1, 10) };
        for in_progress in [0, 1000] {
            assert!(quotas.admit(Millis(0), &again, &limits, in_progress).unwrap().refusal.is_none());
        }
    }

    #[test]
    fn a_prompt_that_no_minute_allows_is_said_to_be_too_long() {
        let (mut quotas, limits) = (Quotas::default(), limits(None, Some(50)));
        let refusal = quotas.admit(Millis(0), &charge(1, 51), &limits, 0).unwrap().refusal.unwrap();
        assert!(refusal.0.contains("shorten it"), "{refusal:?}");
    }

    #[test]
    fn choices_in_progress_are_limited_and_full_buckets_forgotten() {
        let mut quotas = Quotas::default();
        let limits = KeyLimits { concurrency: Some(2), ..limits(Some(60), None) };
        assert!(quotas.admit(Millis(0), &charge(1, 1), &limits, 1).unwrap().refusal.is_none());
        assert!(quotas.admit(Millis(0), &charge(1, 1), &limits, 2).unwrap().refusal.is_some());
        quotas.forget_full(Millis(999));
        assert_eq!(quotas.meters.len(), 1);
        quotas.forget_full(Millis(1_000));
        assert!(quotas.meters.is_empty());
        assert_eq!(quotas.admit(Millis(0), &charge(1, 1), &KeyLimits::default(), 9), None);
    }

    proptest! {
        #[test]
        fn no_minute_has_more_than_twice_its_limit(
            per_minute in 1u32..100,
            pauses in proptest::collection::vec(0u64..5_000, 1..300),
        ) {
            let (mut quotas, limits) = (Quotas::default(), limits(Some(per_minute), None));
            let (mut now, mut let_in) = (Millis(0), Vec::new());
            for pause in pauses {
                now = now.plus(pause);
                if quotas.admit(now, &charge(1, 1), &limits, 0).unwrap().refusal.is_none() {
                    let_in.push(now);
                }
            }
            for (at, first) in let_in.iter().enumerate() {
                let within = let_in[at..].iter().filter(|other| other.since(*first) < 60_000).count();
                prop_assert!(within <= 2 * per_minute as usize);
            }
        }
    }
}
