//! Elementary functions in `f64`, for tables and single numbers.
//!
//! Argument reductions use fused multiply-adds; the polynomials for logarithm, sine and cosine are those of FreeBSD's msun
//! (`e_log.c`, `k_sin.c`, `k_cos.c`; Sun Microsystems, 1993), the exponential's is its Taylor series to r¹³.
#![expect(clippy::excessive_precision, reason = "constants are given as published")]

/// Adding and subtracting 1.5 · 2⁵² rounds to the nearest integer, ties to even.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 in two summands; the product of the first with any exponent is exact.
const LN_2_HIGH: f64 = 6.931_471_803_691_238_164_90e-1;
const LN_2_LOW: f64 = 1.908_214_929_270_587_700_02e-10;
/// π/2 in two summands of full precision.
const HALF_PI_HIGH: f64 = std::f64::consts::FRAC_PI_2;
const HALF_PI_LOW: f64 = 6.123_233_995_736_766e-17;

/// Σ coefficients·xⁱ by Horner's rule, from the highest power down.
#[inline(always)]
fn polynomial<const N: usize>(x: f64, coefficients: [f64; N]) -> f64 {
    let mut sum = coefficients[0];
    for coefficient in &coefficients[1..] {
        sum = sum.mul_add(x, *coefficient);
    }
    sum
}

/// 2ⁿ for n in −1022…1023.
#[inline(always)]
fn power_of_two(n: i64) -> f64 {
    f64::from_bits(((n + 1023) << 52) as u64)
}

/// eˣ; 0 below −708, infinite above 709.78.
#[inline(always)]
pub fn exp(x: f64) -> f64 {
    if x < -708.0 {
        return 0.0;
    }
    if x > 709.78 {
        return f64::INFINITY;
    }
    let n = x.mul_add(std::f64::consts::LOG2_E, ROUND) - ROUND;
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let p = polynomial(
        r,
        [
            1.0 / 6_227_020_800.0,
            1.0 / 479_001_600.0,
            1.0 / 39_916_800.0,
            1.0 / 3_628_800.0,
            1.0 / 362_880.0,
            1.0 / 40_320.0,
            1.0 / 5_040.0,
            1.0 / 720.0,
            1.0 / 120.0,
            1.0 / 24.0,
            1.0 / 6.0,
            0.5,
            1.0,
            1.0,
        ],
    );
    let n = n as i64;
    p * power_of_two(n / 2) * power_of_two(n - n / 2)
}

/// Natural logarithm; −∞ of 0, NaN of negative numbers and NaN.
#[inline(always)]
pub fn log(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    // Subnormal numbers are scaled into range first.
    let (x, scale) = if x < f64::MIN_POSITIVE { (x * power_of_two(54), -54) } else { (x, 0) };
    // x = m · 2ᵉ with m in [√½, √2).
    let shifted = x.to_bits() as i64 - std::f64::consts::FRAC_1_SQRT_2.to_bits() as i64;
    let exponent = shifted >> 52;
    let m = f64::from_bits((x.to_bits() as i64 - (exponent << 52)) as u64);
    let e = (exponent + scale) as f64;
    let f = m - 1.0;
    let s = f / (2.0 + f);
    let z = s * s;
    let r = z * polynomial(
        z,
        [
            1.479_819_860_511_658_591e-1,
            1.531_383_769_920_937_332e-1,
            1.818_357_216_161_805_012e-1,
            2.222_219_843_214_978_396e-1,
            2.857_142_874_366_239_149e-1,
            3.999_999_999_940_941_908e-1,
            6.666_666_666_666_735_130e-1,
        ],
    );
    let half_square = 0.5 * f * f;
    e * LN_2_HIGH - ((half_square - s.mul_add(half_square + r, e * LN_2_LOW)) - f)
}

/// `base` to the power `exponent` for a positive base: e^(exponent · ln base), to about |exponent · ln base| units in the
/// last place.
#[inline(always)]
pub fn pow(base: f64, exponent: f64) -> f64 {
    exp(exponent * log(base))
}

/// Sine and cosine of `x` in radians, for |x| up to 2³²; reduced by π/2 with three times `f64`'s precision in effect.
#[inline(always)]
pub fn sin_cos(x: f64) -> (f64, f64) {
    let n = x.mul_add(std::f64::consts::FRAC_2_PI, ROUND) - ROUND;
    let r = n.mul_add(-HALF_PI_LOW, n.mul_add(-HALF_PI_HIGH, x));
    let z = r * r;
    let sin = polynomial(
        z,
        [
            1.589_690_995_211_550_102_21e-10,
            -2.505_076_025_340_686_341_95e-8,
            2.755_731_370_707_006_767_89e-6,
            -1.984_126_982_985_794_931_34e-4,
            8.333_333_333_322_489_461_24e-3,
            -1.666_666_666_666_663_243_48e-1,
        ],
    );
    let sin = (z * r).mul_add(sin, r);
    let cos = polynomial(
        z,
        [
            -1.135_964_755_778_819_482_65e-11,
            2.087_572_321_298_174_827_90e-9,
            -2.755_731_435_139_066_330_35e-7,
            2.480_158_728_947_672_941_78e-5,
            -1.388_888_888_887_410_957_49e-3,
            4.166_666_666_666_660_190_37e-2,
            -0.5,
            1.0,
        ],
    );
    match n as i64 & 3 {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}
