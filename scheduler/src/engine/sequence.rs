//! One continuation of one prompt, from its submission to its end, with the state it is in.

use super::events::GatewayId;
use super::prefix_cache::{BLOCK_TOKENS, BlockHash, PrefixChain, blocks_for};
use super::queue::Order;
use crate::time::Millis;
use ashlar_protocol::serving::{Receipt, RequestState, RequestView, Submit};
use ashlar_protocol::step::StepTiming;
use ashlar_vocabulary::{BlockId, KeyId, ModelDigest, ReplicaId, SequenceId, StepId, TokenId};

/// A sequence with which so many replicas crashed in a row, without a token in between, is computed alone.
const CRASHES_SUSPECT: u32 = 1;
/// With so many, it is not tried again.
pub const CRASHES_MAX: u32 = 2;

/// A sequence that has not ended. (One that has is dropped; ranks are told.)
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Its name towards the ranks.
    pub id: SequenceId,
    /// Where its events go.
    pub gateway: GatewayId,
    /// What was asked for.
    pub submit: Box<Submit>,
    /// Tokens generated so far, forced ones included.
    pub generated: Vec<TokenId>,
    /// Rank among all sequences.
    pub order: Order,
    /// When it fails.
    pub deadline: Millis,
    /// Hashes of its full blocks.
    pub chain: PrefixChain,
    /// Where it stands.
    pub state: State,
    /// What its receipt will say.
    pub history: History,
    /// How the stages spent the steps that it was in.
    pub stages: Vec<StepTiming>,
    /// First prompt position whose log-probabilities have not been delivered.
    pub prompt_logprobs_from: u32,
    /// The replica that was lost while it computed this, since its last token: should it turn out to have crashed.
    pub lost_with: Option<ReplicaId>,
    /// Replicas that crashed while they computed it, since its last token.
    pub crashes: u32,
    /// Whether it is audited, and as what.
    pub audit: Option<Audited>,
}

/// What an audited sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audited {
    /// Digests of logits are wanted from this position on.
    pub logits_from: u32,
    /// The replica on which it repeats another one, for that one's audit; without it, it is a client's.
    pub only_on: Option<ReplicaId>,
}

/// Where a sequence stands.
#[derive(Debug, Clone)]
pub enum State {
    /// No rank knows it: it is new, or its replica was lost.
    Waiting,
    /// It holds blocks of a replica and is computed.
    Running(Running),
    /// It gave its blocks back and waits for others; the ranks still know its tokens.
    Preempted(Preempted),
}

/// A sequence on a replica.
#[derive(Debug, Clone)]
pub struct Running {
    /// Which replica.
    pub replica: ReplicaId,
    /// Its block table.
    pub blocks: Vec<BlockId>,
    /// How many of these the ranks have been told.
    pub blocks_told: usize,
    /// How many of these are hittable by others, as far as it is up to this sequence.
    pub blocks_registered: usize,
    /// Positions whose computation has been sent; their KV entries exist for every later step.
    pub computed: usize,
    /// Positions that most stages have kept from a former layout: what of them is not computed yet is filled again by the others.
    pub kept: usize,
    /// Tokens that the ranks know; `None` until the sequence has been introduced to them.
    pub told: Option<usize>,
    /// The ranks must forget its former block table.
    pub reset_blocks: bool,
    /// The step in flight that samples its next token.
    pub sampling: Option<StepId>,
    /// The step that last had a slice of it.
    pub last_step: StepId,
}

/// A sequence that was taken from a replica, to be recomputed there.
#[derive(Debug, Clone)]
pub struct Preempted {
    /// Which replica; its ranks know the sequence.
    pub replica: ReplicaId,
    /// Tokens that the ranks know.
    pub told: Option<usize>,
    /// A step in flight from before the preemption that samples its next token.
    pub sampling: Option<StepId>,
}

/// Moments and counts of a sequence's life.
#[derive(Debug, Default, Clone, Copy)]
pub struct History {
    /// Submitted.
    pub arrival: Millis,
    /// First slice sent.
    pub first_step: Option<Millis>,
    /// First token of ours received.
    pub first_token: Option<Millis>,
    /// Prompt tokens found in the prefix cache when first admitted.
    pub cached_tokens: u32,
    /// Times it was preempted.
    pub preemptions: u32,
    /// Times its replica was lost.
    pub replays: u32,
}

