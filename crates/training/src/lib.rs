//! What a rank keeps of a fine-tuning job between micro-batches: gradients on their way to a step, and the optimiser.
//!
//! * [`runs`]: gradients of a global batch's eight runs, added up in the contract's tree.
//! * [`norm`]: the norm of a gradient that lies on many ranks.
//! * [`settle`]: from these to gradients by weights, where the two differ.
//! * [`init`]: what an adapter or a model starts from.
//! * [`state`]: weights and moments of a rank, moved by one step at a time.
//! * [`preference`]: the loss of pairs of answers.
//! * [`checkpoint`]: the same as bytes, and the way back onto any other layout.
//!
//! **Invariants:** no socket, clock, thread or file. Whatever the grid, the numbers that belong to one tensor are the same
//! bits: nothing here depends on which rank holds them, or on how samples came in micro-batches.
#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod init;
pub mod norm;
pub mod preference;
pub mod runs;
pub mod settle;
pub mod state;

pub use init::{initial_adapter, initial_model};
pub use norm::{NormTerms, gradient_norm};
pub use preference::Preference;
pub use runs::RunTree;
pub use settle::settle;
pub use state::{Hyperparameters, TrainingState};
