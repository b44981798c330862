//! A rank's share of an adapter that trains: its weights, AdamW's moments, and the packed form that the passes multiply with.

use ashlar_kernels::{AdamW, Kernels};
use ashlar_model::RankSlice;
use ashlar_model::adapter::{Adapter, AdapterWeights};
use ashlar_vocabulary::ModelShape;
use std::sync::Arc;

/// What a job sets once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// β₁.
    pub beta1: f32,
    /// β₂.
    pub beta2: f32,
    /// ε.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest norm of a gradient; a larger one is scaled down to it.
    pub norm_max: Option<f64>,
}

impl Default for Hyperparameters {
    fn default() -> Hyperparameters {
        Hyperparameters { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, norm_max: Some(1.0) }
    }
}

impl Hyperparameters {
    /// What clipping leaves of a gradient: `max / (norm + 1e-6)`, at most 1, as PyTorch's `clip_grad_norm_`.
    pub fn gradient_factor(&self, norm: f64) -> f32 {
        self.norm_max.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0)) as f32
    }
}

/// A rank's share of a job.
#[derive(Debug)]
pub struct AdapterState {
    weights: AdapterWeights,
    first: AdapterWeights,
    second: AdapterWeights,
    /// Steps taken.
    steps: u32,
    packed: Arc<Adapter>,
}

impl AdapterState {
    /// Starts from `weights`.
    pub fn new(
        weights: AdapterWeights,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> AdapterState {
        let zeros = AdapterWeights::zeros(&weights.spec, shape, slice);
        let packed = Arc::new(Adapter::pack(&weights, shape, slice, kernels));
        AdapterState { weights, first: zeros.clone(), second: zeros, steps: 0, packed }
    }

    /// What a checkpoint had.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn restored(
        weights: AdapterWeights,
        first: AdapterWeights,
        second: AdapterWeights,
        steps: u32,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> AdapterState {
        let packed = Arc::new(Adapter::pack(&weights, shape, slice, kernels));
        AdapterState { weights, first, second, steps, packed }
    }

    /// AdamW's moments.
    pub(crate) fn moments(&self) -> (&AdapterWeights, &AdapterWeights) {
        (&self.first, &self.second)
    }

    /// The weights.
    pub fn weights(&self) -> &AdapterWeights {
        &self.weights
    }

    /// Steps taken.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// What products multiply with until the next step.
    pub fn packed(&self) -> &Arc<Adapter> {
        &self.packed
    }

    /// One step with the whole batch's gradient, whose norm over all ranks is `norm`.
    #[allow(clippy::too_many_arguments)]
    pub fn step(
        &mut self,
        gradient: &AdapterWeights,
        norm: f64,
        learning_rate: f32,
        with: &Hyperparameters,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) {
        self.steps += 1;
        let adamw = AdamW {
            learning_rate,
            beta1: with.beta1,
            beta2: with.beta2,
            epsilon: with.epsilon,
            weight_decay: with.weight_decay,
            step: self.steps,
            gradient_factor: with.gradient_factor(norm),
        };
        let moments = self.first.tensors_mut().zip(self.second.tensors_mut());
        for ((weights, gradient), (first, second)) in
            self.weights.tensors_mut().zip(gradient.tensors()).zip(moments)
        {
            kernels.adamw(&adamw, gradient, weights, first, second);
        }
        self.packed = Arc::new(Adapter::pack(&self.weights, shape, slice, kernels));
    }
}
