//! Products: one order of operations, whoever computes them.

mod common;

use ashlar_kernels::{Isa, Kernels, PackedMatrix, ThreadPool};
use ashlar_vocabulary::{AxisCut, WeightType};
use common::{all_kernels, bits, numbers};
use proptest::prelude::*;
use std::ops::Range;

fn pack(n: usize, columns: Range<usize>, k: usize, weights: &[f32]) -> PackedMatrix {
    PackedMatrix::pack(WeightType::F32, n, &[0..columns.len()], &ThreadPool::new(1), &|row, to| {
        to.copy_from_slice(&weights[row * k..][..k][columns.clone()])
    })
}

/// The contract, literally.
fn by_definition(
    rows: usize,
    n: usize,
    k: usize,
    x: &[f32],
    w: &[f32],
    parts: &[Range<usize>],
    bias: &[f32],
) -> Vec<f32> {
    fn tree(sums: &[Option<f32>]) -> Option<f32> {
        match *sums {
            [sum] => sum,
            _ => {
                let (left, right) = sums.split_at(sums.len() / 2);
                match (tree(left), tree(right)) {
                    (Some(left), Some(right)) => Some(left + right),
                    (left, right) => left.or(right),
                }
            }
        }
    }
    let mut y = Vec::new();
    for row in 0..rows {
        for output in 0..n {
            let chain = |part: &Range<usize>| {
                (!part.is_empty()).then(|| {
                    part.clone().fold(0.0f32, |sum, i| w[output * k + i].mul_add(x[row * k + i], sum))
                })
            };
            let sums: Vec<Option<f32>> = parts.iter().map(chain).collect();
            y.push(tree(&sums).unwrap_or(-0.0) + bias[output]);
        }
    }
    y
}

fn parts_strategy() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![Just(1usize), Just(2), Just(4), Just(8)].prop_flat_map(|count| {
        prop::collection::vec(prop_oneof![2 => Just(0usize), 5 => 1usize..60, 1 => 130usize..300], count)
    })
}

fn ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut start = 0;
    lengths
        .iter()
        .map(|len| {
            start += len;
            start - len..start
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_way_of_computing_a_product_gives_the_defined_bits(
        rows in 1usize..15, n in 1usize..150, lengths in parts_strategy(), seed: u64,
    ) {
        let parts = ranges(&lengths);
        let k: usize = lengths.iter().sum();
        let (x, w, bias) = (numbers(rows * k, seed), numbers(n * k, seed ^ 1), numbers(n, seed ^ 2));
        let expected = bits(&by_definition(rows, n, k, &x, &w, &parts, &bias));
        let packed = pack(n, 0..k, k, &w);
        for kernels in all_kernels() {
            let mut y = vec![f32::NAN; rows * n];
            kernels.matmul(rows, &x, &packed, &parts, Some(&bias), &mut y);
            prop_assert_eq!(&bits(&y), &expected, "{:?}", kernels);
            let row = rows / 2;
            let mut alone = vec![f32::NAN; n];
            kernels.matmul(1, &x[row * k..(row + 1) * k], &packed, &parts, Some(&bias), &mut alone);
            prop_assert_eq!(&bits(&alone)[..], &expected[row * n..(row + 1) * n]);
        }
    }

    #[test]
    fn tensor_parallel_ranks_sum_to_the_bits_of_one_rank(
        rows in 1usize..5, n in 1usize..70, granules in 1usize..40, granule in 1usize..9, seed: u64,
    ) {
        let cut = AxisCut::grouped(granules, granule);
        let k = cut.len();
        let (x, w) = (numbers(rows * k, seed), numbers(n * k, seed ^ 1));
        let kernels = &all_kernels()[0];
        let mut whole = vec![0.0; rows * n];
        kernels.matmul(rows, &x, &pack(n, 0..k, k, &w), &cut.rank_parts(0, 1), None, &mut whole);
        for size in [2, 4, 8] {
            let sums: Vec<Vec<f32>> = (0..size)
                .map(|rank| {
                    let columns = cut.rank(rank, size);
                    let share: Vec<f32> =
                        (0..rows).flat_map(|row| x[row * k..][..k][columns.clone()].to_vec()).collect();
                    let mut y = vec![f32::NAN; rows * n];
                    let packed = pack(n, columns, k, &w);
                    kernels.matmul(rows, &share, &packed, &cut.rank_parts(rank, size), None, &mut y);
                    y
                })
                .collect();
            let slices: Vec<&[f32]> = sums.iter().map(Vec::as_slice).collect();
            for kernels in all_kernels() {
                let mut sum = vec![f32::NAN; rows * n];
                kernels.sum_tree(&slices, &mut sum);
                prop_assert_eq!(bits(&sum), bits(&whole), "{} ranks", size);
            }
        }
    }
}

#[test]
fn large_batches_equal_their_rows() {
    let (rows, n, k) = (211, 200, 700);
    let (x, w) = (numbers(rows * k, 1), numbers(n * k, 2));
    let packed = pack(n, 0..k, k, &w);
    let parts = AxisCut::wide(k).rank_parts(0, 1);
    let mut alone = vec![0.0; rows * n];
    for row in 0..rows {
        all_kernels()[0].matmul(1, &x[row * k..][..k], &packed, &parts, None, &mut alone[row * n..][..n]);
    }
    for kernels in all_kernels().iter().filter(|kernels| kernels.isa() != Isa::Portable) {
        let mut y = vec![f32::NAN; rows * n];
        kernels.matmul(rows, &x, &packed, &parts, None, &mut y);
        assert!(bits(&y) == bits(&alone), "{kernels:?}");
    }
}

#[test]
fn products_are_close_to_double_precision() {
    let (rows, n, k) = (3, 70, 2048);
    let (x, w) = (numbers(rows * k, 3), numbers(n * k, 4));
    let mut y = vec![0.0; rows * n];
    Kernels::new(Isa::best(), 2).matmul(
        rows,
        &x,
        &pack(n, 0..k, k, &w),
        &AxisCut::wide(k).rank_parts(0, 1),
        None,
        &mut y,
    );
    for (index, &y) in y.iter().enumerate() {
        let (row, output) = (index / n, index % n);
        let terms = || (0..k).map(|i| f64::from(x[row * k + i]) * f64::from(w[output * k + i]));
        let magnitude: f64 = terms().map(f64::abs).sum();
        assert!((f64::from(y) - terms().sum::<f64>()).abs() < 1e-6 * magnitude);
    }
}

#[test]
fn empty_shapes_are_fine_and_an_empty_axis_yields_the_bias() {
    for kernels in all_kernels() {
        let packed = PackedMatrix::pack(WeightType::F32, 5, &[0..0], &ThreadPool::new(1), &|_, _| ());
        let mut y = vec![f32::NAN; 10];
        kernels.matmul(2, &[], &packed, &[0..0, 0..0], Some(&[1.0, 2.0, 3.0, 4.0, 5.0]), &mut y);
        assert_eq!(y, [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        kernels.matmul(2, &[], &packed, std::slice::from_ref(&(0..0)), None, &mut y);
        assert!(y.iter().all(|&y| y == 0.0));
        kernels.matmul(0, &[], &packed, std::slice::from_ref(&(0..0)), None, &mut []);
    }
}
