//! What the engine is told, and what it wants done. Both are closed enums.

use super::budget::StageCost;
use crate::audit::{self, AuditId};
use ashlar_protocol::prefix::BlockHash;
use ashlar_protocol::serving::{ChoiceId, FromScheduler, Submit};
use ashlar_protocol::step::{StageRange, StepPlan, StepResult, StepTiming};
use ashlar_vocabulary::{
    AdapterId, BlockId, KeyId, LeaseTerm, ModelDigest, ReplicaId, ReplicaRevision, StageIndex, StepId,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Names one connection of a gateway; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GatewayId(pub u64);

impl GatewayId {
    /// No connection: who submits choices that are kept, on behalf of gateways that come and go.
    pub const KEPT: GatewayId = GatewayId(u64::MAX);
    /// No connection: who has sequences computed again to audit them, and needs no answer.
    pub const AUDITOR: GatewayId = GatewayId(u64::MAX - 1);
}

impl fmt::Display for GatewayId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The engine's limits.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// The model served; submissions for another are refused.
    pub model_digest: ModelDigest,
    /// Tokens of the model; submissions with others are refused.
    pub vocab_size: u32,
    /// Longest sequence, prompt and answer together.
    pub max_context_tokens: u32,
    /// Most sequences running on one replica.
    pub max_num_seqs: usize,
    /// Most rows in one step.
    pub max_num_batched_tokens: u32,
    /// Of a million sequences so many are audited.
    pub audit_per_million: u32,
    /// Whether computed blocks are kept for sequences that begin the same.
    pub enable_prefix_caching: bool,
    /// No stage shall take longer than this for one step, in milliseconds.
    pub step_target_ms: u64,
    /// Most sequences waiting; more are refused as overloaded.
    pub queue_max: usize,
    /// New sequences that would wait longer than this for a place are refused as overloaded, in milliseconds.
    pub queue_wait_ms_max: u64,
    /// Deadline of submissions that name none, in milliseconds.
    pub deadline_default_ms: u64,
    /// How long requests that have not begun wait for a replica when none is up, in milliseconds; afterwards they are refused.
    /// Those that have begun wait until their deadline.
    pub repair_patience_ms: u64,
}

/// What the engine is told.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A gateway submits a choice.
    Submit {
        /// Where its events go.
        gateway: GatewayId,
        /// The choice.
        submit: Box<Submit>,
    },
    /// A sequence is to be computed again, on one replica alone, without what is cached there.
    Repeat {
        /// For which audit.
        audit: AuditId,
        /// Where.
        replica: ReplicaId,
        /// All that was known of it as the prompt.
        submit: Box<Submit>,
        /// From where on digests of logits are wanted.
        logits_from: u32,
    },
    /// Percent of a replica's KV blocks that each of these keys may hold.
    KvShares(BTreeMap<KeyId, u8>),
    /// A gateway cancels a choice.
    Cancel {
        /// Only the gateway that submitted it may.
        gateway: GatewayId,
        /// The choice.
        id: ChoiceId,
    },
    /// A gateway's connection ended; its choices are cancelled.
    GatewayGone {
        /// Which.
        gateway: GatewayId,
    },
    /// A replica is ready to execute steps, none of which has been sent.
    ReplicaUp(ReplicaUp),
    /// A replica can execute nothing any more. Its sequences wait for another one, or for its return.
    ReplicaDown {
        /// Which.
        replica: ReplicaId,
        /// For the log.
        reason: String,
    },
    /// A rank of a replica has crashed: one of the sequences that it computed may have been why. Its replica is down, perhaps
    /// since a moment ago.
    ReplicaCrashed {
        /// Which.
        replica: ReplicaId,
        /// For the clients of requests that it crashed with too often.
        reason: String,
    },
    /// The last stage answers a step.
    StepResult {
        /// Which replica.
        replica: ReplicaId,
        /// The answer.
        result: StepResult,
    },
    /// Another stage has completed a step.
    StepDone {
        /// Which replica.
        replica: ReplicaId,
        /// Its layout; a former one is ignored.
        revision: ReplicaRevision,
        /// Which stage.
        stage: StageIndex,
        /// Which step.
        step: StepId,
        /// How it was spent.
        timing: StepTiming,
    },
    /// These adapters may be asked for; submissions with others are refused.
    AdaptersKnown(BTreeSet<AdapterId>),
    /// Every rank of a replica has loaded an adapter: sequences with it may run there.
    AdapterResident {
        /// Which replica.
        replica: ReplicaId,
        /// Which adapter.
        adapter: AdapterId,
    },
    /// A replica's ranks are about to forget an adapter that none of its sequences has.
    AdapterGone {
        /// Which replica.
        replica: ReplicaId,
        /// Which adapter.
        adapter: AdapterId,
    },
    /// An adapter cannot be loaded.
    AdapterFailed {
        /// On this replica.
        replica: ReplicaId,
        /// Which adapter.
        adapter: AdapterId,
        /// For the clients that wait for it.
        reason: String,
    },
    /// Why nothing can be served, or `None` if that is over; shown to clients that are refused.
    Problem {
        /// Why.
        problem: Option<String>,
        /// Whether it will not pass by itself, so that nobody shall wait.
        lasting: bool,
    },
    /// A replica takes no further sequence in, because a node of it leaves; or it does again.
    ReplicaDrains {
        /// Which.
        replica: ReplicaId,
        /// Whether.
        drains: bool,
    },
    /// From now on no submission is accepted; what is accepted goes on.
    Drain,
    /// Time passes; deadlines are due.
    Tick,
}

/// A replica that has come up.
#[derive(Debug, Clone, PartialEq)]
pub struct ReplicaUp {
    /// Which.
    pub replica: ReplicaId,
    /// The lease under which it was laid out.
    pub term: LeaseTerm,
    /// Its layout.
    pub revision: ReplicaRevision,
    /// Blocks of KV cache on every rank.
    pub kv_blocks: u32,
    /// Blocks whose content every rank has kept from a former layout.
    pub kept: Vec<(BlockId, BlockHash)>,
    /// What only some stages have lost.
    pub lost: Option<LostBlocks>,
    /// Predicted times, one per stage.
    pub stages: Vec<StageCost>,
}

/// Blocks that have to be filled again on some stages only.
#[derive(Debug, Clone, PartialEq)]
pub struct LostBlocks {
    /// The stages that have lost them.
    pub stages: StageRange,
    /// Blocks whose content all others have kept.
    pub blocks: Vec<(BlockId, BlockHash)>,
}

/// What the engine wants done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Broadcast a plan to every rank of a replica.
    SendStep {
        /// Which replica.
        replica: ReplicaId,
        /// The plan.
        plan: Box<StepPlan>,
    },
    /// Tell a gateway.
    ToGateway {
        /// Which connection.
        gateway: GatewayId,
        /// What.
        message: FromScheduler,
    },
    /// Something has become of an audited sequence.
    Audit(audit::Event),
    /// A sequence could run but for its adapter, which is not loaded there.
    WantAdapter {
        /// On this replica.
        replica: ReplicaId,
        /// Which.
        adapter: AdapterId,
    },
    /// A replica broke the protocol and must be laid out anew. Its sequences wait.
    ReplicaFault {
        /// Which.
        replica: ReplicaId,
        /// The layout in which it happened.
        revision: ReplicaRevision,
        /// What happened, for the operator.
        reason: String,
    },
}
