//! Gradients: the same bits on every instruction set, for any threads, cut and batch, and those of double precision.

#![allow(clippy::unwrap_used)]

mod common;

use ashlar_kernels::{
    AdamW, AttentionShape, BlockAxis, BlockScale, CrossEntropyRow, Input, Kernels, KvLayout, LogSumExp,
    Output, PackedMatrix, Product, StridedRows,
};
use ashlar_vocabulary::WeightType;
use common::{all_kernels, bits, everywhere, numbers};
use proptest::prelude::*;
use std::ops::Range;

fn dense(kind: WeightType, n: usize, parts: &[Range<usize>], weights: &[f32]) -> PackedMatrix {
    let k = parts.last().unwrap().end;
    let pool = all_kernels()[0].pool();
    PackedMatrix::pack(kind, n, parts, pool, &|row, to| to.copy_from_slice(&weights[row * k..][..k]))
}

/// A matrix of a block format with arbitrary quants and scales.
fn blocks(kind: WeightType, n: usize, parts: &[Range<usize>], seed: u64) -> PackedMatrix {
    let axis = BlockAxis::new(0, parts);
    let pieces = axis.pieces().len();
    let k = axis.k();
    let most = match kind {
        WeightType::Q8_0 => 256,
        WeightType::Q6K => 64,
        WeightType::Q5_0 | WeightType::Q5_1 | WeightType::Q5K => 32,
        _ => 16,
    };
    PackedMatrix::pack_blocks(kind, n, axis, all_kernels()[0].pool(), &|row, to| {
        let random = numbers(k + 4 * pieces, seed ^ row as u64);
        for (quant, random) in to.quants.iter_mut().zip(&random) {
            *quant = ((random.abs() * 7919.0) as usize % most) as u8;
        }
        for (index, scale) in to.scales.iter_mut().enumerate() {
            let random = |at: usize| (random[k + 4 * index + at].abs() * 1000.0) as u32;
            *scale = BlockScale {
                scale: 0x2800 + (random(0) % 0x800) as u16,
                min: 0x2400 + (random(1) % 0x800) as u16,
                sub_scales: [(random(2) % 60) as i8, (random(3) % 60) as i8],
                sub_min: (random(3) % 60) as u8,
            };
        }
    })
}

fn all_rows(matrix: &PackedMatrix) -> Vec<f32> {
    let mut rows = vec![0.0; matrix.n() * matrix.k()];
    rows.chunks_exact_mut(matrix.k()).enumerate().for_each(|(row, to)| matrix.row(row, to));
    rows
}

/// dy·W as the contract defines it: a chain per part over its ranges, then the tree; `None` is a part without outputs.
fn chains(
    dy: &[f32],
    weights: &[f32],
    (n, k): (usize, usize),
    parts: &[Vec<Range<usize>>],
    rows: usize,
) -> Vec<f32> {
    fn tree(parts: &[Option<f32>]) -> Option<f32> {
        match parts {
            [part] => *part,
            _ => {
                let (left, right) = parts.split_at(parts.len() / 2);
                match (tree(left), tree(right)) {
                    (Some(left), Some(right)) => Some(left + right),
                    (left, right) => left.or(right),
                }
            }
        }
    }
    let mut dx = Vec::new();
    for row in 0..rows {
        for input in 0..k {
            let part = |ranges: &Vec<Range<usize>>| {
                let outputs: Vec<usize> = ranges.iter().flat_map(Clone::clone).collect();
                let chain = outputs
                    .iter()
                    .fold(0.0f32, |sum, &o| weights[o * k + input].mul_add(dy[row * n + o], sum));
                (!outputs.is_empty()).then_some(chain)
            };
            dx.push(tree(&parts.iter().map(part).collect::<Vec<_>>()).unwrap_or(-0.0));
        }
    }
    dx
}

/// Eight parts of an axis, some of them empty.
fn eight(n: usize) -> Vec<Vec<Range<usize>>> {
    (0..8).map(|part| vec![part * n / 8..(part + 1) * n / 8]).collect()
}

