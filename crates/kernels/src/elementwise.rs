//! Operations on one element at a time.

use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::math;
use crate::strided::DisjointMut;

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 16 << 10;

impl Kernels {
    /// out = silu(gate) · up with silu(g) = g / (1 + e⁻ᵍ), for `rows` rows.
    ///
    /// `gate_up` is rows × 2·dim: a row's gates, then its ups. `out` is rows × dim.
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn silu_mul(&self, rows: usize, dim: usize, gate_up: &[f32], out: &mut [f32]) {
        assert_eq!(gate_up.len(), rows * 2 * dim, "gate_up is rows × 2·dim");
        assert_eq!(out.len(), rows * dim, "out is rows × dim");
        let output = DisjointMut::new(out);
        self.for_ranges(rows * dim, MIN_ELEMENTS / 4, |range| {
            let mut at = range.start;
            while at < range.end {
                let (row, column) = (at / dim, at % dim);
                let len = (dim - column).min(range.end - at);
                let gate = row * 2 * dim + column;
                // SAFETY: the ranges of different tasks are disjoint.
                let out = unsafe { output.range(at..at + len) };
                self.dispatch(SiluMul {
                    gate: &gate_up[gate..][..len],
                    up: &gate_up[gate + dim..][..len],
                    out,
                });
                at += len;
            }
        });
    }

    /// x ← x + y, elementwise.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "both summands have the same length");
        let len = x.len();
        let output = DisjointMut::new(x);
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            let x = unsafe { output.range(range.clone()) };
            self.dispatch(Add { x, y: &y[range] });
        });
    }
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl LaneKernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let operands = self.gate.chunks(LANES).zip(self.up.chunks(LANES));
        for ((gate, up), out) in operands.zip(self.out.chunks_mut(LANES)) {
            if out.len() == LANES {
                silu_mul(S::read(gate), S::read(up)).write(out);
            } else {
                silu_mul(S::read_tail(gate, 0.0), S::read_tail(up, 0.0)).write_tail(out);
            }
        }
    }
}

#[inline(always)]
fn silu_mul<S: Simd16>(gate: S, up: S) -> S {
    let denominator = math::exp_lanes(S::splat(0.0).sub(gate)).add(S::splat(1.0));
    gate.div(denominator).mul(up)
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl LaneKernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for (x, y) in self.x.chunks_mut(LANES).zip(self.y.chunks(LANES)) {
            if x.len() == LANES {
                S::read(x).add(S::read(y)).write(x);
            } else {
                S::read_tail(x, 0.0).add(S::read_tail(y, 0.0)).write_tail(x);
            }
        }
    }
}
