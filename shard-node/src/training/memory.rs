//! What a session reserves, by shape: the ledger's formula, the same by which the scheduler has found room for it.

use ashlar_model::adapter::Target;
use ashlar_model::{RankSlice, Trained};
use ashlar_shard_plan::{Piece, SessionMemory, SessionRequest, SessionWeights, Shares};
use ashlar_vocabulary::ModelShape;

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
    /// Stages behind this one.
    pub stages_behind: usize,
    /// Threads that compute.
    pub threads: usize,
    /// Replicas that train together.
    pub replicas: usize,
    /// Whether an adapter does not see all of its inputs.
    pub dropout: bool,
}

/// What a session reserves on a rank.
pub fn session_memory(size: &SessionSize<'_>) -> SessionMemory {
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
    let request = SessionRequest {
        weights,
        micro_batch_rows: size.rows,
        keep_activations: size.keep,
        replicas: size.replicas,
        dropout: size.dropout,
    };
    let shares = Shares::new(size.shape, slice.tensor_parallel_size);
    piece.session(&shares, size.stages_behind, size.threads as u32, &request)
}
