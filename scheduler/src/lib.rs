//! The deciding service: admission, continuous batching, KV blocks, membership and placement. It never touches a tensor.
//!
//! Layout: [`engine`] (which sequence computes what in which step), [`cluster`] (which node holds what), [`director`]
//! (both wired together), [`service`](mod@service) (the shell: sockets, lease, clock), [`time`].
//!
//! **Invariants:** [`engine`], [`cluster`] and [`director`] are pure cores of the form `handle(now, event, &mut effects)`: no tokio,
//! clock, randomness, I/O or randomly seeded map. The shell selects, lets them handle, and performs; it decides nothing.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod director;
pub mod engine;
pub mod jobs;
pub mod service;
pub mod time;

pub use service::{ModelCard, Scheduler, SchedulerConfig, SchedulerError, serve};
