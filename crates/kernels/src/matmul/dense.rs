//! Weights without blocks: f32, halves and brain floats.
//!
//! A panel is `[step][width]`: a step is one input, or two of brain floats, which multiply in pairs. The earlier input of a
//! pair is in the word's high half, where the hardware begins; a part of odd length ends in half a pair.
//!
//! **Brain floats** are defined by the instruction for pairs: two fused multiply-adds, each of whose results is zero where
//! it would be subnormal. Plain multiply-adds give the same bits wherever no result can be subnormal: brain floats have
//! eight bits, so every product is a multiple of 2^(e−14), e being the sum of the smallest exponents of the weights and of
//! the activations; so is every rounded sum of them; and from e − 14 ≥ −126 on, such a multiple is zero or normal. Hardware
//! whose instruction for pairs is slow, or that has none, therefore multiplies widened brain floats at the speed of f32.

use super::packed::locate;
use crate::aligned::AlignedBuffer;
use crate::half;
use crate::kernels::Kernels;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};
use crate::pool::ThreadPool;
use crate::strided::DisjointMut;
use ashlar_vocabulary::{WeightType, packed};
use std::ops::Range;
use std::sync::atomic::{AtomicI32, Ordering};

/// Tasks per thread while packing.
const TASKS_PER_THREAD: usize = 8;

/// One element type.
pub(super) trait Dense {
    /// Sixteen outputs' weights of one step, in registers.
    type Weights<S: Simd16>: Copy;
    /// Inputs of a step.
    const INPUTS: usize;
    /// Words of activations of a step.
    const WORDS: usize = 1;
    /// Bytes of one output's step.
    const BYTES: usize;

    /// Reads sixteen outputs' step.
    ///
    /// # Safety
    /// `from` must be valid for `16 · BYTES` bytes.
    unsafe fn load<S: Simd16>(from: *const u8) -> Self::Weights<S>;
    /// Adds the step's terms; `x` is an activation, a pair of them, or two.
    ///
    /// # Safety
    /// `x` must be valid for `WORDS` words.
    unsafe fn add<S: Simd16>(weights: Self::Weights<S>, x: *const u32, sum: S) -> S;
    /// Runs a kernel that multiplies such weights.
    #[inline]
    fn dispatch<K: LaneKernel>(kernels: &Kernels, kernel: K) -> K::Output {
        kernels.dispatch(kernel)
    }
    /// Lays out one output's step.
    fn store(inputs: &[f32], to: &mut [u8]);
    /// Widens it again.
    fn widen(step: &[u8], inputs: &mut [f32]);
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
/// Brain floats, widened and multiplied one after the other: see the head of this file for where this is allowed.
pub(super) struct WidenedBf16;

impl Dense for F32 {
    type Weights<S: Simd16> = S;
    const INPUTS: usize = 1;
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const u8) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn add<S: Simd16>(weights: S, x: *const u32, sum: S) -> S {
        // SAFETY: the caller's contract.
        weights.mul_add(S::splat(f32::from_bits(unsafe { *x })), sum)
    }
    fn store(inputs: &[f32], to: &mut [u8]) {
        to.copy_from_slice(&inputs[0].to_ne_bytes());
    }
    fn widen(step: &[u8], inputs: &mut [f32]) {
        inputs[0] = f32::from_ne_bytes([step[0], step[1], step[2], step[3]]);
    }
}

impl Dense for F16 {
    type Weights<S: Simd16> = S;
    const INPUTS: usize = 1;
    const BYTES: usize = 2;

    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const u8) -> S {
        // SAFETY: the caller's contract.
        unsafe { S::load_half(from.cast()) }
    }
    #[inline(always)]
    unsafe fn add<S: Simd16>(weights: S, x: *const u32, sum: S) -> S {
        // SAFETY: the caller's contract.
        weights.mul_add(S::splat(f32::from_bits(unsafe { *x })), sum)
    }
    fn store(inputs: &[f32], to: &mut [u8]) {
        to.copy_from_slice(&half::narrow(inputs[0]).to_ne_bytes());
    }
    fn widen(step: &[u8], inputs: &mut [f32]) {
        inputs[0] = half::widen(u16::from_ne_bytes([step[0], step[1]]));
    }
}

