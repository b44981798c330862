//! Sixteen lanes as two AVX2 registers.

use super::{Int16, LANES, LaneKernel, Simd16};
use std::arch::x86_64::*;

/// Runs a kernel compiled for AVX2 with FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn run<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Lanes 0…7 and 8…15; exists only below [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// Lanes 0…7 and 8…15 of integers.
#[derive(Clone, Copy)]
pub(super) struct Avx2Int(__m256i, __m256i);

/// An intrinsic of AVX2, FMA or F16C, or a load or store whose pointer the caller vouches for.
macro_rules! avx2 {
    ($call:expr) => {
        // SAFETY: this type is instantiated only by `run`, whose callers checked for them; pointers are covered
        // by the contract of the surrounding method.
        unsafe { $call }
    };
}

impl Avx2Int {
    #[inline(always)]
    fn map(self, f: impl Fn(__m256i) -> __m256i) -> Self {
        Avx2Int(f(self.0), f(self.1))
    }
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(__m256i, __m256i) -> __m256i) -> Self {
        Avx2Int(f(self.0, other.0), f(self.1, other.1))
    }
}

/// The lower levels of the tree over lanes: lane i + lane i+4, then i+2, i+1.
#[inline(always)]
pub(super) unsafe fn sum_eight(lanes: __m256) -> f32 {
    // SAFETY: the caller runs on a machine with AVX.
    unsafe {
        let four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
    }
}

/// The largest of eight lanes.
#[inline(always)]
pub(super) unsafe fn max_eight(lanes: __m256) -> f32 {
    // SAFETY: the caller runs on a machine with AVX.
    unsafe {
        let four = _mm_max_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps::<1>(lanes));
        let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
    }
}

impl Simd16 for Avx2 {
    type Int = Avx2Int;

    /// 16 registers: six rows × one vector (twelve registers) of sums, two of weights.
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        let half = avx2!(_mm256_set1_ps(value));
        Avx2(half, half)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Avx2(avx2!(_mm256_loadu_ps(from)), avx2!(_mm256_loadu_ps(from.add(8))))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        avx2!(_mm256_storeu_ps(to, self.0));
        avx2!(_mm256_storeu_ps(to.add(8), self.1));
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_add_ps(self.0, other.0)), avx2!(_mm256_add_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_sub_ps(self.0, other.0)), avx2!(_mm256_sub_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_mul_ps(self.0, other.0)), avx2!(_mm256_mul_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_div_ps(self.0, other.0)), avx2!(_mm256_div_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Avx2(
            avx2!(_mm256_fmadd_ps(self.0, factor.0, term.0)),
            avx2!(_mm256_fmadd_ps(self.1, factor.1, term.1)),
        )
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Avx2(avx2!(_mm256_max_ps(self.0, other.0)), avx2!(_mm256_max_ps(self.1, other.1)))
    }
    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        Avx2(
            avx2!(_mm256_blendv_ps(otherwise.0, then.0, _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, bound.0))),
            avx2!(_mm256_blendv_ps(otherwise.1, then.1, _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, bound.1))),
        )
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        let half = |n: __m256| {
            avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
                _mm256_cvtps_epi32(n),
                _mm256_set1_epi32(127)
            ))))
        };
        Avx2(half(self.0), half(self.1))
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        avx2!(_mm_prefetch::<_MM_HINT_T0>(at.cast()))
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        let half = |at: *const u16| avx2!(_mm256_cvtph_ps(_mm_loadu_si128(at.cast())));
        Avx2(half(from), half(from.wrapping_add(8)))
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u16) -> Self {
        let half = |at: *const u16| {
            let words = avx2!(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast())));
            avx2!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)))
        };
        Avx2(half(from), half(from.wrapping_add(8)))
    }
    #[inline(always)]
    fn sum_lanes(self) -> f32 {
        avx2!(sum_eight(_mm256_add_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        avx2!(max_eight(_mm256_max_ps(self.0, self.1)))
    }
    #[inline(always)]
    fn dot_pairs(self, w: Avx2Int, x: Avx2Int) -> Self {
        super::dot_pairs_emulated(self, w, x)
    }
    #[inline(always)]
    fn to_bits(self) -> Avx2Int {
        avx2!(Avx2Int(_mm256_castps_si256(self.0), _mm256_castps_si256(self.1)))
    }
    #[inline(always)]
    fn round(self) -> Avx2Int {
        avx2!(Avx2Int(_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1)))
    }
}

impl Int16 for Avx2Int {
    type Float = Avx2;

    /// 16 registers: three rows of integer sums are six, with weights, products and constants beside them.
    const TILE_ROWS: usize = 3;
    const WIDE_ZERO: i32 = 0;

