//! Products with f16 and bf16 weights: their definition, bit for bit, on every instruction set and in every batch.

mod common;

use ashlar_kernels::{Isa, Kernels, PackedMatrix, ThreadPool};
use ashlar_vocabulary::WeightType;
use common::numbers;
use std::ops::Range;

/// Nearest brain float, ties to even, subnormals flushed.
fn brain(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000);
    flush(rounded)
}

fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0f32.copysign(x) } else { x }
}

/// One chain over a part of the inputs.
fn chain(kind: WeightType, w: &[f32], x: &[f32]) -> f32 {
    if w.is_empty() {
        return -0.0;
    }
    let mut sum = 0f32;
    match kind {
        // Pairs, a part of odd length ending in half of one.
        WeightType::Bf16 => {
            for (w, x) in w.chunks(2).zip(x.chunks(2)) {
                let at = |v: &[f32], i: usize| v.get(i).map_or(0.0, |v| brain(*v));
                sum = flush(at(w, 0).mul_add(at(x, 0), sum));
                sum = flush(at(w, 1).mul_add(at(x, 1), sum));
            }
        }
        _ => {
            for (w, x) in w.iter().zip(x) {
                sum = w.mul_add(*x, sum);
            }
        }
    }
    sum
}

fn tree(sums: &[f32]) -> f32 {
    match sums {
        [one] => *one,
        _ => {
            let (a, b) = sums.split_at(sums.len() / 2);
            tree(a) + tree(b)
        }
    }
}

fn check(kind: WeightType, scale: f32) {
    for (n, k) in [(1, 2), (16, 64), (70, 96), (33, 333)] {
        let cuts: [Vec<Range<usize>>; 2] = [vec![0..k], vec![0..k / 3, k / 3..k]];
        for parts in &cuts {
            // Eleven bits of mantissa, so that f16 holds them as they are.
            let w: Vec<f32> = numbers(n * k, 1)
                .iter()
                .map(|w| if kind == WeightType::F16 { (w * 64.0).round() / 64.0 } else { w * scale })
                .collect();
            let batch = 29;
            let x: Vec<f32> = numbers(batch * k, 2).iter().map(|x| x * scale).collect();
            let packed = PackedMatrix::pack(kind, n, parts, &ThreadPool::new(2), &|row, to| {
                to.copy_from_slice(&w[row * k..][..k]);
            });
            let expected: Vec<u32> = x
                .chunks(k)
                .flat_map(|x| {
                    w.chunks(k).map(|w| {
                        let sums: Vec<f32> =
                            parts.iter().map(|p| chain(kind, &w[p.clone()], &x[p.clone()])).collect();
                        tree(&sums).to_bits()
                    })
                })
                .collect();
            for isa in Isa::available() {
                for (threads, count) in [(1, 1), (2, 2), (1, 5), (2, 6), (1, 13), (2, batch)] {
                    let mut y = vec![f32::NAN; count * n];
                    Kernels::new(isa, threads).matmul(count, &x[..count * k], &packed, parts, None, &mut y);
                    for (index, (y, expected)) in y.iter().zip(&expected).enumerate() {
                        let same = y.to_bits() == *expected;
                        let expected = f32::from_bits(*expected);
                        assert!(
                            same,
                            "{kind} {n}×{k} {isa}, {count} rows, element {index}: {y:e}, not {expected:e}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn halves_widen_and_multiply_like_f32() {
    check(WeightType::F16, 1.0);
}

#[test]
fn brain_floats_multiply_in_pairs_the_earlier_input_first() {
    check(WeightType::Bf16, 1.0);
}

#[test]
fn sums_of_brain_floats_too_small_to_be_normal_become_zero() {
    // Products around 1e-38, where the hardware flushes.
    check(WeightType::Bf16, 1e-19);
    check(WeightType::Bf16, 4e-20);
}

#[test]
fn a_half_takes_two_bytes() {
    for kind in [WeightType::F16, WeightType::Bf16] {
        let packed = PackedMatrix::pack(kind, 64, &[0..512], &ThreadPool::new(1), &|_, _| {});
        assert_eq!(packed.bytes(), 2 * 64 * 512);
    }
}
