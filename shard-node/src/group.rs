//! The tensor-parallel group as this rank sees it: one exchange, two ways for it to travel.
//!
//! * [`agreement`]: which way all ranks take; decided by rank 0, once per layout.
//! * `memory`: through memory that the ranks share, on one host.
//! * `sockets`: over the group's connections, pair by pair.
//!
//! Either way contributions are only moved: sums are made by the caller, in the same order.

pub mod agreement;
mod memory;
mod sockets;

use crate::beat::Beat;
use crate::links::LinkSettings;
use agreement::Agreed;
use ashlar_model::{Collective, CollectiveError};
use ashlar_shared_memory::Exchange;
use ashlar_vocabulary::{Bytes, ReplicaRevision, StepId};
use memory::MemoryGroup;
use sockets::SocketGroup;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

/// This rank's end of the group.
#[derive(Debug)]
pub struct Group {
    rank: usize,
    size: usize,
    way: Way,
    why_sockets: Option<String>,
    spent: Duration,
}

#[derive(Debug)]
enum Way {
    Memory(MemoryGroup),
    Sockets(SocketGroup),
}

/// How a group exchanges, in words for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupTransport {
    /// Through memory that its ranks share.
    SharedMemory {
        /// Ranks in the group.
        ranks: usize,
    },
    /// Over connections.
    Sockets {
        /// Ranks in the group.
        ranks: usize,
        /// Why not through memory.
        reason: String,
    },
}

impl fmt::Display for GroupTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupTransport::SharedMemory { ranks } => {
                write!(f, "the {ranks} ranks of the group exchange through shared memory")
            }
            GroupTransport::Sockets { ranks, reason } => {
                write!(f, "the {ranks} ranks of the group exchange over sockets: {reason}")
            }
        }
    }
}

impl Group {
    /// The group as agreed upon.
    pub(crate) fn new(
        rank: usize,
        revision: ReplicaRevision,
        agreed: Agreed,
        settings: LinkSettings,
        beat: Beat,
    ) -> io::Result<Group> {
        let (size, faults) = (agreed.peers.len() + 1, settings.faults);
        let exchange = agreed.memory.map(|memory| Exchange::new(memory, settings.spin));
        let (way, why_sockets) = match exchange {
            Ok(exchange) => (Way::Memory(MemoryGroup::start(exchange, agreed.peers, faults, beat)?), None),
            Err(reason) => {
                let sockets = SocketGroup::new(rank, revision, agreed.peers, faults, beat)?;
                (Way::Sockets(sockets), Some(reason))
            }
        };
        Ok(Group { rank, size, way, why_sockets, spent: Duration::ZERO })
    }

    /// How it exchanges; `None` where a rank is alone and does not.
    pub fn transport(&self) -> Option<GroupTransport> {
        let ranks = self.size;
        (ranks > 1).then(|| match &self.why_sockets {
            None => GroupTransport::SharedMemory { ranks },
            Some(reason) => GroupTransport::Sockets { ranks, reason: reason.clone() },
        })
    }

    /// Memory that it reserves: what its ranks share is counted on rank 0, which has made it.
    pub fn bytes(&self) -> Bytes {
        match &self.way {
            Way::Memory(memory) if self.rank == 0 => memory.bytes(),
            Way::Memory(_) | Way::Sockets(_) => Bytes(0),
        }
    }

    /// Starts counting exchanges for `step`.
    pub fn begin(&mut self, step: StepId) {
        self.spent = Duration::ZERO;
        match &mut self.way {
            Way::Memory(memory) => memory.begin(step),
            Way::Sockets(sockets) => sockets.begin(step),
        }
    }

    /// Time spent exchanging since [`Group::begin`].
    pub fn spent(&self) -> Duration {
        self.spent
    }
}

impl Collective for Group {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        let started = Instant::now();
        let done = match &mut self.way {
            Way::Memory(memory) => memory.all_gather(own, all),
            Way::Sockets(sockets) => sockets.all_gather(own, all),
        };
        self.spent += started.elapsed();
        done
    }

    fn gather(&mut self, own: &[f32], lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        let started = Instant::now();
        let done = match &mut self.way {
            Way::Memory(memory) => memory.gather(own, lengths, all),
            Way::Sockets(sockets) => sockets.gather(own, lengths, all),
        };
        self.spent += started.elapsed();
        done
    }
}
