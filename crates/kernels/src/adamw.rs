//! One step of AdamW (Loshchilov & Hutter, 2019, algorithm 2), in the order of PyTorch's `torch.optim.AdamW`.

use crate::kernels::Kernels;
use crate::strided::DisjointMut;

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 16 << 10;

/// What one step of AdamW takes apart from its operands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// β₁, decay of the first moment.
    pub beta1: f32,
    /// β₂, decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Which step this is, from 1.
    pub step: u32,
    /// Factor of the gradient: what clipping leaves of it.
    pub gradient_factor: f32,
}

impl AdamW {
    /// 1 − βᵗ in `f64`, by repeated squaring.
    fn correction(beta: f32, step: u32) -> f64 {
        let (mut power, mut base, mut left) = (1.0f64, f64::from(beta), step);
        while left > 0 {
            if left % 2 == 1 {
                power *= base;
            }
            base *= base;
            left /= 2;
        }
        1.0 - power
    }
}

impl Kernels {
    /// Moves `weights` by one step and updates the moments; all slices have one length. Elementwise, so any cut of a
    /// tensor gives the same bits.
    ///
    /// # Panics
    /// If a length differs, or the step is 0.
    pub fn adamw(
        &self,
        with: &AdamW,
        gradient: &[f32],
        weights: &mut [f32],
        first: &mut [f32],
        second: &mut [f32],
    ) {
        let len = weights.len();
        assert!(gradient.len() == len && first.len() == len && second.len() == len, "all are of one length");
        assert!(with.step > 0, "steps count from 1");
        let AdamW { learning_rate, beta1, beta2, epsilon, weight_decay, step, gradient_factor } = *with;
        let keep = (1.0 - f64::from(learning_rate) * f64::from(weight_decay)) as f32;
        let rate = (f64::from(learning_rate) / AdamW::correction(beta1, step)) as f32;
        let root = AdamW::correction(beta2, step).sqrt() as f32;
        let (fresh1, fresh2) = (1.0 - beta1, 1.0 - beta2);
        let (weights, first, second) =
            (DisjointMut::new(weights), DisjointMut::new(first), DisjointMut::new(second));
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            let (weights, first, second) = unsafe {
                (weights.range(range.clone()), first.range(range.clone()), second.range(range.clone()))
            };
            let moments = first.iter_mut().zip(second);
            for ((weight, gradient), (m, v)) in weights.iter_mut().zip(&gradient[range]).zip(moments) {
                let g = gradient * gradient_factor;
                *m += fresh1 * (g - *m);
                *v = beta2 * *v + fresh2 * (g * g);
                *weight = keep * *weight - rate * (*m / (v.sqrt() / root + epsilon));
            }
        });
    }

    /// Σ x² of a tensor as a part of a gradient's norm: products in `f64`, sixteen accumulators (index modulo 16), a fixed
    /// tree.
    pub fn sum_of_squares(&self, x: &[f32]) -> f64 {
        let mut sums = [0.0f64; 16];
        for x in x.chunks(16) {
            for (sum, &x) in sums.iter_mut().zip(x) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        let mut len = sums.len();
        while len > 1 {
            len /= 2;
            for i in 0..len {
                sums[i] += sums[i + len];
            }
        }
        sums[0]
    }
}
