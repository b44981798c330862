//! One sequence's place in its grammar.

use crate::compiler::{GrammarCompiler, GrammarError, guarded, told};
use ashlar_vocabulary::sampling::GrammarSpec;

/// Follows one sequence through its grammar.
///
/// Its state is a function of the grammar and the accepted tokens: a matcher that accepts the same tokens again is
/// in the same state, whether or not masks were computed in between.
pub struct Matcher {
    compiler: GrammarCompiler,
    engine: llguidance::Matcher,
    /// An end-of-sequence token was accepted.
    ended: bool,
}

impl Matcher {
    /// A matcher at the start of a grammar.
    pub fn new(compiler: &GrammarCompiler, spec: &GrammarSpec) -> Result<Matcher, GrammarError> {
        Ok(Matcher { compiler: compiler.clone(), engine: compiler.fresh(spec)?, ended: false })
    }

    /// Length of a mask in words: ⌈vocabulary / 32⌉.
    pub fn mask_len(&self) -> usize {
        self.compiler.vocab_size().div_ceil(32)
    }

    /// Writes which tokens may come next: bit `t % 32` of word `t / 32` is set for every allowed token `t`.
    /// End-of-sequence tokens are allowed exactly where the grammar may end; once nothing else may follow, they are
    /// the only ones.
    pub fn mask(&mut self, out: &mut [u32]) -> Result<(), GrammarError> {
        let expected = self.mask_len();
        if out.len() != expected {
            return Err(GrammarError::MaskLength { expected, given: out.len() });
        }
        out.fill(0);
        if self.is_stopped() {
            self.failure()?;
            self.compiler.eos().iter().for_each(|&token| out[token as usize / 32] |= 1 << (token % 32));
            return Ok(());
        }
        let engine = &mut self.engine;
        let mask = guarded(|| engine.compute_mask_or_eos().map_err(|e| GrammarError::TooComplex(told(&e))))?;
        let words = mask.as_slice();
        let shared = words.len().min(expected);
        out[..shared].copy_from_slice(&words[..shared]);
        let last_bits = self.compiler.vocab_size() % 32;
        if last_bits > 0 {
            out[expected - 1] &= (1 << last_bits) - 1;
        }
        Ok(())
    }

    /// Moves on by one token. A token that is not allowed leaves the matcher where it was.
    pub fn accept(&mut self, token: u32) -> Result<(), GrammarError> {
        let refused = Err(GrammarError::NotAllowed { token });
        if self.compiler.is_eos(token) {
            if !self.ended && !self.may_end() {
                self.failure()?;
                return refused;
            }
            self.ended = true;
            return Ok(());
        }
        if token as usize >= self.compiler.vocab_size() || self.is_stopped() {
            self.failure()?;
            return refused;
        }
        let engine = &mut self.engine;
        let taken =
            guarded(|| engine.try_consume_tokens(&[token]).map_err(|e| GrammarError::TooComplex(told(&e))))?;
        if taken == 1 { Ok(()) } else { refused }
    }

    /// Whether the answer is complete as it stands, so that an end-of-sequence token is allowed.
    pub fn may_end(&mut self) -> bool {
        if self.is_stopped() {
            return self.failure().is_ok();
        }
        let engine = &mut self.engine;
        guarded(|| engine.is_accepting().map_err(|e| GrammarError::TooComplex(told(&e)))).unwrap_or(false)
    }

    /// Whether nothing but the end may follow. Also true after an error, which [`Matcher::mask`] then reports.
    pub fn is_stopped(&self) -> bool {
        self.ended || self.engine.is_stopped()
    }

    /// Whether an end-of-sequence token has been accepted.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Tokens that the grammar forces next, which need no sampling; empty where there is a choice, and for
    /// tokenizers whose canonical splitting is not known here.
    pub fn forced_tokens(&mut self) -> Vec<u32> {
        if self.is_stopped() {
            return Vec::new();
        }
        let engine = &mut self.engine;
        guarded(|| Ok(engine.compute_ff_tokens())).unwrap_or_default()
    }

    fn failure(&self) -> Result<(), GrammarError> {
        self.engine.get_error().map_or(Ok(()), |reason| Err(GrammarError::TooComplex(told(&reason))))
    }
}

impl std::fmt::Debug for Matcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matcher").field("ended", &self.ended).finish_non_exhaustive()
    }
}
