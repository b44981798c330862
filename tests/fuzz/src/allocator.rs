//! The system's allocator with a count of what is held, so that what an input costs is measured and not guessed.
//!
//! The one place with `unsafe`: a global allocator is an unsafe trait. Every call is handed on as it came.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes held now, and most of them since [`start`].
static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// More than this is refused, which ends the process: better than to have the machine run out of memory.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Counts what the system's allocator gives.
#[derive(Debug)]
pub struct Counting;

/// From here on the peak is counted anew. Gives what is held now.
pub fn start() -> usize {
    let held = HELD.load(Ordering::Relaxed);
    PEAK.store(held, Ordering::Relaxed);
    held
}

/// Most bytes held at once since [`start`].
pub fn peak() -> usize {
    PEAK.load(Ordering::Relaxed)
}

/// Sets how many bytes may be held at all.
pub fn limit(bytes: usize) {
    LIMIT.store(bytes, Ordering::Relaxed);
}

/// Whether `bytes` more may be held; they are counted if so.
fn take(bytes: usize) -> bool {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
    if held > LIMIT.load(Ordering::Relaxed) {
        HELD.fetch_sub(bytes, Ordering::Relaxed);
        return false;
    }
    // Looked at first: most of the time it is less, and a look costs next to nothing.
    if held > PEAK.load(Ordering::Relaxed) {
        PEAK.fetch_max(held, Ordering::Relaxed);
    }
    true
}

// SAFETY: every call goes to the system's allocator with the arguments that it came with, and its answer is handed back;
// null, where the count forbids more, is the answer that the trait has for an allocation that fails.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if !take(layout.size()) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above; the place came from the system's allocator.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both may exist for a moment.
        if !take(size) {
            return std::ptr::null_mut();
        }
        // SAFETY: as above.
        let moved = unsafe { System.realloc(place, layout, size) };
        HELD.fetch_sub(if moved.is_null() { size } else { layout.size() }, Ordering::Relaxed);
        moved
    }
}
