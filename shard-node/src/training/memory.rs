//! What a session reserves, by shape.

use ashlar_model::RankSlice;
use ashlar_model::adapter::LoraSpec;
use ashlar_vocabulary::{Bytes, ModelShape};

/// Copies of a rank's share of the adapter: weights and two moments, their packed form, gradients of the runs and of open
/// subtrees of a batch (at most four), zeros to start one from, and the bytes of the next state.
const COPIES: usize = 1 + 2 + 1 + 5 + 1 + 3;

/// What decides how much memory a session takes on a rank.
#[derive(Debug, Clone, Copy)]
pub struct SessionSize<'a> {
    /// The model.
    pub shape: &'a ModelShape,
    /// The rank's place.
    pub slice: &'a RankSlice,
    /// The adapter.
    pub spec: &'a LoraSpec,
    /// Most rows of a micro-batch.
    pub rows: usize,
    /// Whether blocks keep their activations.
    pub keep: bool,
    /// Micro-batches between their forward and backward pass: the stages from this one on.
    pub in_flight: usize,
}

/// What a session reserves beside its trainer's buffers: the adapter in all its forms, tapes, rows on their way, and the rows
/// of the head that it had to load.
pub fn session_bytes(size: &SessionSize<'_>) -> Bytes {
    let SessionSize { shape, slice, spec, rows, .. } = *size;
    let hidden = shape.hidden_size;
    let (query, key) = (slice.queries(shape).len(), slice.keys(shape).len());
    let feed_forward = slice.feed_forward(shape).len();
    let layers = slice.layers.len();
    let pair = |target: &ashlar_model::adapter::Target| {
        spec.rank * (target.inputs(shape, slice).len() + target.outputs(shape, slice).len())
    };
    let adapter = COPIES * layers * spec.targets.iter().map(pair).sum::<usize>();
    let low = spec.rank * spec.targets.len();
    // Per row and layer: queries and keys before their norms, rotated ones and values, attended heads, middle, gate and up.
    let whole = 2 * hidden + (query + key) + (query + 2 * key) + query + 2 * feed_forward + low;
    let tape = if size.keep { whole } else { hidden };
    let tapes = size.in_flight * layers * rows * tape + if size.keep { 0 } else { rows * whole };
    let (ranks, on_their_way) = (slice.tensor_parallel_size, 2 * rows * hidden);
    let spread = slice.head.is_some_and(|head| head.of > ranks);
    let head = if slice.last && spread {
        shape.head_bytes(ashlar_vocabulary::HeadSlice { index: slice.tensor_rank, of: ranks })
    } else {
        0
    };
    Bytes((4 * (adapter + tapes + on_their_way) + head) as u64)
}
