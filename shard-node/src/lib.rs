//! The executing service: one process is one rank. It holds a range of layers and a slice of their heads and columns,
//! the KV cache of just these, and decides nothing.
//!
//! * [`beat`]: the compute loop's sign of life.
//! * [`config`]: what a node is told before it starts.
//! * [`sequencer`]: pure: which plans are valid, and what each sequence's tokens and blocks are.
//! * [`executor`]: the compute thread: applies plans strictly in order.
//! * `adapters`: adapters of the slice, loaded beside the steps.
//! * `slices`: what is in memory of the model: to serve, and prepared for what comes.
//! * `copies`: packed copies of the slice, from one start to the next.
//! * [`sampling`]: samplers and grammars of the last stage's rank 0.
//! * [`links`]: data connections to other ranks.
//! * [`activations`]: rows from stage to stage, in the type that was chosen.
//! * [`group`]: the tensor-parallel group's exchange, through shared memory or over sockets.
//! * [`head`]: a head that is spread over all stages: rows out, slices of logits back.
//! * [`training`]: fine-tuning beside serving, on threads of its own.
//! * `files`: the model's files on a node that was given none: found, fetched, kept, and handed out.
//! * [`fence`]: the persisted highest lease term.
//! * `speeds`: what the machine can do, measured or remembered.
//! * [`threads`]: how many threads compute, and on which cores.
//! * [`spans`]: what traced requests cost this rank.
//! * [`service`]: the thin shell: control connection, data listener, reconnects.
//!
//! **Invariants:** the sequencer performs no I/O and reads no clock. A rank obeys only the highest lease term it has
//! seen. Steps are executed in order or not at all.
#![forbid(unsafe_code)]

pub mod activations;
mod adapters;
pub mod beat;
mod boundary_log;
pub mod config;
mod control;
mod copies;
mod digests;
pub mod executor;
pub mod fence;
mod files;
pub mod group;
pub mod head;
pub mod links;
mod logits;
mod rows;
pub mod sampling;
pub mod sequencer;
pub mod service;
mod slices;
pub mod spans;
mod speeds;
pub mod threads;
pub mod training;

pub use config::{FetchPolicy, NodeConfig, Pin};
pub use service::{NodeError, serve};