#[test]
fn input_gradients_larger_than_a_task_are_the_contracts_chains() {
    // More rows than a task's, more inputs, more outputs than are widened together; parts begin anywhere; rows are strided.
    let (rows, n, k) = (275, 308, 600);
    let plain = dense(WeightType::F32, n, &[0..k], &numbers(n * k, 1));
    let blocks = blocks(WeightType::Q8_0, n, &[0..172, 172..600], 2);
    let stride = n + 5;
    let (dy, before) = (numbers(rows * stride, 3), numbers(rows * k, 4));
    let narrow: Vec<f32> = dy.chunks_exact(stride).flat_map(|row| &row[..n]).copied().collect();
    let fused = vec![vec![0..90, 200..230], vec![90..200, 230..308]];
    let one: [Range<usize>; 1] = [0..n];
    for matrix in [plain, blocks] {
        let weights = all_rows(&matrix);
        for parts in [vec![one.to_vec()], eight(n), fused.clone()] {
            let dy = StridedRows { data: &dy, stride };
            let expected = chains(&narrow, &weights, (n, k), &parts, rows);
            let dx = everywhere(|kernels| {
                let mut dx = vec![f32::NAN; rows * k];
                kernels.input_gradient(rows, dy, &matrix, &parts, &mut dx);
                dx
            });
            assert_eq!(bits(&dx), bits(&expected));
            let added = everywhere(|kernels| {
                let mut dx = before.clone();
                kernels.add_input_gradient(rows, dy, &matrix, &parts, &mut dx);
                dx
            });
            let expected: Vec<f32> = before.iter().zip(&expected).map(|(a, b)| a + b).collect();
            assert_eq!(bits(&added), bits(&expected));
        }
    }
}

#[test]
fn weight_gradients_of_many_rows_are_one_chain() {
    let rows = 1100;
    for (n, k) in [(130, 16), (16, 130), (101, 7), (64, 64)] {
        let (dy, x, start) = (numbers(rows * n, 1), numbers(rows * k, 2), numbers(n * k, 3));
        let found = everywhere(|kernels| {
            let mut gradient = start.clone();
            let (dy, x) = (StridedRows { data: &dy, stride: n }, StridedRows { data: &x, stride: k });
            kernels.weight_gradient(rows, (dy, n), (x, k), &mut gradient);
            gradient
        });
        for at in 0..n * k {
            let (output, input) = (at / k, at % k);
            let chain =
                (0..rows).fold(start[at], |sum, row| dy[row * n + output].mul_add(x[row * k + input], sum));
            assert_eq!(found[at].to_bits(), chain.to_bits(), "{n} × {k}: {output}, {input}");
        }
    }
}

#[test]
fn a_product_added_to_rows_is_the_product_and_then_an_addition() {
    let (rows, n, k, stride) = (130, 70, 16, 75);
    let matrix = dense(WeightType::F32, n, &[0..k], &numbers(n * k, 1));
    let (x, before) = (numbers(rows * k, 2), numbers(rows * stride, 3));
    let whole: [Range<usize>; 1] = [0..k];
    let product = everywhere(|kernels| {
        let mut y = vec![0.0; rows * n];
        kernels.matmul(rows, &x, &matrix, &whole, None, &mut y);
        y
    });
    let added = everywhere(|kernels| {
        let mut y = before.clone();
        let product = Product { rows, weights: &matrix, k_parts: &whole, bias: None };
        kernels.product(&product, Input::Rows(&x), Output::Add { y: &mut y, stride });
        y
    });
    for (at, (found, before)) in added.iter().zip(&before).enumerate() {
        let (row, column) = (at / stride, at % stride);
        let expected = if column < n { before + product[row * n + column] } else { *before };
        assert_eq!(found.to_bits(), expected.to_bits());
    }
}

