//! The model's text side: tokenizer, chat template, grammar checks and the defaults of its generation config.

use crate::error::GatewayError;
use crate::openai::error::ApiError;
use crate::transcript::TokenDecoder;
use ashlar_grammar::{GrammarCompiler, GrammarError};
use ashlar_tokenizer::{IncrementalDecoder, SpecialTokens, TextStart, Tokenizer};
use ashlar_vocabulary::{GrammarSpec, TokenId};
use serde::Deserialize;
use std::fmt;
use std::path::Path;

/// Everything that turns requests into tokens and tokens into answers. Immutable.
pub(crate) struct ModelText {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) defaults: GenerationDefaults,
    /// Or why this model's answers cannot be constrained.
    grammars: Result<GrammarCompiler, GrammarError>,
}

/// Sampling defaults of `generation_config.json`, used where a request is silent, as vLLM does.
#[derive(Debug, Default, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub(crate) struct GenerationDefaults {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
}

impl ModelText {
    /// Reads the files of `model_dir`.
    pub(crate) fn load(model_dir: &Path) -> Result<ModelText, GatewayError> {
        let failed = |reason: String| GatewayError::Model { model_dir: model_dir.to_owned(), reason };
        let tokenizer = Tokenizer::open(model_dir).map_err(|error| failed(error.to_string()))?;
        let file = model_dir.join("generation_config.json");
        let defaults = match std::fs::read(&file) {
            Ok(json) => serde_json::from_slice(&json)
                .map_err(|error| failed(format!("generation_config.json is malformed: {error}")))?,
            // A GGUF file has no such neighbour.
            Err(_) if model_dir.is_file() => GenerationDefaults::default(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => GenerationDefaults::default(),
            Err(error) => return Err(failed(format!("cannot read {}: {error}", file.display()))),
        };
        let grammars = GrammarCompiler::new(&tokenizer, tokenizer.vocab_size());
        Ok(ModelText { tokenizer, defaults, grammars })
    }

    /// Refuses a constraint that cannot be used; `param` is the field that it comes from.
    pub(crate) fn check_grammar(&self, spec: &GrammarSpec, param: &str) -> Result<(), ApiError> {
        let checked = match &self.grammars {
            Ok(grammars) => grammars.check(spec),
            Err(error) => Err(error.clone()),
        };
        checked.map_err(|error| ApiError::field(param, error.to_string()))
    }

    /// A decoder for one answer.
    pub(crate) fn decoder(&self, special: SpecialTokens, start: TextStart) -> AnswerDecoder {
        AnswerDecoder(self.tokenizer.incremental(special, start))
    }
}

impl fmt::Debug for ModelText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelText").field("tokenizer", &self.tokenizer).finish_non_exhaustive()
    }
}

/// The tokenizer's incremental decoder, as a transcript wants it.
#[derive(Debug)]
pub(crate) struct AnswerDecoder(IncrementalDecoder);

impl TokenDecoder for AnswerDecoder {
    fn push(&mut self, token: TokenId) -> String {
        self.0.push(token)
    }

    fn finish(&mut self) -> String {
        self.0.finish()
    }
}
