//! Rows inside wider rows, and disjoint pieces of one output for several threads.

use std::marker::PhantomData;
use std::ops::Range;

/// A matrix whose rows lie `stride` elements apart, for instance the query columns of a fused QKV product.
#[derive(Debug, Clone, Copy)]
pub struct StridedRows<'a> {
    /// Row `r` starts at `data[r · stride]`.
    pub data: &'a [f32],
    /// Distance between the starts of neighbouring rows, in elements.
    pub stride: usize,
}

impl<'a> StridedRows<'a> {
    /// The first `width` elements of row `row`.
    #[inline(always)]
    pub fn row(&self, row: usize, width: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..width]
    }
}

/// An output that several tasks write, each its own ranges.
pub(crate) struct DisjointMut<'a, T = f32> {
    data: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is `range`, whose callers promise that ranges of different threads are disjoint.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> DisjointMut<'a, T> {
        DisjointMut { data: slice.as_mut_ptr(), len: slice.len(), owner: PhantomData }
    }

    /// A piece of the output.
    ///
    /// # Safety
    /// No two pieces that are alive at the same time may overlap.
    #[inline(always)]
    #[expect(clippy::mut_from_ref, reason = "this is the type's purpose; the contract forbids overlap")]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice that `new` borrowed exclusively; the caller vouches for disjointness.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }

    /// Where a piece of the output begins, of which the caller writes a part; what it writes must not be read or written by
    /// another task at the same time.
    #[inline(always)]
    pub(crate) fn shared(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len);
        self.data.wrapping_add(range.start)
    }
}
