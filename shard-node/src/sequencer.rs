//! Pure: which plans a rank may execute, and what it knows of every sequence.
//!
//! `handle` takes an event and yields effects; the executor performs them. No I/O, clock or randomness, so that the
//! simulation runs exactly this.

use ashlar_protocol::membership::Assignment;
use ashlar_protocol::prefix::BlockHash;
use ashlar_protocol::step::{NewSequence, SequenceSlice, StageRange, StepPlan};
use ashlar_vocabulary::{
    AdapterId, BlockId, LeaseTerm, ReplicaRevision, SequenceId, StageIndex, StepId, TokenId,
};
use std::collections::BTreeMap;

/// What a rank keeps of a sequence: its tokens and where their keys and values are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct RankSequence {
    /// Prompt and continuation as far as known.
    pub tokens: Vec<TokenId>,
    /// Length of the prompt.
    pub prompt_len: usize,
    /// Blocks of the KV cache, in order.
    pub block_table: Vec<BlockId>,
    /// The adapter that changes the model.
    pub adapter: Option<AdapterId>,
    /// What the names of its blocks begin after.
    pub root: BlockHash,
}

/// What happens to the sequencer.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A new place in a replica: everything known is forgotten.
    Assigned {
        /// The lease it came under.
        term: LeaseTerm,
        /// The layout.
        revision: ReplicaRevision,
        /// Blocks of KV cache.
        kv_blocks: u32,
        /// Longest step in rows.
        max_rows: u32,
        /// Whether the KV cache is still that of the place before.
        cache_kept: bool,
    },
    /// A plan arrived.
    Plan(StepPlan),
    /// The rows of this step are in the KV cache.
    Computed(StepId),
    /// What was computed of this sequence is not to be trusted.
    Distrusted(SequenceId),
}

/// What the executor must do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start tracking how a sequence is sampled.
    Begin(Box<NewSequence>),
    /// These tokens became part of a sequence: advance its sampler and grammar.
    Observe(SequenceId, Vec<TokenId>),
    /// Drop what is tracked of a sequence.
    End(SequenceId),
    /// Compute these rows; block tables are in the sequencer.
    Compute(StepWork),
    /// The plan cannot be executed: the scheduler and this rank disagree. The layout must be renewed.
    Diverged(String),
}

/// The rows of one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepWork {
    /// The step.
    pub step: StepId,
    /// Rows in order; a sequence's rows are consecutive. Those that only some stages compute come last.
    pub rows: Vec<Row>,
    /// Sequences to sample after this step, with the row that holds their last token.
    pub samples: Vec<(SequenceId, usize)>,
    /// The stages that fill something again, and how many rows all stages compute before that: see [`StepPlan::refill`].
    pub refill: Option<(StageRange, usize)>,
}

impl StepWork {
    /// The rows that all stages compute.
    pub fn common_rows(&self) -> &[Row] {
        match self.refill {
            Some((_, common)) => self.rows.get(..common).unwrap_or(&self.rows),
            None => &self.rows,
        }
    }

    /// The rows that this stage computes, and is sent by the one before it.
    pub fn rows_of(&self, stage: StageIndex) -> &[Row] {
        match self.refill {
            Some((stages, _)) if stages.contains(stage) => &self.rows,
            _ => self.common_rows(),
        }
    }
}

/// One row: a token of a sequence at its position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Which sequence.
    pub sequence: SequenceId,
    /// Position in the sequence.
    pub position: u32,
    /// The token there.
    pub token: TokenId,
}

/// Tokens per KV block.
pub const BLOCK_TOKENS: usize = ashlar_kernels::BLOCK_TOKENS;

/// A rank's view of its replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Sequencer {
    term: LeaseTerm,
    revision: ReplicaRevision,
    step: StepId,
    kv_blocks: u32,
    max_rows: u32,
    sequences: BTreeMap<SequenceId, RankSequence>,
    /// What full blocks of the KV cache hold, whoever needs it at present.
    names: BTreeMap<BlockId, BlockHash>,
    /// Ranges of positions that the last step is about to write.
    writing: Vec<(SequenceId, usize, usize)>,
}

