//! Ranks whose "model" is a hash of all tokens before: they notice every misplaced, missing or foreign KV entry.

use ashlar_protocol::prefix::{BlockHash, PrefixChain};
use ashlar_protocol::serving::FailureKind;
use ashlar_protocol::step::{SampledToken, StepPlan, StepResult, StepTiming};
use ashlar_scheduler::engine::BLOCK_TOKENS;
use ashlar_vocabulary::{BlockId, SamplingParams, SequenceId, StageIndex, TokenId};
use std::collections::BTreeMap;

const VOCAB: u64 = 1000;
const EMPTY: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(state: u64, value: u64) -> u64 {
    let mixed = (state ^ value.wrapping_mul(0xff51_afd7_ed55_8ccd)).rotate_left(29);
    mixed.wrapping_mul(0xc4ce_b9fe_1a85_ec53).wrapping_add(1)
}

/// The state after each token.
fn states(tokens: &[TokenId]) -> Vec<u64> {
    let step = |state: &mut u64, token: &TokenId| {
        *state = mix(*state, u64::from(*token));
        Some(*state)
    };
    tokens.iter().scan(EMPTY, step).collect()
}

fn sample(state: u64, seed: u64) -> TokenId {
    (mix(state, seed) % VOCAB) as TokenId
}

/// What the model continues `prompt` with: no scheduling may change it.
pub(crate) fn oracle(prompt: &[TokenId], seed: u64, count: usize) -> Vec<TokenId> {
    let mut state = states(prompt).pop().unwrap_or(EMPTY);
    let mut generated = Vec::new();
    for _ in 0..count {
        let token = sample(state, seed);
        generated.push(token);
        state = mix(state, u64::from(token));
    }
    generated
}

struct Known {
    tokens: Vec<TokenId>,
    table: Vec<u32>,
    sampling: SamplingParams,
    root: BlockHash,
}

/// What a stage has written.
#[derive(Default, Clone)]
struct Kv {
    /// By block and place.
    states: BTreeMap<(u32, usize), u64>,
    /// What full blocks hold.
    names: BTreeMap<BlockId, BlockHash>,
}

/// All ranks of a replica at once.
pub(crate) struct Rank {
    /// Of each stage.
    kv: Vec<Kv>,
    sequences: BTreeMap<SequenceId, Known>,
    step: u64,
    /// Positions computed so far, by all stages or by some.
    pub(crate) computed: usize,
    /// The next sampling of this sequence fails.
    pub(crate) poison: Option<SequenceId>,
}

impl Default for Rank {
    fn default() -> Rank {
        Rank::of(1)
    }
}

impl Rank {
    pub(crate) fn of(stages: usize) -> Rank {
        let kv = vec![Kv::default(); stages];
        Rank { kv, sequences: BTreeMap::new(), step: 0, computed: 0, poison: None }
    }

    /// The same ranks in a new layout, in which another node has the place of this stage.
    pub(crate) fn without(self, stage: usize) -> Rank {
        let mut rank = Rank { kv: self.kv, ..Rank::of(1) };
        rank.kv[stage] = Kv::default();
        rank
    }

    /// Full blocks that all stages but this one have, and what they hold.
    pub(crate) fn kept_but_by(&self, stage: usize) -> Vec<(BlockId, BlockHash)> {
        let mut others =
            self.kv.iter().enumerate().filter(|(other, _)| *other != stage).map(|(_, kv)| &kv.names);
        let first = others.next().cloned().unwrap_or_default();
        let others: Vec<_> = others.collect();
        let kept =
            |(block, name): &(BlockId, BlockHash)| others.iter().all(|other| other.get(block) == Some(name));
        first.into_iter().filter(kept).collect()
    }

    pub(crate) fn known(&self) -> usize {
        self.sequences.len()
    }

    /// Whether a sequence with this prompt is known.
    pub(crate) fn computes(&self, prompt: &[TokenId]) -> bool {
        self.sequences.values().any(|known| known.tokens.starts_with(prompt))
    }

    pub(crate) fn execute(&mut self, plan: &StepPlan) -> StepResult {
        self.step += 1;
        assert_eq!(plan.step.0, self.step, "steps are consecutive");
        for id in &plan.ended_sequences {
            assert!(self.sequences.remove(id).is_some(), "ended sequence {id} is known");
        }
        for new in &plan.new_sequences {
            let tokens = new.prompt.iter().chain(&new.generated).copied().collect();
            let (sampling, root) = (new.sampling.clone(), new.root);
            let known = Known { tokens, table: Vec::new(), sampling, root };
            assert!(self.sequences.insert(new.id, known).is_none(), "sequence {} is new", new.id);
        }
        let mut result = StepResult {
            term: plan.term,
            revision: plan.revision,
            step: plan.step,
            sampled: Vec::new(),
            prompt_logprobs: Vec::new(),
            failed: Vec::new(),
            timing: StepTiming::default(),
        };
        let mut seen = Vec::new();
        let refills = plan
            .refill
            .iter()
            .flat_map(|refill| refill.slices.iter().map(|slice| (slice, Some(refill.stages))));
        for (slice, only) in plan.slices.iter().map(|slice| (slice, None)).chain(refills) {
            assert!(!seen.contains(&slice.id), "one slice per sequence");
            seen.push(slice.id);
            let known = self.sequences.get_mut(&slice.id).expect("sequence is known");
            known.tokens.extend(&slice.append);
            if slice.reset_blocks {
                known.table.clear();
            }
            known.table.extend(slice.new_blocks.iter().map(|block| block.0));
            let states = states(&known.tokens);
            let (start, end) = (slice.start as usize, (slice.start + slice.count) as usize);
            assert!(slice.count > 0 && end <= states.len() && end <= known.table.len() * BLOCK_TOKENS);
            let place = |position: usize| (known.table[position / BLOCK_TOKENS], position % BLOCK_TOKENS);
            let mut chain = PrefixChain::new(known.root);
            chain.extend(known.tokens.len(), |position| known.tokens[position]);
            for (stage, kv) in (0..).map(StageIndex).zip(&mut self.kv) {
                let computes = only.is_none_or(|only| only.contains(stage));
                let has = if computes { start } else { end };
                for (position, state) in states.iter().enumerate().take(has) {
                    let found = kv.states.get(&place(position));
                    assert_eq!(found, Some(state), "{} reads foreign KV at {position}", slice.id);
                }
                kv.states.extend((has..end).map(|position| (place(position), states[position])));
                for index in has / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS) {
                    let block = BlockId(known.table[index]);
                    match chain.get(index).filter(|_| (index + 1) * BLOCK_TOKENS <= end) {
                        Some(name) => drop(kv.names.insert(block, *name)),
                        None => drop(kv.names.remove(&block)),
                    }
                }
            }
            self.computed += end - start;
            if !slice.sample {
                continue;
            }
            assert_eq!(only, None, "all stages compute what is sampled from");
            assert_eq!(end, states.len(), "the last token is sampled from");
            if self.poison == Some(slice.id) {
                self.poison = None;
                let message = "logits are not finite".to_owned();
                result.failed.push(ashlar_protocol::step::FailedSequence {
                    id: slice.id,
                    kind: FailureKind::Internal,
                    message,
                });
                continue;
            }
            result.sampled.push(SampledToken {
                id: slice.id,
                position: end as u32,
                token: sample(states[end - 1], known.sampling.seed),
                logprobs: None,
                grammar_complete: false,
            });
        }
        result
    }
}
