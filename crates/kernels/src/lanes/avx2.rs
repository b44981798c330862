//! Sixteen lanes as two AVX2 registers.

use super::{LaneKernel, Simd16};
use std::arch::x86_64::*;

/// Runs a kernel compiled for AVX2 with FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) fn run<K: LaneKernel>(kernel: K) -> K::Output {
    kernel.run::<Avx2>()
}

/// Lanes 0…7 and 8…15; exists only below [`run`].
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

/// An intrinsic of AVX2 or FMA, or a load or store whose pointer the caller vouches for.
macro_rules! avx2 {
    ($call:expr) => {
        // SAFETY: this type is instantiated only by `run`, whose callers checked for AVX2 and FMA; pointers are covered
        // by the contract of the surrounding method.
        unsafe { $call }
    };
}

impl Simd16 for Avx2 {
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
}