impl Sequencer {
    /// The layout in force.
    pub fn revision(&self) -> ReplicaRevision {
        self.revision
    }

    /// The lease in force.
    pub fn term(&self) -> LeaseTerm {
        self.term
    }

    /// What is known of a sequence.
    pub fn sequence(&self, id: SequenceId) -> Option<&RankSequence> {
        self.sequences.get(&id)
    }

    /// How many sequences are known.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Full blocks of the KV cache, and what they hold.
    pub fn names(&self) -> impl Iterator<Item = (BlockId, BlockHash)> + '_ {
        self.names.iter().map(|(block, name)| (*block, *name))
    }

    /// Whether no sequence is known.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Applies `event`.
    pub fn handle(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Assigned { term, revision, kv_blocks, max_rows, cache_kept } => {
                effects.extend(self.sequences.keys().map(|id| Effect::End(*id)));
                let names = if cache_kept { std::mem::take(&mut self.names) } else { BTreeMap::new() };
                *self = Sequencer { term, revision, kv_blocks, max_rows, names, ..Sequencer::default() };
            }
            Event::Computed(step) if step == self.step => self.name_full_blocks(),
            Event::Computed(_) => {}
            Event::Distrusted(id) => {
                let table = self.sequences.get(&id).map(|sequence| sequence.block_table.as_slice());
                for block in table.unwrap_or_default() {
                    self.names.remove(block);
                }
            }
            Event::Plan(plan) => {
                // Late plans of a former layout or leader, and duplicates, are dropped.
                let current = plan.term == self.term && plan.revision == self.revision;
                if current
                    && plan.step > self.step
                    && let Err(reason) = self.apply(plan, effects)
                {
                    effects.push(Effect::Diverged(reason));
                }
            }
        }
    }

    fn apply(&mut self, plan: StepPlan, effects: &mut Vec<Effect>) -> Result<(), String> {
        if plan.step.0 != self.step.0 + 1 {
            return Err(format!("step {} arrived after step {}", plan.step, self.step));
        }
        self.step = plan.step;
        self.writing.clear();
        for id in plan.ended_sequences {
            if self.sequences.remove(&id).is_some() {
                effects.push(Effect::End(id));
            }
        }
        for new in plan.new_sequences {
            let mut tokens = new.prompt.clone();
            tokens.extend(&new.generated);
            let sequence = RankSequence {
                tokens,
                prompt_len: new.prompt.len(),
                block_table: Vec::new(),
                adapter: new.adapter,
                root: new.root,
            };
            if self.sequences.insert(new.id, sequence).is_some() {
                return Err(format!("sequence {} is not new", new.id));
            }
            effects.push(Effect::Begin(Box::new(new)));
        }
        let mut work = StepWork { step: plan.step, rows: Vec::new(), samples: Vec::new(), refill: None };
        for slice in plan.slices {
            self.apply_slice(slice, &mut work, effects)?;
        }
        if let Some(refill) = plan.refill {
            work.refill = Some((refill.stages, work.rows.len()));
            if refill.slices.iter().any(|slice| slice.sample) {
                return Err("a row that only some stages compute is to be sampled".to_owned());
            }
            for slice in refill.slices {
                self.apply_slice(slice, &mut work, effects)?;
            }
        }
        if work.rows.len() > self.max_rows as usize {
            return Err(format!("a step of {} rows, at most {} were agreed", work.rows.len(), self.max_rows));
        }
        effects.push(Effect::Compute(work));
        Ok(())
    }

    fn apply_slice(
        &mut self,
        slice: SequenceSlice,
        work: &mut StepWork,
        effects: &mut Vec<Effect>,
    ) -> Result<(), String> {
        let id = slice.id;
        let kv_blocks = self.kv_blocks;
        let sequence = self.sequences.get_mut(&id).ok_or_else(|| format!("sequence {id} is unknown"))?;
        if !slice.append.is_empty() {
            sequence.tokens.extend(&slice.append);
            effects.push(Effect::Observe(id, slice.append));
        }
        if slice.reset_blocks {
            sequence.block_table.clear();
        }
        if let Some(block) = slice.new_blocks.iter().find(|block| block.0 >= kv_blocks) {
            return Err(format!("block {block} of {kv_blocks}"));
        }
        let (start, end) = (slice.start as usize, slice.start as usize + slice.count as usize);
        for &block in &slice.new_blocks {
            // What is before the first position to compute is there already, and is shared.
            if (sequence.block_table.len() + 1) * BLOCK_TOKENS > start {
                self.names.remove(&block);
            }
            sequence.block_table.push(block);
        }
        let covered = sequence.block_table.len() * BLOCK_TOKENS;
        if slice.count == 0 || end > sequence.tokens.len() || end > covered {
            return Err(format!(
                "sequence {id}: positions {start}..{end} of {} tokens and {covered} reserved places",
                sequence.tokens.len()
            ));
        }
        if slice.sample && end != sequence.tokens.len() {
            return Err(format!("sequence {id} is to be sampled before its last token"));
        }
        self.writing.push((id, start, end));
        for (position, &token) in sequence.tokens.iter().enumerate().take(end).skip(start) {
            work.rows.push(Row { sequence: id, position: position as u32, token });
        }
        if slice.sample {
            work.samples.push((id, work.rows.len() - 1));
        }
        Ok(())
    }

    /// Names the blocks that the last step has filled.
    fn name_full_blocks(&mut self) {
        for (id, start, end) in std::mem::take(&mut self.writing) {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            for index in start / BLOCK_TOKENS..end / BLOCK_TOKENS {
                let before = match index.checked_sub(1) {
                    None => Some(sequence.root),
                    Some(before) => {
                        sequence.block_table.get(before).and_then(|block| self.names.get(block)).copied()
                    }
                };
                let (Some(before), Some(block)) = (before, sequence.block_table.get(index)) else { break };
                let token_at = |offset: usize| {
                    sequence.tokens.get(index * BLOCK_TOKENS + offset).copied().unwrap_or_default()
                };
                self.names.insert(*block, before.followed_by(token_at));
            }
        }
    }
}

