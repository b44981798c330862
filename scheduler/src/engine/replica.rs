//! A replica as the engine sees it: its blocks, who runs there, which steps are in flight.

use super::block_pool::BlockPool;
use super::budget::{CostModel, Work};
use super::events::ReplicaUp;
use super::prefix_cache::BLOCK_TOKENS;
use super::queue::Order;
use crate::time::Millis;
use ashlar_protocol::step::{StageRange, StepTiming};
use ashlar_vocabulary::{AdapterId, LeaseTerm, ReplicaId, ReplicaRevision, SequenceId, StageIndex, StepId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// A replica that is up.
#[derive(Debug, Clone)]
pub struct Replica {
    /// Which.
    pub id: ReplicaId,
    /// The lease under which it was laid out.
    pub term: LeaseTerm,
    /// Its layout.
    pub revision: ReplicaRevision,
    /// Number of stages.
    pub num_stages: usize,
    /// Whether it takes no sequence in any more: a node of it leaves.
    pub draining: bool,
    /// Its KV blocks.
    pub pool: BlockPool,
    /// The stages that have lost what the pool's unfilled blocks are known to hold.
    pub lossy: Option<StageRange>,
    /// Predicted step times.
    pub cost: CostModel,
    /// Sequences that hold blocks here, most urgent first.
    pub running: BTreeMap<Order, SequenceId>,
    /// Steps sent and not answered, oldest first.
    pub in_flight: VecDeque<InFlight>,
    /// The step sent last.
    pub last_step: StepId,
    /// Sequences that have ended since the last plan and that ranks still know.
    pub ended: Vec<SequenceId>,
    /// Steps completed.
    pub steps: u64,
    /// Adapters that every rank has, and when a sequence with them last began or ended here.
    pub adapters: BTreeMap<AdapterId, Millis>,
    /// Adapters that sequences wait for here and that have been asked for.
    pub wanted: BTreeSet<AdapterId>,
}

/// A step that has been sent.
#[derive(Debug, Clone)]
pub struct InFlight {
    /// Which.
    pub step: StepId,
    /// When it was sent.
    pub sent: Millis,
    /// Sequences that it computes something of.
    pub members: Vec<SequenceId>,
    /// How its stages have spent it, as far as they have said so.
    pub spent: Vec<StepTiming>,
    /// Sequences whose next token it samples.
    pub sampling: Vec<SequenceId>,
    /// What it asks of every stage.
    pub work: Work,
    /// What it asks, all in all, of stages that fill something again.
    pub refilling: Option<(StageRange, Work)>,
    /// How long its slowest stage should take.
    pub predicted_us: f64,
}

impl InFlight {
    /// A rank has spent this on the step.
    pub fn note(&mut self, stage: usize, timing: &StepTiming) {
        if self.spent.len() <= stage {
            self.spent.resize(stage + 1, StepTiming::default());
        }
        let known = &mut self.spent[stage];
        if timing.compute_us >= known.compute_us {
            *known = *timing;
        }
    }

    /// What it asks of a stage.
    pub fn work_of(&self, stage: usize) -> Work {
        match self.refilling {
            Some((stages, work)) if stages.contains(StageIndex(stage as u32)) => work,
            _ => self.work,
        }
    }
}

impl Replica {
    /// A replica that has executed nothing in this layout.
    pub fn new(up: &ReplicaUp) -> Replica {
        let unfilled = up.lost.as_ref().map_or(&[][..], |lost| &lost.blocks);
        Replica {
            id: up.replica,
            term: up.term,
            revision: up.revision,
            num_stages: up.stages.len().max(1),
            draining: false,
            pool: BlockPool::with_kept(up.kv_blocks, &up.kept, unfilled),
            lossy: up.lost.as_ref().map(|lost| lost.stages),
            cost: CostModel::new(&up.stages),
            running: BTreeMap::new(),
            in_flight: VecDeque::new(),
            last_step: StepId(0),
            ended: Vec::new(),
            steps: 0,
            adapters: BTreeMap::new(),
            wanted: BTreeSet::new(),
        }
    }

    /// Whether a sequence with this adapter could begin a step.
    pub fn has(&self, adapter: Option<AdapterId>) -> bool {
        adapter.is_none_or(|adapter| self.adapters.contains_key(&adapter))
    }

    /// A sequence with this adapter has begun or ended here.
    pub fn used(&mut self, adapter: Option<AdapterId>, now: Millis) {
        if let Some(last) = adapter.and_then(|adapter| self.adapters.get_mut(&adapter)) {
            *last = now.max(*last);
        }
    }

    /// Tokens that its KV cache holds: no sequence can be longer.
    pub fn capacity_tokens(&self) -> usize {
        self.pool.total() * BLOCK_TOKENS
    }

    /// Most steps in flight. With several stages one more than there are, so that each has work while a result travels;
    /// with one stage a second one, so that chunks of a long prompt follow each other without a pause.
    pub fn in_flight_max(&self) -> usize {
        self.num_stages + 1
    }

    /// Most sampling steps in flight when `decoding` sequences are being continued.
    ///
    /// A decode waits for its previous token, so the decodes are divided over this many micro-batches. One stage takes
    /// all of them at once: dividing would read the weights twice. Of several stages, each has one micro-batch; with many
    /// sequences an additional one hides the way of the results back to the scheduler.
    pub fn sampling_slots(&self, decoding: usize) -> usize {
        match self.num_stages {
            1 => 1,
            stages if decoding < 4 * (stages + 1) => stages,
            stages => stages + 1,
        }
    }

    /// Sampling steps in flight.
    pub fn sampling_steps(&self) -> usize {
        self.in_flight.iter().filter(|flight| !flight.sampling.is_empty()).count()
    }

    /// Blocks that stay free at an admission, so that the sequences already running can grow for a while.
    pub fn watermark(&self) -> usize {
        self.running.len().min(self.pool.total() / 16)
    }
}
