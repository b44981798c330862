//! How fast one process trains an adapter on all linears of a model: `speed DIRECTORY [QUANTIZATION|none] [TOKENS] [RANK]`.
//!
//! Prints, per repetition, the time of the forward pass, the loss and the backward pass of one micro-batch, with activations kept
//! and with activations computed again, and the share of the machine's multiply-add rate that the products reach.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use ashlar_kernels::{Isa, Kernels, available_threads, measure};
use ashlar_model::adapter::{LoraSpec, Target};
use ashlar_model::stage::{MicroBatch, StageTrainer, TargetRow};
use ashlar_model::{ModelConfig, RankSlice, SingleRank, StageInput, StageModel, Trained};
use ashlar_training::{RunTree, TrainingState, initial_adapter};
use ashlar_vocabulary::Quantization;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let directory = PathBuf::from(&args[1]);
    let quantization: Option<Quantization> = args.get(2).and_then(|name| name.parse().ok());
    let tokens: usize = args.get(3).map_or(512, |count| count.parse().unwrap());
    let rank: usize = args.get(4).map_or(16, |rank| rank.parse().unwrap());
    let kernels = Arc::new(Kernels::new(Isa::best(), available_threads()));
    let config = ModelConfig::open(&directory, quantization).unwrap();
    let shape = config.shape.clone();
    let slice = RankSlice::whole(&shape);
    let model =
        StageModel::load(&directory, quantization, slice.clone(), kernels.clone(), &mut |_, _| {}).unwrap();
    let spec = LoraSpec { rank, alpha: 32.0, rank_stabilized: false, targets: Target::ALL.to_vec() };
    let start = initial_adapter(&spec, &shape, &slice, 1).tensors;
    let trained = Trained::Adapter(spec);
    let mut state = TrainingState::new(&trained, start, &shape, &slice, &kernels);
    let mut tree = RunTree::new(trained.sums(&shape, &slice));
    let mut trainer = StageTrainer::new(Arc::new(model), kernels.clone(), tokens);
    let batch = MicroBatch::new(&[tokens]);
    let ids: Vec<u32> = (0..tokens).map(|i| ((i * 7919 + 13) % shape.vocab_size) as u32).collect();
    let targets: Vec<TargetRow> =
        (1..tokens).map(|i| TargetRow { row: i - 1, token: ids[i], weight: 1.0 }).collect();
    // Multiply-adds of the linears, forward and by inputs; the head is on every row with a target.
    let weights = (shape.num_layers * shape.layer_weights() + shape.embedding_weights()) as f64;
    let flops = 4.0 * weights * tokens as f64;
    let peak = measure::fma_flops_per_s(&kernels, Duration::from_millis(300));
    // Without kept activations first: the process's largest memory only grows.
    for keep in [false, true] {
        for repetition in 0..3 {
            let adapter = state.packed().cloned();
            let adapter = adapter.as_deref();
            let start = Instant::now();
            let input = StageInput::Tokens(&ids);
            let tape =
                trainer.forward(&batch, input, adapter, keep, &mut SingleRank, &mut || Ok(())).unwrap();
            let (forward, bytes) = (start.elapsed(), tape.bytes());
            let (loss, gradient) =
                trainer.loss(&targets, 1.0 / tokens as f32, tokens, None, &mut SingleRank).unwrap();
            let mut gradient = gradient.to_vec();
            let with_loss = start.elapsed();
            let sink = tree.current();
            trainer
                .backward(&batch, tape, adapter, &mut gradient, sink, &mut SingleRank, &mut || Ok(()))
                .unwrap();
            let all = start.elapsed();
            // The second forward pass does as many operations again, but for the head.
            let again =
                if keep { 0.0 } else { 2.0 * (shape.num_layers * shape.layer_weights() * tokens) as f64 };
            println!(
                "{repetition} {}: loss {:.4}, forward {:.2} s, loss {:.2} s, backward {:.2} s, {:.1} tokens/s, \
                 {:.0} % of {:.0} GFLOP/s, tape {} MiB, held {} MiB, process at most {} MiB",
                if keep { "kept" } else { "again" },
                loss.mean(),
                forward.as_secs_f64(),
                (with_loss - forward).as_secs_f64(),
                (all - with_loss).as_secs_f64(),
                tokens as f64 / all.as_secs_f64(),
                (flops + again) / all.as_secs_f64() / peak * 100.0,
                peak / 1e9,
                bytes >> 20,
                trainer.held_bytes().0 >> 20,
                memory_mib(),
            );
            tree.end_run(&kernels);
            let gradient = tree.take();
            let start = Instant::now();
            state.step(&gradient, 1.0, 1e-4, &Default::default(), &shape, &slice, &kernels);
            println!("{repetition} step: {:.3} s", start.elapsed().as_secs_f64());
            tree.recycle(gradient);
        }
    }
}

/// The most memory that this process had at any time, where the system tells.
fn memory_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) >> 10
}
