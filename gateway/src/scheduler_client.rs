//! The gateway's side of its one connection to the scheduler.
//!
//! An actor owns the connection and the table of choices in flight; everybody else holds a [`SchedulerClient`] and gets
//! a [`RequestEvents`] per request. Dropping that cancels what is still running, at once.
//!
//! Bounds: choices in flight by permits (none left: refused as overloaded), a request's unread events by its channel
//! (full: its choices are dropped and cancelled), messages to a scheduler that does not read by the outbox (full: the
//! connection is dropped).

mod actor;
mod link;

pub use link::Link;

use crate::transcript::TranscriptEvent;
use ashlar_protocol::serving::{ChoiceId, FailureKind, RequestFailure, Submit};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

/// A handle on the connection actor; cheap to clone.
#[derive(Debug, Clone)]
pub struct SchedulerClient {
    commands: mpsc::UnboundedSender<Command>,
    link: watch::Receiver<Link>,
    permits: Arc<Semaphore>,
}

/// What handles ask of the actor. Unbounded in type, bounded in fact: a submission holds a permit until it has left
/// the actor's table, and a cancellation follows a submission.
#[derive(Debug)]
enum Command {
    Submit { submit: Box<Submit>, events: EventSender, permit: OwnedSemaphorePermit },
    Cancel(ChoiceId),
}

type EventSender = mpsc::Sender<(ChoiceId, TranscriptEvent)>;

/// How the actor behaves.
#[derive(Debug, Clone)]
pub struct SchedulerClientSettings {
    /// `host:port` of the scheduler.
    pub address: String,
    /// Most choices in flight.
    pub choices_in_flight_max: usize,
    /// Longest wait between two attempts to connect.
    pub reconnect_max: Duration,
}

/// The events of one request's choices, in order per choice.
#[derive(Debug)]
pub struct RequestEvents {
    events: mpsc::Receiver<(ChoiceId, TranscriptEvent)>,
    commands: mpsc::UnboundedSender<Command>,
    running: Vec<ChoiceId>,
}

impl SchedulerClient {
    /// Starts the actor on the current runtime; it ends when the last handle is gone.
    pub fn start(settings: SchedulerClientSettings) -> SchedulerClient {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (publish, link) = watch::channel(Link::connecting(&settings.address));
        let permits = Arc::new(Semaphore::new(settings.choices_in_flight_max));
        tokio::spawn(actor::Actor::new(settings, inbox, publish).run());
        SchedulerClient { commands, link, permits }
    }

    /// The connection and the cluster, as last seen.
    pub fn link(&self) -> Link {
        self.link.borrow().clone()
    }

    /// A watch on the connection and the cluster.
    pub fn watch(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// Submits all choices of a request. `unread_max` bounds the events that may wait to be read.
    pub fn submit(&self, choices: Vec<Submit>, unread_max: usize) -> Result<RequestEvents, RequestFailure> {
        let mut permits = u32::try_from(choices.len())
            .ok()
            .and_then(|count| self.permits.clone().try_acquire_many_owned(count).ok())
            .ok_or_else(|| RequestFailure {
                kind: FailureKind::Overloaded,
                message: "too many requests are in flight: retry in a moment".to_owned(),
                retry_after_ms: Some(1_000),
            })?;
        let (sender, events) = mpsc::channel(unread_max.max(1));
        let running = choices.iter().map(|choice| choice.id).collect();
        for submit in choices {
            let Some(permit) = permits.split(1) else { break };
            let submit = Box::new(submit);
            // A send fails only when the actor is gone; the dropped sender then ends the request.
            let _ = self.commands.send(Command::Submit { submit, events: sender.clone(), permit });
        }
        Ok(RequestEvents { events, commands: self.commands.clone(), running })
    }
}

impl RequestEvents {
    /// The next event; `None` when no choice can get another. Cancellation-safe.
    pub async fn next(&mut self) -> Option<(ChoiceId, TranscriptEvent)> {
        let (id, event) = self.events.recv().await?;
        if matches!(event, TranscriptEvent::Finished { .. } | TranscriptEvent::Failed(_)) {
            self.running.retain(|running| *running != id);
        }
        Some((id, event))
    }

    /// Stops one choice; it gets no further event, save those already under way.
    pub fn cancel(&mut self, id: ChoiceId) {
        if self.running.contains(&id) {
            self.running.retain(|running| *running != id);
            let _ = self.commands.send(Command::Cancel(id));
        }
    }
}

impl Drop for RequestEvents {
    fn drop(&mut self) {
        for id in self.running.drain(..) {
            let _ = self.commands.send(Command::Cancel(id));
        }
    }
}
