//! A response that this gateway is driving: its events so far, and who listens.

use crate::openai::error::ApiError;
use ashlar_vocabulary::{RequestId, Tenant};
use bytes::Bytes;
use serde_json::Value;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Shared by its driver and its listeners.
#[derive(Debug)]
pub(super) struct Live {
    pub(super) id: RequestId,
    /// The object while it is in progress.
    pub(super) in_progress: Value,
    /// Whose it is, if it is stored; others than the one who asked for it know nothing of one that is not.
    pub(super) stored_for: Option<Option<Tenant>>,
    frames: Mutex<Vec<Bytes>>,
    state: watch::Sender<State>,
    listeners: watch::Sender<usize>,
}

/// How far it is.
#[derive(Debug, Clone, Default)]
struct State {
    frames: usize,
    /// Whether the model has said anything yet.
    has_output: bool,
    end: Option<Ended>,
}

/// How it ended here.
#[derive(Debug, Clone)]
pub(super) enum Ended {
    /// The final object.
    With(Arc<Value>),
    /// Before any output, with an error that has a status of its own.
    Failed(ApiError, Arc<Value>),
    /// This gateway goes; another one goes on with it.
    HandedOver,
}

impl Live {
    pub(super) fn new(id: RequestId, in_progress: Value, stored_for: Option<Option<Tenant>>) -> Arc<Live> {
        let state = watch::Sender::new(State::default());
        let (frames, listeners) = (Mutex::new(Vec::new()), watch::Sender::new(0));
        Arc::new(Live { id, in_progress, stored_for, frames, state, listeners })
    }

    /// Adds events; `has_output` from the first that the model is the cause of.
    pub(super) fn push(&self, frames: Vec<Bytes>, has_output: bool) {
        let count = {
            let mut all = self.frames();
            all.extend(frames);
            all.len()
        };
        self.state.send_modify(|state| {
            state.frames = count;
            state.has_output |= has_output;
        });
    }

    pub(super) fn end(&self, ended: Ended) {
        self.state.send_modify(|state| state.end = Some(ended));
    }

    /// All events.
    pub(super) fn all_frames(&self) -> Vec<Bytes> {
        self.frames().clone()
    }

    /// A listener who has heard the events before `next`.
    pub(super) fn listen(self: &Arc<Live>, next: usize) -> Listener {
        self.listeners.send_modify(|count| *count += 1);
        Listener { state: self.state.subscribe(), live: self.clone(), next }
    }

    /// Waits until nobody has listened for `patience`.
    pub(super) async fn abandoned(&self, patience: Duration) {
        let mut listeners = self.listeners.subscribe();
        loop {
            // The sender lives as long as this.
            let _ = listeners.wait_for(|count| *count == 0).await;
            let comes = listeners.wait_for(|count| *count > 0);
            if tokio::time::timeout(patience, comes).await.is_err() {
                return;
            }
        }
    }

    fn frames(&self) -> MutexGuard<'_, Vec<Bytes>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who listens. While there is one the response goes on.
#[derive(Debug)]
pub(super) struct Listener {
    live: Arc<Live>,
    state: watch::Receiver<State>,
    next: usize,
}

impl Listener {
    /// The next event; `None` when there are no more here. Cancellation-safe.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        let next = self.next;
        let more = |state: &State| state.frames > next || state.end.is_some();
        let _ = self.state.wait_for(more).await;
        let frame = self.live.frames().get(next).cloned()?;
        self.next += 1;
        Some(frame)
    }

    /// All events so far.
    pub(super) fn all_frames(&self) -> Vec<Bytes> {
        self.live.all_frames()
    }

    /// Waits until the model has said something, or it is over; whether that was an error.
    pub(super) async fn begun(&mut self) -> Result<(), ApiError> {
        let begun = self.state.wait_for(|state| state.has_output || state.end.is_some()).await;
        match begun.ok().and_then(|state| state.end.clone()) {
            Some(Ended::Failed(error, _)) => Err(error),
            _ => Ok(()),
        }
    }

    /// Waits for the end; `None` where another gateway goes on with it.
    pub(super) async fn ended(&mut self) -> Option<Ended> {
        let state = self.state.wait_for(|state| state.end.is_some()).await.ok()?;
        state.end.clone().filter(|end| !matches!(end, Ended::HandedOver))
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.live.listeners.send_modify(|count| *count -= 1);
    }
}
