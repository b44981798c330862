//! How many bytes weights take once they are packed: panels whose last one is padded to sixteen outputs, and blocks that a
//! border between parts cuts in two. The kernels allocate by these figures, the plan's ledger adds them up.

use crate::blocks::{BLOCK, BlockAxis};
use crate::weights::WeightType;
use std::ops::Range;

/// Outputs that lie together.
pub const LANES: usize = 16;

/// 32-bit words of one row of one piece of quantised activations: 32 bytes, the scale, and two numbers for the format's zero
/// and minimum.
pub const PIECE_WORDS: usize = BLOCK / 4 + 3;

/// Bytes of a matrix of `outputs` outputs, the first of whose inputs is input `offset` of the whole axis, and whose `parts`
/// (in inputs of this matrix) tile them.
pub fn matrix_bytes(kind: WeightType, outputs: usize, offset: usize, parts: &[Range<usize>]) -> usize {
    match kind.is_quantized() {
        true => block_bytes(kind, outputs, &BlockAxis::new(offset, parts)),
        false => plain_bytes(kind, outputs, parts),
    }
}

/// 32-bit words that a row of activations takes on its way into a product with weights of type `kind`: pieces of bytes for
/// quantised weights, rounded numbers (one or two to a word, as is faster) for brain floats, nothing for the others.
pub fn row_words(kind: WeightType, offset: usize, parts: &[Range<usize>]) -> usize {
    match kind {
        WeightType::F32 | WeightType::F16 => 0,
        WeightType::Bf16 => parts.iter().map(|part| part.len().next_multiple_of(2)).sum(),
        _ => BlockAxis::new(offset, parts).pieces().len() * PIECE_WORDS,
    }
}

/// The same where neighbours of one type are one matrix, and matrices are stacked: quantised types share their words with
/// the next of their kind.
pub fn stacked_row_words(kinds: &[WeightType], offset: usize, parts: &[Range<usize>]) -> usize {
    let words = |(index, &kind): (usize, &WeightType)| {
        let ready = match kind {
            WeightType::Bf16 => index > 0 && kinds[index - 1] == kind,
            _ => kinds[..index].contains(&kind),
        };
        if ready { 0 } else { row_words(kind, offset, parts) }
    };
    kinds.iter().enumerate().map(words).sum()
}

/// Bytes of a matrix of quantised weights.
pub fn block_bytes(kind: WeightType, outputs: usize, axis: &BlockAxis) -> usize {
    let groups = axis.groups().iter().map(|group| group_bytes(kind, group.pieces.len()));
    outputs.div_ceil(LANES) * groups.sum::<usize>()
}

/// Bytes of a matrix of plain elements; brain floats lie in pairs, and a part of odd length ends in half a pair.
pub fn plain_bytes(kind: WeightType, outputs: usize, parts: &[Range<usize>]) -> usize {
    let inputs: usize = match kind {
        WeightType::Bf16 => parts.iter().map(|part| part.len().next_multiple_of(2)).sum(),
        _ => parts.iter().map(Range::len).sum(),
    };
    let bytes = outputs.div_ceil(LANES) * LANES * inputs * kind.block_bytes();
    // Buffers are whole words.
    bytes / size_of::<f32>() * size_of::<f32>()
}

/// Bytes of one group of `pieces` blocks (up to eight of one superblock) for sixteen outputs: scales, then quants.
///
/// # Panics
/// If `kind` is not quantised.
pub const fn group_bytes(kind: WeightType, pieces: usize) -> usize {
    // Per output: a half for the scale (and one for the minimum) of each piece, and the bits of 32 quants.
    let (scales, quants) = match kind {
        WeightType::Q8_0 => (2 * pieces, 32),
        WeightType::Q4_0 => (2 * pieces, 16),
        WeightType::Q4_1 => (4 * pieces, 16),
        WeightType::Q5_0 => (2 * pieces, 20),
        WeightType::Q5_1 => (4 * pieces, 20),
        // Two halves, and six bits each for the scales and minima of eight pieces, however many there are.
        WeightType::Q4K => (4 + 12, 16),
        WeightType::Q5K => (4 + 12, 20),
        // A half, and a byte for each half of a piece.
        WeightType::Q6K => (2 + 2 * pieces, 24),
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 => panic!("plain elements lie in no groups"),
    };
    LANES * (scales + pieces * quants)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_superblocks_take_what_files_take() {
        for kind in WeightType::ALL {
            let whole: [Range<usize>; 1] = [0..2048];
            assert_eq!(matrix_bytes(kind, 64, 0, &whole), 64 * kind.bytes(2048), "{kind}");
        }
    }

    #[test]
    fn padding_and_cut_blocks_count() {
        let cut = [0..48, 48..96];
        assert_eq!(matrix_bytes(WeightType::F32, 17, 0, &cut), 32 * 96 * 4);
        assert_eq!(matrix_bytes(WeightType::Bf16, 16, 0, &[0..3, 3..6]), 16 * 8 * 2);
        // 0..32, 32..48, 48..64, 64..96: four pieces where files have three.
        assert_eq!(matrix_bytes(WeightType::Q8_0, 16, 0, &cut), 16 * 4 * 34);
    }
}
