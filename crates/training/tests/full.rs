//! All weights of a model: gradients and losses against PyTorch, and the same bytes whatever the grid.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::Isa;
use ashlar_model::{ModelConfig, RankSlice, Tensors, Trained, WeightFiles};
use ashlar_training::{Hyperparameters, initial_model};
use ashlar_vocabulary::Quantization;
use common::serving::{goldens as models, relative_error};
use common::{Cut, Job, Sample, Whole};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};

const NONE: Option<Quantization> = None;

#[derive(Deserialize)]
struct Golden {
    samples: Vec<GoldenSample>,
    batches: Vec<Vec<usize>>,
    optimizer: Optimizer,
    losses: Vec<f64>,
    norms: Vec<f64>,
}

#[derive(Deserialize)]
struct GoldenSample {
    tokens: Vec<u32>,
    targets: Vec<u8>,
}

#[derive(Deserialize)]
struct Optimizer {
    learning_rate: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    weight_decay: f32,
    max_norm: f64,
}

/// Untied and tied, with and without biases and head norms, in f32 and f16.
const NAMES: [&str; 5] = ["llama", "llama-f16", "llama-bias", "qwen2", "qwen3"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(format!("full-{name}"))
}

fn golden(name: &str) -> (Golden, Vec<Sample>) {
    let golden: Golden =
        serde_json::from_slice(&fs::read(folder(name).join("golden.json")).unwrap()).unwrap();
    let sample = |s: &GoldenSample| Sample {
        tokens: s.tokens.clone(),
        targets: s.targets.iter().map(|&target| target == 1).collect(),
    };
    let samples = golden.samples.iter().map(sample).collect();
    (golden, samples)
}

/// The weights that a model's files have.
fn stored(name: &str) -> impl Fn(&ModelConfig, &RankSlice) -> Tensors {
    let files = WeightFiles::open(&models().join(name)).unwrap();
    move |config, slice| Tensors::read(&Trained::Model.weights(&config.shape, slice), &files).unwrap()
}

fn job(name: &str, cut: Cut, with: Hyperparameters) -> Job {
    Job::new(&models().join(name), NONE, cut, &Trained::Model, with, &stored(name))
}

