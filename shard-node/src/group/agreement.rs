//! How a group decides what it exchanges through: rank 0 offers memory, every other rank tries to get it and answers, rank 0
//! decides for all. One rank that cannot, or must not, and all use their connections. The rank that samples comes to the same
//! agreement with every rank that holds a slice of a spread head, as a group of two with each.
//!
//! The messages travel on the connections to rank 0, on a thread of its own: the compute thread goes on beating. A rank that
//! fails in the middle has closed its connections, and then the others fail too; nobody begins with a guess.

use crate::links::LinkSettings;
use ashlar_identity::Socket;
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::group::{GroupAnswer, GroupDecision, GroupOffer, HandoverToken};
use ashlar_shared_memory::{Geometry, GeometryError, HandoverError, Memory, Offer, Token, attach};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{self, TryRecvError};
use std::time::{Duration, Instant};
use tracing::warn;

/// How long the ranks may take to answer an offer. All are connected by then; getting the memory takes a millisecond, but
/// the machine may be busy.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
const DISABLED: &str = "`links.shared_memory` is false";

/// The group did not come to an agreement.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank} of the group fell silent before it was agreed how to exchange: {source}")]
pub struct AgreementError {
    /// Whose connection failed.
    pub rank: usize,
    /// Why.
    pub source: FrameError,
}

/// What was agreed upon.
#[derive(Debug)]
pub(crate) struct Agreed {
    /// The group's connections.
    pub(crate) peers: BTreeMap<usize, Socket>,
    /// This rank's end of the shared memory, or why the group uses its connections.
    pub(crate) memory: Result<Memory, String>,
}

/// An agreement in the making. Dropping it ends it, for all ranks.
#[derive(Debug)]
pub(crate) struct Agreement {
    outcome: mpsc::Receiver<Result<Agreed, AgreementError>>,
    /// What the thread may be waiting on.
    connections: Vec<TcpStream>,
}

impl Agreement {
    /// Begins, as `rank` of a group whose other ranks are all connected and would cut memory in the same way.
    pub(crate) fn start(
        rank: usize,
        peers: BTreeMap<usize, Socket>,
        geometry: Result<Geometry, GeometryError>,
        settings: LinkSettings,
    ) -> Agreement {
        let (report, outcome) = mpsc::sync_channel(1);
        let mut connections = Vec::new();
        for (&peer, socket) in &peers {
            match prepare(socket) {
                Ok(handle) => connections.push(handle),
                Err(error) => {
                    let _ = report.send(Err(AgreementError { rank: peer, source: error.into() }));
                    return Agreement { outcome, connections };
                }
            }
        }
        if peers.is_empty() {
            let _ = report.send(Ok(Agreed { peers, memory: Err("a rank alone does not exchange".into()) }));
            return Agreement { outcome, connections };
        }
        let body = move || {
            let mut peers = peers;
            let agreed = match rank {
                0 => lead(&mut peers, geometry, settings),
                _ => follow(rank, &mut peers, geometry, settings),
            };
            let agreed = agreed.and_then(|memory| {
                release(&peers)?;
                Ok(Agreed { peers, memory })
            });
            // Nobody listens any more where the agreement was dropped.
            let _ = report.send(agreed);
        };
        // Without a thread the report's other end is gone, and `outcome` says so.
        let _ = std::thread::Builder::new().name("group-agreement".into()).spawn(body);
        Agreement { outcome, connections }
    }

    /// How it ended, once.
    pub(crate) fn outcome(&mut self) -> Option<Result<Agreed, AgreementError>> {
        let outcome = match self.outcome.try_recv() {
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(AgreementError { rank: 0, source: FrameError::Closed }),
            Ok(outcome) => outcome,
        };
        if outcome.is_ok() {
            self.connections.clear();
        }
        Some(outcome)
    }
}

