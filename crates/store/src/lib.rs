//! What outlives a process. Cluster state behind one trait: leases with terms, versioned entries with compare-and-set. And
//! blobs: large immutable bytes under the name of their digest.
//!
//! Layout: [`api`] (the trait and its types), [`error`] (what can go wrong), [`limits`] (what is too large),
//! [`embedded`] (one file, redb, one process), [`remote`] (Redis, many processes), [`open`](mod@open) (from an
//! address), [`typed`] (collections of values: layouts, API keys), [`blobs`] (a directory or an S3-compatible service).
//!
//! **Invariants:** only this crate knows redb and Redis. Terms of a lease strictly increase as long as the store keeps its
//! data, and `min_term` lifts them above every term seen elsewhere when it does not. No operation waits for ever. The store
//! never sees a secret: API keys come hashed.
#![forbid(unsafe_code)]

pub mod api;
pub mod blobs;
pub mod embedded;
pub mod error;
pub mod limits;
pub mod open;
pub mod remote;
pub mod typed;

pub use api::{Entry, Expected, Lease, LeaseAnswer, Store, StoreFuture, Version};
pub use embedded::{EmbeddedStore, LeaseClock};
pub use error::StoreError;
pub use open::open;
pub use remote::{RedisOptions, RedisStore};
pub use typed::{ApiKeyRecord, Collection, api_keys, files, job_events, jobs, layouts};