#[test]
fn gradients_of_all_weights_are_those_of_double_precision() {
    for name in NAMES {
        let (_, samples) = golden(name);
        let bytes = fs::read(folder(name).join("gradient.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        for cut in [Cut::default(), Cut { stages: 2, ranks: 2, samples: 4, keep: false, ..Cut::default() }] {
            let (_, found) = job(name, cut, Hyperparameters::default()).gradient(&samples);
            assert_eq!(found.len(), expected.len(), "{name}: every weight has a gradient");
            let mut worst = (0f32, String::new());
            let largest = |x: &[f32]| x.iter().fold(0f32, |max, x| max.max(x.abs()));
            for (tensor, expected) in expected.iter() {
                let expected: Vec<f32> = expected
                    .data()
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                // A bias of keys changes no softmax: what it has is what rounding leaves of the gradient of queries' bias.
                let error = if tensor.ends_with("k_proj.bias") {
                    let scale = largest(&found[&tensor.replace("k_proj", "q_proj")]);
                    let apart = found[tensor].iter().zip(&expected).map(|(a, b)| (a - b).abs());
                    apart.fold(0f32, f32::max) / scale
                } else {
                    relative_error(&found[tensor], &expected)
                };
                if error > worst.0 {
                    worst = (error, tensor.to_owned());
                }
            }
            eprintln!("{name}: gradients differ by {:.1e} of a tensor's largest, in {}", worst.0, worst.1);
            assert!(worst.0 <= 1e-5, "{name}, {}: {}", worst.1, worst.0);
        }
    }
}

#[test]
fn forty_steps_lose_what_pytorch_loses() {
    for name in NAMES {
        let (golden, samples) = golden(name);
        let o = &golden.optimizer;
        let with = Hyperparameters {
            beta1: o.beta1,
            beta2: o.beta2,
            epsilon: o.epsilon,
            weight_decay: o.weight_decay,
            norm_max: Some(o.max_norm),
        };
        let mut job = job(name, Cut { stages: 2, ranks: 2, samples: 3, ..Cut::default() }, with);
        for (step, batch) in golden.batches.iter().enumerate() {
            let batch: Vec<Sample> = batch.iter().map(|&index| samples[index].clone()).collect();
            let report = job.step(&batch, o.learning_rate);
            let (loss, norm) = (report.loss.mean(), golden.norms[step]);
            let expected = golden.losses[step];
            assert!((loss - expected).abs() <= 1e-4, "{name}, step {step}: {loss} {expected}");
            let apart = (report.norm - norm).abs();
            assert!(apart <= 1e-3 * norm, "{name}, step {step}: norm {} {norm}", report.norm);
        }
    }
}

/// Ragged samples.
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

const WITH: Hyperparameters =
    Hyperparameters { beta1: 0.9, beta2: 0.98, epsilon: 1e-8, weight_decay: 0.01, norm_max: Some(0.4) };
/// Fewer samples than runs, as many, and more.
const BATCHES: [usize; 3] = [3, 8, 13];

/// Random weights of a model's shape.
fn random(config: &ModelConfig, slice: &RankSlice) -> Tensors {
    initial_model(&Trained::Model.weights(&config.shape, slice), config.shape.num_layers, 11)
}

fn train(name: &str, cut: Cut) -> (Whole, Vec<(i64, u64)>) {
    let mut job = Job::new(&models().join(name), NONE, cut, &Trained::Model, WITH, &random);
    let reports = BATCHES.map(|count| job.step(&samples(count), 1e-2));
    (job.weights(), reports.map(|report| (report.loss.loss.0, report.norm.to_bits())).to_vec())
}

fn assert_same(name: &str, cuts: &[Cut]) {
    let (weights, reports) = train(name, Cut::default());
    for &cut in cuts {
        let (found, own) = train(name, cut);
        assert_eq!(own, reports, "{name}: losses and norms of {cut:?}");
        for (tensor, numbers) in &weights {
            assert!(&found[tensor] == numbers, "{name}: {tensor} of {cut:?}");
        }
    }
}

#[test]
fn every_grid_trains_the_same_weights() {
    for name in NAMES {
        let shape = ModelConfig::from_dir(&models().join(name)).unwrap().shape;
        let mut cuts = Vec::new();
        for (stages, ranks, replicas, samples) in
            [(1, 1, 1, 4), (2, 1, 1, 1), (1, 2, 1, 2), (2, 2, 2, 1), (1, 4, 1, 13), (2, 1, 8, 1)]
        {
            if shape.num_kv_heads.is_multiple_of(ranks) {
                cuts.push(Cut { stages, ranks, replicas, samples, ..Cut::default() });
            }
        }
        assert_same(name, &cuts);
    }
}

#[test]
fn stages_between_the_ends_of_a_tied_model_change_nothing() {
    // The shape of qwen3 with four layers.
    let directory = tempfile::tempdir().unwrap();
    let config = fs::read_to_string(models().join("qwen3/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["num_hidden_layers"] = 4.into();
    config["layer_types"] = vec!["full_attention"; 4].into();
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    let train = |cut: Cut| {
        let mut job = Job::new(directory.path(), NONE, cut, &Trained::Model, WITH, &random);
        BATCHES.iter().for_each(|&count| _ = job.step(&samples(count), 1e-2));
        job.weights()
    };
    let expected = train(Cut::default());
    assert!(train(Cut { stages: 4, ranks: 2, samples: 2, ..Cut::default() }) == expected);
    assert!(train(Cut { stages: 4, replicas: 2, samples: 3, ..Cut::default() }) == expected);
}

#[test]
fn activations_kept_or_computed_again_threads_and_instruction_sets_change_nothing() {
    let mut cuts = vec![
        Cut { keep: false, stages: 2, ranks: 2, ..Cut::default() },
        Cut { threads: 3, samples: 5, ..Cut::default() },
    ];
    cuts.extend(Isa::available().into_iter().map(|isa| Cut { isa, ..Cut::default() }));
    for name in ["llama-bias", "qwen3"] {
        assert_same(name, &cuts);
    }
}

#[test]
fn a_job_that_goes_on_from_its_shards_on_another_grid_trains_the_same_weights() {
    for name in ["llama-bias", "qwen3"] {
        let directory = models().join(name);
        let mut untouched = Job::new(&directory, NONE, Cut::default(), &Trained::Model, WITH, &random);
        BATCHES.iter().for_each(|&count| _ = untouched.step(&samples(count), 1e-2));
        let cuts = [(2, 2, 1), (1, 4, 1), (1, 1, 2)];
        let cuts = cuts.map(|(stages, ranks, replicas)| Cut { stages, ranks, replicas, ..Cut::default() });
        let mut job = Job::new(&directory, NONE, cuts[0], &Trained::Model, WITH, &random);
        job.step(&samples(BATCHES[0]), 1e-2);
        for step in 1..BATCHES.len() {
            let from = (step as u64, &job.shards(step as u64)[..]);
            job = Job::resumed(&directory, NONE, cuts[step], &Trained::Model, WITH, from);
            job.step(&samples(BATCHES[step]), 1e-2);
        }
        assert!(job.weights() == untouched.weights(), "{name}");
    }
}

#[test]
fn random_weights_are_normal_and_depend_on_their_place_alone() {
    let config = ModelConfig::from_dir(&models().join("llama-bias")).unwrap();
    let whole = RankSlice::whole(&config.shape);
    let weights = random(&config, &whole);
    let mut seen: Vec<f32> = Vec::new();
    for (share, numbers) in weights.iter() {
        if share.name.ends_with("norm.weight") {
            assert!(numbers.iter().all(|&x| x == 1.0), "{}", share.name);
        } else if share.is_vector {
            assert!(numbers.iter().all(|&x| x == 0.0), "{}", share.name);
        } else {
            let back = share.name.contains("o_proj") || share.name.contains("down_proj");
            let expected = if back { 0.01 } else { 0.02 };
            let count = numbers.len() as f64;
            let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
            let square = numbers.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / count;
            let apart = (square.sqrt() - expected).abs();
            assert!(mean.abs() < 0.05 * expected && apart < 0.05 * expected, "{}", share.name);
            // As many beyond two deviations as a normal distribution has: 4.6 %.
            let far = numbers.iter().filter(|&&x| f64::from(x).abs() > 2.0 * expected).count() as f64;
            assert!((0.03..0.06).contains(&(far / count)), "{}: {}", share.name, far / count);
            assert!(!seen.contains(&numbers[0]), "{} begins like another", share.name);
            seen.push(numbers[0]);
        }
    }
}
