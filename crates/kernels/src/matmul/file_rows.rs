//! Rows as model files hold them, read a few at a time and packed before they leave the core's cache.

use super::packed::PANEL;
use crate::kernels::Kernels;
use crate::lanes::LANES;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most bytes that are read at once, unless sixteen rows are more: what stays in a core's own cache until it is packed.
const READ_BYTES: usize = 120 << 10;
/// Packed bytes of a task, where there are enough: threads that begin the same huge page both clear it.
const TASK_BYTES: usize = 4 << 20;
/// Most tasks per thread.
const TASKS_PER_THREAD: usize = 8;

/// Rows as files hold them: what a packer's source appends.
#[derive(Debug, Default)]
pub struct FileRows {
    bytes: Vec<u8>,
    /// How many of the bytes belong to the rows; what lies behind is left of longer ones.
    len: usize,
    starts: Vec<usize>,
}

impl FileRows {
    /// Room for `len` more bytes, all to be written, and the place of their first.
    pub fn grow(&mut self, len: usize) -> (usize, &mut [u8]) {
        let start = self.len;
        self.len += len;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len, 0);
        }
        (start, &mut self.bytes[start..self.len])
    }

    /// Appends a row, whose weights begin with byte `start`.
    pub fn push(&mut self, start: usize) {
        self.starts.push(start);
    }

    fn clear(&mut self) {
        self.len = 0;
        self.starts.clear();
    }

    /// Sixteen rows of `row_bytes` from `first` on; `nothing` in place of those that do not exist.
    fn sixteen(&self, first: usize, row_bytes: usize, nothing: &[u8]) -> [*const u8; LANES] {
        std::array::from_fn(|lane| match self.starts.get(first + lane) {
            Some(&start) => self.bytes[..self.len][start..][..row_bytes].as_ptr(),
            None => nothing.as_ptr(),
        })
    }
}

/// A source of rows: `read(outputs, to)` must append a row for each of the outputs.
pub type ReadRows<'a, E> = dyn Fn(Range<usize>, &mut FileRows) -> Result<(), E> + Sync + 'a;

/// Reads `n` rows of `row_bytes` on the threads of `kernels`, and calls `pack(first, rows)` for every sixteen of them: the
/// rows are valid for reading meanwhile; those beyond the last are `nothing`, which is as long. Each sixteen belong to one
/// task. The first error of `read` ends it early.
///
/// # Panics
/// If `read` appends too few rows, or too short ones.
pub(super) fn for_sixteens<E: Send>(
    n: usize,
    row_bytes: usize,
    nothing: &[u8],
    kernels: &Kernels,
    read: &ReadRows<'_, E>,
    pack: &(dyn Fn(usize, [*const u8; LANES]) + Sync),
) -> Result<(), E> {
    assert!(nothing.len() >= row_bytes, "a row that weighs nothing is as long as any");
    let rows_at_once = if PANEL * row_bytes <= READ_BYTES { PANEL } else { LANES };
    let (reads, threads) = (n.div_ceil(rows_at_once), kernels.threads());
    let tasks = threads * (n * row_bytes / TASK_BYTES / threads).clamp(1, TASKS_PER_THREAD);
    let tasks = tasks.min(reads);
    let (failed, failure) = (AtomicBool::new(false), Mutex::new(None));
    kernels.pool().run(tasks, &|task| {
        let mut rows = FileRows::default();
        for first in (task * reads / tasks..(task + 1) * reads / tasks).map(|read| read * rows_at_once) {
            if failed.load(Ordering::Relaxed) {
                return;
            }
            let outputs = first..n.min(first + rows_at_once);
            rows.clear();
            if let Err(error) = read(outputs.clone(), &mut rows) {
                failed.store(true, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                return;
            }
            assert!(rows.starts.len() == outputs.len(), "every output has a row");
            for first in outputs.step_by(LANES) {
                pack(first, rows.sixteen(first % rows_at_once, row_bytes, nothing));
            }
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
