//! The handle through which every kernel runs: an instruction set and a pool of threads.

use crate::attention::AttentionRoom;
use crate::isa::Isa;
use crate::lanes::{self, LaneKernel};
use crate::pool::ThreadPool;
use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs kernels with one instruction set on one pool of threads; neither changes a bit of any result.
pub struct Kernels {
    isa: Isa,
    pool: ThreadPool,
    /// Activations on their way into products with quantised weights; grows to the largest and stays.
    scratch: Mutex<Vec<u32>>,
    attention_room: Mutex<AttentionRoom>,
}

impl Kernels {
    /// Kernels on `threads` threads, the caller included (at least 1).
    ///
    /// # Panics
    /// If this machine cannot run `isa`; ask [`Isa::available`] first.
    pub fn new(isa: Isa, threads: usize) -> Kernels {
        Kernels::on_pool(isa, ThreadPool::new(threads))
    }

    /// Kernels on the threads of `pool`.
    ///
    /// # Panics
    /// If this machine cannot run `isa`; ask [`Isa::available`] first.
    pub fn on_pool(isa: Isa, pool: ThreadPool) -> Kernels {
        assert!(isa.is_available(), "this machine cannot run {isa} kernels");
        Kernels { isa, pool, scratch: Mutex::default(), attention_room: Mutex::default() }
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// The threads in use, for work of the caller's own.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// How many threads take part in one kernel.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Makes room for activations of `words` 32-bit words, so that no product allocates.
    pub fn reserve(&self, words: usize) {
        drop(self.scratch(words));
    }

    /// At least `words` words for the product being computed; one product at a time has them.
    pub(crate) fn scratch(&self, words: usize) -> MutexGuard<'_, Vec<u32>> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if scratch.len() < words {
            // To what is needed and no further: ledgers count on it.
            let missing = words - scratch.len();
            scratch.reserve_exact(missing);
            scratch.resize(words, 0);
        }
        scratch
    }

    /// Memory that is held for activations on their way into products, in bytes: that of the largest so far.
    pub fn scratch_bytes(&self) -> usize {
        size_of::<u32>() * self.scratch(0).capacity()
    }

    /// The memory of attention; one call at a time has it.
    pub(crate) fn attention_room(&self) -> MutexGuard<'_, AttentionRoom> {
        self.attention_room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a lane kernel on the calling thread with the chosen instruction set.
    #[inline]
    pub(crate) fn dispatch<K: LaneKernel>(&self, kernel: K) -> K::Output {
        // SAFETY: `new` checked that this machine runs `self.isa`, and the field is never written again.
        unsafe { lanes::dispatch(self.isa, kernel) }
    }

    /// Whether the instruction for pairs of brain floats is the fastest way of multiplying them here.
    pub(crate) fn pairs_are_fast(&self) -> bool {
        lanes::pairs_are_fast(self.isa)
    }

    /// [`Kernels::dispatch`] for kernels that multiply pairs of brain floats.
    #[inline]
    pub(crate) fn dispatch_pairs<K: LaneKernel>(&self, kernel: K) -> K::Output {
        // SAFETY: as for `dispatch`.
        unsafe { lanes::dispatch_pairs(self.isa, kernel) }
    }

    /// Cuts `0..items` into consecutive ranges of at least `min_items` and runs `body` on each, in parallel.
    pub(crate) fn for_ranges(&self, items: usize, min_items: usize, body: impl Fn(Range<usize>) + Sync) {
        let most = if self.threads() == 1 { 1 } else { 4 * self.threads() };
        let tasks = (items / min_items.max(1)).clamp(1, most);
        self.pool.run(tasks, &|task| body(task * items / tasks..(task + 1) * items / tasks));
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("isa", &self.isa).field("threads", &self.threads()).finish()
    }
}
