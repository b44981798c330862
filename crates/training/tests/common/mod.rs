//! Trains in process over any grid: replicas and stages one after the other, ranks of a group on threads of their own.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

#[path = "../../../model/tests/common/mod.rs"]
pub mod serving;

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::peft::PeftAdapter;
use ashlar_model::stage::{BatchLoss, MicroBatch, StageTape, StageTrainer, TargetRow};
use ashlar_model::trained::{trained_config, trained_slice};
use ashlar_model::{
    CollectiveError, ModelConfig, RankSlice, StageInput, StageModel, TensorId, Tensors, Trained,
};
use ashlar_training::checkpoint::{self, Position, Restore, Shard};
use ashlar_training::preference::{AnswerScore, answer_scores};
use ashlar_training::{
    Hyperparameters, NormTerms, Preference, RunTree, TrainingState, gradient_norm, settle,
};
use ashlar_vocabulary::{HeadSlice, JobId, LayerRange, PARTS, Precision, TokenId};
use serving::{ThreadGroup, bits};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};

/// What to learn: tokens, and which of them are targets of the token before.
#[derive(Debug, Clone)]
pub struct Sample {
    pub tokens: Vec<TokenId>,
    pub targets: Vec<bool>,
}

/// Two answers, the preferred one first.
pub type Pair = [Sample; 2];

/// A batch, cut between samples of supervised learning, or between pairs.
#[derive(Clone, Copy)]
enum Batch<'a> {
    Samples(&'a [Sample]),
    Pairs(&'a [Pair], Preference),
}

impl<'a> Batch<'a> {
    /// Samples, or pairs.
    fn len(self) -> usize {
        match self {
            Batch::Samples(samples) => samples.len(),
            Batch::Pairs(pairs, _) => pairs.len(),
        }
    }

    fn part(self, range: std::ops::Range<usize>) -> Batch<'a> {
        match self {
            Batch::Samples(samples) => Batch::Samples(&samples[range]),
            Batch::Pairs(pairs, preference) => Batch::Pairs(&pairs[range], preference),
        }
    }

    fn sequences(self) -> &'a [Sample] {
        match self {
            Batch::Samples(samples) => samples,
            Batch::Pairs(pairs, _) => pairs.as_flattened(),
        }
    }

    fn preference(self) -> Option<Preference> {
        match self {
            Batch::Samples(_) => None,
            Batch::Pairs(_, preference) => Some(preference),
        }
    }

    /// What its loss is a mean over: targets, or pairs.
    fn count(self) -> usize {
        match self {
            Batch::Samples(samples) => samples.iter().map(Sample::target_count).sum(),
            Batch::Pairs(pairs, _) => pairs.len(),
        }
    }
}

impl Sample {
    fn target_count(&self) -> usize {
        self.targets.iter().filter(|&&target| target).count()
    }
}

/// How the work is cut.
#[derive(Debug, Clone, Copy)]
pub struct Cut {
    pub stages: usize,
    pub ranks: usize,
    pub replicas: usize,
    /// Most samples, or pairs, of a micro-batch.
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
    kernels: Arc<Kernels>,
    trainer: StageTrainer,
    group: ThreadGroup,
    state: TrainingState,
    tree: RunTree,
    tape: Option<StageTape>,
}

/// A job on a grid.
pub struct Job {
    pub config: ModelConfig,
    trained: Trained,
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

/// What a rank starts from.
pub type Start<'a> = &'a dyn Fn(&ModelConfig, &RankSlice) -> Tensors;

/// Where a job's states claim to be from.
fn position(steps: u64) -> Position {
    Position { job: JobId(5), steps }
}

impl Job {
    pub fn new(
        directory: &Path,
        precision: impl Into<Precision>,
        cut: Cut,
        trained: &Trained,
        with: Hyperparameters,
        start: Start<'_>,
    ) -> Job {
        Job::with_states(directory, precision.into(), cut, trained, with, &|config, slice, kernels| {
            TrainingState::new(trained, start(config, slice), &config.shape, slice, kernels)
        })
    }

