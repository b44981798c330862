//! What every simulated process has in common: what reaches it, and what it wants.

use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{FromScheduler, ToScheduler};
use ashlar_vocabulary::{ReplicaRevision, StepId};

/// A process of the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Process {
    Scheduler,
    Node(usize),
    Gateway(usize),
}

/// Names a connection; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Connection(pub(crate) u64);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Node to scheduler.
    Control,
    /// Gateway to scheduler.
    Serving,
    /// Rank to rank, within one layout.
    Link(ReplicaRevision, LinkPurpose),
}

/// Whatever travels.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    FromNode(FromNode),
    ToNode(ToNode),
    ToScheduler(ToScheduler),
    FromScheduler(FromScheduler),
    Hello(LinkHello),
    Activations(Activations),
    HeadRows(Activations),
    Logits(Logits),
}

/// Rows of one step: on the way to the next stage, or to the ranks that hold slices of the head.
#[derive(Debug, Clone)]
pub(crate) struct Activations {
    pub(crate) revision: ReplicaRevision,
    pub(crate) step: StepId,
    pub(crate) rows: Vec<u64>,
}

/// One slice of the logits of the rows of one step.
#[derive(Debug, Clone)]
pub(crate) struct Logits {
    pub(crate) revision: ReplicaRevision,
    pub(crate) step: StepId,
    pub(crate) slice: Vec<u64>,
}

/// What a process wakes up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    /// The process has just started.
    Start,
    /// The scheduler's clock.
    Tick,
    /// A node's sign of life.
    Beat,
    /// Try to reach the scheduler again.
    Reconnect,
    /// A node's weights are in place.
    Loaded(ReplicaRevision),
    /// A node has computed a step.
    Computed(ReplicaRevision, StepId),
    /// A client sends its request.
    Arrival(usize),
    /// A client goes away.
    Departure(usize),
}

/// What reaches a process.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Timer(Timer),
    Opened { connection: Connection, purpose: Purpose, initiator: bool },
    Refused(Purpose),
    Message(Connection, Message),
    Closed(Connection),
}

/// What a process wants.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    Connect {
        to: Process,
        purpose: Purpose,
    },
    Send(Connection, Message),
    Close(Connection),
    Wake {
        after_us: u64,
        timer: Timer,
    },
    /// The process ends and is started again by its supervisor.
    Restart,
}
