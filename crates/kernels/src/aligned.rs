//! Memory for weights and caches: aligned to cache lines, and to huge pages where it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// A cache line, and the width of the widest vector.
const LINE: usize = 64;
/// A huge page of x86-64 and of most AArch64 kernels.
const HUGE_PAGE: usize = 2 << 20;

/// A fixed-length buffer of `f32`, zeroed, aligned to 64 bytes (to 2 MiB from 4 MiB upwards, where the system is also
/// asked for huge pages: a pass over gigabytes of weights otherwise misses the TLB all the time).
///
/// Large buffers cost no memory before they are written: the allocator takes fresh pages for them.
pub struct AlignedBuffer {
    data: NonNull<f32>,
    len: usize,
    /// What was allocated: `data` lies inside, at its first aligned address.
    allocation: NonNull<u8>,
}

impl AlignedBuffer {
    /// A buffer of `len` zeros.
    pub fn zeroed(len: usize) -> AlignedBuffer {
        let (layout, align) = AlignedBuffer::layout(len);
        // The alignment is made by hand: an allocator asked for both alignment and zeros writes the zeros itself, which
        // would touch every page, and before the advice.
        // SAFETY: the layout has a positive size.
        let allocation = unsafe { alloc_zeroed(layout) };
        let Some(allocation) = NonNull::new(allocation) else { handle_alloc_error(layout) };
        let offset = allocation.align_offset(align);
        // SAFETY: the layout has room for `align` bytes before `len` elements.
        let data = unsafe { allocation.add(offset) }.cast::<f32>();
        if align == HUGE_PAGE {
            advise_huge_pages(data, len * size_of::<f32>());
        }
        AlignedBuffer { data, len, allocation }
    }

    /// The buffer as bytes.
    pub fn as_bytes(&self) -> &[u8] {
        // SAFETY: `len` initialised floats are four times as many bytes, owned for as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr().cast(), 4 * self.len) }
    }

    /// The buffer as bytes, to write.
    pub fn as_bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_bytes`, and `self` is borrowed exclusively; any bytes are floats.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().cast(), 4 * self.len) }
    }

    fn layout(len: usize) -> (Layout, usize) {
        let bytes = len.checked_mul(size_of::<f32>()).expect("a buffer's size fits the address space");
        let align = if bytes >= 2 * HUGE_PAGE { HUGE_PAGE } else { LINE };
        let layout = Layout::from_size_align(bytes + align, align_of::<f32>());
        (layout.expect("a buffer's size fits the address space"), align)
    }
}

#[cfg(target_os = "linux")]
fn advise_huge_pages(data: NonNull<f32>, bytes: usize) {
    unsafe extern "C" {
        /// Of the C library that the standard library links anyway.
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: i32) -> i32;
    }
    const MADV_HUGEPAGE: i32 = 14;
    // SAFETY: the range is ours and page-aligned; the advice changes no content. A refusal is of no consequence.
    unsafe { madvise(data.as_ptr().cast(), bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise_huge_pages(_data: NonNull<f32>, _bytes: usize) {}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `zeroed` with the same layout.
        unsafe { dealloc(self.allocation.as_ptr(), AlignedBuffer::layout(self.len).0) };
    }
}

// SAFETY: the buffer owns plain numbers.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuffer {}

impl Deref for AlignedBuffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        // SAFETY: `len` initialised elements, owned for as long as `self`.
        unsafe { std::slice::from_raw_parts(self.data.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuffer({} floats)", self.len)
    }
}
