//! Records of what is served beside the model, in the store: read when a term begins, written beside the work.

use crate::adapters::AdapterRecord;
use ashlar_store::{Collection, Expected, Store, StoreError, Version};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Where adapters are recorded, by name.
const ADAPTERS: &str = "adapter/";
/// Writes whose outcome has not been heard; at most one of a name is under way.
const OUTCOMES_MAX: usize = 1024;
/// Pause before the store is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// What became of a write.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) name: String,
    pub(super) outcome: Result<(), String>,
    /// What is there now, as far as is known.
    version: Option<Version>,
}

/// Writes records; each expects to find what this term has read or written.
pub(super) struct Records {
    store: Arc<dyn Store>,
    versions: BTreeMap<String, Version>,
    outcomes: mpsc::Sender<Written>,
}

impl Records {
    /// Reads every record, however long the store is away. One that cannot be read is left alone and not served.
    pub(super) async fn open(
        store: Arc<dyn Store>,
    ) -> (Records, Vec<(String, AdapterRecord)>, mpsc::Receiver<Written>) {
        let entries = loop {
            match store.list(ADAPTERS).await {
                Ok(entries) => break entries,
                Err(error) if error.is_retryable() => {
                    tracing::warn!(%error, "cannot read which adapters are served");
                    tokio::time::sleep(RETRY).await;
                }
                Err(error) => {
                    tracing::error!(%error, "adapters cannot be read: none is served");
                    break Vec::new();
                }
            }
        };
        let (mut versions, mut records) = (BTreeMap::new(), Vec::new());
        for (key, entry) in entries {
            let name = key.strip_prefix(ADAPTERS).unwrap_or(&key).to_owned();
            versions.insert(name.clone(), entry.version);
            match serde_json::from_slice(&entry.bytes) {
                Ok(record) => records.push((name, record)),
                Err(error) => {
                    let column = error.column();
                    tracing::error!(%name, column, "the record of an adapter cannot be read: it is not served");
                }
            }
        }
        let (outcomes, heard) = mpsc::channel(OUTCOMES_MAX);
        (Records { store, versions, outcomes }, records, heard)
    }

    /// Writes or deletes a record beside the work; the outcome comes through the channel.
    pub(super) fn write(&self, name: String, record: Option<AdapterRecord>) {
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

async fn write(
    store: &dyn Store,
    name: String,
    expected: Expected,
    record: Option<AdapterRecord>,
) -> Written {
    let collection = Collection::<AdapterRecord>::new(store, ADAPTERS);
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
    tracing::warn!(%name, %error, "an adapter could not be recorded");
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
