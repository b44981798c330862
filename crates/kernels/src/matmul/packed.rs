//! Weights, packed so that a vector is sixteen neighbouring outputs.

use crate::aligned::AlignedBuffer;
use crate::lanes::LANES;
use std::fmt;

/// Outputs of a full panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;

/// Weights of a linear layer, `[n outputs, k inputs]`, in panels of 64 outputs.
///
/// Panel `p` holds outputs `64·p …` as `[k][64]`: each input's 64 weights side by side, so that one pass over a panel is
/// one sequential stream. The last panel is as wide as the rest needs, in steps of 16; its padding is zero.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    data: AlignedBuffer,
}

/// One panel of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// `[k][width]`.
    pub(super) weights: &'a [f32],
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
        let mut packed = PackedMatrix { n, k, data: AlignedBuffer::zeroed(n.div_ceil(LANES) * LANES * k) };
        if k == 0 {
            return packed;
        }
        let mut rows = vec![0.0; LANES * k];
        for first in (0..n).step_by(LANES) {
            let live = LANES.min(n - first);
            for (lane, row) in rows.chunks_exact_mut(k).take(live).enumerate() {
                fill(first + lane, row);
            }
            let (start, width) = packed.locate(first);
            for (input, to) in packed.data[start..].chunks_mut(width).take(k).enumerate() {
                for (lane, to) in to.iter_mut().take(live).enumerate() {
                    *to = rows[lane * k + input];
                }
            }
        }
        packed
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
        size_of_val::<[f32]>(&self.data)
    }

    /// Copies the `k` weights of output `row` to `out`: the embedding of a token where the head is tied.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n, "output {row} of {}", self.n);
        assert_eq!(out.len(), self.k, "a row has k weights");
        let (start, width) = self.locate(row);
        if self.k == 0 {
            return;
        }
        for (out, weights) in out.iter_mut().zip(self.data[start..].chunks(width)) {
            *out = weights[0];
        }
    }

    /// Where an output's first weight lies, and how far its next one.
    fn locate(&self, row: usize) -> (usize, usize) {
        let panel = row / PANEL;
        (panel * PANEL * self.k + row % PANEL, self.width(panel))
    }

    fn width(&self, panel: usize) -> usize {
        PANEL.min((self.n - panel * PANEL).div_ceil(LANES) * LANES)
    }

    pub(super) fn panels(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, panel: usize) -> Panel<'_> {
        let (first, width) = (panel * PANEL, self.width(panel));
        let weights = &self.data[first * self.k..][..width * self.k];
        Panel { weights, width, first, outputs: width.min(self.n - first) }
    }
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PackedMatrix").field("n", &self.n).field("k", &self.k).finish_non_exhaustive()
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
