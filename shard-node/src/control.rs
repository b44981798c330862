//! The connection to the scheduler: joined again whenever it is lost, until this node may go.

use crate::config::NodeConfig;
use crate::executor::{Command, Shared};
use crate::links::LinkBreaker;
use crate::service::NodeError;
use crate::training::Sessions;
use ashlar_identity::{Role, Transport};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::{FromNode, Join, ToNode};
use ashlar_service_kit::{Retries, ShutdownRequest};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tracing::{info, warn};

/// A scheduler that says nothing for so long is left for another one, …
const SILENCE: Duration = Duration::from_secs(1);
/// … looked at so many times in between.
const SILENT_LOOKS: u32 = 5;
/// Where there is no other one, only its host's death is worth noticing: so many times as much.
const ALONE_FACTOR: u32 = 5;
const RECONNECT_MIN: Duration = Duration::from_millis(50);
const RECONNECT_MAX: Duration = Duration::from_millis(200);

/// Why this node is to hold nothing any more.
#[derive(Debug, Default)]
pub(crate) struct Leaving {
    /// The process was asked to end.
    ending: AtomicBool,
    /// An operator wants it empty.
    drained: AtomicBool,
    /// Wakes whoever is to tell the scheduler.
    news: Notify,
}

impl Leaving {
    fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Relaxed)
    }

    fn is_leaving(&self) -> bool {
        self.is_ending() || self.drained.load(Ordering::Relaxed)
    }

    fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
        self.news.notify_one();
    }
}

/// What a node takes part with.
pub(crate) struct Membership<'a> {
    pub(crate) config: &'a NodeConfig,
    pub(crate) transport: Transport,
    pub(crate) join: Join,
    pub(crate) commands: &'a SyncSender<Command>,
    pub(crate) breaker: &'a LinkBreaker,
    pub(crate) shared: &'a Shared,
    pub(crate) sessions: &'a Sessions,
    /// Whether a scheduler has been told that the process before this one crashed.
    pub(crate) crash_told: AtomicBool,
    pub(crate) leaving: Leaving,
}

