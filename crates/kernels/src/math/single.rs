//! The exponential in `f32`, over lanes.
#![expect(clippy::excessive_precision, reason = "constants are given as published")]

use crate::lanes::{Int16, Simd16};

/// ln 2⁻¹²⁶: below it the result would be subnormal and is 0.
const LOWEST: f32 = -87.336_54;
/// Above it the result is infinite.
const HIGHEST: f32 = 88.722_83;
/// Adding and subtracting 1.5 · 2²³ rounds to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two summands; the product of the first with any exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_375;
const LN_2_LOW: f32 = -2.121_944_40e-4;
/// e^r ≈ 1 + r + r²·P(r) on |r| ≤ ln 2 / 2, after Cephes' `expf` (Moshier), from the highest power down.
const POLYNOMIAL: [f32; 6] = [
    1.987_569_150_0e-4,
    1.398_199_950_7e-3,
    8.333_451_907_3e-3,
    4.166_579_589_4e-2,
    1.666_666_545_9e-1,
    5.000_000_120_1e-1,
];

/// eˣ per lane, within 2 units in the last place; 0 where it would be subnormal, NaN for NaN.
#[inline(always)]
pub(crate) fn exp_lanes<S: Simd16>(x: S) -> S {
    let round = S::splat(ROUND);
    let n = x.mul_add(S::splat(std::f32::consts::LOG2_E), round).sub(round);
    let r = n.mul_add(S::splat(-LN_2_HIGH), x);
    let r = n.mul_add(S::splat(-LN_2_LOW), r);
    let mut p = S::splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = p.mul_add(r, S::splat(*coefficient));
    }
    let p = p.mul_add(r.mul(r), r).add(S::splat(1.0));
    // 2ⁿ in two factors: n reaches 128, which has no power of two of its own.
    let half = n.mul_add(S::splat(0.5), round).sub(round);
    let y = p.mul(half.power_of_two()).mul(n.sub(half).power_of_two());
    let y = x.select_less(S::splat(LOWEST), S::splat(0.0), y);
    S::splat(HIGHEST).select_less(x, S::splat(f32::INFINITY), y)
}

/// [`exp_lanes`] of x ≤ 0 with the same bits and half the operations; NaN for NaN, anything for x > 0.
#[inline(always)]
pub(crate) fn exp_lanes_nonpositive<S: Simd16>(x: S) -> S {
    // Rounding to an integer by a constant whose last bits are 127 leaves n + 127 there, ready to become an exponent: n is
    // in −126…0 for all x that count. (No product with log₂ e is a tie, which 127 would round the other way.)
    let round = S::splat(ROUND + 127.0);
    let shifted = x.mul_add(S::splat(std::f32::consts::LOG2_E), round);
    let n = shifted.sub(round);
    let r = n.mul_add(S::splat(-LN_2_HIGH), x);
    let r = n.mul_add(S::splat(-LN_2_LOW), r);
    let mut p = S::splat(POLYNOMIAL[0]);
    for coefficient in &POLYNOMIAL[1..] {
        p = p.mul_add(r, S::splat(*coefficient));
    }
    let p = p.mul_add(r.mul(r), r).add(S::splat(1.0));
    let y = p.mul(shifted.to_bits().shift_left::<23>().as_float());
    x.select_less(S::splat(LOWEST), S::splat(0.0), y)
}

/// tanh x per lane, as (1 − t) / (1 + t) with t = e^(−2|x|), with the sign of x: within 2⁻²² of the exact value.
#[inline(always)]
pub(crate) fn tanh_lanes<S: Simd16>(x: S) -> S {
    let sign = x.to_bits().and(S::Int::splat(i32::MIN));
    let size = x.to_bits().and(S::Int::splat(i32::MAX)).as_float();
    let t = exp_lanes_nonpositive(size.mul(S::splat(-2.0)));
    let y = S::splat(1.0).sub(t).div(S::splat(1.0).add(t));
    y.to_bits().or(sign).as_float()
}

/// eˣ with the bits that the kernels compute.
pub fn exp_f32(x: f32) -> f32 {
    let round = |x: f32, factor: f32| x.mul_add(factor, ROUND) - ROUND;
    let n = round(x, std::f32::consts::LOG2_E);
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(-LN_2_LOW, r);
    let p = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |p, &coefficient| p.mul_add(r, coefficient));
    let p = p.mul_add(r * r, r) + 1.0;
    let power_of_two = |n: f32| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32);
    let half = round(n, 0.5);
    let y = p * power_of_two(half) * power_of_two(n - half);
    if x < LOWEST {
        0.0
    } else if HIGHEST < x {
        f32::INFINITY
    } else {
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lanes::{LANES, LaneKernel};
    use crate::{Isa, Kernels};

    struct Exp<'a>(&'a mut [f32; LANES]);

    impl LaneKernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd16>(self) {
            exp_lanes(S::read(self.0)).write(self.0);
        }
    }

    #[test]
    fn the_exponential_is_within_two_units_and_the_same_everywhere() {
        let kernels: Vec<Kernels> = Isa::available().into_iter().map(|isa| Kernels::new(isa, 1)).collect();
        let mut worst = 0.0f64;
        for step in 0..25_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|lane| (step * LANES + lane) as f32 * (178.0 / 400_000.0) - 89.0);
            for kernels in &kernels {
                let mut y = x;
                kernels.dispatch(Exp(&mut y));
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

    struct ExpNonpositive<'a>(&'a mut [f32; LANES]);

    impl LaneKernel for ExpNonpositive<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd16>(self) {
            exp_lanes_nonpositive(S::read(self.0)).write(self.0);
        }
    }

    struct Tanh<'a>(&'a mut [f32; LANES]);

    impl LaneKernel for Tanh<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd16>(self) {
            tanh_lanes(S::read(self.0)).write(self.0);
        }
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
                kernels.dispatch(ExpNonpositive(&mut y));
                for (&x, &y) in x.iter().zip(&y) {
                    assert_eq!(y.to_bits(), exp_f32(x).to_bits(), "{isa} at {x}");
                }
            }
            let mut y = [f32::from_bits(0x7f80_0001); LANES];
            kernels.dispatch(ExpNonpositive(&mut y));
            assert!(y.iter().all(|y| y.is_nan()));
        }
    }

    #[test]
    fn the_hyperbolic_tangent_is_close_and_the_same_everywhere() {
        let first = Kernels::new(Isa::available()[0], 1);
        for step in 0..4_000 {
            let x: [f32; LANES] = std::array::from_fn(|lane| (step * LANES + lane) as f32 * 0.001 - 32.0);
            let mut expected = x;
            first.dispatch(Tanh(&mut expected));
            for (&x, &y) in x.iter().zip(&expected) {
                assert!((f64::from(y) - f64::from(x).tanh()).abs() < 2f64.powi(-22), "{x}: {y}");
            }
            for isa in Isa::available() {
                let mut y = x;
                Kernels::new(isa, 1).dispatch(Tanh(&mut y));
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
}
