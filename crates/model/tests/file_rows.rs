//! Weights packed directly from what files hold: the same bytes as taken apart one by one and packed as quants and scales,
//! or as numbers, for every type, instruction set, number of outputs and cut of the inputs.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_gguf::{TensorType, UnpackedBlock, unpack};
use ashlar_kernels::{BlockAxis, BlockScale, FileRows, Isa, Kernels, PackedMatrix};
use ashlar_vocabulary::WeightType;
use std::ops::Range;

/// Inputs of a stored row: five superblocks.
const COLUMNS: usize = 5 * 256;

/// A tensor of arbitrary bits: every pattern is a block.
struct Stored {
    kind: WeightType,
    rows: Vec<Vec<u8>>,
}

impl Stored {
    fn new(kind: WeightType, n: usize) -> Stored {
        let mut state = 7 + n as u64;
        let mut byte = |_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        };
        let rows = (0..n).map(|_| (0..kind.bytes(COLUMNS)).map(&mut byte).collect()).collect();
        Stored { kind, rows }
    }

    /// The bytes of `columns`, which are whole blocks.
    fn blocks(&self, row: usize, columns: Range<usize>) -> &[u8] {
        &self.rows[row][self.kind.bytes(columns.start)..self.kind.bytes(columns.end)]
    }

    /// Block by block: the reference. `offset` is the first input's place on the whole axis.
    fn taken_apart(&self, offset: usize, axis: &BlockAxis, kernels: &Kernels) -> PackedMatrix {
        let length = self.kind.block_len();
        let pieces = axis.pieces().to_vec();
        let tensor_type =
            *TensorType::ALL.iter().find(|tensor_type| tensor_type.name() == self.kind.name()).unwrap();
        let n = self.rows.len();
        PackedMatrix::pack_blocks(self.kind, n, axis.clone(), kernels.pool(), &|row, to| {
            let blocks: Vec<UnpackedBlock> = self.rows[row]
                .chunks_exact(self.kind.block_bytes())
                .map(|block| unpack(tensor_type, block).unwrap())
                .collect();
            for (at, quant) in to.quants.iter_mut().enumerate() {
                *quant = blocks[(offset + at) / length].quants[(offset + at) % length];
            }
            for (piece, scale) in pieces.iter().zip(&mut to.scales) {
                let (block, index) = (&blocks[piece.block * 32 / length], piece.block % (length / 32));
                let sub_scales = match self.kind {
                    WeightType::Q6K => [block.scales[2 * index], block.scales[2 * index + 1]],
                    _ => [block.scales[index], 0],
                };
                *scale = BlockScale { scale: block.d, min: block.m, sub_scales, sub_min: block.mins[index] };
            }
        })
    }

    fn packed(&self, axis: &BlockAxis, kernels: &Kernels) -> PackedMatrix {
        let columns = axis.whole_blocks(self.kind.block_len());
        let read = |outputs: Range<usize>, to: &mut FileRows| {
            // Backwards, with something in between: rows need not follow one another.
            let mut starts = Vec::new();
            for row in outputs.rev() {
                let blocks = self.blocks(row, columns.clone());
                let (start, bytes) = to.grow(blocks.len() + 3);
                bytes[3..].copy_from_slice(blocks);
                starts.push(start + 3);
            }
            starts.into_iter().rev().for_each(|start| to.push(start));
            Ok::<_, ()>(())
        };
        PackedMatrix::pack_file_blocks(self.kind, self.rows.len(), axis.clone(), kernels, &read).unwrap()
    }
}

fn bytes(matrix: &PackedMatrix) -> &[u8] {
    matrix.stored().next().unwrap().bytes
}

#[test]
fn directly_packed_blocks_are_those_taken_apart() {
    let eighths = |k: usize| (0..8).map(|part| part * k / 8..(part + 1) * k / 8).collect::<Vec<_>>();
    let axes = [
        ("whole", 0, vec![0..COLUMNS]),
        ("one superblock", 0, vec![0..256]),
        ("parts of five blocks", 0, eighths(COLUMNS)),
        ("a rank's superblocks", 512, vec![0..256, 256..768]),
        ("from within a superblock to within another", 160, vec![0..320, 320..640]),
        ("parts that cut blocks", 32, eighths(32 * 27 + 8 * 5)),
        ("from within a block to within another", 48, vec![0..290, 290..290, 290..600]),
        ("less than a block", 290, vec![0..24]),
    ]
    .map(|(name, offset, parts)| (name, offset, BlockAxis::new(offset, &parts)));
    let kernels: Vec<_> = Isa::available().iter().map(|&isa| Kernels::new(isa, 3)).collect();
    for kind in WeightType::ALL.into_iter().filter(|kind| kind.is_quantized()) {
        for n in [1, 16, 63, 64, 70, 200] {
            let stored = Stored::new(kind, n);
            for (name, offset, axis) in &axes {
                let expected = stored.taken_apart(*offset, axis, &kernels[0]);
                for kernels in &kernels {
                    let found = stored.packed(axis, kernels);
                    assert!(
                        bytes(&found) == bytes(&expected),
                        "{kind}, {n} outputs, {name}, {}",
                        kernels.isa()
                    );
                }
            }
        }
    }
}

