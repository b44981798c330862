//! Where the stones go: from a model's shape, the devices and the links between them to replicas, stages, ranks,
//! layer ranges and a ledger of every byte.
//!
//! Layout: [`request`] (what goes in), [`speeds`] (what counts as equally fast), [`layout`] (what comes out), [`position`] (what a stage holds by its
//! place), [`shares`] (what its ranks hold of each layer), [`ledger`] (memory of one rank), [`session`] (what fine-tuning takes of it), [`cost`] (seconds of one stage), [`cut`] (the exact dynamic program over contiguous ranges), [`plan`](mod@plan) (which stages,
//! replicas and standbys), [`error`] (why not).
//!
//! **Invariants:** pure — no clock, randomness, I/O or randomly seeded map; equal inputs give equal layouts. Only
//! contiguous, non-empty layer ranges are ever produced, and no ledger exceeds its capacity.
#![forbid(unsafe_code)]

pub mod cost;
pub mod cut;
pub mod error;
pub mod layout;
pub mod ledger;
pub mod plan;
pub mod position;
pub mod request;
pub mod session;
pub mod shares;
pub mod speeds;

mod explain;
mod overrides;

pub use error::PlanError;
pub use layout::{Layout, Prediction, ReplicaLayout, StageLayout};
pub use ledger::{LedgerRow, MemoryLedger, Piece};
pub use plan::{plan, survivable_losses};
pub use position::Position;
pub use request::{DeviceReport, LinkReport, Links, PlanRequest};
pub use session::{SessionMemory, SessionRequest, SessionWeights};
pub use shares::{LayerShare, Shares};
