//! Who may do what: keys that clients show, what a route asks of them, and what their holder sees.
//!
//! Layout: here [`Access`] (what a route asks for), [`Caller`] (who asks), [`KeyTable`] (the keys that are let in, as the scheduler
//! last told), and how a request's head becomes a caller. Whoever is let in gets a view of the [`App`](crate::app::App) that shows what
//! is theirs, so that no handler has to think of it.
//!
//! A key is looked up by its id, which is no secret; its hash is then compared in the same time whichever bits differ, and with a
//! stand-in where there is no such key.

use crate::openai::error::ApiError;
use ashlar_identity::ApiKey;
use ashlar_protocol::access::{Charge, KeyRecord, Scope};
use ashlar_protocol::admin::AdapterView;
use ashlar_protocol::responses::ResponseRecord;
use ashlar_vocabulary::{KeyId, Tenant};
use axum::http::{HeaderMap, header};
use std::collections::HashMap;
use std::sync::Arc;

/// What a route asks of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Nothing: it shows nothing of anybody.
    Public,
    /// Any key.
    AnyKey,
    /// To ask models.
    Inference,
    /// To fine-tune.
    Training,
    /// To steer the cluster.
    Admin,
    /// To read metrics.
    Metrics,
}

impl Access {
    /// What a key must be good for, one of these; for the reference.
    pub(crate) fn scopes(self) -> &'static [Scope] {
        match self {
            Access::Public | Access::AnyKey => &[],
            Access::Inference => &[Scope::Inference],
            Access::Training => &[Scope::Training, Scope::Admin],
            Access::Admin => &[Scope::Admin],
            Access::Metrics => &[Scope::Metrics, Scope::Admin],
        }
    }

    fn is_granted_by(self, scopes: &[Scope]) -> bool {
        let wanted = self.scopes();
        wanted.is_empty() || wanted.iter().any(|scope| scopes.contains(scope))
    }
}

/// Who asks.
#[derive(Debug, Default, Clone)]
pub(crate) struct Caller {
    /// `None` where no key is needed, for this server's own work, and where the key has been revoked meanwhile.
    key: Option<Arc<KeyRecord>>,
    /// Whose is what it makes.
    owner: Option<Tenant>,
}

impl Caller {
    /// This server itself, and whoever asks where no key is needed: everything is to be seen.
    pub(crate) fn anybody() -> Caller {
        Caller::default()
    }

    /// For whom a stored response is computed, whether its key is still let in or not.
    pub(crate) fn of_response(record: &ResponseRecord, keys: Option<&KeyTable>) -> Caller {
        let key = record.key.and_then(|id| keys?.keys.get(&id)).cloned();
        Caller { key, owner: record.owner.clone() }
    }

    /// The key.
    pub(crate) fn key(&self) -> Option<&KeyRecord> {
        self.key.as_deref()
    }

    /// The key's name in logs.
    pub(crate) fn key_id(&self) -> Option<KeyId> {
        self.key().map(|key| key.id)
    }

    /// For whom calls are: what belongs to others is not there. `None` sees everything.
    pub(crate) fn tenant(&self) -> Option<Tenant> {
        let is_admin = self.key().is_some_and(|key| key.scopes.contains(&Scope::Admin));
        self.owner.clone().filter(|_| !is_admin)
    }

    /// Whose is what it makes.
    pub(crate) fn owner(&self) -> Option<Tenant> {
        self.owner.clone()
    }

    /// Whether it sees what has this owner.
    pub(crate) fn sees(&self, owner: &Option<Tenant>) -> bool {
        self.tenant().is_none_or(|tenant| owner.as_ref() == Some(&tenant))
    }

    /// What separates its cached prefixes from those of others.
    pub(crate) fn salt(&self) -> u64 {
        let shares = self.key().is_some_and(|key| key.shares_prefixes);
        let Some(tenant) = self.owner.as_ref().filter(|_| !shares) else { return 0 };
        let mut bytes = [0; 8];
        let hash = ashlar_identity::fingerprint(tenant.0.as_bytes());
        bytes.copy_from_slice(&hash[..8]);
        u64::from_le_bytes(bytes)
    }

