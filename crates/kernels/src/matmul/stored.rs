//! A packed matrix as plain bytes, and back: for copies that outlive the process.

use super::blocks::{self, BlockMatrix};
use super::dense::{self, DenseMatrix};
use super::packed::{PackedMatrix, Store};
use crate::aligned::AlignedBuffer;
use ashlar_vocabulary::WeightType;
use ashlar_vocabulary::blocks::BlockAxis;
use std::ops::Range;

/// The version of the packed bytes: raised whenever the same weights pack to other bytes, so that copies made before are
/// not taken for current ones. The bytes are the same for every instruction set and number of threads, and little-endian
/// machines share them.
pub const PACKED_VERSION: u32 = 1;

/// What bytes of a packed matrix mean: consecutive outputs of one type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentLayout {
    kind: WeightType,
    n: usize,
    offset: usize,
    parts: Vec<Range<usize>>,
}

impl SegmentLayout {
    /// `n` outputs of type `kind` over inputs in `parts`, the first of which is input `offset` of the whole axis: what
    /// [`PackedMatrix::pack`], or [`PackedMatrix::pack_blocks`] with the [`BlockAxis`] of `offset` and `parts`, makes.
    pub fn new(kind: WeightType, n: usize, offset: usize, parts: &[Range<usize>]) -> SegmentLayout {
        SegmentLayout { kind, n, offset, parts: parts.to_vec() }
    }

    /// Type of the weights.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// Zeroed memory as long as the segment.
    pub fn buffer(&self) -> AlignedBuffer {
        AlignedBuffer::zeroed(if self.kind.is_quantized() {
            blocks::words(self.kind, &self.axis(), self.n)
        } else {
            dense::words(self.kind, self.n, &self.parts)
        })
    }

    fn axis(&self) -> BlockAxis {
        BlockAxis::new(self.offset, &self.parts)
    }
}

/// One segment of a packed matrix, to be kept: the layout is known to whoever packed it.
#[derive(Debug, Clone, Copy)]
pub struct StoredSegment<'a> {
    /// Type of the weights.
    pub kind: WeightType,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// The smallest exponent of any brain float that is not zero: products choose their way by it. Meaningless for other types.
    pub exponent: i32,
    /// The packed weights.
    pub bytes: &'a [u8],
}

impl PackedMatrix {
    /// The matrix's segments, first outputs first.
    pub fn stored(&self) -> impl Iterator<Item = StoredSegment<'_>> {
        self.segments().iter().map(|segment| {
            let (kind, exponent, bytes) = match &segment.store {
                Store::Dense(matrix) => (matrix.kind, matrix.exponent, matrix.data()),
                Store::Blocks(matrix) => (matrix.kind(), 0, matrix.data()),
            };
            StoredSegment { kind, n: segment.n, k: self.k(), exponent, bytes }
        })
    }

    /// The matrix whose segments have these layouts, exponents and bytes, as [`Self::stored`] gave them.
    ///
    /// # Panics
    /// If there is no segment, inputs differ in number, or a buffer is not as long as [`SegmentLayout::buffer`].
    pub fn restored(segments: Vec<(SegmentLayout, i32, AlignedBuffer)>) -> PackedMatrix {
        let matrix = |(layout, exponent, data): (SegmentLayout, i32, AlignedBuffer)| {
            let (n, k) = (layout.n, layout.k());
            let store = if layout.kind.is_quantized() {
                Store::Blocks(BlockMatrix::from_data(layout.kind, layout.axis(), n, data))
            } else {
                Store::Dense(DenseMatrix::from_data(layout.kind, n, &layout.parts, exponent, data))
            };
            PackedMatrix::single(n, k, store)
        };
        PackedMatrix::stack(segments.into_iter().map(matrix).collect())
    }
}
