//! Sixteen `f32` lanes, over which every kernel is written once.
//!
//! A kernel is a struct that implements [`LaneKernel`]; [`dispatch`] instantiates its body inside a function compiled for
//! the chosen instruction set. Everything below that function must be `#[inline(always)]`, closures included: code that is
//! not inlined into it would be compiled for the baseline and run slowly (never differently).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use crate::isa::Isa;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes. Every operation is the same IEEE operation per lane on every instruction set.
pub(crate) trait Simd16: Copy {
    /// Sixteen 32-bit integers of the same instruction set.
    type Int: Int16<Float = Self>;

    /// How many vectors of outputs a register tile of several rows spans: what the register file affords.
    const TILE_VECTORS: usize;

    /// All lanes equal `value`.
    fn splat(value: f32) -> Self;
    /// Reads sixteen elements.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen elements; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes sixteen elements.
    ///
    /// # Safety
    /// `to` must be valid for writing sixteen elements; no alignment is needed.
    unsafe fn store(self, to: *mut f32);
    /// Per lane `self + other`.
    fn add(self, other: Self) -> Self;
    /// Per lane `self − other`.
    fn sub(self, other: Self) -> Self;
    /// Per lane `self · other`.
    fn mul(self, other: Self) -> Self;
    /// Per lane `self / other`.
    fn div(self, other: Self) -> Self;
    /// Per lane `self · factor + term`, rounded once.
    fn mul_add(self, factor: Self, term: Self) -> Self;
    /// Per lane `if self > other { self } else { other }`.
    fn max(self, other: Self) -> Self;
    /// Per lane `if self < bound { then } else { otherwise }`; a NaN compares false.
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self;
    /// Per lane 2ⁿ of an integral n in −126…127; anything for other lanes.
    fn power_of_two(self) -> Self;
    /// Asks for the cache line at `at` to be fetched soon; the address need not be valid.
    fn prefetch(at: *const f32);
    /// Widens sixteen halves (IEEE binary16), exactly.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen elements; no alignment is needed.
    unsafe fn load_half(from: *const u16) -> Self;
    /// Widens sixteen brain floats, exactly.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen elements; no alignment is needed.
    unsafe fn load_brain(from: *const u16) -> Self;
    /// Per lane `(self + w₁·x₁) + w₀·x₀` over pairs of brain floats, the one in the high half of the word (1) first. Each
    /// step is a fused multiply-add; results too small to be normal become zero, and operands must not be subnormal.
    fn dot_pairs(self, w: Self::Int, x: Self::Int) -> Self;
    /// The bits of every lane.
    fn to_bits(self) -> Self::Int;
    /// Every lane rounded to the nearest integer, ties to even; anything outside the range of `i32`.
    fn round(self) -> Self::Int;

    /// The lanes as an array.
    #[inline(always)]
    fn to_array(self) -> [f32; LANES] {
        let mut array = [0.0; LANES];
        // SAFETY: the array has sixteen elements.
        unsafe { self.store(array.as_mut_ptr()) };
        array
    }

    /// Reads the first sixteen elements of a slice.
    #[inline(always)]
    fn read(from: &[f32]) -> Self {
        assert!(from.len() >= LANES);
        // SAFETY: the length was checked.
        unsafe { Self::load(from.as_ptr()) }
    }

    /// Writes the first sixteen elements of a slice.
    #[inline(always)]
    fn write(self, to: &mut [f32]) {
        assert!(to.len() >= LANES);
        // SAFETY: the length was checked.
        unsafe { self.store(to.as_mut_ptr()) };
    }

    /// Reads up to sixteen elements; lanes beyond them are `fill`.
    #[inline(always)]
    fn read_tail(from: &[f32], fill: f32) -> Self {
        if from.len() >= LANES {
            return Self::read(from);
        }
        let mut array = [fill; LANES];
        array[..from.len()].copy_from_slice(from);
        Self::read(&array)
    }

    /// Writes as many lanes as the slice takes.
    #[inline(always)]
    fn write_tail(self, to: &mut [f32]) {
        if to.len() >= LANES {
            return self.write(to);
        }
        to.copy_from_slice(&self.to_array()[..to.len()]);
    }

    /// The fixed tree over lanes: lane i + lane i+8, then i+4, i+2, i+1.
    fn sum_lanes(self) -> f32;

    /// The largest lane (exact in any order, but for the sign of a zero and the bits of a NaN).
    fn max_lane(self) -> f32;
}

/// Sixteen integers of 32 bits, each also seen as four bytes.
pub(crate) trait Int16: Copy {
    /// Sixteen floats of the same instruction set.
    type Float: Simd16<Int = Self>;

    /// Rows of the tallest register tile of integer products.
    const TILE_ROWS: usize;
    /// What [`Int16::dot_wide`] takes its weights to be relative to: its result is Σ (w − 128 + `WIDE_ZERO`)·x.
    const WIDE_ZERO: i32;