#[test]
fn the_gradients_of_rows_of_logits_are_those_of_each_row() {
    let (rows, width) = (9, 2500);
    let logits = numbers(rows * width, 5);
    let parts = [0..700, 700..700, 700..2500];
    everywhere(|kernels| {
        let largest = kernels.largest_of_rows(width, &logits);
        let max: Vec<f32> = largest.iter().map(|&(max, _)| max).collect();
        let sums = kernels.exp_sums_of_rows(width, &logits, &max, &parts);
        let mut all = logits.clone();
        let of = |row: usize| kernels.log_sum_exp(&logits[row * width..][..width]);
        let with: Vec<_> = (0..rows)
            .map(|row| CrossEntropyRow { of: of(row), target: (row % 2 == 0).then_some(row), factor: 0.5 })
            .collect();
        kernels.cross_entropy_gradients(width, &mut all, &with);
        for (row, logits) in logits.chunks_exact(width).enumerate() {
            let max = kernels.max(logits);
            assert_eq!(largest[row], (max, logits.iter().position(|&x| x == max)));
            for (part, sum) in parts.iter().zip(&sums[row * parts.len()..]) {
                let expected =
                    if part.is_empty() { -0.0 } else { kernels.exp_sum(&logits[part.clone()], max) };
                assert_eq!(sum.to_bits(), expected.to_bits());
            }
            let mut one = logits.to_vec();
            kernels.cross_entropy_gradient(&mut one, with[row].of, with[row].target, 0.5);
            assert_eq!(bits(&all[row * width..][..width]), bits(&one));
        }
        all
    });
    assert_eq!(all_kernels()[0].largest_of_rows(0, &[]), []);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn input_gradients_of_plain_weights_are_the_contracts_chains(
        rows in 1usize..20, n in 1usize..150, k in 1usize..150, seed: u64,
    ) {
        for kind in [WeightType::F32, WeightType::F16, WeightType::Bf16] {
            let matrix = dense(kind, n, &[0..k / 3, k / 3..k], &numbers(n * k, seed));
            let (weights, dy) = (all_rows(&matrix), numbers(rows * n, seed ^ 1));
            // Uncut; in eight parts; in two parts that take their outputs from both halves, as fused matrices do.
            let (a, b) = (n / 4, n / 2);
            let fused = vec![vec![0..a, b..(a + b).min(n)], vec![a..b, (a + b).min(n)..n]];
            let one: [Range<usize>; 1] = [0..n];
            for parts in [vec![one.to_vec()], eight(n), fused] {
                let dx = everywhere(|kernels| {
                    let mut dx = vec![f32::NAN; rows * k];
                    kernels.input_gradient(rows, StridedRows { data: &dy, stride: n }, &matrix, &parts, &mut dx);
                    dx
                });
                prop_assert_eq!(bits(&dx), bits(&chains(&dy, &weights, (n, k), &parts, rows)));
            }
        }
    }

    #[test]
    fn input_gradients_of_quantised_weights_are_those_of_the_numbers_they_stand_for(
        rows in 1usize..8, n in 1usize..100, seed: u64,
    ) {
        use WeightType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        for kind in [Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K] {
            let matrix = PackedMatrix::stack(vec![
                blocks(kind, n, &[0..172, 172..300, 300..512, 512..512], seed),
                blocks(Q8_0, 7, &[0..172, 172..300, 300..512, 512..512], seed ^ 3),
            ]);
            let (n, k) = (n + 7, 512);
            let (weights, dy) = (all_rows(&matrix), numbers(rows * n, seed ^ 1));
            let parts = eight(n);
            let dx = everywhere(|kernels| {
                let mut dx = vec![f32::NAN; rows * k];
                kernels.input_gradient(rows, StridedRows { data: &dy, stride: n }, &matrix, &parts, &mut dx);
                dx
            });
            prop_assert_eq!(bits(&dx), bits(&chains(&dy, &weights, (n, k), &parts, rows)));
        }
    }

    #[test]
    fn weight_gradients_are_one_chain_however_rows_are_cut(
        rows in 1usize..60, n in 1usize..130, k in 1usize..100, cut in 0.0f64..1.0, seed: u64,
    ) {
        let (dy, x) = (numbers(rows * (n + 3), seed), numbers(rows * (k + 5), seed ^ 1));
        let start = numbers(n * k, seed ^ 2);
        let compute = |kernels: &Kernels, cuts: &[usize]| {
            let mut gradient = start.clone();
            for cut in cuts.windows(2) {
                let dy = StridedRows { data: &dy[cut[0] * (n + 3)..], stride: n + 3 };
                let x = StridedRows { data: &x[cut[0] * (k + 5)..], stride: k + 5 };
                kernels.weight_gradient(cut[1] - cut[0], (dy, n), (x, k), &mut gradient);
            }
            gradient
        };
        let whole = everywhere(|kernels| compute(kernels, &[0, rows]));
        let middle = (rows as f64 * cut) as usize;
        prop_assert_eq!(bits(&compute(&all_kernels()[0], &[0, middle, rows])), bits(&whole));
        for output in 0..n {
            for input in 0..k {
                let chain = (0..rows).fold(start[output * k + input], |sum, row| {
                    dy[row * (n + 3) + output].mul_add(x[row * (k + 5) + input], sum)
                });
                prop_assert_eq!(whole[output * k + input].to_bits(), chain.to_bits());
            }
        }
    }

    #[test]
    fn gradients_of_rows_are_close_to_exact(rows in 1usize..20, dim in 1usize..150, seed: u64) {
        let (x, dy, weight) = (numbers(rows * dim, seed), numbers(rows * dim, seed ^ 1), numbers(dim, seed ^ 2));
        let dx = everywhere(|kernels| {
            let mut dx = dy.clone();
            let x = StridedRows { data: &x, stride: dim };
            kernels.rms_norm_gradient(rows, 1, dim, x, &weight, 1e-5, &mut dx, dim);
            dx
        });
        let d_weight = everywhere(|kernels| {
            let mut gradient = vec![0.0; dim];
            let (x, dy) = (StridedRows { data: &x, stride: dim }, StridedRows { data: &dy, stride: dim });
            kernels.rms_norm_weight_gradient(rows, 1, dim, x, 1e-5, dy, &mut gradient);
            gradient
        });
        let mut exact_weight = vec![0.0; dim];
        for row in 0..rows {
            let at = row * dim..(row + 1) * dim;
            let (x, dy, dx) = (&x[at.clone()], &dy[at.clone()], &dx[at]);
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / dim as f64 + 1e-5;
            let along: f64 =
                (0..dim).map(|i| f64::from(x[i]) * f64::from(weight[i]) * f64::from(dy[i])).sum::<f64>();
            for i in 0..dim {
                let straight = f64::from(weight[i]) * f64::from(dy[i]) / mean.sqrt();
                let back = f64::from(x[i]) * along / dim as f64 / mean.powf(1.5);
                let size = straight.abs() + f64::from(x[i]).abs() * 64.0 / mean.sqrt();
                prop_assert!((f64::from(dx[i]) - (straight - back)).abs() <= 1e-5 * size);
                exact_weight[i] += f64::from(dy[i]) * f64::from(x[i]) / mean.sqrt();
            }
        }
        for (found, exact) in d_weight.iter().zip(exact_weight) {
            prop_assert!((f64::from(*found) - exact).abs() <= 1e-4 * (1.0 + exact.abs()));
        }
    }

    #[test]
    fn the_gradient_of_silu_is_close_to_exact(rows in 1usize..20, dim in 1usize..300, seed: u64) {
        let (gate_up, d_out) = (numbers(rows * 2 * dim, seed), numbers(rows * dim, seed ^ 1));
        let found = everywhere(|kernels| {
            let mut gradient = vec![f32::NAN; rows * 2 * dim];
            kernels.silu_mul_gradient(rows, dim, &gate_up, &d_out, &mut gradient);
            gradient
        });
        for row in 0..rows {
            for i in 0..dim {
                let at = row * 2 * dim + i;
                let (g, u) = (f64::from(gate_up[at]), f64::from(gate_up[at + dim]));
                let d = f64::from(d_out[row * dim + i]);
                let sigma = 1.0 / (1.0 + (-g).exp());
                let exact = [d * u * sigma * (1.0 + g * (1.0 - sigma)), d * g * sigma];
                for (found, exact) in [found[at], found[at + dim]].into_iter().zip(exact) {
                    prop_assert!((f64::from(found) - exact).abs() <= 2e-6 * (d * u).abs().max(exact.abs()));
                }
            }
        }
    }

    #[test]
    fn the_gradient_of_a_cross_entropy_sums_to_zero(len in 1usize..500, seed: u64) {
        let logits = numbers(len, seed);
        let target = seed as usize % len;
        let found = everywhere(|kernels| {
            let (mut x, of): (_, LogSumExp) = (logits.clone(), kernels.log_sum_exp(&logits));
            // In two slices, as two ranks would.
            let (left, right) = x.split_at_mut(len / 2);
            let (here, there) = (target < len / 2, target >= len / 2);
            kernels.cross_entropy_gradient(left, of, here.then_some(target), 0.25);
            kernels.cross_entropy_gradient(right, of, there.then(|| target - len / 2), 0.25);
            x
        });
        let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
        for (i, (&found, &x)) in found.iter().zip(&logits).enumerate() {
            let exact = (f64::from(x).exp() / sum - f64::from(u8::from(i == target))) * 0.25;
            prop_assert!((f64::from(found) - exact).abs() <= 1e-6);
        }
    }
}

