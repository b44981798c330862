//! Trains in process over any grid: replicas and stages one after the other, ranks of a group on threads of their own.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

#[path = "../../../model/tests/common/mod.rs"]
pub mod serving;

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::adapter::{AdapterWeights, LoraSpec};
use ashlar_model::peft::PeftAdapter;
use ashlar_model::stage::{BatchLoss, MicroBatch, StageTape, StageTrainer, TargetRow};
use ashlar_model::{ModelConfig, RankSlice, StageInput, StageModel};
use ashlar_training::{AdapterState, Hyperparameters, NormTerms, RunTree, gradient_norm};
use ashlar_vocabulary::{HeadSlice, LayerRange, PARTS, Precision, TokenId};
use serving::{ThreadGroup, bits};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What to learn: tokens, and which of them are targets of the token before.
#[derive(Debug, Clone)]
pub struct Sample {
    pub tokens: Vec<TokenId>,
    pub targets: Vec<bool>,
}

/// How the work is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub stages: usize,
    pub ranks: usize,
    pub replicas: usize,
    /// Most samples of a micro-batch.
    pub samples: usize,
    /// Whether blocks keep their activations.
    pub keep: bool,
    pub isa: Isa,
    pub threads: usize,
}

impl Default for Cut {
    fn default() -> Cut {
        let (isa, keep) = (Isa::best(), true);
        Cut { stages: 1, ranks: 1, replicas: 1, samples: 1, keep, isa, threads: 1 }
    }
}

struct Rank {
    slice: RankSlice,
    trainer: StageTrainer,
    group: ThreadGroup,
    state: AdapterState,
    tree: RunTree,
    tape: Option<StageTape>,
}

/// A job on a grid.
pub struct Job {
    pub config: ModelConfig,
    cut: Cut,
    kernels: Arc<Kernels>,
    replicas: Vec<Vec<Vec<Rank>>>,
    with: Hyperparameters,
}

/// What a step reports.
#[derive(Debug, Clone, Copy)]
pub struct StepReport {
    pub loss: BatchLoss,
    pub norm: f64,
}

const ROWS_MAX: usize = 512;

impl Job {
    pub fn new(
        directory: &Path,
        precision: impl Into<Precision>,
        cut: Cut,
        spec: &LoraSpec,
        with: Hyperparameters,
        start: &dyn Fn(&ModelConfig, &RankSlice) -> AdapterWeights,
    ) -> Job {
        let precision = precision.into();
        let config = ModelConfig::open(directory, precision).unwrap();
        let kernels = Arc::new(Kernels::new(cut.isa, cut.threads));
        let layers = config.shape.num_layers;
        let rank = |stage: usize, group: ThreadGroup| {
            use ashlar_model::Collective as _;
            let range =
                LayerRange { start: stage * layers / cut.stages, end: (stage + 1) * layers / cut.stages };
            let slice = RankSlice {
                layers: range,
                first: stage == 0,
                last: stage + 1 == cut.stages,
                tensor_rank: group.rank(),
                tensor_parallel_size: cut.ranks,
                head: HeadSlice::of_rank(false, (stage, cut.stages), (group.rank(), cut.ranks)),
            };
            // Ranks of a group compute at the same time.
            let own = Arc::new(Kernels::new(cut.isa, cut.threads));
            let model =
                StageModel::load(directory, precision, slice.clone(), own.clone(), &mut |_, _| {}).unwrap();
            let weights = start(&config, &slice);
            Rank {
                state: AdapterState::new(weights, &config.shape, &slice, &kernels),
                tree: RunTree::new(spec, &config.shape, &slice),
                trainer: StageTrainer::new(Arc::new(model), own, ROWS_MAX),
                slice,
                group,
                tape: None,
            }
        };
        let stage = |stage| ThreadGroup::of(cut.ranks).into_iter().map(|group| rank(stage, group)).collect();
        let replicas = (0..cut.replicas).map(|_| (0..cut.stages).map(stage).collect()).collect();
        Job { config, cut, kernels, replicas, with }
    }

    /// One step over a global batch.
    pub fn step(&mut self, samples: &[Sample], learning_rate: f32) -> StepReport {
        let mut loss = BatchLoss::default();
        for index in 0..self.replicas.len() {
            self.run_replica(index, samples, &mut loss);
        }
        // Per stage and rank: the sum over replicas, which is the top of the tree.
        let kernels = self.kernels.clone();
        let shape = self.config.shape.clone();
        let mut gradients: Vec<Vec<AdapterWeights>> = Vec::new();
        for stage in 0..self.cut.stages {
            let mut ranks = Vec::new();
            for rank in 0..self.cut.ranks {
                let shares: Vec<AdapterWeights> =
                    self.replicas.iter_mut().map(|replica| replica[stage][rank].tree.take()).collect();
                let mut sum = shares[0].clone();
                for (index, to) in sum.tensors_mut().enumerate() {
                    let parts: Vec<&[f32]> =
                        shares.iter().map(|share| share.tensors().nth(index).unwrap()).collect();
                    kernels.sum_tree(&parts, to);
                }
                ranks.push(sum);
            }
            gradients.push(ranks);
        }
        let terms: Vec<Vec<NormTerms>> = self.replicas[0]
            .iter()
            .zip(&gradients)
            .map(|(ranks, gradients)| {
                let ranks = ranks.iter().zip(gradients);
                ranks.map(|(rank, own)| NormTerms::of(own, &shape, &rank.slice, &kernels)).collect()
            })
            .collect();
        let norm = gradient_norm(&terms);
        for replica in &mut self.replicas {
            for (ranks, gradients) in replica.iter_mut().zip(&gradients) {
                for (rank, gradient) in ranks.iter_mut().zip(gradients) {
                    rank.state.step(gradient, norm, learning_rate, &self.with, &shape, &rank.slice, &kernels);
                }
            }
        }
        StepReport { loss, norm }
    }

