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

    /// The gradient of [`Kernels::silu_mul`]: `d_gate_up` (rows × 2·dim) from `gate_up` and the gradient by its output,
    /// `d_out` (rows × dim). With σ = 1 / (1 + e⁻ᵍ): d_up = d_out·(g·σ), d_gate = (d_out·up)·(σ·(1 + g·(1 − σ))).
    ///
    /// # Panics
    /// If a length does not fit.
    pub fn silu_mul_gradient(
        &self,
        rows: usize,
        dim: usize,
        gate_up: &[f32],
        d_out: &[f32],
        d_gate_up: &mut [f32],
    ) {
        assert_eq!(gate_up.len(), rows * 2 * dim, "gate_up is rows × 2·dim");
        assert_eq!(d_gate_up.len(), rows * 2 * dim, "d_gate_up is rows × 2·dim");
        assert_eq!(d_out.len(), rows * dim, "d_out is rows × dim");
        let output = DisjointMut::new(d_gate_up);
        self.for_ranges(rows, (MIN_ELEMENTS / 4).div_ceil(dim.max(1)), |range| {
            for row in range {
                let (gate, up) = gate_up[row * 2 * dim..][..2 * dim].split_at(dim);
                // SAFETY: rows are disjoint.
                let gradient = unsafe { output.range(row * 2 * dim..(row + 1) * 2 * dim) };
                self.dispatch(SiluMulGradient { gate, up, d_out: &d_out[row * dim..][..dim], gradient });
            }
        });
    }

    /// x ← x · factor, elementwise.
    pub fn scale(&self, x: &mut [f32], factor: f32) {
        let len = x.len();
        let output = DisjointMut::new(x);
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            unsafe { output.range(range) }.iter_mut().for_each(|x| *x *= factor);
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

/// silu(gate) · up.
#[inline(always)]
pub(crate) fn silu_mul<S: Simd16>(gate: S, up: S) -> S {
    let denominator = math::exp_lanes(S::splat(0.0).sub(gate)).add(S::splat(1.0));
    gate.div(denominator).mul(up)
}

struct SiluMulGradient<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    d_out: &'a [f32],
    gradient: &'a mut [f32],
}

impl LaneKernel for SiluMulGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let (d_gate, d_up) = self.gradient.split_at_mut(self.gate.len());
        let inputs = self.gate.chunks(LANES).zip(self.up.chunks(LANES)).zip(self.d_out.chunks(LANES));
        let outputs = d_gate.chunks_mut(LANES).zip(d_up.chunks_mut(LANES));
        let one = S::splat(1.0);
        for (((gate, up), d_out), (d_gate, d_up)) in inputs.zip(outputs) {
            let (gate, up) = (S::read_tail(gate, 0.0), S::read_tail(up, 0.0));
            let d_out = S::read_tail(d_out, 0.0);
            let sigma = one.div(math::exp_lanes(S::splat(0.0).sub(gate)).add(one));
            let slope = sigma.mul(gate.mul_add(one.sub(sigma), one));
            d_out.mul(up).mul(slope).write_tail(d_gate);
            d_out.mul(gate.mul(sigma)).write_tail(d_up);
        }
    }
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
