//! The first twenty steps of the demo model, from random weights: the same bits on every machine and every grid.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use ashlar_model::{ModelConfig, RankSlice, Tensors, Trained};
use ashlar_training::{Hyperparameters, initial_model};
use ashlar_vocabulary::Quantization;
use common::{Cut, Job, Sample, Whole};
use ring::digest::{Context, SHA256};
use std::fs;
use std::path::{Path, PathBuf};

/// A change of this number is a change of what training computes: it needs a new numeric version.
const AFTER_TWENTY_STEPS: &str = "7e637d58766437846aa779b9ad05440e404348b78e9275b1851efbaa88accfc4";

const STEPS: usize = 20;
const BATCH: usize = 8;
const BEGIN: u32 = 257;
const END: u32 = 258;
const USER: u32 = 260;
const ASSISTANT: u32 = 261;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/demo")
}

/// Questions of the evaluation set with their answers, as the demo's template writes them: a byte is a token.
fn samples() -> Vec<Sample> {
    let text = fs::read_to_string(demo().join("eval.jsonl")).unwrap();
    let items = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let single = items.filter(|item| item["messages"].as_array().unwrap().len() == 1);
    let sample = |item: serde_json::Value| {
        let bytes =
            |text: &serde_json::Value| text.as_str().unwrap().bytes().map(u32::from).collect::<Vec<_>>();
        let (question, answer) = (bytes(&item["messages"][0]["content"]), bytes(&item["answer"]));
        let tokens = [&[BEGIN, USER][..], &question, &[END, ASSISTANT], &answer, &[END]].concat();
        let first = tokens.len() - answer.len() - 1;
        let targets = (0..tokens.len()).map(|place| place >= first).collect();
        Sample { tokens, targets }
    };
    // Of every task some.
    single.step_by(7).map(sample).collect()
}

fn train(cut: Cut) -> Whole {
    let with = Hyperparameters { weight_decay: 0.02, ..Hyperparameters::default() };
    let start = |config: &ModelConfig, slice: &RankSlice| -> Tensors {
        initial_model(&Trained::Model.weights(&config.shape, slice), config.shape.num_layers, 1)
    };
    let mut job = Job::new(&demo(), None::<Quantization>, cut, &Trained::Model, with, &start);
    let samples = samples();
    let mut losses = Vec::new();
    for step in 0..STEPS {
        let batch: Vec<Sample> =
            (0..BATCH).map(|index| samples[(step * BATCH + index) % samples.len()].clone()).collect();
        losses.push(job.step(&batch, 1e-3 * (step + 1) as f32 / STEPS as f32).loss.mean());
    }
    assert!(losses[STEPS - 1] < 0.8 * losses[0], "{losses:?}");
    job.weights()
}

fn digest(weights: &Whole) -> String {
    let mut digest = Context::new(&SHA256);
    for (name, numbers) in weights {
        digest.update(name.as_bytes());
        numbers.iter().for_each(|x| digest.update(&x.to_le_bytes()));
    }
    digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn the_demo_model_begins_with_the_same_bits_everywhere() {
    for cut in [Cut::default(), Cut { stages: 2, ranks: 2, ..Cut::default() }] {
        assert_eq!(digest(&train(cut)), AFTER_TWENTY_STEPS, "{cut:?}");
    }
}
