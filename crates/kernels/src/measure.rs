//! What this machine can do: read bandwidth, fused multiply-adds and products with quantised weights per second, in a
//! bounded time.
//!
//! A node measures them when it joins; the bench sets its figures against them. The only clock of this crate is here.

use crate::aligned::AlignedBuffer;
use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::matmul::{BlockAxis, BlockScale, PackedMatrix, QuantizedRow};
use crate::strided::DisjointMut;
use ashlar_vocabulary::WeightType;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Elements that a thread reads before it looks at the clock.
const READ_RUN: usize = 64 << 10;
/// Steps of the multiply-add loop before a look at the clock.
const FMA_RUN: usize = 20_000;
/// Independent chains: enough to hide a latency of four cycles on two units.
const CHAINS: usize = 12;

/// Bytes per second that all threads together read from a working set of `working_set_bytes`, measured over about
/// `duration` (and the time to fill it). A working set several times the last cache measures memory.
pub fn read_bandwidth_bytes_per_s(kernels: &Kernels, working_set_bytes: usize, duration: Duration) -> f64 {
    Reader::new(kernels, working_set_bytes).bytes_per_s(kernels, duration)
}

/// A filled working set, for measuring bandwidth several times.
#[derive(Debug)]
pub struct Reader {
    buffer: AlignedBuffer,
    /// Where the next measurement goes on, so that short ones do not find the last one's lines in a cache.
    next: AtomicUsize,
}

impl Reader {
    /// Fills a working set, with all threads.
    pub fn new(kernels: &Kernels, working_set_bytes: usize) -> Reader {
        let runs = (working_set_bytes / size_of::<f32>()).div_ceil(READ_RUN).max(kernels.threads());
        let mut buffer = AlignedBuffer::zeroed(runs * READ_RUN);
        // Untouched pages would all be the one page of zeros.
        let pages = DisjointMut::new(&mut buffer);
        // SAFETY: one task per run.
        kernels
            .pool()
            .run(runs, &|run| unsafe { pages.range(run * READ_RUN..(run + 1) * READ_RUN) }.fill(1.0));
        Reader { buffer, next: AtomicUsize::new(0) }
    }

    /// Bytes per second that all threads together read, measured over about `duration`.
    pub fn bytes_per_s(&self, kernels: &Kernels, duration: Duration) -> f64 {
        let runs = self.buffer.len() / READ_RUN;
        let read = AtomicU64::new(0);
        let start = Instant::now();
        kernels.pool().run(kernels.threads(), &|_| {
            while start.elapsed() < duration {
                let run = self.next.fetch_add(1, Ordering::Relaxed) % runs;
                black_box(kernels.dispatch(Read(&self.buffer[run * READ_RUN..(run + 1) * READ_RUN])));
                read.fetch_add((READ_RUN * size_of::<f32>()) as u64, Ordering::Relaxed);
            }
        });
        read.into_inner() as f64 / start.elapsed().as_secs_f64()
    }
}

/// Floating-point operations per second of `f32` fused multiply-adds in registers (two operations per lane and
/// instruction), all threads together, measured over about `duration`.
pub fn fma_flops_per_s(kernels: &Kernels, duration: Duration) -> f64 {
    let done = AtomicU64::new(0);
    let start = Instant::now();
    kernels.pool().run(kernels.threads(), &|_| {
        let mut runs = 0;
        while start.elapsed() < duration {
            black_box(kernels.dispatch(FmaChains(black_box(0.999))));
            runs += 1;
        }
        done.fetch_add(runs, Ordering::Relaxed);
    });
    let operations = done.into_inner() as f64 * (FMA_RUN * CHAINS * LANES * 2) as f64;
    operations / start.elapsed().as_secs_f64()
}

/// Outputs per thread, inputs and rows of the product that is measured: small enough for the caches and for a time slice,
/// with enough rows that taking weights apart hardly counts, as in a chunk of a prompt.
const PRODUCT: (usize, usize, usize) = (256, 1024, 48);

/// A product with quantised weights, for measuring its speed several times.
#[derive(Debug)]
pub struct QuantizedProduct {
    weights: PackedMatrix,
    inputs: Vec<f32>,
    outputs: Vec<f32>,
}

impl QuantizedProduct {
    /// The type that stands for all: most others are within a tenth of its speed (q6_k is a quarter slower, and so is q8_0
    /// with AVX2; see the example `rates`).
    pub const TYPICAL: WeightType = WeightType::Q4K;

    /// Packs weights of type `kind` that mean nothing.
    ///
    /// # Panics
    /// If `kind` is not quantised.
    pub fn new(kernels: &Kernels, kind: WeightType) -> QuantizedProduct {
        let (outputs, inputs, rows) = PRODUCT;
        let outputs = outputs * kernels.threads();
        let fill = |row: usize, to: &mut QuantizedRow| {
            for (input, to) in to.quants.iter_mut().enumerate() {
                *to = ((row + input) % 15) as u8;
            }
            to.scales.fill(BlockScale { scale: 0x2000, min: 0x2000, sub_scales: [5, 7], sub_min: 9 });
        };
        let axis = BlockAxis::whole(inputs);
        QuantizedProduct {
            weights: PackedMatrix::pack_blocks(kind, outputs, axis, kernels.pool(), &fill),
            inputs: (0..rows * inputs).map(|at| (at % 33) as f32 - 16.0).collect(),
            outputs: vec![0.0; rows * outputs],
        }
    }

    /// Operations per second of all threads together (two per weight and row), measured over about `duration`.
    pub fn flops_per_s(&mut self, kernels: &Kernels, duration: Duration) -> f64 {
        let (n, (_, k, rows)) = (self.weights.n(), PRODUCT);
        let (mut runs, start) = (0, Instant::now());
        while runs == 0 || start.elapsed() < duration {
            kernels.matmul(rows, &self.inputs, &self.weights, &[0..k], None, &mut self.outputs);
            black_box(&mut self.outputs);
            runs += 1;
        }
        (2 * rows * n * k * runs) as f64 / start.elapsed().as_secs_f64()
    }
}

/// Reads every element once.
struct Read<'a>(&'a [f32]);

impl LaneKernel for Read<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd16>(self) -> f32 {
        let mut sums = [S::splat(0.0); 8];
        for run in self.0.as_chunks::<{ 8 * LANES }>().0 {
            for (vector, sum) in sums.iter_mut().enumerate() {
                *sum = sum.add(S::read(&run[vector * LANES..]));
                S::prefetch(run.as_ptr().wrapping_add(vector * LANES + PREFETCH));
            }
        }
        sums.into_iter().map(S::sum_lanes).sum()
    }
}

/// How far ahead of the stream lines are asked for, in elements; as in the products.
const PREFETCH: usize = 2048;

/// A loop of independent multiply-adds.
struct FmaChains(f32);

impl LaneKernel for FmaChains {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd16>(self) -> f32 {
        let factor = S::splat(self.0);
        let mut sums = [S::splat(self.0); CHAINS];
        for _ in 0..FMA_RUN {
            for sum in &mut sums {
                *sum = sum.mul_add(factor, factor);
            }
        }
        sums.into_iter().map(S::sum_lanes).sum()
    }
}
