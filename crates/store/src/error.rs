//! What can go wrong in a store.

use crate::api::Version;
use ashlar_vocabulary::LeaseTerm;
use std::path::PathBuf;

/// An error of a store. No message carries a value, a key's secret or an address's password.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The store cannot be reached or did not answer in time. Try again; a write may have happened.
    #[error("the store is unavailable ({0}): try again, and check that it runs and is reachable")]
    Unavailable(String),
    /// The disk refuses.
    #[error("state file {path}: {reason}: free some space or check the disk")]
    Disk {
        /// The state file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// Another write came first.
    #[error("key {key} was changed by somebody else: read it again, then write")]
    Conflict {
        /// Of the entry.
        key: String,
        /// What is there now.
        current: Option<Version>,
    },
    /// The lease has gone to somebody else, or has been forgotten.
    #[error("lease {name} of term {term} is lost: stop leading and acquire it again")]
    LeaseLost {
        /// Which lease.
        name: String,
        /// The term that is void.
        term: LeaseTerm,
    },
    /// Another process has the state file open.
    #[error("state file {path} is in use by another process: stop it, or choose another file")]
    Locked {
        /// The state file.
        path: PathBuf,
    },
    /// What is stored cannot be understood.
    #[error("the stored state is damaged ({0}): restore it from a copy, or move it away to start afresh")]
    Corrupt(String),
    /// The caller's argument is outside the limits.
    #[error("{0}")]
    Invalid(String),
    /// More than the limits allow.
    #[error("{what} is {size}, the limit is {limit}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// How large.
        size: usize,
        /// How large it may be.
        limit: usize,
    },
    /// The address does not name a store.
    #[error("{0}: write redb:PATH or redis://HOST:PORT/DATABASE")]
    Address(String),
}

impl StoreError {
    /// Whether the same call may succeed a little later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, StoreError::Unavailable(_))
    }
}
