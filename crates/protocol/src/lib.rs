//! Every message between roles, both planes, and how it is framed.
//!
//! * [`access`]: gateway ↔ scheduler (API keys and their limits).
//! * [`admin`]: gateway ↔ scheduler (files, fine-tuning jobs, adapters).
//! * [`responses`]: gateway ↔ scheduler (responses that outlive their connection).
//! * [`training`]: scheduler ↔ ranks (fine-tuning: sessions, steps, votes).
//! * [`serving`]: gateway ↔ scheduler (submissions, token events, a watched snapshot of the cluster).
//! * [`membership`]: node ↔ scheduler, control plane (join, assignment, readiness).
//! * [`prefix`]: names for the content of KV blocks, which scheduler and ranks agree upon.
//! * [`step`]: scheduler → ranks → scheduler, every step (plans and results).
//! * [`data`]: rank ↔ rank (activations between stages, partial sums within a tensor-parallel group, slices of the logits).
//! * [`group`]: rank ↔ rank (how a tensor-parallel group will exchange), once per layout.
//! * [`files`]: node ↔ node (files of the model, for a node that has none).
//! * [`enrolment`]: a machine that joins ↔ the enrolment endpoint, once per machine.
//! * [`frame`]: length, checksum and version around all of it, for asynchronous and blocking sockets.
//!
//! **Invariants:** only this crate knows the bytes on a wire. Lengths are capped before anything is allocated. Every
//! data-plane message carries (`LeaseTerm`, `ReplicaRevision`, step), so that a stale one is recognised and dropped.
//! Messages are postcard-encoded behind a version that both sides check first ([`WIRE_VERSION`]).
#![forbid(unsafe_code)]

pub mod access;
pub mod admin;
pub mod data;
pub mod enrolment;
pub mod files;
pub mod frame;
pub mod group;
pub mod membership;
pub mod models;
pub mod prefix;
pub mod responses;
pub mod serving;
pub mod step;
pub mod training;

/// Version of all messages here. Two processes that differ refuse each other, naming both versions.
pub const WIRE_VERSION: u32 = 15;
