//! One adapter, whatever the grid: the same bytes over stages, ranks, replicas, micro-batches, threads, instruction sets, with
//! activations kept or computed again.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::Isa;
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::stage::{BatchLoss, ExactSum};
use ashlar_model::{ModelConfig, Trained};
use ashlar_training::{Hyperparameters, Preference, initial_adapter};
use ashlar_vocabulary::{FloatType, Precision, Quantization, WeightType};
use common::serving::goldens;
use common::{Cut, Job, Pair, Sample};

fn spec() -> LoraSpec {
    LoraSpec { rank: 3, alpha: 6.0, rank_stabilized: false, targets: Target::ALL.to_vec() }
}

/// Ragged samples; the last ones have runs of their own only in large batches.
fn samples(count: usize) -> Vec<Sample> {
    let sample = |index: usize| {
        let length = 2 + (index * 7) % 23;
        Sample {
            tokens: (0..length).map(|i| ((i * 31 + index * 17 + 5) % 97) as u32).collect(),
            targets: (0..length)
                .map(|i| i > 0 && !(i + index).is_multiple_of(3) || i + 1 == length)
                .collect(),
        }
    };
    (0..count).map(sample).collect()
}

/// Two answers of their own lengths to one prompt.
fn pairs(count: usize) -> Vec<Pair> {
    let answer = |index: usize, which: usize| {
        let (prompt, length) = (1 + index % 5, 1 + (index * 7 + which * 4) % 19);
        let token = |i: usize| if i < prompt { i * 13 + index } else { i * 31 + index * 17 + which * 29 + 5 };
        Sample {
            tokens: (0..prompt + length).map(|i| (token(i) % 97) as u32).collect(),
            targets: (0..prompt + length).map(|i| i >= prompt).collect(),
        }
    };
    (0..count).map(|index| [answer(index, 0), answer(index, 1)]).collect()
}

/// The adapter at the end, and losses and norms on the way.
type Course = (Vec<u8>, Vec<(BatchLoss, u64)>);

fn job(name: &str, precision: Precision, cut: Cut) -> Job {
    let directory = goldens().join(name);
    let with = Hyperparameters { weight_decay: 0.01, norm_max: Some(0.4), ..Hyperparameters::default() };
    Job::new(&directory, precision, cut, &Trained::Adapter(spec()), with, &|config, slice| {
        initial_adapter(&spec(), &config.shape, slice, 11).tensors
    })
}

fn train(name: &str, precision: Precision, cut: Cut) -> Course {
    let mut job = job(name, precision, cut);
    // Fewer samples than runs, as many, and more.
    let reports = [3, 8, 13].map(|count| job.step(&samples(count), 1e-2));
    let reports = reports.map(|report| (report.loss, report.norm.to_bits()));
    (job.adapter().files("base").unwrap().1, reports.to_vec())
}

fn prefer(name: &str, precision: Precision, cut: Cut) -> Course {
    let mut job = job(name, precision, cut);
    let with = Preference::new(0.4).unwrap();
    let reports = [3, 8, 13].map(|count| job.step_of_pairs(&pairs(count), with, 1e-2));
    let reports = reports.map(|report| (report.loss, report.norm.to_bits()));
    (job.adapter().files("base").unwrap().1, reports.to_vec())
}

fn assert_same(name: &str, precision: Precision, cuts: &[Cut]) {
    assert_same_by(train, name, precision, cuts);
}

fn assert_same_by(train: fn(&str, Precision, Cut) -> Course, name: &str, precision: Precision, cuts: &[Cut]) {
    let expected = train(name, precision, Cut::default());
    for &cut in cuts {
        let found = train(name, precision, cut);
        assert_eq!(found.1, expected.1, "{name}: losses and norms of {cut:?}");
        assert!(found.0 == expected.0, "{name}: the adapter of {cut:?}");
    }
}

