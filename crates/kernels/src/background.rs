//! Work that gives way: threads of the lowest priority, which also stop between two tasks while something more urgent
//! computes on the same cores.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// The first nap of a thread that gives way. Raising and lowering a flag wake nobody, so that they cost the urgent side
/// nothing; naps double up to [`NAP_MAX`].
const NAP_MIN: Duration = Duration::from_micros(250);
const NAP_MAX: Duration = Duration::from_millis(4);

/// Raised while something urgent computes; whoever works in the background looks at it between tasks. Clones share it.
#[derive(Debug, Default, Clone)]
pub struct YieldFlag(Arc<AtomicUsize>);

/// Keeps a [`YieldFlag`] raised until it is dropped.
#[derive(Debug)]
pub struct Raised<'f>(&'f YieldFlag);

impl YieldFlag {
    /// Raises the flag; several may do so at once.
    pub fn raise(&self) -> Raised<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Raised(self)
    }

    /// Whether something urgent computes.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed) > 0
    }

    /// Sleeps while the flag is raised.
    #[inline]
    pub fn give_way(&self) {
        if self.is_raised() {
            self.nap();
        }
    }

    #[cold]
    fn nap(&self) {
        let mut nap = NAP_MIN;
        while self.is_raised() {
            thread::sleep(nap);
            nap = (nap * 2).min(NAP_MAX);
        }
    }
}

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Gives the calling thread, and threads that it starts from now on, the lowest priority; without effect where the system
/// has no priorities of threads.
pub fn lower_priority() {
    #[cfg(target_os = "linux")]
    {
        // On Linux this names the calling thread, not its process. Lowering is always allowed.
        let _ = rustix::process::setpriority_process(None, 19);
    }
}
