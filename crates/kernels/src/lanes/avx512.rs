//! Sixteen lanes as one AVX-512 register; bytes multiply by VNNI, or in pairs where there is none.

use super::avx2::{max_eight, sum_eight};
use super::{Int16, LANES, LaneKernel, Simd16};
use std::arch::x86_64::*;

/// Runs a kernel compiled for AVX-512 with VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
pub(super) fn run<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, false>>()
}

/// Runs a kernel compiled for AVX-512 without VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
pub(super) fn run_without_vnni<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<false, false>>()
}

/// Runs a kernel compiled for AVX-512 with VNNI and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) fn run_pairs<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512<true, true>>()
}

/// The same 512 bits, as the instruction for pairs takes them.
#[inline(always)]
fn as_pairs(words: __m512i) -> __m512bh {
    // SAFETY: both are 64 bytes of which every pattern is valid.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(words) }
}

/// Times the instruction for pairs against two multiply-adds: the best of a few tries of some microseconds each.
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn pairs_are_fast() -> bool {
    const CHAINS: usize = 12;
    const ROUNDS: usize = 500;
    let time = |body: &dyn Fn()| {
        let try_once = |_| {
            let start = std::time::Instant::now();
            body();
            start.elapsed()
        };
        (0..5).map(try_once).min()
    };
    let pairs = || {
        let one = _mm512_set1_epi32(std::hint::black_box(0x3f80_3f80));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, as_pairs(one), as_pairs(one));
            }
        }
        std::hint::black_box(sums);
    };
    let singles = || {
        let one = _mm512_set1_ps(std::hint::black_box(1.0));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            for _ in 0..2 {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(one, one, *sum);
                }
            }
        }
        std::hint::black_box(sums);
    };
    time(&pairs) < time(&singles)
}

/// One 512-bit register; exists only below [`run_without_vnni`], with `VNNI` below [`run`], and with `PAIRS` below
/// [`run_pairs`].
#[derive(Clone, Copy)]
pub(super) struct Avx512<const VNNI: bool, const PAIRS: bool>(__m512);

/// Sixteen integers in one 512-bit register.
#[derive(Clone, Copy)]
pub(super) struct Avx512Int<const VNNI: bool, const PAIRS: bool>(__m512i);

/// An intrinsic of AVX-512F, BW or VNNI, or a load or store whose pointer the caller vouches for.
macro_rules! avx512 {
    ($call:expr) => {
        // SAFETY: this type is instantiated only by `run` and its siblings, whose callers checked for them; pointers are covered by
        // the contract of the surrounding method.
        unsafe { $call }
    };
}

/// Lanes 8…15.
#[inline(always)]
unsafe fn high_half(lanes: __m512) -> __m256 {
    // SAFETY: the caller runs on a machine with AVX-512F.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(lanes))) }
}

impl<const VNNI: bool, const PAIRS: bool> Simd16 for Avx512<VNNI, PAIRS> {
    type Int = Avx512Int<VNNI, PAIRS>;

    /// 32 registers: six rows × four vectors of sums, four of weights.
    const TILE_VECTORS: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Avx512(avx512!(_mm512_set1_ps(value)))
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Avx512(avx512!(_mm512_loadu_ps(from)))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        avx512!(_mm512_storeu_ps(to, self.0))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_add_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_sub_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_mul_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_div_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, term: Self) -> Self {
        Avx512(avx512!(_mm512_fmadd_ps(self.0, factor.0, term.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Avx512(avx512!(_mm512_max_ps(self.0, other.0)))
    }
    #[inline(always)]
    fn select_less(self, bound: Self, then: Self, otherwise: Self) -> Self {
        Avx512(avx512!(_mm512_mask_blend_ps(
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, bound.0),
            otherwise.0,
            then.0
        )))
    }
    #[inline(always)]
    fn power_of_two(self) -> Self {
        Avx512(avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(self.0),
            _mm512_set1_epi32(127)
        )))))
    }
    #[inline(always)]
    fn prefetch(at: *const f32) {
        avx512!(_mm_prefetch::<_MM_HINT_T0>(at.cast()))
    }
    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> Self {
        Avx512(avx512!(_mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))))
    }
    #[inline(always)]
    unsafe fn load_brain(from: *const u16) -> Self {
        let words = avx512!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())));
        Avx512(avx512!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))))
    }
    #[inline(always)]
    fn sum_lanes(self) -> f32 {
        avx512!(sum_eight(_mm256_add_ps(_mm512_castps512_ps256(self.0), high_half(self.0))))
    }
    #[inline(always)]
    fn max_lane(self) -> f32 {
        avx512!(max_eight(_mm256_max_ps(_mm512_castps512_ps256(self.0), high_half(self.0))))
    }
    #[inline(always)]
    fn dot_pairs(self, w: Self::Int, x: Self::Int) -> Self {
        if PAIRS {
            // SAFETY: `PAIRS` is instantiated only by `run_pairs`, whose caller asked for BF16.
            Avx512(unsafe { _mm512_dpbf16_ps(self.0, as_pairs(w.0), as_pairs(x.0)) })
        } else {
            super::dot_pairs_emulated(self, w, x)
        }
    }
    #[inline(always)]
    fn to_bits(self) -> Self::Int {
        Avx512Int(avx512!(_mm512_castps_si512(self.0)))
    }
    #[inline(always)]
    fn round(self) -> Self::Int {
        Avx512Int(avx512!(_mm512_cvtps_epi32(self.0)))
    }
}

