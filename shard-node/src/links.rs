//! Data connections of a rank: from the previous stage, to the next one, and within the tensor-parallel group.

use crate::beat::Beat;
use ashlar_model::{Collective, CollectiveError};
use ashlar_protocol::data::{DataLink, LinkFaults, LinkHello, LinkPurpose, PayloadHeader, PayloadKind};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::Assignment;
use ashlar_vocabulary::{ReplicaRevision, StepId};
use std::collections::BTreeMap;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long connecting to a peer may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Values per exchange within a group: small enough that both sides may send before either receives.
const EXCHANGE_VALUES: usize = 8 << 10;
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

    fn register(&self, link: &DataLink) -> Result<(), FrameError> {
        let socket = link.try_clone_socket()?;
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

/// Links being made: outbound ones stand, inbound ones may still be missing.
#[derive(Debug)]
pub struct PendingLinks {
    revision: ReplicaRevision,
    faults: LinkFaults,
    needs_previous: bool,
    previous: Option<TcpStream>,
    next: Option<TcpStream>,
    rank: usize,
    size: usize,
    peers: BTreeMap<usize, TcpStream>,
}

impl PendingLinks {
    /// Connects to the next stage and to the lower ranks of the group.
    pub fn connect(assignment: &Assignment, faults: LinkFaults) -> Result<PendingLinks, FrameError> {
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
            faults,
            needs_previous: assignment.stage.0 > 0,
            previous: None,
            next,
            rank,
            size: assignment.tensor_parallel_size as usize,
            peers,
        })
    }

    /// Takes what has arrived; whether all links stand now.
    pub fn collect(&mut self, waiting: &mut Waiting) -> bool {
        if self.needs_previous && self.previous.is_none() {
            self.previous = waiting.take(self.revision, LinkPurpose::Activations);
        }
        for peer in self.rank + 1..self.size {
            if let std::collections::btree_map::Entry::Vacant(slot) = self.peers.entry(peer)
                && let Some(socket) = waiting.take(self.revision, LinkPurpose::Group { rank: peer as u32 })
            {
                slot.insert(socket);
            }
        }
        (!self.needs_previous || self.previous.is_some()) && self.peers.len() + 1 == self.size.max(1)
    }

    /// The finished links.
    pub fn finish(self, breaker: &LinkBreaker, beat: &Beat) -> Result<Links, FrameError> {
        let open = |socket: TcpStream| -> Result<DataLink, FrameError> {
            let link = DataLink::new(socket, self.faults)?;
            breaker.register(&link)?;
            Ok(link)
        };
        let previous = self.previous.map(open).transpose()?;
        let next = self.next.map(open).transpose()?.map(Sender::start);
        let mut peers = BTreeMap::new();
        for (peer, socket) in self.peers {
            peers.insert(peer, open(socket)?);
        }
        let group = Group {
            rank: self.rank,
            size: self.size,
            revision: self.revision,
            step: StepId(0),
            sequence: 0,
            peers,
            scratch: Vec::new(),
            spent: Duration::ZERO,
            beat: beat.clone(),
        };
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

/// The tensor-parallel group as this rank sees it.
#[derive(Debug)]
pub struct Group {
    rank: usize,
    size: usize,
    revision: ReplicaRevision,
    step: StepId,
    sequence: u32,
    peers: BTreeMap<usize, DataLink>,
    scratch: Vec<f32>,
    spent: Duration,
    beat: Beat,
}

impl Group {
    /// Starts counting exchanges for `step`.
    pub fn begin(&mut self, step: StepId) {
        (self.step, self.sequence, self.spent) = (step, 0, Duration::ZERO);
    }

    /// Time spent exchanging since [`Group::begin`].
    pub fn spent(&self) -> Duration {
        self.spent
    }

    fn header(&mut self) -> PayloadHeader {
        self.sequence += 1;
        PayloadHeader {
            kind: PayloadKind::Collective,
            revision: self.revision,
            step: self.step,
            sequence: self.sequence,
        }
    }

    fn with_peer<R>(
        &mut self,
        peer: usize,
        exchange: impl FnOnce(&mut DataLink) -> Result<R, FrameError>,
    ) -> Result<R, CollectiveError> {
        let lost = |reason: String| CollectiveError { rank: peer, reason };
        let link = self.peers.get_mut(&peer).ok_or_else(|| lost("not connected".into()))?;
        exchange(link).map_err(|error| lost(error.to_string()))
    }
}

impl Collective for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    /// Pairs meet in rounds (`partner = rank ⊕ round`) and exchange chunk by chunk, so that no two ranks ever wait for
    /// each other to read.
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let started = Instant::now();
        all[self.rank * own.len()..(self.rank + 1) * own.len()].copy_from_slice(own);
        let beat = self.beat.clone();
        for (index, chunk) in own.chunks(EXCHANGE_VALUES).enumerate() {
            let header = self.header();
            for round in 1..self.size {
                let peer = self.rank ^ round;
                let at = peer * own.len() + index * EXCHANGE_VALUES;
                let target = &mut all[at..at + chunk.len()];
                self.with_peer(peer, |link| {
                    link.send(header, chunk)?;
                    link.receive(header, target, &mut || beat.tick())
                })?;
            }
        }
        self.spent += started.elapsed();
        Ok(())
    }

    fn gather(&mut self, own: &[f32], lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        let started = Instant::now();
        let header = self.header();
        if self.rank > 0 {
            self.with_peer(0, |link| link.send(header, own))?;
        } else {
            all[..own.len()].copy_from_slice(own);
            let mut at = own.len();
            let beat = self.beat.clone();
            for (peer, &length) in lengths.iter().enumerate().skip(1) {
                let mut scratch = std::mem::take(&mut self.scratch);
                scratch.resize(length, 0.0);
                self.with_peer(peer, |link| link.receive(header, &mut scratch, &mut || beat.tick()))?;
                all[at..at + length].copy_from_slice(&scratch);
                self.scratch = scratch;
                at += length;
            }
        }
        self.spent += started.elapsed();
        Ok(())
    }
}
