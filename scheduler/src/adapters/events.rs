//! What the adapters' core is told, and what it wants done. Both are closed enums.

use crate::cluster::NodeConnection;
use crate::engine::GatewayId;
use crate::time::Millis;
use ashlar_protocol::admin::{AdapterView, AdminReply, LoadAdapter};
use ashlar_protocol::membership::AdapterRefusal;
use ashlar_vocabulary::{AdapterId, Bytes, ReplicaId, ReplicaRevision};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// How many adapters ranks hold at once.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptersConfig {
    /// Most adapters in a rank's memory; others are registered, and loaded when a request for them comes.
    pub max_adapters: usize,
    /// Most memory of a rank that adapters take.
    pub memory: Bytes,
}

/// Whom a change is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Caller {
    /// A gateway.
    Gateway {
        /// Its connection.
        gateway: GatewayId,
        /// Its call.
        call: u64,
    },
    /// A fine-tuning job, by the number of its wish.
    Job(u64),
}

/// What a name stands for and has stood for, as it is stored. The last generation that is not held back is served.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdapterRecord {
    /// Oldest first, never empty; only the latest few are kept, and what is served.
    pub generations: Vec<AdapterView>,
    /// Those that were never served: they are there to be.
    #[serde(default)]
    pub held_back: BTreeSet<u64>,
}

/// What the core is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What the store held when the term began.
    Stored(Vec<(String, AdapterRecord)>),
    /// Serve an adapter, or store one to be served later.
    Load(Caller, LoadAdapter),
    /// Serve it no longer.
    Unload {
        /// Who asks.
        caller: Caller,
        /// The name.
        name: String,
        /// Refused where another generation is served.
        expected_generation: Option<u64>,
    },
    /// Serve an earlier generation again, or one that was held back for the first time.
    RollBack {
        /// Who asks.
        caller: Caller,
        /// The name.
        name: String,
        /// Whose adapter.
        to_generation: u64,
        /// Refused where another generation is served.
        expected_generation: Option<u64>,
    },
    /// A replica serves. It has no adapters.
    ReplicaUp {
        /// Which.
        replica: ReplicaId,
        /// Its layout.
        revision: ReplicaRevision,
        /// Its ranks.
        ranks: Vec<NodeConnection>,
    },
    /// A replica serves no longer.
    ReplicaDown {
        /// Which.
        replica: ReplicaId,
    },
    /// A rank has loaded its share of an adapter, or cannot.
    Answer {
        /// Which rank.
        connection: NodeConnection,
        /// In which layout.
        revision: ReplicaRevision,
        /// The adapter.
        adapter: AdapterId,
        /// The number of the load that it answers.
        load: u64,
        /// What it takes, or why not.
        outcome: Result<Bytes, AdapterRefusal>,
    },
    /// A sequence waits for an adapter.
    Wanted {
        /// On this replica.
        replica: ReplicaId,
        /// Which.
        adapter: AdapterId,
    },
    /// A change of a name's record has been stored, or could not be.
    Persisted {
        /// The name.
        name: String,
        /// Why not.
        outcome: Result<(), String>,
    },
    /// Time passes.
    Tick,
}

/// What the core wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Have ranks load their shares.
    Load {
        /// On this replica.
        replica: ReplicaId,
        /// Its ranks.
        ranks: Vec<NodeConnection>,
        /// Its layout.
        revision: ReplicaRevision,
        /// The adapter.
        adapter: AdapterId,
        /// The number of this load, never used again in this term.
        load: u64,
    },
    /// Have ranks forget an adapter, after every step sent so far.
    Unload {
        /// The ranks of one replica.
        ranks: Vec<NodeConnection>,
        /// The adapter.
        adapter: AdapterId,
    },
    /// For the engine: sequences with the adapter may run there.
    Resident {
        /// On this replica.
        replica: ReplicaId,
        /// Which.
        adapter: AdapterId,
    },
    /// For the engine: no longer. To be told before ranks are.
    Gone {
        /// On this replica.
        replica: ReplicaId,
        /// Which.
        adapter: AdapterId,
    },
    /// For the engine: sequences wait for it in vain.
    Failed {
        /// On this replica.
        replica: ReplicaId,
        /// Which.
        adapter: AdapterId,
        /// Why.
        reason: String,
    },
    /// For the engine: these may be asked for.
    Known(BTreeSet<AdapterId>),
    /// Store a name's record, or delete it; answered by [`Event::Persisted`].
    Persist {
        /// The name.
        name: String,
        /// What it is to be.
        record: Option<AdapterRecord>,
    },
    /// What is served has changed: gateways are to hear of it before the caller does.
    Published,
    /// Answer a call.
    Reply(Caller, AdminReply),
}

/// What the engine does with an adapter on a replica.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Whether a sequence that the replica's ranks know has it.
    pub bound: bool,
    /// Whether any sequence at all has it.
    pub wanted: bool,
    /// When a sequence with it last began or ended there.
    pub last: Millis,
}

/// Who knows what adapters are used for, the engine, and what else has been promised of the room that they take.
pub trait Users {
    /// What is done with `adapter` on `replica`.
    fn usage(&self, replica: ReplicaId, adapter: AdapterId) -> Usage;

    /// What sessions of fine-tuning jobs leave to adapters on the fullest rank of `replica`; `None` where no session has
    /// reserved anything, which is all that whoever knows of no jobs can say.
    fn beside_jobs(&self, _replica: ReplicaId) -> Option<Bytes> {
        None
    }
}