/// Attention of whole sequences and a loss Σ out·g in double precision.
fn exact_attention(shape: &AttentionShape, rows: &Range<usize>, qkv: &[f64], g: &[f64]) -> f64 {
    let (d, kv_heads) = (shape.layout.head_dim, shape.layout.kv_heads);
    let stride = (shape.q_heads + 2 * kv_heads) * d;
    let mut loss = 0.0;
    for i in 0..rows.len() {
        for head in 0..shape.q_heads {
            let kv = head / (shape.q_heads / kv_heads);
            let at = |row: usize, head: usize| &qkv[(rows.start + row) * stride + head * d..][..d];
            let first = shape.window.map_or(0, |window| (i + 1).saturating_sub(window as usize));
            let dots: Vec<f64> = (first..=i)
                .map(|j| {
                    let key = at(j, shape.q_heads + kv);
                    at(i, head).iter().zip(key).map(|(a, b)| a * b).sum::<f64>() * f64::from(shape.scale)
                })
                .collect();
            let max = dots.iter().copied().fold(f64::MIN, f64::max);
            let p: Vec<f64> = dots.iter().map(|s| (s - max).exp()).collect();
            let sum: f64 = p.iter().sum();
            for (j, p) in (first..=i).zip(p) {
                let value = at(j, shape.q_heads + kv_heads + kv);
                let g = &g[((rows.start + i) * shape.q_heads + head) * d..][..d];
                loss += p / sum * value.iter().zip(g).map(|(a, b)| a * b).sum::<f64>();
            }
        }
    }
    loss
}

