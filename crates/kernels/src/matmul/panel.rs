//! One panel of outputs for one block of rows: parts in ascending order, their tree, the bias.

use super::packed::{PANEL, Panel};
use crate::elementwise::silu_mul;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Rows that pass over a panel together: enough that rereading the weights for the next block costs little bandwidth.
pub(super) const ROW_BLOCK: usize = 96;
/// Open sums of the streaming tree: of 8 parts at most 3 wait while a fourth is computed.
const DEPTH: usize = 4;

/// What adds up the terms of one part; there is one for each kind of weights.
pub(super) trait Chain {
    /// See [`LaneKernel::MULTIPLIES_BYTES`].
    const MULTIPLIES_BYTES: bool = false;

    /// One ascending chain over part `part` of the inputs (not empty) for every row and output of a panel; `sums` receives
    /// `[rows][width]`. Implementations are `#[inline(always)]`.
    fn chain<S: Simd16>(&self, part: usize, sums: *mut f32);

    /// Runs a kernel made of such chains.
    #[inline]
    fn dispatch<K: LaneKernel>(kernels: &Kernels, kernel: K) -> K::Output {
        kernels.dispatch(kernel)
    }
}

/// The product of a block of rows with one panel.
pub(super) struct PanelProduct<'a, C> {
    pub(super) chain: C,
    /// The rows of this block, at most [`ROW_BLOCK`].
    pub(super) rows: Range<usize>,
    pub(super) parts: &'a [Range<usize>],
    pub(super) panel: Panel,
    /// Of all outputs.
    pub(super) bias: Option<&'a [f32]>,
}

/// Where the results of a panel go.
#[derive(Clone, Copy)]
pub(super) struct Target<'a> {
    pub(super) out: &'a DisjointMut<'a>,
    /// Distance between its rows.
    pub(super) stride: usize,
    /// Where in a row the panel's first output goes.
    pub(super) first: usize,
    /// The row of the call that is its first.
    pub(super) first_row: usize,
    pub(super) epilogue: Epilogue<'a>,
}

/// What becomes of a panel's results.
#[derive(Clone, Copy)]
pub(super) enum Epilogue<'a> {
    /// out = result.
    Write,
    /// out ← out + result.
    Add,
    /// out = silu(gate)·result; rows of gates lie `stride` apart, from the first of the product's rows on.
    SiluMul { gates: &'a [f32], stride: usize },
}

/// A [`PanelProduct`] with the place of its result.
pub(super) struct PanelKernel<'a, C> {
    pub(super) product: PanelProduct<'a, C>,
    pub(super) target: Target<'a>,
}

/// Running sums of the open subtrees, each `[rows][width]`.
#[repr(align(64))]
#[expect(dead_code, reason = "only its memory is used")]
struct Sums([[f32; ROW_BLOCK * PANEL]; DEPTH]);

impl<C: Chain> LaneKernel for PanelKernel<'_, C> {
    const MULTIPLIES_BYTES: bool = C::MULTIPLIES_BYTES;
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let PanelKernel { product, target } = self;
        let size = product.rows.len() * product.panel.width;
        assert!(product.rows.len() <= ROW_BLOCK);
        let mut sums = MaybeUninit::<Sums>::uninit();
        let base = sums.as_mut_ptr().cast::<f32>();
        let level = |depth: usize| base.wrapping_add(depth * ROW_BLOCK * PANEL);
        // A binary counter: after part i, as many pairs close as i + 1 has trailing zeros. An entry tells whether its
        // subtree has any element.
        let (mut filled, mut depth) = ([false; DEPTH], 0);
        for (index, part) in product.parts.iter().enumerate() {
            filled[depth] = !part.is_empty();
            if filled[depth] {
                product.chain.chain::<S>(index, level(depth));
            }
            depth += 1;
            let mut closed = index + 1;
            while closed % 2 == 0 {
                depth -= 1;
                let (left, right) = (level(depth - 1), level(depth));
                if filled[depth] {
                    // SAFETY: both levels hold `size` elements; the right one was computed, the left one if it is read.
                    unsafe { merge::<S>(left, right, size, filled[depth - 1]) };
                    filled[depth - 1] = true;
                }
                closed /= 2;
            }
        }
        product.finish::<S>(filled[0].then_some(level(0)), &target);
    }
}

impl<C> PanelProduct<'_, C> {
    /// Adds the bias and hands on the outputs that exist; without any sum the product is −0 (see `Kernels::product`).
    #[inline(always)]
    fn finish<S: Simd16>(&self, sums: Option<*mut f32>, target: &Target<'_>) {
        let Panel { width, first, outputs, .. } = self.panel;
        for (index, row) in self.rows.clone().enumerate() {
            let start = (row - target.first_row) * target.stride + target.first;
            // SAFETY: rows and panels of different tasks are disjoint.
            let out = unsafe { target.out.range(start..start + outputs) };
            for (vector, out) in out.chunks_mut(LANES).enumerate() {
                let sum = match sums {
                    // SAFETY: the root's `rows` × `width` sums were computed.
                    Some(sums) => unsafe { S::load(sums.add(index * width + vector * LANES)) },
                    None => S::splat(-0.0),
                };
                let sum = match self.bias {
                    Some(bias) => sum.add(S::read_tail(&bias[first + vector * LANES..][..out.len()], 0.0)),
                    None => sum,
                };
                let whole = out.len() == LANES;
                let value = match target.epilogue {
                    Epilogue::Write => sum,
                    Epilogue::Add => (if whole { S::read(out) } else { S::read_tail(out, 0.0) }).add(sum),
                    Epilogue::SiluMul { gates, stride } => {
                        silu_mul(S::read(&gates[index * stride + vector * LANES..]), sum)
                    }
                };
                if whole { value.write(out) } else { value.write_tail(out) }
            }
        }
    }
}

/// left ← left + right, or right where left is an empty subtree.
///
/// # Safety
/// Both point to `size` elements (a multiple of sixteen); `right` is initialised, and `left` if it is filled.
#[inline(always)]
pub(super) unsafe fn merge<S: Simd16>(left: *mut f32, right: *const f32, size: usize, left_filled: bool) {
    for at in (0..size).step_by(LANES) {
        // SAFETY: the caller's contract.
        unsafe {
            let right = S::load(right.add(at));
            let sum = if left_filled { S::load(left.add(at)).add(right) } else { right };
            sum.store(left.add(at));
        }
    }
}
