//! Which cores this process may use, and keeping a thread on one of them.

use std::fmt;
use std::io;
use std::marker::PhantomData;

/// Threads that this process may use: cores, affinity and a container's quota considered.
///
/// A thread that is [pinned](crate::ThreadPool::on_cores) sees its own core alone: ask before, or elsewhere.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The cores that the calling thread may use, by the numbers that the operating system gives them; none where it cannot
/// tell, and where threads cannot be pinned.
pub fn available_cores() -> Vec<usize> {
    system::available()
}

/// A thread could not be kept on a core.
#[derive(Debug)]
pub struct PinError {
    core: usize,
    source: io::Error,
}

impl fmt::Display for PinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot keep a thread on core {}: {}; choose among the cores ", self.core, self.source)?;
        write!(f, "that this process may use ({:?}), or pin none", available_cores())
    }
}

impl std::error::Error for PinError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Keeps the calling thread on one core; when dropped, the thread may go again where it could before.
///
/// Threads that it starts meanwhile inherit the restriction.
#[derive(Debug)]
pub struct PinnedThread {
    before: system::Cores,
    /// It is this thread's: dropped on another one it would free the wrong one.
    _not_send: PhantomData<*const ()>,
}

impl PinnedThread {
    /// Moves the calling thread to `core`.
    pub(crate) fn to(core: usize) -> Result<PinnedThread, PinError> {
        let before = system::pin(core).map_err(|source| PinError { core, source })?;
        Ok(PinnedThread { before, _not_send: PhantomData })
    }
}

impl Drop for PinnedThread {
    fn drop(&mut self) {
        system::restore(&self.before);
    }
}

#[cfg(target_os = "linux")]
mod system {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    use std::io;

    pub(super) type Cores = CpuSet;

    pub(super) fn available() -> Vec<usize> {
        let Ok(cores) = sched_getaffinity(None) else { return Vec::new() };
        (0..CpuSet::MAX_CPU).filter(|&core| cores.is_set(core)).collect()
    }

    pub(super) fn pin(core: usize) -> io::Result<Cores> {
        let before = sched_getaffinity(None)?;
        // The system takes any core of the machine; that the process was given only some is its user's will.
        if core >= CpuSet::MAX_CPU || !before.is_set(core) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not this process's to use"));
        }
        let mut only = CpuSet::new();
        only.set(core);
        sched_setaffinity(None, &only)?;
        Ok(before)
    }

    pub(super) fn restore(before: &Cores) {
        // It was allowed before; if all those cores have been taken away since, the system chooses others itself.
        let _ = sched_setaffinity(None, before);
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use std::io;

    pub(super) type Cores = ();

    pub(super) fn available() -> Vec<usize> {
        Vec::new()
    }

    pub(super) fn pin(_core: usize) -> io::Result<Cores> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(super) fn restore(_before: &Cores) {}
}
