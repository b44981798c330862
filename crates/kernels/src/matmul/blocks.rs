//! Quantised weights, packed at their true bits per weight.

use super::formats::{Flavour, Format, Scales, with_format, zero_point};
use super::packed::PANEL;
use crate::aligned::AlignedBuffer;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use crate::pool::ThreadPool;
use crate::strided::DisjointMut;
use crate::{Isa, lanes};
use ashlar_vocabulary::blocks::BlockAxis;
use ashlar_vocabulary::packed::group_bytes;
use ashlar_vocabulary::{WeightType, packed};
use std::convert::Infallible;
use std::ops::Range;

pub use super::formats::BlockScale;

/// Tasks per thread while packing.
const TASKS_PER_THREAD: usize = 8;

/// One output's weights, as a packer's source writes them.
#[derive(Debug)]
pub struct QuantizedRow {
    /// The stored quants of all inputs, unsigned: q8_0 plus 128, q6_k plus 32, q5_0 plus 16, q4_0 plus 8.
    pub quants: Vec<u8>,
    /// The scales of all pieces.
    pub scales: Vec<BlockScale>,
}

/// A matrix of blocks. Sixteen outputs × one group lie together: its scales, then its quants; four of these side by side
/// are a panel's, and a panel's groups follow one another, so that one pass over a panel is one sequential stream.
pub(super) struct BlockMatrix {
    kind: WeightType,
    axis: BlockAxis,
    /// Where each group starts, in bytes per sixteen outputs; one more for the end.
    offsets: Vec<usize>,
    data: AlignedBuffer,
}

impl BlockMatrix {
    pub(super) fn pack(
        kind: WeightType,
        axis: BlockAxis,
        n: usize,
        pool: &ThreadPool,
        fill: &(dyn Fn(usize, &mut QuantizedRow) + Sync),
    ) -> BlockMatrix {
        with_format!(kind, F => pack::<F>(kind, axis, n, pool, fill))
    }

    /// The matrix of `n` outputs that `data` holds, as [`Self::data`] gave it.
    ///
    /// # Panics
    /// If `data` has another length than such a matrix.
    pub(super) fn from_data(kind: WeightType, axis: BlockAxis, n: usize, data: AlignedBuffer) -> BlockMatrix {
        let offsets = offsets(kind, &axis);
        assert_eq!(data.len(), words(kind, &axis, n), "{n} outputs of {kind} have another length");
        BlockMatrix { kind, axis, offsets, data }
    }

    /// A matrix of `n` outputs whose bytes `fill` writes.
    pub(super) fn filled<E>(
        kind: WeightType,
        axis: BlockAxis,
        n: usize,
        fill: impl FnOnce(&BlockMatrix, &DisjointMut<'_, u8>) -> Result<(), E>,
    ) -> Result<BlockMatrix, E> {
        let offsets = offsets(kind, &axis);
        let mut data = AlignedBuffer::zeroed(words(kind, &axis, n));
        let mut matrix = BlockMatrix { kind, axis, offsets, data: AlignedBuffer::zeroed(0) };
        fill(&matrix, &DisjointMut::new(data.as_bytes_mut()))?;
        matrix.data = data;
        Ok(matrix)
    }

    /// The bytes of `group` for the sixteen outputs from `first` on, of `n` in all.
    #[inline(always)]
    pub(super) fn group_bytes(&self, n: usize, first: usize, group: usize) -> Range<usize> {
        let (panel, vector) = (first / PANEL * PANEL, first % PANEL / LANES);
        let vectors = (n - panel).min(PANEL).div_ceil(LANES);
        let stride = self.offsets.last().copied().unwrap_or(0);
        let start = panel / LANES * stride + self.locate(group, vector, vectors);
        start..start + self.offsets[group + 1] - self.offsets[group]
    }

    pub(super) fn data(&self) -> &[u8] {
        self.data.as_bytes()
    }

    pub(super) fn kind(&self) -> WeightType {
        self.kind
    }

    pub(super) fn axis(&self) -> &BlockAxis {
        &self.axis
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[f32]>(&self.data)
    }

    /// The bytes of the panel that starts with output `first` and has `vectors` times sixteen.
    pub(super) fn panel(&self, first: usize, vectors: usize) -> &[u8] {
        let stride = self.offsets.last().copied().unwrap_or(0);
        &self.data.as_bytes()[first / LANES * stride..][..vectors * stride]
    }

    /// Where in a panel of `vectors` vectors the data of `group` for `vector` begin.
    #[inline(always)]
    pub(super) fn locate(&self, group: usize, vector: usize, vectors: usize) -> usize {
        let (start, end) = (self.offsets[group], self.offsets[group + 1]);
        start * vectors + (end - start) * vector
    }

    /// Widens output `row`: `scale·(q − zero) + min`, each operation rounded.
    pub(super) fn row(&self, n: usize, row: usize, out: &mut [f32]) {
        let first = row / PANEL * PANEL;
        let vectors = (n - first).min(PANEL).div_ceil(LANES);
        let kernel = RowKernel {
            matrix: self,
            panel: self.panel(first, vectors),
            vectors,
            vector: (row - first) / LANES,
            lane: row % LANES,
            out,
        };
        // SAFETY: portable lanes run everywhere.
        unsafe { lanes::dispatch(Isa::Portable, kernel) };
    }
}

/// Where each group starts, in bytes per sixteen outputs, and where the last one ends.
fn offsets(kind: WeightType, axis: &BlockAxis) -> Vec<usize> {
    let mut offsets = vec![0];
    let mut end = 0;
    for group in axis.groups() {
        end += group_bytes(kind, group.pieces.len());
        offsets.push(end);
    }
    offsets
}

/// Length of the data of a matrix of `n` outputs, in words.
pub(super) fn words(kind: WeightType, axis: &BlockAxis, n: usize) -> usize {
    packed::block_bytes(kind, n, axis) / size_of::<f32>()
}

fn pack<F: Format>(
    kind: WeightType,
    axis: BlockAxis,
    n: usize,
    pool: &ThreadPool,
    fill: &(dyn Fn(usize, &mut QuantizedRow) + Sync),
) -> BlockMatrix {
    let packed = BlockMatrix::filled(kind, axis, n, |matrix, bytes| {
        let sixteens = n.div_ceil(LANES);
        let tasks = sixteens.min(TASKS_PER_THREAD * pool.threads());
        pool.run(tasks, &|task| {
            let mut rows = Rows::new(kind, &matrix.axis);
            for sixteen in task * sixteens / tasks..(task + 1) * sixteens / tasks {
                rows.fill(sixteen * LANES, n, fill);
                rows.pack::<F>(matrix, sixteen * LANES, n, bytes);
            }
        });
        Ok(())
    });
    packed.unwrap_or_else(|never: Infallible| match never {})
}

/// Sixteen outputs on their way into a matrix.
struct Rows<'a> {
    kind: WeightType,
    axis: &'a BlockAxis,
    rows: Vec<QuantizedRow>,
    scales: Vec<[BlockScale; LANES]>,
}