#[test]
fn every_grid_trains_the_same_adapter() {
    for name in ["llama", "qwen2", "qwen3", "mistral"] {
        let shape = ModelConfig::from_dir(&goldens().join(name)).unwrap().shape;
        let mut cuts = Vec::new();
        for (stages, ranks, replicas, samples) in [
            (1, 1, 1, 4),
            (2, 1, 1, 1),
            (1, 2, 1, 2),
            (2, 2, 2, 1),
            (1, 4, 1, 13),
            (1, 1, 4, 2),
            (2, 1, 8, 1),
        ] {
            if shape.num_kv_heads.is_multiple_of(ranks) && stages <= shape.num_layers {
                cuts.push(Cut { stages, ranks, replicas, samples, ..Cut::default() });
            }
        }
        assert_same(name, None::<Quantization>.into(), &cuts);
    }
}

#[test]
fn activations_kept_or_computed_again_threads_and_instruction_sets_change_nothing() {
    let mut cuts = vec![
        Cut { keep: false, ..Cut::default() },
        Cut { keep: false, stages: 2, ranks: 2, ..Cut::default() },
        Cut { threads: 3, samples: 5, ..Cut::default() },
    ];
    cuts.extend(Isa::available().into_iter().map(|isa| Cut { isa, ..Cut::default() }));
    for name in ["llama", "qwen3"] {
        assert_same(name, None::<Quantization>.into(), &cuts);
    }
}

#[test]
fn quantised_and_narrow_bases_train_the_same_adapter_on_every_grid() {
    let cuts = [
        Cut { stages: 2, ranks: 2, samples: 2, ..Cut::default() },
        Cut { ranks: 4, keep: false, ..Cut::default() },
        Cut { isa: Isa::Portable, ..Cut::default() },
    ];
    let kinds = [WeightType::Q8_0, WeightType::Q4_0, WeightType::Q4K, WeightType::Bf16];
    for kind in kinds {
        let mut precision = Precision::from(Some(Quantization::Type(kind)));
        precision.kv_cache = FloatType::Bf16;
        assert_same("llama", precision, &cuts);
    }
}

#[test]
fn preferences_train_the_same_adapter_on_every_grid() {
    let mut cuts = Vec::new();
    for stages in [1, 2] {
        for ranks in [1, 2] {
            for replicas in [1, 2] {
                let (samples, keep) = (stages + 2 * ranks - replicas, ranks == replicas);
                cuts.push(Cut { stages, ranks, replicas, samples, keep, ..Cut::default() });
            }
        }
    }
    cuts.extend([
        Cut { samples: 13, threads: 3, ..Cut::default() },
        Cut { replicas: 8, keep: false, ..Cut::default() },
    ]);
    cuts.extend(Isa::available().into_iter().map(|isa| Cut { isa, samples: 2, ..Cut::default() }));
    for name in ["llama", "qwen2"] {
        assert_same_by(prefer, name, None::<Quantization>.into(), &cuts);
    }
    let narrow = Precision::from(Some(Quantization::Type(WeightType::Q8_0)));
    assert_same_by(prefer, "llama", narrow, &[Cut { stages: 2, ranks: 2, keep: false, ..Cut::default() }]);
}

#[test]
fn a_first_step_loses_ln_2_and_moves_and_later_ones_prefer() {
    for cut in [Cut::default(), Cut { stages: 2, ranks: 2, samples: 3, keep: false, ..Cut::default() }] {
        let (mut job, with) = (job("llama", None::<Quantization>.into(), cut), Preference::new(0.4).unwrap());
        let mut ln_2 = ExactSum::default();
        ln_2.add(ashlar_kernels::math::log(2.0));
        let first = job.step_of_pairs(&pairs(8), with, 1e-2);
        assert_eq!(first.loss.loss, ExactSum(8 * ln_2.0), "an adapter that changes nothing has no margin");
        assert_eq!((first.loss.correct, first.loss.judged, first.loss.weight.value()), (0, 8, 8.0));
        assert_eq!(first.loss.rewards, [ExactSum(0); 2]);
        assert!(first.norm > 1e-3, "{}", first.norm);
        let later = [(); 8].map(|()| job.step_of_pairs(&pairs(8), with, 1e-2).loss);
        let last = later[7];
        assert!(last.mean() < 0.3 && last.correct == 8, "{later:?}");
        assert!(last.rewards[0].value() > last.rewards[1].value());
    }
}
