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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Isa, Kernels};

    const N: usize = 70;
    const K: usize = 600;
    const OFFSET: usize = 48;

    fn parts() -> Vec<Range<usize>> {
        vec![0..290, 290..K]
    }

    /// A matrix of made-up weights of every kind above one another, and the layouts of its segments.
    fn matrix(kinds: &[WeightType], kernels: &Kernels) -> (PackedMatrix, Vec<SegmentLayout>) {
        let pack = |&kind: &WeightType| {
            if !kind.is_quantized() {
                return PackedMatrix::pack(kind, N, &parts(), kernels.pool(), &|row, to| {
                    for (input, to) in to.iter_mut().enumerate() {
                        *to = ((row * 31 + input * 17) % 255) as f32 * 0.01 - 1.27;
                    }
                });
            }
            let axis = BlockAxis::new(OFFSET, &parts());
            PackedMatrix::pack_blocks(kind, N, axis, kernels.pool(), &|row, to| {
                for (input, to) in to.quants.iter_mut().enumerate() {
                    *to = ((row * 31 + input * 17) % 15) as u8;
                }
                for (piece, to) in to.scales.iter_mut().enumerate() {
                    to.scale = 0x2000 + (row + piece) as u16;
                    (to.min, to.sub_scales, to.sub_min) = (0x2100, [5, 7], 9);
                }
            })
        };
        let layout = |&kind: &WeightType| SegmentLayout::new(kind, N, OFFSET, &parts());
        (PackedMatrix::stack(kinds.iter().map(pack).collect()), kinds.iter().map(layout).collect())
    }

    #[test]
    fn a_restored_matrix_is_the_one_that_was_stored() {
        let kernels = Kernels::new(Isa::best(), 2);
        let sets = WeightType::ALL.iter().map(|&kind| vec![kind]);
        for kinds in sets.chain([vec![WeightType::Q4K, WeightType::Q6K], vec![WeightType::Bf16; 2]]) {
            let (packed, layouts) = matrix(&kinds, &kernels);
            let copy = |(stored, layout): (StoredSegment<'_>, &SegmentLayout)| {
                assert_eq!((stored.kind, stored.n, stored.k), (layout.kind(), layout.n(), layout.k()));
                let mut data = layout.buffer();
                data.as_bytes_mut().copy_from_slice(stored.bytes);
                (layout.clone(), stored.exponent, data)
            };
            let restored = PackedMatrix::restored(packed.stored().zip(&layouts).map(copy).collect());
            assert_eq!((restored.n(), restored.k(), restored.bytes()), (packed.n(), K, packed.bytes()));
            let x: Vec<f32> = (0..3 * K).map(|i| ((i * 7) % 33) as f32 - 16.0).collect();
            let product = |matrix: &PackedMatrix| {
                let mut y = vec![f32::NAN; 3 * matrix.n()];
                kernels.matmul(3, &x, matrix, &parts(), None, &mut y);
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            assert_eq!(product(&restored), product(&packed), "{kinds:?}");
        }
    }

    /// FNV-1a.
    fn fingerprint(bytes: &[u8]) -> u64 {
        let step = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
    }

    /// Copies on disk are told apart by [`PACKED_VERSION`] alone: where this fails, raise it, and write the new figures here.
    #[test]
    fn packed_bytes_change_only_with_their_version() {
        let found = WeightType::ALL.map(|kind| {
            // Neither threads nor instruction sets show in them.
            let of = |isa, threads| {
                let (packed, _) = matrix(&[kind], &Kernels::new(isa, threads));
                packed.stored().map(|segment| fingerprint(segment.bytes)).collect::<Vec<_>>()
            };
            let fingerprint = of(Isa::Portable, 1);
            assert_eq!(fingerprint, of(Isa::best(), 3), "{kind}");
            format!("{kind} {:016x}", fingerprint[0])
        });
        assert_eq!((PACKED_VERSION, found), (1, PINNED.map(str::to_owned)));
    }

    const PINNED: [&str; 11] = [
        "f32 e638f29cfc713d55",
        "f16 00eaa8e136e47df5",
        "bf16 c3c3140d5b658035",
        "q8_0 7cd07b42826b87e8",
        "q4_0 a068d4c7189853e5",
        "q4_1 b8825240d2bd9a6d",
        "q5_0 c49f7666b817383d",
        "q5_1 0eeac71a767e4a6d",
        "q4_k e5ef01d7c0b96e1c",
        "q5_k 86299794fadb541c",
        "q6_k 708df406abbf99f0",
    ];
}
