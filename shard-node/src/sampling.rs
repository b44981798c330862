//! How the last stage's rank 0 turns logits into tokens: one sampler and, where asked for, one grammar per sequence.

use ashlar_grammar::{GrammarCompiler, GrammarError, Matcher};
use ashlar_kernels::sampling::score;
use ashlar_kernels::{Kernels, SampleError, SamplerScratch, SamplerState};
use ashlar_protocol::serving::FailureKind;
use ashlar_protocol::step::{FailedSequence, NewSequence, SampledToken};
use ashlar_vocabulary::{SequenceId, TokenId, TokenLogprobs};
use std::collections::BTreeMap;

/// Most of what goes wrong with a grammar is the client's to change.
fn grammar_fault(error: &GrammarError) -> (FailureKind, String) {
    let kind = match error {
        GrammarError::Internal(_) | GrammarError::MaskLength { .. } => FailureKind::Internal,
        _ => FailureKind::Invalid,
    };
    (kind, error.to_string())
}

struct Sampling {
    prompt_len: u32,
    sampler: SamplerState,
    top_logprobs: u32,
    matcher: Option<Matcher>,
    /// Why this sequence cannot be sampled any more.
    fault: Option<(FailureKind, String)>,
}

/// Samplers of all sequences of a replica.
pub struct Samplers {
    compiler: Option<GrammarCompiler>,
    sequences: BTreeMap<SequenceId, Sampling>,
    mask: Vec<u32>,
    scratch: SamplerScratch,
}

impl std::fmt::Debug for Samplers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Samplers").field("sequences", &self.sequences.len()).finish_non_exhaustive()
    }
}

impl Samplers {
    /// Samplers over a vocabulary of `vocab_size` tokens. Without a compiler, grammars are refused.
    pub fn new(vocab_size: usize, compiler: Option<GrammarCompiler>) -> Samplers {
        Samplers {
            compiler,
            sequences: BTreeMap::new(),
            mask: vec![0; vocab_size.div_ceil(32)],
            scratch: SamplerScratch::default(),
        }
    }

    /// Starts a sequence; tokens generated before are observed, never re-sampled.
    pub fn begin(&mut self, new: NewSequence) {
        let mut sampling = Sampling {
            prompt_len: new.prompt.len() as u32,
            sampler: SamplerState::new(&new.sampling, &new.prompt),
            top_logprobs: new.sampling.top_logprobs.unwrap_or(0),
            matcher: None,
            fault: None,
        };
        if let Some(spec) = &new.sampling.grammar {
            match self.compiler.as_ref().map(|compiler| Matcher::new(compiler, spec)) {
                Some(Ok(matcher)) => sampling.matcher = Some(matcher),
                Some(Err(error)) => sampling.fault = Some(grammar_fault(&error)),
                None => {
                    let message = "this node has no tokenizer.json, needed for grammars".into();
                    sampling.fault = Some((FailureKind::Internal, message));
                }
            }
        }
        self.sequences.insert(new.id, sampling);
        self.observe(new.id, &new.generated);
    }

    /// These tokens became part of the sequence.
    pub fn observe(&mut self, id: SequenceId, tokens: &[TokenId]) {
        let Some(sampling) = self.sequences.get_mut(&id) else { return };
        for &token in tokens {
            sampling.sampler.observe(token);
            if let Some(matcher) = &mut sampling.matcher
                && let Err(error) = matcher.accept(token)
            {
                sampling.fault.get_or_insert(grammar_fault(&error));
            }
        }
    }

    /// Forgets a sequence.
    pub fn end(&mut self, id: SequenceId) {
        self.sequences.remove(&id);
    }

    /// Samples the successor of the token at `position` from the logits of its row, which are overwritten.
    pub fn sample(
        &mut self,
        kernels: &Kernels,
        id: SequenceId,
        position: u32,
        logits: &mut [f32],
    ) -> Result<SampledToken, FailedSequence> {
        let failed = |(kind, message)| FailedSequence { id, kind, message };
        let unknown = || failed((FailureKind::Internal, "the sequence is unknown".into()));
        let sampling = self.sequences.get_mut(&id).ok_or_else(unknown)?;
        if let Some(fault) = &sampling.fault {
            return Err(failed(fault.clone()));
        }
        let next = position + 1;
        let mut mask = None;
        if let Some(matcher) = &mut sampling.matcher {
            matcher.mask(&mut self.mask).map_err(|error| failed(grammar_fault(&error)))?;
            mask = Some(self.mask.as_slice());
        }
        let grammar_complete = sampling.matcher.as_ref().is_some_and(Matcher::is_stopped);
        // A complete answer cannot grow to `min_tokens`: its end may come at once.
        let generated = if grammar_complete { u32::MAX } else { next - sampling.prompt_len };
        let sampled = sampling
            .sampler
            .sample(kernels, logits, next, generated, mask, &mut self.scratch)
            .map_err(|error| {
                let kind = match error {
                    SampleError::NothingAllowed => FailureKind::Invalid,
                    SampleError::NotFinite => FailureKind::Internal,
                };
                failed((kind, error.to_string()))
            })?;
        Ok(SampledToken {
            id,
            position: next,
            token: sampled.token,
            logprobs: sampled.logprobs,
            grammar_complete,
        })
    }

    /// Log-probability of `token` under the logits of the row before it.
    pub fn score(
        &self,
        kernels: &Kernels,
        id: SequenceId,
        logits: &[f32],
        token: TokenId,
    ) -> Option<TokenLogprobs> {
        let top = self.sequences.get(&id)?.top_logprobs;
        score(kernels, logits, token, top).ok()
    }
}
