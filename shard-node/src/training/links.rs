//! A session's connections: within the group, to the stages beside, and to the same place in other replicas.

use super::alarm::Alarm;
use super::error::SessionError;
use super::facts::{self, Facts};
use crate::beat::Beat;
use crate::group::Group;
use crate::group::agreement::Agreement;
use crate::links::{LinkSettings, Sender, connect};
use ashlar_identity::{Socket, Transport};
use ashlar_kernels::Kernels;
use ashlar_model::stage::BatchLoss;
use ashlar_protocol::data::{DataLink, LinkHello, LinkPurpose, PayloadHeader, PayloadKind, TrainingLink};
use ashlar_protocol::frame::FrameError;
use ashlar_protocol::training::OpenSession;
use ashlar_shared_memory::{Geometry, SLOT_VALUES};
use ashlar_vocabulary::{FloatType, LeaseTerm, ReplicaRevision, SessionId, StepId};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long the connections of a session may take to stand.
const LINK_TIMEOUT: Duration = Duration::from_secs(60);
/// How often the alarm is looked at meanwhile.
const PATIENCE: Duration = Duration::from_millis(20);
/// Values per exchange between replicas: small enough that both sides may send before either receives.
const EXCHANGE_VALUES: usize = 8 << 10;

/// Values of a message with a part of a table: what is queued is bounded.
const TABLE_VALUES: usize = 256 << 10;

/// A connection of this session that another rank has made.
pub(super) type Arrival = (TrainingLink, Socket);

/// A rank's place among those that a session connects.
pub(super) struct Seat {
    pub(super) term: LeaseTerm,
    pub(super) rank: usize,
    pub(super) ranks: usize,
    /// Whether there is a stage before this one.
    pub(super) follows: bool,
    pub(super) activations: FloatType,
}

/// All connections of a session.
pub(super) struct Links {
    pub(super) group: Group,
    pub(super) previous: Option<StageLink>,
    pub(super) next: Option<StageLink>,
    pub(super) replicas: ReplicaLinks,
}

/// The revision that a session's payloads carry: its number, which no layout has.
fn identity(session: SessionId) -> ReplicaRevision {
    ReplicaRevision(session.0)
}

/// Makes the connections. Every rank connects to lower ranks of its group, to the next stage and to lower replicas, and waits
/// for the others.
pub(super) fn make(
    open: &OpenSession,
    seat: &Seat,
    (settings, transport): (LinkSettings, &Transport),
    alarm: &Alarm,
    arrivals: &Receiver<Arrival>,
) -> Result<Links, SessionError> {
    let reach = |address: &str, link: TrainingLink, who: &'static str| {
        alarm.check()?;
        let purpose = LinkPurpose::Training { session: open.session, link };
        let hello = LinkHello { term: seat.term, revision: open.revision, purpose };
        let socket = connect(address, &hello, transport).map_err(SessionError::lost(who))?;
        alarm.guard(&socket)?;
        Ok::<_, SessionError>(socket)
    };
    let (mut group, mut peers) = (BTreeMap::new(), BTreeMap::new());
    let own_rank = TrainingLink::Group { rank: seat.rank as u32 };
    for (peer, address) in open.group.iter().enumerate().take(seat.rank) {
        group.insert(peer, reach(address, own_rank, GROUP)?);
    }
    let next = open.next.as_deref().map(|address| reach(address, TrainingLink::Stage, NEXT)).transpose()?;
    let (own, replicas) = (open.replica as usize, open.replicas as usize);
    let own_replica = TrainingLink::Replica { replica: open.replica };
    for peer in partners(own, replicas).filter(|&peer| peer < own) {
        let address = open.peers.get(peer).ok_or_else(|| refused("names too few peers"))?;
        peers.insert(peer, reach(address, own_replica, REPLICA)?);
    }
    let mut previous = None;
    let wanted_peers = partners(own, replicas).count();
    let started = Instant::now();
    while group.len() + 1 < seat.ranks || (seat.follows && previous.is_none()) || peers.len() < wanted_peers {
        alarm.probe()?;
        if started.elapsed() > LINK_TIMEOUT {
            return Err(SessionError::Alone(LINK_TIMEOUT.as_secs()));
        }
        let (link, socket) = match arrivals.recv_timeout(PATIENCE) {
            Ok(arrival) => arrival,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(SessionError::Ended("the node stops".into()));
            }
        };
        match link {
            TrainingLink::Stage if seat.follows => {
                alarm.guard(&socket)?;
                previous = Some(socket);
            }
            TrainingLink::Group { rank } if (seat.rank + 1..seat.ranks).contains(&(rank as usize)) => {
                alarm.guard(&socket)?;
                group.insert(rank as usize, socket);
            }
            TrainingLink::Replica { replica }
                if replica as usize > own
                    && partners(own, replicas).any(|partner| partner == replica as usize) =>
            {
                alarm.guard(&socket)?;
                peers.insert(replica as usize, socket);
            }
            // It says that it is something that this rank has no place for.
            _ => {}
        }
    }
    let revision = identity(open.session);
    let stage =
        |socket: Socket, who| StageLink::new(socket, revision, seat.activations, settings, alarm, who);
    Ok(Links {
        group: agree(seat, group, revision, settings, alarm)?,
        previous: previous.map(|socket| stage(socket, PREVIOUS)).transpose()?,
        next: next.map(|socket| stage(socket, NEXT)).transpose()?,
        replicas: ReplicaLinks::new(own, peers, revision, settings, alarm)?,
    })
}

