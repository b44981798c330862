//! A job's events as they come, as server-sent events.
//!
//! The scheduler keeps events; it is asked for new ones a few times per second, and a client that reads slowly makes this
//! ask less often. So a follower holds a page of events and never more.

use super::objects::{event_object, is_last};
use super::tuning;
use crate::app::{App, Phase};
use crate::openai::error::ApiError;
use crate::openai::sse;
use crate::scheduler_client::CallError;
use ashlar_protocol::admin::{AdminReply, AdminRequest, JobEvent, JobRecord, Page};
use axum::response::Response;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// Between two questions.
const POLL: Duration = Duration::from_millis(500);
/// Events asked for at once.
const PAGE: u32 = 100;
/// Events that are looked back for; what is older is in the list.
const BACKLOG_MAX: usize = 1000;

/// Where a follower is.
struct Follower {
    app: Arc<App>,
    job: JobRecord,
    /// The number of the next event to tell.
    next: u64,
    frames: VecDeque<Bytes>,
    over: bool,
    /// When to ask again.
    ask_at: Instant,
    /// When the client was last told something.
    told_at: Instant,
    _place: OwnedSemaphorePermit,
}

/// Answers with a stream of the events after `after`, oldest first, which ends with the job.
pub(super) fn respond(app: Arc<App>, job: JobRecord, after: Option<u64>) -> Result<Response, ApiError> {
    let place = tuning(&app)?.followers.clone().try_acquire_owned().map_err(|_| {
        ApiError::too_many("too many clients follow jobs: list the events instead, or retry later")
    })?;
    let now = Instant::now();
    let follower = Follower {
        app,
        job,
        next: after.map_or(0, |after| after.saturating_add(1)),
        frames: VecDeque::new(),
        over: false,
        ask_at: now,
        told_at: now,
        _place: place,
    };
    Ok(sse::response(futures::stream::unfold(follower, |mut follower| async move {
        let frame = follower.frame().await?;
        Some((frame, follower))
    })))
}

impl Follower {
    async fn frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                self.told_at = Instant::now();
                return Some(frame);
            }
            if self.over {
                return None;
            }
            if self.told_at.elapsed() >= self.app.config.keep_alive() {
                self.frames.push_back(sse::keep_alive());
                continue;
            }
            // At the latest when the next comment is due.
            let wait_until = self.ask_at.min(self.told_at + self.app.config.keep_alive());
            let mut phase = self.app.phase.clone();
            tokio::select! {
                () = tokio::time::sleep_until(wait_until) => {}
                _ = phase.wait_for(|phase| *phase >= Phase::Draining) => {
                    // Nothing is lost: the events stay.
                    self.end(Some(ApiError::unavailable("this server is shutting down: follow the job again")));
                    continue;
                }
            }
            if Instant::now() >= self.ask_at {
                self.ask().await;
                self.ask_at = Instant::now() + POLL;
            }
        }
    }

    async fn ask(&mut self) {
        match self.new_events().await {
            Ok(events) => {
                for event in events {
                    self.next = event.number + 1;
                    self.frames.push_back(sse::event(&event_object(&self.job, &event)));
                    if is_last(&event.what) {
                        return self.end(None);
                    }
                }
            }
            // A scheduler that is away comes back, and the events with it.
            Err(CallError::Unavailable(_) | CallError::TimedOut(_) | CallError::Busy) => {}
            Err(error) => self.end(Some(error.into())),
        }
    }

    /// Events that are not told yet, oldest first.
    async fn new_events(&self) -> Result<Vec<JobEvent>, CallError> {
        let mut events: Vec<JobEvent> = Vec::new();
        let mut after = None;
        loop {
            let page = Page { after, limit: PAGE };
            let reply = self.app.scheduler.call(AdminRequest::ListEvents(self.job.request.id, page)).await?;
            let AdminReply::Events(page, more) = reply else { break };
            let oldest = page.last().map(|event| event.number);
            events.extend(page.into_iter().filter(|event| event.number >= self.next));
            match oldest {
                Some(oldest) if more && oldest > self.next && events.len() < BACKLOG_MAX => {
                    after = Some(oldest)
                }
                _ => break,
            }
        }
        events.sort_by_key(|event| event.number);
        Ok(events)
    }

    fn end(&mut self, error: Option<ApiError>) {
        self.frames.extend(error.map(|error| sse::event(&error.envelope())));
        self.frames.push_back(sse::done());
        self.over = true;
    }
}
