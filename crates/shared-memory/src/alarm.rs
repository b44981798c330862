//! Ends a rank's wait from another thread: a peer's connection has ended, or this rank is told to give up.

use crate::segment::Segment;
use rustix::thread::futex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A handle with which any thread of this process ends its rank's exchange. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Alarm {
    state: Arc<State>,
    segment: Arc<Segment>,
    rank: usize,
}

#[derive(Debug, Default)]
struct State {
    raised: AtomicBool,
    lost: Mutex<Option<(usize, String)>>,
}

impl Alarm {
    pub(crate) fn new(segment: Arc<Segment>, rank: usize) -> Alarm {
        Alarm { state: Arc::default(), segment, rank }
    }

    /// Says that rank `lost` is lost, and why. A wait ends at once, later exchanges fail. Only the first call counts.
    pub fn raise(&self, lost: usize, reason: String) {
        self.state.lost.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((lost, reason));
        self.state.raised.store(true, Ordering::SeqCst);
        // Rung whether or not the rank sleeps: it may be about to, and this happens once.
        ring(&self.segment, self.rank);
    }

    /// Who is lost, if anybody.
    pub(crate) fn lost(&self) -> Option<(usize, String)> {
        if !self.state.raised.load(Ordering::SeqCst) {
            return None;
        }
        self.state.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Wakes a rank. The bell changes first, so that a rank that has looked but not yet fallen asleep does not.
pub(crate) fn ring(segment: &Segment, rank: usize) {
    let bell = &segment.control(rank).sleep.bell;
    bell.fetch_add(1, Ordering::SeqCst);
    // Waking cannot fail but for a bad address; one thread sleeps at most. Not private: it may be another process.
    let _ = futex::wake(bell, futex::Flags::empty(), 1);
}
