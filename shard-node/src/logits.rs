//! Logits of a step: which are wanted, and what becomes of them.

use crate::digests::Digests;
use crate::sampling::Samplers;
use crate::sequencer::{Row, Sequencer, StepWork};
use ashlar_kernels::Kernels;
use ashlar_protocol::step::{PromptLogprobs, StepResult};
use ashlar_vocabulary::{SequenceId, TokenId};
use std::collections::BTreeSet;

/// A row whose logits are needed.
pub(crate) struct WantedLogits {
    pub(crate) row: usize,
    pub(crate) purpose: Purpose,
}

/// What logits are needed for.
pub(crate) enum Purpose {
    /// To choose the next token.
    Sample,
    /// To score the prompt token that follows.
    Score(TokenId),
    /// For their digest alone.
    Audit,
}

/// Every rank of the last stage comes to the same rows, from the plan alone: they multiply them together.
pub(crate) fn wanted_logits(
    sequencer: &Sequencer,
    scored: &BTreeSet<SequenceId>,
    digests: &Digests,
    work: &StepWork,
) -> Vec<WantedLogits> {
    let mut wanted: Vec<WantedLogits> = Vec::new();
    if !(scored.is_empty() && digests.is_idle()) {
        for (index, row) in work.common_rows().iter().enumerate() {
            let next = row.position as usize + 1;
            let sequence = sequencer.sequence(row.sequence).filter(|sequence| next < sequence.prompt_len);
            let follower = sequence.and_then(|sequence| sequence.tokens.get(next).copied());
            let scored = follower.filter(|_| scored.contains(&row.sequence));
            let sampled = || work.samples.iter().any(|(_, row)| *row == index);
            match scored {
                Some(token) => wanted.push(WantedLogits { row: index, purpose: Purpose::Score(token) }),
                None if digests.wants_logits(*row) && !sampled() => {
                    wanted.push(WantedLogits { row: index, purpose: Purpose::Audit });
                }
                None => {}
            }
        }
    }
    let samples = work.samples.iter();
    wanted.extend(samples.map(|&(_, row)| WantedLogits { row, purpose: Purpose::Sample }));
    wanted
}

/// Does with a row's logits what they are wanted for.
pub(crate) fn sample_row(
    kernels: &Kernels,
    samplers: &mut Samplers,
    row: Row,
    wanted: &WantedLogits,
    logits: &mut [f32],
    result: &mut StepResult,
) {
    match wanted.purpose {
        Purpose::Audit => {}
        Purpose::Sample => match samplers.sample(kernels, row.sequence, row.position, logits) {
            Ok(sampled) => result.sampled.push(sampled),
            Err(failed) => result.failed.push(failed),
        },
        Purpose::Score(token) => {
            let Some(logprobs) = samplers.score(kernels, row.sequence, logits, token) else { return };
            match result.prompt_logprobs.last_mut() {
                Some(run) if run.id == row.sequence => run.logprobs.push(logprobs),
                _ => result.prompt_logprobs.push(PromptLogprobs {
                    id: row.sequence,
                    position: row.position + 1,
                    logprobs: vec![logprobs],
                }),
            }
        }
    }
}
