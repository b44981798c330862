//! What a session reserves, by shape.

use ashlar_model::stage::expected_bytes;
use ashlar_model::{RankSlice, TensorShare, Trained};
use ashlar_training::runs::SUMS_MAX;
use ashlar_vocabulary::{Bytes, ModelShape};

/// Forms of a rank's share of an adapter beside its gradients: weights and two moments, their packed form, and room to put them
/// together from shards.
const ADAPTER_FORMS: usize = 1 + 2 + 1 + 1;
/// Forms of a rank's share of a whole model beside its gradients and the packed form, which is counted as it is.
const MODEL_FORMS: usize = 1 + 2;
/// A tensor that is put together for the model's files: weights and moments, which of them were found, and bytes on their way.
const EXPORT_FORMS: usize = 3 + 1 + 1;

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
    let SessionSize { shape, slice, trained, rows, .. } = *size;
    let hidden = shape.hidden_size;
    let (query, key) = (slice.queries(shape).len(), slice.keys(shape).len());
    let feed_forward = slice.feed_forward(shape).len();
    let layers = slice.layers.len();
    let low = trained.adapter().map_or(0, |spec| spec.rank * spec.targets.len());
    // Per row and layer: queries and keys before their norms, rotated ones and values, attended heads, middle, gate and up.
    let whole = 2 * hidden + (query + key) + (query + 2 * key) + query + 2 * feed_forward + low;
    let tape = if size.keep { whole } else { hidden };
    let tapes = size.in_flight * layers * rows * tape + if size.keep { 0 } else { rows * whole };
    let (ranks, on_their_way) = (slice.tensor_parallel_size, 2 * rows * hidden);
    let spread = slice.head.is_some_and(|head| head.of > ranks);
    let head = match trained {
        Trained::Adapter(_) if slice.last && spread => {
            shape.head_bytes(ashlar_vocabulary::HeadSlice { index: slice.tensor_rank, of: ranks })
        }
        _ => 0,
    };
    Bytes((4 * (tapes + on_their_way) + head) as u64) + weights_bytes(size)
}

/// What trains, in all its forms.
fn weights_bytes(size: &SessionSize<'_>) -> Bytes {
    let SessionSize { shape, slice, trained, .. } = *size;
    let (weights, sums) = (trained.weights(shape, slice).numbers(), trained.sums(shape, slice).numbers());
    let gradients = SUMS_MAX * sums;
    let Trained::Model = trained else {
        return Bytes(4 * (ADAPTER_FORMS * weights + gradients) as u64);
    };
    // The ends of a tied model exchange their tables: what goes, what comes, and what is queued.
    let table = if shape.tied_head { 3 * slice.vocabulary(shape).len() * shape.hidden_size } else { 0 };
    let whole = trained.weights(shape, &RankSlice::whole(shape));
    let largest = whole.shares().iter().map(TensorShare::numbers).max().unwrap_or(0);
    let export = if slice.first && slice.tensor_rank == 0 { EXPORT_FORMS * largest } else { 0 };
    // While a block is packed anew, the former one is there, too.
    let packed = expected_bytes(shape, slice).0;
    let again = packed.div_ceil(slice.layers.len().max(1) as u64);
    Bytes(4 * (MODEL_FORMS * weights + gradients + table + export) as u64 + packed + again)
}
