//! Weights, packed so that a vector is sixteen neighbouring outputs.

use super::activations;
use super::blocks::{BlockMatrix, QuantizedRow};
use super::dense::DenseMatrix;
use super::file_rows::ReadRows;
use super::{file_blocks, file_floats};
use crate::kernels::Kernels;
use crate::lanes::LANES;
use crate::pool::ThreadPool;
use ashlar_vocabulary::WeightType;
use ashlar_vocabulary::blocks::BlockAxis;
use std::fmt;
use std::ops::Range;

/// Outputs of a full panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;

/// Weights of a linear layer, `[n outputs, k inputs]`, in panels of 64 outputs, as plain elements or in blocks.
///
/// Of plain elements panel `p` holds outputs `64·p …` as `[k][64]`: each input's 64 weights side by side, so that one pass
/// over a panel is one sequential stream. The last panel is as wide as the rest needs, in steps of 16; padding is zero.
/// Quantised weights lie in blocks of sixteen outputs × 32 inputs at their format's bits per weight.
///
/// A matrix may be several stacked above one another, each in a type of its own: one product all the same.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    segments: Vec<Segment>,
}

/// Consecutive outputs of one type.
pub(super) struct Segment {
    /// The first of them among the matrix's.
    pub(super) first: usize,
    pub(super) n: usize,
    pub(super) store: Store,
}

/// The weights.
pub(super) enum Store {
    /// Plain elements.
    Dense(DenseMatrix),
    /// Quantised.
    Blocks(BlockMatrix),
}

/// One panel of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    /// Outputs it has room for: 16, 32, 48 or 64.
    pub(super) width: usize,
    /// Its first output.
    pub(super) first: usize,
    /// Outputs that exist, at most `width`.
    pub(super) outputs: usize,
}

