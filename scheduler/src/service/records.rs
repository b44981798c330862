//! Records in the store that one core owns and that stand by themselves: adapters that are served, and responses. They are read when a term
//! begins and written beside the work.

use crate::adapters::AdapterRecord;
use ashlar_protocol::responses::ResponseRecord;
use ashlar_store::{Collection, Entry, Expected, Store, StoreError, Version};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Digits by which a list is divided at most.
const PART_DIGITS_MAX: usize = 8;
/// Writes whose outcome has not been heard; at most one of a name is under way.
const OUTCOMES_MAX: usize = 1024;
/// Pause before the store is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// What can be recorded.
pub(super) trait Record: Serialize + DeserializeOwned + PartialEq + Send + Sync + 'static {
    /// Before every name.
    const PREFIX: &'static str;
    /// For the log.
    const WHAT: &'static str;
    /// Whether names are hexadecimal digits: then there may be more than one list of the store holds.
    const HAS_DIGITS: bool;
}

impl Record for AdapterRecord {
    const PREFIX: &'static str = "adapter/";
    const WHAT: &'static str = "an adapter";
    const HAS_DIGITS: bool = false;
}

impl Record for ResponseRecord {
    const PREFIX: &'static str = "response/";
    const WHAT: &'static str = "a response";
    const HAS_DIGITS: bool = true;
}

/// What became of a write.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) name: String,
    pub(super) outcome: Result<(), String>,
    /// What is there now, as far as is known.
    version: Option<Version>,
}

/// Writes records; each expects to find what this term has read or written.
pub(super) struct Records<T> {
    store: Arc<dyn Store>,
    versions: BTreeMap<String, Version>,
    outcomes: mpsc::Sender<Written>,
    record: PhantomData<fn() -> T>,
}

/// Records as they are when a term begins, and where it is heard what becomes of writes.
pub(super) struct Opened<T> {
    pub(super) records: Records<T>,
    pub(super) stored: Vec<(String, T)>,
    pub(super) written: mpsc::Receiver<Written>,
}

impl<T: Record> Records<T> {
    /// Reads every record, however long the store is away. One that cannot be read is left alone.
    pub(super) async fn open(store: Arc<dyn Store>) -> Opened<T> {
        let entries = loop {
            match list::<T>(&*store).await {
                Ok(entries) => break entries,
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%error, "the record of {} cannot be read yet", T::WHAT);
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => {
                    tracing::error!(%error, "no record of {} can be read: going on without", T::WHAT);
                    break Vec::new();
                }
            }
        };
        let (mut versions, mut records) = (BTreeMap::new(), Vec::new());
        for (key, entry) in entries {
            let name = key.strip_prefix(T::PREFIX).unwrap_or(&key).to_owned();
            versions.insert(name.clone(), entry.version);
            match serde_json::from_slice(&entry.bytes) {
                Ok(record) => records.push((name, record)),
                Err(error) => {
                    let column = error.column();
                    tracing::error!(%name, column, "the record of {} cannot be read: going on without it", T::WHAT);
                }
            }
        }
        let (outcomes, heard) = mpsc::channel(OUTCOMES_MAX);
        let opened = Records { store, versions, outcomes, record: PhantomData };
        Opened { records: opened, stored: records, written: heard }
    }

    /// Writes or deletes a record beside the work; the outcome comes through the channel.
    pub(super) fn write(&self, name: String, record: Option<T>) {
        let (store, outcomes) = (self.store.clone(), self.outcomes.clone());
        let expected = self.versions.get(&name).map_or(Expected::Absent, |version| Expected::At(*version));
        tokio::spawn(async move {
            let written = write(&*store, name, expected, record).await;
            // Nobody listens once the term is over.
            let _ = outcomes.send(written).await;
        });
    }

    /// Takes note of what is there now.
    pub(super) fn note(&mut self, written: &Written) {
        match written.version {
            Some(version) => self.versions.insert(written.name.clone(), version),
            None => self.versions.remove(&written.name),
        };
    }
}

/// All entries, in parts where there are too many for one list.
async fn list<T: Record>(store: &dyn Store) -> Result<Vec<(String, Entry)>, StoreError> {
    let mut found = Vec::new();
    let mut parts = vec![T::PREFIX.to_owned()];
    while let Some(part) = parts.pop() {
        let may_divide = T::HAS_DIGITS && part.len() < T::PREFIX.len() + PART_DIGITS_MAX;
        match store.list(&part).await {
            Err(StoreError::TooLarge { .. }) if may_divide => {
                parts.extend("fedcba9876543210".chars().map(|digit| format!("{part}{digit}")));
            }
            listed => found.append(&mut listed?),
        }
    }
    Ok(found)
}

async fn write<T: Record>(store: &dyn Store, name: String, expected: Expected, record: Option<T>) -> Written {
    let collection = Collection::<T>::new(store, T::PREFIX);
    let before = match expected {
        Expected::At(version) => Some(version),
        Expected::Any | Expected::Absent => None,
    };
    let done = match (&record, expected) {
        (Some(record), _) => collection.put(&name, expected, record).await.map(Some),
        // Never written: nothing to delete.
        (None, Expected::Absent) => Ok(None),
        (None, _) => collection.delete(&name, expected).await.map(|_| None),
    };
    let error: StoreError = match done {
        Ok(version) => return Written { name, outcome: Ok(()), version },
        Err(error) => error,
    };
    tracing::warn!(%name, %error, "{} could not be recorded", T::WHAT);
    // It may have been written all the same.
    match collection.get(&name).await {
        Ok(found) => {
            let same = found.as_ref().map(|(_, found)| found) == record.as_ref();
            let outcome = if same { Ok(()) } else { Err(error.to_string()) };
            Written { name, outcome, version: found.map(|(version, _)| version) }
        }
        Err(_) => Written { name, outcome: Err(error.to_string()), version: before },
    }
}
