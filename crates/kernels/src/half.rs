//! IEEE binary16, widened without a library: exact, so that there is nothing to agree on.

/// The value of a half.
#[inline(always)]
pub(crate) fn widen(half: u16) -> f32 {
    let (sign, magnitude) = (u32::from(half & 0x8000) << 16, u32::from(half & 0x7fff));
    let bits = if magnitude >= 0x7c00 {
        // Infinities and NaNs keep their payload and become quiet, as the conversion instructions make them.
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        0x7f80_0000 | (magnitude & 0x3ff) << 13 | quiet
    } else if magnitude >= 0x0400 {
        (magnitude << 13) + (112 << 23)
    } else {
        // Subnormal: the integer times 2⁻²⁴, exact.
        (magnitude as f32 * (1.0 / 16_777_216.0)).to_bits()
    };
    f32::from_bits(sign | bits)
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(f64::from(widen(half)).to_bits(), value(half).to_bits(), "{half:#06x}");
        }
        assert_eq!((widen(0x7c00), widen(0xfc00)), (f32::INFINITY, f32::NEG_INFINITY));
        assert!(widen(0x7c01).is_nan() && widen(0xfe00).is_nan());
    }
}
