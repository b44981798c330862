//! API keys and what each may still ask for, as pure functions of events.
//!
//! Layout: here the table of keys and what is durable of it, `quotas` (buckets of requests and tokens).
//!
//! A gateway makes a key and checks what clients show; here it is decided which keys there are, and every gateway is told at once.
//! Limits are counted here and not by gateways, so that more gateways do not give a key more.
//!
//! **Invariants:** no tokio, clock, randomness or I/O. A key is let in only once its record is durable, and no longer from the
//! moment on in which its end is. One change of a key at a time is under way.

mod quotas;

pub use quotas::{Admission, Quotas};

use crate::engine::GatewayId;
use ashlar_protocol::access::{KEY_NAME_BYTES_MAX, KEY_NAMES_MAX, KEYS_MAX, KeyCall, KeyRecord};
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use ashlar_vocabulary::KeyId;
use std::collections::BTreeMap;

/// Who waits for an answer: a gateway's call.
pub type Caller = (GatewayId, u64);

/// What the table of keys is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A gateway calls.
    Call(Caller, KeyCall),
    /// An [`Effect::Persist`] has been done, or could not be.
    Persisted(KeyId, Result<(), String>),
}

/// What the table of keys wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Store a key's record, or forget it.
    Persist(KeyId, Option<Box<KeyRecord>>),
    /// Tell every gateway of all keys.
    Changed,
    /// Answer a call with the key as it is, or was.
    Reply(Caller, Result<Box<KeyRecord>, AdminFailure>),
}

/// All keys.
#[derive(Debug, Default, Clone)]
pub struct Keys {
    keys: BTreeMap<KeyId, KeyRecord>,
    changes: BTreeMap<KeyId, Change>,
}

/// A change that is not durable yet.
#[derive(Debug, Clone)]
struct Change {
    /// `None` ends the key.
    record: Option<Box<KeyRecord>>,
    callers: Vec<Caller>,
}

fn refused(kind: AdminFailureKind, message: impl Into<String>) -> AdminFailure {
    AdminFailure { kind, message: message.into() }
}

impl Keys {
    /// What was stored, and what the configuration has besides.
    pub fn new(
        stored: impl IntoIterator<Item = KeyRecord>,
        configured: impl IntoIterator<Item = KeyRecord>,
    ) -> Keys {
        let keys = stored.into_iter().chain(configured).map(|record| (record.id, record));
        Keys { keys: keys.collect(), changes: BTreeMap::new() }
    }

    /// Every key that is let in, by id.
    pub fn all(&self) -> impl Iterator<Item = &KeyRecord> {
        self.keys.values()
    }

    /// A key that is let in.
    pub fn get(&self, id: KeyId) -> Option<&KeyRecord> {
        self.keys.get(&id)
    }

    /// Applies one event.
    pub fn handle(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Call(caller, KeyCall::Create(record)) => self.create(caller, record, effects),
            Event::Call(caller, KeyCall::Revoke(id)) => self.revoke(caller, id, effects),
            Event::Persisted(id, outcome) => self.persisted(id, outcome, effects),
        }
    }

    fn create(&mut self, caller: Caller, mut record: Box<KeyRecord>, effects: &mut Vec<Effect>) {
        record.configured = false;
        let id = record.id;
        let known = self.keys.get(&id);
        if known == Some(&record) && !self.changes.contains_key(&id) {
            return effects.push(Effect::Reply(caller, Ok(record)));
        }
        if let Err(refusal) = self.may_create(&record) {
            return effects.push(Effect::Reply(caller, Err(refusal)));
        }
        if let Some(change) = self.changes.get_mut(&id) {
            return change.callers.push(caller);
        }
        self.changes.insert(id, Change { record: Some(record.clone()), callers: vec![caller] });
        effects.push(Effect::Persist(id, Some(record)));
    }

    fn may_create(&self, record: &KeyRecord) -> Result<(), AdminFailure> {
        let invalid = |message: String| Err(refused(AdminFailureKind::Invalid, message));
        let id = record.id;
        let same = |change: &Change| change.record.as_deref() == Some(record);
        if self.keys.contains_key(&id) || self.changes.get(&id).is_some_and(|change| !same(change)) {
            return Err(refused(AdminFailureKind::Conflict, format!("there is another key {id}")));
        }
        if self.keys.len() + self.changes.len() >= KEYS_MAX {
            let message = format!("there are {KEYS_MAX} keys: revoke some");
            return Err(refused(AdminFailureKind::Full, message));
        }
        if record.name.is_empty() || record.name.len() > KEY_NAME_BYTES_MAX {
            return invalid(format!("`name` must have 1 to {KEY_NAME_BYTES_MAX} bytes"));
        }
        if !record.tenant.is_valid() {
            return invalid("`tenant` must be 1 to 64 letters, digits, `-`, `_` and `.`".to_owned());
        }
        if record.scopes.is_empty() {
            return invalid("`scopes` must name at least one".to_owned());
        }
        let lists = [("models", &record.models), ("adapters", &record.adapters)];
        for (field, names) in lists.into_iter().filter_map(|(field, names)| Some((field, names.as_ref()?))) {
            if names.len() > KEY_NAMES_MAX || names.iter().any(|name| name.len() > KEY_NAME_BYTES_MAX) {
                return invalid(format!(
                    "`{field}` must be at most {KEY_NAMES_MAX} names of at most {KEY_NAME_BYTES_MAX} bytes"
                ));
            }
        }
        if record.limits.kv_share_percent.is_some_and(|percent| !(1..=100).contains(&percent)) {
            return invalid("`kv_share_percent` must be between 1 and 100".to_owned());
        }
        Ok(())
    }

    fn revoke(&mut self, caller: Caller, id: KeyId, effects: &mut Vec<Effect>) {
        let refusal = match (self.keys.get(&id), self.changes.get_mut(&id)) {
            (_, Some(change)) if change.record.is_none() => return change.callers.push(caller),
            (_, Some(_)) => refused(AdminFailureKind::Conflict, format!("the key {id} is just being made")),
            (None, None) => refused(AdminFailureKind::NotFound, format!("there is no key {id}")),
            (Some(record), None) if record.configured => refused(
                AdminFailureKind::Conflict,
                format!("the key {id} is in the scheduler's configuration: change it there"),
            ),
            (Some(_), None) => {
                self.changes.insert(id, Change { record: None, callers: vec![caller] });
                return effects.push(Effect::Persist(id, None));
            }
        };
        effects.push(Effect::Reply(caller, Err(refusal)));
    }

    fn persisted(&mut self, id: KeyId, outcome: Result<(), String>, effects: &mut Vec<Effect>) {
        let Some(Change { record, callers }) = self.changes.remove(&id) else { return };
        let reply = match outcome {
            Err(why) => {
                let message = format!("the key cannot be stored ({why}): try again when the store is back");
                Err(refused(AdminFailureKind::Unavailable, message))
            }
            Ok(()) => {
                let before = match &record {
                    Some(record) => self.keys.insert(id, (**record).clone()),
                    None => self.keys.remove(&id),
                };
                effects.push(Effect::Changed);
                let missing = || refused(AdminFailureKind::NotFound, format!("there is no key {id}"));
                record.or(before.map(Box::new)).ok_or_else(missing)
            }
        };
        effects.extend(callers.into_iter().map(|caller| Effect::Reply(caller, reply.clone())));
    }
}
