//! The exponential in `f32`, over lanes.
#![expect(clippy::excessive_precision, reason = "constants are given as published")]

use crate::kernels::Kernels;
use crate::lanes::{Int16, LANES, LaneKernel, Simd16};

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

/// A function that kernels apply lane by lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneFunction {
    /// eˣ, which [`exp_f32`] gives for one number.
    Exp,
    /// The same where no x is positive (or it is NaN), in fewer operations.
    ExpNonpositive,
    /// The hyperbolic tangent.
    Tanh,
}

impl Kernels {
    /// x ← f(x), elementwise, as the kernels that contain `function` compute it.
    pub fn apply(&self, function: LaneFunction, x: &mut [f32]) {
        self.dispatch(Apply { function, x });
    }
}

struct Apply<'a> {
    function: LaneFunction,
    x: &'a mut [f32],
}

impl LaneKernel for Apply<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for x in self.x.chunks_mut(LANES) {
            let lanes = S::read_tail(x, 0.0);
            let y = match self.function {
                LaneFunction::Exp => exp_lanes(lanes),
                LaneFunction::ExpNonpositive => exp_lanes_nonpositive(lanes),
                LaneFunction::Tanh => tanh_lanes(lanes),
            };
            y.write_tail(x);
        }
    }
}
