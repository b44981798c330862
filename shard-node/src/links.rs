//! Data connections of a rank: from the previous stage, to the next one, within the tensor-parallel group, and between the
//! rank that samples and those that hold slices of a spread head. What is done with the latter two is in [`crate::group`] and
//! [`crate::head`].

use crate::activations::{ActivationReceiver, ActivationSender, RowFormat};
use crate::beat::Beat;
use crate::group::Group;
use crate::group::agreement::{Agreed, Agreement, AgreementError};
use crate::head::{HeadLink, HeadLinks, HeadService, SliceValues, Wake};
use ashlar_identity::{Role, Socket, Transport};
use ashlar_model::stage::LOGIT_ROWS_MAX;
use ashlar_protocol::data::{DataLink, LinkFaults, LinkHello, LinkPurpose, PayloadHeader};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::Assignment;
use ashlar_shared_memory::{Geometry, Mailbox, Memory, SLOT_VALUES};
use ashlar_vocabulary::{Bytes, FloatType, ModelShape, ReplicaRevision};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long connecting to a peer may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Activations waiting to be sent to the next stage.
const SEND_QUEUE: usize = 16;
/// How long a rank that serves a spread head waits for activations before it looks for rows: little against a step, and
/// only middle stages wait for both.
const HEAD_PATIENCE: Duration = Duration::from_millis(1);

/// Lets the control connection break this rank's links, so that a compute thread waiting on one wakes up.
#[derive(Debug, Default, Clone)]
pub struct LinkBreaker(Arc<Breaker>);

#[derive(Debug, Default)]
struct Breaker {
    sockets: Mutex<Vec<TcpStream>>,
    /// Counts assignments, also those that only end.
    wish: AtomicU64,
}

/// What the scheduler wants, as a number: another one once it wants something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish(u64);