impl<const VNNI: bool, const PAIRS: bool> Int16 for Avx512Int<VNNI, PAIRS> {
    type Float = Avx512<VNNI, PAIRS>;

    /// 32 registers: twelve integer sums, twelve of floats, weights and scales.
    const TILE_ROWS: usize = 12;
    const WIDE_ZERO: i32 = if VNNI { 128 } else { 0 };

    #[inline(always)]
    fn splat(value: i32) -> Self {
        Avx512Int(avx512!(_mm512_set1_epi32(value)))
    }
    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        Avx512Int(avx512!(_mm512_loadu_si512(from.cast())))
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        avx512!(_mm512_storeu_si512(to.cast(), self.0))
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> Self {
        Avx512Int(avx512!(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))))
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut i8) {
        avx512!(_mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(self.0)))
    }
    #[inline(always)]
    unsafe fn load_columns(rows: &[*const u8; LANES], at: usize) -> [Self; 4] {
        // SAFETY: the caller's contract.
        let columns = unsafe { columns(rows, at) };
        [Avx512Int(columns[0]), Avx512Int(columns[1]), Avx512Int(columns[2]), Avx512Int(columns[3])]
    }
    #[inline(always)]
    unsafe fn store_halves(self, to: *mut u16) {
        avx512!(_mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(self.0)))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Avx512Int(avx512!(_mm512_and_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Avx512Int(avx512!(_mm512_or_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Avx512Int(avx512!(_mm512_xor_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Avx512Int(avx512!(_mm512_add_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Avx512Int(avx512!(_mm512_max_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn shift_right<const BITS: u32>(self) -> Self {
        Avx512Int(avx512!(_mm512_srli_epi32::<BITS>(self.0)))
    }
    #[inline(always)]
    fn shift_left<const BITS: u32>(self) -> Self {
        Avx512Int(avx512!(_mm512_slli_epi32::<BITS>(self.0)))
    }
    #[inline(always)]
    fn max_lane(self) -> i32 {
        avx512!(_mm512_reduce_max_epi32(self.0))
    }
    #[inline(always)]
    fn sum_lanes(self) -> i32 {
        avx512!(_mm512_reduce_add_epi32(self.0))
    }
    #[inline(always)]
    fn to_float(self) -> Self::Float {
        Avx512(avx512!(_mm512_cvtepi32_ps(self.0)))
    }
    #[inline(always)]
    fn as_float(self) -> Self::Float {
        Avx512(avx512!(_mm512_castsi512_ps(self.0)))
    }
    #[inline(always)]
    fn dot_narrow(self, w: Self, x: Self) -> Self {
        if VNNI {
            return Avx512Int(avx512!(_mm512_dpbusd_epi32(self.0, w.0, x.0)));
        }
        let ones = avx512!(_mm512_set1_epi16(1));
        let quads = avx512!(_mm512_madd_epi16(_mm512_maddubs_epi16(w.0, x.0), ones));
        Avx512Int(avx512!(_mm512_add_epi32(self.0, quads)))
    }
    /// Without VNNI |w − 128| · (±x): magnitudes up to 128 as unsigned, so that pairs stay below 2¹⁵ (2 · 128 · 127).
    #[inline(always)]
    fn dot_wide(self, w: Self, x: Self) -> Self {
        if VNNI {
            return self.dot_narrow(w, x);
        }
        let signed = avx512!(_mm512_xor_si512(w.0, _mm512_set1_epi8(-128)));
        let size = avx512!(_mm512_abs_epi8(signed));
        let negative = avx512!(_mm512_movepi8_mask(signed));
        let turned = avx512!(_mm512_mask_sub_epi8(x.0, negative, _mm512_setzero_si512(), x.0));
        self.dot_narrow(Avx512Int(size), Avx512Int(turned))
    }
}

/// [`Int16::load_columns`].
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn columns(rows: &[*const u8; LANES], at: usize) -> [__m512i; 4] {
    // SAFETY: the caller's contract.
    unsafe {
        let (a, b) = (four_rows(rows, 0, at), four_rows(rows, 1, at));
        let (c, d) = (four_rows(rows, 2, at), four_rows(rows, 3, at));
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(ab_high, cd_high),
            _mm512_unpackhi_epi64(ab_high, cd_high),
        ]
    }
}

/// Sixteen bytes of `row` and of every fourth row after it: transposing within quarters then puts every row into its lane.
///
/// # Safety
/// As for [`Int16::load_columns`].
#[inline(always)]
unsafe fn four_rows(rows: &[*const u8; LANES], row: usize, at: usize) -> __m512i {
    // SAFETY: the caller's contract.
    unsafe {
        let first = _mm512_castsi128_si512(_mm_loadu_si128(rows[row].add(at).cast()));
        let second = _mm_loadu_si128(rows[row + 4].add(at).cast());
        let third = _mm_loadu_si128(rows[row + 8].add(at).cast());
        let fourth = _mm_loadu_si128(rows[row + 12].add(at).cast());
        let half = _mm512_inserti32x4::<1>(first, second);
        _mm512_inserti32x4::<3>(_mm512_inserti32x4::<2>(half, third), fourth)
    }
}
