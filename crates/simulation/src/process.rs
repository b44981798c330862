//! What every simulated process has in common: what reaches it, and what it wants.

use crate::durable::{Answer, Refusal, Wish};
use crate::session::Payload;
use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{FromScheduler, ToScheduler};
use ashlar_vocabulary::{AdapterId, JobId, ReplicaRevision, SessionId, StepId};

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

/// What somebody wants something of the store or the blobs for; the answer comes back with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Errand {
    /// The scheduler's records, in order.
    Archive,
    /// The scheduler's work on blobs, in order.
    Keeper,
    /// What is served, when a term begins.
    Names,
    /// The record of this name.
    Name(String),
    /// A rank's share of an adapter, under the number of its load.
    Adapter(ReplicaRevision, AdapterId, u64),
    /// A shard that a session starts from.
    Share(SessionId, usize),
    /// A rank's piece of the next state.
    Piece(SessionId),
    /// A shard that a session exports.
    Gather(SessionId, usize),
    /// A file of what it exports; the last one is the manifest.
    File(SessionId, u64),
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
    Training(Payload),
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
    /// How many slices there are.
    pub(crate) of: usize,
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
    /// A gateway finds out whether the scheduler still says something.
    Listen,
    /// A node's weights are in place.
    Loaded(ReplicaRevision),
    /// A node has computed a step.
    Computed(ReplicaRevision, StepId),
    /// A client sends its request.
    Arrival(usize),
    /// A client goes away.
    Departure(usize),
    /// The scheduler asks again what is served.
    Names,
    /// The scheduler writes its records again.
    Archive,
    /// The scheduler goes on with its work on blobs.
    Keeper,
    /// A session has computed something.
    Trained(SessionId),
    /// A session whose links do not stand is given up.
    Unlinked(SessionId),
    /// A session that another rank has left is given up.
    Orphaned(SessionId),
    /// The owner of a job wants something.
    Plan(usize),
    /// A gateway has validated a job's files.
    Prepared(JobId),
    /// A node is asked to end, and is started again so many microseconds after that.
    Asked(u64),
    /// A node that was asked to end has waited long enough.
    Impatient,
    /// A node has a slice in memory that it was told to prepare.
    Sliced(ReplicaRevision),
}

/// What reaches a process.
#[derive(Debug, Clone)]
pub(crate) enum Input {
    Timer(Timer),
    Opened {
        connection: Connection,
        purpose: Purpose,
        initiator: bool,
    },
    Refused(Purpose),
    Message(Connection, Message),
    Closed(Connection),
    /// The store has answered, or its caller has given up.
    Answered(Errand, Result<Answer, Refusal>),
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
    /// The process ends as it was asked to, and is started again after so long.
    Exit {
        for_us: u64,
    },
    /// Something of the store or the blobs.
    Call(Errand, Wish),
    /// For the trace.
    Note(String),
}
