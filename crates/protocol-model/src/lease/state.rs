//! What the processes and the store know, and what travels between them.

use ashlar_gateway::scheduler_client::Terms;
use ashlar_shard_node::sequencer::Sequencer;
use ashlar_vocabulary::{LeaseTerm, ReplicaRevision, StepId};
use std::collections::VecDeque;

/// A life of a scheduler's process: `4 × process + life`. Its name is what ranks see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Holder(pub(super) u8);

impl Holder {
    /// Nobody's.
    pub(super) const NOBODY: Holder = Holder(255);

    pub(super) fn of(scheduler: usize, life: u8) -> Holder {
        Holder(scheduler as u8 * 4 + life % 4)
    }

    /// As it stands in assignments and fences.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 8] = ["a", "a'", "a''", "a'''", "b", "b'", "b''", "b'''"];
        NAMES.get(usize::from(self.0)).copied().unwrap_or("")
    }
}

/// A term and whose it is.
pub type Reign = (LeaseTerm, Holder);

/// The lease as the store has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Store {
    pub(super) last: Reign,
    /// Whether it has not run out.
    pub(super) held: bool,
    /// Before the latest grant: what a fail-over may go back to.
    pub(super) before: Reign,
}

/// A process that wants to lead.
#[derive(Debug, Clone, Hash)]
pub(super) struct Scheduler {
    pub(super) holder: Holder,
    pub(super) lives: u8,
    /// What it asks for at least, having been refused.
    pub(super) min_term: LeaseTerm,
    /// The highest term under which this process has led.
    pub(super) led: LeaseTerm,
    pub(super) paused: bool,
    pub(super) leads: Option<Leader>,
}

/// A term of leading.
#[derive(Debug, Clone, Hash)]
pub(super) struct Leader {
    pub(super) term: LeaseTerm,
    pub(super) revisions: u64,
    /// Ranks that have joined, as bits.
    pub(super) joined: u8,
    pub(super) replica: Replica,
}

/// Where the leader believes the replica to be.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Replica {
    Vacant,
    /// Assigned; these ranks, as bits, have said that they are ready.
    Loading(u8),
    /// It serves: steps sent, steps answered.
    Up(u64, u64),
}

/// Scheduler to rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToRank {
    /// Take your place.
    Assign(LeaseTerm, Holder, ReplicaRevision),
    /// The connection has ended: give your place up. Said by the rank's own shell.
    Release,
    /// Compute.
    Step(LeaseTerm, ReplicaRevision, StepId),
}

/// Rank to scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FromRank {
    /// The first message, with the term that the process began with.
    Join(LeaseTerm),
    /// Weights and links are there.
    Ready(ReplicaRevision),
    /// It obeys this term.
    Refused(LeaseTerm),
    /// The layout is of no use.
    Failed(ReplicaRevision),
    /// The last rank has computed a step. The holder is not in the message: it is what the message must not hide.
    Result(LeaseTerm, ReplicaRevision, StepId, Holder),
}

/// A rank: what is on its disk, its process, and the queues to and from it.
#[derive(Debug, Clone, Hash)]
pub(super) struct Rank {
    /// On disk.
    pub(super) durable: Reign,
    pub(super) accepted: Reign,
    /// The term that it joins with: of when its process began.
    pub(super) joins_with: LeaseTerm,
    pub(super) scheduler: Option<u8>,
    pub(super) inbox: VecDeque<ToRank>,
    pub(super) outbox: VecDeque<FromRank>,
    pub(super) place: Option<Place>,
    pub(super) sequencer: Sequencer,
}

/// A rank's place in a layout.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) reign: Reign,
    pub(super) revision: ReplicaRevision,
    pub(super) links: Links,
    /// Steps whose rows have come from the rank before, and for whom that works: which the rows do not say.
    pub(super) rows: VecDeque<(StepId, Reign)>,
}

impl Place {
    pub(super) fn has_rows_of(&self, step: StepId) -> bool {
        self.rows.iter().any(|(rows, _)| *rows == step)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Links {
    Pending,
    Up,
    /// Another rank has left; this one has not noticed.
    Broken,
}

/// A gateway.
#[derive(Debug, Clone, Hash)]
pub(super) struct Gateway {
    pub(super) terms: Terms,
    pub(super) scheduler: Option<u8>,
}

/// A copy of a message that turns up later, to or from this rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Stray {
    ToRank(usize, ToRank),
    FromRank(usize, FromRank),
}

/// Everything.
#[derive(Debug, Clone, Hash)]
pub struct State {
    pub(super) store: Store,
    pub(super) schedulers: [Scheduler; 2],
    pub(super) ranks: Vec<Rank>,
    pub(super) gateway: Gateway,
    pub(super) stray: Option<Stray>,
    /// Faults that may still happen.
    pub(super) faults: u8,
    /// Whether the store may still forget.
    pub(super) remembers: bool,
    /// Who completed the latest step.
    pub(super) completed: Reign,
    /// What has happened that must not.
    pub(super) wrong: Option<&'static str>,
}
