//! Dropout: with the mask fixed, every gradient is the one that differences of the loss show.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::adapter::{Adapter, LoraSpec, Target};
use ashlar_model::stage::{MicroBatch, StageTrainer, TargetRow};
use ashlar_model::tensors::AdapterHalf;
use ashlar_model::{ModelConfig, RankSlice, SingleRank, StageInput, StageModel, TensorId, Tensors, Trained};
use ashlar_training::initial_adapter;
use ashlar_vocabulary::Quantization;
use ashlar_vocabulary::random::dropout_key;
use std::path::PathBuf;
use std::sync::Arc;

/// Sequences of a micro-batch.
const LENGTHS: [usize; 3] = [7, 13, 4];
const ROWS: usize = 24;

struct Setup {
    config: ModelConfig,
    slice: RankSlice,
    kernels: Arc<Kernels>,
    trainer: StageTrainer,
    spec: LoraSpec,
    /// The adapter, of which B is not zero.
    weights: Tensors,
}

impl Setup {
    fn new(name: &str) -> Setup {
        let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../model/tests/goldens").join(name);
        let config = ModelConfig::from_dir(&directory).unwrap();
        let (slice, kernels) = (RankSlice::whole(&config.shape), Arc::new(Kernels::new(Isa::best(), 2)));
        let none = None::<Quantization>;
        let model =
            StageModel::load(&directory, none, slice.clone(), kernels.clone(), &mut |_, _| {}).unwrap();
        let trainer = StageTrainer::new(Arc::new(model), kernels.clone(), ROWS);
        let spec = LoraSpec { rank: 4, alpha: 8.0, rank_stabilized: false, targets: Target::ALL.to_vec() };
        let mut weights = initial_adapter(&spec, &config.shape, &slice, 5).tensors;
        let ids: Vec<TensorId> = weights.layout().shares().iter().map(|share| share.id).collect();
        for (index, id) in ids.into_iter().enumerate() {
            if let TensorId::Adapter(_, _, AdapterHalf::B) = id {
                let number = |i: usize| (((i + index) * 37 % 101) as f32 / 50.0 - 1.0) * 0.05;
                weights.get_mut(id).unwrap().iter_mut().enumerate().for_each(|(i, x)| *x = number(i));
            }
        }
        Setup { config, slice, kernels, trainer, spec, weights }
    }

    fn batch(share: f32) -> MicroBatch {
        let keys: Vec<[u32; 2]> = (0..3).map(|sample| dropout_key(11, 2, sample, 0)).collect();
        MicroBatch::new(&LENGTHS).with_dropout(share, &keys)
    }

    fn tokens(&self) -> Vec<u32> {
        (0..ROWS).map(|row| ((row * 31 + 5) % self.config.shape.vocab_size) as u32).collect()
    }

    fn targets(&self) -> Vec<TargetRow> {
        let token = |row: usize| ((row * 17 + 3) % self.config.shape.vocab_size) as u32;
        (0..ROWS).map(|row| TargetRow { row, token: token(row), weight: 1.0 }).collect()
    }

    fn pack(&self, weights: &Tensors) -> Adapter {
        Adapter::pack_tensors(&self.spec, weights, &self.config.shape, &self.slice, &self.kernels)
    }

    /// Σ −ln p of all targets.
    fn loss(&mut self, weights: &Tensors, share: f32) -> f64 {
        let (adapter, batch, tokens) = (self.pack(weights), Setup::batch(share), self.tokens());
        let (targets, group, beat) = (self.targets(), &mut SingleRank, &mut || Ok(()));
        let input = StageInput::Tokens(&tokens);
        self.trainer.forward(&batch, input, Some(&adapter), true, group, beat).unwrap();
        self.trainer.loss(&targets, 1.0, ROWS, None, group).unwrap().0.loss.value()
    }

    fn gradient(&mut self, share: f32, keep: bool) -> Tensors {
        let (adapter, batch, tokens) = (self.pack(&self.weights), Setup::batch(share), self.tokens());
        let (targets, group, beat) = (self.targets(), &mut SingleRank, &mut || Ok(()));
        let trained = Trained::Adapter(self.spec.clone());
        let mut sink = Tensors::zeros(&trained.weights(&self.config.shape, &self.slice));
        let input = StageInput::Tokens(&tokens);
        let tape = self.trainer.forward(&batch, input, Some(&adapter), keep, group, beat).unwrap();
        let mut gradient = self.trainer.loss(&targets, 1.0, ROWS, None, group).unwrap().1.to_vec();
        self.trainer.backward(&batch, tape, Some(&adapter), &mut gradient, &mut sink, group, beat).unwrap();
        sink
    }
}

fn length(numbers: &[f32]) -> f64 {
    numbers.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn every_gradient_is_the_difference_of_losses_under_the_same_mask() {
    for name in ["llama", "qwen3"] {
        let mut setup = Setup::new(name);
        let gradient = setup.gradient(0.4, true);
        let again = setup.gradient(0.4, false);
        assert!(gradient == again, "what is computed again has the same mask");
        let shares: Vec<(TensorId, String)> =
            gradient.layout().shares().iter().map(|share| (share.id, share.name.clone())).collect();
        let step = 0.02;
        for (id, tensor) in shares {
            // Along the gradient the loss rises by its length.
            let own = gradient.get(id).unwrap().to_vec();
            let expected = length(&own);
            let mut moved = |by: f64| {
                let mut weights = setup.weights.clone();
                let to = weights.get_mut(id).unwrap().iter_mut();
                to.zip(&own).for_each(|(w, g)| *w += (by * f64::from(*g) / expected) as f32);
                setup.loss(&weights, 0.4)
            };
            let found = (moved(step) - moved(-step)) / (2.0 * step);
            let error = (found - expected).abs();
            assert!(error <= 1e-2 * expected + 2e-3, "{name}, {tensor}: {found} by differences, {expected}");
        }
        assert!(gradient != setup.gradient(0.0, true), "{name}: some inputs are not seen");
    }
}

#[test]
fn a_share_of_zero_is_no_dropout_and_passes_that_do_not_train_have_none() {
    let mut setup = Setup::new("llama");
    let weights = setup.weights.clone();
    let plain = setup.loss(&weights, 0.0);
    assert_ne!(setup.loss(&weights, 0.4), plain);
    let (adapter, batch, tokens) = (setup.pack(&weights), Setup::batch(0.4), setup.tokens());
    let (group, beat) = (&mut SingleRank, &mut || Ok(()));
    let input = StageInput::Tokens(&tokens);
    setup.trainer.forward_only(&batch, input, Some(&adapter), group, beat).unwrap();
    let targets = setup.targets();
    let scores = setup.trainer.score(&targets, group).unwrap();
    let measured = ashlar_model::stage::BatchLoss::of_targets(&targets, &scores);
    assert_eq!(measured.loss.value(), plain);
}