impl<'a> Rows<'a> {
    fn new(kind: WeightType, axis: &'a BlockAxis) -> Rows<'a> {
        let empty = || QuantizedRow {
            quants: vec![zero_point(kind); axis.k()],
            scales: vec![BlockScale::default(); axis.pieces().len()],
        };
        Rows { kind, axis, rows: (0..LANES).map(|_| empty()).collect(), scales: Vec::new() }
    }

    fn fill(&mut self, first: usize, n: usize, fill: &(dyn Fn(usize, &mut QuantizedRow) + Sync)) {
        for (lane, row) in self.rows.iter_mut().enumerate() {
            if first + lane < n {
                fill(first + lane, row);
            } else {
                // Outputs that do not exist weigh nothing, and their bytes are the same whatever was packed before.
                row.quants.fill(zero_point(self.kind));
                row.scales.fill(BlockScale::default());
            }
        }
    }

    fn pack<F: Format>(&mut self, matrix: &BlockMatrix, first: usize, n: usize, to: &DisjointMut<'_, u8>) {
        for (index, group) in self.axis.groups().iter().enumerate() {
            let pieces = &self.axis.pieces()[group.pieces.clone()];
            self.scales.clear();
            for piece in group.pieces.clone() {
                self.scales.push(std::array::from_fn(|lane| self.rows[lane].scales[piece]));
            }
            // SAFETY: a group of sixteen outputs belongs to one task.
            let bytes = unsafe { to.range(matrix.group_bytes(n, first, index)) };
            let (header, quants) = bytes.split_at_mut(F::header_bytes(pieces.len()));
            F::pack_header(&self.scales, header);
            for (piece, to) in pieces.iter().zip(quants.chunks_exact_mut(F::PIECE_BYTES)) {
                let mut block = [[zero_point(self.kind); 32]; LANES];
                for (block, row) in block.iter_mut().zip(&self.rows) {
                    block[..piece.inputs.len()].copy_from_slice(&row.quants[piece.inputs.clone()]);
                }
                F::pack_piece(&block, to);
            }
        }
    }
}

/// Widens one output.
struct RowKernel<'a> {
    matrix: &'a BlockMatrix,
    panel: &'a [u8],
    vectors: usize,
    vector: usize,
    lane: usize,
    out: &'a mut [f32],
}

impl LaneKernel for RowKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        with_format!(self.matrix.kind, F => self.widen::<F, S>())
    }
}

impl RowKernel<'_> {
    #[inline(always)]
    fn widen<F: Format, S: Simd16>(self) {
        let axis = &self.matrix.axis;
        let mut scales = Scales::ZERO;
        for (index, group) in axis.groups().iter().enumerate() {
            let count = group.pieces.len();
            let data = &self.panel[self.matrix.locate(index, self.vector, self.vectors)..]
                [..F::header_bytes(count) + count * F::PIECE_BYTES];
            // SAFETY: the slice is as long as the header.
            unsafe { F::scales::<S>(data.as_ptr(), count, &mut scales) };
            for (slot, piece) in axis.pieces()[group.pieces.clone()].iter().enumerate() {
                let quants = &data[F::header_bytes(count) + slot * F::PIECE_BYTES..][..F::PIECE_BYTES];
                // SAFETY: the slice is as long as a piece.
                let quads = unsafe { F::quads::<S>(quants.as_ptr()) };
                let (first, second) = (scales.first[slot][self.lane], scales.second[slot][self.lane]);
                for (at, out) in self.out[piece.inputs.clone()].iter_mut().enumerate() {
                    let mut bytes = [0u8; 64];
                    // SAFETY: a vector has 64 bytes.
                    unsafe { quads[at / 4].store(bytes.as_mut_ptr()) };
                    let quant = i32::from(bytes[4 * self.lane + at % 4]) - F::ZERO;
                    let scale = if F::Flavour::HALVES && at >= 16 { second } else { first };
                    let value = scale * quant as f32;
                    *out = if F::Flavour::MIN { value + second } else { value };
                }
            }
        }
    }
}
