//! Row-wise kernels: the same bits for any batch, thread count and instruction set, and close to double precision.

mod common;

use ashlar_kernels::{Isa, Kernels, Llama3Scaling, inv_freq, scale_inv_freq_linear, scale_inv_freq_llama3};
use common::{bits, everywhere, numbers};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn normalised_rows_are_their_own_and_close_to_exact(rows in 1usize..40, dim in 1usize..200, seed: u64) {
        let (x, weight) = (numbers(rows * dim, seed), numbers(dim, seed ^ 1));
        let out = everywhere(|kernels| {
            let mut out = vec![f32::NAN; rows * dim];
            kernels.rms_norm(rows, dim, &x, &weight, 1e-5, &mut out);
            out
        });
        // In place, as one of two groups in a wider row.
        let in_place = everywhere(|kernels| {
            let mut wide: Vec<f32> = x.chunks(dim).flat_map(|row| [row, row, &[7.0]].concat()).collect();
            kernels.rms_norm_in_place(rows, 2, dim, &mut wide, 2 * dim + 1, &weight, 1e-5);
            wide
        });
        for row in 0..rows {
            let (x, out) = (&x[row * dim..][..dim], &out[row * dim..][..dim]);
            let wide = &in_place[row * (2 * dim + 1)..][..2 * dim + 1];
            prop_assert_eq!(&bits(&wide[..dim]), &bits(out));
            prop_assert_eq!(&bits(&wide[dim..2 * dim]), &bits(out));
            prop_assert_eq!(wide[2 * dim], 7.0);
            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / dim as f64;
            for i in 0..dim {
                let exact = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                prop_assert!((f64::from(out[i]) - exact).abs() <= 2e-6 * exact.abs());
            }
        }
    }

    #[test]
    fn elementwise_kernels_agree_everywhere(rows in 1usize..30, dim in 1usize..700, seed: u64) {
        let gate_up = numbers(rows * dim * 2, seed);
        let silu = everywhere(|kernels| {
            let mut out = vec![f32::NAN; rows * dim];
            kernels.silu_mul(rows, dim, &gate_up, &mut out);
            out
        });
        for (index, &silu) in silu.iter().enumerate() {
            let at = index / dim * 2 * dim + index % dim;
            let (gate, up) = (f64::from(gate_up[at]), f64::from(gate_up[at + dim]));
            let exact = gate / (1.0 + (-gate).exp()) * up;
            prop_assert!((f64::from(silu) - exact).abs() <= 1e-6 * exact.abs());
        }
        let (x, y) = (numbers(rows * dim, seed ^ 1), numbers(rows * dim, seed ^ 2));
        let sum = everywhere(|kernels| {
            let mut sum = x.clone();
            kernels.add(&mut sum, &y);
            sum
        });
        prop_assert!(sum.iter().zip(x.iter().zip(&y)).all(|(sum, (x, y))| *sum == x + y));
    }

    #[test]
    fn rotation_agrees_everywhere_and_with_the_definition(
        rows in 1usize..12, heads in 1usize..4, half in 1usize..40, kept in 0usize..9, position in 0u32..100_000, seed: u64,
    ) {
        let (head_dim, stride) = (2 * half + kept, heads * (2 * half + kept) + 5);
        let frequencies = inv_freq(10_000.0, 2 * half);
        let positions: Vec<u32> = (0..rows as u32).map(|row| position + row * 7).collect();
        let x = numbers(rows * stride, seed);
        let rotated = everywhere(|kernels| {
            let (mut cos, mut sin) = (vec![0.0; rows * half], vec![0.0; rows * half]);
            kernels.rope_angles(&positions, &frequencies, 1.0, &mut cos, &mut sin);
            let mut x = x.clone();
            kernels.rope(rows, heads, head_dim, &mut x, stride, &cos, &sin);
            x
        });
        for (row, &position) in positions.iter().enumerate() {
            for column in 0..stride {
                let (head, element, at) = (column / head_dim, column % head_dim, row * stride + column);
                let expected = if head >= heads || element >= 2 * half {
                    f64::from(x[at])
                } else {
                    let angle = f64::from(position as f32 * frequencies[element % half]);
                    let own = f64::from(x[at]) * angle.cos();
                    if element < half {
                        own - f64::from(x[at + half]) * angle.sin()
                    } else {
                        own + f64::from(x[at - half]) * angle.sin()
                    }
                };
                prop_assert!((f64::from(rotated[at]) - expected).abs() < 3e-6);
            }
        }
    }
}

#[test]
fn frequencies_follow_the_definition_and_its_scalings() {
    let plain = inv_freq(500_000.0, 64);
    assert_eq!((plain.len(), plain[0]), (32, 1.0));
    for (i, &frequency) in plain.iter().enumerate() {
        let exact = 500_000f64.powf(-(2.0 * i as f64) / 64.0);
        assert!((f64::from(frequency) - exact).abs() <= 6e-8 * exact);
    }
    let mut linear = plain.clone();
    scale_inv_freq_linear(&mut linear, 4.0);
    assert!(linear.iter().zip(&plain).all(|(linear, plain)| *linear == plain / 4.0));
    let mut llama3 = plain.clone();
    let scaling = Llama3Scaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192.0,
    };
    scale_inv_freq_llama3(&mut llama3, scaling);
    assert_eq!(llama3[0], 1.0, "short wavelengths stay");
    assert!((llama3[31] - plain[31] / 32.0).abs() < 1e-12, "long ones are stretched");
    assert!(llama3.windows(2).all(|pair| pair[0] > pair[1]));
}

#[test]
fn unavailable_or_misfit_calls_panic_and_available_ones_print() {
    let kernels = Kernels::new(Isa::best(), 2);
    assert!(format!("{kernels:?}").contains("threads: 2"));
    let misfit = std::panic::catch_unwind(|| kernels.add(&mut [0.0; 3], &[0.0; 4]));
    assert!(misfit.is_err());
}