    /// A job that goes on from the shards of another one.
    pub fn resumed(
        directory: &Path,
        precision: impl Into<Precision>,
        cut: Cut,
        trained: &Trained,
        with: Hyperparameters,
        (steps, shards): (u64, &[Vec<u8>]),
    ) -> Job {
        Job::with_states(directory, precision.into(), cut, trained, with, &|config, slice, kernels| {
            let mut restore = Restore::new(trained, &config.shape, slice, position(steps));
            for bytes in shards {
                restore.take(&mut Shard::open(Cursor::new(bytes)).unwrap()).unwrap();
            }
            restore.state(&config.shape, slice, kernels).unwrap()
        })
    }

    fn with_states(
        directory: &Path,
        precision: Precision,
        cut: Cut,
        trained: &Trained,
        with: Hyperparameters,
        state: &dyn Fn(&ModelConfig, &RankSlice, &Kernels) -> TrainingState,
    ) -> Job {
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
            let state = state(&config, &slice, &kernels);
            let model = match trained {
                Trained::Adapter(_) => {
                    StageModel::load(directory, precision, slice.clone(), own.clone(), &mut |_, _| {})
                        .unwrap()
                }
                Trained::Model => {
                    let (config, slice) = (trained_config(&config), trained_slice(&slice));
                    StageModel::of_trained(config, slice, own.clone(), state.weights()).unwrap()
                }
            };
            Rank {
                state,
                tree: RunTree::new(trained.sums(&config.shape, &slice)),
                trainer: StageTrainer::new(Arc::new(model), own.clone(), ROWS_MAX),
                kernels: own,
                slice,
                group,
                tape: None,
            }
        };
        let stage = |stage| ThreadGroup::of(cut.ranks).into_iter().map(|group| rank(stage, group)).collect();
        let replicas = (0..cut.replicas).map(|_| (0..cut.stages).map(stage).collect()).collect();
        Job { config, trained: trained.clone(), cut, kernels, replicas, with }
    }

    /// One step over a global batch.
    pub fn step(&mut self, samples: &[Sample], learning_rate: f32) -> StepReport {
        self.step_of(Batch::Samples(samples), learning_rate)
    }

    /// One step over a global batch of pairs.
    pub fn step_of_pairs(&mut self, pairs: &[Pair], with: Preference, learning_rate: f32) -> StepReport {
        self.step_of(Batch::Pairs(pairs, with), learning_rate)
    }

    fn step_of(&mut self, batch: Batch<'_>, learning_rate: f32) -> StepReport {
        let mut loss = BatchLoss::default();
        for index in 0..self.replicas.len() {
            self.run_replica(index, batch, &mut loss);
        }
        let gradients = self.settled();
        let terms: Vec<Vec<NormTerms>> = self.replicas[0]
            .iter()
            .zip(&gradients)
            .map(|(ranks, gradients)| {
                let ranks = ranks.iter().zip(gradients);
                ranks.map(|(rank, own)| NormTerms::of(own, &rank.slice, &self.kernels)).collect()
            })
            .collect();
        let norm = gradient_norm(&terms);
        let shape = self.config.shape.clone();
        for replica in &mut self.replicas {
            for (ranks, gradients) in replica.iter_mut().zip(&gradients) {
                for (rank, gradient) in ranks.iter_mut().zip(gradients) {
                    let Rank { state, trainer, slice, .. } = rank;
                    state.step(gradient, norm, learning_rate, &self.with, &shape, slice, &self.kernels);
                    if self.trained == Trained::Model {
                        trainer.reload(state.weights()).unwrap();
                    }
                }
            }
        }
        StepReport { loss, norm }
    }