impl Drop for Agreement {
    fn drop(&mut self) {
        for socket in &self.connections {
            // A connection that is closed already is as shut as it can be.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Bounds writing; a vanished machine ends reading, too.
fn prepare(socket: &Socket) -> io::Result<TcpStream> {
    frame::tune(socket.tcp())?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.tcp().try_clone()
}

/// Takes back what [`prepare`] has set: how long a step may wait is not decided here.
fn release(peers: &BTreeMap<usize, Socket>) -> Result<(), AgreementError> {
    for (&rank, socket) in peers {
        let unbounded = socket.set_write_timeout(None).and_then(|()| socket.set_read_timeout(None));
        unbounded.map_err(|error| failed(rank)(error.into()))?;
    }
    Ok(())
}

fn failed(rank: usize) -> impl Fn(FrameError) -> AgreementError {
    move |source| AgreementError { rank, source }
}

/// Rank 0's part.
fn lead(
    peers: &mut BTreeMap<usize, Socket>,
    geometry: Result<Geometry, GeometryError>,
    settings: LinkSettings,
) -> Result<Result<Memory, String>, AgreementError> {
    let offered = match settings.shared_memory {
        true => geometry
            .map_err(HandoverError::from)
            .and_then(Offer::new)
            .map_err(|error| format!("rank 0: {error}")),
        false => Err(format!("rank 0: {DISABLED}")),
    };
    let mut offer = match offered {
        Ok(offer) => offer,
        Err(reason) => {
            tell(peers, |_| GroupOffer::Sockets { reason: reason.clone() })?;
            return Ok(Err(reason));
        }
    };
    tell(peers, |rank| match offer.token(rank) {
        Some(token) => GroupOffer::SharedMemory {
            socket: offer.name().to_owned(),
            token: HandoverToken(token.to_bytes()),
        },
        None => GroupOffer::Sockets { reason: format!("rank {rank} has no place in the memory") },
    })?;
    let declined = hear_all(peers, &mut offer)?;
    let decision = match &declined {
        None => GroupDecision::SharedMemory,
        Some(reason) => GroupDecision::Sockets { reason: reason.clone() },
    };
    tell(peers, |_| decision.clone())?;
    Ok(match declined {
        None => Ok(offer.into_memory()),
        Some(reason) => Err(reason),
    })
}

fn tell<M: serde::Serialize>(
    peers: &mut BTreeMap<usize, Socket>,
    message: impl Fn(usize) -> M,
) -> Result<(), AgreementError> {
    for (&rank, socket) in peers {
        frame::write_blocking(socket, &message(rank)).map_err(failed(rank))?;
    }
    Ok(())
}

/// Hands the memory out until every rank has answered; why one of them has declined, if so.
fn hear_all(
    peers: &mut BTreeMap<usize, Socket>,
    offer: &mut Offer,
) -> Result<Option<String>, AgreementError> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut declined = None;
    let mut silent: Vec<usize> = peers.keys().copied().collect();
    while let Some(&first) = silent.first() {
        let remaining = deadline.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Err(failed(first)(FrameError::Io(io::ErrorKind::TimedOut.into())));
        }
        let (knock, answers) =
            await_ready(peers, &silent, offer, remaining).map_err(|error| failed(first)(error.into()))?;
        if knock {
            match offer.serve_one() {
                Ok(_) => {}
                Err(error @ HandoverError::Strangers) => declined = Some(format!("rank 0: {error}")),
                Err(error) => warn!("did not hand shared memory over: {error}"),
            }
        }
        for rank in answers {
            let Some(socket) = peers.get_mut(&rank) else { continue };
            let answer = frame::read_blocking(socket).map_err(failed(rank))?;
            silent.retain(|other| *other != rank);
            let problem = match answer {
                GroupAnswer::Declined { reason } => Some(format!("rank {rank}: {reason}")),
                // What it has is not what was offered here.
                GroupAnswer::Attached if !offer.has_given(rank) => {
                    Some(format!("rank {rank} has another memory"))
                }
                GroupAnswer::Attached => None,
            };
            declined = declined.or(problem);
        }
    }
    Ok(declined)
}

/// Whether somebody knocks for the memory, and which of `silent` have something to say.
fn await_ready(
    peers: &BTreeMap<usize, Socket>,
    silent: &[usize],
    offer: &Offer,
    limit: Duration,
) -> io::Result<(bool, Vec<usize>)> {
    let asked: Vec<(&usize, &Socket)> = peers.iter().filter(|(rank, _)| silent.contains(rank)).collect();
    let mut watched = vec![PollFd::from_borrowed_fd(offer.readiness(), PollFlags::IN)];
    watched.extend(asked.iter().map(|(_, socket)| PollFd::new(*socket, PollFlags::IN)));
    // What has left the system's buffers already nobody would be woken for.
    let buffered = asked.iter().any(|(_, socket)| socket.has_buffered());
    let limit = if buffered { Duration::ZERO } else { limit };
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    match poll(&mut watched, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut ready = watched.iter().map(|polled| !polled.revents().is_empty());
    let knock = ready.next().unwrap_or(false);
    let speaks = asked.iter().zip(ready).filter(|((_, socket), ready)| *ready || socket.has_buffered());
    Ok((knock, speaks.map(|((rank, _), _)| **rank).collect()))
}

/// Every other rank's part.
fn follow(
    rank: usize,
    peers: &mut BTreeMap<usize, Socket>,
    geometry: Result<Geometry, GeometryError>,
    settings: LinkSettings,
) -> Result<Result<Memory, String>, AgreementError> {
    let Some(leader) = peers.get_mut(&0) else { return Err(failed(0)(FrameError::Closed)) };
    let attached = match hear_offer(leader).map_err(failed(0))? {
        GroupOffer::Sockets { reason } => return Ok(Err(reason)),
        GroupOffer::SharedMemory { .. } if !settings.shared_memory => Err(DISABLED.to_owned()),
        GroupOffer::SharedMemory { socket, token } => geometry
            .map_err(HandoverError::from)
            .and_then(|geometry| attach(&socket, Token::from_bytes(token.0), rank, geometry))
            .map_err(|error| error.to_string()),
    };
    let answer = match &attached {
        Ok(_) => GroupAnswer::Attached,
        Err(reason) => GroupAnswer::Declined { reason: reason.clone() },
    };
    frame::write_blocking(leader, &answer).map_err(failed(0))?;
    match (frame::read_blocking(leader).map_err(failed(0))?, attached) {
        (GroupDecision::SharedMemory, Ok(memory)) => Ok(Ok(memory)),
        (GroupDecision::SharedMemory, Err(_)) => Err(failed(0)(FrameError::Corrupt)),
        (GroupDecision::Sockets { reason }, _) => Ok(Err(reason)),
    }
}

/// Rank 0 may still be loading its weights, for as long as that takes: only its connection's end ends this wait.
fn hear_offer(leader: &mut Socket) -> Result<GroupOffer, FrameError> {
    leader.set_read_timeout(None)?;
    let offer = frame::read_blocking(leader)?;
    // Rank 0 waits for the slowest to answer, then decides.
    leader.set_read_timeout(Some(2 * ANSWER_TIMEOUT))?;
    Ok(offer)
}
