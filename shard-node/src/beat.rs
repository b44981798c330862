//! The sign of life of the compute loop itself: sent between layers and while waiting for peers, never by a helper
//! thread, so that a hung loop falls silent.

use ashlar_protocol::frame::FrameError;
use ashlar_protocol::membership::{BEAT_INTERVAL_MS, FromNode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Sends [`FromNode::Beat`], at most every [`BEAT_INTERVAL_MS`].
#[derive(Debug, Clone)]
pub struct Beat {
    out: mpsc::Sender<FromNode>,
    started: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Beat {
    /// Beats into `out`.
    pub fn new(out: mpsc::Sender<FromNode>) -> Beat {
        Beat { out, started: Instant::now(), last_ms: Arc::default() }
    }

    /// One that nobody hears: for what is not the compute loop.
    pub(crate) fn silent() -> Beat {
        Beat::new(mpsc::channel(1).0)
    }

    /// Beats if it is time. A full queue needs no beat: other messages say that this rank lives.
    pub fn tick(&self) -> Result<(), FrameError> {
        let now_ms = self.started.elapsed().as_millis() as u64;
        if now_ms.saturating_sub(self.last_ms.load(Ordering::Relaxed)) >= BEAT_INTERVAL_MS / 2 {
            self.last_ms.store(now_ms, Ordering::Relaxed);
            let _ = self.out.try_send(FromNode::Beat);
        }
        Ok(())
    }

    /// How long a compute loop may wait without beating.
    pub fn interval() -> Duration {
        Duration::from_millis(BEAT_INTERVAL_MS)
    }
}
