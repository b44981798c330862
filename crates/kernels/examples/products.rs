//! Products of the 1B shape: GB/s of weights and GFLOP/s, as shares of what the machine reads and multiplies, and what
//! the contract costs: the same product with its inputs in eight parts, as row-parallel layers have them.
//!
//! `cargo run --release -p ashlar-kernels --example products -- [threads] [isa]`
//!
//! Bandwidth drifts on a shared machine, so that it is measured again next to every shape.

use ashlar_kernels::{Isa, Kernels, PackedMatrix, available_threads, measure};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// n outputs × k inputs.
const SHAPES: [(usize, usize); 4] = [(2048, 2048), (2048, 8192), (8192, 2048), (128_256, 2048)];
const ROWS: [usize; 7] = [1, 2, 4, 8, 16, 32, 512];
/// Copies of a small matrix are visited in turn, so that weights come from memory as in a whole model.
const WORKING_SET_BYTES: usize = 400 << 20;
const TIME_PER_FIGURE: Duration = Duration::from_millis(250);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads =
        arguments.next().map_or_else(available_threads, |text| text.parse().expect("threads: a number"));
    let isa =
        arguments.next().map_or_else(Isa::best, |text| text.parse().expect("isa: avx512, avx2 or portable"));
    let only: Option<usize> = arguments.next().map(|text| text.parse().expect("n: a number"));
    let kernels = Kernels::new(isa, threads);
    println!("{isa}, {threads} threads");
    for (n, k) in SHAPES {
        if only.is_some_and(|only| only != n) {
            continue;
        }
        shape(&kernels, n, k);
    }
}

/// Prints one line per batch size.
fn shape(kernels: &Kernels, n: usize, k: usize) {
    let copies = (WORKING_SET_BYTES / (n * k * 4)).max(1);
    let weights: Vec<PackedMatrix> = (0..copies)
        .map(|copy| {
            PackedMatrix::pack(n, k, &mut |row, to| {
                for (input, to) in to.iter_mut().enumerate() {
                    *to = ((row * 31 + input * 17 + copy) % 255) as f32 * 0.01 - 1.27;
                }
            })
        })
        .collect();
    let reader = measure::Reader::new(kernels, WORKING_SET_BYTES);
    for rows in ROWS {
        let x = vec![0.5; rows * k];
        let mut y = vec![0.0; rows * n];
        // The best of many short slices, interleaved: another process on the core spoils a slice, not the figure.
        let (mut bandwidth, mut peak) = (0.0f64, 0.0f64);
        let cuts = [vec![0..k], (0..8).map(|part| part * k / 8..(part + 1) * k / 8).collect()];
        let mut best = [f64::INFINITY; 2];
        let (mut runs, start) = (0, Instant::now());
        while runs < 3 || start.elapsed() < TIME_PER_FIGURE {
            bandwidth = bandwidth.max(reader.bytes_per_s(kernels, Duration::from_millis(3)));
            peak = peak.max(measure::fma_flops_per_s(kernels, Duration::from_millis(2)));
            for _ in 0..3 {
                for (parts, seconds) in cuts.iter().zip(&mut best) {
                    let start = Instant::now();
                    kernels.matmul(rows, &x, &weights[runs % copies], parts, None, &mut y);
                    *seconds = seconds.min(start.elapsed().as_secs_f64());
                    black_box(&mut y);
                    // Never the copy that the caches still hold.
                    runs += 1;
                }
            }
        }
        let [seconds, in_parts] = best;
        let bytes = (n * k * 4) as f64 / seconds;
        let flops = (2 * rows * n * k) as f64 / seconds;
        println!(
            "{n:>6}×{k:<5} rows {rows:>3}: {:>6.1} GB/s ({:>3.0} % of {:.1})  {:>6.1} GFLOP/s ({:>3.0} % of {:.0})  eight parts {:+.1} %",
            bytes / 1e9,
            100.0 * bytes / bandwidth,
            bandwidth / 1e9,
            flops / 1e9,
            100.0 * flops / peak,
            peak / 1e9,
            100.0 * (in_parts / seconds - 1.0),
        );
    }
}
