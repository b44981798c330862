//! What the responses' core is told, and what it wants done. Both are closed enums.

use crate::engine::GatewayId;
use ashlar_protocol::admin::{AdminFailure, AdminReply};
use ashlar_protocol::responses::{ResponseCall, ResponseRecord};
use ashlar_protocol::serving::{ChoiceId, FromScheduler, Submit};
use ashlar_vocabulary::{RequestId, Tenant};

/// How long responses are kept, and how many.
#[derive(Debug, Clone, PartialEq)]
pub struct ResponsesConfig {
    /// Milliseconds for which a response goes on that nobody follows. In the background it is then begun anew once somebody can
    /// take it up; else it is over.
    pub resume_grace_ms: u64,
    /// Seconds after which a response that has ended is forgotten.
    pub kept_s: u64,
    /// Most responses; of those that have ended the oldest are forgotten first.
    pub max: usize,
}

/// What the core is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What the store held when the term began.
    Stored(Vec<ResponseRecord>),
    /// A gateway is connected.
    GatewayUp(GatewayId),
    /// A gateway's connection has ended.
    GatewayGone(GatewayId),
    /// A gateway wants something of the records.
    Call {
        /// Which gateway.
        gateway: GatewayId,
        /// Its call.
        call: u64,
        /// For whom; what belongs to others is not there. `None` sees everything.
        tenant: Option<Tenant>,
        /// What.
        wish: ResponseCall,
    },
    /// A gateway submits a choice that is kept.
    Submit {
        /// From now on a follower.
        gateway: GatewayId,
        /// The choice.
        submit: Box<Submit>,
    },
    /// A gateway follows a choice no longer.
    Unfollow {
        /// Which gateway.
        gateway: GatewayId,
        /// Which choice.
        id: ChoiceId,
    },
    /// What the engine says of a choice that is kept.
    Said(FromScheduler),
    /// A record has been stored or deleted, or could not be.
    Persisted {
        /// Which.
        id: RequestId,
        /// Why not.
        outcome: Result<(), String>,
    },
    /// The wall clock, in seconds since 1970.
    WallClock(u64),
    /// Time passes.
    Tick,
}

/// What the core wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// For the engine: compute this.
    Submit(Box<Submit>),
    /// For the engine: compute it no longer.
    Cancel(ChoiceId),
    /// Tell a gateway.
    ToGateway(GatewayId, FromScheduler),
    /// Answer a call.
    Reply {
        /// Whose.
        gateway: GatewayId,
        /// Which.
        call: u64,
        /// How.
        reply: Result<AdminReply, AdminFailure>,
    },
    /// Store a record, or delete it; answered by [`Event::Persisted`].
    Persist {
        /// Its name.
        id: RequestId,
        /// What it is to be.
        record: Option<ResponseRecord>,
    },
}
