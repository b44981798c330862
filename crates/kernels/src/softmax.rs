//! The logarithm of a sum of exponentials over the vocabulary, in the order of the numeric contract.

use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::math;
use crate::strided::DisjointMut;
use crate::tree::sum_tree_scalar;
use ashlar_vocabulary::{AxisCut, PARTS};
use std::ops::Range;

/// Elements among which the first largest one is looked for by itself.
const SEARCH: usize = 1024;

/// ln Σ eˣ, kept as maximum and logarithm of the rest so that differences stay accurate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSumExp {
    /// The largest element.
    pub max: f32,
    /// ln Σ e^(x − max).
    pub log_sum: f32,
}

impl LogSumExp {
    /// From the largest element and [`Kernels::exp_sum`] of each of the vocabulary's parts (−0 of an empty one), whoever
    /// computed them.
    pub fn from_parts(max: f32, sums: &[f32; PARTS]) -> LogSumExp {
        LogSumExp { max, log_sum: math::log(f64::from(sum_tree_scalar(sums))) as f32 }
    }

    /// ln Σ eˣ.
    pub fn value(self) -> f32 {
        self.max + self.log_sum
    }

    /// The log-probability of an element: (x − max) − ln Σ e^(x − max).
    pub fn logprob(self, x: f32) -> f32 {
        (x - self.max) - self.log_sum
    }
}

/// What a row's gradient by its logits is made of, see [`Kernels::cross_entropy_gradient`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropyRow {
    /// ln Σ eˣ over the whole vocabulary.
    pub of: LogSumExp,
    /// The target's place in the slice at hand.
    pub target: Option<usize>,
    /// What the gradient is multiplied by.
    pub factor: f32,
}

impl Kernels {
    /// Of each row of `width` logits the largest, as [`Kernels::max`] finds it, and the first place where it is, if anywhere.
    ///
    /// # Panics
    /// If there are not as many logits as rows of them.
    pub fn largest_of_rows(&self, width: usize, logits: &[f32]) -> Vec<(f32, Option<usize>)> {
        let rows = logits.len().checked_div(width).unwrap_or(0);
        assert_eq!(logits.len(), rows * width, "logits are whole rows");
        let mut largest = vec![(f32::NEG_INFINITY, None); rows];
        let to = DisjointMut::new(&mut largest);
        self.for_ranges(rows, 1, |range| {
            for row in range {
                let logits = &logits[row * width..(row + 1) * width];
                let mut best = (f32::NEG_INFINITY, None);
                for (index, run) in logits.chunks(SEARCH).enumerate() {
                    let max = self.max(run);
                    if max > best.0 {
                        best = (max, Some(index));
                    }
                }
                let place = best.1.and_then(|index| {
                    let run = logits[index * SEARCH..].iter().take(SEARCH).position(|&x| x == best.0);
                    run.map(|at| index * SEARCH + at)
                });
                // SAFETY: rows are disjoint.
                let largest = unsafe { to.range(row..row + 1) };
                largest[0] = (best.0, place);
            }
        });
        largest
    }

    /// Of each row of `width` logits, and of each of `parts`, [`Kernels::exp_sum`] with the row's `max`; −0 of an empty part.
    ///
    /// # Panics
    /// If there are not as many logits as rows, or a part lies outside.
    pub fn exp_sums_of_rows(
        &self,
        width: usize,
        logits: &[f32],
        max: &[f32],
        parts: &[Range<usize>],
    ) -> Vec<f32> {
        assert_eq!(logits.len(), max.len() * width, "logits are rows × width");
        let mut sums = vec![-0.0; max.len() * parts.len()];
        let to = DisjointMut::new(&mut sums);
        self.for_ranges(max.len(), 1, |range| {
            for row in range {
                let logits = &logits[row * width..(row + 1) * width];
                // SAFETY: rows are disjoint.
                let sums = unsafe { to.range(row * parts.len()..(row + 1) * parts.len()) };
                for (sum, part) in sums.iter_mut().zip(parts).filter(|(_, part)| !part.is_empty()) {
                    *sum = self.exp_sum(&logits[part.clone()], max[row]);
                }
            }
        });
        sums
    }

    /// [`Kernels::cross_entropy_gradient`] of each row of `width` logits.
    ///
    /// # Panics
    /// If there are not as many logits as rows, or a target lies outside.
    pub fn cross_entropy_gradients(&self, width: usize, logits: &mut [f32], rows: &[CrossEntropyRow]) {
        assert_eq!(logits.len(), rows.len() * width, "logits are rows × width");
        let to = DisjointMut::new(logits);
        self.for_ranges(rows.len(), 1, |range| {
            for (row, with) in range.clone().zip(&rows[range]) {
                // SAFETY: rows are disjoint.
                let logits = unsafe { to.range(row * width..(row + 1) * width) };
                self.cross_entropy_gradient(logits, with.of, with.target, with.factor);
            }
        });
    }

