//! The data plane between scheduler and ranks: step plans out, step results back.
//!
//! A plan is broadcast to every rank of a replica as a *delta*: a sequence's prompt and sampling travel once, afterwards
//! only the tokens appended since, the blocks added and the range of positions to compute. Ranks execute steps strictly
//! in order; that order alone makes it safe to reuse a freed block in a later step.

use crate::prefix::BlockHash;
use crate::serving::FailureKind;
use ashlar_vocabulary::{
    AdapterId, BlockId, LeaseTerm, ReplicaRevision, SamplingParams, SequenceId, StageIndex, StepId, TokenId,
    TokenLogprobs,
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// One step of one replica: what each rank computes, in this order of rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepPlan {
    /// The scheduler's lease.
    pub term: LeaseTerm,
    /// The layout this plan is for.
    pub revision: ReplicaRevision,
    /// Consecutive within a revision, from 1.
    pub step: StepId,
    /// Sequences that ranks do not know yet.
    pub new_sequences: Vec<NewSequence>,
    /// What to compute. Applied after `new_sequences`; at most one slice per sequence.
    pub slices: Vec<SequenceSlice>,
    /// Sequences whose state may be dropped *before* this step (ended, cancelled). Blocks were freed by the scheduler.
    pub ended_sequences: Vec<SequenceId>,
    /// What some stages have lost and compute again in this step, after `slices`.
    pub refill: Option<Refill>,
}

/// Rows that only some stages compute, because all others still have what they would write. The stage before the first of them
/// sends what its boundary log has of these rows. Nothing is sampled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refill {
    /// The stages that compute.
    pub stages: StageRange,
    /// What: of sequences that have no other slice in this step.
    pub slices: Vec<SequenceSlice>,
}

/// Consecutive stages of a replica, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StageRange {
    /// The first.
    pub first: StageIndex,
    /// The last.
    pub last: StageIndex,
}

impl StageRange {
    /// Whether `stage` is one of them.
    pub fn contains(self, stage: StageIndex) -> bool {
        (self.first.0..=self.last.0).contains(&stage.0)
    }
}

/// Everything a rank needs to know once about a sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewSequence {
    /// Its name in later deltas; never reused.
    pub id: SequenceId,
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// Tokens generated before (a replay): forced, never re-sampled.
    pub generated: Vec<TokenId>,
    /// The adapter that changes the model; every rank has loaded it.
    pub adapter: Option<AdapterId>,
    /// What the names of its KV blocks begin after.
    pub root: BlockHash,
    /// How to sample its continuation.
    pub sampling: SamplingParams,
    /// W3C trace context of the request, if it is traced.
    pub traceparent: Option<String>,
    /// Whether it is audited: ranks then tell [digests](RowDigests) of its rows, and of its logits from this position on.
    pub audit_logits_from: Option<u32>,
}

/// The work of one sequence in a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceSlice {
    /// Which sequence.
    pub id: SequenceId,
    /// Tokens that continue the sequence's known tokens (usually the one sampled last); applied first. The sampler's
    /// penalties and the grammar advance by these.
    pub append: Vec<TokenId>,
    /// Forget the block table first (after a preemption).
    pub reset_blocks: bool,
    /// Appended to the block table.
    pub new_blocks: Vec<BlockId>,
    /// First position to compute.
    pub start: u32,
    /// How many positions to compute, ≥ 1.
    pub count: u32,
    /// Whether the last computed position is the last known token and its successor shall be sampled.
    pub sample: bool,
}

/// Where rows are looked at for an audit: by the numeric contract they have the same bits there, whatever the layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Boundary {
    /// After so many layers of the model.
    Layers(u32),
    /// What the head makes of them.
    Logits,
}

impl fmt::Display for Boundary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Boundary::Layers(layers) => write!(f, "the rows after layer {layers}"),
            Boundary::Logits => f.write_str("the logits"),
        }
    }
}

/// Digests of rows of one audited sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowDigests {
    /// Which sequence.
    pub id: SequenceId,
    /// Where.
    pub boundary: Boundary,
    /// Position of the first row.
    pub start: u32,
    /// One per consecutive position.
    pub digests: Vec<u64>,
}

/// What the last stage answers for one step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepResult {
    /// Copied from the plan.
    pub term: LeaseTerm,
    /// Copied from the plan.
    pub revision: ReplicaRevision,
    /// Copied from the plan.
    pub step: StepId,
    /// One per slice with `sample` that did not fail.
    pub sampled: Vec<SampledToken>,
    /// Log-probabilities of prompt tokens computed in this step, where asked for.
    pub prompt_logprobs: Vec<PromptLogprobs>,
    /// Sequences that failed alone; the others are unaffected.
    pub failed: Vec<FailedSequence>,
    /// How the answering rank spent this step.
    pub timing: StepTiming,
}

/// A sampled token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SampledToken {
    /// Which sequence.
    pub id: SequenceId,
    /// The token's position in the sequence (prompt length for the first generated token).
    pub position: u32,
    /// The token.
    pub token: TokenId,
    /// Where asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// The answer was complete before this token, which is an end of sequence: nothing else was admitted.
    pub grammar_complete: bool,
}

/// Log-probabilities of consecutive prompt tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptLogprobs {
    /// Which sequence.
    pub id: SequenceId,
    /// Position of the first token described (≥ 1: position 0 has no distribution).
    pub position: u32,
    /// One per position.
    pub logprobs: Vec<TokenLogprobs>,
}

/// A sequence that cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedSequence {
    /// Which sequence.
    pub id: SequenceId,
    /// Whether the request cannot be followed or this cluster is at fault.
    pub kind: FailureKind,
    /// Why; shown to the client.
    pub message: String,
}

/// How a rank spent one step, in microseconds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTiming {
    /// Computing.
    pub compute_us: u64,
    /// Waiting for activations of the previous stage (or for work).
    pub wait_us: u64,
    /// Exchanging within the tensor-parallel group, and for a spread head: waiting for slices of the logits included.
    pub collective_us: u64,
    /// Sending activations on.
    pub send_us: u64,
    /// Bytes of activations sent on.
    pub sent_bytes: u64,
}

impl StepTiming {
    /// Adds what another step, or another stage, took.
    pub fn add(&mut self, other: &StepTiming) {
        self.compute_us += other.compute_us;
        self.wait_us += other.wait_us;
        self.collective_us += other.collective_us;
        self.send_us += other.send_us;
        self.sent_bytes += other.sent_bytes;
    }
}
