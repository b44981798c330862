//! What the ledger's formula says that a session takes, against what its parts really have in memory once micro-batches of the
//! largest size have gone through: never below, and hardly above.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_kernels::{Isa, Kernels};
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::stage::{MicroBatch, StageTrainer, TargetRow};
use ashlar_model::trained::{trained_config, trained_slice};
use ashlar_model::{
    Collective, CollectiveError, RankSlice, StageInput, StageModel, Tensors, Trained, WeightFiles,
};
use ashlar_shard_node::training::memory::{SessionSize, session_memory};
use ashlar_training::{RunTree, TrainingState, initial_adapter};
use ashlar_vocabulary::{FloatType, HeadSlice, LayerRange, PARTS, Precision};
use std::path::PathBuf;
use std::sync::Arc;

const LAYERS: usize = 2;

/// A rank whose peers say what it says: their numbers do not matter to memory.
struct Echo {
    rank: usize,
    size: usize,
}

impl Collective for Echo {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        all.chunks_mut(own.len().max(1)).for_each(|part| part.copy_from_slice(own));
        Ok(())
    }

    fn gather(&mut self, _own: &[f32], _lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        all.fill(0.0);
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
struct Place {
    stage: usize,
    stages: usize,
    rank: usize,
    ranks: usize,
    spread_head: bool,
}

impl Place {
    fn slice(self) -> RankSlice {
        let Place { stage, stages, rank, ranks, spread_head } = self;
        RankSlice {
            layers: LayerRange { start: stage * LAYERS / stages, end: (stage + 1) * LAYERS / stages },
            first: stage == 0,
            last: stage + 1 == stages,
            tensor_rank: rank,
            tensor_parallel_size: ranks,
            head: HeadSlice::of_rank(spread_head, (stage, stages), (rank, ranks)),
        }
    }
}

/// Every place of some layouts.
fn places() -> Vec<Place> {
    let layout = |stages: usize, ranks: usize, spread_head: bool| {
        (0..stages).flat_map(move |stage| {
            (0..ranks).map(move |rank| Place { stage, stages, rank, ranks, spread_head })
        })
    };
    [(1, 1, false), (2, 1, false), (2, 1, true), (1, 2, false), (2, 2, true)]
        .into_iter()
        .flat_map(|(stages, ranks, spread)| layout(stages, ranks, spread))
        .collect()
}

#[derive(Debug, Clone, Copy)]
struct Batch<'a> {
    /// Sequences of the largest micro-batch.
    lengths: &'a [usize],
    keep: bool,
    /// Whether they are pairs of answers, which go through the model without the adapter first.
    pairs: bool,
    /// The share of its inputs that an adapter does not see.
    dropout: f32,
}

/// Runs what a step runs, and compares.
#[track_caller]
fn check(name: &str, precision: Precision, place: Place, trained: &Trained, with: Batch<'_>) {
    let directory =
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../crates/model/tests/goldens").join(name);
    let (slice, kernels) = (place.slice(), Arc::new(Kernels::new(Isa::best(), 2)));
    let own = Arc::new(Kernels::new(Isa::best(), 1));
    let model = StageModel::load(&directory, precision, slice.clone(), own, &mut |_, _| {}).unwrap();
    let (model, shape) = (Arc::new(model), &trained_config_or(trained, &directory, precision));
    let weights = match trained {
        Trained::Adapter(spec) => initial_adapter(spec, shape, &slice, 7).tensors,
        Trained::Model => {
            let files = WeightFiles::open(&directory).unwrap();
            Tensors::read(&trained.weights(shape, &slice), &files).unwrap()
        }
    };
    let state = TrainingState::new(trained, weights, shape, &slice, &kernels);
    let copy = match trained {
        Trained::Adapter(_) => None,
        Trained::Model => {
            let (config, slice) = (trained_config(model.config()), trained_slice(&slice));
            Some(StageModel::of_trained(config, slice, kernels.clone(), state.weights()).unwrap())
        }
    };
    let copied = copy.as_ref().map_or(0, |copy| copy.bytes().0 as usize);
    let rows: usize = with.lengths.iter().sum();
    let of_trainer = copy.map_or(model.clone(), Arc::new);
    let trainer_slice = of_trainer.slice().clone();
    let mut trainer = StageTrainer::new(of_trainer, kernels.clone(), rows);
    let spread = slice.head.is_some_and(|head| head.of != slice.tensor_parallel_size);
    if slice.last && spread && trained.adapter().is_some() {
        trainer = trainer.with_head(model.load_stage_head(&directory, &kernels).unwrap());
    }
    let mut tree = RunTree::new(trained.sums(shape, &slice));
    let (stages_behind, mut group) =
        (place.stages - place.stage - 1, Echo { rank: place.rank, size: place.ranks });
    // A smaller micro-batch first: what grows does so to what is needed, and no further.
    let smaller: Vec<usize> = with.lengths.iter().map(|length| length.div_ceil(2)).collect();
    for lengths in [&smaller[..], with.lengths] {
        let keys: Vec<[u32; 2]> = (0..lengths.len() as u32).map(|index| [index, 7]).collect();
        let batch = MicroBatch::new(lengths).with_dropout(with.dropout, &keys);
        let (rows, beat) = (batch.rows(), &mut || Ok(()));
        let tokens: Vec<u32> = (0..rows as u32).map(|row| row * 7 % shape.vocab_size as u32).collect();
        let values: Vec<f32> =
            (0..rows * shape.hidden_size).map(|i| ((i * 37) % 101) as f32 / 64.0 - 0.8).collect();
        let input = || match slice.first {
            true => StageInput::Tokens(&tokens),
            false => StageInput::Activations(&values),
        };
        let targets: Vec<TargetRow> =
            (0..rows).map(|row| TargetRow { row, token: tokens[row], weight: 1.0 }).collect();
        let adapter = state.packed().map(|adapter| &**adapter);
        if with.pairs {
            trainer.forward_only(&batch, input(), None, &mut group, beat).unwrap();
            if slice.last {
                trainer.score(&targets, &mut group).unwrap();
            }
        }
        let mut tapes = Vec::new();
        for _ in 0..=stages_behind {
            tapes.push(trainer.forward(&batch, input(), adapter, with.keep, &mut group, beat).unwrap());
        }
        for tape in tapes {
            let mut gradient = values.clone();
            if slice.last {
                let sink = if with.pairs { None } else { Some(tree.current()) };
                let scored = trainer.score_with_gradient(&targets, 1e-3, rows, sink, &mut group).unwrap();
                gradient.copy_from_slice(scored.1);
            }
            let sink = tree.current();
            trainer.backward(&batch, tape, adapter, &mut gradient, sink, &mut group, beat).unwrap();
        }
    }
    // A batch of which every run has samples.
    for _ in 0..PARTS {
        tree.current();
        tree.end_run(&kernels);
    }
    let gradient = tree.take();
    tree.recycle(gradient);
    if let Trained::Model = trained {
        trainer.reload(state.weights()).unwrap();
    }
    let memory = session_memory(&SessionSize {
        shape,
        slice: &trainer_slice,
        trained,
        rows,
        keep: with.keep,
        stages_behind,
        threads: kernels.threads(),
        replicas: 1,
        dropout: with.dropout > 0.0,
    });
    // What threads work in is by far the most of so small a session, and the same on both sides.
    let threads = kernels.gradient_bytes() + kernels.attention_gradient_bytes(rows, shape.head_dim);
    let learning = state.bytes() + tree.bytes() + copied;
    let held = learning + trainer.held_bytes().0 as usize - threads;
    let planned = memory.weights + memory.tapes + memory.buffers + memory.head;
    let planned = planned.0 as usize - threads;
    let case = format!("{name}, {place:?}, {trained:?}, {with:?}: {memory:?}, {learning} learn");
    assert_eq!(memory.weights.0 as usize, learning, "{case}");
    assert!(planned >= held, "{planned} planned, {held} held; {case}");
    assert!(planned * 100 <= held * 102, "{planned} planned, {held} held; {case}");
    // For a moment, what is packed anew is there twice.
    let packed = state.packed().map_or(0, |adapter| adapter.bytes().0);
    assert!(memory.passing.0 >= packed, "{case}");
}

