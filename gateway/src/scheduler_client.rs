//! The gateway's side of its one connection to the scheduler.
//!
//! An actor owns the connection and the table of choices in flight; everybody else holds a [`SchedulerClient`] and gets
//! a [`RequestEvents`] per request. Dropping that cancels what is still running, at once.
//!
//! Choices outlive the connection. While there is none they wait; with each new one [`Link::epoch`] rises, and whoever holds a choice
//! submits it again with what it has received. A scheduler that says nothing for a second counts as lost.
//!
//! Bounds: choices and administrative calls in flight by permits (none left: refused as overloaded), a request's unread
//! events by its channel (full: its choices are dropped and cancelled), messages to a scheduler that does not read by the
//! outbox (full: the connection is dropped).

mod actor;
mod link;
mod terms;

pub use link::Link;
pub use terms::Terms;

use crate::transcript::TranscriptEvent;
use ashlar_identity::Transport;
use ashlar_protocol::admin::{AdminFailure, AdminReply, AdminRequest, Comparison, JobError, PreparedJob};
use ashlar_protocol::responses::ResponseRecord;
use ashlar_protocol::serving::{ChoiceId, CompareAdapters, FailureKind, PrepareJob, RequestFailure, Submit};
use ashlar_service_kit::Addresses;
use ashlar_vocabulary::{JobId, Tenant};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

/// Administrative calls in flight: they are rare, and each is short.
const CALLS_MAX: usize = 64;
/// Longest wait for the answer to a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A handle on the connection actor; cheap to clone.
#[derive(Debug, Clone)]
pub struct SchedulerClient {
    commands: mpsc::UnboundedSender<Command>,
    link: watch::Receiver<Link>,
    permits: Arc<Semaphore>,
    calls: Arc<Semaphore>,
    /// For whom calls are; `None` sees everything.
    tenant: Option<Tenant>,
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The scheduler has refused it.
    #[error("{}", .0.message)]
    Refused(AdminFailure),
    /// As many calls as may be are in flight.
    #[error("too many administrative calls are in flight: retry in a moment")]
    Busy,
    /// There is no scheduler, or it was lost; whether it has heard of the call is unknown.
    #[error("{0}")]
    Unavailable(String),
    /// It has not answered; it may do yet what it was asked for.
    #[error("the scheduler has not answered within {} s: look at what has become of it, then retry", .0.as_secs())]
    TimedOut(Duration),
}

/// What handles ask of the actor. Unbounded in type, bounded in fact: a submission holds a permit until it has left
/// the actor's table, a resubmission follows a new connection, and a cancellation a submission; a call holds a permit until it is answered or given up, and
/// a job's outcome follows a [`PrepareJob`] or [`CompareAdapters`].
#[derive(Debug)]
enum Command {
    Submit { submit: Box<Submit>, events: EventSender, permit: OwnedSemaphorePermit },
    Resubmit(Box<Submit>),
    Cancel(ChoiceId),
    Call { tenant: Option<Tenant>, request: Box<AdminRequest>, answer: CallAnswer },
    Prepared { job: JobId, outcome: Box<Result<PreparedJob, JobError>> },
    Compared { job: JobId, outcome: Box<Result<Comparison, String>> },
}

type CallAnswer = oneshot::Sender<Result<AdminReply, CallError>>;
type EventSender = mpsc::Sender<(ChoiceId, TranscriptEvent)>;

/// How the actor behaves.
#[derive(Debug, Clone)]
pub struct SchedulerClientSettings {
    /// Where schedulers are, of which one leads.
    pub addresses: Addresses,
    /// How connections to them are made.
    pub transport: Transport,
    /// Most choices in flight.
    pub choices_in_flight_max: usize,
    /// Longest wait between two attempts to connect.
    pub reconnect_max: Duration,
    /// How long requests that have not begun wait for a scheduler.
    pub patience: Duration,
    /// Where jobs go whose files are to be validated; without it they are refused.
    pub jobs: Option<mpsc::Sender<Box<PrepareJob>>>,
    /// Where adapters go that are to be compared with what is served; without it they are not.
    pub comparisons: Option<mpsc::Sender<Box<CompareAdapters>>>,
    /// Where responses go that nobody follows; without it, or while it is full, they go to another gateway.
    pub adoptions: Option<mpsc::Sender<Box<ResponseRecord>>>,
}

/// The events of one request's choices, in order per choice.
#[derive(Debug)]
pub struct RequestEvents {
    events: mpsc::Receiver<(ChoiceId, TranscriptEvent)>,
    commands: mpsc::UnboundedSender<Command>,
    running: Vec<ChoiceId>,
    link: watch::Receiver<Link>,
    /// Of the connection over which the choices were submitted last.
    epoch: u64,
    given_up: bool,
}

/// What a request hears.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// Of one of its choices.
    Event(ChoiceId, TranscriptEvent),
    /// The scheduler was lost, and one has been reached again: choices that have not ended are to be
    /// [submitted again](RequestEvents::resubmit).
    SchedulerBack,
    /// There has been no scheduler for as long as a request that has not begun shall wait; why.
    GivenUp(String),
    /// Nothing more: it was read too slowly.
    Lagged,
}

