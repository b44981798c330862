//! What a product does on the way in and out gives the bits of separate passes: for every type of weights, instruction set,
//! number of threads and rows.

mod common;

use ashlar_kernels::{BlockAxis, Input, Isa, Kernels, Output, PackedMatrix, Product, ThreadPool};
use ashlar_vocabulary::WeightType;
use common::{all_kernels, bits, numbers};
use std::ops::Range;

const EPS: f32 = 1e-5;

fn matrix(kind: WeightType, n: usize, parts: &[Range<usize>], seed: usize) -> PackedMatrix {
    let (pool, k) = (ThreadPool::new(1), parts.last().map_or(0, |part| part.end));
    if !kind.is_quantized() {
        let values = numbers(n * k, seed as u64);
        return PackedMatrix::pack(kind, n, parts, &pool, &|row, to| {
            to.copy_from_slice(&values[row * k..][..k]);
        });
    }
    PackedMatrix::pack_blocks(kind, n, BlockAxis::new(0, parts), &pool, &|row, to| {
        for (input, to) in to.quants.iter_mut().enumerate() {
            *to = ((row * 31 + input * 17 + seed) % 15) as u8;
        }
        for (index, to) in to.scales.iter_mut().enumerate() {
            (to.scale, to.min) = (0x2400 + (row + index) as u16 % 64, 0x2000);
            (to.sub_scales, to.sub_min) = ([5, -7], 9);
        }
    })
}

/// The product of separately normed rows, on one thread of portable code, row by row.
fn plain(
    rows: usize,
    x: &[f32],
    weights: &PackedMatrix,
    parts: &[Range<usize>],
    bias: Option<&[f32]>,
) -> Vec<f32> {
    let (kernels, k) = (Kernels::new(Isa::Portable, 1), weights.k());
    let mut y = vec![f32::NAN; rows * weights.n()];
    for (x, y) in x.chunks_exact(k).zip(y.chunks_exact_mut(weights.n())) {
        kernels.matmul(1, x, weights, parts, bias, y);
    }
    y
}

fn normed(rows: usize, x: &[f32], weight: &[f32]) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    Kernels::new(Isa::Portable, 1).rms_norm(rows, weight.len(), x, weight, EPS, &mut normed);
    normed
}

fn mixture(kinds: &[WeightType], n: usize, parts: &[Range<usize>]) -> PackedMatrix {
    let matrices = kinds.iter().enumerate().map(|(seed, &kind)| matrix(kind, n, parts, seed));
    PackedMatrix::stack(matrices.collect())
}

#[test]
fn rows_that_are_normed_on_the_way_in_give_the_bits_of_normed_rows() {
    // Not a multiple of 32: the last block is filled up.
    const K: usize = 1100;
    let whole: [Range<usize>; 1] = [0..K];
    let weight = numbers(K, 1);
    let mixtures = WeightType::ALL.map(|kind| vec![kind]).into_iter().chain([
        vec![WeightType::Q4K, WeightType::Q4K, WeightType::Q6K],
        vec![WeightType::F16, WeightType::Q8_0, WeightType::Bf16, WeightType::Q5_0, WeightType::Q6K],
    ]);
    for kinds in mixtures {
        let weights = mixture(&kinds, 80, &whole);
        let bias = numbers(weights.n(), 2);
        for rows in [1, 2, 7, 13, 100] {
            let x = numbers(rows * K, 3);
            let wanted = plain(rows, &normed(rows, &x, &weight), &weights, &whole, Some(&bias));
            for kernels in all_kernels() {
                let (mut room, mut y) = (vec![f32::NAN; rows * K], vec![f32::NAN; wanted.len()]);
                let product = Product { rows, weights: &weights, k_parts: &whole, bias: Some(&bias) };
                let input = Input::Normed { x: &x, weight: &weight, eps: EPS, room: &mut room };
                kernels.product(&product, input, Output::Write(&mut y));
                assert_eq!(bits(&y), bits(&wanted), "{kinds:?} × {rows}, {kernels:?}");
            }
        }
    }
}

