//! The fixed tree over parts, and over the ranks that hold them.

use crate::kernels::Kernels;
use crate::lanes::{LANES, LaneKernel, Simd16};
use crate::strided::DisjointMut;

/// `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))` over 1, 2, 4 or 8 numbers.
///
/// An empty part is −0, which leaves any other summand as it is.
///
/// # Panics
/// If there are not 1, 2, 4 or 8 parts.
pub(crate) fn sum_tree_scalar(parts: &[f32]) -> f32 {
    match *parts {
        [part] => part,
        _ => {
            assert!(matches!(parts.len(), 2 | 4 | 8), "a tree has 1, 2, 4 or 8 leaves, not {}", parts.len());
            let (left, right) = parts.split_at(parts.len() / 2);
            sum_tree_scalar(left) + sum_tree_scalar(right)
        }
    }
}

/// Elements below which another thread is not worth its wake-up.
const MIN_ELEMENTS: usize = 16 << 10;

impl Kernels {
    /// out ← `((p0+p1)+(p2+p3))+((p4+p5)+(p6+p7))` elementwise over 1, 2, 4 or 8 slices as long as `out`.
    ///
    /// This is the upper end of the tree in [`Kernels::matmul`]: rank r of R holds parts r·8/R … (r+1)·8/R and sums
    /// them; adding the ranks' sums by this tree gives the bits that one rank holding all parts would have computed.
    /// Empty parts do not disturb that: a rank with some empty parts leaves them out as a single rank does, and a rank
    /// with nothing but empty parts contributes −0, which changes no summand.
    ///
    /// # Panics
    /// If there are not 1, 2, 4 or 8 slices, or a length differs.
    pub fn sum_tree(&self, parts: &[&[f32]], out: &mut [f32]) {
        assert!(matches!(parts.len(), 1 | 2 | 4 | 8), "a tree has 1, 2, 4 or 8 leaves, not {}", parts.len());
        assert!(parts.iter().all(|part| part.len() == out.len()), "all parts are as long as the result");
        let len = out.len();
        let output = DisjointMut::new(out);
        self.for_ranges(len, MIN_ELEMENTS, |range| {
            // SAFETY: the ranges of different tasks are disjoint.
            let out = unsafe { output.range(range.clone()) };
            let mut slices: [&[f32]; 8] = [&[]; 8];
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = &part[range.clone()];
            }
            self.dispatch(SumTree { parts: &slices[..parts.len()], out });
        });
    }
}

struct SumTree<'a> {
    parts: &'a [&'a [f32]],
    out: &'a mut [f32],
}

impl LaneKernel for SumTree<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd16>(self) {
        for (chunk, out) in self.out.chunks_mut(LANES).enumerate() {
            let at = chunk * LANES;
            let mut leaves = [S::splat(0.0); 8];
            for (leaf, part) in leaves.iter_mut().zip(self.parts) {
                let part = &part[at..at + out.len()];
                *leaf = if part.len() == LANES { S::read(part) } else { S::read_tail(part, 0.0) };
            }
            let mut len = self.parts.len();
            while len > 1 {
                len /= 2;
                for i in 0..len {
                    leaves[i] = leaves[2 * i].add(leaves[2 * i + 1]);
                }
            }
            leaves[0].write_tail(out);
        }
    }
}
