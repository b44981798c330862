//! Products of the 1B shape: GB/s of weights and GFLOP/s, as shares of what the machine reads and multiplies, and what
//! the contract costs: the same product with its inputs in eight parts, as row-parallel layers have them.
//!
//! `cargo run --release -p ashlar-kernels --example products -- [threads] [isa] [type] [n]`
//!
//! Bandwidth drifts on a shared machine, so that it is measured again next to every shape.

use ashlar_kernels::{BlockAxis, Isa, Kernels, PackedMatrix, ThreadPool, available_threads, measure};
use ashlar_vocabulary::WeightType;
use std::hint::black_box;
use std::ops::Range;
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
    let isa = arguments
        .next()
        .map_or_else(Isa::best, |text| text.parse().expect("isa: avx512, avx512bw, avx2 or portable"));
    let kind: WeightType =
        arguments.next().map_or(WeightType::F32, |text| text.parse().expect("type: f32, q8_0, q4_k …"));
    let only: Option<usize> = arguments.next().map(|text| text.parse().expect("n: a number"));
    let kernels = Kernels::new(isa, threads);
    println!("{isa}, {threads} threads, {kind}");
    for (n, k) in SHAPES {
        if only.is_some_and(|only| only != n) {
            continue;
        }
        shape(&kernels, kind, n, k);
    }
}

fn eight_parts(k: usize) -> Vec<Range<usize>> {
    (0..8).map(|part| part * k / 8..(part + 1) * k / 8).collect()
}

fn pack(kind: WeightType, n: usize, parts: &[Range<usize>], copy: usize) -> PackedMatrix {
    if !kind.is_quantized() {
        return PackedMatrix::pack(kind, n, parts, &ThreadPool::new(2), &|row, to| {
            for (input, to) in to.iter_mut().enumerate() {
                *to = ((row * 31 + input * 17 + copy) % 255) as f32 * 0.01 - 1.27;
            }
        });
    }
    PackedMatrix::pack_blocks(kind, n, BlockAxis::new(0, parts), &ThreadPool::new(2), &|row, to| {
        for (input, to) in to.quants.iter_mut().enumerate() {
            *to = ((row * 31 + input * 17 + copy) % 15) as u8;
        }
        for to in &mut to.scales {
            (to.scale, to.min, to.sub_scales, to.sub_min) = (0x2000, 0x2000, [5, 7], 9);
        }
    })
}

/// Prints one line per batch size.
fn shape(kernels: &Kernels, kind: WeightType, n: usize, k: usize) {
    let copies = (WORKING_SET_BYTES / kind.bytes(n * k)).max(1);
    let weights: Vec<[PackedMatrix; 2]> = (0..copies)
        .map(|copy| {
            // A quantised matrix knows its parts; only the one that is measured lies in memory twice.
            let uncut = pack(kind, n, &[0..k], copy);
            let in_parts = pack(kind, n, &eight_parts(k), copy);
            [uncut, in_parts]
        })
        .collect();
    let reader = measure::Reader::new(kernels, WORKING_SET_BYTES);
    for rows in ROWS {
        let x = vec![0.5; rows * k];
        let mut y = vec![0.0; rows * n];
        // The best of many short slices, interleaved: another process on the core spoils a slice, not the figure.
        let (mut bandwidth, mut peak) = (0.0f64, 0.0f64);
        let cuts = [vec![0..k], eight_parts(k)];
        let mut best = [f64::INFINITY; 2];
        let (mut runs, start) = (0, Instant::now());
        while runs < 3 || start.elapsed() < TIME_PER_FIGURE {
            bandwidth = bandwidth.max(reader.bytes_per_s(kernels, Duration::from_millis(3)));
            peak = peak.max(measure::fma_flops_per_s(kernels, Duration::from_millis(2)));
            for _ in 0..3 {
                for (index, (parts, seconds)) in cuts.iter().zip(&mut best).enumerate() {
                    let start = Instant::now();
                    kernels.matmul(rows, &x, &weights[runs % copies][index], parts, None, &mut y);
                    *seconds = seconds.min(start.elapsed().as_secs_f64());
                    black_box(&mut y);
                    // Never the copy that the caches still hold.
                    runs += 1;
                }
            }
        }
        let [seconds, in_parts] = best;
        let bytes = kind.bytes(n * k) as f64 / seconds;
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
