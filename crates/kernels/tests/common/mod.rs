//! What the tests share: every way of running a kernel, and numbers.
#![allow(dead_code, reason = "each test file uses some of it")]

use ashlar_kernels::{Isa, Kernels};
use std::sync::OnceLock;

/// Every instruction set with one thread, and the best one with 2…4.
pub(crate) fn all_kernels() -> &'static [Kernels] {
    static ALL: OnceLock<Vec<Kernels>> = OnceLock::new();
    ALL.get_or_init(|| {
        let isas = Isa::available().into_iter().map(|isa| Kernels::new(isa, 1));
        isas.chain((2..=4).map(|threads| Kernels::new(Isa::best(), threads))).collect()
    })
}

/// Reproducible numbers of mixed magnitude around zero.
pub(crate) fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next() * if next() > 0.8 { 8.0 } else { 1.0 }).collect()
}

/// The bits of some numbers.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Runs `compute` with every kernel set; all must give the same bits, which are returned.
pub(crate) fn everywhere(compute: impl Fn(&Kernels) -> Vec<f32>) -> Vec<f32> {
    let first = compute(&all_kernels()[0]);
    for kernels in all_kernels() {
        assert!(bits(&compute(kernels)) == bits(&first), "{kernels:?}");
    }
    first
}