    /// Per stage and rank the gradients of all replicas together.
    fn settled(&mut self) -> Vec<Vec<Tensors>> {
        let (kernels, cut) = (self.kernels.clone(), self.cut);
        // The sum over replicas, which is the top of the tree.
        let mut sum = |stage: usize, rank: usize| {
            let shares: Vec<Tensors> =
                self.replicas.iter_mut().map(|replica| replica[stage][rank].tree.take()).collect();
            let mut sum = shares[0].clone();
            for (index, to) in sum.tensors_mut().enumerate() {
                let parts: Vec<&[f32]> =
                    shares.iter().map(|share| share.tensors().nth(index).unwrap()).collect();
                kernels.sum_tree(&parts, to);
            }
            sum
        };
        let sums: Vec<Vec<Tensors>> =
            (0..cut.stages).map(|stage| (0..cut.ranks).map(|rank| sum(stage, rank)).collect()).collect();
        let of_end = |stage: &Vec<Tensors>, id| -> Vec<Vec<f32>> {
            stage.iter().map(|sums| sums.get(id).unwrap_or_default().to_vec()).collect()
        };
        let tables = of_end(&sums[0], TensorId::Embedding);
        let heads = of_end(&sums[cut.stages - 1], TensorId::Head);
        let shape = &self.config.shape;
        let tied = self.trained == Trained::Model && shape.tied_head && cut.stages > 1;
        let of_stage = |ranks: &mut Vec<Rank>, sums: Vec<Tensors>| -> Vec<Tensors> {
            std::thread::scope(|scope| {
                let running: Vec<_> = ranks
                    .iter_mut()
                    .zip(sums)
                    .map(|(rank, sums)| {
                        let Rank { slice, kernels, group, .. } = rank;
                        let weights = self.trained.weights(shape, slice);
                        let (tables, heads) = (&tables, &heads);
                        scope.spawn(move || {
                            let mut other_end = |own: &mut [f32]| {
                                let other = if slice.first { heads } else { tables };
                                if slice.first || slice.last {
                                    own.copy_from_slice(&other[slice.tensor_rank]);
                                }
                                Ok::<_, CollectiveError>(())
                            };
                            let other_end = tied.then_some(&mut other_end as _);
                            settle(sums, &weights, kernels, group, other_end).unwrap()
                        })
                    })
                    .collect();
                running.into_iter().map(|handle| handle.join().unwrap()).collect()
            })
        };
        self.replicas[0].iter_mut().zip(sums).map(|(ranks, sums)| of_stage(ranks, sums)).collect()
    }

    fn run_replica(&mut self, index: usize, batch: Batch<'_>, loss: &mut BatchLoss) {
        let (count, each) = (batch.count(), PARTS / self.cut.replicas);
        for run in index * each..(index + 1) * each {
            let run = batch.part(run * batch.len() / PARTS..(run + 1) * batch.len() / PARTS);
            for start in (0..run.len()).step_by(self.cut.samples) {
                let micro = run.part(start..run.len().min(start + self.cut.samples));
                *loss = loss.and(micro_batch(&mut self.replicas[index], micro, count, self.cut.keep));
            }
            for rank in self.replicas[index].iter_mut().flatten() {
                rank.tree.end_run(&self.kernels);
            }
        }
    }

    /// The gradient for one batch on one replica, without a step.
    pub fn gradient(&mut self, samples: &[Sample]) -> (BatchLoss, Whole) {
        self.gradient_of(Batch::Samples(samples))
    }

    /// The same for a batch of pairs.
    pub fn gradient_of_pairs(&mut self, pairs: &[Pair], with: Preference) -> (BatchLoss, Whole) {
        self.gradient_of(Batch::Pairs(pairs, with))
    }

    fn gradient_of(&mut self, batch: Batch<'_>) -> (BatchLoss, Whole) {
        let mut loss = BatchLoss::default();
        self.run_replica(0, batch, &mut loss);
        let gradients = self.settled();
        (loss, join(gradients.iter().flatten()))
    }

    /// The weights as they are; every replica must hold the same.
    pub fn weights(&self) -> Whole {
        let of_replica =
            |replica: &Vec<Vec<Rank>>| join(replica.iter().flatten().map(|rank| rank.state.weights()));
        let joined: Vec<Whole> = self.replicas.iter().map(of_replica).collect();
        assert!(joined.iter().all(|other| other == &joined[0]), "replicas hold the same weights");
        joined.into_iter().next().unwrap()
    }

    /// The adapter as it is.
    pub fn adapter(&self) -> PeftAdapter {
        self.weights();
        let shares = self.replicas[0].iter().flatten().map(|rank| rank.state.weights());
        PeftAdapter::join(self.trained.adapter().unwrap(), &self.config.shape, shares)
    }

    /// The states of the first replica's ranks after so many steps.
    pub fn shards(&self, steps: u64) -> Vec<Vec<u8>> {
        let bytes = |rank: &Rank| {
            let mut bytes = Vec::new();
            let mut put = |piece: &[u8]| {
                bytes.extend_from_slice(piece);
                Ok::<_, Infallible>(())
            };
            checkpoint::write(&rank.state, position(steps), &mut put).unwrap();
            bytes
        };
        self.replicas[0].iter().flatten().map(bytes).collect()
    }
}

/// Whole tensors by name.
pub type Whole = BTreeMap<String, Vec<f32>>;

