//! The token trie of a model, built once, and compilation of grammars within limits.

use crate::limits;
use ashlar_tokenizer::Tokenizer;
use ashlar_vocabulary::sampling::GrammarSpec;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{JsonCompileOptions, ParserFactory};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, Once, PoisonError};
use toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// Compiled grammars that are kept: a client's requests, and the choices of one request, repeat the same one.
const CACHED_MAX: usize = 32;
/// Larger automata are compiled anew: a cache of them would take gigabytes.
const CACHED_BYTES_MAX: usize = 4 << 20;

/// Why a grammar cannot be used. All but [`GrammarError::NoEndToken`] and [`GrammarError::MaskLength`] are the
/// client's to mend, or the model's answer that went too far.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum GrammarError {
    /// The schema is no JSON.
    #[error("the schema is not valid JSON: {0}")]
    NotJson(String),
    /// The grammar does not compile, or says what is not supported.
    #[error("the grammar cannot be used: {0}")]
    Invalid(String),
    /// Some size of the grammar exceeds its limit.
    #[error("the grammar is too large: its {what} may be at most {limit}; simplify it")]
    TooLarge {
        /// Which size.
        what: &'static str,
        /// Its limit.
        limit: usize,
    },
    /// Following the grammar became too expensive in the middle of an answer, or came to a point where no token fits.
    #[error("the grammar cannot be followed any further: {0}; simplify it")]
    TooComplex(String),
    /// A token was given that the grammar does not allow here.
    #[error("token {token} is not allowed by the grammar at this point")]
    NotAllowed {
        /// The token.
        token: u32,
    },
    /// The model has no end-of-sequence token, so no grammar could ever end.
    #[error("the model has no end-of-sequence token: set eos_token_id in its generation_config.json")]
    NoEndToken,
    /// The buffer for a mask has the wrong length.
    #[error("a mask of this vocabulary takes {expected} words, not {given}")]
    MaskLength {
        /// ⌈vocabulary / 32⌉.
        expected: usize,
        /// Length of the buffer.
        given: usize,
    },
    /// The grammar engine failed in a way that is not the client's doing.
    #[error("the grammar engine failed: {0}")]
    Internal(String),
}

/// Compiles grammars for one model. Cloning shares the token trie and the cache.
#[derive(Clone)]
pub struct GrammarCompiler {
    inner: Arc<Inner>,
}

struct Inner {
    factory: ParserFactory,
    vocab_size: usize,
    eos: Vec<u32>,
    /// Fresh matchers of recent grammars, most recent last. The lock is never held while compiling.
    cache: Mutex<VecDeque<(GrammarSpec, llguidance::Matcher)>>,
}

impl GrammarCompiler {
    /// Builds the token trie. `vocab_size` is the width of the model's logits; ids between the tokenizer's
    /// vocabulary and it are padding and never allowed.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<GrammarCompiler, GrammarError> {
        let internal = |e: String| GrammarError::Internal(e);
        let eos: Vec<u32> =
            tokenizer.eos_token_ids().iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let &first_eos = eos.first().ok_or(GrammarError::NoEndToken)?;
        let width = u32::try_from(vocab_size).map_err(|e| internal(e.to_string()))?;
        let words: Vec<Vec<u8>> = (0..width).map(|id| trie_word(tokenizer, &eos, id)).collect();
        let factory = guarded(|| {
            let trie = TokTrie::from(&TokRxInfo::new(width, first_eos), &words).with_eos_tokens(&eos);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let mut factory = ParserFactory::new_simple(&env).map_err(|e| internal(e.to_string()))?;
            factory.quiet();
            *factory.limits_mut() = limits_of_one_grammar();
            keep_panic_hook(&factory);
            Ok(factory)
        })?;
        let cache = Mutex::new(VecDeque::with_capacity(CACHED_MAX));
        Ok(GrammarCompiler { inner: Arc::new(Inner { factory, vocab_size, eos, cache }) })
    }

    /// Whether a grammar can be used; the error is fit for a 400.
    pub fn check(&self, spec: &GrammarSpec) -> Result<(), GrammarError> {
        self.fresh(spec).map(|_| ())
    }

    /// Width of the masks in tokens.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    pub(crate) fn is_eos(&self, token: u32) -> bool {
        self.inner.eos.binary_search(&token).is_ok()
    }

    pub(crate) fn eos(&self) -> &[u32] {
        &self.inner.eos
    }

    /// A matcher at the start of this grammar, compiled or taken from the cache.
    pub(crate) fn fresh(&self, spec: &GrammarSpec) -> Result<llguidance::Matcher, GrammarError> {
        {
            let mut cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(index) = cache.iter().position(|(cached, _)| cached == spec)
                && let Some(hit) = cache.remove(index)
            {
                let matcher = hit.1.deep_clone();
                cache.push_back(hit);
                return Ok(matcher);
            }
        }
        let (matcher, bytes) = self.compile(spec)?;
        if bytes > CACHED_BYTES_MAX {
            return Ok(matcher);
        }
        let copy = matcher.deep_clone();
        let mut cache = self.inner.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() >= CACHED_MAX {
            cache.pop_front();
        }
        cache.push_back((spec.clone(), copy));
        Ok(matcher)
    }

    /// A matcher, and what its automaton takes, in bytes.
    fn compile(&self, spec: &GrammarSpec) -> Result<(llguidance::Matcher, usize), GrammarError> {
        let grammar = match spec {
            GrammarSpec::JsonObject => TopLevelGrammar::from_json_schema(with_options(
                json!({"type": "object"}),
                &response_options(),
            )),
            GrammarSpec::JsonSchema(source) => {
                limits::check_source(source, &['"'])?;
                let schema: Value =
                    serde_json::from_str(source).map_err(|e| GrammarError::NotJson(e.to_string()))?;
                limits::check_schema(&schema)?;
                TopLevelGrammar::from_json_schema(with_options(schema, &response_options()))
            }
            GrammarSpec::Lark(source) => {
                limits::check_lark(source)?;
                TopLevelGrammar::from_lark(source.clone())
            }
        };
        // Compiling follows references as deep as they go, which the source's length alone bounds: on a stack of its own,
        // large enough for that, since an overflow would end the process.
        let factory = &self.inner.factory;
        let compile = || {
            guarded(|| {
                let parser = factory.create_parser(grammar);
                let bytes = parser.as_ref().map_or(0, |parser| parser.parser.lexer_stats().num_bytes);
                Ok((llguidance::Matcher::new(parser), bytes))
            })
        };
        let (matcher, bytes) = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("grammar".into()).stack_size(COMPILER_STACK_BYTES);
            let compiling = thread
                .spawn_scoped(scope, compile)
                .map_err(|error| GrammarError::Internal(error.to_string()))?;
            compiling.join().unwrap_or_else(|_| Err(GrammarError::Internal("the compiler panicked".into())))
        })?;
        match matcher.get_error() {
            None => Ok((matcher, bytes)),
            Some(reason) => Err(GrammarError::Invalid(told(&reason))),
        }
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocab_size", &self.inner.vocab_size).finish_non_exhaustive()
    }
}

