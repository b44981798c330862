//! How the inputs of a quantised matrix fall into blocks, wherever they are computed with or accounted for.

use std::ops::Range;

/// Inputs of a full block: they share one scale of the activations, and at least one of the weights.
pub const BLOCK: usize = 32;
/// Inputs of a superblock.
pub const SUPERBLOCK: usize = 256;
/// Most pieces of a group.
pub const GROUP: usize = 8;

/// A block, or what a part's border left of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The inputs it covers, counted from this matrix's first: at most 32.
    pub inputs: Range<usize>,
    /// Which block of 32 of the whole model's axis it belongs to.
    pub block: usize,
}

/// Consecutive pieces of one superblock: the unit in which weights are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Which of the axis's.
    pub pieces: Range<usize>,
}

/// The input axis of a quantised matrix: blocks of 32 counted from the start of the *whole* axis, so that a rank that
/// holds a range of it quantises just as one that holds all; a border between parts cuts a block in two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockAxis {
    k: usize,
    /// The first input's place on the whole axis.
    offset: usize,
    parts: Vec<Range<usize>>,
    pieces: Vec<Piece>,
    /// Pieces of each part.
    part_pieces: Vec<Range<usize>>,
    groups: Vec<Group>,
}

impl BlockAxis {
    /// The axis of a matrix whose first input is input `offset` of the whole axis, and whose `parts` (in inputs of this
    /// matrix) tile it.
    pub fn new(offset: usize, parts: &[Range<usize>]) -> BlockAxis {
        let mut axis = BlockAxis {
            k: parts.last().map_or(0, |part| part.end),
            offset,
            parts: parts.to_vec(),
            pieces: Vec::new(),
            part_pieces: Vec::new(),
            groups: Vec::new(),
        };
        for part in parts {
            let first = axis.pieces.len();
            let mut start = part.start;
            while start < part.end {
                let block = (offset + start) / BLOCK;
                let end = part.end.min((block + 1) * BLOCK - offset);
                axis.pieces.push(Piece { inputs: start..end, block });
                start = end;
            }
            axis.part_pieces.push(first..axis.pieces.len());
        }
        let superblock = |piece: &Piece| piece.block / (SUPERBLOCK / BLOCK);
        for (index, piece) in axis.pieces.iter().enumerate() {
            match axis.groups.last_mut() {
                Some(Group { pieces })
                    if pieces.len() < GROUP
                        && superblock(&axis.pieces[pieces.start]) == superblock(piece) =>
                {
                    pieces.end = index + 1;
                }
                _ => axis.groups.push(Group { pieces: index..index + 1 }),
            }
        }
        axis
    }

    /// An uncut axis of `k` inputs.
    pub fn whole(k: usize) -> BlockAxis {
        let parts: [Range<usize>; 1] = [0..k];
        BlockAxis::new(0, &parts)
    }

    /// Inputs.
    #[inline]
    pub fn k(&self) -> usize {
        self.k
    }

    /// The inputs of the whole axis that the matrix's own lie in, in whole blocks of `length` inputs.
    pub fn whole_blocks(&self, length: usize) -> Range<usize> {
        self.offset / length * length..(self.offset + self.k).next_multiple_of(length)
    }

    /// Where in its block of 32 a piece begins.
    pub fn within(&self, piece: &Piece) -> usize {
        (self.offset + piece.inputs.start) % BLOCK
    }

    /// Its parts.
    #[inline]
    pub fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// Its pieces, ascending.
    #[inline]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// The pieces of part `part`.
    #[inline]
    pub fn part_pieces(&self, part: usize) -> Range<usize> {
        self.part_pieces[part].clone()
    }

    /// Its groups, ascending.
    #[inline]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_count_from_the_start_of_the_whole_axis_and_parts_cut_them() {
        let axis = BlockAxis::new(48, &[0..20, 20..20, 20..300]);
        let pieces: Vec<_> = axis.pieces().iter().map(|p| (p.inputs.clone(), p.block)).collect();
        assert_eq!(&pieces[..3], &[(0..16, 1), (16..20, 2), (20..48, 2)]);
        assert_eq!(pieces.last(), Some(&(272..300, 10)));
        assert_eq!((axis.part_pieces(0), axis.part_pieces(1), axis.part_pieces(2)), (0..2, 2..2, 2..11));
        let groups: Vec<_> = axis.groups().iter().map(|g| g.pieces.clone()).collect();
        assert_eq!(groups, [0..8, 8..11], "the superblock ends at input 256 − 48");
        assert_eq!(BlockAxis::whole(600).groups().len(), 3);
        assert!(BlockAxis::whole(0).pieces().is_empty());
        assert_eq!((axis.whole_blocks(32), axis.whole_blocks(256)), (32..352, 0..512));
        assert_eq!(axis.pieces()[..3].iter().map(|p| axis.within(p)).collect::<Vec<_>>(), [16, 0, 4]);
    }
}
