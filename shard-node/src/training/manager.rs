//! Which sessions a node has: they are opened, given work and connections, and ended.

use super::alarm::Alarm;
use super::links::Arrival;
use super::session::{self, Inbox};
use super::{Place, Resources};
use ashlar_identity::Socket;
use ashlar_kernels::{YieldFlag, lower_priority};
use ashlar_protocol::data::TrainingLink;
use ashlar_protocol::membership::FromNode;
use ashlar_protocol::training::{OpenSession, TrainingReport, TrainingWork};
use ashlar_vocabulary::SessionId;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::{info, warn};

/// Pieces of work waiting for a session; the scheduler gives one at a time, and a close.
const WORK_QUEUE: usize = 16;
/// Connections waiting for a session, and for sessions that are not open yet.
const ARRIVALS_MAX: usize = 32;
/// How long ended sessions may take to give the weights up: a pass ends between two layers.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// The sessions of a node. Clones share them.
#[derive(Debug, Clone)]
pub struct Sessions {
    state: Arc<Mutex<State>>,
    resources: Arc<Resources>,
    out: mpsc::Sender<FromNode>,
}

#[derive(Debug, Default)]
struct State {
    place: Option<Place>,
    open: BTreeMap<SessionId, Open>,
    /// Connections of sessions that this rank has not been told of yet.
    waiting: Vec<(SessionId, Arrival)>,
}

/// An open session, as seen from outside.
#[derive(Debug)]
struct Open {
    alarm: Alarm,
    works: SyncSender<TrainingWork>,
    arrivals: SyncSender<Arrival>,
    thread: JoinHandle<()>,
}

impl Sessions {
    /// No sessions yet; their reports go to `out`.
    pub fn new(resources: Resources, out: mpsc::Sender<FromNode>) -> Sessions {
        Sessions { state: Arc::default(), resources: Arc::new(resources), out }
    }

    /// Raised while serving computes.
    pub fn urgent(&self) -> &YieldFlag {
        &self.resources.urgent
    }

    /// This rank has taken a place: sessions for its layout may open.
    pub fn enter(&self, place: Place) {
        self.lock().place = Some(place);
    }

    /// Tells every session to end. Does not wait.
    pub fn end_all(&self, reason: &str) {
        let mut state = self.lock();
        state.place = None;
        state.open.values().for_each(|open| open.alarm.raise(reason));
    }

    /// Ends every session and waits until all have given the weights up; `tick` is called meanwhile.
    pub fn leave(&self, reason: &str, tick: &mut dyn FnMut()) {
        self.end_all(reason);
        let started = Instant::now();
        loop {
            let mut state = self.lock();
            state.open.retain(|_, open| !open.thread.is_finished());
            if state.open.is_empty() {
                return;
            }
            drop(state);
            if started.elapsed() > END_TIMEOUT {
                return warn!("a training session does not end; its weights stay in memory until it does");
            }
            tick();
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Opens a session on a thread of its own; a known one is left as it is.
    pub fn open(&self, open: OpenSession) {
        let mut state = self.lock();
        state.open.retain(|_, open| !open.thread.is_finished());
        let id = open.session;
        if state.open.contains_key(&id) {
            return;
        }
        let (works, for_works) = sync_channel(WORK_QUEUE);
        let (arrivals, for_arrivals) = sync_channel(ARRIVALS_MAX);
        let inbox = Inbox { works: for_works, arrivals: for_arrivals };
        let (came, waiting): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.waiting).into_iter().partition(|(of, _)| *of == id);
        state.waiting = waiting;
        // No more than its queue holds.
        came.into_iter().for_each(|(_, arrival)| drop(arrivals.try_send(arrival)));
        let alarm = Alarm::new();
        let (place, ring) = (state.place.clone(), alarm.clone());
        let (resources, out) = (self.resources.clone(), self.out.clone());
        let thread = std::thread::Builder::new().name(format!("training-{id}")).spawn(move || {
            lower_priority();
            live(&open, place, &resources, &ring, &inbox, &out);
        });
        match thread {
            Ok(thread) => {
                state.open.insert(id, Open { alarm, works, arrivals, thread });
            }
            Err(error) => warn!("no thread for training session {id}: {error}"),
        }
    }

    /// Gives a session its next piece of work; nothing happens where it is not known.
    pub fn work(&self, session: SessionId, work: TrainingWork) {
        let state = self.lock();
        let Some(open) = state.open.get(&session) else { return };
        let closes = work == TrainingWork::Close;
        if open.works.try_send(work).is_err() {
            open.alarm.raise("the scheduler gave more work than a session may have waiting");
        } else if closes {
            open.alarm.raise("the scheduler closed it");
        }
    }

    /// Takes a connection that another rank has made, for now or for a session that opens soon.
    pub fn arrived(&self, session: SessionId, link: TrainingLink, socket: Socket) {
        let mut state = self.lock();
        match state.open.get(&session) {
            // One that is not taken is closed by being dropped.
            Some(open) => drop(open.arrivals.try_send((link, socket))),
            None => {
                if state.waiting.len() == ARRIVALS_MAX {
                    state.waiting.remove(0);
                }
                state.waiting.push((session, (link, socket)));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A session's thread.
fn live(
    open: &OpenSession,
    place: Option<Place>,
    resources: &Resources,
    alarm: &Alarm,
    inbox: &Inbox,
    out: &mpsc::Sender<FromNode>,
) {
    let session = open.session;
    let report = |report| {
        // Without a scheduler nobody wants to hear it.
        let _ = out.blocking_send(FromNode::Training { session, report: Box::new(report) });
    };
    let lived =
        catch_unwind(AssertUnwindSafe(|| session::run(open, place, resources, alarm, inbox, &report)));
    let (message, retry) = match lived {
        Ok(Ok(())) => (None, false),
        // Said before the other ranks notice, whose lost connections would be another attempt's reason.
        Ok(Err(error)) if error.is_no_room() && alarm.check().is_ok() => {
            // Where that is, is the operator's business.
            warn!(%session, "{error}");
            let message = "there is no room left where samples, states and results are kept";
            report(TrainingReport::NoRoom { message: message.into() });
            return alarm.raise("it has ended");
        }
        // What ended it from outside says more than the connection that broke by it.
        Ok(Err(error)) => match alarm.check() {
            Err(ended) if error.may_retry() => (Some(format!("the session ended: {}", ended.0)), true),
            _ => (Some(error.to_string()), error.may_retry()),
        },
        Err(_) => (Some("training failed in a way that it should not: see the node's log".into()), false),
    };
    // Connections are held by the alarm, too.
    alarm.raise("it has ended");
    match message {
        Some(message) if !is_closed(inbox) => {
            warn!(%session, retry, "{message}");
            report(TrainingReport::Failed { message, retry });
        }
        _ => info!(%session, "closed a training session"),
    }
}

/// Whether the scheduler has closed the session, so that its end is no failure.
fn is_closed(inbox: &Inbox) -> bool {
    inbox.works.try_iter().any(|work| work == TrainingWork::Close)
}
