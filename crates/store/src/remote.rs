//! State in Redis, shared by processes. Every operation is one script, so it is atomic, and has a time-out.
//!
//! Time is the server's. Safety does not rest on it: a lease that ends early or late because the server's clock was set
//! only means another grant at a higher term. One server (or a primary that fails over) is meant, not a cluster of slots.

use crate::api::{Entry, Expected, Lease, LeaseAnswer, Store, StoreFuture, Version};
use crate::error::StoreError;
use crate::limits;
use ashlar_vocabulary::LeaseTerm;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use redis::{Client, FromRedisValue, RedisError, Script, ScriptInvocation, Value};
use std::sync::Arc;
use std::time::Duration;

/// How to talk to Redis.
#[derive(Debug, Clone)]
pub struct RedisOptions {
    /// Longest time of one operation, reconnecting included.
    pub timeout: Duration,
    /// What every key starts with, so that clusters can share a server.
    pub prefix: String,
}

impl Default for RedisOptions {
    fn default() -> RedisOptions {
        RedisOptions { timeout: Duration::from_secs(2), prefix: "ashlar:".into() }
    }
}

/// A store in Redis. Reconnects by itself; while it cannot, operations are unavailable.
#[derive(Clone)]
pub struct RedisStore {
    connection: ConnectionManager,
    options: Arc<RedisOptions>,
    scripts: Arc<Scripts>,
}

struct Scripts {
    acquire: Script,
    renew: Script,
    put: Script,
    delete: Script,
    list: Script,
}