impl Sequence {
    /// A new sequence, waiting.
    pub fn new(
        id: SequenceId,
        gateway: GatewayId,
        submit: Box<Submit>,
        order: Order,
        (now, deadline): (Millis, Millis),
        model: &ModelDigest,
    ) -> Sequence {
        let mut sequence = Sequence {
            id,
            gateway,
            generated: submit.forced.clone(),
            order,
            deadline,
            chain: PrefixChain::new(BlockHash::root(model, submit.adapter, submit.tenant_salt)),
            state: State::Waiting,
            history: History { arrival: now, ..History::default() },
            stages: Vec::new(),
            prompt_logprobs_from: 0,
            lost_with: None,
            crashes: 0,
            audit: None,
            submit,
        };
        sequence.extend_chain();
        sequence
    }

    /// Known tokens: prompt and generated.
    pub fn len(&self) -> usize {
        self.submit.prompt.len() + self.generated.len()
    }

    /// Never: a sequence has at least one prompt token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The token at `position`.
    pub fn token(&self, position: usize) -> TokenId {
        let prompt = &self.submit.prompt;
        let generated = position.checked_sub(prompt.len()).and_then(|at| self.generated.get(at));
        prompt.get(position).or(generated).copied().unwrap_or_default()
    }

    /// Known tokens from `start` on.
    pub fn tokens_from(&self, start: usize) -> Vec<TokenId> {
        (start..self.len()).map(|position| self.token(position)).collect()
    }

    /// Most blocks that may come from the prefix cache: the last known token is always computed, and so is every
    /// prompt token whose log-probabilities are still owed, and all of what repeats another sequence.
    pub fn hittable_blocks(&self) -> usize {
        let owed = self.submit.sampling.prompt_logprobs
            && (self.prompt_logprobs_from as usize) < self.submit.prompt.len();
        if owed || self.only_on().is_some() { 0 } else { (self.len() - 1) / BLOCK_TOKENS }
    }

    /// The key on whose account it is.
    pub fn key(&self) -> Option<KeyId> {
        self.submit.charge.map(|charge| charge.key)
    }

    /// KV blocks that it holds at most.
    pub fn blocks_at_end(&self) -> usize {
        blocks_for(self.submit.prompt.len() + self.submit.max_new_tokens as usize)
    }

    /// The one replica that is to compute it, if it repeats another sequence.
    pub fn only_on(&self) -> Option<ReplicaId> {
        self.audit.and_then(|audit| audit.only_on)
    }

    /// Its running state, if it runs.
    pub fn running(&self) -> Option<&Running> {
        match &self.state {
            State::Running(running) => Some(running),
            State::Waiting | State::Preempted(_) => None,
        }
    }

    /// Its running state, if it runs.
    pub fn running_mut(&mut self) -> Option<&mut Running> {
        match &mut self.state {
            State::Running(running) => Some(running),
            State::Waiting | State::Preempted(_) => None,
        }
    }

    /// Known tokens whose computation has not been sent; 0 unless it runs.
    pub fn remaining(&self) -> usize {
        self.running().map_or(0, |running| self.len() - running.computed)
    }

    /// Whether what it needs next is lost on some stages only.
    pub fn refills(&self) -> bool {
        self.running().is_some_and(|running| running.computed < running.kept)
    }

    /// The replica that it is bound to.
    pub fn replica(&self) -> Option<ReplicaId> {
        match &self.state {
            State::Waiting => None,
            State::Running(running) => Some(running.replica),
            State::Preempted(preempted) => Some(preempted.replica),
        }
    }

    /// The step in flight that samples its next token.
    pub fn sampling(&self) -> Option<StepId> {
        match &self.state {
            State::Waiting => None,
            State::Running(running) => running.sampling,
            State::Preempted(preempted) => preempted.sampling,
        }
    }

    /// Whether any rank has been told of it.
    pub fn introduced(&self) -> bool {
        match &self.state {
            State::Waiting => false,
            State::Running(running) => running.told.is_some(),
            State::Preempted(preempted) => preempted.told.is_some(),
        }
    }

