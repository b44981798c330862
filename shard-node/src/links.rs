//! Data connections of a rank: from the previous stage, to the next one, and within the tensor-parallel group. What the
//! group does with its own is in [`crate::group`].

use crate::beat::Beat;
use crate::group::Group;
use crate::group::agreement::{Agreed, Agreement, AgreementError};
use ashlar_protocol::data::{DataLink, LinkFaults, LinkHello, LinkPurpose, PayloadHeader};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::Assignment;
use ashlar_vocabulary::ReplicaRevision;
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long connecting to a peer may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Activations waiting to be sent to the next stage.
const SEND_QUEUE: usize = 16;

/// Lets the control connection break this rank's links, so that a compute thread waiting on one wakes up.
#[derive(Debug, Default, Clone)]
pub struct LinkBreaker(Arc<Mutex<Vec<TcpStream>>>);

impl LinkBreaker {
    /// Shuts every registered link down.
    pub fn break_all(&self) {
        for socket in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A link that is closed already is as broken as it can be.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    fn register(&self, socket: &TcpStream) -> std::io::Result<()> {
        let socket = socket.try_clone()?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        Ok(())
    }
}

/// An accepted connection that has said what it is.
#[derive(Debug)]
pub struct Inbound {
    /// What it said.
    pub hello: LinkHello,
    /// The socket.
    pub socket: TcpStream,
}

/// Greets an accepted connection; errors concern only this connection.
pub fn accept(mut socket: TcpStream) -> Result<Inbound, FrameError> {
    socket.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    frame::greet_blocking(&mut socket, "node")?;
    let hello = frame::read_blocking(&mut socket)?;
    Ok(Inbound { hello, socket })
}

fn connect(address: &str, hello: &LinkHello) -> Result<TcpStream, FrameError> {
    let resolved = address.to_socket_addrs()?.next();
    let resolved = resolved.ok_or_else(|| {
        FrameError::Io(std::io::Error::new(std::io::ErrorKind::NotFound, format!("no address for {address}")))
    })?;
    let mut socket = TcpStream::connect_timeout(&resolved, CONNECT_TIMEOUT)?;
    socket.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    frame::greet_blocking(&mut socket, "node")?;
    frame::write_blocking(&mut socket, hello)?;
    Ok(socket)
}

/// Inbound connections that arrived before they were asked for.
#[derive(Debug, Default)]
pub struct Waiting(Vec<Inbound>);

impl Waiting {
    /// Keeps a connection until its layout is in force; a bounded number, oldest dropped first.
    pub fn keep(&mut self, inbound: Inbound) {
        const WAITING_MAX: usize = 32;
        if self.0.len() == WAITING_MAX {
            self.0.remove(0);
        }
        self.0.push(inbound);
    }

