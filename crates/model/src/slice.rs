//! Which part of the model a rank holds: layers by stage, heads and columns by tensor-parallel rank.

use ashlar_vocabulary::{LayerRange, ModelShape};
use std::ops::Range;

/// A rank's place in the cut of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankSlice {
    /// Layers of the stage.
    pub layers: LayerRange,
    /// Whether the stage embeds tokens.
    pub first: bool,
    /// Whether the stage computes logits.
    pub last: bool,
    /// Rank within the group.
    pub tensor_rank: usize,
    /// Size of the group: 1, 2, 4 or 8, dividing the KV heads.
    pub tensor_parallel_size: usize,
}

impl RankSlice {
    /// The whole model on one rank.
    pub fn whole(shape: &ModelShape) -> RankSlice {
        RankSlice {
            layers: LayerRange { start: 0, end: shape.num_layers },
            first: true,
            last: true,
            tensor_rank: 0,
            tensor_parallel_size: 1,
        }
    }

    /// Why this slice is impossible for `shape`, if it is.
    pub fn problem(&self, shape: &ModelShape) -> Option<String> {
        let size = self.tensor_parallel_size;
        if ![1, 2, 4, 8].contains(&size) || !shape.num_kv_heads.is_multiple_of(size) {
            return Some(format!(
                "tensor parallelism of {size} cannot cut {} key/value heads: use 1, 2, 4 or 8 that divides them",
                shape.num_kv_heads
            ));
        }
        if self.layers.start > self.layers.end || self.layers.end > shape.num_layers {
            return Some(format!("layers {} of a model with {}", self.layers, shape.num_layers));
        }
        None
    }

    /// Query elements of this rank.
    pub fn queries(&self, shape: &ModelShape) -> Range<usize> {
        shape.attention_cut().rank(self.tensor_rank, self.tensor_parallel_size)
    }

    /// Key (or value) elements of this rank.
    pub fn keys(&self, shape: &ModelShape) -> Range<usize> {
        shape.key_cut().rank(self.tensor_rank, self.tensor_parallel_size)
    }

    /// Feed-forward elements of this rank.
    pub fn feed_forward(&self, shape: &ModelShape) -> Range<usize> {
        shape.feed_forward_cut().rank(self.tensor_rank, self.tensor_parallel_size)
    }

    /// Vocabulary rows of this rank.
    pub fn vocabulary(&self, shape: &ModelShape) -> Range<usize> {
        shape.vocab_cut().rank(self.tensor_rank, self.tensor_parallel_size)
    }
}