/// Whether what the cache of one place holds is what the other place's would: of the same layers and heads of the same model, and
/// as large.
pub fn is_same_cache(one: &Assignment, other: &Assignment) -> bool {
    let of = |assignment: &Assignment| {
        let Assignment { model_digest, precision, layers, kv_blocks, .. } = assignment;
        let rank = (assignment.tensor_rank, assignment.tensor_parallel_size);
        (*model_digest, *precision, *layers, rank, *kv_blocks)
    };
    of(one) == of(other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ashlar_protocol::prefix::PrefixChain;
    use ashlar_protocol::step::Refill;
    use ashlar_vocabulary::SamplingParams;

    fn assigned() -> Sequencer {
        let mut sequencer = Sequencer::default();
        let event = Event::Assigned {
            term: LeaseTerm(1),
            revision: ReplicaRevision(1),
            kv_blocks: 4,
            max_rows: 32,
            cache_kept: false,
        };
        sequencer.handle(event, &mut Vec::new());
        sequencer
    }

    fn plan(step: u64) -> StepPlan {
        StepPlan {
            term: LeaseTerm(1),
            revision: ReplicaRevision(1),
            step: StepId(step),
            new_sequences: vec![],
            slices: vec![],
            ended_sequences: vec![],
            refill: None,
        }
    }

    fn slice(start: u32, count: u32) -> SequenceSlice {
        SequenceSlice {
            id: SequenceId(7),
            append: vec![],
            reset_blocks: false,
            new_blocks: vec![],
            start,
            count,
            sample: false,
        }
    }

    fn first_plan() -> StepPlan {
        let new = NewSequence {
            adapter: None,
            root: BlockHash::default(),
            id: SequenceId(7),
            prompt: vec![5, 6, 7],
            generated: vec![],
            sampling: SamplingParams::default(),
            traceparent: None,
            audit_logits_from: None,
        };
        let first = SequenceSlice { new_blocks: vec![BlockId(2)], sample: true, ..slice(0, 3) };
        StepPlan { new_sequences: vec![new], slices: vec![first], ..plan(1) }
    }

    fn run(sequencer: &mut Sequencer, plan: StepPlan) -> Vec<Effect> {
        let mut effects = Vec::new();
        sequencer.handle(Event::Plan(plan), &mut effects);
        effects
    }

    #[test]
    fn a_prompt_is_computed_and_then_continued_by_deltas() {
        let mut sequencer = assigned();
        let effects = run(&mut sequencer, first_plan());
        let Some(Effect::Compute(work)) = effects.last() else { panic!("{effects:?}") };
        assert_eq!(
            work.rows.iter().map(|r| (r.position, r.token)).collect::<Vec<_>>(),
            [(0, 5), (1, 6), (2, 7)]
        );
        assert_eq!(work.samples, [(SequenceId(7), 2)]);
        let next = SequenceSlice { append: vec![9], sample: true, ..slice(3, 1) };
        let effects = run(&mut sequencer, StepPlan { slices: vec![next], ..plan(2) });
        assert_eq!(effects[0], Effect::Observe(SequenceId(7), vec![9]));
        assert_eq!(sequencer.sequence(SequenceId(7)).map(|s| s.tokens.clone()), Some(vec![5, 6, 7, 9]));
    }

    #[test]
    fn duplicates_and_plans_of_another_layout_do_nothing() {
        let mut sequencer = assigned();
        run(&mut sequencer, first_plan());
        assert_eq!(run(&mut sequencer, first_plan()), []);
        assert_eq!(run(&mut sequencer, StepPlan { revision: ReplicaRevision(0), ..plan(2) }), []);
        assert_eq!(run(&mut sequencer, StepPlan { term: LeaseTerm(0), ..plan(2) }), []);
    }

    #[test]
    fn a_gap_or_an_impossible_slice_is_a_divergence() {
        let diverges = |change: &dyn Fn(&mut StepPlan)| {
            let mut sequencer = assigned();
            let mut first = first_plan();
            change(&mut first);
            matches!(run(&mut sequencer, first).last(), Some(Effect::Diverged(_)))
        };
        assert!(!diverges(&|_| {}));
        assert!(diverges(&|p| p.step = StepId(2)));
        assert!(diverges(&|p| p.slices[0].new_blocks = vec![BlockId(4)]));
        assert!(diverges(&|p| p.slices[0].new_blocks = vec![]));
        assert!(diverges(&|p| p.slices[0].count = 4));
        assert!(diverges(&|p| p.slices[0].count = 2));
        assert!(diverges(&|p| p.slices[0].id = SequenceId(8)));
        let one = StageRange { first: StageIndex(1), last: StageIndex(1) };
        assert!(
            diverges(&|p| p.refill = Some(Refill { stages: one, slices: std::mem::take(&mut p.slices) }))
        );
    }

    #[test]
    fn rows_that_are_filled_again_come_last_and_concern_some_stages() {
        let mut sequencer = assigned();
        let mut plan = long_plan();
        let stages = StageRange { first: StageIndex(1), last: StageIndex(2) };
        let slices = vec![SequenceSlice { new_blocks: vec![BlockId(0)], ..slice(0, 16) }];
        plan.slices.clear();
        plan.refill = Some(Refill { stages, slices });
        let other = NewSequence { id: SequenceId(8), prompt: vec![1, 2], ..plan.new_sequences[0].clone() };
        plan.new_sequences.push(other);
        let slice =
            SequenceSlice { id: SequenceId(8), new_blocks: vec![BlockId(3)], sample: true, ..slice(0, 2) };
        plan.slices.push(slice);
        let effects = run(&mut sequencer, plan);
        let Some(Effect::Compute(work)) = effects.last() else { panic!("{effects:?}") };
        assert_eq!([0, 1, 2, 3].map(|stage| work.rows_of(StageIndex(stage)).len()), [2, 18, 18, 2]);
        assert_eq!((work.common_rows().len(), &work.samples[..]), (2, &[(SequenceId(8), 1)][..]));
        sequencer.handle(Event::Computed(StepId(1)), &mut Vec::new());
        assert_eq!(named(&sequencer), [0]);
    }

    #[test]
    fn a_new_layout_forgets_every_sequence() {
        let mut sequencer = assigned();
        run(&mut sequencer, first_plan());
        let mut effects = Vec::new();
        let event = Event::Assigned {
            term: LeaseTerm(1),
            revision: ReplicaRevision(2),
            kv_blocks: 4,
            max_rows: 32,
            cache_kept: false,
        };
        sequencer.handle(event, &mut effects);
        assert_eq!(effects, [Effect::End(SequenceId(7))]);
        assert!(sequencer.is_empty());
    }

    fn named(sequencer: &Sequencer) -> Vec<u32> {
        sequencer.names().map(|(block, _)| block.0).collect()
    }

    /// A sequence of forty tokens in blocks 0, 1 and 2.
    fn long_plan() -> StepPlan {
        let mut plan = first_plan();
        plan.new_sequences[0].prompt = (0..40).collect();
        plan.slices[0] =
            SequenceSlice { new_blocks: [0, 1, 2].map(BlockId).to_vec(), sample: true, ..slice(0, 40) };
        plan
    }

    #[test]
    fn full_blocks_have_names_once_they_are_computed_and_as_long_as_nobody_else_gets_them() {
        let mut sequencer = assigned();
        run(&mut sequencer, long_plan());
        assert_eq!(named(&sequencer), [] as [u32; 0]);
        sequencer.handle(Event::Computed(StepId(1)), &mut Vec::new());
        assert_eq!(named(&sequencer), [0, 1], "the third is not full");
        let mut chain = PrefixChain::new(BlockHash::default());
        chain.extend(40, |position| position as u32);
        assert!(sequencer.names().map(|(_, name)| name).eq(chain.hashes().iter().copied()));
        // Another sequence shares the first block and is given the second one, whose content is lost with that.
        let mut other = long_plan();
        (other.step, other.new_sequences[0].id) = (StepId(2), SequenceId(8));
        let blocks = [0, 1].map(BlockId).to_vec();
        other.slices[0] = SequenceSlice { id: SequenceId(8), new_blocks: blocks, ..slice(16, 8) };
        run(&mut sequencer, other);
        assert_eq!(named(&sequencer), [0]);
    }

    #[test]
    fn names_outlive_a_layout_whose_cache_is_kept_and_no_other() {
        for cache_kept in [true, false] {
            let mut sequencer = assigned();
            run(&mut sequencer, long_plan());
            sequencer.handle(Event::Computed(StepId(1)), &mut Vec::new());
            let (term, revision) = (LeaseTerm(2), ReplicaRevision(2));
            let event = Event::Assigned { term, revision, kv_blocks: 4, max_rows: 32, cache_kept };
            sequencer.handle(event, &mut Vec::new());
            assert_eq!(named(&sequencer).len(), if cache_kept { 2 } else { 0 });
        }
    }

    #[test]
    fn what_is_not_to_be_trusted_has_no_name() {
        let mut sequencer = assigned();
        run(&mut sequencer, long_plan());
        sequencer.handle(Event::Computed(StepId(1)), &mut Vec::new());
        sequencer.handle(Event::Distrusted(SequenceId(7)), &mut Vec::new());
        assert_eq!(named(&sequencer), [] as [u32; 0]);
    }
}
