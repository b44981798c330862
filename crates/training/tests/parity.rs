//! Against PyTorch and PEFT: the same losses, norms, weights and logits over 120 steps.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_kernels::{BLOCK_TOKENS, Isa, Kernels, RowContext};
use ashlar_model::adapter::{AdaptedRows, Adapter, LoraPair, Target};
use ashlar_model::peft::PeftAdapter;
use ashlar_model::{ModelConfig, NoHeadRanks, RankSlice, SingleRank, StageInput, StageModel, Trained};
use ashlar_training::{Hyperparameters, Preference};
use ashlar_vocabulary::{BlockId, Quantization};
use common::serving::{goldens as models, relative_error};
use common::{Cut, Job, Pair, Sample, Whole};
use serde::Deserialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Deserialize)]
struct Golden {
    samples: Vec<GoldenSample>,
    batches: Vec<Vec<usize>>,
    optimizer: Optimizer,
    losses: Vec<f64>,
    norms: Vec<f64>,
    prompt: Vec<u32>,
    logits: String,
}

#[derive(Deserialize)]
struct Preferences {
    pairs: Vec<[GoldenSample; 2]>,
    batches: Vec<Vec<usize>>,
    beta: f64,
    optimizer: Optimizer,
    losses: Vec<f64>,
    norms: Vec<f64>,
    accuracies: Vec<f64>,
    preferred: Vec<f64>,
    others: Vec<f64>,
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

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn adapter(name: &str, which: &str) -> PeftAdapter {
    let shape = ModelConfig::from_dir(&models().join(name)).unwrap().shape;
    let config = fs::read(folder(name).join("adapter_config.json")).unwrap();
    let tensors = fs::read(folder(name).join(which)).unwrap();
    PeftAdapter::parse(&config, &tensors, &shape).unwrap()
}

fn numbers(base64: &str) -> Vec<f32> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let mut bytes = Vec::new();
    for four in base64.trim_end_matches('=').as_bytes().chunks(4) {
        let bits = four.iter().fold(0u32, |bits, &byte| bits << 6 | u32::from(digit(byte)));
        let bits = bits << (6 * (4 - four.len()));
        bytes.extend(&bits.to_be_bytes()[1..four.len()]);
    }
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// Logits of every position of a prompt with an adapter, as serving computes them.
fn logits(name: &str, adapter: &PeftAdapter, prompt: &[u32]) -> Vec<f32> {
    let directory = models().join(name);
    let shape = ModelConfig::from_dir(&directory).unwrap().shape;
    let slice = RankSlice::whole(&shape);
    let kernels = Arc::new(Kernels::new(Isa::best(), 2));
    let none = None::<Quantization>;
    let model = StageModel::load(&directory, none, slice.clone(), kernels.clone(), &mut |_, _| {}).unwrap();
    let adapter = Adapter::pack(&adapter.cut(&shape, &slice), &shape, &slice, &kernels);
    let table: Vec<BlockId> = (0..prompt.len().div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
    let rows: Vec<_> =
        (0..prompt.len() as u32).map(|position| RowContext { position, block_table: &table }).collect();
    let (mut cache, mut work) = (model.kv_cache(table.len()), model.workspace(prompt.len()));
    // In two runs of rows: that changes nothing.
    let adapted = [0..5, 5..prompt.len()].map(|rows| AdaptedRows { rows, adapter: &adapter });
    let input = StageInput::Tokens(prompt);
    let group = &mut SingleRank;
    model.forward_adapted(&rows, input, &adapted, &mut cache, group, &mut work, &mut || {}).unwrap();
    let rows: Vec<usize> = (0..prompt.len()).collect();
    model.logits(&rows, group, &mut NoHeadRanks, &mut work).unwrap().unwrap().to_vec()
}

fn golden(name: &str) -> Golden {
    serde_json::from_slice(&fs::read(folder(name).join("golden.json")).unwrap()).unwrap()
}

impl Golden {
    fn samples(&self) -> Vec<Sample> {
        self.samples.iter().map(GoldenSample::sample).collect()
    }
}

impl GoldenSample {
    fn sample(&self) -> Sample {
        let targets = self.targets.iter().map(|&target| target == 1).collect();
        Sample { tokens: self.tokens.clone(), targets }
    }
}

impl Optimizer {
    fn hyperparameters(&self) -> Hyperparameters {
        let &Optimizer { beta1, beta2, epsilon, weight_decay, max_norm, .. } = self;
        Hyperparameters { beta1, beta2, epsilon, weight_decay, norm_max: Some(max_norm) }
    }
}

fn preferences(name: &str) -> (Preferences, Vec<Pair>) {
    let bytes = fs::read(folder(name).join("preferences.json")).unwrap();
    let golden: Preferences = serde_json::from_slice(&bytes).unwrap();
    let pairs = golden.pairs.iter().map(|pair| [pair[0].sample(), pair[1].sample()]).collect();
    (golden, pairs)
}

fn check(name: &str) {
    let golden = golden(name);
    let (o, with) = (&golden.optimizer, golden.optimizer.hyperparameters());
    let samples = golden.samples();
    let start = adapter(name, "initial.safetensors");
    let cut = Cut { stages: 2, ranks: 2, samples: 3, ..Cut::default() };
    let directory = models().join(name);
    let trained = Trained::Adapter(start.spec.clone());
    let mut job = Job::new(&directory, None::<Quantization>, cut, &trained, with, &|config, slice| {
        start.cut(&config.shape, slice).tensors
    });
    for (step, batch) in golden.batches.iter().enumerate() {
        let batch: Vec<Sample> = batch.iter().map(|&index| samples[index].clone()).collect();
        let report = job.step(&batch, o.learning_rate);
        let loss = report.loss.mean();
        assert!(
            (loss - golden.losses[step]).abs() <= 1e-4,
            "{name}, step {step}: {loss} {}",
            golden.losses[step]
        );
        let norm = golden.norms[step];
        assert!(
            (report.norm - norm).abs() <= 1e-3 * norm,
            "{name}, step {step}: norm {} {norm}",
            report.norm
        );
    }
    let last = adapter(name, "final.safetensors");
    let expected = numbers(&golden.logits);
    // Theirs loaded here, and ours.
    let theirs = relative_error(&logits(name, &last, &golden.prompt), &expected);
    let own = job.adapter();
    let (config, tensors) = own.files(name).unwrap();
    let shape = &job.config.shape;
    let own = PeftAdapter::parse(&config, &tensors, shape).unwrap();
    let ours = relative_error(&logits(name, &own, &golden.prompt), &expected);
    eprintln!("{name}: logits differ by {theirs:.1e} with PEFT's adapter, {ours:.1e} with ours");
    assert!(theirs <= 1e-4, "{name}: {theirs} with PEFT's adapter");
    assert!(ours <= 1e-3, "{name}: {ours} with ours");
}

#[test]
fn gradients_are_those_of_double_precision() {
    for name in ["llama", "qwen2", "qwen3", "mistral"] {
        let golden = golden(name);
        let (point, expected) = (adapter(name, "point.safetensors"), adapter(name, "gradient.safetensors"));
        for cut in [Cut::default(), Cut { stages: 2, ranks: 2, samples: 4, keep: false, ..Cut::default() }] {
            let directory = models().join(name);
            let with = Hyperparameters::default();
            let start = |config: &ModelConfig, slice: &RankSlice| point.cut(&config.shape, slice).tensors;
            let trained = Trained::Adapter(point.spec.clone());
            let mut job = Job::new(&directory, None::<Quantization>, cut, &trained, with, &start);
            let (_, found) = job.gradient(&golden.samples());
            let mut worst = 0f32;
            for (place, expected) in &expected.pairs {
                worst = worst.max(error_of_pair(name, &found, *place, expected));
            }
            eprintln!("{name}: gradients differ by {worst:.1e} of a tensor's largest");
        }
    }
}

/// How far the gradient of one pair of matrices is from the expected one, which is at most 1e-5.
fn error_of_pair(name: &str, found: &Whole, (layer, target): (usize, Target), expected: &LoraPair) -> f32 {
    let half = |half: &str| &found[&format!("model.layers.{layer}.{}.{half}.weight", target.path())];
    let errors = [("lora_A", &expected.a), ("lora_B", &expected.b)]
        .map(|(name, expected)| relative_error(half(name), expected));
    let worst = errors[0].max(errors[1]);
    assert!(worst <= 1e-5, "{name}, layer {layer}, {target:?}: {errors:?}");
    worst
}

#[test]
fn gradients_of_preferences_are_those_of_double_precision() {
    let name = "qwen2";
    let (golden, pairs) = preferences(name);
    let preference = Preference::new(golden.beta).unwrap();
    let point = adapter(name, "point.safetensors");
    let expected = adapter(name, "preferences-gradient.safetensors");
    for cut in [Cut::default(), Cut { stages: 2, ranks: 2, samples: 4, keep: false, ..Cut::default() }] {
        let start = |config: &ModelConfig, slice: &RankSlice| point.cut(&config.shape, slice).tensors;
        let (with, trained) = (Hyperparameters::default(), Trained::Adapter(point.spec.clone()));
        let mut job = Job::new(&models().join(name), None::<Quantization>, cut, &trained, with, &start);
        let (_, found) = job.gradient_of_pairs(&pairs, preference);
        let mut worst = 0f32;
        for (place, expected) in &expected.pairs {
            worst = worst.max(error_of_pair(name, &found, *place, expected));
        }
        eprintln!("{name}: gradients of preferences differ by {worst:.1e} of a tensor's largest");
    }
}

#[test]
fn preferences_are_learnt_as_with_peft_and_its_adapter_disabled() {
    for name in ["llama", "qwen2"] {
        let (golden, pairs) = preferences(name);
        assert!(golden.batches.len() >= 30);
        let (o, with) = (&golden.optimizer, golden.optimizer.hyperparameters());
        let preference = Preference::new(golden.beta).unwrap();
        let start = adapter(name, "initial.safetensors");
        let cut = Cut { stages: 2, ranks: 2, samples: 3, ..Cut::default() };
        let first = |config: &ModelConfig, slice: &RankSlice| start.cut(&config.shape, slice).tensors;
        let trained = Trained::Adapter(start.spec.clone());
        let mut job = Job::new(&models().join(name), None::<Quantization>, cut, &trained, with, &first);
        let mut worst = 0f64;
        for (step, batch) in golden.batches.iter().enumerate() {
            let batch: Vec<Pair> = batch.iter().map(|&index| pairs[index].clone()).collect();
            let report = job.step_of_pairs(&batch, preference, o.learning_rate);
            let rewards = report.loss.rewards.map(|sum| sum.value() / batch.len() as f64);
            for (what, found, expected) in [
                ("loss", report.loss.mean(), golden.losses[step]),
                ("reward of the preferred", rewards[0], golden.preferred[step]),
                ("reward of the others", rewards[1], golden.others[step]),
            ] {
                assert!((found - expected).abs() <= 1e-4, "{name}, step {step}, {what}: {found} {expected}");
                worst = worst.max((found - expected).abs());
            }
            // Where nothing has moved yet, whether PyTorch's margin is positive is chance.
            if step > 0 {
                assert_eq!(report.loss.accuracy(), golden.accuracies[step], "{name}, step {step}");
            }
            let norm = golden.norms[step];
            assert!((report.norm - norm).abs() <= 1e-3 * norm, "{name}, step {step}: {} {norm}", report.norm);
        }
        let (own, theirs) = (job.adapter(), adapter(name, "preferences-final.safetensors"));
        let mut apart = 0f32;
        for (place, theirs) in &theirs.pairs {
            let own = &own.pairs[place];
            apart = apart.max(relative_error(&own.a, &theirs.a)).max(relative_error(&own.b, &theirs.b));
        }
        eprintln!(
            "{name}: losses and rewards differ by {worst:.1e}, adapters by {apart:.1e} of a tensor's largest"
        );
        assert!(apart <= 1e-3, "{name}: {apart}");
    }
}

#[test]
fn llama_trains_as_peft_does() {
    check("llama");
}

#[test]
fn qwen2_with_biases_and_rank_stabilised_factors_trains_as_peft_does() {
    check("qwen2");
}

#[test]
fn qwen3_with_head_norms_trains_as_peft_does() {
    check("qwen3");
}

#[test]
fn mistral_with_a_window_trains_as_peft_does() {
    check("mistral");
}