const GROUP: &str = "a rank of the same stage";
const NEXT: &str = "the next stage";
const PREVIOUS: &str = "the previous stage";
const REPLICA: &str = "another replica";

fn refused(what: &str) -> SessionError {
    SessionError::Refused(format!("the session {what}"))
}

/// The replicas that a replica meets: one per level of the tree over replicas.
fn partners(replica: usize, replicas: usize) -> impl Iterator<Item = usize> {
    let levels = std::iter::successors(Some(1), |distance| Some(distance * 2));
    levels.take_while(move |&distance| distance < replicas).map(move |distance| replica ^ distance)
}

/// The group decides how it exchanges, as it does for serving.
fn agree(
    seat: &Seat,
    peers: BTreeMap<usize, Socket>,
    revision: ReplicaRevision,
    settings: LinkSettings,
    alarm: &Alarm,
) -> Result<Group, SessionError> {
    let geometry = Geometry::new(seat.ranks, SLOT_VALUES);
    let mut agreement = Agreement::start(seat.rank, peers, geometry, settings);
    let agreed = loop {
        alarm.check()?;
        match agreement.outcome() {
            Some(outcome) => break outcome,
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let agreed = agreed.map_err(|error| SessionError::Lost { who: GROUP, source: error.source })?;
    Ok(Group::new(seat.rank, revision, agreed, settings, Beat::silent())?)
}

/// To a stage beside: rows one way, their gradients the other, facts both ways. What is sent is queued, so that two stages
/// that send to each other both go on.
pub(super) struct StageLink {
    sender: Sender,
    receiver: DataLink,
    revision: ReplicaRevision,
    activations: FloatType,
    sent: u64,
    received: u64,
    payload: Vec<u8>,
    alarm: Alarm,
    who: &'static str,
}

impl StageLink {
    fn new(
        socket: Socket,
        revision: ReplicaRevision,
        activations: FloatType,
        settings: LinkSettings,
        alarm: &Alarm,
        who: &'static str,
    ) -> Result<StageLink, SessionError> {
        let receiver = DataLink::new(socket.try_clone()?, settings.faults)?;
        let sender = Sender::start(DataLink::new(socket, settings.faults)?);
        let (alarm, payload) = (alarm.clone(), Vec::new());
        Ok(StageLink { sender, receiver, revision, activations, sent: 0, received: 0, payload, alarm, who })
    }

    fn header(&self, kind: PayloadKind, count: u64) -> PayloadHeader {
        PayloadHeader { kind, revision: self.revision, step: StepId(count), sequence: 0 }
    }

    fn outgoing(&mut self, kind: PayloadKind) -> PayloadHeader {
        self.sent += 1;
        self.header(kind, self.sent)
    }

    fn incoming(&mut self, kind: PayloadKind) -> PayloadHeader {
        self.received += 1;
        self.header(kind, self.received)
    }

    pub(super) fn send_rows(&mut self, kernels: &Kernels, rows: &[f32]) -> Result<(), SessionError> {
        let kind = self.activations;
        let header = self.outgoing(PayloadKind::Activations(kind));
        let sent = match kind {
            FloatType::F32 => self.sender.send(header, rows),
            FloatType::Bf16 | FloatType::F16 => {
                let length = rows.len() * kind.bytes();
                self.sender.send_with(header, length, |payload| kernels.narrow(kind, rows, payload))
            }
        };
        sent.map_err(SessionError::lost(self.who))
    }

    pub(super) fn receive_rows(&mut self, kernels: &Kernels, rows: &mut [f32]) -> Result<(), SessionError> {
        let kind = self.activations;
        let header = self.incoming(PayloadKind::Activations(kind));
        let alarm = self.alarm.clone();
        let mut idle = || live(&alarm);
        if kind == FloatType::F32 {
            let received = self.receiver.receive(header, rows, &mut idle);
            return received.map_err(SessionError::lost(self.who));
        }
        self.payload.resize(rows.len() * kind.bytes(), 0);
        let received = self.receiver.receive_bytes(header, &mut self.payload, &mut idle);
        received.map_err(SessionError::lost(self.who))?;
        kernels.widen(kind, &self.payload, rows);
        Ok(())
    }

    pub(super) fn send_gradients(&mut self, rows: &[f32]) -> Result<(), SessionError> {
        let header = self.outgoing(PayloadKind::Gradients);
        self.sender.send(header, rows).map_err(SessionError::lost(self.who))
    }

    pub(super) fn receive_gradients(&mut self, rows: &mut [f32]) -> Result<(), SessionError> {
        let header = self.incoming(PayloadKind::Gradients);
        let alarm = self.alarm.clone();
        self.receiver.receive(header, rows, &mut || live(&alarm)).map_err(SessionError::lost(self.who))
    }

    /// Sends a rank's sum of gradients for a table.
    pub(super) fn send_table(&mut self, table: &[f32]) -> Result<(), SessionError> {
        table.chunks(TABLE_VALUES).try_for_each(|chunk| self.send_gradients(chunk))
    }

    /// Receives such a sum.
    pub(super) fn receive_table(&mut self, table: &mut [f32]) -> Result<(), SessionError> {
        table.chunks_mut(TABLE_VALUES).try_for_each(|chunk| self.receive_gradients(chunk))
    }

    pub(super) fn send_facts(&mut self, facts: &Facts) -> Result<(), SessionError> {
        let header = self.outgoing(PayloadKind::TrainingFacts);
        self.sender.send(header, &facts.encode()).map_err(SessionError::lost(self.who))
    }

    pub(super) fn receive_facts(&mut self) -> Result<Facts, SessionError> {
        let expected = self.incoming(PayloadKind::TrainingFacts);
        let (alarm, mut words) = (self.alarm.clone(), Vec::new());
        let of = (expected.kind, expected.revision);
        let received = self.receiver.receive_any(of, (1, facts::WORDS_MAX), &mut words, &mut || live(&alarm));
        let (count, _) = received.map_err(SessionError::lost(self.who))?;
        let facts = Facts::decode(&words).filter(|_| count == expected.step);
        facts.ok_or(SessionError::Lost { who: self.who, source: FrameError::Corrupt })
    }
}

fn live(alarm: &Alarm) -> Result<(), FrameError> {
    // Whoever is waited for may live while another rank is gone.
    alarm.probe().map_err(|_| FrameError::Closed)
}

/// To the same place in other replicas: sums over replicas, in the upper levels of the tree over a batch's runs. At each level a
/// replica meets the one that has the other half of the sum.
pub(super) struct ReplicaLinks {
    /// In the order of levels.
    partners: Vec<DataLink>,
    revision: ReplicaRevision,
    sent: u64,
    theirs: Vec<f32>,
    alarm: Alarm,
}

impl ReplicaLinks {
    fn new(
        own: usize,
        mut peers: BTreeMap<usize, Socket>,
        revision: ReplicaRevision,
        settings: LinkSettings,
        alarm: &Alarm,
    ) -> Result<ReplicaLinks, SessionError> {
        let mut partners = Vec::new();
        let replicas = 1 << peers.len();
        for partner in self::partners(own, replicas) {
            let socket =
                peers.remove(&partner).ok_or_else(|| refused("has replicas that are no power of two"))?;
            partners.push(DataLink::new(socket, settings.faults)?);
        }
        Ok(ReplicaLinks { partners, revision, sent: 0, theirs: Vec::new(), alarm: alarm.clone() })
    }

    /// The other's values, as many as `own`, are in `theirs` afterwards.
    fn exchange(&mut self, level: usize, own: &[f32]) -> Result<(), SessionError> {
        let ReplicaLinks { partners, revision, sent, theirs, alarm } = self;
        theirs.resize(own.len(), 0.0);
        let Some(link) = partners.get_mut(level) else { return Ok(()) };
        for (own, theirs) in own.chunks(EXCHANGE_VALUES).zip(theirs.chunks_mut(EXCHANGE_VALUES)) {
            *sent += 1;
            let kind = PayloadKind::Collective;
            let header =
                PayloadHeader { kind, revision: *revision, step: StepId(*sent), sequence: level as u32 };
            link.send(header, own).map_err(SessionError::lost(REPLICA))?;
            link.receive(header, theirs, &mut || live(alarm)).map_err(SessionError::lost(REPLICA))?;
        }
        Ok(())
    }

    /// Replaces a tensor by its sum over all replicas.
    pub(super) fn sum(&mut self, kernels: &Kernels, tensor: &mut [f32]) -> Result<(), SessionError> {
        for level in 0..self.partners.len() {
            self.exchange(level, tensor)?;
            // The same bits on both sides: the order of two summands does not show.
            kernels.add(tensor, &self.theirs);
        }
        Ok(())
    }

    /// What all replicas lost.
    pub(super) fn sum_loss(&mut self, mut loss: BatchLoss) -> Result<BatchLoss, SessionError> {
        for level in 0..self.partners.len() {
            self.exchange(level, &facts::encode_loss(&loss))?;
            let theirs = facts::decode_loss(&self.theirs);
            let theirs = theirs.ok_or(SessionError::Lost { who: REPLICA, source: FrameError::Corrupt })?;
            loss = loss.and(theirs);
        }
        Ok(loss)
    }
}
