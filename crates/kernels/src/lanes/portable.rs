//! Sixteen lanes as an array: the definition that the others must match.

use super::{Int16, LANES, Simd16};

/// Sixteen scalars.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn map(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

/// x·y + z per lane, rounded once. Baseline x86-64 has no instruction for it: sixteen library calls, which are not worth
/// repeating wherever a kernel multiplies. They would be nearly half of this crate's code.
#[cfg_attr(all(target_arch = "x86_64", not(target_feature = "fma")), inline(never))]
#[cfg_attr(not(all(target_arch = "x86_64", not(target_feature = "fma"))), inline(always))]
fn fused(x: &[f32; LANES], y: &[f32; LANES], z: &[f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|i| x[i].mul_add(y[i], z[i]))
}

/// Sixteen integers.
#[derive(Clone, Copy)]
pub(super) struct PortableInt([i32; LANES]);

impl PortableInt {
    #[inline(always)]
    fn dot(self, w: Self, x: Self, zero: i32) -> Self {
        PortableInt(std::array::from_fn(|i| {
            let (w, x) = (w.0[i].to_le_bytes(), x.0[i].to_le_bytes());
            (0..4).fold(self.0[i], |sum, byte| {
                sum.wrapping_add((i32::from(w[byte]) - zero) * i32::from(x[byte] as i8))
            })
        }))
    }
}

impl Simd16 for Portable {
    type Int = PortableInt;

    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Portable([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen readable elements; arrays of f32 need the alignment of f32 only.
        Portable(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen writable elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.map(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.map(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.map(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.map(other, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Portable(fused(&self.0, &factor.0, &term.0))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.map(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        Portable(std::array::from_fn(|i| if self.0[i] < bound.0[i] { then.0[i] } else { otherwise.0[i] }))
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        Portable(self.0.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32)))
    }
    #[inline(always)]
    fn prefetch(_at: *const f32) {}
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        // SAFETY: the caller vouches for sixteen readable elements.
        let halves = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(halves.map(crate::half::widen))
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u16) -> Self {
        // SAFETY: the caller vouches for sixteen readable elements.
        let brains = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Portable(brains.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }
    #[inline(always)]
    fn sum_lanes(self) -> f32 {
        let mut lanes = self.0;
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
            half /= 2;
        }
        lanes[0]
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn dot_pairs(self, w: PortableInt, x: PortableInt) -> Self {
        super::dot_pairs_emulated(self, w, x)
    }
    #[inline(always)]
    fn to_bits(self) -> PortableInt {
        PortableInt(self.0.map(|x| x.to_bits() as i32))
    }
    #[inline(always)]
    fn round(self) -> PortableInt {
        PortableInt(self.0.map(|x| x.round_ties_even() as i32))
    }
}

impl Int16 for PortableInt {
    type Float = Portable;

    const TILE_ROWS: usize = 4;
    const WIDE_ZERO: i32 = 0;

    #[inline(always)]
    fn splat(value: i32) -> Self {
        PortableInt([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 64 readable bytes.
        let lanes = unsafe { from.cast::<[i32; LANES]>().read_unaligned() };
        PortableInt(lanes.map(i32::from_le))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the caller vouches for 64 writable bytes.
        unsafe { to.cast::<[i32; LANES]>().write_unaligned(self.0.map(i32::to_le)) }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self {
        // SAFETY: the caller vouches for sixteen readable bytes.
        PortableInt(unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(i32::from))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut i8) {
        // SAFETY: the caller vouches for sixteen writable bytes.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(self.0.map(|lane| lane as i8)) }
    }
    #[inline(always)]
    unsafe fn load_columns(rows: &[*const u8; LANES], at: usize) -> [Self; 4] {
        let mut columns = [[0; LANES]; 4];
        for (lane, row) in rows.iter().enumerate() {
            // SAFETY: the caller vouches for sixteen readable bytes from `at` on.
            let words = unsafe { row.add(at).cast::<[i32; 4]>().read_unaligned() };
            for (column, word) in columns.iter_mut().zip(words) {
                column[lane] = i32::from_le(word);
            }
        }
        columns.map(PortableInt)
    }
    #[inline(always)]
    unsafe fn store_halves(self, to: *mut u16) {
        // SAFETY: the caller vouches for sixteen writable elements.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(self.0.map(|lane| (lane as u16).to_le())) }
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        PortableInt(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        PortableInt(std::array::from_fn(|i| self.0[i] | other.0[i]))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        PortableInt(std::array::from_fn(|i| self.0[i] ^ other.0[i]))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        PortableInt(std::array::from_fn(|i| self.0[i].wrapping_add(other.0[i])))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        PortableInt(std::array::from_fn(|i| self.0[i].max(other.0[i])))
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self) -> Self {
        PortableInt(self.0.map(|lane| ((lane as u32) >> BITS) as i32))
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self) -> Self {
        PortableInt(self.0.map(|lane| lane << BITS))
    }
    #[inline(always)]
    fn max_lane(self) -> i32 {
        self.0.into_iter().fold(i32::MIN, i32::max)
    }
    #[inline(always)]
    fn sum_lanes(self) -> i32 {
        self.0.into_iter().fold(0, i32::wrapping_add)
    }
    #[inline(always)]
    fn to_float(self) -> Portable {
        Portable(self.0.map(|lane| lane as f32))
    }
    #[inline(always)]
    fn as_float(self) -> Portable {
        Portable(self.0.map(|lane| f32::from_bits(lane as u32)))
    }
    #[inline(always)]
    fn dot_narrow(self, w: Self, x: Self) -> Self {
        self.dot(w, x, 0)
    }
    #[inline(always)]
    fn dot_wide(self, w: Self, x: Self) -> Self {
        self.dot(w, x, 128)
    }
}