/// The number that bytes of a plain type mean; subnormal brain floats are zero.
fn number(kind: WeightType, bytes: &[u8]) -> f32 {
    match kind {
        WeightType::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        WeightType::F16 => half::f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        _ => {
            let value = half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32();
            if value.is_subnormal() { 0f32.copysign(value) } else { value }
        }
    }
}

#[test]
fn directly_packed_floats_are_those_packed_as_numbers() {
    let kernels: Vec<_> = Isa::available().iter().map(|&isa| Kernels::new(isa, 3)).collect();
    let floats = || WeightType::ALL.into_iter().filter(|kind| !kind.is_quantized());
    let pairs = floats().flat_map(|stored| floats().map(move |kind| (stored, kind)));
    let pairs: Vec<_> =
        pairs.filter(|&(stored, kind)| PackedMatrix::packs_file_floats(stored, kind)).collect();
    assert_eq!(pairs.len(), 4, "{pairs:?}");
    for (stored, kind) in pairs {
        for n in [1, 16, 63, 64, 70, 200] {
            let mut tensor = Stored::new(stored, n);
            let width = stored.block_bytes();
            for (index, element) in
                tensor.rows.iter_mut().flat_map(|row| row.chunks_exact_mut(width)).enumerate()
            {
                // Numbers, some of them subnormal.
                if !number(stored, element).is_finite() || index % 7 == 0 {
                    element[width - 1] &= 0x80;
                    element[width - 2] &= 0x0f;
                }
            }
            for parts in
                [vec![0..1280], vec![0..1], vec![0..7, 7..7, 7..40, 40..201], vec![0..512, 512..1000]]
            {
                let k = parts.last().unwrap().end;
                let expected = PackedMatrix::pack(kind, n, &parts, kernels[0].pool(), &|row, to| {
                    for (to, bytes) in to.iter_mut().zip(tensor.rows[row].chunks_exact(width)) {
                        *to = number(stored, bytes);
                    }
                });
                let expected = expected.stored().next().unwrap();
                for kernels in &kernels {
                    let read = |outputs: Range<usize>, to: &mut FileRows| {
                        for row in outputs {
                            let (start, bytes) = to.grow(k * width);
                            bytes.copy_from_slice(&tensor.rows[row][..k * width]);
                            to.push(start);
                        }
                        Ok::<_, ()>(())
                    };
                    let found =
                        PackedMatrix::pack_file_floats(stored, kind, n, &parts, kernels, &read).unwrap();
                    let found = found.stored().next().unwrap();
                    let case = format!("{stored} as {kind}, {n} × {k}, {}", kernels.isa());
                    assert!(found.bytes == expected.bytes, "{case}");
                    assert_eq!(found.exponent, expected.exponent, "{case}");
                }
            }
        }
    }
}

#[test]
fn a_failed_read_ends_the_packing() {
    for kind in [WeightType::Q4_0, WeightType::Q6K] {
        for threads in [1, 3] {
            let stored = Stored::new(kind, 500);
            let kernels = Kernels::new(Isa::best(), threads);
            let failing = |outputs: Range<usize>, to: &mut FileRows| {
                for row in outputs {
                    if row == 333 {
                        return Err("no row 333");
                    }
                    let blocks = stored.blocks(row, 0..COLUMNS);
                    let (start, bytes) = to.grow(blocks.len());
                    bytes.copy_from_slice(blocks);
                    to.push(start);
                }
                Ok(())
            };
            let axis = BlockAxis::whole(COLUMNS);
            let packed = PackedMatrix::pack_file_blocks(kind, 500, axis, &kernels, &failing);
            assert_eq!(packed.err(), Some("no row 333"));
        }
    }
}