    #[inline(always)]
    fn splat(value: i32) -> Self {
        let half = avx2!(_mm256_set1_epi32(value));
        Avx2Int(half, half)
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        avx2!(Avx2Int(_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        avx2!(_mm256_storeu_si256(to.cast(), self.0));
        avx2!(_mm256_storeu_si256(to.add(32).cast(), self.1));
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self {
        let half = |at: *const i8| avx2!(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast())));
        Avx2Int(half(from), half(from.wrapping_add(8)))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut i8) {
        let Avx2Int(first, second) = self.and(Self::splat(0xff));
        // Packing works within halves of a register: lanes 0…3, 8…11 | 4…7, 12…15.
        let halves = avx2!(_mm256_packus_epi32(first, second));
        let halves = avx2!(_mm256_permute4x64_epi64::<0b11_01_10_00>(halves));
        let (low, high) = avx2!((_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves)));
        avx2!(_mm_storeu_si128(to.cast(), _mm_packus_epi16(low, high)));
    }
    #[inline(always)]
    unsafe fn load_columns(rows: &[*const u8; LANES], at: usize) -> [Self; 4] {
        // SAFETY: the caller's contract.
        let (first, second) = unsafe { (columns_of_eight(rows, 0, at), columns_of_eight(rows, 8, at)) };
        [
            Avx2Int(first[0], second[0]),
            Avx2Int(first[1], second[1]),
            Avx2Int(first[2], second[2]),
            Avx2Int(first[3], second[3]),
        ]
    }
    #[inline(always)]
    unsafe fn store_halves(self, to: *mut u16) {
        let Avx2Int(first, second) = self.and(Self::splat(0xffff));
        // Packing works within halves of a register: lanes 0…3, 8…11 | 4…7, 12…15.
        let halves = avx2!(_mm256_packus_epi32(first, second));
        avx2!(_mm256_storeu_si256(to.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(halves)));
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        self.zip(other, |a, b| avx2!(_mm256_and_si256(a, b)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        self.zip(other, |a, b| avx2!(_mm256_or_si256(a, b)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        self.zip(other, |a, b| avx2!(_mm256_xor_si256(a, b)))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        avx2!(Avx2Int(_mm256_add_epi32(self.0, other.0), _mm256_add_epi32(self.1, other.1)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        avx2!(Avx2Int(_mm256_max_epi32(self.0, other.0), _mm256_max_epi32(self.1, other.1)))
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self) -> Self {
        let count = avx2!(_mm_cvtsi32_si128(BITS as i32));
        self.map(|a| avx2!(_mm256_srl_epi32(a, count)))
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self) -> Self {
        let count = avx2!(_mm_cvtsi32_si128(BITS as i32));
        self.map(|a| avx2!(_mm256_sll_epi32(a, count)))
    }
    #[inline(always)]
    fn max_lane(self) -> i32 {
        let most = avx2!(_mm256_max_epi32(self.0, self.1));
        let most = avx2!(_mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256::<1>(most)));
        let most = avx2!(_mm_max_epi32(most, _mm_shuffle_epi32::<0b01_00_11_10>(most)));
        avx2!(_mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32::<0b10_11_00_01>(most))))
    }
    #[inline(always)]
    fn sum_lanes(self) -> i32 {
        let sum = avx2!(_mm256_add_epi32(self.0, self.1));
        let sum = avx2!(_mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum)));
        let sum = avx2!(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum)));
        avx2!(_mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum))))
    }
    #[inline(always)]
    fn to_float(self) -> Avx2 {
        avx2!(Avx2(_mm256_cvtepi32_ps(self.0), _mm256_cvtepi32_ps(self.1)))
    }
    #[inline(always)]
    fn as_float(self) -> Avx2 {
        avx2!(Avx2(_mm256_castsi256_ps(self.0), _mm256_castsi256_ps(self.1)))
    }
    /// Pairs of products stay below 2¹⁵: 2 · 127 · 127.
    #[inline(always)]
    fn dot_narrow(self, w: Self, x: Self) -> Self {
        let ones = avx2!(_mm256_set1_epi16(1));
        let dot =
            |sum, w, x| avx2!(_mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones)));
        Avx2Int(dot(self.0, w.0, x.0), dot(self.1, w.1, x.1))
    }
    /// |w − 128| · (±x): magnitudes up to 128 as unsigned, so that pairs stay below 2¹⁵ (2 · 128 · 127).
    #[inline(always)]
    fn dot_wide(self, w: Self, x: Self) -> Self {
        let signed = w.map(|w| avx2!(_mm256_xor_si256(w, _mm256_set1_epi8(-128))));
        let size = signed.map(|w| avx2!(_mm256_abs_epi8(w)));
        self.dot_narrow(size, x.zip(signed, |x, w| avx2!(_mm256_sign_epi8(x, w))))
    }
}

/// [`Int16::load_columns`] of the eight rows from `first` on.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn columns_of_eight(rows: &[*const u8; LANES], first: usize, at: usize) -> [__m256i; 4] {
    // SAFETY: the caller's contract.
    unsafe {
        let (a, b) = (row_pair(rows, first, at), row_pair(rows, first + 1, at));
        let (c, d) = (row_pair(rows, first + 2, at), row_pair(rows, first + 3, at));
        let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
        [
            _mm256_unpacklo_epi64(ab, cd),
            _mm256_unpackhi_epi64(ab, cd),
            _mm256_unpacklo_epi64(ab_high, cd_high),
            _mm256_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

/// Sixteen bytes of `row` and of the row four rows on: transposing within halves then puts every row into its lane.
///
/// # Safety
/// As for [`Int16::load_columns`].
#[inline(always)]
unsafe fn row_pair(rows: &[*const u8; LANES], row: usize, at: usize) -> __m256i {
    // SAFETY: the caller's contract.
    unsafe {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(rows[row].add(at).cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(rows[row + 4].add(at).cast()))
    }
}
