//! A rank's share of a job's state as bytes, and the way back onto any other layout.
//!
//! A shard says what it is, so that whoever has all shards of a step can put any share together from them.
//!
//! ```text
//! magic "ASHSTATE", version u32, length of the header u32, the header (JSON), then all numbers (f32):
//! per tensor in the header's order: weights, first moment, second moment
//! ```
//!
//! Numbers are little-endian. There is no checksum: a shard is stored under its digest. Both ways go tensor by tensor, so that a
//! state is never in memory twice.

mod restore;
mod shard;

pub use restore::{Restore, model_tensor};
pub use shard::Shard;

use crate::state::TrainingState;
use ashlar_model::tensors::{TensorLayout, TensorShare};
use ashlar_model::{Tensors, Trained};
use ashlar_vocabulary::JobId;
use serde::{Deserialize, Serialize};
use std::io;
use std::ops::Range;

const MAGIC: [u8; 8] = *b"ASHSTATE";
const VERSION: u32 = 2;
/// Magic, version, length of the header.
const FRAME_BYTES: usize = 16;
/// Longest header: a few hundred bytes per layer.
const HEADER_BYTES_MAX: usize = 16 << 20;
/// Weights and two moments.
const KINDS: usize = 3;
/// Numbers that are made bytes at a time.
const CHUNK: usize = 64 << 10;

/// Why a state cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Bytes that are no shard of this version.
    #[error("a share of the training state is not of version {VERSION}: start the job anew")]
    Version,
    /// Bytes that are not what was written.
    #[error("a share of the training state is damaged ({0}): start the job anew")]
    Damaged(&'static str),
    /// A shard of something else.
    #[error("a share of the training state belongs to another {0}: name the shares of one step of this job")]
    Mismatch(&'static str),
    /// Not every number was found.
    #[error("the shares of the training state do not cover {0}: name all shares of the step")]
    Missing(String),
    /// The bytes cannot be read.
    #[error("a share of the training state cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// Which step of which job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The job.
    pub job: JobId,
    /// Steps of the job that are in the state, skipped ones included.
    pub steps: u64,
}

/// A rectangle of a whole tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StoredShare {
    name: String,
    rows: Range<usize>,
    columns: Range<usize>,
}

impl StoredShare {
    fn numbers(&self) -> usize {
        self.rows.len().saturating_mul(self.columns.len())
    }
}

impl From<&TensorShare> for StoredShare {
    fn from(share: &TensorShare) -> StoredShare {
        StoredShare { name: share.name.clone(), rows: share.rows.clone(), columns: share.columns.clone() }
    }
}

/// What a shard says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    job: String,
    steps: u64,
    optimizer_steps: u32,
    adapter: Option<AdapterHeader>,
    tensors: Vec<StoredShare>,
}

/// Which adapter trains, if it is one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct AdapterHeader {
    rank: usize,
    alpha: f64,
    rank_stabilized: bool,
}

fn adapter_header(trained: &Trained) -> Option<AdapterHeader> {
    trained.adapter().map(|spec| AdapterHeader {
        rank: spec.rank,
        alpha: spec.alpha,
        rank_stabilized: spec.rank_stabilized,
    })
}

/// What of a layout is stored.
fn stored(layout: &TensorLayout) -> impl Iterator<Item = &TensorShare> {
    layout.shares().iter().filter(|share| !share.is_copy)
}

/// Gives a rank's share as bytes to `put`, piece by piece.
///
/// # Errors
/// Those of `put`.
pub fn write<E>(
    state: &TrainingState,
    at: Position,
    put: &mut dyn FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let layout = state.weights().layout();
    let header = Header {
        job: at.job.to_string(),
        steps: at.steps,
        optimizer_steps: state.steps(),
        adapter: adapter_header(state.trained()),
        tensors: stored(layout).map(StoredShare::from).collect(),
    };
    // A header is numbers and names, which always have a JSON form.
    let header = serde_json::to_vec(&header).unwrap_or_default();
    put(&MAGIC)?;
    put(&VERSION.to_le_bytes())?;
    put(&(header.len() as u32).to_le_bytes())?;
    put(&header)?;
    let (first, second) = state.moments();
    let mut bytes = Vec::with_capacity(4 * CHUNK);
    for share in stored(layout) {
        for numbers in [state.weights(), first, second].map(|kind: &Tensors| kind.get(share.id)) {
            for chunk in numbers.unwrap_or_default().chunks(CHUNK) {
                bytes.clear();
                bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
                put(&bytes)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
