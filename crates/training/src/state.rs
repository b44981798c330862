//! A rank's share of what trains: its weights, AdamW's moments, and of an adapter the packed form that the passes multiply with.

use ashlar_kernels::{AdamW, Kernels};
use ashlar_model::adapter::Adapter;
use ashlar_model::{RankSlice, Tensors, Trained};
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
pub struct TrainingState {
    trained: Trained,
    weights: Tensors,
    first: Tensors,
    second: Tensors,
    /// Steps taken.
    steps: u32,
    /// Of an adapter: what products multiply with.
    packed: Option<Arc<Adapter>>,
}

impl TrainingState {
    /// Starts from `weights`.
    pub fn new(
        trained: &Trained,
        weights: Tensors,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> TrainingState {
        let zeros = Tensors::zeros(weights.layout());
        TrainingState::restored(trained, [weights, zeros.clone(), zeros], 0, shape, slice, kernels)
    }

    /// What a checkpoint had: weights and both moments, after so many steps.
    pub(crate) fn restored(
        trained: &Trained,
        [weights, first, second]: [Tensors; 3],
        steps: u32,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) -> TrainingState {
        let trained = trained.clone();
        let mut state = TrainingState { trained, weights, first, second, steps, packed: None };
        state.pack(shape, slice, kernels);
        state
    }

    fn pack(&mut self, shape: &ModelShape, slice: &RankSlice, kernels: &Kernels) {
        let pack = |spec| Arc::new(Adapter::pack_tensors(spec, &self.weights, shape, slice, kernels));
        self.packed = self.trained.adapter().map(pack);
    }

    /// What it is that trains.
    pub fn trained(&self) -> &Trained {
        &self.trained
    }

    /// AdamW's moments.
    pub(crate) fn moments(&self) -> (&Tensors, &Tensors) {
        (&self.first, &self.second)
    }

    /// The weights.
    pub fn weights(&self) -> &Tensors {
        &self.weights
    }

    /// Steps taken.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Memory that it takes, in bytes: weights, moments, and of an adapter the packed form. A model's packed form is its private
    /// copy, and another is there for a moment while an adapter is packed anew.
    pub fn bytes(&self) -> usize {
        let packed = self.packed.as_ref().map_or(0, |adapter| adapter.bytes().0 as usize);
        [&self.weights, &self.first, &self.second].map(Tensors::bytes).iter().sum::<usize>() + packed
    }

    /// The adapter that products multiply with until the next step; of a whole model none, which is reloaded instead
    /// ([`StageTrainer::reload`](ashlar_model::stage::StageTrainer::reload)).
    pub fn packed(&self) -> Option<&Arc<Adapter>> {
        self.packed.as_ref()
    }

    /// One step with the whole batch's gradient, whose norm over all ranks is `norm`. Weight decay leaves biases and weights of norms
    /// alone, as is usual with PyTorch.
    #[allow(clippy::too_many_arguments)]
    pub fn step(
        &mut self,
        gradient: &Tensors,
        norm: f64,
        learning_rate: f32,
        with: &Hyperparameters,
        shape: &ModelShape,
        slice: &RankSlice,
        kernels: &Kernels,
    ) {
        self.steps += 1;
        let layout = self.weights.layout().clone();
        let moments = self.first.tensors_mut().zip(self.second.tensors_mut());
        let weights = layout.shares().iter().zip(self.weights.tensors_mut());
        for (((share, weights), gradient), (first, second)) in weights.zip(gradient.tensors()).zip(moments) {
            let adamw = AdamW {
                learning_rate,
                beta1: with.beta1,
                beta2: with.beta2,
                epsilon: with.epsilon,
                weight_decay: if share.decays() { with.weight_decay } else { 0.0 },
                step: self.steps,
                gradient_factor: with.gradient_factor(norm),
            };
            kernels.adamw(&adamw, gradient, weights, first, second);
        }
        self.pack(shape, slice, kernels);
    }
}
