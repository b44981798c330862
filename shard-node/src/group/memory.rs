//! The group's exchange through shared memory. Its connections stay open and carry nothing: their end is how a rank learns,
//! in the middle of a wait, that another is gone or that it shall stop itself.

use crate::beat::Beat;
use ashlar_identity::Socket;
use ashlar_model::CollectiveError;
use ashlar_protocol::data::LinkFaults;
use ashlar_shared_memory::{Alarm, Attendant, Exchange, ExchangeError};
use ashlar_vocabulary::{Bytes, StepId};
use rustix::event::{PollFd, PollFlags, poll};
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// A rank's end of the shared memory, with the connections that vouch for the others.
#[derive(Debug)]
pub(super) struct MemoryGroup {
    exchange: Exchange,
    step: StepId,
    connections: Connections,
    faults: LinkFaults,
    published: u64,
    beat: Beat,
}

/// Connections that end with their owner, whoever else still holds a handle.
#[derive(Debug)]
struct Connections(Vec<TcpStream>);

impl Connections {
    fn shut(&self) {
        for socket in &self.0 {
            // A connection that is closed already is as shut as it can be.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.shut();
    }
}

impl MemoryGroup {
    /// Starts watching the connections.
    pub(super) fn start(
        exchange: Exchange,
        peers: BTreeMap<usize, Socket>,
        faults: LinkFaults,
        beat: Beat,
    ) -> io::Result<MemoryGroup> {
        let handles = peers.values().map(|peer| peer.tcp().try_clone()).collect::<io::Result<Vec<_>>>()?;
        let connections = Connections(handles);
        let alarm = exchange.alarm();
        std::thread::Builder::new().name("group-watch".into()).spawn(move || watch(peers, &alarm))?;
        Ok(MemoryGroup { exchange, step: StepId(0), connections, faults, published: 0, beat })
    }

    /// What the ranks share.
    pub(super) fn bytes(&self) -> Bytes {
        Bytes(self.exchange.bytes() as u64)
    }

    /// Labels the exchanges that follow.
    pub(super) fn begin(&mut self, step: StepId) {
        self.step = step;
    }

    pub(super) fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let (exchange, label, mut attendant) = self.parts();
        exchange.all_gather(label, own, all, &mut attendant).map_err(lost)
    }

    pub(super) fn gather(
        &mut self,
        own: &[f32],
        lengths: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        let (exchange, label, mut attendant) = self.parts();
        exchange.gather(label, own, lengths, all, &mut attendant).map_err(lost)
    }

    fn parts(&mut self) -> (&mut Exchange, u64, Beside<'_>) {
        let MemoryGroup { exchange, step, connections, faults, published, beat } = self;
        (exchange, step.0, Beside { connections, faults: *faults, published, beat })
    }
}

fn lost(error: ExchangeError) -> CollectiveError {
    CollectiveError { rank: error.rank(), reason: error.to_string() }
}

/// What a rank does beside an exchange: it says that it lives, and makes the trouble it was told to make.
struct Beside<'a> {
    connections: &'a Connections,
    faults: LinkFaults,
    published: &'a mut u64,
    beat: &'a Beat,
}

impl Attendant for Beside<'_> {
    fn publishing(&mut self) -> Result<(), String> {
        *self.published += 1;
        if self.faults.delay_us > 0 {
            std::thread::sleep(Duration::from_micros(self.faults.delay_us));
        }
        if self.faults.break_after > 0 && *self.published > self.faults.break_after {
            self.connections.shut();
            return Err("connections broken on purpose (link_faults)".into());
        }
        self.waiting()
    }

    fn waiting(&mut self) -> Result<(), String> {
        self.beat.tick().map_err(|error| error.to_string())
    }
}

/// Waits for the first connection to end, and raises the alarm. The group shuts its connections when it is dropped, so that
/// this ends with it at the latest.
fn watch(mut peers: BTreeMap<usize, Socket>, alarm: &Alarm) {
    loop {
        let mut watched: Vec<PollFd<'_>> =
            peers.values().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if let Err(error) = poll(&mut watched, None)
            && error != rustix::io::Errno::INTR
        {
            let first = peers.keys().next().copied().unwrap_or_default();
            return alarm.raise(first, format!("its connection cannot be watched: {error}"));
        }
        let ready: Vec<bool> = watched.iter().map(|polled| !polled.revents().is_empty()).collect();
        drop(watched);
        for ((rank, socket), _) in peers.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            if let Some(reason) = ended(socket) {
                return alarm.raise(*rank, reason);
            }
        }
    }
}

/// Why a readable connection is of no use any more, if so.
fn ended(socket: &mut Socket) -> Option<String> {
    match socket.read(&mut [0]) {
        Ok(0) => Some("connection closed by the peer".into()),
        // Values that are sent over a connection would never be read: the ranks disagree.
        Ok(_) => Some("it exchanges over sockets, this rank through shared memory".into()),
        Err(error) => match error.kind() {
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => None,
            _ => Some(format!("connection failed: {error}")),
        },
    }
}
