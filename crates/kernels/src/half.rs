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

/// The half nearest to a value, ties to even; infinity beyond the largest.
#[inline(always)]
pub(crate) fn narrow(value: f32) -> u16 {
    let bits = value.to_bits();
    let (sign, magnitude) = ((bits >> 16 & 0x8000) as u16, bits & 0x7fff_ffff);
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    let half = if magnitude >= 0x4780_0000 {
        // 65536 and more; rounding up to it from below happens in the last branch.
        0x7c00
    } else if magnitude < 0x3880_0000 {
        // Below the smallest normal half: the sum with 1/2 has its last bit at 2⁻²⁴.
        (f32::from_bits(magnitude) + 0.5).to_bits() - 0.5f32.to_bits()
    } else {
        (magnitude - (112 << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13
    };
    sign | half as u16
}

/// The bits of the brain float nearest to a value, ties to even; what would be subnormal is zero.
#[inline(always)]
pub(crate) fn to_brain_float(value: f32) -> u16 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return (bits >> 16) as u16 | 0x0040;
    }
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if rounded & 0x7f80_0000 == 0 { (rounded >> 16 & 0x8000) as u16 } else { (rounded >> 16) as u16 }
}

/// A value rounded to the nearest brain float; what would be subnormal is zero.
#[inline(always)]
pub(crate) fn brain_float(value: f32) -> f32 {
    f32::from_bits(u32::from(to_brain_float(value)) << 16)
}