fn attention_output(shape: &AttentionShape, sequences: &[Range<usize>], qkv: &[f32]) -> Vec<f32> {
    // Each element of the output is the loss of a gradient of one.
    let d = shape.layout.head_dim;
    let rows = sequences.iter().map(|range| range.end).max().unwrap();
    let qkv: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
    let mut out = vec![0.0; rows * shape.q_heads * d];
    for sequence in sequences {
        for at in sequence.start * shape.q_heads * d..sequence.end * shape.q_heads * d {
            let mut g = vec![0.0; out.len()];
            g[at] = 1.0;
            out[at] = exact_attention(shape, sequence, &qkv, &g) as f32;
        }
    }
    out
}

#[test]
fn the_gradient_of_attention_is_that_of_finite_differences_and_of_the_sequence_alone() {
    for (q_heads, kv_heads, head_dim, window) in
        [(4, 2, 8, None), (2, 2, 16, Some(5)), (3, 1, 20, None), (2, 1, 68, None)]
    {
        let layout = KvLayout { kv_heads, head_dim };
        let shape = AttentionShape { layout, q_heads, scale: 0.3, window, softcap: None };
        let sequences = [0..7, 7..8, 9..20];
        let (rows, stride) = (20, (q_heads + 2 * kv_heads) * head_dim);
        let qkv = numbers(rows * stride, 5);
        let g = numbers(rows * q_heads * head_dim, 6);
        let out = attention_output(&shape, &sequences, &qkv);
        let gradient = |kernels: &Kernels, sequences: &[Range<usize>]| {
            let mut d_qkv = vec![7.0; rows * stride];
            let qkv = StridedRows { data: &qkv, stride };
            kernels.attention_gradient(&shape, sequences, qkv, &out, &g, &mut d_qkv);
            d_qkv
        };
        let found = everywhere(|kernels| gradient(kernels, &sequences));
        assert!(found[8 * stride..9 * stride].iter().all(|&x| x == 7.0), "a row of no sequence");
        for sequence in &sequences {
            let alone = gradient(&all_kernels()[0], std::slice::from_ref(sequence));
            let at = sequence.start * stride..sequence.end * stride;
            assert_eq!(bits(&alone[at.clone()]), bits(&found[at]));
        }
        let exact: Vec<f64> = qkv.iter().map(|&x| f64::from(x)).collect();
        let g: Vec<f64> = g.iter().map(|&x| f64::from(x)).collect();
        for sequence in &sequences {
            for at in (sequence.start * stride..sequence.end * stride).step_by(3) {
                let loss = |by: f64| {
                    let mut moved = exact.clone();
                    moved[at] += by;
                    exact_attention(&shape, sequence, &moved, &g)
                };
                let slope = (loss(1e-4) - loss(-1e-4)) / 2e-4;
                let error = (f64::from(found[at]) - slope).abs();
                assert!(error <= 2e-5 * (1.0 + slope.abs()), "{at}: {} {slope}", found[at]);
            }
        }
    }
}

