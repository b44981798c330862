//! Where in a replica a stage is.

use crate::ledger::Piece;
use ashlar_vocabulary::{HeadSlice, LayerRange};

/// A stage's place in its replica: it decides what the stage holds beside layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Which stage, from 0.
    pub stage: usize,
    /// How many the replica has.
    pub stages: usize,
    /// Whether every stage holds slices of the head, not only the last one.
    pub spread_head: bool,
}

impl Position {
    /// Whether the stage embeds tokens.
    pub fn is_first(&self) -> bool {
        self.stage == 0
    }

    /// Whether the stage ends the model.
    pub fn is_last(&self) -> bool {
        self.stage + 1 == self.stages
    }

    /// What rank `rank` of `tensor_parallel_size` holds here, with these layers.
    pub fn piece(&self, layers: LayerRange, rank: usize, tensor_parallel_size: usize) -> Piece {
        let (stage, ranks) = ((self.stage, self.stages), (rank, tensor_parallel_size));
        Piece {
            layers,
            first: self.is_first(),
            last: self.is_last(),
            rank,
            tensor_parallel_size,
            head: HeadSlice::of_rank(self.spread_head, stage, ranks),
        }
    }
}