    /// ln Σ eˣ over a whole vocabulary's logits; the result is NaN if an element is NaN, or all are −∞.
    ///
    /// The maximum is exact. Each part of `AxisCut::wide(logits.len())` sums e^(x − max) in sixteen accumulators (index
    /// within the part modulo 16) and a fixed tree over them; the parts add up in the tree over parts.
    pub fn log_sum_exp(&self, logits: &[f32]) -> LogSumExp {
        let max = self.max(logits);
        let cut = AxisCut::wide(logits.len());
        let sums: [f32; PARTS] = std::array::from_fn(|part| {
            let part = &logits[cut.part(part)];
            if part.is_empty() { -0.0 } else { self.exp_sum(part, max) }
        });
        LogSumExp::from_parts(max, &sums)
    }

    /// The largest element, −∞ if there is none; elements that are NaN may or may not be overlooked.
    pub fn max(&self, x: &[f32]) -> f32 {
        self.dispatch(Max(x))
    }

    /// Σ e^(x − max) over one part of the vocabulary, in sixteen accumulators and a fixed tree.
    pub fn exp_sum(&self, part: &[f32], max: f32) -> f32 {
        self.dispatch(ExpSum { part, max })
    }

    /// The gradient of a cross-entropy by logits, in place: x ← e^(x − max − ln Σ)·factor, less `factor` at `target`. `x` may be a
    /// rank's slice of the vocabulary; `target` is then an index into it, or `None` if another rank has it.
    ///
    /// # Panics
    /// If the target lies outside.
    pub fn cross_entropy_gradient(&self, x: &mut [f32], of: LogSumExp, target: Option<usize>, factor: f32) {
        self.dispatch(CrossEntropy { x, of, factor });
        if let Some(target) = target {
            x[target] -= factor;
        }
    }

    /// Whether no element is NaN or infinite.
    pub fn all_finite(&self, x: &[f32]) -> bool {
        self.dispatch(AllFinite(x))
    }
}

struct Max<'a>(&'a [f32]);

impl LaneKernel for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd16>(self) -> f32 {
        let lowest = S::splat(f32::NEG_INFINITY);
        let (wide, rest) = self.0.as_chunks::<{ 4 * LANES }>();
        let mut max = [lowest; 4];
        for x in wide {
            for (vector, max) in max.iter_mut().enumerate() {
                *max = max.max(S::read(&x[vector * LANES..]));
            }
        }
        for x in rest.chunks(LANES) {
            max[0] = max[0].max(S::read_tail(x, f32::NEG_INFINITY));
        }
        max[0].max(max[1]).max(max[2].max(max[3])).max_lane()
    }
}

struct ExpSum<'a> {
    part: &'a [f32],
    max: f32,
}

impl LaneKernel for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd16>(self) -> f32 {
        let max = S::splat(self.max);
        let mut sum = S::splat(0.0);
        let (vectors, tail) = self.part.as_chunks::<LANES>();
        for x in vectors {
            sum = sum.add(math::exp_lanes(S::read(x).sub(max)));
        }
        if !tail.is_empty() {
            sum = sum.add(math::exp_lanes(S::read_tail(tail, f32::NEG_INFINITY).sub(max)));
        }
        sum.sum_lanes()
    }
}

struct CrossEntropy<'a> {
    x: &'a mut [f32],
    of: LogSumExp,
    factor: f32,
}

impl LaneKernel for CrossEntropy<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        let (max, log_sum) = (S::splat(self.of.max), S::splat(self.of.log_sum));
        for x in self.x.chunks_mut(LANES) {
            let logprob = S::read_tail(x, 0.0).sub(max).sub(log_sum);
            math::exp_lanes(logprob).mul(S::splat(self.factor)).write_tail(x);
        }
    }
}

struct AllFinite<'a>(&'a [f32]);

impl LaneKernel for AllFinite<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd16>(self) -> bool {
        // x · 0 is a zero for finite x and NaN otherwise, and NaN stays in a sum.
        let zero = S::splat(0.0);
        let (wide, rest) = self.0.as_chunks::<{ 4 * LANES }>();
        let mut sums = [zero; 4];
        for x in wide {
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = S::read(&x[vector * LANES..]).mul_add(zero, *sum);
            }
        }
        for x in rest.chunks(LANES) {
            sums[0] = S::read_tail(x, 0.0).mul_add(zero, sums[0]);
        }
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum_lanes() == 0.0
    }
}
