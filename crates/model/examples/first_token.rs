//! Loads a model and reads a prompt: `first_token MODEL [THREADS] [TOKENS]`. Timed from outside, it is load to first token.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use ashlar_kernels::{BLOCK_TOKENS, Isa, Kernels, RowContext};
use ashlar_model::{ModelConfig, NoHeadRanks, RankSlice, SingleRank, StageInput, StageModel};
use ashlar_vocabulary::BlockId;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let number = |at: usize, default| args.get(at).map_or(default, |text| text.parse().unwrap());
    let (threads, tokens) = (number(2, 2), number(3, 16));
    let path = Path::new(&args[1]);
    let quantization = args.get(4).map(|name| name.parse().unwrap());
    let started = Instant::now();
    let shape = ModelConfig::open(path, quantization).unwrap().shape;
    let kernels = Arc::new(Kernels::new(Isa::best(), threads));
    let slice = RankSlice::whole(&shape);
    let model = StageModel::load(path, quantization, slice, kernels, &mut |_, _| {}).unwrap();
    let loaded = started.elapsed().as_secs_f64();
    let mut cache = model.kv_cache(tokens.div_ceil(BLOCK_TOKENS));
    let mut work = model.workspace(tokens);
    let blocks: Vec<_> = (0..tokens.div_ceil(BLOCK_TOKENS) as u32).map(BlockId).collect();
    let row = |position| RowContext { position, block_table: &blocks };
    let rows: Vec<_> = (0..tokens as u32).map(row).collect();
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 37 % 1000).collect();
    model
        .forward(&rows, StageInput::Tokens(&ids), &mut cache, &mut SingleRank, &mut work, &mut || ())
        .unwrap();
    let logits = model.logits(&[tokens - 1], &mut SingleRank, &mut NoHeadRanks, &mut work).unwrap().unwrap();
    let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    println!(
        "loaded {loaded:.3} s, first token {best} after {:.3} s; {peak}",
        started.elapsed().as_secs_f64()
    );
}