    /// Waiting or preempted → running on `replica`, where `blocks` are its own and hold its first `computed` tokens
    /// already; most stages have its first `kept`. A sequence that runs, or whose next token is being sampled, is left as it is; the answer says which.
    pub fn admit(
        &mut self,
        replica: ReplicaId,
        blocks: Vec<BlockId>,
        (computed, kept): (usize, usize),
    ) -> bool {
        let (told, reset_blocks) = match &self.state {
            State::Waiting => (None, false),
            State::Preempted(Preempted { told, sampling: None, .. }) => (*told, true),
            State::Preempted(_) | State::Running(_) => return false,
        };
        self.state = State::Running(Running {
            replica,
            blocks,
            blocks_told: 0,
            blocks_registered: computed / BLOCK_TOKENS,
            computed,
            kept,
            told,
            reset_blocks,
            sampling: None,
            last_step: StepId(0),
        });
        true
    }

    /// Running → preempted. Returns the blocks that it held.
    pub fn preempt(&mut self) -> Vec<BlockId> {
        let Some(running) = self.running_mut() else { return Vec::new() };
        let blocks = std::mem::take(&mut running.blocks);
        let (replica, told, sampling) = (running.replica, running.told, running.sampling);
        self.state = State::Preempted(Preempted { replica, told, sampling });
        self.history.preemptions += 1;
        blocks
    }

    /// Running or preempted → waiting: its replica is lost, and with it what was computed. What is known of it stays.
    /// `computing` says whether the replica was computing it.
    pub fn lose_replica(&mut self, computing: bool) {
        self.lost_with = self.replica().filter(|_| computing);
        self.state = State::Waiting;
        self.history.replays += 1;
    }

    /// Whether it may be why its replicas crashed, so that nothing else shall be computed beside it.
    pub fn is_suspect(&self) -> bool {
        self.crashes >= CRASHES_SUSPECT
    }

    /// Ends the sampling of `step`; the answer says whether it was in flight. To be called once per sampled token, so
    /// that a token that comes twice counts once.
    pub fn end_sampling(&mut self, step: StepId) -> bool {
        let sampling = match &mut self.state {
            State::Waiting => return false,
            State::Running(running) => &mut running.sampling,
            State::Preempted(preempted) => &mut preempted.sampling,
        };
        let expected = *sampling == Some(step);
        if expected {
            *sampling = None;
        }
        expected
    }

    /// Appends a sampled token.
    pub fn push(&mut self, token: TokenId, now: Millis) {
        self.generated.push(token);
        (self.lost_with, self.crashes) = (None, 0);
        self.history.first_token.get_or_insert(now);
        self.extend_chain();
    }

    /// Where its time went.
    pub fn receipt(&self, now: Millis) -> Receipt {
        let history = &self.history;
        let first_step = history.first_step.unwrap_or(now);
        let first_token = history.first_token.unwrap_or(now);
        Receipt {
            prompt_tokens: self.submit.prompt.len() as u32,
            cached_tokens: history.cached_tokens,
            generated_tokens: self.generated.len() as u32,
            queue_ms: self.queue_ms(now),
            prefill_ms: first_token.since(first_step),
            decode_ms: now.since(first_token),
            preemptions: history.preemptions,
            replays: history.replays,
            stages: self.stages.clone(),
        }
    }

    /// How long it waited before its first step, or has waited until now.
    pub fn queue_ms(&self, now: Millis) -> u64 {
        self.history.first_step.unwrap_or(now).since(self.history.arrival)
    }

    /// What others may know of it.
    pub fn view(&self, now: Millis) -> RequestView {
        let computed = self.running().map_or(0, |running| running.computed);
        let state = match &self.state {
            State::Waiting => RequestState::Waiting,
            State::Preempted(_) => RequestState::Preempted,
            State::Running(_) if self.generated.is_empty() => RequestState::Prefill,
            State::Running(_) => RequestState::Decode,
        };
        RequestView {
            id: self.submit.id,
            adapter: self.submit.adapter,
            state,
            replica: self.replica(),
            prompt_tokens: self.submit.prompt.len() as u32,
            computed_tokens: computed as u32,
            generated_tokens: self.generated.len() as u32,
            age_ms: now.since(self.history.arrival),
            queue_ms: self.queue_ms(now),
        }
    }

    fn extend_chain(&mut self) {
        let (prompt, generated) = (&self.submit.prompt, &self.generated);
        let token_at = |position: usize| {
            let later = position.checked_sub(prompt.len()).and_then(|at| generated.get(at));
            prompt.get(position).or(later).copied().unwrap_or_default()
        };
        self.chain.extend(prompt.len() + generated.len(), token_at);
    }
}
