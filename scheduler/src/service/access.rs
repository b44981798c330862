//! The shell around keys and quotas: what is let in before any core hears of it.

use super::SchedulerConfig;
use super::leader::{Leader, encode};
use super::records::{Record, Records, Written};
use crate::access::{Caller, Effect, Event, Keys, Quotas};
use crate::director::Input;
use crate::engine::GatewayId;
use ashlar_identity::ApiKey;
use ashlar_protocol::access::{KeyCall, KeyRecord, Scope};
use ashlar_protocol::admin::AdminReply;
use ashlar_protocol::serving::{FailureKind, FromScheduler, RequestFailure, Submit};
use ashlar_vocabulary::{KeyId, Tenant};
use std::collections::BTreeMap;

/// The tenant of the keys that the configuration has.
const OPERATOR: &str = "operator";

/// The keys that a configuration has, or what is wrong with them.
pub(super) fn configured(config: &SchedulerConfig) -> Result<Vec<KeyRecord>, String> {
    let keys = [
        ("admin_key", &config.admin_key, &Scope::ALL[..]),
        ("metrics_key", &config.metrics_key, &[Scope::Metrics][..]),
    ];
    let given = keys.into_iter().filter_map(|(name, key, scopes)| Some((name, key.as_ref()?, scopes)));
    given
        .map(|(name, key, scopes)| {
            let key: ApiKey = key.0.parse().map_err(|error| format!("{name}: {error}"))?;
            Ok(KeyRecord {
                id: key.id(),
                hash: key.hash(),
                name: format!("the scheduler's {name}"),
                tenant: Tenant(OPERATOR.to_owned()),
                scopes: scopes.to_vec(),
                models: None,
                adapters: None,
                limits: Default::default(),
                shares_prefixes: false,
                created_at: 0,
                expires_at: None,
                configured: true,
            })
        })
        .collect()
}

impl Record for KeyRecord {
    const PREFIX: &'static str = "key/";
    const WHAT: &'static str = "an API key";
    const HAS_DIGITS: bool = true;
}

/// Keys, what they may still ask for, and where they are recorded.
pub(super) struct Access {
    keys: Keys,
    quotas: Quotas,
    records: Records<KeyRecord>,
}

impl Access {
    /// What was stored, and what the configuration has.
    pub(super) fn new(
        records: Records<KeyRecord>,
        stored: Vec<(String, KeyRecord)>,
        configured: Vec<KeyRecord>,
    ) -> Access {
        let keys = Keys::new(stored.into_iter().map(|(_, record)| record), configured);
        Access { keys, quotas: Quotas::default(), records }
    }

    /// What gateways are told.
    pub(super) fn told(&self) -> FromScheduler {
        FromScheduler::Keys(self.keys.all().cloned().collect())
    }

    /// What engines are told.
    pub(super) fn kv_shares(&self) -> Input {
        let share = |key: &KeyRecord| Some((key.id, key.limits.kv_share_percent?));
        Input::KvShares(self.keys.all().filter_map(share).collect())
    }
}

impl Leader {
    /// Whether a submission is let in; answers it if not. Tells the gateway what is left of its key's limits.
    pub(super) fn lets_in(&mut self, gateway: GatewayId, submit: &Submit) -> bool {
        let (id, now) = (submit.id, self.now());
        let Some(charge) = submit.charge else { return true };
        let Some(limits) = self.access.keys.get(charge.key).map(|key| key.limits) else {
            if charge.resumed {
                return true;
            }
            let error = RequestFailure {
                kind: FailureKind::UnknownKey,
                message: "this API key is not let in any more".to_owned(),
                retry_after_ms: None,
            };
            self.tell_gateway(gateway, &FromScheduler::Failed { id, error });
            return false;
        };
        self.count_generated();
        let in_progress = match limits.concurrency {
            Some(_) => self.directors().map(|director| director.engine().in_progress(charge.key)).sum(),
            None => 0,
        };
        let Some(admission) = self.access.quotas.admit(now, &charge, &limits, in_progress) else {
            return true;
        };
        if let Some(quota) = admission.quota {
            self.tell_gateway(gateway, &FromScheduler::Quota { id, quota });
        }
        let Some((message, retry_after_ms)) = admission.refusal else { return true };
        let (kind, retry_after_ms) = (FailureKind::RateLimited, Some(retry_after_ms));
        let error = RequestFailure { kind, message, retry_after_ms };
        self.tell_gateway(gateway, &FromScheduler::Failed { id, error });
        false
    }

    /// Takes down what has been generated on the account of keys.
    pub(super) fn count_generated(&mut self) {
        let now = self.now();
        let mut generated: BTreeMap<KeyId, u64> = BTreeMap::new();
        for director in self.directors_mut() {
            for (key, tokens) in director.take_generated() {
                *generated.entry(key).or_default() += tokens;
            }
        }
        for (key, tokens) in generated {
            if let Some(record) = self.access.keys.get(key) {
                self.access.quotas.generated(now, key, &record.limits, tokens);
            }
        }
    }

    /// Time passes: what is full again need not be remembered.
    pub(super) fn tick_access(&mut self) {
        self.count_generated();
        let now = self.now();
        self.access.quotas.forget_full(now);
    }

    /// A gateway wants something of the keys.
    pub(super) fn key_call(&mut self, caller: Caller, call: KeyCall) {
        self.key_event(Event::Call(caller, call));
    }

    pub(super) fn key_written(&mut self, written: Written) {
        self.access.records.note(&written);
        if let Ok(id) = written.name.parse() {
            self.key_event(Event::Persisted(id, written.outcome));
        }
    }

    fn key_event(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.access.keys.handle(event, &mut effects);
        for effect in effects {
            match effect {
                Effect::Persist(id, record) => {
                    self.access.records.write(id.to_string(), record.map(|record| *record));
                }
                Effect::Changed => {
                    let told = encode(&self.access.told());
                    self.tell_all_gateways(&told);
                    let shares = self.access.kv_shares();
                    self.apply_to_all(&shares);
                }
                Effect::Reply((gateway, call), outcome) => {
                    let reply = Box::new(outcome.map_or_else(AdminReply::Refused, AdminReply::Key));
                    self.tell_gateway(gateway, &FromScheduler::Admin { call, reply });
                }
            }
        }
    }
}
