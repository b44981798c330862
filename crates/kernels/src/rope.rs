//! Rotary position embeddings: frequencies, tables of cosines and sines, rotation.

use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::math;
use crate::strided::DisjointMut;
use std::f64::consts::TAU;

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 8 << 10;

/// 1 / theta^(2i/d) for i in 0…d/2, with d = `rotary_dim`, computed in `f64` and rounded once.
pub fn inv_freq(theta: f64, rotary_dim: usize) -> Vec<f32> {
    (0..rotary_dim / 2).map(|i| math::pow(theta, -((2 * i) as f64 / rotary_dim as f64)) as f32).collect()
}

/// Linear scaling (`rope_type: linear`): every frequency divided by `factor`.
pub fn scale_inv_freq_linear(inv_freq: &mut [f32], factor: f64) {
    for frequency in inv_freq {
        *frequency = (f64::from(*frequency) / factor) as f32;
    }
}

/// The parameters of `rope_type: llama3`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// By how much low frequencies are divided.
    pub factor: f64,
    /// Wavelengths above original length / this are low frequencies.
    pub low_freq_factor: f64,
    /// Wavelengths below original length / this are left alone.
    pub high_freq_factor: f64,
    /// Positions of the original training.
    pub original_max_position: f64,
}

/// The scaling of Llama 3.1 (`_compute_llama3_parameters` in Transformers): long wavelengths are stretched by the factor,
/// short ones kept, those between interpolated.
pub fn scale_inv_freq_llama3(inv_freq: &mut [f32], scaling: Llama3Scaling) {
    let Llama3Scaling { factor, low_freq_factor, high_freq_factor, original_max_position } = scaling;
    for frequency in inv_freq {
        let original = f64::from(*frequency);
        let wavelength = TAU / original;
        let scaled = if wavelength > original_max_position / low_freq_factor {
            original / factor
        } else if wavelength < original_max_position / high_freq_factor {
            original
        } else {
            let turns = original_max_position / wavelength;
            let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * original / factor + smooth * original
        };
        *frequency = scaled as f32;
    }
}

impl Kernels {
    /// Tables for rotating rows at `positions`: cos and sin of position · frequency, times `attention_factor`.
    ///
    /// `cos` and `sin` are positions × frequencies. The angle is the `f32` product, as PyTorch computes it; its cosine and
    /// sine are evaluated in `f64` and rounded once, then multiplied by the factor in `f32`.
    ///
    /// # Panics
    /// If `cos` or `sin` is not positions × frequencies.
    pub fn rope_angles(
        &self,
        positions: &[u32],
        inv_freq: &[f32],
        attention_factor: f32,
        cos: &mut [f32],
        sin: &mut [f32],
    ) {
        let half = inv_freq.len();
        assert_eq!(cos.len(), positions.len() * half, "cos is positions × frequencies");
        assert_eq!(sin.len(), positions.len() * half, "sin is positions × frequencies");
        let (cos, sin) = (DisjointMut::new(cos), DisjointMut::new(sin));
        self.for_ranges(positions.len(), 1024usize.div_ceil(half.max(1)), |range| {
            let at = range.start * half..range.end * half;
            // SAFETY: the ranges of different tasks are disjoint.
            let (cos, sin) = unsafe { (cos.range(at.clone()), sin.range(at)) };
            self.dispatch(Angles { positions: &positions[range], inv_freq, attention_factor, cos, sin });
        });
    }

    /// Rotates the first `heads` heads of each row by its angles, in place (half-split layout: element i pairs with
    /// i + d/2, as in Transformers' `rotate_half`).
    ///
    /// Row `r` starts at `x[r · stride]`. `cos` and `sin` are rows × d/2 from [`Kernels::rope_angles`]; where d is smaller
    /// than `head_dim`, the rest of a head stays as it is.
    /// x₁ ← x₁·cos − x₂·sin, x₂ ← x₂·cos + x₁·sin; the product with cos is rounded, the other one fused.
    ///
    /// # Panics
    /// If a length does not fit.
    #[expect(clippy::too_many_arguments, reason = "a shape of three numbers, a stride and the operands")]
    pub fn rope(
        &self,
        rows: usize,
        heads: usize,
        head_dim: usize,
        x: &mut [f32],
        stride: usize,
        cos: &[f32],
        sin: &[f32],
    ) {
        if rows == 0 {
            return;
        }
        let half = cos.len() / rows;
        assert!(
            cos.len() == rows * half && sin.len() == cos.len(),
            "cos and sin are rows × half the rotated width"
        );
        assert!(2 * half <= head_dim, "no more is rotated than a head has");
        assert!(heads * head_dim <= stride || rows == 1, "the heads of a row fit its stride");
        let output = DisjointMut::new(x);
        self.for_ranges(rows, MIN_ELEMENTS.div_ceil((heads * head_dim).max(1)), |range| {
            for row in range {
                // SAFETY: rows are disjoint.
                let x = unsafe { output.range(row * stride..row * stride + heads * head_dim) };
                let angles = row * half..(row + 1) * half;
                self.dispatch(Rotate { x, head_dim, cos: &cos[angles.clone()], sin: &sin[angles] });
            }
        });
    }
}

/// A table for some positions.
struct Angles<'a> {
    positions: &'a [u32],
    inv_freq: &'a [f32],
    attention_factor: f32,
    cos: &'a mut [f32],
    sin: &'a mut [f32],
}

impl LaneKernel for Angles<'_> {
    type Output = ();

    /// Scalar `f64` code, dispatched so that its fused multiply-adds are single instructions.
    #[inline(always)]
    fn run<S: Simd16>(self) {
        let half = self.inv_freq.len();
        for (row, &position) in self.positions.iter().enumerate() {
            for (i, &frequency) in self.inv_freq.iter().enumerate() {
                let (sin, cos) = math::sin_cos(f64::from(position as f32 * frequency));
                self.cos[row * half + i] = cos as f32 * self.attention_factor;
                self.sin[row * half + i] = sin as f32 * self.attention_factor;
            }
        }
    }
}

/// The heads of one row.
struct Rotate<'a> {
    x: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl LaneKernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let half = self.cos.len();
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            let angles = self.cos.chunks(LANES).zip(self.sin.chunks(LANES));
            for ((x1, x2), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(angles) {
                if x1.len() == LANES {
                    let (a, b) = rotate(S::read(x1), S::read(x2), S::read(cos), S::read(sin));
                    a.write(x1);
                    b.write(x2);
                } else {
                    let (a, b) = (S::read_tail(x1, 0.0), S::read_tail(x2, 0.0));
                    let (a, b) = rotate(a, b, S::read_tail(cos, 0.0), S::read_tail(sin, 0.0));
                    a.write_tail(x1);
                    b.write_tail(x2);
                }
            }
        }
    }
}

/// Sixteen pairs, turned.
#[inline(always)]
fn rotate<S: Simd16>(a: S, b: S, cos: S, sin: S) -> (S, S) {
    (S::splat(0.0).sub(b).mul_add(sin, a.mul(cos)), a.mul_add(sin, b.mul(cos)))
}
