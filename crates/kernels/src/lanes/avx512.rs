//! Sixteen lanes as one AVX-512 register.

use super::{LaneKernel, Simd16};
use std::arch::x86_64::*;

/// Runs a kernel compiled for AVX-512F.
#[target_feature(enable = "avx512f,avx2,fma")]
pub(super) fn run<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx512>()
}

/// One 512-bit register; exists only below [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

/// An intrinsic of AVX-512F, or a load or store whose pointer the caller vouches for.
macro_rules! avx512 {
    ($call:expr) => {
        // SAFETY: this type is instantiated only by `run`, whose callers checked for AVX-512F; pointers are covered by
        // the contract of the surrounding method.
        unsafe { $call }
    };
}

impl Simd16 for Avx512 {
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
}
