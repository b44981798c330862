//! Root-mean-square normalisation.

use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::{DisjointMut, StridedRows};

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 16 << 10;

impl Kernels {
    /// out = x · 1/√(mean(x²) + eps) · weight, for each of `rows` rows of `dim` elements.
    ///
    /// The squares add up in sixteen accumulators (index modulo 16, ascending fused multiply-adds), then in a fixed tree;
    /// square root and divisions are the IEEE ones. Also serves per head, with rows × heads rows of the head's width.
    ///
    /// # Panics
    /// If `x` or `out` is not rows × dim, or `weight` not dim long.
    pub fn rms_norm(&self, rows: usize, dim: usize, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), rows * dim, "x is rows × dim");
        assert_eq!(out.len(), rows * dim, "out is rows × dim");
        assert_eq!(weight.len(), dim, "the weight has dim elements");
        let output = DisjointMut::new(out);
        self.for_ranges(rows, MIN_ELEMENTS.div_ceil(dim.max(1)), |range| {
            for row in range {
                let at = row * dim..(row + 1) * dim;
                // SAFETY: rows are disjoint.
                let out = unsafe { output.range(at.clone()) };
                self.dispatch(RmsNorm { x: Some(&x[at]), weight, eps, out });
            }
        });
    }

    /// [`Kernels::rms_norm`] in place for `groups` neighbouring groups of `dim` elements at the start of each row, where
    /// row `r` starts at `x[r · stride]`: normalises the query or key heads inside a fused QKV product.
    ///
    /// # Panics
    /// If a row does not fit its stride or `x`, or `weight` is not dim long.
    #[expect(clippy::too_many_arguments, reason = "a shape of three numbers, a stride and the operands")]
    pub fn rms_norm_in_place(
        &self,
        rows: usize,
        groups: usize,
        dim: usize,
        x: &mut [f32],
        stride: usize,
        weight: &[f32],
        eps: f32,
    ) {
        assert!(groups * dim <= stride || rows <= 1, "the groups of a row fit its stride");
        assert_eq!(weight.len(), dim, "the weight has dim elements");
        let output = DisjointMut::new(x);
        self.for_ranges(rows, MIN_ELEMENTS.div_ceil((groups * dim).max(1)), |range| {
            for row in range {
                for group in 0..groups {
                    let start = row * stride + group * dim;
                    // SAFETY: rows are disjoint, and so are the groups of a row.
                    let out = unsafe { output.range(start..start + dim) };
                    self.dispatch(RmsNorm { x: None, weight, eps, out });
                }
            }
        });
    }
}

impl Kernels {
    /// The gradient of [`Kernels::rms_norm`] by x, in place over the gradient by its output: for `groups` neighbouring
    /// groups of `dim` elements at the start of each row of both `x` (what was normalised) and `gradient`, whose row r starts
    /// at `gradient[r · stride]`.
    ///
    /// With s = 1/√(mean(x²) + eps): s·(w·dy) − x·s³·(Σ x·w·dy)/dim; sums as in the norm.
    ///
    /// # Panics
    /// If a row does not fit, or `weight` is not dim long.
    #[expect(clippy::too_many_arguments, reason = "a shape of three numbers, a stride and the operands")]
    pub fn rms_norm_gradient(
        &self,
        rows: usize,
        groups: usize,
        dim: usize,
        x: StridedRows<'_>,
        weight: &[f32],
        eps: f32,
        gradient: &mut [f32],
        stride: usize,
    ) {
        assert!(groups * dim <= stride || rows <= 1, "the groups of a row fit its stride");
        assert_eq!(weight.len(), dim, "the weight has dim elements");
        let output = DisjointMut::new(gradient);
        self.for_ranges(rows, MIN_ELEMENTS.div_ceil((groups * dim).max(1)), |range| {
            for row in range {
                for (group, x) in x.row(row, groups * dim).chunks_exact(dim).enumerate() {
                    let start = row * stride + group * dim;
                    // SAFETY: rows are disjoint, and so are the groups of a row.
                    let gradient = unsafe { output.range(start..start + dim) };
                    self.dispatch(RmsNormGradient { x, weight, eps, gradient });
                }
            }
        });
    }