#[test]
fn long_sequences_have_the_same_gradient_everywhere() {
    let layout = KvLayout { kv_heads: 1, head_dim: 64 };
    let shape = AttentionShape { layout, q_heads: 2, scale: 0.125, window: Some(100), softcap: None };
    let (rows, stride) = (300, 4 * 64);
    let (qkv, out, g) = (numbers(rows * stride, 1), numbers(rows * 128, 2), numbers(rows * 128, 3));
    let whole = 0..rows;
    everywhere(|kernels| {
        let mut d_qkv = vec![0.0; rows * stride];
        let qkv = StridedRows { data: &qkv, stride };
        let sequences = std::slice::from_ref(&whole);
        kernels.attention_gradient(&shape, sequences, qkv, &out, &g, &mut d_qkv);
        d_qkv
    });
}

#[test]
fn adamw_moves_as_defined() {
    let len = 40_000;
    let (gradient, start) = (numbers(len, 1), numbers(len, 2));
    let run = |kernels: &Kernels| {
        let (mut weights, mut first, mut second) = (start.clone(), vec![0.0; len], vec![0.0; len]);
        for step in 1..=3 {
            let with = AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.1,
                step,
                gradient_factor: 0.5,
            };
            kernels.adamw(&with, &gradient, &mut weights, &mut first, &mut second);
        }
        weights
    };
    let found = everywhere(run);
    for i in (0..len).step_by(97) {
        let (mut w, mut m, mut v, g) = (f64::from(start[i]), 0.0, 0.0, f64::from(gradient[i]) * 0.5);
        for t in 1..=3 {
            m = 0.9 * m + 0.1 * g;
            v = 0.999 * v + 0.001 * g * g;
            let (m, v) = (m / (1.0 - 0.9f64.powi(t)), v / (1.0 - 0.999f64.powi(t)));
            w = w * (1.0 - 1e-3) - 1e-2 * m / (v.sqrt() + 1e-8);
        }
        assert!((f64::from(found[i]) - w).abs() < 1e-5 * (1.0 + w.abs()), "{}: {w}", found[i]);
    }
}
