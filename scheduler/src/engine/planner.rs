//! What the next step of a replica computes: decodes first, then chunks of prompts, then new sequences.
//!
//! There are no phases: a sequence is computed from where it stands to the end of its known tokens, in as many slices as
//! the budget makes of it, and the slice that reaches the end samples.
//!
//! What some stages have lost with a node is filled again by those alone, in the same steps: as chunks of prompts are, but the other
//! stages have nothing to do with them.
//!
//! A [suspect](Sequence::is_suspect) gets steps of its own, with no other step in flight: should the replica be lost once more,
//! it is known by what.

use super::budget::{Budget, Work};
use super::events::EngineConfig;
use super::prefix_cache::{BLOCK_TOKENS, BlockHash, PrefixHit, blocks_for};
use super::queue::{Order, Queue};
use super::replica::{InFlight, Replica};
use super::sequence::{Sequence, State};
use crate::time::Millis;
use ashlar_protocol::serving::SchedulerCounters;
use ashlar_protocol::step::{NewSequence, Refill, SequenceSlice, StepPlan};
use ashlar_vocabulary::{AdapterId, KeyId, ReplicaId, SequenceId, StepId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Least rows that a waiting prompt gets in a step, whatever is predicted.
const CHUNK_MIN: usize = BLOCK_TOKENS;
/// Smallest chunk into which an idle pipeline divides a prompt to occupy all stages.
const PIPELINE_CHUNK_MIN: usize = 64;
/// How far into the queue an admission looks for sequences that belong on this replica.
const LOOKAHEAD: usize = 64;
/// Tokens of a prompt that cost as much to compute as a sequence that runs beside it: one row in each of that many steps.
const RUNNING_AS_TOKENS: usize = 32;

/// Plans one replica's steps.
pub(super) struct Planner<'a> {
    pub(super) now: Millis,
    pub(super) config: &'a EngineConfig,
    pub(super) replica: &'a mut Replica,
    /// The other replicas, among which new sequences are divided.
    pub(super) others: &'a BTreeMap<ReplicaId, Replica>,
    pub(super) sequences: &'a mut BTreeMap<SequenceId, Sequence>,
    pub(super) queue: &'a mut Queue,
    pub(super) counters: &'a mut SchedulerCounters,
    /// Percent of the KV blocks that keys may hold, where not all.
    pub(super) kv_shares: &'a BTreeMap<KeyId, u8>,
    /// Adapters for want of which a sequence was not admitted, each told once.
    pub(super) wants: Vec<AdapterId>,
}

/// A step under construction.
struct Draft {
    step: StepId,
    /// Whether slices may sample.
    may_sample: bool,
    /// The suspect that it is for; without one, suspects are left out.
    alone: Option<SequenceId>,
    budget: Budget,
    new_sequences: Vec<NewSequence>,
    slices: Vec<SequenceSlice>,
    /// What only the stages compute that have lost it.
    refills: Vec<SequenceSlice>,
    members: BTreeSet<SequenceId>,
    /// Blocks that this step fills; hittable by later steps only.
    filling: BTreeSet<BlockHash>,
}

impl Draft {
    fn takes(&self, sequence: &Sequence) -> bool {
        match self.alone {
            Some(id) => sequence.id == id,
            None => !sequence.is_suspect(),
        }
    }

    /// Rows that a prompt gets whatever is predicted: the first one of a step, so that nothing starves.
    fn least(&self) -> usize {
        let prompts = self.slices.iter().any(|slice| slice.count > 1) || !self.refills.is_empty();
        if prompts { 0 } else { CHUNK_MIN }
    }
}

/// Whether a decode has the block that it writes to.
enum Growth {
    Grown,
    /// Not in this step.
    Later,
}

