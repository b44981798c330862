//! Who computes which rows of the head.

use crate::{AxisCut, ModelShape};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// A rank's slice of the head: rows of the vocabulary. Slices are put side by side and never added, so any number of them
/// gives the same bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadSlice {
    /// Which slice, in the order of the vocabulary.
    pub index: usize,
    /// How many there are: 1, 2, 4 or 8.
    pub of: usize,
}

impl HeadSlice {
    /// What rank `rank` of `tensor_parallel_size` in stage `stage` of `stages` holds. A spread head has a slice on every
    /// rank, in the order of stages and then of ranks; otherwise the last stage's ranks share it.
    pub const fn of_rank(
        spread: bool,
        (stage, stages): (usize, usize),
        (rank, tensor_parallel_size): (usize, usize),
    ) -> Option<HeadSlice> {
        if spread {
            let index = stage * tensor_parallel_size + rank;
            return Some(HeadSlice { index, of: stages * tensor_parallel_size });
        }
        if stage + 1 == stages { Some(HeadSlice { index: rank, of: tensor_parallel_size }) } else { None }
    }

    /// Whether the head can be spread over the ranks of a replica: more than one stage, 2, 4 or 8 ranks in all, and a row
    /// for each of them.
    pub fn can_spread(shape: &ModelShape, stages: usize, tensor_parallel_size: usize) -> bool {
        let of = stages * tensor_parallel_size;
        stages > 1
            && [2, 4, 8].contains(&of)
            && (0..of).all(|index| !HeadSlice { index, of }.rows(shape).is_empty())
    }

    /// Its rows.
    pub fn rows(&self, shape: &ModelShape) -> Range<usize> {
        shape.vocab_cut().rank(self.index, self.of)
    }

    /// The rows of every slice, in order; they tile the vocabulary.
    pub fn all_rows(&self, shape: &ModelShape) -> impl Iterator<Item = Range<usize>> + use<> {
        let (cut, of): (AxisCut, usize) = (shape.vocab_cut(), self.of);
        (0..of).map(move |index| cut.rank(index, of))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_a_slice_of_a_spread_head_and_only_the_last_stage_of_another() {
        let slices = |spread| {
            let stage = |stage| (0..2).map(move |rank| HeadSlice::of_rank(spread, (stage, 2), (rank, 2)));
            (0..2).flat_map(stage).map(|slice| slice.map(|s| (s.index, s.of))).collect::<Vec<_>>()
        };
        assert_eq!(slices(true), [Some((0, 4)), Some((1, 4)), Some((2, 4)), Some((3, 4))]);
        assert_eq!(slices(false), [None, None, Some((0, 2)), Some((1, 2))]);
    }
}
