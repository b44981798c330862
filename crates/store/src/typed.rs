//! Collections of typed values: one key per value under a common prefix, JSON inside.

use crate::api::{Expected, Store, Version};
use crate::error::StoreError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::marker::PhantomData;

/// Digits by which a list is divided at most.
const PART_DIGITS_MAX: usize = 8;

/// Values of type `T` under one prefix.
pub struct Collection<'a, T> {
    store: &'a dyn Store,
    prefix: &'static str,
    value: PhantomData<fn() -> T>,
}

/// Layouts that are wished for, by model: intent, never observation.
pub fn layouts<T: Serialize + DeserializeOwned>(store: &dyn Store) -> Collection<'_, T> {
    Collection::new(store, "layout/")
}

/// API keys, by the hash of the key: the store never sees the key itself.
pub fn api_keys(store: &dyn Store) -> Collection<'_, ApiKeyRecord> {
    Collection::new(store, "api-key/")
}

/// Records of uploaded files, by their ids in hexadecimal digits.
pub fn files<T: Serialize + DeserializeOwned>(store: &dyn Store) -> Collection<'_, T> {
    Collection::new(store, "file/")
}

/// Fine-tuning jobs, by their ids in hexadecimal digits.
pub fn jobs<T: Serialize + DeserializeOwned>(store: &dyn Store) -> Collection<'_, T> {
    Collection::new(store, "job/")
}

/// Chunks of the events of fine-tuning jobs, as `JOB/CHUNK`.
pub fn job_events<T: Serialize + DeserializeOwned>(store: &dyn Store) -> Collection<'_, T> {
    Collection::new(store, "event/")
}

/// What is known of an API key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKeyRecord {
    /// For people, shown in lists.
    pub name: String,
    /// Whose requests these are: caches and limits are apart by it.
    pub tenant: String,
    /// Whether the key opens the Admin API.
    pub admin: bool,
    /// When it was made, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// When it ends, if ever.
    pub expires_unix_ms: Option<u64>,
}

impl<'a, T: Serialize + DeserializeOwned> Collection<'a, T> {
    /// Values under `prefix`, which ends with a slash.
    pub fn new(store: &'a dyn Store, prefix: &'static str) -> Collection<'a, T> {
        Collection { store, prefix, value: PhantomData }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn decode(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
        // The error of the decoder may quote the value; its place is enough.
        serde_json::from_slice(bytes).map_err(|error| {
            StoreError::Corrupt(format!("key {key}, column {} of its value", error.column()))
        })
    }

    /// Reads a value.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if it is not a `T`; those of [`Store::get`].
    pub async fn get(&self, name: &str) -> Result<Option<(Version, T)>, StoreError> {
        let key = self.key(name);
        let entry = self.store.get(&key).await?;
        entry.map(|entry| Ok((entry.version, Self::decode(&key, &entry.bytes)?))).transpose()
    }

    /// Writes a value.
    ///
    /// # Errors
    /// Those of [`Store::put`].
    pub async fn put(&self, name: &str, expected: Expected, value: &T) -> Result<Version, StoreError> {
        let bytes = serde_json::to_vec(value)
            .map_err(|error| StoreError::Invalid(format!("the value has no JSON form: {error}")))?;
        self.store.put(&self.key(name), expected, bytes).await
    }

    /// Deletes a value; returns whether there was one.
    ///
    /// # Errors
    /// Those of [`Store::delete`].
    pub async fn delete(&self, name: &str, expected: Expected) -> Result<bool, StoreError> {
        self.store.delete(&self.key(name), expected).await
    }

    /// Every value with its name, in the order of names.
    ///
    /// # Errors
    /// [`StoreError::Corrupt`] if one is not a `T`; those of [`Store::list`].
    pub async fn list(&self) -> Result<Vec<(String, Version, T)>, StoreError> {
        self.list_from("").await
    }

    /// As [`list`](Collection::list), of a collection whose names are hexadecimal digits, however many there are: where one
    /// list would be too large, it is asked for in parts, which are not of one moment.
    ///
    /// # Errors
    /// As [`list`](Collection::list), [`StoreError::TooLarge`] excepted.
    pub async fn list_parts(&self) -> Result<Vec<(String, Version, T)>, StoreError> {
        let mut found = Vec::new();
        let mut parts = vec![String::new()];
        while let Some(part) = parts.pop() {
            match self.list_from(&part).await {
                Err(StoreError::TooLarge { .. }) if part.len() < PART_DIGITS_MAX => {
                    parts.extend("fedcba9876543210".chars().map(|digit| format!("{part}{digit}")));
                }
                listed => found.append(&mut listed?),
            }
        }
        Ok(found)
    }

    async fn list_from(&self, names: &str) -> Result<Vec<(String, Version, T)>, StoreError> {
        let entries = self.store.list(&self.key(names)).await?;
        let decode = |(key, entry): (String, crate::api::Entry)| {
            let value = Self::decode(&key, &entry.bytes)?;
            Ok((key[self.prefix.len()..].to_owned(), entry.version, value))
        };
        entries.into_iter().map(decode).collect()
    }
}