impl LinkBreaker {
    /// Shuts every registered link down.
    pub fn break_all(&self) {
        for socket in self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // A link that is closed already is as broken as it can be.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// The same, because the scheduler wants something else from now on.
    pub fn supersede(&self) -> Wish {
        let wish = Wish(self.0.wish.fetch_add(1, Ordering::Relaxed) + 1);
        self.break_all();
        wish
    }

    /// Whether the scheduler wants this still.
    pub fn is_current(&self, wish: Wish) -> bool {
        Wish(self.0.wish.load(Ordering::Relaxed)) == wish
    }

    pub(crate) fn register(&self, socket: &Socket) -> std::io::Result<()> {
        let socket = socket.tcp().try_clone()?;
        self.0.sockets.lock().unwrap_or_else(PoisonError::into_inner).push(socket);
        Ok(())
    }
}

/// An accepted connection that has said what it is.
#[derive(Debug)]
pub struct Inbound {
    /// What it said.
    pub hello: LinkHello,
    /// The socket.
    pub socket: Socket,
}

/// Greets an accepted connection; errors concern only this connection. Only nodes of the cluster are listened to.
pub fn accept(socket: TcpStream, transport: &Transport) -> Result<Inbound, FrameError> {
    let mut socket = transport.accept_blocking(socket, Role::Node, CONNECT_TIMEOUT)?;
    socket.set_read_timeout(Some(CONNECT_TIMEOUT))?;
    frame::greet_blocking(&mut socket, "node")?;
    let hello = frame::read_blocking(&mut socket)?;
    Ok(Inbound { hello, socket })
}

/// Connects to another rank and says what the connection is.
pub(crate) fn connect(address: &str, hello: &LinkHello, transport: &Transport) -> Result<Socket, FrameError> {
    let resolved = address.to_socket_addrs()?.next();
    let resolved = resolved.ok_or_else(|| {
        FrameError::Io(std::io::Error::new(std::io::ErrorKind::NotFound, format!("no address for {address}")))
    })?;
    let socket = TcpStream::connect_timeout(&resolved, CONNECT_TIMEOUT)?;
    // A handshake is many small messages.
    socket.set_nodelay(true)?;
    let mut socket = transport.connect_blocking(socket, Role::Node, CONNECT_TIMEOUT)?;
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

    fn take(&mut self, revision: ReplicaRevision, purpose: LinkPurpose) -> Option<Socket> {
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
    pub previous: Option<ActivationReceiver>,
    /// To the next stage.
    pub next: Option<ActivationSender>,
    /// Within the group.
    pub group: Group,
    /// On ranks of earlier stages, where the head is spread: from the rank that samples.
    pub head_service: Option<HeadService>,
    /// On the rank that samples: to those ranks. Empty elsewhere.
    pub head_ranks: HeadLinks,
}

impl Links {
    /// Memory that they reserve, shared memory included. Activations on their way are not in it.
    pub fn bytes(&self) -> Bytes {
        let service = self.head_service.as_ref().map_or(Bytes(0), HeadService::bytes);
        self.group.bytes() + service + self.head_ranks.bytes()
    }
}

/// How a rank's links are made.
#[derive(Debug, Clone, Copy)]
pub struct LinkSettings {
    /// Deliberate trouble.
    pub faults: LinkFaults,
    /// Whether ranks may exchange through shared memory.
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
    /// The rank that samples and one with a slice of the head did not come to an agreement.
    #[error("it was not agreed how slice {index} of the head travels: {source}")]
    HeadAgreement {
        /// Which slice.
        index: usize,
        /// Why.
        source: FrameError,
    },
}

/// Links being made: outbound ones stand, inbound ones may still be missing.
#[derive(Debug)]
pub struct PendingLinks {
    revision: ReplicaRevision,
    /// Of the rows that stages hand on.
    activations: FloatType,
    settings: LinkSettings,
    needs_previous: bool,
    previous: Option<Socket>,
    next: Option<Socket>,
    rank: usize,
    size: usize,
    group: PendingGroup,
    /// What travels for each slice of the head.
    head: Vec<SliceValues>,
    /// To the rank that samples, for a rank of an earlier stage that holds a slice of the head.
    sampler: Option<(usize, Pending)>,
    /// How many such ranks this one, which samples, is to hear from.
    head_ranks_wanted: usize,
    head_ranks: BTreeMap<usize, Pending>,
}

/// How far a group has come.
#[derive(Debug)]
enum PendingGroup {
    Connecting(BTreeMap<usize, Socket>),
    Connected(Pending),
}

/// Ranks that are connected.
#[derive(Debug)]
enum Pending {
    Agreeing(Agreement),
    Done(Result<Agreed, AgreementError>),
}

impl Pending {
    /// Takes the agreement's outcome if it has come; whether it has.
    fn is_done(&mut self) -> bool {
        if let Pending::Agreeing(agreement) = self
            && let Some(outcome) = agreement.outcome()
        {
            *self = Pending::Done(outcome);
        }
        matches!(self, Pending::Done(_))
    }

    fn outcome(self) -> Result<Agreed, AgreementError> {
        match self {
            Pending::Done(outcome) => outcome,
            Pending::Agreeing(_) => Err(AgreementError { rank: 0, source: FrameError::Closed }),
        }
    }
}

/// The rank that samples leads the agreement, a rank with a slice follows it.
const SAMPLER: usize = 0;
const HEAD_RANK: usize = 1;

/// Between the rank that samples and one with a slice of the head: how the slice travels.
fn agree_on_slice(own: usize, socket: Socket, values: SliceValues, settings: LinkSettings) -> Pending {
    let other = SAMPLER + HEAD_RANK - own;
    let geometry = Mailbox::geometry(LOGIT_ROWS_MAX, values.slice);
    Pending::Agreeing(Agreement::start(own, BTreeMap::from([(other, socket)]), geometry, settings))
}

/// The connection of such an agreement, and what the two share or why nothing.
fn agreed_on_slice(index: usize, pending: Pending) -> Result<(Socket, Result<Memory, String>), LinkError> {
    let lost = |source| LinkError::HeadAgreement { index, source };
    let agreed = pending.outcome().map_err(|error| lost(error.source))?;
    let socket = agreed.peers.into_values().next().ok_or(lost(FrameError::Closed))?;
    Ok((socket, agreed.memory))
}

impl PendingLinks {
    /// Connects to the next stage, to the lower ranks of the group and to the rank that samples.
    pub fn connect(
        assignment: &Assignment,
        shape: &ModelShape,
        settings: LinkSettings,
        transport: &Transport,
    ) -> Result<PendingLinks, FrameError> {
        let hello = |purpose| LinkHello { term: assignment.term, revision: assignment.revision, purpose };
        let rank = assignment.tensor_rank.0 as usize;
        let mut peers = BTreeMap::new();
        for (peer, address) in assignment.group.iter().enumerate().take(rank) {
            let purpose = LinkPurpose::Group { rank: assignment.tensor_rank.0 };
            peers.insert(peer, connect(address, &hello(purpose), transport)?);
        }
        let next = match &assignment.next {
            Some(address) => Some(connect(address, &hello(LinkPurpose::Activations), transport)?),
            None => None,
        };
        let size = (assignment.tensor_parallel_size as usize).max(1);
        let slices = assignment.head.iter().flat_map(|head| head.all_rows(shape));
        let head: Vec<SliceValues> =
            slices.map(|rows| SliceValues { row: shape.hidden_size, slice: rows.len() }).collect();
        let mut sampler = None;
        if let (Some(address), Some(slice)) = (&assignment.sampler, assignment.head)
            && let Some(&values) = head.get(slice.index)
        {
            let purpose = LinkPurpose::Head { index: slice.index as u32 };
            let socket = connect(address, &hello(purpose), transport)?;
            sampler = Some((slice.index, agree_on_slice(HEAD_RANK, socket, values, settings)));
        }
        let samples = assignment.sampler.is_none() && rank == 0;
        let head_ranks_wanted =
            assignment.head.filter(|_| samples).map_or(0, |head| head.of.saturating_sub(size));
        Ok(PendingLinks {
            head,
            sampler,
            head_ranks_wanted,
            head_ranks: BTreeMap::new(),
            revision: assignment.revision,
            activations: assignment.precision.activations,
            settings,
            needs_previous: assignment.stage.0 > 0,
            previous: None,
            next,
            rank,
            size,
            group: PendingGroup::Connecting(peers),
        })
    }

    /// Takes what has arrived, and goes on with the group's agreement; whether [`PendingLinks::finish`] may be called.
    pub fn collect(&mut self, waiting: &mut Waiting) -> bool {
        if self.needs_previous && self.previous.is_none() {
            self.previous = waiting.take(self.revision, LinkPurpose::Activations);
        }
        for (index, &values) in self.head.iter().enumerate().take(self.head_ranks_wanted) {
            if let Entry::Vacant(slot) = self.head_ranks.entry(index)
                && let Some(socket) = waiting.take(self.revision, LinkPurpose::Head { index: index as u32 })
            {
                slot.insert(agree_on_slice(SAMPLER, socket, values, self.settings));
            }
        }
        if let PendingGroup::Connecting(peers) = &mut self.group {
            for peer in self.rank + 1..self.size {
                if let Entry::Vacant(slot) = peers.entry(peer)
                    && let Some(socket) =
                        waiting.take(self.revision, LinkPurpose::Group { rank: peer as u32 })
                {
                    slot.insert(socket);
                }
            }
            if peers.len() + 1 == self.size {
                let (peers, geometry) = (std::mem::take(peers), Geometry::new(self.size, SLOT_VALUES));
                let agreement = Agreement::start(self.rank, peers, geometry, self.settings);
                self.group = PendingGroup::Connected(Pending::Agreeing(agreement));
            }
        }
        let group = match &mut self.group {
            PendingGroup::Connecting(_) => false,
            PendingGroup::Connected(pending) => pending.is_done(),
        };
        let sampler = self.sampler.as_mut().is_none_or(|(_, pending)| pending.is_done());
        // All of them are looked at, so that each gets on.
        let ranks =
            self.head_ranks.values_mut().filter_map(|pending| (!pending.is_done()).then_some(())).count();
        group && sampler && ranks == 0 && self.is_connected()
    }

    /// Whether every connection stands. What may still be missing are agreements, which end by themselves: they wait only for
    /// ranks whose connections stand, and end with them.
    pub fn is_connected(&self) -> bool {
        (!self.needs_previous || self.previous.is_some())
            && self.head_ranks.len() == self.head_ranks_wanted
            && !matches!(self.group, PendingGroup::Connecting(_))
    }

    /// The finished links.
    pub fn finish(self, breaker: &LinkBreaker, beat: &Beat, wake: Wake) -> Result<Links, LinkError> {
        let open = |socket: Socket| -> Result<DataLink, FrameError> {
            breaker.register(&socket)?;
            Ok(DataLink::new(socket, self.settings.faults)?)
        };
        let agreed = match self.group {
            PendingGroup::Connected(pending) => pending.outcome()?,
            PendingGroup::Connecting(_) => return Err(FrameError::Closed.into()),
        };
        let rows = RowFormat { revision: self.revision, kind: self.activations };
        let previous = self.previous.map(&open).transpose()?;
        let next = self.next.map(&open).transpose()?.map(|link| ActivationSender::start(link, rows));
        let (revision, faults) = (self.revision, self.settings.faults);
        let head_service = match self.sampler {
            Some((index, pending)) => {
                let (socket, memory) = agreed_on_slice(index, pending)?;
                breaker.register(&socket).map_err(FrameError::Io)?;
                let values = *self.head.get(index).ok_or(FrameError::Closed)?;
                let service = HeadService::start(socket, memory.ok(), revision, faults, (values, wake));
                Some(service.map_err(FrameError::Io)?)
            }
            None => None,
        };
        if let (Some(_), Some(previous)) = (&head_service, &previous) {
            previous.set_patience(HEAD_PATIENCE).map_err(FrameError::Io)?;
        }
        let mut head_links = Vec::with_capacity(self.head_ranks.len());
        for ((index, pending), values) in self.head_ranks.into_iter().zip(&self.head) {
            let (socket, memory) = agreed_on_slice(index, pending)?;
            let (link, mailbox) = (open(socket)?, memory.map(Mailbox::new));
            head_links.push(HeadLink { link, mailbox, slice_values: values.slice });
        }
        let head_ranks = HeadLinks::new(revision, head_links, beat.clone());
        for socket in agreed.peers.values() {
            breaker.register(socket).map_err(FrameError::Io)?;
        }
        let group =
            Group::new(self.rank, revision, agreed, self.settings, beat.clone()).map_err(FrameError::Io)?;
        let previous = previous.map(|link| ActivationReceiver::new(link, rows));
        Ok(Links { previous, next, group, head_service, head_ranks })
    }
}

/// Sends payloads from a thread of its own, so that computing goes on while a busy peer does not read.
#[derive(Debug)]
pub struct Sender {
    queue: mpsc::SyncSender<(PayloadHeader, Vec<u8>)>,
    spare: mpsc::Receiver<Vec<u8>>,
}

impl Sender {
    pub(crate) fn start(mut link: DataLink) -> Sender {
        let (queue, jobs) = mpsc::sync_channel::<(PayloadHeader, Vec<u8>)>(SEND_QUEUE);
        let (give_back, spare) = mpsc::sync_channel(SEND_QUEUE);
        std::thread::spawn(move || {
            for (header, payload) in jobs {
                if link.send_bytes(header, &payload).is_err() {
                    return;
                }
                // A full return queue only means that this buffer is freed.
                let _ = give_back.try_send(payload);
            }
        });
        Sender { queue, spare }
    }

    /// Queues a copy of `values`; waits while the queue is full. Fails once the link is broken.
    pub fn send(&self, header: PayloadHeader, values: &[f32]) -> Result<(), FrameError> {
        let values: &[u8] = bytemuck::cast_slice(values);
        self.send_with(header, values.len(), |payload| payload.copy_from_slice(values))
    }

    /// Queues the `length` bytes that `write` writes, as [`Sender::send`] queues values.
    pub(crate) fn send_with(
        &self,
        header: PayloadHeader,
        length: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), FrameError> {
        let mut payload = self.spare.try_recv().unwrap_or_default();
        payload.resize(length, 0);
        write(&mut payload);
        self.queue.send((header, payload)).map_err(|_| FrameError::Closed)
    }
}
