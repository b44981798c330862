//! Elementary functions.

use ashlar_kernels::math::{LaneFunction, exp, exp_f32, log, pow, sin_cos};
use ashlar_kernels::sampling::uniform;
use ashlar_kernels::{Isa, Kernels};

const LANES: usize = 16;
/// The lowest argument whose exponential is not zero.
const LOWEST: f32 = -87.336_54;

#[test]
fn the_exponential_is_within_two_units_and_the_same_everywhere() {
    let kernels: Vec<Kernels> = Isa::available().into_iter().map(|isa| Kernels::new(isa, 1)).collect();
    let mut worst = 0.0f64;
    for step in 0..25_000 {
        let x: [f32; LANES] =
            std::array::from_fn(|lane| (step * LANES + lane) as f32 * (178.0 / 400_000.0) - 89.0);
        for kernels in &kernels {
            let mut y = x;
            kernels.apply(LaneFunction::Exp, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                assert_eq!(y.to_bits(), exp_f32(x).to_bits(), "{} at {x}", kernels.isa());
                let exact = f64::from(x).exp();
                if (f64::from(f32::MIN_POSITIVE)..f64::from(f32::MAX)).contains(&exact) {
                    let unit = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                    worst = worst.max((f64::from(y) - exact).abs() / unit);
                }
            }
        }
    }
    assert!(worst < 1.5, "{worst} units");
}

#[test]
fn the_exponential_of_what_is_not_positive_has_the_same_bits() {
    // All floats from −0 down to −90 would take a minute in the portable code: a stride that is coprime to
    // everything, and all of them around the smallest result that is not zero.
    let bits_of = |x: f32| x.to_bits();
    let border = bits_of(LOWEST);
    let sparse = (bits_of(-0.0)..bits_of(-90.0)).step_by(40_009);
    let dense = border - 5_000..border + 5_000;
    let special = [-0.0, 0.0, f32::NEG_INFINITY, f32::MIN, -1e-40, -88.0, -1000.0].map(f32::to_bits);
    let mut xs: Vec<f32> = sparse.chain(dense).chain(special).map(f32::from_bits).collect();
    xs.resize(xs.len().next_multiple_of(LANES), -1.0);
    for isa in Isa::available() {
        let kernels = Kernels::new(isa, 1);
        for x in xs.as_chunks::<LANES>().0 {
            let mut y = *x;
            kernels.apply(LaneFunction::ExpNonpositive, &mut y);
            for (&x, &y) in x.iter().zip(&y) {
                assert_eq!(y.to_bits(), exp_f32(x).to_bits(), "{isa} at {x}");
            }
        }
        let mut y = [f32::from_bits(0x7f80_0001); LANES];
        kernels.apply(LaneFunction::ExpNonpositive, &mut y);
        assert!(y.iter().all(|y| y.is_nan()));
    }
}

#[test]
fn the_hyperbolic_tangent_is_close_and_the_same_everywhere() {
    let first = Kernels::new(Isa::available()[0], 1);
    for step in 0..4_000 {
        let x: [f32; LANES] = std::array::from_fn(|lane| (step * LANES + lane) as f32 * 0.001 - 32.0);
        let mut expected = x;
        first.apply(LaneFunction::Tanh, &mut expected);
        for (&x, &y) in x.iter().zip(&expected) {
            assert!((f64::from(y) - f64::from(x).tanh()).abs() < 2f64.powi(-22), "{x}: {y}");
        }
        for isa in Isa::available() {
            let mut y = x;
            Kernels::new(isa, 1).apply(LaneFunction::Tanh, &mut y);
            assert_eq!(y.map(f32::to_bits), expected.map(f32::to_bits), "{isa}");
        }
    }
}

#[test]
fn extremes_are_zero_infinite_or_nan() {
    assert_eq!(exp_f32(0.0), 1.0);
    assert_eq!(exp_f32(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(exp_f32(-87.4).to_bits(), 0);
    assert!(exp_f32(-87.33) > 0.0);
    assert!(exp_f32(88.72).is_finite());
    assert_eq!(exp_f32(88.73), f32::INFINITY);
    assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
    assert!(exp_f32(f32::NAN).is_nan());
}

fn relative(a: f64, b: f64) -> f64 {
    (a - b).abs() / b.abs().max(f64::MIN_POSITIVE)
}

#[test]
fn exponential_and_logarithm_agree_with_libm() {
    for step in -70_000..70_000 {
        let x = f64::from(step) * 0.01;
        assert!(relative(exp(x), x.exp()) < 1e-15, "exp {x}");
        let y = x.exp();
        assert!((log(y) - y.ln()).abs() <= 4e-16 * y.ln().abs().max(1.0), "log {y}");
    }
    assert_eq!((log(1.0), exp(0.0)), (0.0, 1.0));
    assert_eq!(log(0.0), f64::NEG_INFINITY);
    assert!(log(-1.0).is_nan() && log(f64::NAN).is_nan() && exp(f64::NAN).is_nan());
    assert!(relative(log(1e-310), 1e-310f64.ln()) < 1e-15);
    assert_eq!((exp(-800.0), exp(800.0)), (0.0, f64::INFINITY));
}

#[test]
fn powers_agree_with_libm() {
    for step in 0..=1000 {
        let exponent = -f64::from(step) / 1000.0;
        for base in [10_000.0, 500_000.0, 1e6, 1.5] {
            assert!(relative(pow(base, exponent), base.powf(exponent)) < 1e-14, "{base}^{exponent}");
        }
    }
}

#[test]
fn sine_and_cosine_agree_with_libm_for_large_angles() {
    let mut x = 1e-6;
    while x < 4e9 {
        for x in [x, -x] {
            let x = f64::from(x as f32);
            let (sin, cos) = sin_cos(x);
            assert!((sin - x.sin()).abs() < 4e-16 && (cos - x.cos()).abs() < 4e-16, "{x}");
        }
        x *= 1.000_3;
    }
    assert_eq!(sin_cos(0.0), (0.0, 1.0));
}

#[test]
fn it_agrees_with_f64_and_every_instruction_set() {
    for len in [1, 7, 32, 100, 1000, 4096] {
        let logits: Vec<f32> = (0..len).map(|i| ((i * 7919) % 1013) as f32 * 0.02 - 9.0).collect();
        let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let first = Kernels::new(Isa::best(), 1).log_sum_exp(&logits);
        assert!((f64::from(first.value()) - exact).abs() < 3e-6 * exact.abs().max(1.0));
        for isa in Isa::available() {
            assert_eq!(Kernels::new(isa, 1).log_sum_exp(&logits), first);
        }
    }
}

#[test]
fn whatever_is_not_finite_is_found() {
    let kernels = Kernels::new(Isa::best(), 1);
    for len in [1, 16, 65, 200] {
        let mut x = vec![1.5; len];
        assert!(kernels.all_finite(&x));
        for at in 0..len {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                x[at] = bad;
                assert!(!kernels.all_finite(&x));
            }
            x[at] = -2.0;
        }
    }
}

#[test]
fn numbers_are_uniform_and_differ_by_every_key() {
    let mean = (0..10_000).map(|position| uniform(7, 0, position)).sum::<f64>() / 10_000.0;
    assert!((mean - 0.5).abs() < 0.01, "{mean}");
    let some =
        [uniform(1, 0, 0), uniform(2, 0, 0), uniform(1, 1, 0), uniform(1, 0, 1), uniform(1 << 32, 0, 0)];
    assert!((0..5).all(|i| (0..i).all(|j| some[i] != some[j])));
    assert!(some.iter().all(|u| (0.0..1.0).contains(u)));
}
