//! The eight-part cut of an axis, on which layout-invariant sums stand.
//!
//! By shape alone an axis of `granules × granule` elements has eight consecutive parts; part *i* runs from
//! ⌊i·G/8⌋ to ⌊(i+1)·G/8⌋ granules. A sum over a cut axis is one ascending chain per part, then the fixed tree
//! `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))` in which empty parts are skipped. A tensor-parallel rank holds whole parts, so
//! that a collective over ranks is the upper levels of the same tree.

use std::ops::Range;

/// How many parts every cut axis has.
pub const PARTS: usize = 8;

/// The granule of the feed-forward and vocabulary axes, where it divides them.
const WIDE_GRANULE: usize = 32;

/// An axis cut into [`PARTS`] consecutive parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AxisCut {
    granules: usize,
    granule: usize,
}

impl AxisCut {
    /// An axis of `granules` indivisible groups of `granule` elements each (attention: KV heads × elements per group).
    pub const fn grouped(granules: usize, granule: usize) -> AxisCut {
        AxisCut { granules, granule }
    }

    /// The feed-forward or vocabulary axis of `len` elements: granule 32, or 1 where 32 does not divide `len`.
    pub const fn wide(len: usize) -> AxisCut {
        if len.is_multiple_of(WIDE_GRANULE) {
            AxisCut { granules: len / WIDE_GRANULE, granule: WIDE_GRANULE }
        } else {
            AxisCut { granules: len, granule: 1 }
        }
    }

    /// Elements of the whole axis.
    pub const fn len(&self) -> usize {
        self.granules * self.granule
    }

    /// Whether the axis has no element.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of part `part` (0…8), as a range of the whole axis; may be empty.
    pub const fn part(&self, part: usize) -> Range<usize> {
        part * self.granules / PARTS * self.granule..(part + 1) * self.granules / PARTS * self.granule
    }

    /// Elements that rank `rank` of `tensor_parallel_size` (1, 2, 4 or 8) holds.
    pub const fn rank(&self, rank: usize, tensor_parallel_size: usize) -> Range<usize> {
        let parts = PARTS / tensor_parallel_size;
        self.part(rank * parts).start..self.part(rank * parts + parts - 1).end
    }

    /// The parts of that rank, each relative to the start of the rank's own slice.
    pub fn rank_parts(&self, rank: usize, tensor_parallel_size: usize) -> Vec<Range<usize>> {
        let parts = PARTS / tensor_parallel_size;
        let start = self.rank(rank, tensor_parallel_size).start;
        (rank * parts..(rank + 1) * parts)
            .map(|part| self.part(part))
            .map(|part| part.start - start..part.end - start)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_tile_the_axis_for_every_rank_count() {
        for cut in [AxisCut::wide(172), AxisCut::wide(8192), AxisCut::grouped(4, 8), AxisCut::grouped(3, 64)]
        {
            for size in [1, 2, 4, 8] {
                let mut next = 0;
                for rank in 0..size {
                    let range = cut.rank(rank, size);
                    assert_eq!(range.start, next);
                    let parts = cut.rank_parts(rank, size);
                    assert_eq!(parts.len(), PARTS / size);
                    assert_eq!(parts[0].start, 0);
                    assert_eq!(parts[parts.len() - 1].end, range.len());
                    next = range.end;
                }
                assert_eq!(next, cut.len());
            }
        }
    }
}