#[test]
fn a_row_without_end_stays_apart_from_its_neighbours() {
    const K: usize = 96;
    let whole: [Range<usize>; 1] = [0..K];
    let (weight, weights) = (numbers(K, 1), matrix(WeightType::Q4_0, 64, &whole, 0));
    for bad in [f32::INFINITY, f32::NAN, f32::MAX] {
        let mut x = numbers(3 * K, 3);
        x[K + 40] = bad;
        let wanted = plain(3, &normed(3, &x, &weight), &weights, &whole, None);
        for kernels in all_kernels() {
            let (mut room, mut y) = (vec![0.0; 3 * K], vec![0.0; 3 * 64]);
            let product = Product { rows: 3, weights: &weights, k_parts: &whole, bias: None };
            let input = Input::Normed { x: &x, weight: &weight, eps: EPS, room: &mut room };
            kernels.product(&product, input, Output::Write(&mut y));
            let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
            assert!(y.iter().zip(&wanted).all(|(a, b)| same(a, b)), "{bad}, {kernels:?}");
            assert!(y[..64].iter().chain(&y[128..]).all(|y| y.is_finite()));
        }
    }
}

#[test]
fn results_added_to_a_residual_have_the_bits_of_a_product_and_a_sum() {
    const K: usize = 320;
    let parts: Vec<Range<usize>> = (0..8).map(|part| part * K / 8..(part + 1) * K / 8).collect();
    let bias = numbers(150, 2);
    for kind in WeightType::ALL {
        let weights = matrix(kind, 150, &parts, 0);
        for (rows, bias) in [(1, None), (9, Some(&bias[..])), (100, None)] {
            let (x, residual) = (numbers(rows * K, 3), numbers(rows * 150, 4));
            let mut wanted = residual.clone();
            all_kernels()[0].add(&mut wanted, &plain(rows, &x, &weights, &parts, bias));
            for kernels in all_kernels() {
                let mut y = residual.clone();
                let product = Product { rows, weights: &weights, k_parts: &parts, bias };
                kernels.product(&product, Input::Rows(&x), Output::Add { y: &mut y, stride: 150 });
                assert_eq!(bits(&y), bits(&wanted), "{kind} × {rows}, {kernels:?}");
            }
        }
    }
}

#[test]
fn gates_and_ups_give_the_bits_of_a_product_and_its_activation() {
    const K: usize = 96;
    let whole: [Range<usize>; 1] = [0..K];
    // In one segment with panels that fall in with its halves, and not; in two of one or different types; in three.
    let stacks = WeightType::ALL.map(|kind| (vec![kind], 256)).into_iter().chain([
        (vec![WeightType::Q4_0], 160),
        (vec![WeightType::Bf16], 34),
        (vec![WeightType::Q4K, WeightType::Q6K], 72),
        (vec![WeightType::F32, WeightType::F32], 64),
        (vec![WeightType::Q4K, WeightType::F16, WeightType::Q4K, WeightType::F16], 40),
    ]);
    for (kinds, n) in stacks {
        let weights = mixture(&kinds, n, &whole);
        let (n, bias) = (weights.n(), numbers(weights.n(), 2));
        for rows in [1, 5, 100] {
            let x = numbers(rows * K, 3);
            let mut wanted = vec![0.0; rows * n / 2];
            let gate_up = plain(rows, &x, &weights, &whole, Some(&bias));
            all_kernels()[0].silu_mul(rows, n / 2, &gate_up, &mut wanted);
            for kernels in all_kernels() {
                let (mut out, mut room) = (vec![f32::NAN; wanted.len()], vec![f32::NAN; rows * n]);
                let product = Product { rows, weights: &weights, k_parts: &whole, bias: Some(&bias) };
                let output = Output::SiluMul { out: &mut out, room: &mut room };
                kernels.product(&product, Input::Rows(&x), output);
                assert_eq!(bits(&out), bits(&wanted), "{kinds:?} × {rows}, {kernels:?}");
            }
        }
    }
}