    /// All lanes equal `value`.
    fn splat(value: i32) -> Self;
    /// Reads 64 bytes.
    ///
    /// # Safety
    /// `from` must be valid for reading 64 bytes; no alignment is needed.
    unsafe fn load(from: *const u8) -> Self;
    /// Writes 64 bytes.
    ///
    /// # Safety
    /// `to` must be valid for writing 64 bytes; no alignment is needed.
    unsafe fn store(self, to: *mut u8);
    /// Sign-extends sixteen bytes.
    ///
    /// # Safety
    /// `from` must be valid for reading sixteen bytes.
    unsafe fn load_bytes(from: *const i8) -> Self;
    /// Writes the low byte of every lane: sixteen bytes.
    ///
    /// # Safety
    /// `to` must be valid for writing sixteen bytes.
    unsafe fn store_bytes(self, to: *mut i8);
    /// Reads sixteen bytes of each of sixteen rows, `at` bytes on from where each starts: four columns of words, of which
    /// column `w` has bytes 4w…4w+3 of every row.
    ///
    /// # Safety
    /// Every row must be valid for reading sixteen bytes from `at` on; no alignment is needed.
    unsafe fn load_columns(rows: &[*const u8; LANES], at: usize) -> [Self; 4];
    /// Writes the low half of every lane: 32 bytes.
    ///
    /// # Safety
    /// `to` must be valid for writing sixteen elements; no alignment is needed.
    unsafe fn store_halves(self, to: *mut u16);
    /// Bitwise and.
    fn and(self, other: Self) -> Self;
    /// Bitwise or.
    fn or(self, other: Self) -> Self;
    /// Bitwise exclusive or.
    fn xor(self, other: Self) -> Self;
    /// Per lane `self + other`, wrapping.
    fn add(self, other: Self) -> Self;
    /// Per lane the larger.
    fn max(self, other: Self) -> Self;
    /// Per lane, a logical shift to the right.
    fn shift_right<const BITS: u32>(self) -> Self;
    /// Per lane, a shift to the left.
    fn shift_left<const BITS: u32>(self) -> Self;
    /// The largest lane.
    fn max_lane(self) -> i32;
    /// The sum of the lanes.
    fn sum_lanes(self) -> i32;
    /// Every lane as a float, rounded to nearest even.
    fn to_float(self) -> Self::Float;
    /// The floats that have these bits.
    fn as_float(self) -> Self::Float;
    /// Per lane `self + Σ w·x` over the lane's four bytes, `w` unsigned and at most 127, `x` signed and at least −127;
    /// exact.
    fn dot_narrow(self, w: Self, x: Self) -> Self;
    /// The same for `w` up to 255, see [`Int16::WIDE_ZERO`].
    fn dot_wide(self, w: Self, x: Self) -> Self;
}

/// A computation over sixteen lanes, written once for every instruction set.
pub(crate) trait LaneKernel {
    /// Whether it depends on how an instruction set multiplies bytes. What does not is compiled once for all kinds of AVX-512.
    const MULTIPLIES_BYTES: bool = false;
    /// What it returns.
    type Output;
    /// The body; implementations must be `#[inline(always)]`.
    fn run<S: Simd16>(self) -> Self::Output;
}

/// [`dispatch`] for kernels that multiply pairs of brain floats: with the instruction for them where there is one.
///
/// # Safety
/// This machine must be able to run `isa`.
#[inline]
pub(crate) unsafe fn dispatch_pairs<K: LaneKernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller vouches for the instruction set, and the extension was asked for.
        Isa::Avx512 if is_x86_feature_detected!("avx512bf16") => unsafe { avx512::run_pairs(kernel) },
        // SAFETY: the caller's contract.
        _ => unsafe { dispatch(isa, kernel) },
    }
}

/// Whether `isa` has an instruction for pairs of brain floats that is faster than two multiply-adds: some hardware has one
/// that is not.
pub(crate) fn pairs_are_fast(isa: Isa) -> bool {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 && is_x86_feature_detected!("avx512bf16") {
        static FAST: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        // SAFETY: the extensions were asked for.
        return *FAST.get_or_init(|| unsafe { avx512::pairs_are_fast() });
    }
    let _ = isa;
    false
}

/// The words of pairs as floats: low halves, high halves.
#[inline(always)]
fn halves_of_pairs<S: Simd16>(pairs: S::Int) -> [S; 2] {
    [pairs.shift_left::<16>().as_float(), pairs.and(S::Int::splat(0xffff_0000u32 as i32)).as_float()]
}

/// [`Simd16::dot_pairs`] by the operations that every instruction set has.
#[inline(always)]
fn dot_pairs_emulated<S: Simd16>(sum: S, w: S::Int, x: S::Int) -> S {
    let (w, x) = (halves_of_pairs::<S>(w), halves_of_pairs::<S>(x));
    flush::<S>(w[0].mul_add(x[0], flush::<S>(w[1].mul_add(x[1], sum))))
}

/// Zero, with its sign, in place of a subnormal. A function, as a closure would not be inlined for certain.
#[inline(always)]
pub(crate) fn flush<S: Simd16>(x: S) -> S {
    let size = x.to_bits().and(S::Int::splat(0x7fff_ffff)).as_float();
    size.select_less(S::splat(f32::MIN_POSITIVE), x.to_bits().and(S::Int::splat(i32::MIN)).as_float(), x)
}

/// Runs `kernel` compiled for `isa`.
///
/// # Safety
/// This machine must be able to run `isa`.
#[inline]
pub(crate) unsafe fn dispatch<K: LaneKernel>(isa: Isa, kernel: K) -> K::Output {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller vouches for the instruction set.
        Isa::Avx512 if K::MULTIPLIES_BYTES => unsafe { avx512::run(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller vouches for the instruction set.
        Isa::Avx512 | Isa::Avx512Bw => unsafe { avx512::run_without_vnni(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller vouches for the instruction set.
        Isa::Avx2 => unsafe { avx2::run(kernel) },
        _ => kernel.run::<portable::Portable>(),
    }
}