impl PackedMatrix {
    /// Packs a matrix of plain elements (f32, f16 or bf16, rounded to the nearest) on the threads of `pool`, for products
    /// whose inputs are cut in `parts`: `fill(row, to)` is called once per output and must write the row's weights. Beyond
    /// the result it needs sixteen rows of memory per thread.
    ///
    /// # Panics
    /// If `kind` is quantised.
    pub fn pack(
        kind: WeightType,
        n: usize,
        parts: &[Range<usize>],
        pool: &ThreadPool,
        fill: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> PackedMatrix {
        let k = parts.last().map_or(0, |part| part.end);
        PackedMatrix::single(n, k, Store::Dense(DenseMatrix::pack(kind, n, parts, pool, fill)))
    }

    pub(super) fn single(n: usize, k: usize, store: Store) -> PackedMatrix {
        PackedMatrix { n, k, segments: vec![Segment { first: 0, n, store }] }
    }

    /// Stacks matrices with the same inputs: the outputs of the first come first.
    ///
    /// # Panics
    /// If there is none, or inputs differ in number.
    pub fn stack(matrices: Vec<PackedMatrix>) -> PackedMatrix {
        let k = matrices[0].k;
        let (mut n, mut segments) = (0, Vec::new());
        for matrix in matrices {
            assert_eq!(matrix.k, k, "stacked matrices have the same inputs");
            segments.extend(
                matrix.segments.into_iter().map(|segment| Segment { first: n + segment.first, ..segment }),
            );
            n += matrix.n;
        }
        PackedMatrix { n, k, segments }
    }

    /// Packs quantised weights of type `kind` on the threads of `pool`: `fill(row, to)` is called once per output and must
    /// write the stored quants of all inputs and the scales of all pieces of `axis`. Beyond the result it needs sixteen
    /// rows of memory per thread.
    ///
    /// # Panics
    /// If `kind` is not quantised.
    pub fn pack_blocks(
        kind: WeightType,
        n: usize,
        axis: BlockAxis,
        pool: &ThreadPool,
        fill: &(dyn Fn(usize, &mut QuantizedRow) + Sync),
    ) -> PackedMatrix {
        let k = axis.k();
        PackedMatrix::single(n, k, Store::Blocks(BlockMatrix::pack(kind, axis, n, pool, fill)))
    }

    /// Packs quantised weights of type `kind` that are stored as GGUF files hold them, on the threads of `kernels`: the bytes
    /// are those of [`PackedMatrix::pack_blocks`]. `read(outputs, to)` is asked for all outputs, some at a time, and must
    /// append the blocks of each, which cover the inputs [`BlockAxis::whole_blocks`]. Beyond the result it needs some hundred
    /// KiB of memory per thread.
    ///
    /// # Errors
    /// The first of `read`'s; packing then ends early.
    ///
    /// # Panics
    /// If `kind` is not quantised, or `read` appends too little.
    pub fn pack_file_blocks<E: Send>(
        kind: WeightType,
        n: usize,
        axis: BlockAxis,
        kernels: &Kernels,
        read: &ReadRows<'_, E>,
    ) -> Result<PackedMatrix, E> {
        let k = axis.k();
        Ok(PackedMatrix::single(n, k, Store::Blocks(file_blocks::pack(kind, axis, n, kernels, read)?)))
    }

    /// Whether [`PackedMatrix::pack_file_floats`] packs weights stored as `stored` in a matrix of `kind`.
    pub fn packs_file_floats(stored: WeightType, kind: WeightType) -> bool {
        file_floats::is_direct(stored, kind)
    }

    /// Packs plain elements that are stored as `stored`, on the threads of `kernels`: the bytes are those of
    /// [`PackedMatrix::pack`] with the same weights, of which subnormal brain floats are zero. `read(outputs, to)` is asked for
    /// all outputs, some at a time, and must append the `k` inputs of each. Beyond the result it needs some hundred KiB of
    /// memory per thread.
    ///
    /// # Errors
    /// The first of `read`'s; packing then ends early.
    ///
    /// # Panics
    /// If [`PackedMatrix::packs_file_floats`] says no, or `read` appends too little.
    pub fn pack_file_floats<E: Send>(
        stored: WeightType,
        kind: WeightType,
        n: usize,
        parts: &[Range<usize>],
        kernels: &Kernels,
        read: &ReadRows<'_, E>,
    ) -> Result<PackedMatrix, E> {
        let k = parts.last().map_or(0, |part| part.end);
        let packed = file_floats::pack(stored, kind, n, parts, kernels, read)?;
        Ok(PackedMatrix::single(n, k, Store::Dense(packed)))
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Memory that the packed weights take, in bytes.
    pub fn bytes(&self) -> usize {
        self.segments.iter().map(|segment| segment.store.bytes()).sum()
    }

    /// Words of memory that a product of `rows` rows takes for its activations, see [`Kernels::reserve`](crate::Kernels::reserve):
    /// segments of one type share them.
    pub fn scratch_words(&self, rows: usize) -> usize {
        let words = |(index, segment): (usize, &Segment)| {
            let kind = segment.store.kind();
            let first = self.segments[..index].iter().all(|before| before.store.kind() != kind);
            if first || kind == WeightType::Bf16 { segment.store.words_per_row() * rows } else { 0 }
        };
        self.segments.iter().enumerate().map(words).sum()
    }

    /// Whether the outputs are two halves, each of which begins with a panel.
    pub(super) fn has_aligned_halves(&self) -> bool {
        match &self.segments[..] {
            [both] => both.n.is_multiple_of(2 * PANEL),
            [first, second] => first.n == second.n,
            _ => false,
        }
    }

    /// Copies the `k` weights of output `row` to `out`: the embedding of a token where the head is tied.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n, "output {row} of {}", self.n);
        assert_eq!(out.len(), self.k, "a row has k weights");
        let Some(segment) = self.segments.iter().rfind(|segment| segment.first <= row && segment.n > 0)
        else {
            return;
        };
        let row = row - segment.first;
        match &segment.store {
            Store::Dense(dense) => dense.row(segment.n, row, out),
            Store::Blocks(blocks) => blocks.row(segment.n, row, out),
        }
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

impl Store {
    fn bytes(&self) -> usize {
        match self {
            Store::Dense(dense) => dense.bytes(),
            Store::Blocks(blocks) => blocks.bytes(),
        }
    }

    pub(super) fn words_per_row(&self) -> usize {
        match self {
            Store::Dense(dense) => dense.words_per_row(),
            Store::Blocks(blocks) => blocks.axis().pieces().len() * activations::WORDS,
        }
    }

    fn kind(&self) -> WeightType {
        match self {
            Store::Dense(dense) => dense.kind,
            Store::Blocks(blocks) => blocks.kind(),
        }
    }
}

impl Segment {
    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// A panel's place among the segment's outputs.
    pub(super) fn panel(&self, panel: usize) -> Panel {
        let (first, width) = (panel * PANEL, panel_width(self.n, panel));
        Panel { width, first, outputs: width.min(self.n - first) }
    }
}

/// Where an output's first step lies, and how far its next one, in steps of one output.
pub(super) fn locate(n: usize, k: usize, row: usize) -> (usize, usize) {
    let panel = row / PANEL;
    (panel * PANEL * k + row % PANEL, panel_width(n, panel))
}

/// Outputs that a panel has room for.
pub(super) fn panel_width(n: usize, panel: usize) -> usize {
    PANEL.min((n - panel * PANEL).div_ceil(LANES) * LANES)
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.segments.iter().map(|segment| (segment.n, segment.store.kind())).collect();
        f.debug_struct("PackedMatrix").field("n", &self.n).field("k", &self.k).field("kinds", &kinds).finish()
    }
}
