//! Products of activations with packed weights: y = x·Wᵀ + bias.
//!
//! Per output element: one ascending chain of fused multiply-adds per part of K, starting at +0, then the tree over the
//! parts, then the bias. Blocking over K keeps the chain by storing and reloading its running value, which is exact, so
//! that tile shapes, batch sizes and threads cannot show in the result.

mod packed;
mod panel;
mod tile;

pub use packed::PackedMatrix;

use crate::kernels::Kernels;
use crate::strided::DisjointMut;
use panel::{PanelProduct, ROW_BLOCK};
use std::ops::Range;

/// Tasks per thread, so that dynamic picking levels out threads of unequal speed.
const TASKS_PER_THREAD: usize = 12;

impl Kernels {
    /// y = x·Wᵀ + bias for `rows` rows of activations.
    ///
    /// - `x`: rows × k, `y`: rows × n, `bias`: n.
    /// - `k_parts`: 1, 2, 4 or 8 consecutive ranges that tile `0..k`; they may be empty. Each part is one ascending
    ///   chain; parts combine as `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))`, the bias comes last.
    ///
    /// An empty part counts as −0, the neutral element of IEEE addition (−0 + x is x for every x, −0 included): leaving it
    /// out and adding it are the same. A rank all of whose parts are empty therefore yields −0, and
    /// [`Kernels::sum_tree`] over ranks is the same tree as on one rank, whoever holds empty parts.
    ///
    /// # Panics
    /// If a length does not fit, or the parts do not tile `0..k`.
    pub fn matmul(
        &self,
        rows: usize,
        x: &[f32],
        weights: &PackedMatrix,
        k_parts: &[Range<usize>],
        bias: Option<&[f32]>,
        y: &mut [f32],
    ) {
        let (n, k) = (weights.n(), weights.k());
        assert_eq!(x.len(), rows * k, "x is rows × k");
        assert_eq!(y.len(), rows * n, "y is rows × n");
        assert!(bias.is_none_or(|bias| bias.len() == n), "the bias has n elements");
        assert_parts_tile(k_parts, k);
        if rows == 0 || n == 0 {
            return;
        }
        let panels = weights.panels();
        let row_blocks = rows.div_ceil(ROW_BLOCK);
        // Consecutive units share a block of rows and stream through the panels.
        let units = row_blocks * panels;
        let tasks = units.min(if self.threads() == 1 { 1 } else { TASKS_PER_THREAD * self.threads() });
        let output = DisjointMut::new(y);
        self.pool().run(tasks, &|task| {
            for unit in task * units / tasks..(task + 1) * units / tasks {
                let (block, panel) = (unit / panels, unit % panels);
                let block_rows = block * rows / row_blocks..(block + 1) * rows / row_blocks;
                let product = PanelProduct {
                    x,
                    k,
                    rows: block_rows,
                    parts: k_parts,
                    panel: weights.panel(panel),
                    bias,
                    n,
                };
                self.dispatch(product.into_output(&output));
            }
        });
    }
}

/// Checks that `parts` are 1, 2, 4 or 8 consecutive ranges that tile `0..k`.
fn assert_parts_tile(parts: &[Range<usize>], k: usize) {
    assert!(matches!(parts.len(), 1 | 2 | 4 | 8), "an axis has 1, 2, 4 or 8 parts here, not {}", parts.len());
    let mut next = 0;
    for part in parts {
        assert!(part.start == next && part.end >= next, "parts {parts:?} are not consecutive");
        next = part.end;
    }
    assert_eq!(next, k, "parts {parts:?} must tile the inputs");
}