/// Puts shares together; where several ranks have a number, it must be the same bits.
pub fn join<'a>(shares: impl Iterator<Item = &'a Tensors>) -> Whole {
    let mut whole: BTreeMap<String, Vec<Option<f32>>> = BTreeMap::new();
    for (share, numbers) in shares.flat_map(Tensors::iter) {
        let [rows, width] = share.shape;
        let to = whole.entry(share.name.clone()).or_insert_with(|| vec![None; rows * width]);
        let places = share.rows.clone().flat_map(|row| share.columns.clone().map(move |c| row * width + c));
        for (place, &number) in places.zip(numbers) {
            let known = to[place].get_or_insert(number).to_bits();
            assert_eq!(known, number.to_bits(), "{} is the same wherever it is", share.name);
        }
    }
    let all = |(name, numbers): (String, Vec<Option<f32>>)| {
        (name, numbers.into_iter().map(|x| x.expect("every number is somewhere")).collect())
    };
    whole.into_iter().map(all).collect()
}

/// A micro-batch through all stages and back; of pairs, first through all stages without the adapter.
fn micro_batch(stages: &mut [Vec<Rank>], of: Batch<'_>, count: usize, keep: bool) -> BatchLoss {
    let (samples, preference) = (of.sequences(), of.preference());
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
    let reference = preference.map(|_| reference(stages, batch, tokens, targets)).unwrap_or_default();
    let mut activations: Vec<f32> = Vec::new();
    for ranks in stages.iter_mut() {
        let input = &activations[..];
        activations = on_all(ranks, &|rank| {
            let first = rank.slice.first;
            let input = if first { StageInput::Tokens(tokens) } else { StageInput::Activations(input) };
            let Rank { trainer, group, state, .. } = rank;
            let adapter = state.packed().map(|adapter| &**adapter);
            let tape = trainer.forward(batch, input, adapter, keep, group, &mut || Ok(())).unwrap();
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
                let Rank { trainer, group, tree, .. } = rank;
                let rows = batch.rows();
                let loss = match preference {
                    None => {
                        let (factor, sink) = (1.0 / count as f32, Some(tree.current()));
                        let (loss, own) = trainer.loss(targets, factor, rows, sink, group).unwrap();
                        gradient = own.to_vec();
                        loss
                    }
                    Some(preference) => {
                        let scored = trainer.score_with_gradient(targets, 1.0, rows, None, group);
                        let (scores, own) = scored.unwrap();
                        gradient = own.to_vec();
                        let policy = answer_scores(batch, targets, &scores);
                        preference.loss(batch, &policy, &reference, count as u64, &mut gradient)
                    }
                };
                losses.lock().unwrap().push(loss);
            }
            let Rank { trainer, group, state, tree, tape, .. } = rank;
            let (tape, adapter) = (tape.take().unwrap(), state.packed().map(|adapter| &**adapter));
            let sink = tree.current();
            trainer.backward(batch, tape, adapter, &mut gradient, sink, group, &mut || Ok(())).unwrap();
            gradient
        });
    }
    let losses = losses.into_inner().unwrap();
    assert!(losses.iter().all(|loss| loss == &losses[0]), "ranks agree on the loss");
    losses[0]
}

/// What the model without the adapter makes of a micro-batch's answers.
fn reference(
    stages: &mut [Vec<Rank>],
    batch: &MicroBatch,
    tokens: &[TokenId],
    targets: &[TargetRow],
) -> Vec<AnswerScore> {
    let mut activations: Vec<f32> = Vec::new();
    let seen = Mutex::new(Vec::new());
    for ranks in stages.iter_mut() {
        let input = &activations[..];
        activations = on_all(ranks, &|rank| {
            let Rank { trainer, group, slice, .. } = rank;
            let input = if slice.first { StageInput::Tokens(tokens) } else { StageInput::Activations(input) };
            trainer.forward_only(batch, input, None, group, &mut || Ok(())).unwrap();
            if slice.last {
                let scores = trainer.score(targets, group).unwrap();
                seen.lock().unwrap().push(answer_scores(batch, targets, &scores));
            }
            trainer.activations(batch.rows()).to_vec()
        });
    }
    let mut seen = seen.into_inner().unwrap();
    assert!(seen.iter().all(|scores| scores == &seen[0]), "ranks agree on the answers");
    seen.swap_remove(0)
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
