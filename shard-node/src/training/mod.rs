//! Fine-tuning beside serving: sessions of jobs, each on a thread of its own.
//!
//! * `manager`: which sessions there are; what reaches them; their end.
//! * `session`: a session's life: opened, one piece of work after the other, closed.
//! * `start`: what it starts from, `engine`: steps and measurements, `export`: what comes of it.
//! * `links`: connections of a session, `facts`: what travels on them beside numbers.
//! * `data`: the samples and the plan, `storage`: the blob store.
//! * `memory`: what a session reserves.
//! * `alarm`: what ends a session from outside, `error`: why it ended.
//!
//! **Invariants:** a session shares nothing with serving but the weights, which it only reads (where all weights train, it has a
//! copy of its own): its kernels, threads and
//! connections are its own, its threads have the lowest priority and stop between tasks while the compute thread computes a step. It
//! never outlives its layout: where weights are about to be replaced, sessions have given them up before.

mod alarm;
mod data;
mod engine;
mod error;
mod export;
mod facts;
mod links;
mod manager;
pub mod memory;
mod session;
mod start;
mod storage;

pub use manager::Sessions;

use crate::links::LinkSettings;
use ashlar_identity::Transport;
use ashlar_kernels::{Isa, YieldFlag};
use ashlar_model::StageModel;
use ashlar_store::blobs::Blobs;
use ashlar_vocabulary::{LeaseTerm, ReplicaRevision};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A rank's place in a layout that serves.
#[derive(Debug, Clone)]
pub struct Place {
    /// The scheduler's lease.
    pub term: LeaseTerm,
    /// The layout.
    pub revision: ReplicaRevision,
    /// Which stage, from 0.
    pub stage: usize,
    /// How many there are.
    pub num_stages: usize,
    /// The weights.
    pub model: Arc<StageModel>,
    /// The model's name, as the scheduler has it.
    pub model_name: String,
    /// Where the model's files are.
    pub directory: PathBuf,
}

/// What sessions of a node are made with.
#[derive(Clone)]
pub struct Resources {
    /// Samples come from here, states and adapters go there; without it no session opens.
    pub blobs: Option<Blobs>,
    /// Where calls to it run.
    pub runtime: Handle,
    /// Where samples are kept while a session is open.
    pub directory: PathBuf,
    /// The instruction set.
    pub isa: Isa,
    /// Threads of a session.
    pub threads: usize,
    /// How connections are made.
    pub links: LinkSettings,
    /// How connections to other ranks are made.
    pub transport: Transport,
    /// Raised while the node serves.
    pub urgent: YieldFlag,
}

impl fmt::Debug for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resources").field("directory", &self.directory).finish_non_exhaustive()
    }
}