/// The shape by which a session counts: a private copy's numbers are f32.
fn trained_config_or(
    trained: &Trained,
    directory: &std::path::Path,
    precision: Precision,
) -> ashlar_vocabulary::ModelShape {
    let config = ashlar_model::ModelConfig::open(directory, precision).unwrap();
    match trained {
        Trained::Adapter(_) => config.shape,
        Trained::Model => trained_config(&config).shape,
    }
}

fn adapter(rank: usize, targets: &[Target]) -> Trained {
    Trained::Adapter(LoraSpec { rank, alpha: 8.0, rank_stabilized: false, targets: targets.to_vec() })
}

#[test]
fn adapters_take_what_the_formula_says_on_every_shape_and_place() {
    let ways = [
        (adapter(1, &[Target::Query]), Batch { lengths: &[24], keep: true, pairs: false, dropout: 0.0 }),
        (adapter(8, &Target::ALL), Batch { lengths: &[40, 3, 30], keep: false, pairs: false, dropout: 0.0 }),
        (
            adapter(20, &[Target::Query, Target::Value, Target::Down]),
            Batch { lengths: &[100], keep: true, pairs: false, dropout: 0.0 },
        ),
        // More rows than any dimension: what the lower rank has of them is the longer side.
        (
            adapter(96, &[Target::Gate, Target::Output]),
            Batch { lengths: &[33], keep: false, pairs: false, dropout: 0.0 },
        ),
        (
            adapter(4, &[Target::Up, Target::Key]),
            Batch { lengths: &[30, 25], keep: true, pairs: true, dropout: 0.25 },
        ),
    ];
    for name in ["llama-bf16", "llama-bias", "qwen2", "qwen3", "mistral"] {
        for place in places() {
            for (trained, with) in &ways {
                check(name, Precision::default(), place, trained, *with);
            }
        }
    }
}

#[test]
fn so_they_do_beside_quantised_weights_and_narrow_caches() {
    let precision = Precision {
        quantization: Some("q8_0".parse().unwrap()),
        kv_cache: FloatType::Bf16,
        activations: FloatType::Bf16,
    };
    let with = Batch { lengths: &[70, 9], keep: true, pairs: false, dropout: 0.0 };
    for place in places() {
        check("llama-bias", precision, place, &adapter(8, &Target::ALL), with);
        check(
            "llama-bf16",
            Precision { quantization: None, ..precision },
            place,
            &adapter(2, &[Target::Up]),
            with,
        );
    }
}

#[test]
fn whole_models_take_what_the_formula_says_on_every_shape_and_place() {
    for name in ["llama-bf16", "llama-bias", "qwen2", "qwen3", "mistral"] {
        for place in places() {
            for keep in [true, false] {
                let with = Batch { lengths: &[40, 17], keep, pairs: false, dropout: 0.0 };
                check(name, Precision::default(), place, &Trained::Model, with);
            }
        }
    }
}