    /// gradient ← gradient + Σ over rows and groups of dy·x·s, the gradient of [`Kernels::rms_norm`] by its weight: per
    /// element a chain in row, then group order, that goes on from what is there.
    ///
    /// # Panics
    /// If a row does not fit, or `gradient` is not dim long.
    #[expect(clippy::too_many_arguments, reason = "a shape of three numbers and the operands")]
    pub fn rms_norm_weight_gradient(
        &self,
        rows: usize,
        groups: usize,
        dim: usize,
        x: StridedRows<'_>,
        eps: f32,
        dy: StridedRows<'_>,
        gradient: &mut [f32],
    ) {
        assert_eq!(gradient.len(), dim, "the gradient has dim elements");
        for row in 0..rows {
            let groups =
                x.row(row, groups * dim).chunks_exact(dim).zip(dy.row(row, groups * dim).chunks_exact(dim));
            for (x, dy) in groups {
                self.dispatch(RmsNormWeightGradient { x, dy, eps, gradient });
            }
        }
    }
}

/// Σ a·b in sixteen accumulators and a fixed tree, or Σ a·b·c.
#[inline(always)]
fn sum_of_products<S: Simd16>(a: &[f32], b: &[f32], c: Option<&[f32]>) -> f32 {
    let mut sum = S::splat(0.0);
    for (index, (a, b)) in a.chunks(LANES).zip(b.chunks(LANES)).enumerate() {
        let b = S::read_tail(b, 0.0);
        let b = match c {
            Some(c) => b.mul(S::read_tail(&c[index * LANES..], 0.0)),
            None => b,
        };
        sum = S::read_tail(a, 0.0).mul_add(b, sum);
    }
    sum.sum_lanes()
}

/// One row.
struct RmsNormGradient<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    gradient: &'a mut [f32],
}

impl LaneKernel for RmsNormGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let RmsNormGradient { x, weight, eps, gradient } = self;
        let dim = x.len() as f32;
        let scale = 1.0 / (sum_of_products::<S>(x, x, None) / dim + eps).sqrt();
        let along = sum_of_products::<S>(x, weight, Some(gradient)) / dim;
        let (scale, back) = (S::splat(scale), S::splat(-(scale * scale * scale * along)));
        let rows = x.chunks(LANES).zip(weight.chunks(LANES));
        for (gradient, (x, weight)) in gradient.chunks_mut(LANES).zip(rows) {
            let straight = S::read_tail(weight, 0.0).mul(S::read_tail(gradient, 0.0)).mul(scale);
            S::read_tail(x, 0.0).mul_add(back, straight).write_tail(gradient);
        }
    }
}

/// One row.
struct RmsNormWeightGradient<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    eps: f32,
    gradient: &'a mut [f32],
}

impl LaneKernel for RmsNormWeightGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let RmsNormWeightGradient { x, dy, eps, gradient } = self;
        let scale = S::splat(1.0 / (sum_of_products::<S>(x, x, None) / x.len() as f32 + eps).sqrt());
        for (gradient, (x, dy)) in gradient.chunks_mut(LANES).zip(x.chunks(LANES).zip(dy.chunks(LANES))) {
            let normed = S::read_tail(x, 0.0).mul(scale);
            normed.mul_add(S::read_tail(dy, 0.0), S::read_tail(gradient, 0.0)).write_tail(gradient);
        }
    }
}

/// One row; in place without `x`.
struct RmsNorm<'a> {
    x: Option<&'a [f32]>,
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl LaneKernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let RmsNorm { x, weight, eps, out } = self;
        if let Some(x) = x {
            out.copy_from_slice(x);
        }
        let scale = S::splat(row_scale::<S>(out, eps));
        for (out, weight) in out.chunks_mut(LANES).zip(weight.chunks(LANES)) {
            if out.len() == LANES {
                S::read(out).mul(scale).mul(S::read(weight)).write(out);
            } else {
                S::read_tail(out, 0.0).mul(scale).mul(S::read_tail(weight, 0.0)).write_tail(out);
            }
        }
    }
}

/// 1/√(mean(x²) + eps) of one row.
#[inline(always)]
pub(crate) fn row_scale<S: Simd16>(x: &[f32], eps: f32) -> f32 {
    let mut squares = S::splat(0.0);
    let (vectors, tail) = x.as_chunks::<LANES>();
    for x in vectors {
        let x = S::read(x);
        squares = x.mul_add(x, squares);
    }
    if !tail.is_empty() {
        let x = S::read_tail(tail, 0.0);
        squares = x.mul_add(x, squares);
    }
    let mean = squares.sum_lanes() / x.len() as f32;
    1.0 / (mean + eps).sqrt()
}
