//! Attention of the 1B shape (32 query heads, 8 key/value heads of 64): GB/s of cached keys and values in decode, GFLOP/s in
//! prefill, as shares of what the machine reads and multiplies.
//!
//! `cargo run --release -p ashlar-kernels --example attention -- [threads] [isa] [cache type] [context rows]`

use ashlar_kernels::{
    AttentionShape, BLOCK_TOKENS, Isa, Kernels, KvBuffer, KvLayout, RowContext, StridedRows,
    available_threads, measure,
};
use ashlar_vocabulary::{BlockId, FloatType};
use std::hint::black_box;
use std::time::{Duration, Instant};

const LAYOUT: KvLayout = KvLayout { kv_heads: 8, head_dim: 64 };
const Q_HEADS: usize = 32;
/// Layers are visited in turn, so that keys and values come from memory as in a whole model.
const WORKING_SET_BYTES: usize = 800 << 20;
const TIME_PER_FIGURE: Duration = Duration::from_millis(1500);

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads =
        arguments.next().map_or_else(available_threads, |text| text.parse().expect("threads: a number"));
    let isa = arguments
        .next()
        .map_or_else(Isa::best, |text| text.parse().expect("isa: avx512, avx512bw, avx2 or portable"));
    let kind =
        arguments.next().map_or_else(FloatType::default, |text| text.parse().expect("f32, bf16 or f16"));
    let kernels = Kernels::new(isa, threads);
    println!("{isa}, {threads} threads, a cache of {kind}");
    let one = arguments.next().map(|context| (context, arguments.next().unwrap_or_else(|| "1".to_owned())));
    match one {
        Some((context, rows)) => {
            let number = |text: String| text.parse().expect("context and rows: numbers");
            figure(&kernels, kind, number(context), number(rows));
        }
        None => {
            for (context, rows) in [(2048, 1), (8192, 1), (512, 512), (2048, 512), (8192, 512)] {
                figure(&kernels, kind, context, rows);
            }
        }
    }
}

/// The last `rows` positions of `context` tokens.
fn figure(kernels: &Kernels, kind: FloatType, context: usize, rows: usize) {
    let blocks = context.div_ceil(BLOCK_TOKENS);
    let elements = blocks * LAYOUT.elements_per_block();
    let layers = (WORKING_SET_BYTES / (2 * kind.bytes() * elements)).max(1);
    let full = |value: f32| {
        let mut buffer = KvBuffer::zeroed(kind, elements);
        buffer.fill(value);
        buffer
    };
    let cache: Vec<[KvBuffer; 2]> = (0..layers).map(|_| [full(0.25), full(0.5)]).collect();
    // Neighbours in a sequence are not neighbours in memory.
    let table: Vec<BlockId> = (0..blocks).map(|block| BlockId((block * 7 % blocks) as u32)).collect();
    let table = if blocks.is_multiple_of(7) { (0..blocks as u32).map(BlockId).collect() } else { table };
    let contexts: Vec<RowContext<'_>> = (context - rows..context)
        .map(|position| RowContext { position: position as u32, block_table: &table })
        .collect();
    let width = Q_HEADS * LAYOUT.head_dim;
    let q = vec![0.125; rows * width];
    let shape =
        AttentionShape { layout: LAYOUT, q_heads: Q_HEADS, scale: 0.125, window: None, softcap: None };
    let mut out = vec![0.0; rows * width];
    let reader = measure::Reader::new(kernels, 400 << 20);
    let (mut bandwidth, mut peak, mut best) = (0.0f64, 0.0f64, f64::INFINITY);
    let (mut runs, start) = (0, Instant::now());
    while runs < 3 || start.elapsed() < TIME_PER_FIGURE {
        bandwidth = bandwidth.max(reader.bytes_per_s(kernels, Duration::from_millis(3)));
        peak = peak.max(measure::fma_flops_per_s(kernels, Duration::from_millis(2)));
        for _ in 0..3 {
            let [k, v] = &cache[runs % layers];
            let queries = StridedRows { data: &q, stride: width };
            let began = Instant::now();
            kernels.attention(&shape, &contexts, queries, k, v, &mut out);
            best = best.min(began.elapsed().as_secs_f64());
            black_box(&mut out);
            runs += 1;
        }
    }
    let bytes = (2 * kind.bytes() * elements) as f64 / best;
    let pairs: usize = (context - rows + 1..=context).sum();
    let flops = (4 * pairs * width) as f64 / best;
    println!(
        "context {context:>5} rows {rows:>3}: {:>5.1} GB/s ({:>3.0} % of {:.1})  {:>6.1} GFLOP/s ({:>3.0} % of {:.0})",
        bytes / 1e9,
        100.0 * bytes / bandwidth,
        bandwidth / 1e9,
        flops / 1e9,
        100.0 * flops / peak,
        peak / 1e9,
    );
}
