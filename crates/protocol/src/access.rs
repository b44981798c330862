//! Who may do what: API keys as the scheduler keeps them and gateways check them, and how much each may still ask for.
//!
//! A key's text is shown once, where it is made; everything here holds its hash alone.

use ashlar_vocabulary::{KeyId, Tenant};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most keys: every gateway knows all of them.
pub const KEYS_MAX: usize = 10_000;
/// Longest name of a key, in bytes.
pub const KEY_NAME_BYTES_MAX: usize = 128;
/// Most models, and most adapters, that a key names.
pub const KEY_NAMES_MAX: usize = 64;

/// What a key is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// To ask models: chats, completions, responses, tokens.
    Inference,
    /// Files and fine-tuning jobs of its tenant.
    Training,
    /// Everything about the cluster, and all that belongs to tenants.
    Admin,
    /// To read metrics.
    Metrics,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 4] = [Scope::Inference, Scope::Training, Scope::Admin, Scope::Metrics];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Inference => "inference",
            Scope::Training => "training",
            Scope::Admin => "admin",
            Scope::Metrics => "metrics",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How much a key may ask for. `None` is without a limit.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KeyLimits {
    /// Requests per minute: so many at once, which come back evenly.
    pub requests_per_minute: Option<u32>,
    /// Tokens of prompts and answers per minute, as requests. What an answer takes beyond it is owed by the next request.
    pub tokens_per_minute: Option<u32>,
    /// Choices in progress at once.
    pub concurrency: Option<u32>,
    /// Percent of a replica's KV blocks that its running sequences may hold; more wait.
    pub kv_share_percent: Option<u8>,
    /// Minutes for which jobs of its tenant may train in all.
    pub training_minutes: Option<u32>,
    /// The most urgent priority of its requests; lower goes first. Theirs counts from here, downwards.
    pub priority: i32,
}

/// A key, but for its text.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// Its name in the API; part of its text.
    pub id: KeyId,
    /// Hash of its text.
    pub hash: [u8; 32],
    /// What people call it.
    pub name: String,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it is good for.
    pub scopes: Vec<Scope>,
    /// The base models that it may ask; `None` is all of them.
    pub models: Option<Vec<String>>,
    /// The adapters that it may ask for, besides those of its own tenant; `None` is all that are nobody's.
    pub adapters: Option<Vec<String>>,
    /// How much it may ask for.
    pub limits: KeyLimits,
    /// Whether it finds prefixes in the cache that others have computed who share theirs too, instead of those of its tenant alone.
    pub shares_prefixes: bool,
    /// Seconds since 1970.
    pub created_at: u64,
    /// From then on it is good for nothing; seconds since 1970.
    pub expires_at: Option<u64>,
    /// Whether a configuration file has it: it cannot be revoked otherwise.
    #[serde(default)]
    pub configured: bool,
}

impl fmt::Debug for KeyRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRecord")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("tenant", &self.tenant)
            .field("scopes", &self.scopes)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// What a gateway wants of the keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeyCall {
    /// Let a key in. The same one may be sent twice.
    Create(Box<KeyRecord>),
    /// Let it in no longer.
    Revoke(KeyId),
}

/// On whose account a choice is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Charge {
    /// The key.
    pub key: KeyId,
    /// Requests that begin with this choice: 1 for the first one of each.
    pub requests: u32,
    /// Tokens of prompts that begin with it: several choices of one prompt pay for it once.
    pub prompt_tokens: u32,
    /// Whether it has been let in before, and is submitted again.
    pub resumed: bool,
}

/// What is left of a key's limits.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Of requests per minute.
    pub requests: Option<QuotaLine>,
    /// Of tokens per minute.
    pub tokens: Option<QuotaLine>,
}

/// What is left of one limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuotaLine {
    /// The limit.
    pub limit: u32,
    /// What may be asked for at once.
    pub remaining: u32,
    /// Milliseconds until all of it may.
    pub reset_ms: u64,
}