impl Dense for Bf16 {
    type Weights<S: Simd16> = S::Int;
    const INPUTS: usize = 2;
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const u8) -> S::Int {
        // SAFETY: the caller's contract.
        unsafe { S::Int::load(from) }
    }
    #[inline(always)]
    unsafe fn add<S: Simd16>(weights: S::Int, x: *const u32, sum: S) -> S {
        // SAFETY: the caller's contract.
        sum.dot_pairs(weights, S::Int::splat(unsafe { *x } as i32))
    }
    #[inline]
    fn dispatch<K: LaneKernel>(kernels: &Kernels, kernel: K) -> K::Output {
        kernels.dispatch_pairs(kernel)
    }
    fn store(inputs: &[f32], to: &mut [u8]) {
        let pair = pair(inputs[0], inputs.get(1).copied().unwrap_or(0.0));
        to.copy_from_slice(&pair.to_ne_bytes());
    }
    fn widen(step: &[u8], inputs: &mut [f32]) {
        let pair = u32::from_ne_bytes([step[0], step[1], step[2], step[3]]);
        inputs[0] = f32::from_bits(pair & 0xffff_0000);
        if let Some(second) = inputs.get_mut(1) {
            *second = f32::from_bits(pair << 16);
        }
    }
}

impl Dense for WidenedBf16 {
    type Weights<S: Simd16> = [S; 2];
    const INPUTS: usize = 2;
    const WORDS: usize = 2;
    const BYTES: usize = 4;

    #[inline(always)]
    unsafe fn load<S: Simd16>(from: *const u8) -> [S; 2] {
        // SAFETY: the caller's contract.
        let pairs = unsafe { S::Int::load(from) };
        [pairs.and(S::Int::splat(0xffff_0000u32 as i32)).as_float(), pairs.shift_left::<16>().as_float()]
    }
    #[inline(always)]
    unsafe fn add<S: Simd16>(weights: [S; 2], x: *const u32, sum: S) -> S {
        // SAFETY: the caller's contract.
        let x = unsafe { [f32::from_bits(*x), f32::from_bits(*x.add(1))] };
        weights[1].mul_add(S::splat(x[1]), weights[0].mul_add(S::splat(x[0]), sum))
    }
    fn store(inputs: &[f32], to: &mut [u8]) {
        Bf16::store(inputs, to);
    }
    fn widen(step: &[u8], inputs: &mut [f32]) {
        Bf16::widen(step, inputs);
    }
}

/// The smallest sum of exponents for which no sum of products of brain floats can be subnormal.
pub(super) const EXPONENTS_MIN: i32 = -126 + 14;

/// The exponent of a brain float; large for zero, which limits nothing.
#[inline(always)]
pub(super) fn exponent(value: f32) -> i32 {
    let biased = (value.to_bits() >> 23 & 0xff) as i32;
    if biased == 0 { i32::MAX / 2 } else { biased - 127 }
}

/// Two numbers rounded to brain floats, the first in the high half.
#[inline(always)]
pub(super) fn pair(first: f32, second: f32) -> u32 {
    u32::from(half::to_brain_float(first)) << 16 | u32::from(half::to_brain_float(second))
}

/// Calls `$body` with `$dense` naming the element type of an unquantised `$kind`.
macro_rules! with_dense {
    ($kind:expr, $dense:ident => $body:expr) => {{
        use crate::matmul::dense::{Bf16, F16, F32};
        match $kind {
            WeightType::F32 => {
                type $dense = F32;
                $body
            }
            WeightType::F16 => {
                type $dense = F16;
                $body
            }
            WeightType::Bf16 => {
                type $dense = Bf16;
                $body
            }
            other => unreachable!("{other} is a block format"),
        }
    }};
}

/// A matrix of plain elements.
pub(super) struct DenseMatrix {
    pub(super) kind: WeightType,
    /// Inputs of each part.
    parts: Vec<Range<usize>>,
    /// Steps of each part.
    pub(super) steps: Vec<Range<usize>>,
    /// Of brain floats: the smallest exponent of any weight that is not zero.
    pub(super) exponent: i32,
    data: AlignedBuffer,
}

