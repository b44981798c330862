//! Operations per second of products, type by type, beside `f32` multiply-adds: what the plan's ratio rests on.
//!
//! `cargo run --release -p ashlar-kernels --example rates -- [threads] [isa]`

use ashlar_kernels::measure::{self, QuantizedProduct};
use ashlar_kernels::{Isa, Kernels, available_threads};
use ashlar_vocabulary::WeightType;
use std::time::Duration;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads =
        arguments.next().map_or_else(available_threads, |text| text.parse().expect("threads: a number"));
    let only: Option<Isa> =
        arguments.next().map(|text| text.parse().expect("isa: avx512, avx512bw, avx2 or portable"));
    for isa in Isa::available().into_iter().filter(|isa| only.is_none_or(|only| only == *isa)) {
        let kernels = Kernels::new(isa, threads);
        let kinds: Vec<WeightType> = WeightType::ALL.into_iter().filter(|kind| kind.is_quantized()).collect();
        let mut products: Vec<QuantizedProduct> =
            kinds.iter().map(|&kind| QuantizedProduct::new(&kernels, kind)).collect();
        // Interleaved, and the best of many short looks: another process spoils some of them.
        let mut float = 0.0f64;
        let mut best = vec![0.0f64; products.len()];
        for _ in 0..50 {
            float = float.max(measure::fma_flops_per_s(&kernels, Duration::from_millis(2)));
            for (product, best) in products.iter_mut().zip(&mut best) {
                *best = best.max(product.flops_per_s(&kernels, Duration::from_millis(2)));
            }
        }
        println!("{isa}, {threads} threads: f32 {:.1} GFLOP/s", float / 1e9);
        for (kind, best) in kinds.iter().zip(best) {
            println!("  {kind:<5} {:>7.1} GFLOP/s, {:.2} times", best / 1e9, best / float);
        }
    }
}
