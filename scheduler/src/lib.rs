//! The deciding service: admission, continuous batching, KV blocks, membership and placement. It never touches a tensor.
//!
//! Layout: [`engine`] (which sequence computes what in which step), [`cluster`] (which node holds what), [`fleet`] (which node serves
//! which model, where there are several), [`adapters`] (what
//! is served beside the model, and where it is loaded), [`jobs`] (files and fine-tuning), [`responses`] (answers that outlive the
//! connection over which they were asked for), [`audit`] (sampled sequences, computed again elsewhere), [`access`] (keys, and what each may ask for), [`director`] (all wired together), [`service`](mod@service) (the shell:
//! sockets, lease, clock), [`time`].
//!
//! **Invariants:** [`engine`], [`cluster`], [`fleet`], [`adapters`], [`jobs`], [`responses`], [`audit`], [`access`] and [`director`] are pure cores of the form `handle(now, event, &mut effects)`: no tokio,
//! clock, randomness, I/O or randomly seeded map. The shell selects, lets them handle, and performs; it decides nothing.
#![forbid(unsafe_code)]

pub mod access;
pub mod adapters;
pub mod audit;
pub mod cluster;
pub mod director;
pub mod engine;
pub mod fleet;
pub mod jobs;
pub mod responses;
pub mod service;
mod shelf;
pub mod time;

pub use service::{ModelCard, ModelOpener, Scheduler, SchedulerConfig, SchedulerError, serve};