    fn take(&mut self, revision: ReplicaRevision, purpose: LinkPurpose) -> Option<TcpStream> {
        self.0.retain(|inbound| inbound.hello.revision >= revision);
        let found = self
            .0
            .iter()
            .rposition(|inbound| inbound.hello.revision == revision && inbound.hello.purpose == purpose)?;
        Some(self.0.swap_remove(found).socket)
    }
}

/// All links of one assignment.
#[derive(Debug)]
pub struct Links {
    /// From the previous stage.
    pub previous: Option<DataLink>,
    /// To the next stage.
    pub next: Option<Sender>,
    /// Within the group.
    pub group: Group,
}

/// How a rank's links are made.
#[derive(Debug, Clone, Copy)]
pub struct LinkSettings {
    /// Deliberate trouble.
    pub faults: LinkFaults,
    /// Whether the group may exchange through shared memory.
    pub shared_memory: bool,
    /// How long a rank that waits in shared memory spins before it sleeps.
    pub spin: Duration,
}

/// Why links do not stand.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A connection failed.
    #[error(transparent)]
    Connection(#[from] FrameError),
    /// The group did not come to an agreement.
    #[error(transparent)]
    Agreement(#[from] AgreementError),
}

/// Links being made: outbound ones stand, inbound ones may still be missing.
#[derive(Debug)]
pub struct PendingLinks {
    revision: ReplicaRevision,
    settings: LinkSettings,
    needs_previous: bool,
    previous: Option<TcpStream>,
    next: Option<TcpStream>,
    rank: usize,
    size: usize,
    group: PendingGroup,
}

/// How far a group has come.
#[derive(Debug)]
enum PendingGroup {
    Connecting(BTreeMap<usize, TcpStream>),
    Agreeing(Agreement),
    Done(Result<Agreed, AgreementError>),
}

impl PendingLinks {
    /// Connects to the next stage and to the lower ranks of the group.
    pub fn connect(assignment: &Assignment, settings: LinkSettings) -> Result<PendingLinks, FrameError> {
        let hello = |purpose| LinkHello { term: assignment.term, revision: assignment.revision, purpose };
        let rank = assignment.tensor_rank.0 as usize;
        let mut peers = BTreeMap::new();
        for (peer, address) in assignment.group.iter().enumerate().take(rank) {
            let purpose = LinkPurpose::Group { rank: assignment.tensor_rank.0 };
            peers.insert(peer, connect(address, &hello(purpose))?);
        }
        let next = match &assignment.next {
            Some(address) => Some(connect(address, &hello(LinkPurpose::Activations))?),
            None => None,
        };
        Ok(PendingLinks {
            revision: assignment.revision,
            settings,
            needs_previous: assignment.stage.0 > 0,
            previous: None,
            next,
            rank,
            size: (assignment.tensor_parallel_size as usize).max(1),
            group: PendingGroup::Connecting(peers),
        })
    }

    /// Takes what has arrived, and goes on with the group's agreement; whether [`PendingLinks::finish`] may be called.
    pub fn collect(&mut self, waiting: &mut Waiting) -> bool {
        if self.needs_previous && self.previous.is_none() {
            self.previous = waiting.take(self.revision, LinkPurpose::Activations);
        }
        if let PendingGroup::Connecting(peers) = &mut self.group {
            for peer in self.rank + 1..self.size {
                if let std::collections::btree_map::Entry::Vacant(slot) = peers.entry(peer)
                    && let Some(socket) =
                        waiting.take(self.revision, LinkPurpose::Group { rank: peer as u32 })
                {
                    slot.insert(socket);
                }
            }
            if peers.len() + 1 == self.size {
                let peers = std::mem::take(peers);
                self.group = PendingGroup::Agreeing(Agreement::start(self.rank, peers, self.settings));
            }
        }
        if let PendingGroup::Agreeing(agreement) = &mut self.group
            && let Some(outcome) = agreement.outcome()
        {
            self.group = PendingGroup::Done(outcome);
        }
        self.is_connected() && matches!(self.group, PendingGroup::Done(_))
    }

    /// Whether every connection stands. What may still be missing is the group's agreement, which ends by itself: it waits
    /// only for ranks whose connections stand, and ends with them.
    pub fn is_connected(&self) -> bool {
        (!self.needs_previous || self.previous.is_some())
            && !matches!(self.group, PendingGroup::Connecting(_))
    }

    /// The finished links.
    pub fn finish(self, breaker: &LinkBreaker, beat: &Beat) -> Result<Links, LinkError> {
        let open = |socket: TcpStream| -> Result<DataLink, FrameError> {
            breaker.register(&socket)?;
            Ok(DataLink::new(socket, self.settings.faults)?)
        };
        let agreed = match self.group {
            PendingGroup::Done(outcome) => outcome?,
            PendingGroup::Connecting(_) | PendingGroup::Agreeing(_) => return Err(FrameError::Closed.into()),
        };
        let previous = self.previous.map(open).transpose()?;
        let next = self.next.map(open).transpose()?.map(Sender::start);
        for socket in agreed.peers.values() {
            breaker.register(socket).map_err(FrameError::Io)?;
        }
        let group = Group::new(self.rank, self.revision, agreed, self.settings.faults, beat.clone())
            .map_err(FrameError::Io)?;
        Ok(Links { previous, next, group })
    }
}

/// Sends activations from a thread of its own, so that computing goes on while a busy next stage does not read.
#[derive(Debug)]
pub struct Sender {
    queue: mpsc::SyncSender<(PayloadHeader, Vec<f32>)>,
    spare: mpsc::Receiver<Vec<f32>>,
}

impl Sender {
    fn start(mut link: DataLink) -> Sender {
        let (queue, jobs) = mpsc::sync_channel::<(PayloadHeader, Vec<f32>)>(SEND_QUEUE);
        let (give_back, spare) = mpsc::sync_channel(SEND_QUEUE);
        std::thread::spawn(move || {
            for (header, values) in jobs {
                if link.send(header, &values).is_err() {
                    return;
                }
                // A full return queue only means that this buffer is freed.
                let _ = give_back.try_send(values);
            }
        });
        Sender { queue, spare }
    }

    /// Queues a copy of `values`; waits while the queue is full. Fails once the link is broken.
    pub fn send(&self, header: PayloadHeader, values: &[f32]) -> Result<(), FrameError> {
        let mut buffer = self.spare.try_recv().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(values);
        self.queue.send((header, buffer)).map_err(|_| FrameError::Closed)
    }
}