impl SchedulerClient {
    /// Starts the actor on the current runtime; it ends when the last handle is gone.
    pub fn start(settings: SchedulerClientSettings) -> SchedulerClient {
        let (commands, inbox) = mpsc::unbounded_channel();
        let (publish, link) = watch::channel(Link::connecting(&settings.addresses));
        let permits = Arc::new(Semaphore::new(settings.choices_in_flight_max));
        tokio::spawn(actor::Actor::new(settings, inbox, publish).run());
        let calls = Arc::new(Semaphore::new(CALLS_MAX));
        SchedulerClient { commands, link, permits, calls, tenant: None }
    }

    /// A handle for calls on behalf of a tenant, which see nothing of what belongs to others; with `None` they see everything.
    pub fn of_tenant(&self, tenant: Option<Tenant>) -> SchedulerClient {
        SchedulerClient { tenant, ..self.clone() }
    }

    /// Asks the scheduler for something of administration. A call that has no answer may have been done: ids and expected
    /// generations make it safe to repeat.
    pub async fn call(&self, request: AdminRequest) -> Result<AdminReply, CallError> {
        self.call_within(request, CALL_TIMEOUT).await
    }

    /// [`call`](Self::call), of something that takes longer.
    pub async fn call_within(
        &self,
        request: AdminRequest,
        timeout: Duration,
    ) -> Result<AdminReply, CallError> {
        let _permit = self.calls.try_acquire().map_err(|_| CallError::Busy)?;
        let (answer, answered) = oneshot::channel();
        // A send fails only when the actor is gone; the dropped sender then says so.
        let _ = self.commands.send(Command::Call {
            tenant: self.tenant.clone(),
            request: Box::new(request),
            answer,
        });
        match tokio::time::timeout(timeout, answered).await {
            Ok(Ok(Ok(AdminReply::Refused(failure)))) => Err(CallError::Refused(failure)),
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(CallError::Unavailable("the gateway is shutting down".to_owned())),
            Err(_) => Err(CallError::TimedOut(timeout)),
        }
    }

    /// Tells what became of a job's files. Lost where there is no connection: the scheduler asks again over the next.
    pub fn prepared(&self, job: JobId, outcome: Result<PreparedJob, JobError>) {
        let _ = self.commands.send(Command::Prepared { job, outcome: Box::new(outcome) });
    }

    /// Tells what a comparison came to. Lost where there is no connection: the scheduler asks again over the next.
    pub fn compared(&self, job: JobId, outcome: Result<Comparison, String>) {
        let _ = self.commands.send(Command::Compared { job, outcome: Box::new(outcome) });
    }

    /// The connection and the cluster, as last seen.
    pub fn link(&self) -> Link {
        self.link.borrow().clone()
    }

    /// A watch on the connection and the cluster.
    pub fn watch(&self) -> watch::Receiver<Link> {
        self.link.clone()
    }

    /// A handle for those who ask for a deployed model: what it knows of the cluster is that model's part.
    pub fn of_model(&self, name: &str) -> SchedulerClient {
        let name = name.to_owned();
        let (publish, link) = watch::channel(self.link().of_model(&name));
        let mut whole = self.link.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = publish.closed() => return,
                    changed = whole.changed() => if changed.is_err() {
                        return;
                    },
                }
                let part = whole.borrow_and_update().of_model(&name);
                publish.send_replace(part);
            }
        });
        SchedulerClient { link, ..self.clone() }
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
        // Before they are sent: should they go over a later connection, they are sent once more, which does no harm.
        let link = self.link.clone();
        let epoch = link.borrow().epoch;
        let running = choices.iter().map(|choice| choice.id).collect();
        for submit in choices {
            let Some(permit) = permits.split(1) else { break };
            let submit = Box::new(submit);
            // A send fails only when the actor is gone; the dropped sender then ends the request.
            let _ = self.commands.send(Command::Submit { submit, events: sender.clone(), permit });
        }
        let commands = self.commands.clone();
        Ok(RequestEvents { events, commands, running, link, epoch, given_up: false })
    }
}

impl RequestEvents {
    /// What comes next. Cancellation-safe.
    pub async fn next(&mut self) -> Heard {
        let (epoch, given_up) = (self.epoch, self.given_up);
        let news = |link: &Link| link.epoch != epoch || link.given_up && !given_up;
        tokio::select! {
            // What a lost scheduler has said still counts: it spares the next one the work.
            biased;
            event = self.events.recv() => match event {
                None => Heard::Lagged,
                Some((id, event)) => {
                    if event.is_last() {
                        self.running.retain(|running| *running != id);
                    }
                    Heard::Event(id, event)
                }
            },
            link = self.link.wait_for(news) => match link {
                Err(_) => Heard::Lagged,
                Ok(link) if link.epoch != epoch => {
                    (self.epoch, self.given_up) = (link.epoch, false);
                    Heard::SchedulerBack
                }
                Ok(link) => {
                    self.given_up = true;
                    Heard::GivenUp(link.problem.clone())
                }
            },
        }
    }

    /// Submits a choice again, over a new connection.
    pub fn resubmit(&self, submit: Submit) {
        if self.running.contains(&submit.id) {
            let _ = self.commands.send(Command::Resubmit(Box::new(submit)));
        }
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
