//! What a session reserves, by shape: the ledger's formula, but that a trainer knows its own buffers to the byte.

use ashlar_model::adapter::Target;
use ashlar_model::{RankSlice, Trained};
use ashlar_shard_plan::{Piece, SessionRequest, SessionWeights, Shares};
use ashlar_vocabulary::{Bytes, ModelShape};

/// What decides how much memory a session takes on a rank.
#[derive(Debug, Clone, Copy)]
pub struct SessionSize<'a> {
    /// The model.
    pub shape: &'a ModelShape,
    /// The rank's place.
    pub slice: &'a RankSlice,
    /// What trains.
    pub trained: &'a Trained,
    /// Most rows of a micro-batch.
    pub rows: usize,
    /// Whether blocks keep their activations.
    pub keep: bool,
    /// Micro-batches between their forward and backward pass: the stages from this one on.
    pub in_flight: usize,
}

/// What a session reserves beside its trainer's buffers: the adapter or the private copy of the model in all its forms, tapes, rows
/// on their way, and the rows of the head that it had to load.
pub fn session_bytes(size: &SessionSize<'_>) -> Bytes {
    let slice = size.slice;
    let piece = Piece {
        layers: slice.layers,
        first: slice.first,
        last: slice.last,
        rank: slice.tensor_rank,
        tensor_parallel_size: slice.tensor_parallel_size,
        head: slice.head,
    };
    let modules: Vec<String> = match size.trained {
        Trained::Adapter(spec) => spec.targets.iter().map(|target| Target::module(*target).into()).collect(),
        Trained::Model => Vec::new(),
    };
    let weights = match size.trained {
        Trained::Adapter(spec) => SessionWeights::Adapter { rank: spec.rank, modules: &modules },
        Trained::Model => SessionWeights::Model,
    };
    let request = SessionRequest { weights, micro_batch_rows: size.rows, keep_activations: size.keep };
    let shares = Shares::new(size.shape, slice.tensor_parallel_size);
    let memory = piece.session(&shares, size.in_flight.saturating_sub(1), 1, &request);
    memory.weights + memory.tapes + memory.head
}
