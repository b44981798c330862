//! Which part of the model a rank holds: layers by stage, heads and columns by tensor-parallel rank, rows of the head by
//! either.

use ashlar_vocabulary::{HeadSlice, LayerRange, ModelShape};
use std::ops::Range;

/// A rank's place in the cut of one model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankSlice {
    /// Layers of the stage.
    pub layers: LayerRange,
    /// Whether the stage embeds tokens.
    pub first: bool,
    /// Whether the stage ends the model: it norms the rows whose logits are wanted, and its rank 0 gets the logits.
    pub last: bool,
    /// Rank within the group.
    pub tensor_rank: usize,
    /// Size of the group: 1, 2, 4 or 8, dividing the KV heads.
    pub tensor_parallel_size: usize,
    /// Its rows of the head. The last stage always has some; earlier stages where the head is spread over all of them.
    pub head: Option<HeadSlice>,
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
            head: Some(HeadSlice { index: 0, of: 1 }),
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
        self.head_problem(shape)
    }

    fn head_problem(&self, shape: &ModelShape) -> Option<String> {
        let Some(HeadSlice { index, of }) = self.head else {
            return self.last.then(|| "the last stage needs rows of the head".to_owned());
        };
        let size = self.tensor_parallel_size;
        // The last stage's slices are the last ones: what its group gathers lies together.
        let in_order = match (self.last, of.checked_sub(size)) {
            (_, None) => false,
            (true, Some(earlier)) => index == earlier + self.tensor_rank,
            (false, Some(earlier)) => index < earlier,
        };
        if ![1, 2, 4, 8].contains(&of) || !in_order {
            return Some(format!("slice {index} of {of} of the head is none for this rank"));
        }
        if of > size && HeadSlice::rows(&HeadSlice { index, of }, shape).is_empty() {
            return Some(format!(
                "{of} ranks are too many for a vocabulary of {}: turn spread_head off",
                shape.vocab_size
            ));
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

    /// Whether one copy of a tied table serves as embedding and head.
    pub fn shares_table(&self, shape: &ModelShape) -> bool {
        shape.tied_head && self.first && self.head == Some(HeadSlice { index: 0, of: 1 })
    }

    /// Rows of the embedding table on this rank, if its stage is the first.
    pub fn vocabulary(&self, shape: &ModelShape) -> Range<usize> {
        shape.vocab_cut().rank(self.tensor_rank, self.tensor_parallel_size)
    }
}