    /// On whose account a choice is.
    pub(crate) fn charge(&self, requests: u32, prompt_tokens: u32, resumed: bool) -> Option<Charge> {
        self.key_id().map(|key| Charge { key, requests, prompt_tokens, resumed })
    }

    /// The priority of a request that asks for this one: a key's requests may give way, and go before others only where the key does.
    pub(crate) fn priority(&self, asked: i32) -> i32 {
        self.key().map_or(asked, |key| key.limits.priority.saturating_add(asked.max(0)))
    }

    /// Whether it may ask a base model of these names.
    pub(crate) fn may_ask(&self, names: &[String]) -> bool {
        let models = self.key().and_then(|key| key.models.as_ref());
        models.is_none_or(|models| names.iter().any(|name| models.contains(name)))
    }

    /// Whether an adapter is there for it.
    pub(crate) fn may_use(&self, adapter: &AdapterView) -> bool {
        match &adapter.owner {
            Some(_) => self.sees(&adapter.owner),
            None => {
                let named = self.key().and_then(|key| key.adapters.as_ref());
                named.is_none_or(|names| names.contains(&adapter.name))
            }
        }
    }
}

/// The keys that are let in.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct KeyTable {
    keys: HashMap<KeyId, Arc<KeyRecord>>,
}

impl KeyTable {
    /// As the scheduler tells of them.
    pub fn new(records: Vec<KeyRecord>) -> KeyTable {
        KeyTable { keys: records.into_iter().map(|record| (record.id, Arc::new(record))).collect() }
    }

    /// All of them, by age.
    pub(crate) fn all(&self) -> Vec<Arc<KeyRecord>> {
        let mut all: Vec<_> = self.keys.values().cloned().collect();
        all.sort_by_key(|key| (key.created_at, key.id));
        all
    }

    /// The key with this text, if it is let in at this time.
    fn find(&self, key: &ApiKey, unix_s: u64) -> Option<&Arc<KeyRecord>> {
        let stand_in = [0; 32];
        let record = self.keys.get(&key.id());
        // Compared in any case: how long this takes does not tell which ids there are.
        let same = key.is(record.map_or(&stand_in, |record| &record.hash));
        record.filter(|record| same && record.expires_at.is_none_or(|end| unix_s < end))
    }
}

/// What a client shows.
enum Shown {
    Nothing,
    Key(ApiKey),
    /// Something that is no key of ours: clients send one even where none is needed.
    Other,
}

fn shown(headers: &HeaderMap) -> Shown {
    let Some(value) = headers.get(header::AUTHORIZATION) else { return Shown::Nothing };
    let text = value.to_str().unwrap_or_default();
    let bearer = text.split_once(' ').filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    bearer.and_then(|(_, key)| key.parse().ok()).map_or(Shown::Other, Shown::Key)
}

/// Who a request is from.
///
/// # Errors
/// 401 without a key that is let in, where one is needed; 403 where it is not good for this; 503 while the keys are not known.
pub(crate) fn authenticate(
    headers: &HeaderMap,
    access: Access,
    keys: Option<&KeyTable>,
    is_required: bool,
    unix_s: u64,
) -> Result<Caller, ApiError> {
    if access == Access::Public {
        return Ok(Caller::anybody());
    }
    let key = match shown(headers) {
        Shown::Key(key) => key,
        Shown::Nothing | Shown::Other if !is_required => return Ok(Caller::anybody()),
        Shown::Nothing => {
            return Err(ApiError::unauthorized(
                "an API key is needed: send it as `Authorization: Bearer KEY`",
                None,
            ));
        }
        Shown::Other => return Err(wrong_key()),
    };
    let Some(keys) = keys else {
        return Err(ApiError::unavailable("this server has not heard yet which keys there are"));
    };
    let record = keys.find(&key, unix_s).ok_or_else(wrong_key)?;
    if !access.is_granted_by(&record.scopes) {
        let scopes: Vec<&str> = access.scopes().iter().map(|scope| scope.name()).collect();
        let message = format!("this key is not good for that: it needs the scope {}", scopes.join(" or "));
        return Err(ApiError::forbidden(message));
    }
    Ok(Caller { owner: Some(record.tenant.clone()), key: Some(record.clone()) })
}

