//! The trait, and the words it speaks.

use crate::error::StoreError;
use ashlar_vocabulary::LeaseTerm;
use serde::{Deserialize, Serialize};
use std::pin::Pin;
use std::time::Duration;

/// The answer of a store, to be awaited. Boxed, so that `dyn Store` is possible.
pub type StoreFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'a>>;

/// The version of an entry. Versions of one store only rise, over all keys and over deletions, so that a version names
/// one write for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version(pub u64);

/// A value with its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Of the write that made it.
    pub version: Version,
    /// At most [`limits::VALUE_BYTES_MAX`](crate::limits::VALUE_BYTES_MAX).
    pub bytes: Vec<u8>,
}

/// What a write expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Whatever is there.
    Any,
    /// Nothing.
    Absent,
    /// Exactly this version.
    At(Version),
}

/// A lease that was granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// What is leased, for example `scheduler`.
    pub name: String,
    /// To whom. Each process must have its own: who asks again under the same name gets a new term, and its earlier
    /// lease is void.
    pub holder: String,
    /// The fencing token: higher than that of every earlier grant.
    pub term: LeaseTerm,
    /// How long it holds from the grant or the last renewal. Count it from *before* the call.
    pub ttl: Duration,
}

/// The answer to a wish for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeaseAnswer {
    /// Granted.
    Granted(Lease),
    /// Another holder has it.
    Held {
        /// Who.
        by: String,
        /// Under which term.
        term: LeaseTerm,
        /// How long still, unless renewed.
        remaining: Duration,
    },
}

/// Cluster state. Implementations pass one conformance suite.
///
/// Every operation may fail with [`StoreError::Unavailable`]; a write that does so may have happened: read before writing
/// again.
pub trait Store: Send + Sync + 'static {
    /// Asks for the lease `name`. A grant has the term max(last term + 1, `min_term`).
    ///
    /// # Errors
    /// [`StoreError::Invalid`] for names or a time-to-live outside the limits.
    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        holder: &'a str,
        ttl: Duration,
        min_term: LeaseTerm,
    ) -> StoreFuture<'a, LeaseAnswer>;

    /// Extends a lease to its full time-to-live from now. A lease that has run out, but that nobody took, is extended
    /// too: no other term has been granted since.
    ///
    /// # Errors
    /// [`StoreError::LeaseLost`] if a later grant exists, or if the store has forgotten it: stop leading at once.
    fn renew<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()>;

    /// Gives a lease back; one that is lost already is no error. Its term is never granted again.
    fn release<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()>;

    /// The highest term ever granted for `name`; 0 if none.
    fn last_term<'a>(&'a self, name: &'a str) -> StoreFuture<'a, LeaseTerm>;

    /// Reads an entry.
    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>>;

    /// Writes an entry, durably before it answers (as durably as Redis is configured to be).
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with what is there instead of `expected`.
    fn put<'a>(&'a self, key: &'a str, expected: Expected, bytes: Vec<u8>) -> StoreFuture<'a, Version>;

    /// Deletes an entry; returns whether there was one.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] with what is there instead of `expected`.
    fn delete<'a>(&'a self, key: &'a str, expected: Expected) -> StoreFuture<'a, bool>;

    /// Every entry whose key starts with `prefix`, in the order of keys, as of one moment.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] above [`limits::LIST_ENTRIES_MAX`](crate::limits::LIST_ENTRIES_MAX) entries or
    /// [`limits::LIST_BYTES_MAX`](crate::limits::LIST_BYTES_MAX) bytes.
    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<(String, Entry)>>;
}