    fn run_replica(&mut self, index: usize, samples: &[Sample], loss: &mut BatchLoss) {
        let targets: usize = samples.iter().map(|sample| sample.targets.iter().filter(|&&t| t).count()).sum();
        let factor = 1.0 / targets as f32;
        let each = PARTS / self.cut.replicas;
        for run in index * each..(index + 1) * each {
            let run = &samples[run * samples.len() / PARTS..(run + 1) * samples.len() / PARTS];
            for batch in run.chunks(self.cut.samples) {
                *loss = loss.and(micro_batch(&mut self.replicas[index], batch, factor, self.cut.keep));
            }
            for rank in self.replicas[index].iter_mut().flatten() {
                rank.tree.end_run(&self.kernels);
            }
        }
    }

    /// The gradient's entries for one batch on one replica, without a step.
    pub fn gradient(&mut self, samples: &[Sample]) -> (BatchLoss, PeftAdapter) {
        let mut loss = BatchLoss::default();
        self.run_replica(0, samples, &mut loss);
        let shares: Vec<(RankSlice, AdapterWeights)> = self.replicas[0]
            .iter_mut()
            .flatten()
            .map(|rank| (rank.slice.clone(), rank.tree.take()))
            .collect();
        (loss, PeftAdapter::join(&self.config.shape, shares.iter().map(|(slice, share)| (slice, share))))
    }

    /// The adapter as it is; every replica must hold the same.
    pub fn adapter(&self) -> PeftAdapter {
        let joined: Vec<PeftAdapter> = self
            .replicas
            .iter()
            .map(|replica| {
                let shares = replica.iter().flatten().map(|rank| (&rank.slice, rank.state.weights()));
                PeftAdapter::join(&self.config.shape, shares)
            })
            .collect();
        assert!(joined.iter().all(|other| other == &joined[0]), "replicas hold the same adapter");
        joined.into_iter().next().unwrap()
    }
}

/// A micro-batch through all stages and back.
fn micro_batch(stages: &mut [Vec<Rank>], samples: &[Sample], factor: f32, keep: bool) -> BatchLoss {
    let lengths: Vec<usize> = samples.iter().map(|sample| sample.tokens.len()).collect();
    let batch = &MicroBatch::new(&lengths);
    let tokens: Vec<TokenId> = samples.iter().flat_map(|sample| sample.tokens.clone()).collect();
    let mut targets = Vec::new();
    for (sample, rows) in samples.iter().zip(batch.sequences()) {
        for position in 1..sample.tokens.len() {
            if sample.targets[position] {
                let token = sample.tokens[position];
                targets.push(TargetRow { row: rows.start + position - 1, token, weight: 1.0 });
            }
        }
    }
    let (tokens, targets) = (&tokens[..], &targets[..]);
    let mut activations: Vec<f32> = Vec::new();
    for ranks in stages.iter_mut() {
        let input = &activations[..];
        activations = on_all(ranks, &|rank| {
            let first = rank.slice.first;
            let input = if first { StageInput::Tokens(tokens) } else { StageInput::Activations(input) };
            let Rank { trainer, group, state, .. } = rank;
            let tape =
                trainer.forward(batch, input, Some(state.packed()), keep, group, &mut || Ok(())).unwrap();
            rank.tape = Some(tape);
            rank.trainer.activations(batch.rows()).to_vec()
        });
    }
    let losses = Mutex::new(Vec::new());
    let mut gradient: Vec<f32> = Vec::new();
    for ranks in stages.iter_mut().rev() {
        let from = &gradient[..];
        gradient = on_all(ranks, &|rank| {
            let mut gradient = from.to_vec();
            if rank.slice.last {
                let Rank { trainer, group, .. } = rank;
                let (loss, own) = trainer.loss(targets, factor, batch.rows(), group).unwrap();
                gradient = own.to_vec();
                losses.lock().unwrap().push(loss);
            }
            let Rank { trainer, group, state, tree, tape, .. } = rank;
            let (tape, adapter) = (tape.take().unwrap(), state.packed().clone());
            let sink = tree.current();
            trainer
                .backward(batch, tape, Some(&adapter), &mut gradient, sink, group, &mut || Ok(()))
                .unwrap();
            gradient
        });
    }
    let losses = losses.into_inner().unwrap();
    assert!(losses.iter().all(|loss| loss == &losses[0]), "ranks agree on the loss");
    losses[0]
}

/// Runs something on every rank of a group at once; all must give the same bits.
fn on_all(ranks: &mut [Rank], run: &(dyn Fn(&mut Rank) -> Vec<f32> + Sync)) -> Vec<f32> {
    // A rank that fails would leave the others waiting for ever.
    let run = |rank: &mut Rank| {
        catch_unwind(AssertUnwindSafe(|| run(rank))).unwrap_or_else(|_| std::process::exit(101))
    };
    let mut all: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let running: Vec<_> = ranks.iter_mut().map(|rank| scope.spawn(|| run(rank))).collect();
        running.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    assert!(all.iter().all(|other| bits(other) == bits(&all[0])), "ranks of a group agree");
    all.swap_remove(0)
}