impl DenseMatrix {
    pub(super) fn pack(
        kind: WeightType,
        n: usize,
        parts: &[Range<usize>],
        pool: &ThreadPool,
        fill: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> DenseMatrix {
        with_dense!(kind, D => pack::<D>(kind, n, parts, pool, fill))
    }

    /// The matrix of `n` outputs that `data` holds, as [`Self::data`] gave it.
    ///
    /// # Panics
    /// If `data` has another length than such a matrix.
    pub(super) fn from_data(
        kind: WeightType,
        n: usize,
        parts: &[Range<usize>],
        exponent: i32,
        data: AlignedBuffer,
    ) -> DenseMatrix {
        assert_eq!(data.len(), words(kind, n, parts), "{n} outputs of {kind} have another length");
        DenseMatrix { kind, parts: parts.to_vec(), steps: steps(kind, parts), exponent, data }
    }

    pub(super) fn data(&self) -> &[u8] {
        self.data.as_bytes()
    }

    pub(super) fn parts(&self) -> &[Range<usize>] {
        &self.parts
    }

    /// Steps of all parts.
    pub(super) fn all_steps(&self) -> usize {
        self.steps.last().map_or(0, |part| part.end)
    }

    /// Words of activations on their way into a product: brain floats, widened; others are taken as they are.
    pub(super) fn words_per_row(&self) -> usize {
        if self.kind == WeightType::Bf16 { 2 * self.all_steps() } else { 0 }
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[f32]>(&self.data)
    }

    /// `[step][width]` of the panel that starts with output `first`.
    pub(super) fn panel(&self, first: usize, width: usize) -> &[u8] {
        let bytes = with_dense!(self.kind, D => D::BYTES);
        &self.data.as_bytes()[first * self.all_steps() * bytes..][..width * self.all_steps() * bytes]
    }

    /// Widens output `row`.
    pub(super) fn row(&self, n: usize, row: usize, out: &mut [f32]) {
        let (start, width) = locate(n, self.all_steps(), row);
        let bytes = self.data.as_bytes();
        with_dense!(self.kind, D => {
            for (part, steps) in self.parts.iter().zip(&self.steps) {
                for (inputs, step) in out[part.clone()].chunks_mut(D::INPUTS).zip(steps.clone()) {
                    D::widen(&bytes[(start + step * width) * D::BYTES..][..D::BYTES], inputs);
                }
            }
        });
    }
}

/// Steps of each part.
pub(super) fn steps(kind: WeightType, parts: &[Range<usize>]) -> Vec<Range<usize>> {
    let inputs = with_dense!(kind, D => D::INPUTS);
    let mut next = 0;
    let step = |part: &Range<usize>| {
        let steps = next..next + part.len().div_ceil(inputs);
        next = steps.end;
        steps
    };
    parts.iter().map(step).collect()
}

/// Length of the data of a matrix of `n` outputs, in words.
pub(super) fn words(kind: WeightType, n: usize, parts: &[Range<usize>]) -> usize {
    packed::plain_bytes(kind, n, parts) / size_of::<f32>()
}

fn pack<D: Dense>(
    kind: WeightType,
    n: usize,
    parts: &[Range<usize>],
    pool: &ThreadPool,
    fill: &(dyn Fn(usize, &mut [f32]) + Sync),
) -> DenseMatrix {
    let steps = steps(kind, parts);
    let next = steps.last().map_or(0, |part| part.end);
    let k = parts.last().map_or(0, |part| part.end);
    let mut data = AlignedBuffer::zeroed(words(kind, n, parts));
    let exponent_min = AtomicI32::new(i32::MAX / 2);
    if k > 0 {
        let to = DisjointMut::new(data.as_bytes_mut());
        let sixteens = n.div_ceil(LANES);
        let tasks = sixteens.min(TASKS_PER_THREAD * pool.threads());
        pool.run(tasks, &|task| {
            let mut rows = vec![0.0; LANES * k];
            for first in (task * sixteens / tasks..(task + 1) * sixteens / tasks).map(|i| i * LANES) {
                let live = LANES.min(n - first);
                for (lane, row) in rows.chunks_exact_mut(k).take(live).enumerate() {
                    fill(first + lane, row);
                }
                if kind == WeightType::Bf16 {
                    let rounded = rows[..live * k].iter().map(|w| half::brain_float(*w));
                    let least = rounded.map(exponent).min().unwrap_or(i32::MAX / 2);
                    exponent_min.fetch_min(least, Ordering::Relaxed);
                }
                let (start, width) = locate(n, next, first);
                for (part, steps) in parts.iter().zip(&steps) {
                    for (index, step) in steps.clone().enumerate() {
                        let input = part.start + index * D::INPUTS;
                        let inputs = input..part.end.min(input + D::INPUTS);
                        let at = (start + step * width) * D::BYTES;
                        // SAFETY: sixteen outputs belong to one task.
                        let to = unsafe { to.range(at..at + live * D::BYTES) };
                        for (lane, to) in to.chunks_exact_mut(D::BYTES).enumerate() {
                            D::store(&rows[lane * k..][inputs.clone()], to);
                        }
                    }
                }
            }
        });
    }
    let exponent = exponent_min.into_inner();
    DenseMatrix { kind, parts: parts.to_vec(), steps, exponent, data }
}