impl Membership<'_> {
    /// Takes part until `shutdown` completes, and then until others have taken this node's place, or for as long as they are
    /// given.
    pub(crate) async fn keep_until(
        &self,
        mut shutdown: ShutdownRequest,
        outbound: &mut mpsc::Receiver<FromNode>,
    ) -> Result<(), NodeError> {
        let keeping = self.keep(outbound);
        tokio::pin!(keeping);
        tokio::select! {
            result = &mut keeping => return result,
            () = &mut shutdown => self.leaving.end(),
        }
        let grace = Duration::from_millis(self.config.drain_grace_ms);
        info!("leaving: waiting up to {} s until others have taken this node's place", grace.as_secs());
        let Ok(result) = tokio::time::timeout(grace, keeping).await else {
            warn!("nobody has taken this node's place in time: it goes nevertheless");
            return Ok(());
        };
        result
    }

    /// Keeps a connection to the scheduler; returns when that refuses this node for good, or when this node has been asked to
    /// end and nobody needs it.
    async fn keep(&self, outbound: &mut mpsc::Receiver<FromNode>) -> Result<(), NodeError> {
        let mut retries = Retries::new(self.config.scheduler.clone(), RECONNECT_MIN, RECONNECT_MAX);
        loop {
            match self.connect_and_serve(&mut retries, outbound).await {
                Ok(last) => return last.map_or(Ok(()), Err),
                Err(_) if self.leaving.is_ending() => return Ok(()),
                Err(error) => warn!("scheduler {}: {error}; reconnecting", retries.address()),
            }
            self.breaker.supersede();
            self.sessions.end_all("the scheduler was lost");
            let _ = self.commands.try_send(Command::Release { for_now: true });
            // What the compute thread says without a scheduler is of no use; drain it so that it never blocks.
            let deadline = tokio::time::sleep(retries.over());
            tokio::pin!(deadline);
            loop {
                tokio::select! {
                    () = &mut deadline => break,
                    () = self.leaving.news.notified() => if self.leaving.is_ending() {
                        return Ok(());
                    },
                    message = outbound.recv() => if let Some(FromNode::Crashed) = message {
                        return Err(NodeError::Crashed);
                    },
                }
            }
        }
    }

    async fn connect_and_serve(
        &self,
        retries: &mut Retries,
        outbound: &mut mpsc::Receiver<FromNode>,
    ) -> Result<Option<NodeError>, FrameError> {
        // A scheduler that stands by accepts the connection but does not greet: try again rather than wait for ever.
        let speaker = format!("node {}", self.config.name);
        let address = retries.address().to_owned();
        let greeting = async {
            let socket = TcpStream::connect(&address).await?;
            frame::tune(&socket)?;
            let mut socket = self.transport.connect(socket, Role::Scheduler).await?;
            frame::greet(&mut socket, &speaker).await?;
            Ok::<_, FrameError>(socket)
        };
        let greeted = tokio::time::timeout(retries.patience(), greeting).await;
        let mut socket = greeted.map_err(|_| FrameError::Io(std::io::ErrorKind::TimedOut.into()))??;
        let leaving = self.leaving.is_leaving();
        let mut join = Join { holds: self.shared.held(), leaving, ..self.join.clone() };
        if self.crash_told.load(Ordering::Relaxed) {
            join.crashed = None;
        }
        frame::write(&mut socket, &FromNode::Join(Box::new(join))).await?;
        self.crash_told.store(true, Ordering::Relaxed);
        info!(scheduler = %address, "joined");
        retries.succeeded();
        let (mut reader, mut writer) = socket.into_split();
        // Reading is not cancellation-safe, so it has a task of its own.
        let (deliver, mut arrived) = mpsc::channel::<Result<ToNode, FrameError>>(64);
        let reading = tokio::spawn(async move {
            loop {
                let message = frame::read(&mut reader).await;
                let ended = message.is_err();
                if deliver.send(message).await.is_err() || ended {
                    return;
                }
            }
        });
        // Counted, so that a node that stood still itself does not hold that against the scheduler.
        let mut looks = tokio::time::interval(SILENCE / SILENT_LOOKS);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let silent_looks_max = if retries.has_others() { SILENT_LOOKS } else { ALONE_FACTOR * SILENT_LOOKS };
        let mut silent_looks = 0;
        let ended = loop {
            tokio::select! {
                _ = looks.tick() => {
                    silent_looks += 1;
                    if silent_looks > silent_looks_max && arrived.is_empty() {
                        break Err(FrameError::Io(std::io::ErrorKind::TimedOut.into()));
                    }
                }
                message = arrived.recv() => {
                    silent_looks = 0;
                    if let Some(ended) = self.heed(message.unwrap_or(Err(FrameError::Closed))) {
                        break ended;
                    }
                }
                () = self.leaving.news.notified() => {
                    let leaving = FromNode::Leaving(self.leaving.is_leaving());
                    if let Err(error) = frame::write(&mut writer, &leaving).await {
                        break Err(error);
                    }
                }
                Some(message) = outbound.recv() => {
                    if let Err(error) = frame::write(&mut writer, &message).await {
                        break Err(error);
                    }
                    if message == FromNode::Crashed {
                        break Ok(Some(NodeError::Crashed));
                    }
                }
            }
        };
        reading.abort();
        ended
    }

    /// Does what the scheduler says; how the connection ended, if that was its end.
    fn heed(&self, message: Result<ToNode, FrameError>) -> Option<Result<Option<NodeError>, FrameError>> {
        match message {
            Err(error) => return Some(Err(error)),
            Ok(ToNode::Closing(reason)) => return Some(Err(FrameError::Refused(reason))),
            Ok(ToNode::Rejected(reason)) => return Some(Ok(Some(NodeError::Rejected(reason)))),
            Ok(ToNode::Dismissed) if self.leaving.is_ending() => return Some(Ok(None)),
            Ok(ToNode::Dismissed) => info!("this node is drained: it holds nothing"),
            Ok(ToNode::Drain(drained)) => {
                self.leaving.drained.store(drained, Ordering::Relaxed);
                self.leaving.news.notify_one();
            }
            Ok(message) => {
                if !self.dispatch(message) {
                    return Some(Err(FrameError::Io(std::io::ErrorKind::ResourceBusy.into())));
                }
            }
        }
        None
    }

    /// Hands a message to the compute thread; `false` if its queue is full, which an honest scheduler never causes.
    fn dispatch(&self, message: ToNode) -> bool {
        let command = match message {
            ToNode::Assign(assignment) => {
                let wish = self.breaker.supersede();
                self.sessions.end_all("the layout has changed");
                Command::Assign(assignment, wish)
            }
            ToNode::Release { .. } => {
                self.breaker.supersede();
                self.sessions.end_all("the layout was given up");
                Command::Release { for_now: false }
            }
            ToNode::Step(plan) => Command::Step(plan),
            ToNode::Prepare(assignment) => Command::Prepare(assignment),
            ToNode::OpenSession(open) => {
                self.sessions.open(*open);
                return true;
            }
            ToNode::Training { session, work } => {
                self.sessions.work(session, work);
                return true;
            }
            ToNode::LoadAdapter { revision, adapter, load } => {
                Command::LoadAdapter { revision, adapter, load }
            }
            ToNode::UnloadAdapter { adapter } => Command::UnloadAdapter(adapter),
            ToNode::Beat
            | ToNode::Closing(_)
            | ToNode::Rejected(_)
            | ToNode::Dismissed
            | ToNode::Drain(_) => return true,
        };
        self.commands.try_send(command).is_ok()
    }
}
