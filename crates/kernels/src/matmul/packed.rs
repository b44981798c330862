//! Weights, packed so that a vector is sixteen neighbouring outputs.

use super::axis::BlockAxis;
use super::blocks::{BlockMatrix, QuantizedRow};
use crate::aligned::AlignedBuffer;
use crate::lanes::LANES;
use crate::pool::ThreadPool;
use ashlar_vocabulary::WeightType;
use std::fmt;

/// Outputs of a full panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;

/// Weights of a linear layer, `[n outputs, k inputs]`, in panels of 64 outputs, in f32 or in blocks.
///
/// In f32 panel `p` holds outputs `64·p …` as `[k][64]`: each input's 64 weights side by side, so that one pass over a
/// panel is one sequential stream. The last panel is as wide as the rest needs, in steps of 16; its padding is zero.
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
    /// `[panel][k][width]`.
    F32(AlignedBuffer),
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
    /// Packs a matrix row by row: `fill(row, to)` is called once per output in ascending order and must write the row's
    /// `k` weights. Beyond the result it needs sixteen rows of memory.
    pub fn pack(n: usize, k: usize, fill: &mut dyn FnMut(usize, &mut [f32])) -> PackedMatrix {
        let mut data = AlignedBuffer::zeroed(n.div_ceil(LANES) * LANES * k);
        if k == 0 {
            return PackedMatrix::single(n, k, Store::F32(data));
        }
        let mut rows = vec![0.0; LANES * k];
        for first in (0..n).step_by(LANES) {
            let live = LANES.min(n - first);
            for (lane, row) in rows.chunks_exact_mut(k).take(live).enumerate() {
                fill(first + lane, row);
            }
            let (start, width) = locate(n, k, first);
            for (input, to) in data[start..].chunks_mut(width).take(k).enumerate() {
                for (lane, to) in to.iter_mut().take(live).enumerate() {
                    *to = rows[lane * k + input];
                }
            }
        }
        PackedMatrix::single(n, k, Store::F32(data))
    }

    fn single(n: usize, k: usize, store: Store) -> PackedMatrix {
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

    /// Copies the `k` weights of output `row` to `out`: the embedding of a token where the head is tied.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n, "output {row} of {}", self.n);
        assert_eq!(out.len(), self.k, "a row has k weights");
        let Some(segment) = self.segments.iter().rfind(|segment| segment.first <= row && segment.n > 0)
        else {
            return;
        };
        let row = row - segment.first;
        let data = match &segment.store {
            Store::F32(data) => data,
            Store::Blocks(blocks) => return blocks.row(segment.n, row, out),
        };
        let (start, width) = locate(segment.n, self.k, row);
        if self.k == 0 {
            return;
        }
        for (out, weights) in out.iter_mut().zip(data[start..].chunks(width)) {
            *out = weights[0];
        }
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.segments
    }
}

impl Store {
    fn bytes(&self) -> usize {
        match self {
            Store::F32(data) => size_of_val::<[f32]>(data),
            Store::Blocks(blocks) => blocks.bytes(),
        }
    }

    fn kind(&self) -> WeightType {
        match self {
            Store::F32(_) => WeightType::F32,
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
        let (first, width) = (panel * PANEL, width(self.n, panel));
        Panel { width, first, outputs: width.min(self.n - first) }
    }
}

/// Where an output's first weight lies, and how far its next one.
fn locate(n: usize, k: usize, row: usize) -> (usize, usize) {
    let panel = row / PANEL;
    (panel * PANEL * k + row % PANEL, width(n, panel))
}

fn width(n: usize, panel: usize) -> usize {
    PANEL.min((n - panel * PANEL).div_ceil(LANES) * LANES)
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds: Vec<_> = self.segments.iter().map(|segment| (segment.n, segment.store.kind())).collect();
        f.debug_struct("PackedMatrix").field("n", &self.n).field("k", &self.k).field("kinds", &kinds).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_comes_back_as_it_was_packed() {
        for (n, k) in [(1, 1), (16, 3), (17, 5), (64, 2), (65, 7), (130, 33), (0, 4), (5, 0)] {
            let weight = |row: usize, input: usize| (row * 1000 + input) as f32;
            let packed = PackedMatrix::pack(n, k, &mut |row, to| {
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
