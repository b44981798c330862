//! A rank whose "model" is a hash of all tokens before: it notices every misplaced, missing or foreign KV entry.

use ashlar_protocol::serving::FailureKind;
use ashlar_protocol::step::{SampledToken, StepPlan, StepResult, StepTiming};
use ashlar_scheduler::engine::BLOCK_TOKENS;
use ashlar_vocabulary::{SamplingParams, SequenceId, TokenId};
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
}

/// All ranks of a replica at once.
#[derive(Default)]
pub(crate) struct Rank {
    kv: BTreeMap<(u32, usize), u64>,
    sequences: BTreeMap<SequenceId, Known>,
    step: u64,
    /// Positions computed so far.
    pub(crate) computed: usize,
    /// The next sampling of this sequence fails.
    pub(crate) poison: Option<SequenceId>,
}

impl Rank {
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
            let known = Known { tokens, table: Vec::new(), sampling: new.sampling.clone() };
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
        for slice in &plan.slices {
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
            for (position, state) in states.iter().enumerate().take(start) {
                let found = self.kv.get(&place(position));
                assert_eq!(found, Some(state), "{} reads foreign KV at {position}", slice.id);
            }
            for (position, state) in states.iter().enumerate().take(end).skip(start) {
                self.kv.insert(place(position), *state);
            }
            self.computed += end - start;
            if !slice.sample {
                continue;
            }
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