impl Planner<'_> {
    /// The next step to send, if there is any work and the replica may have one more in flight.
    pub(super) fn next_step(&mut self) -> Option<StepPlan> {
        let sampling_steps = self.replica.sampling_steps();
        // One stage: a step sent ahead would only delay the decodes that the step in flight is about to make possible.
        let wait = self.replica.num_stages == 1 && sampling_steps > 0;
        if wait || self.replica.in_flight.len() >= self.replica.in_flight_max() {
            return None;
        }
        let suspect = self.first_suspect();
        if suspect.is_some() && !self.replica.in_flight.is_empty() {
            return None;
        }
        let slots = self.replica.sampling_slots(self.decoding());
        let may_sample = sampling_steps < slots;
        self.skip_what_is_filled();
        let alone = suspect.map(|_| self.draft(suspect, may_sample, slots));
        // It may lack blocks, or its adapter: then the others go on.
        let draft = match alone.filter(|draft| !draft.members.is_empty()) {
            Some(draft) => draft,
            None => self.draft(None, may_sample, slots),
        };
        // Ended sequences alone are announced once nothing is in flight; otherwise the next plan does it.
        let announce = !self.replica.ended.is_empty() && self.replica.in_flight.is_empty();
        (!draft.members.is_empty() || announce).then(|| self.seal(draft))
    }

    /// The most urgent suspect that runs here, or could.
    fn first_suspect(&self) -> Option<SequenceId> {
        let running = self.running_sequences().find(|sequence| sequence.is_suspect());
        let waiting = || {
            let waiting = self.queue.iter().take(LOOKAHEAD).filter_map(|id| self.sequences.get(&id));
            waiting.filter(|sequence| sequence.is_suspect()).find(|sequence| self.belongs(sequence))
        };
        running.or_else(waiting).map(|sequence| sequence.id)
    }

    /// A step for one suspect, or for all others.
    fn draft(&mut self, alone: Option<SequenceId>, may_sample: bool, slots: usize) -> Draft {
        let mut draft = Draft {
            step: StepId(self.replica.last_step.0 + 1),
            may_sample,
            alone,
            budget: Budget::new(
                self.replica.cost.clone(),
                self.config.step_target_ms,
                self.config.max_num_batched_tokens,
            ),
            new_sequences: Vec::new(),
            slices: Vec::new(),
            refills: Vec::new(),
            members: BTreeSet::new(),
            filling: BTreeSet::new(),
        };
        if draft.may_sample {
            self.add_decodes(&mut draft, slots);
        }
        self.add_chunks(&mut draft);
        self.admit(&mut draft);
        draft
    }

    /// Sequences that are being continued token by token.
    fn decoding(&self) -> usize {
        let continued = |sequence: &&Sequence| sequence.sampling().is_some() || sequence.remaining() == 1;
        self.running_sequences().filter(continued).count()
    }

    fn running_sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.replica.running.values().filter_map(|id| self.sequences.get(id))
    }

    /// One row for each sequence whose last token has come back, the one longest not served first, up to this
    /// micro-batch's share.
    fn add_decodes(&mut self, draft: &mut Draft, slots: usize) {
        let share = self.decoding().div_ceil(slots);
        let mut ready: Vec<(StepId, Order, SequenceId)> = self
            .running_sequences()
            .filter(|sequence| draft.takes(sequence))
            .filter(|sequence| sequence.sampling().is_none() && sequence.remaining() == 1)
            .filter_map(|sequence| Some((sequence.running()?.last_step, sequence.order, sequence.id)))
            .collect();
        ready.sort_unstable();
        for (_, _, id) in ready {
            // An earlier one may have preempted it.
            let Some(running) = self.sequences.get(&id).and_then(Sequence::running) else { continue };
            let start = running.computed;
            let least = usize::from(draft.slices.is_empty());
            if draft.slices.len() >= share || draft.budget.room(start, 1, least) == 0 {
                break;
            }
            if let Growth::Grown = self.grow(draft, id) {
                self.push_slice(draft, id, 1);
            }
        }
    }

    /// Gives a sequence a block for its next position where it needs one, by preempting less urgent ones if need be.
    fn grow(&mut self, draft: &Draft, id: SequenceId) -> Growth {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return Growth::Later };
            let order = sequence.order;
            let Some(running) = sequence.running_mut() else { return Growth::Later };
            if running.computed / BLOCK_TOKENS < running.blocks.len() {
                return Growth::Grown;
            }
            if let Some(block) = self.replica.pool.allocate() {
                running.blocks.push(block);
                return Growth::Grown;
            }
            let mut less_urgent =
                self.replica.running.range(order..).filter(|(other, _)| **other != order).peekable();
            let any = less_urgent.peek().is_some();
            let victim = less_urgent.rfind(|(_, id)| !draft.members.contains(id)).map(|(_, id)| *id);
            match victim {
                Some(victim) => self.preempt(victim),
                // All less urgent ones are in this very step: their turn comes after it.
                None if any => return Growth::Later,
                None => {
                    if self.replica.running.len() > 1 {
                        self.preempt(id);
                    }
                    return Growth::Later;
                }
            }
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        // The tail goes back first, so that it is evicted first and the prefix stays hittable longest.
        for block in sequence.preempt().into_iter().rev() {
            self.replica.pool.release(block);
        }
        self.replica.running.remove(&sequence.order);
        self.queue.put_back(sequence.order, id);
        self.counters.preemptions += 1;
    }

    /// Next chunks of the prompts that are running, most urgent first.
    fn add_chunks(&mut self, draft: &mut Draft) {
        let prefilling: Vec<SequenceId> = self
            .running_sequences()
            .filter(|sequence| draft.takes(sequence))
            .filter(|sequence| sequence.remaining() > 1 && !draft.members.contains(&sequence.id))
            .map(|sequence| sequence.id)
            .collect();
        for id in prefilling {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let start = sequence.len() - sequence.remaining();
            let kept = sequence.running().map_or(0, |running| running.kept);
            if fills_already(draft, sequence, start..kept) {
                continue;
            }
            let count = match start < kept {
                true => draft.budget.room(start, kept - start, draft.least()),
                false => self.chunk(draft, start, sequence.len()),
            };
            if count == 0 {
                break;
            }
            self.push_slice(draft, id, count);
        }
    }

    /// How many positions from `start` of a sequence of `len` known tokens go into this step.
    fn chunk(&self, draft: &Draft, start: usize, len: usize) -> usize {
        // The last position samples; if it may not, it waits for a step that may.
        let wanted = len - start - usize::from(!draft.may_sample);
        let pipelined = match self.replica.num_stages {
            1 => wanted,
            stages => wanted.min(len.div_ceil(stages).max(PIPELINE_CHUNK_MIN)),
        };
        draft.budget.room(start, pipelined, draft.least())
    }

    /// Takes waiting sequences in, most urgent first, as long as there are places, blocks and budget.
    fn admit(&mut self, draft: &mut Draft) {
        let waiting: Vec<SequenceId> = self.queue.iter().take(LOOKAHEAD).collect();
        for id in waiting {
            if self.replica.running.len() >= self.config.max_num_seqs {
                return;
            }
            let Some(sequence) = self.sequences.get(&id) else { continue };
            if !self.belongs(sequence) {
                continue;
            }
            if !draft.takes(sequence) {
                match draft.alone {
                    Some(_) => continue,
                    // What it waits for is not given to those after it.
                    None => return,
                }
            }
            let hittable = self.hittable_blocks(sequence);
            let hit = PrefixHit::of(&sequence.chain, &self.replica.pool, hittable);
            let (cached, kept) = (hit.filled * BLOCK_TOKENS, hit.blocks * BLOCK_TOKENS);
            if self.soon_cached(draft, sequence, hit.blocks, hittable)
                || fills_already(draft, sequence, cached..kept)
            {
                continue;
            }
            let needed = blocks_for(sequence.len()) - hit.held;
            if needed + self.replica.watermark() > self.replica.pool.available() {
                return;
            }
            if self.exceeds_share(sequence) {
                // Others need not wait with it.
                continue;
            }
            let count = match cached < kept {
                true => draft.budget.room(cached, kept - cached, draft.least()),
                false => self.chunk(draft, cached, sequence.len()),
            };
            if count == 0 {
                return;
            }
            if let Some(adapter) = sequence.submit.adapter.filter(|adapter| !self.replica.has(Some(*adapter)))
            {
                // It could run, but for this; others need not wait with it.
                if self.replica.wanted.insert(adapter) {
                    self.wants.push(adapter);
                }
                continue;
            }
            self.start(id, hit);
            self.push_slice(draft, id, count);
        }
    }

    /// Whether a waiting sequence is to be computed here.
    fn belongs(&self, sequence: &Sequence) -> bool {
        let here = match &sequence.state {
            State::Waiting if self.replica.draining => false,
            State::Waiting => match sequence.only_on() {
                Some(only) => only == self.replica.id,
                None => self.attracts(sequence),
            },
            State::Preempted(preempted) => {
                preempted.replica == self.replica.id && preempted.sampling.is_none()
            }
            State::Running(_) => false,
        };
        here && sequence.len() < self.replica.capacity_tokens()
    }

    /// Whether a sequence would, once it is complete, make its key hold more blocks here than it may. One of a key always runs.
    fn exceeds_share(&self, sequence: &Sequence) -> bool {
        let Some(key) = sequence.key() else { return false };
        let Some(percent) = self.kv_shares.get(&key) else { return false };
        let of_key = self.running_sequences().filter(|running| running.key() == Some(key));
        let held: usize = of_key.map(Sequence::blocks_at_end).sum();
        let most = self.replica.pool.total() * usize::from(*percent) / 100;
        held > 0 && held + sequence.blocks_at_end() > most
    }

    fn hittable_blocks(&self, sequence: &Sequence) -> usize {
        if self.config.enable_prefix_caching { sequence.hittable_blocks() } else { 0 }
    }

    /// Whether this step computes at least half of what `sequence` lacks, so that waiting for the next step spares it
    /// the work (several choices of one prompt, for example).
    fn soon_cached(&self, draft: &Draft, sequence: &Sequence, hit: usize, hittable: usize) -> bool {
        let filling = (hit..hittable)
            .take_while(|&index| sequence.chain.get(index).is_some_and(|hash| draft.filling.contains(hash)))
            .count();
        filling > 0 && 2 * filling * BLOCK_TOKENS >= sequence.len() - hit * BLOCK_TOKENS
    }

    /// Whether a new sequence belongs here: no other replica with room has its adapter where this one has not, or less to do
    /// with it. What is cached of it is not to be computed, but a short common beginning does not outweigh many neighbours.
    fn attracts(&self, sequence: &Sequence) -> bool {
        let hittable = self.hittable_blocks(sequence);
        let score = |replica: &Replica| {
            let cached = PrefixHit::of(&sequence.chain, &replica.pool, hittable).blocks * BLOCK_TOKENS;
            let lacks = !replica.has(sequence.submit.adapter);
            let to_do = sequence.len() - cached + RUNNING_AS_TOKENS * replica.running.len();
            (lacks, to_do, replica.id)
        };
        let own = score(self.replica);
        let admits = |replica: &&Replica| {
            !replica.draining
                && replica.running.len() < self.config.max_num_seqs
                && sequence.len() < replica.capacity_tokens()
                && blocks_for(sequence.len()) + replica.watermark() <= replica.pool.available()
        };
        self.others.values().filter(admits).all(|other| own < score(other))
    }

    /// A sequence need not have filled again what another one has had filled meanwhile.
    fn skip_what_is_filled(&mut self) {
        if self.replica.lossy.is_none() {
            return;
        }
        for id in self.replica.running.values() {
            let Some(sequence) = self.sequences.get_mut(id).filter(|sequence| sequence.refills()) else {
                continue;
            };
            let Some(running) = sequence.running_mut() else { continue };
            let is_filled = |at: usize| {
                running.blocks.get(at / BLOCK_TOKENS).is_some_and(|block| self.replica.pool.is_filled(*block))
            };
            let mut computed = running.computed;
            while computed < running.kept && is_filled(computed) {
                computed += BLOCK_TOKENS - computed % BLOCK_TOKENS;
            }
            running.computed = computed;
            running.blocks_registered = running.blocks_registered.max(computed / BLOCK_TOKENS);
        }
    }

    /// Waiting or preempted → running, with its first blocks from the prefix cache.
    fn start(&mut self, id: SequenceId, hit: PrefixHit) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let pool = &mut self.replica.pool;
        let mut blocks = Vec::with_capacity(blocks_for(sequence.len()));
        for index in 0..hit.blocks {
            blocks.extend(sequence.chain.get(index).and_then(|hash| pool.share(hash)));
        }
        while blocks.len() < blocks_for(sequence.len())
            && let Some(block) = pool.allocate()
        {
            blocks.push(block);
        }
        let cached = hit.filled * BLOCK_TOKENS;
        if sequence.history.first_step.is_none() {
            let cached_prompt = cached.min(sequence.submit.prompt.len());
            sequence.history.cached_tokens = cached_prompt as u32;
            sequence.history.first_step = Some(self.now);
            self.counters.prefix_cache_queries += sequence.submit.prompt.len() as u64;
            self.counters.prefix_cache_hits += cached_prompt as u64;
        }
        sequence.admit(self.replica.id, blocks, (cached, hit.blocks * BLOCK_TOKENS));
        self.replica.used(sequence.submit.adapter, self.now);
        self.queue.remove(sequence.order);
        self.queue.has_begun(sequence.order);
        self.replica.running.insert(sequence.order, id);
    }

    /// Adds the next `count` positions of a running sequence to the step.
    fn push_slice(&mut self, draft: &mut Draft, id: SequenceId, count: usize) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        let len = sequence.len();
        let told = sequence.running().and_then(|running| running.told);
        let append = match told {
            Some(told) => sequence.tokens_from(told),
            None => {
                draft.new_sequences.push(NewSequence {
                    adapter: sequence.submit.adapter,
                    root: sequence.chain.root(),
                    id,
                    prompt: sequence.submit.prompt.clone(),
                    generated: sequence.generated.clone(),
                    sampling: sequence.submit.sampling.clone(),
                    traceparent: sequence.submit.traceparent.clone(),
                    audit_logits_from: sequence.audit.map(|audit| audit.logits_from),
                });
                Vec::new()
            }
        };
        let Some(running) = sequence.running_mut() else { return };
        let start = running.computed;
        let sample = start + count == len;
        let refills = start < running.kept;
        // Ranks take what they are told of for new; what waits to be filled again is not.
        let told_blocks = match refills {
            true => blocks_for(start + count),
            false => running.blocks.len(),
        };
        let slice = SequenceSlice {
            id,
            append,
            reset_blocks: std::mem::take(&mut running.reset_blocks),
            new_blocks: running.blocks.get(running.blocks_told..told_blocks).unwrap_or_default().to_vec(),
            start: start as u32,
            count: count as u32,
            sample,
        };
        if refills {
            draft.refills.push(slice)
        } else {
            draft.slices.push(slice)
        }
        running.told = Some(len);
        running.blocks_told = told_blocks;
        running.computed += count;
        running.last_step = draft.step;
        running.sampling = sample.then_some(draft.step);
        // Of a block that is filled again every row is written by one sequence alone.
        let filled = if refills { blocks_for(running.computed) } else { running.computed / BLOCK_TOKENS };
        draft
            .filling
            .extend((running.blocks_registered..filled).filter_map(|index| sequence.chain.get(index)));
        draft.members.insert(id);
        draft.budget.take(start, count);
    }

    /// Closes the step: from now on it counts as sent, and the blocks it fills can be hit.
    fn seal(&mut self, mut draft: Draft) -> StepPlan {
        // Rows of one adapter beside each other make one product of it; results do not depend on their order.
        let sequences = &*self.sequences;
        let adapter =
            |slice: &SequenceSlice| sequences.get(&slice.id).and_then(|sequence| sequence.submit.adapter);
        draft.slices.sort_by_key(adapter);
        draft.refills.sort_by_key(adapter);
        let refilled: BTreeSet<SequenceId> = draft.refills.iter().map(|slice| slice.id).collect();
        for id in &draft.members {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let State::Running(running) = &mut sequence.state else { continue };
            let full = running.computed / BLOCK_TOKENS;
            for index in running.blocks_registered..full {
                let (Some(block), Some(hash)) = (running.blocks.get(index), sequence.chain.get(index)) else {
                    continue;
                };
                // What is filled again has its name, or has lost it for a reason.
                match refilled.contains(id) {
                    true => self.replica.pool.fill(*block),
                    false => self.replica.pool.register(*block, *hash),
                }
            }
            running.blocks_registered = running.blocks_registered.max(full);
        }
        let of_slices = |slices: &[SequenceSlice]| {
            let and = |work: Work, slice: &SequenceSlice| work.and(slice.start.into(), slice.count.into());
            slices.iter().fold(Work::default(), and)
        };
        let refill = self.replica.lossy.filter(|_| !draft.refills.is_empty());
        let all = draft.budget.work();
        self.counters.scheduled_tokens += all.rows;
        self.counters.refilled_tokens += of_slices(&draft.refills).rows;
        self.replica.last_step = draft.step;
        self.replica.in_flight.push_back(InFlight {
            step: draft.step,
            sent: self.now,
            members: draft.members.into_iter().collect(),
            spent: Vec::new(),
            sampling: draft.slices.iter().filter(|slice| slice.sample).map(|slice| slice.id).collect(),
            work: of_slices(&draft.slices),
            refilling: refill.map(|stages| (stages, all)),
            predicted_us: draft.budget.predicted_us(),
        });
        StepPlan {
            term: self.replica.term,
            revision: self.replica.revision,
            step: draft.step,
            new_sequences: draft.new_sequences,
            slices: draft.slices,
            ended_sequences: std::mem::take(&mut self.replica.ended),
            refill: refill.map(|stages| Refill { stages, slices: draft.refills }),
        }
    }
}

/// Whether this step fills some of these positions of a sequence already, for another one that begins the same.
fn fills_already(draft: &Draft, sequence: &Sequence, positions: Range<usize>) -> bool {
    let mut blocks = positions.start / BLOCK_TOKENS..positions.end / BLOCK_TOKENS;
    blocks.any(|index| sequence.chain.get(index).is_some_and(|hash| draft.filling.contains(hash)))
}