fn wrong_key() -> ApiError {
    ApiError::unauthorized(
        "this is no API key that is let in: it is mistyped, has expired or was revoked",
        Some("invalid_api_key"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use ashlar_protocol::access::KeyLimits;
    use axum::http::HeaderValue;

    fn record(key: &ApiKey, scopes: &[Scope]) -> KeyRecord {
        KeyRecord {
            id: key.id(),
            hash: key.hash(),
            name: "test".into(),
            tenant: Tenant("blue".into()),
            scopes: scopes.to_vec(),
            models: None,
            adapters: None,
            limits: KeyLimits::default(),
            shares_prefixes: false,
            created_at: 1,
            expires_at: Some(100),
            configured: false,
        }
    }

    fn bearer(key: &str) -> HeaderMap {
        let value = HeaderValue::from_str(&format!("Bearer {key}")).unwrap();
        HeaderMap::from_iter([(header::AUTHORIZATION, value)])
    }

    #[test]
    fn a_key_opens_what_it_is_good_for_until_it_expires() {
        let key = ApiKey::generate().unwrap();
        let table = KeyTable::new(vec![record(&key, &[Scope::Inference])]);
        let asks = |headers: &HeaderMap, access, unix_s| {
            authenticate(headers, access, Some(&table), true, unix_s).map_err(|error| error.status.as_u16())
        };
        let own = bearer(key.reveal());
        assert_eq!(asks(&own, Access::Inference, 99).unwrap().owner(), Some(Tenant("blue".into())));
        assert!(asks(&own, Access::AnyKey, 99).is_ok());
        assert_eq!(asks(&own, Access::Inference, 100).unwrap_err(), 401);
        for access in [Access::Admin, Access::Training, Access::Metrics] {
            assert_eq!(asks(&own, access, 99).unwrap_err(), 403, "{access:?}");
        }
        for wrong in [HeaderMap::new(), bearer("sk-anything"), bearer(ApiKey::generate().unwrap().reveal())] {
            assert_eq!(asks(&wrong, Access::AnyKey, 99).unwrap_err(), 401);
            assert!(asks(&wrong, Access::Public, 99).is_ok());
        }
        // The right id with another secret.
        let mut forged = key.reveal().to_owned();
        let last = if forged.pop() == Some('a') { 'b' } else { 'a' };
        forged.push(last);
        assert_eq!(asks(&bearer(&forged), Access::Inference, 99).unwrap_err(), 401);
    }

    #[test]
    fn where_no_key_is_needed_a_wrong_one_of_ours_is_still_refused() {
        let table = KeyTable::default();
        let asks = |headers: &HeaderMap| authenticate(headers, Access::Admin, Some(&table), false, 0);
        assert!(asks(&HeaderMap::new()).is_ok());
        assert!(asks(&bearer("sk-anything")).is_ok());
        assert_eq!(asks(&bearer(ApiKey::generate().unwrap().reveal())).unwrap_err().status.as_u16(), 401);
    }

    #[test]
    fn what_is_anothers_is_not_there() {
        let key = ApiKey::generate().unwrap();
        let caller = |scopes: &[Scope]| {
            let record = record(&key, scopes);
            Caller { owner: Some(record.tenant.clone()), key: Some(Arc::new(record)) }
        };
        let (own, other) = (Some(Tenant("blue".into())), Some(Tenant("red".into())));
        let tenant = caller(&[Scope::Inference]);
        assert!(tenant.sees(&own) && !tenant.sees(&other) && !tenant.sees(&None));
        let admin = caller(&Scope::ALL);
        assert!(admin.sees(&own) && admin.sees(&other) && admin.sees(&None));
        assert!(Caller::anybody().sees(&other));
        assert_eq!(Caller::anybody().salt(), 0);
        assert_ne!(tenant.salt(), 0);
        assert_eq!(tenant.salt(), admin.salt(), "the salt is the tenant's");
    }
}