/// Stack of a compilation: reserved, and touched only as deep as a grammar goes. The longest source holds some 10,000
/// references, each of which takes less than 4 KiB.
const COMPILER_STACK_BYTES: usize = 128 << 20;

/// The engine catches its own panics, and puts a hook in the place of the process's for that: one that resolves a backtrace each time,
/// which takes a tenth of a second and 70 MiB. It does so once; the process's own comes back.
fn keep_panic_hook(factory: &ParserFactory) {
    static KEPT: Once = Once::new();
    KEPT.call_once(|| {
        let ours = std::panic::take_hook();
        drop(factory.create_parser(TopLevelGrammar::from_json_schema(json!({"type": "null"}))));
        drop(std::panic::take_hook());
        std::panic::set_hook(ours);
    });
}

/// What the engine says, for a client: of a panic of its own nothing but that, since its words are about its code.
pub(crate) fn told(reason: &impl ToString) -> String {
    let reason = reason.to_string();
    let panicked = reason.starts_with("panic: ") || reason.contains("<backtrace>");
    if panicked {
        "the grammar engine fails on it, as with bounds at -2^63 and below".to_owned()
    } else {
        reason
    }
}

/// Bounds the work of one compilation to some 100 ms and that of one mask to some 20 ms.
fn limits_of_one_grammar() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2_000,
        max_lexer_states: 25_000,
        max_grammar_size: 200_000,
        precompute_large_lexemes: true,
        // Errors go to clients, who have the grammar.
        verbose_errors: false,
    }
}

/// How the JSON of a response may look.
pub(crate) fn response_options() -> JsonCompileOptions {
    JsonCompileOptions {
        // A small model can stay in whitespace forever; this much serves any indentation.
        whitespace_pattern: Some(r"[\x20\x0A\x0D\x09]{1,40}".to_string()),
        // `oneOf` that cannot be proved exclusive is taken as `anyOf`.
        coerce_one_of: true,
        ..JsonCompileOptions::default()
    }
}

/// How the arguments of a tool call look: on one line, as every chat template writes the calls that it shows the model.
pub(crate) fn arguments_options() -> JsonCompileOptions {
    JsonCompileOptions {
        whitespace_flexible: false,
        item_separator: ", ".to_string(),
        key_separator: ": ".to_string(),
        coerce_one_of: true,
        lenient: true,
        ..JsonCompileOptions::default()
    }
}

/// Adds our compilation options to a schema, in the place of any that a client wrote there.
pub(crate) fn with_options(schema: Value, options: &JsonCompileOptions) -> Value {
    let mut schema = match schema {
        Value::Object(object) => Value::Object(object),
        // `true` allows everything; other values are left for the compiler to refuse.
        Value::Bool(true) => json!({}),
        other => return other,
    };
    options.apply_to(&mut schema);
    schema
}

/// The bytes by which the trie knows a token. Special tokens are marked with 0xFF, which no text contains.
fn trie_word(tokenizer: &Tokenizer, eos: &[u32], id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id);
    if tokenizer.is_special(id) || eos.contains(&id) {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat()
    } else if bytes.first() == Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        // A byte token of 0xFF would pass for the marker, and is in no valid text.
        Vec::new()
    } else {
        bytes.to_vec()
    }
}

/// Runs the engine so that a panic inside becomes an error.
pub(crate) fn guarded<T>(run: impl FnOnce() -> Result<T, GrammarError>) -> Result<T, GrammarError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or("panic without a message");
        Err(GrammarError::Internal(text.to_string()))
    })
}