impl RedisStore {
    /// Connects to `redis://…` and checks that the server answers.
    ///
    /// # Errors
    /// [`StoreError::Address`] if the address cannot be read, [`StoreError::Unavailable`] if nobody answers.
    pub async fn connect(url: &str, options: RedisOptions) -> Result<RedisStore, StoreError> {
        limits::check_prefix("store prefix", &options.prefix)?;
        let client = Client::open(url)
            .map_err(|_| StoreError::Address("the address of Redis cannot be read".into()))?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(options.timeout))
            .set_response_timeout(Some(options.timeout))
            .set_number_of_retries(2)
            .set_min_delay(Duration::from_millis(20))
            .set_max_delay(Duration::from_millis(200));
        let connection = ConnectionManager::new_lazy_with_config(client, config).map_err(error)?;
        let scripts = Scripts {
            acquire: Script::new(include_str!("lua/acquire.lua")),
            renew: Script::new(include_str!("lua/renew.lua")),
            put: Script::new(include_str!("lua/put.lua")),
            delete: Script::new(include_str!("lua/delete.lua")),
            list: Script::new(include_str!("lua/list.lua")),
        };
        let store = RedisStore { connection, options: Arc::new(options), scripts: Arc::new(scripts) };
        let mut connection = store.connection.clone();
        store.within(async move { redis::cmd("PING").query_async::<Value>(&mut connection).await }).await?;
        Ok(store)
    }

    async fn within<T>(&self, work: impl Future<Output = Result<T, RedisError>>) -> Result<T, StoreError> {
        match tokio::time::timeout(self.options.timeout, work).await {
            Ok(result) => result.map_err(error),
            Err(_) => Err(StoreError::Unavailable(format!("no answer within {:?}", self.options.timeout))),
        }
    }

    async fn invoke<T: FromRedisValue>(&self, call: ScriptInvocation<'_>) -> Result<T, StoreError> {
        let mut connection = self.connection.clone();
        self.within(async move { call.invoke_async(&mut connection).await }).await
    }

    fn lease_key(&self, name: &str) -> String {
        format!("{}lease:{name}", self.options.prefix)
    }

    fn entry_key(&self, key: &str) -> String {
        format!("{}entry:{key}", self.options.prefix)
    }

    fn index_key(&self) -> String {
        format!("{}index", self.options.prefix)
    }

    fn version_key(&self) -> String {
        format!("{}version", self.options.prefix)
    }

    async fn change_lease(&self, lease: &Lease, ttl: Duration) -> Result<bool, StoreError> {
        limits::check_lease(&lease.name, &lease.holder, lease.ttl, LeaseTerm(0))?;
        let mut call = self.scripts.renew.prepare_invoke();
        call.key(self.lease_key(&lease.name)).arg(&lease.holder).arg(lease.term.0).arg(millis(ttl));
        Ok(self.invoke::<u8>(call).await? == 1)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// What the server says is retryable unless it is an answer that we cannot read.
fn error(error: RedisError) -> StoreError {
    match error.kind() {
        redis::ErrorKind::Parse | redis::ErrorKind::UnexpectedReturnType => {
            StoreError::Corrupt("redis answers with something else than was written".into())
        }
        redis::ErrorKind::AuthenticationFailed => {
            StoreError::Unavailable("redis refuses the user or the password".into())
        }
        _ => StoreError::Unavailable(format!("redis: {error}")),
    }
}

fn number(text: &str) -> Result<u64, StoreError> {
    text.parse().map_err(|_| StoreError::Corrupt("redis holds a term or version that is no number".into()))
}

fn expected_text(expected: Expected) -> String {
    match expected {
        Expected::Any => "any".into(),
        Expected::Absent => "absent".into(),
        Expected::At(version) => version.0.to_string(),
    }
}

/// The version in a script's answer, or the conflict that it reports.
fn outcome(key: &str, (done, version): (u8, String)) -> Result<Option<Version>, StoreError> {
    let version = if version.is_empty() { None } else { Some(Version(number(&version)?)) };
    if done == 1 { Ok(version) } else { Err(StoreError::Conflict { key: key.to_owned(), current: version }) }
}

impl Store for RedisStore {
    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        holder: &'a str,
        ttl: Duration,
        min_term: LeaseTerm,
    ) -> StoreFuture<'a, LeaseAnswer> {
        Box::pin(async move {
            limits::check_lease(name, holder, ttl, min_term)?;
            let mut call = self.scripts.acquire.prepare_invoke();
            call.key(self.lease_key(name)).arg(holder).arg(millis(ttl)).arg(min_term.0);
            let answer: Vec<String> = self.invoke(call).await?;
            match answer.iter().map(String::as_str).collect::<Vec<_>>()[..] {
                ["1", term] => Ok(LeaseAnswer::Granted(Lease {
                    name: name.to_owned(),
                    holder: holder.to_owned(),
                    term: LeaseTerm(number(term)?),
                    ttl,
                })),
                ["0", term, remaining, by] => Ok(LeaseAnswer::Held {
                    by: by.to_owned(),
                    term: LeaseTerm(number(term)?),
                    remaining: Duration::from_millis(number(remaining)?),
                }),
                _ => Err(StoreError::Corrupt(format!("lease {name}"))),
            }
        })
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()> {
        Box::pin(async move {
            if self.change_lease(lease, lease.ttl).await? {
                Ok(())
            } else {
                Err(StoreError::LeaseLost { name: lease.name.clone(), term: lease.term })
            }
        })
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()> {
        Box::pin(async move { self.change_lease(lease, Duration::ZERO).await.map(|_| ()) })
    }

    fn last_term<'a>(&'a self, name: &'a str) -> StoreFuture<'a, LeaseTerm> {
        Box::pin(async move {
            limits::check_name("lease name", name)?;
            let mut connection = self.connection.clone();
            let mut command = redis::cmd("HGET");
            command.arg(self.lease_key(name)).arg("term");
            let term: Option<String> =
                self.within(async move { command.query_async(&mut connection).await }).await?;
            term.map_or(Ok(LeaseTerm(0)), |term| number(&term).map(LeaseTerm))
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        Box::pin(async move {
            limits::check_name("key", key)?;
            let mut connection = self.connection.clone();
            let mut command = redis::cmd("HMGET");
            command.arg(self.entry_key(key)).arg("v").arg("b");
            let (version, bytes): (Option<String>, Option<Vec<u8>>) =
                self.within(async move { command.query_async(&mut connection).await }).await?;
            match (version, bytes) {
                (None, _) => Ok(None),
                (Some(version), Some(bytes)) => {
                    Ok(Some(Entry { version: Version(number(&version)?), bytes }))
                }
                (Some(_), None) => Err(StoreError::Corrupt(format!("key {key} has no value"))),
            }
        })
    }

    fn put<'a>(&'a self, key: &'a str, expected: Expected, bytes: Vec<u8>) -> StoreFuture<'a, Version> {
        Box::pin(async move {
            limits::check_name("key", key)?;
            limits::check_value(&bytes)?;
            let mut call = self.scripts.put.prepare_invoke();
            call.key(self.entry_key(key)).key(self.index_key()).key(self.version_key());
            call.arg(key).arg(expected_text(expected)).arg(bytes);
            let version = outcome(key, self.invoke(call).await?)?;
            version.ok_or_else(|| StoreError::Corrupt(format!("key {key} has no version")))
        })
    }

    fn delete<'a>(&'a self, key: &'a str, expected: Expected) -> StoreFuture<'a, bool> {
        Box::pin(async move {
            limits::check_name("key", key)?;
            let mut call = self.scripts.delete.prepare_invoke();
            call.key(self.entry_key(key)).key(self.index_key()).arg(key).arg(expected_text(expected));
            Ok(outcome(key, self.invoke(call).await?)?.is_some())
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<(String, Entry)>> {
        Box::pin(async move {
            limits::check_prefix("key prefix", prefix)?;
            let mut call = self.scripts.list.prepare_invoke();
            call.key(self.index_key()).arg(prefix).arg(self.entry_key(""));
            call.arg(limits::LIST_ENTRIES_MAX).arg(limits::LIST_BYTES_MAX);
            let answer: Vec<Value> = self.invoke(call).await?;
            read_list(prefix, answer)
        })
    }
}

fn read_list(prefix: &str, answer: Vec<Value>) -> Result<Vec<(String, Entry)>, StoreError> {
    let damaged = || StoreError::Corrupt(format!("the list of keys under {prefix}"));
    let too_large = |what: &str, size: &Value, limit| match size {
        Value::Int(size) => StoreError::TooLarge {
            what: format!("{what} under {prefix}"),
            size: usize::try_from(*size).unwrap_or(usize::MAX),
            limit,
        },
        _ => damaged(),
    };
    let (head, rest) = answer.split_first().ok_or_else(damaged)?;
    match (head, rest) {
        (Value::Int(0), _) => {}
        (Value::Int(1), [size]) => {
            return Err(too_large("the number of keys", size, limits::LIST_ENTRIES_MAX));
        }
        (Value::Int(2), [size]) => {
            return Err(too_large("the number of bytes", size, limits::LIST_BYTES_MAX));
        }
        _ => return Err(damaged()),
    }
    let mut found = Vec::with_capacity(rest.len() / 3);
    for item in rest.chunks(3) {
        let [Value::BulkString(key), Value::BulkString(version), Value::BulkString(bytes)] = item else {
            return Err(damaged());
        };
        let key = String::from_utf8(key.clone()).map_err(|_| damaged())?;
        let version = number(std::str::from_utf8(version).map_err(|_| damaged())?)?;
        found.push((key, Entry { version: Version(version), bytes: bytes.clone() }));
    }
    Ok(found)
}
