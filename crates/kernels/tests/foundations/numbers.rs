//! Numbers narrower than f32.

use ashlar_kernels::{Isa, Kernels};
use ashlar_vocabulary::FloatType;

/// Values of every size, with ties, subnormals, infinities and a NaN among them.
fn values() -> Vec<f32> {
    let spread = (0..70_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
    let special = [0.0, -0.0, 65504.0, 65519.9, 1e9, -1e9, f32::INFINITY, f32::NAN, 1e-40, -3e-8];
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_1000, 0x3f80_3000].map(f32::from_bits);
    spread.chain(special).chain(ties).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn what_is_rounded_travels_without_loss_on_every_instruction_set_and_number_of_threads() {
    for kind in FloatType::ALL {
        let round = |isa, threads| {
            let kernels = Kernels::new(isa, threads);
            let mut rounded = values();
            kernels.round_to(kind, &mut rounded);
            let mut bytes = vec![0; rounded.len() * kind.bytes()];
            kernels.narrow(kind, &rounded, &mut bytes);
            let mut back = vec![f32::NAN; rounded.len()];
            kernels.widen(kind, &bytes, &mut back);
            assert_eq!(bits(&back), bits(&rounded), "{kind}, {isa}");
            let mut directly = vec![0; bytes.len()];
            kernels.narrow(kind, &values(), &mut directly);
            assert_eq!(directly, bytes, "{kind}, {isa}");
            (bits(&rounded), bytes)
        };
        let expected = round(Isa::Portable, 1);
        for isa in Isa::available() {
            assert_eq!(round(isa, 3), expected, "{kind}, {isa}");
        }
    }
}

#[test]
fn rounding_is_to_the_nearest_and_finite_halves_stay_finite() {
    let kernels = Kernels::new(Isa::best(), 1);
    let rounded = |kind, value| {
        let mut values = [value];
        kernels.round_to(kind, &mut values);
        values[0]
    };
    assert_eq!(rounded(FloatType::F32, 1.000_000_1), 1.000_000_1);
    assert_eq!(rounded(FloatType::Bf16, 1.003), 1.0);
    assert_eq!(rounded(FloatType::Bf16, 1e-40), 0.0);
    assert_eq!(rounded(FloatType::F16, 1.0003), 1.0);
    assert_eq!((rounded(FloatType::F16, 1e9), rounded(FloatType::F16, -1e9)), (65504.0, -65504.0));
    assert_eq!(rounded(FloatType::F16, f32::INFINITY), f32::INFINITY);
    assert!(FloatType::ALL.into_iter().all(|kind| rounded(kind, f32::NAN).is_nan()));
}

/// What a half, or a brain float, stands for.
fn widen(kind: FloatType, stored: u16) -> f32 {
    let mut value = [f32::NAN];
    Kernels::new(Isa::Portable, 1).widen(kind, &stored.to_le_bytes(), &mut value);
    value[0]
}

/// The stored number that is nearest.
fn narrow(kind: FloatType, value: f32) -> u16 {
    let mut stored = [0; 2];
    Kernels::new(Isa::Portable, 1).narrow(kind, &[value], &mut stored);
    u16::from_le_bytes(stored)
}

#[test]
fn every_half_has_its_value() {
    let value = |half: u16| -> f64 {
        let (exponent, fraction) = (i32::from(half >> 10 & 31), f64::from(half & 0x3ff));
        let size = if exponent == 0 {
            fraction * 2f64.powi(-24)
        } else {
            (1.0 + fraction / 1024.0) * 2f64.powi(exponent - 15)
        };
        if half & 0x8000 == 0 { size } else { -size }
    };
    for half in (0..=u16::MAX).filter(|half| half & 0x7c00 != 0x7c00) {
        assert_eq!(f64::from(widen(FloatType::F16, half)).to_bits(), value(half).to_bits(), "{half:#06x}");
    }
    assert_eq!(
        (widen(FloatType::F16, 0x7c00), widen(FloatType::F16, 0xfc00)),
        (f32::INFINITY, f32::NEG_INFINITY)
    );
    assert!(widen(FloatType::F16, 0x7c01).is_nan() && widen(FloatType::F16, 0xfe00).is_nan());
}

#[test]
fn rounding_goes_to_the_nearest_and_to_even() {
    for half in (0..=u16::MAX).filter(|half| half & 0x7c00 != 0x7c00 && half & 0x7fff != 0x7bff) {
        assert_eq!(narrow(FloatType::F16, widen(FloatType::F16, half)), half);
        let (here, next) =
            (f64::from(widen(FloatType::F16, half)), f64::from(widen(FloatType::F16, half + 1)));
        let middle = ((here + next) / 2.0) as f32;
        assert_eq!(narrow(FloatType::F16, middle), half + (half & 1), "{half:#06x}");
        assert_eq!(narrow(FloatType::F16, f32::from_bits(middle.to_bits() - 1)), half);
        assert_eq!(narrow(FloatType::F16, f32::from_bits(middle.to_bits() + 1)), half + 1);
    }
    let half = |value| narrow(FloatType::F16, value);
    assert_eq!((half(65519.0), half(f32::INFINITY), half(f32::NAN) & 0x7e00), (0x7bff, 0x7c00, 0x7e00));
    let to_brain_float = |value| narrow(FloatType::Bf16, value);
    assert_eq!(to_brain_float(1.0), 0x3f80);
    assert_eq!(to_brain_float(f32::from_bits(0x3f80_8000)), 0x3f80, "a tie goes to even");
    assert_eq!(to_brain_float(f32::from_bits(0x3f81_8000)), 0x3f82);
    assert_eq!(to_brain_float(-1e-40), 0x8000);
    assert_eq!(to_brain_float(f32::from_bits(0x007f_ffff)), 0x0080, "rounds up to the smallest normal");
    assert_eq!(to_brain_float(f32::MAX), 0x7f80);
}
