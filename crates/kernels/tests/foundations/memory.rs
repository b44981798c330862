//! Packed weights and aligned memory.

use ashlar_kernels::{
    AlignedBuffer, BlockAxis, Isa, Kernels, PACKED_VERSION, PackedMatrix, SegmentLayout, StoredSegment,
    ThreadPool,
};
use ashlar_vocabulary::WeightType;
use std::ops::Range;

/// Bytes of a cache line.
const LINE: usize = 64;

#[test]
fn every_row_comes_back_as_it_was_packed() {
    let pool = ThreadPool::new(2);
    for kind in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
        for (n, k) in [(1, 1), (16, 3), (17, 5), (64, 2), (65, 7), (130, 33), (0, 4), (5, 0)] {
            // Few bits, so that every type holds them.
            let weight = |row: usize, input: usize| ((row * 5 + input) % 200) as f32;
            for parts in [vec![0..k], vec![0..k / 3, k / 3..k]] {
                let packed = PackedMatrix::pack(kind, n, &parts, &pool, &|row, to| {
                    for (input, to) in to.iter_mut().enumerate() {
                        *to = weight(row, input);
                    }
                });
                let mut out = vec![f32::NAN; k];
                for row in 0..n {
                    packed.row(row, &mut out);
                    assert!(out.iter().enumerate().all(|(input, &out)| out == weight(row, input)));
                }
            }
        }
    }
}

#[test]
fn packed_weights_are_as_long_as_everybody_is_told() {
    let kernels = Kernels::new(Isa::best(), 1);
    for kind in WeightType::ALL.into_iter().filter(|kind| kind.is_quantized()) {
        for pieces in 1..=9 {
            let parts = vec![0..32 * pieces];
            let packed =
                PackedMatrix::pack_blocks(kind, 16, BlockAxis::new(0, &parts), kernels.pool(), &|_, _| ());
            let told = SegmentLayout::new(kind, 16, 0, &parts).buffer().as_bytes().len();
            assert_eq!(
                packed.stored().map(|segment| segment.bytes.len()).sum::<usize>(),
                told,
                "{kind}, {pieces} pieces"
            );
        }
    }
}

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

#[test]
fn buffers_are_zeroed_and_aligned() {
    for len in [0, 1, 17, 2 << 20] {
        let mut buffer = AlignedBuffer::zeroed(len);
        assert_eq!(buffer.len(), len);
        assert!(buffer.iter().all(|&x| x == 0.0));
        assert_eq!(buffer.as_ptr() as usize % LINE, 0);
        if let Some(last) = buffer.last_mut() {
            *last = 1.0;
        }
    }
}
