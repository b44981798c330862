//! A checkpoint's tokenizer with the ids and flags of its special tokens.

use crate::checkpoint_files::{CheckpointFiles, read_text};
use crate::encoder::{Encoder, guarded};
use crate::gguf::{GgufVocabulary, GgufVocabularyError};
use crate::incremental::{IncrementalDecoder, SpecialTokens, TextStart};
use crate::markers::{ReasoningMarkers, ToolFormat};
use crate::pieces::{LeadingSpace, Piece, read_decoder};
use crate::pipeline;
use crate::template::{ChatTemplate, TemplateError};
use ashlar_gguf::{GgufError, GgufFiles};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A vocabulary larger than this is taken for a broken file (ids are dense, so memory follows the largest id).
pub(crate) const VOCAB_SIZE_MAX: u32 = 4 << 20;

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is there but cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The reason.
        source: std::io::Error,
    },
    /// A GGUF file that cannot be used.
    #[error(transparent)]
    GgufFile(#[from] GgufError),
    /// The directory holds no tokenizer.
    #[error("{} is missing: the model directory must contain it", file.display())]
    Missing {
        /// The file that should be there.
        file: PathBuf,
    },
    /// A file is not the JSON that it should be.
    #[error("{} is not valid JSON of the expected shape: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where parsing stopped.
        source: serde_json::Error,
    },
    /// `tokenizer.json` is JSON but no tokenizer.
    #[error("{} cannot be loaded as a tokenizer: {reason}", file.display())]
    Load {
        /// The file.
        file: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The way this tokenizer writes bytes is unknown, so its text could not be streamed exactly.
    #[error("{} has a decoder other than byte-level or sentencepiece: use a model with one of these", file.display())]
    UnsupportedDecoder {
        /// The file.
        file: PathBuf,
    },
    /// A field has the wrong type.
    #[error("{file}: `{field}` must be {expected}")]
    Field {
        /// The file.
        file: String,
        /// The field.
        field: &'static str,
        /// What it must be.
        expected: &'static str,
    },
    /// The chat template does not compile.
    #[error("{file}: the chat template is unusable: {source}")]
    Template {
        /// The file that holds it.
        file: String,
        /// Why.
        source: TemplateError,
    },
    /// The vocabulary of a GGUF file is unusable, or this tokenizer cannot be written as one.
    #[error(transparent)]
    Gguf(#[from] GgufVocabularyError),
    /// A text could not be encoded.
    #[error("the text cannot be encoded: {0}")]
    Encode(String),
}

/// Tokens of a text and where they stand in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedText {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each token the byte of the text at which it begins.
    pub starts: Vec<usize>,
}

/// A checkpoint's tokenizer. Cloning shares it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

struct Inner {
    encoder: Encoder,
    /// By token id; ids that the vocabulary skips have no bytes.
    pieces: Vec<Piece>,
    leading_space: LeadingSpace,
    eos: Vec<u32>,
    /// The one of them that a text is closed with.
    end: Option<u32>,
    bos: Option<u32>,
    template: Option<ChatTemplate>,
    tool_format: Option<ToolFormat>,
    reasoning: Option<ReasoningMarkers>,
    /// Special tokens that a parser of the output must see. Sorted.
    markers: Vec<u32>,
}

/// What every kind of file must give to make a tokenizer.
pub(crate) struct Parts {
    pub(crate) encoder: Encoder,
    /// By token id.
    pub(crate) pieces: Vec<Piece>,
    pub(crate) leading_space: LeadingSpace,
    pub(crate) eos: Vec<u32>,
    pub(crate) bos: Option<u32>,
    /// Default template, with the file or key that it came from.
    pub(crate) template: Option<(String, String)>,
    pub(crate) tool_template: Option<String>,
    /// Special tokens by role, as templates see them.
    pub(crate) special_tokens: Map<String, Value>,
}

impl Tokenizer {
    /// Loads the tokenizer of a model, whether `path` names a directory or a GGUF file.
    pub fn open(path: impl AsRef<Path>) -> Result<Tokenizer, TokenizerError> {
        let path = path.as_ref();
        if !path.is_file() {
            return Tokenizer::from_dir(path);
        }
        let files = GgufFiles::open(path)?;
        Tokenizer::from_gguf(GgufVocabulary::from_metadata(files.metadata())?)
    }

    /// Loads `tokenizer.json` and what stands beside it: `tokenizer_config.json`, `special_tokens_map.json`,
    /// `generation_config.json`, `config.json` and `chat_template.jinja`, each of them optional.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Tokenizer, TokenizerError> {
        let dir = dir.as_ref();
        let files = CheckpointFiles::read(dir)?;
        let file = dir.join("tokenizer.json");
        let json = read_text(dir, "tokenizer.json")?
            .ok_or_else(|| TokenizerError::Missing { file: file.clone() })?;
        Tokenizer::build(&json, file, files)
    }

    /// Loads a `tokenizer.json` alone, without ids from other files and without a template.
    pub fn from_json(json: &str) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::build(json, PathBuf::from("tokenizer.json"), CheckpointFiles::default())
    }

    pub(crate) fn build(
        json: &str,
        file: PathBuf,
        files: CheckpointFiles,
    ) -> Result<Tokenizer, TokenizerError> {
        /// What `tokenizers` does not show of the file.
        #[derive(Deserialize)]
        struct Hidden {
            #[serde(default)]
            decoder: Value,
            #[serde(default)]
            added_tokens: Vec<Added>,
        }
        #[derive(Deserialize)]
        struct Added {
            id: u32,
            content: String,
        }
        let load = |reason: String| TokenizerError::Load { file: file.clone(), reason };
        let malformed = |source| TokenizerError::Json { file: file.clone(), source };
        let Hidden { decoder, added_tokens } = serde_json::from_str(json).map_err(malformed)?;
        let (coding, leading_space) = read_decoder(&decoder)
            .ok_or_else(|| TokenizerError::UnsupportedDecoder { file: file.clone() })?;
        pipeline::check(&serde_json::from_str(json).map_err(malformed)?).map_err(load)?;
        let mut encoder = guarded(|| tokenizers::Tokenizer::from_bytes(json.as_bytes()))
            .map_err(|e| load(e.to_string()))?;
        // A file may carry the lengths of some training run; serving must see the whole text.
        encoder.with_truncation(None).map_err(|e| load(e.to_string()))?;
        encoder.with_padding(None);
        // `tokenizers` numbers an added token that the vocabulary lacks after the vocabulary's size, whatever the file says.
        for Added { id, content } in &added_tokens {
            if let Some(found) = encoder.token_to_id(content).filter(|found| found != id) {
                return Err(load(format!(
                    "its added token `{content}` has id {id}, but the vocabulary makes it {found}: give the vocabulary \
                     no holes, or name the token there, too"
                )));
            }
        }

        let vocab = encoder.get_vocab(true);
        let size = vocab.values().max().map_or(0, |&id| id.saturating_add(1));
        if size == 0 || size > VOCAB_SIZE_MAX {
            return Err(load(format!(
                "its largest token id gives a vocabulary of {size}, outside 1..={VOCAB_SIZE_MAX}"
            )));
        }
        let mut pieces = vec![Piece { bytes: Box::default(), special: false }; size as usize];
        for (token, id) in vocab {
            pieces[id as usize].bytes = coding.bytes(&token);
        }
        for (id, added) in encoder.get_added_tokens_decoder() {
            if let Some(piece) = pieces.get_mut(id as usize) {
                *piece = Piece { bytes: coding.added_bytes(&added.content), special: added.special };
            }
        }

        let id_of = |role: &str| {
            files.special_tokens.get(role).and_then(Value::as_str).and_then(|text| encoder.token_to_id(text))
        };
        let mut eos = files.eos_ids.clone();
        eos.extend(id_of("eos_token"));
        let bos = id_of("bos_token").or(files.bos_id);
        Tokenizer::assemble(Parts {
            encoder: Encoder::standard(encoder),
            pieces,
            leading_space,
            eos,
            bos,
            template: files.template,
            tool_template: files.tool_template,
            special_tokens: files.special_tokens,
        })
    }

    /// Compiles the template and finds the markers. Ids outside the vocabulary are dropped.
    pub(crate) fn assemble(parts: Parts) -> Result<Tokenizer, TokenizerError> {
        let Parts { encoder, pieces, leading_space, mut eos, bos, template, tool_template, special_tokens } =
            parts;
        let known = |&id: &u32| (id as usize) < pieces.len();
        eos.retain(known);
        eos.sort_unstable();
        eos.dedup();
        let bos = bos.filter(known);
        let end = special_tokens
            .get("eos_token")
            .and_then(Value::as_str)
            .and_then(|text| encoder.token_to_id(text))
            .filter(known)
            // Some models end a text with the token that begins the next one; that is the last choice.
            .or_else(|| eos.iter().copied().find(|&id| Some(id) != bos))
            .or_else(|| eos.first().copied());

        let sources = [tool_template.as_deref(), template.as_ref().map(|(source, _)| source.as_str())];
        let sources = || sources.into_iter().flatten();
        let tool_format = sources().find_map(ToolFormat::detect);
        let reasoning = sources().find_map(ReasoningMarkers::detect);
        let mut markers: Vec<u32> = tool_format
            .iter()
            .flat_map(|format| format.markers())
            .copied()
            .chain(reasoning.iter().flat_map(|r| [r.start.as_str(), r.end.as_str()]))
            .filter_map(|text| encoder.token_to_id(text))
            .collect();
        markers.sort_unstable();
        markers.dedup();

        let template = match &template {
            Some((source, from)) => Some(
                ChatTemplate::new(source, tool_template.as_deref(), special_tokens)
                    .map_err(|source| TokenizerError::Template { file: from.clone(), source })?,
            ),
            None => None,
        };
        let inner = Inner {
            encoder,
            pieces,
            leading_space,
            eos,
            end,
            bos,
            template,
            tool_format,
            reasoning,
            markers,
        };
        Ok(Tokenizer { inner: Arc::new(inner) })
    }

    /// Tokens of a text. Special tokens written in the text become those tokens; `add_special` adds what the
    /// tokenizer puts around a text (usually the beginning-of-sequence token).
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.inner.encoder.encode(text, add_special).map_err(|e| TokenizerError::Encode(e.to_string()))
    }

    /// Tokens of a rendered chat. Nothing is added: the template has written every special token itself.
    pub fn encode_chat(&self, rendered: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode(rendered, false)
    }

    /// The tokens of [`Tokenizer::encode`] with the byte of the text at which each begins: 0 for what is added before
    /// the text, its length for what is added after. A token of a part of a character begins where the character does,
    /// or within it.
    pub fn encode_with_starts(&self, text: &str, add_special: bool) -> Result<EncodedText, TokenizerError> {
        let encoded = self.inner.encoder.encode_with_starts(text, add_special);
        let (ids, starts) = encoded.map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(EncodedText { ids, starts })
    }

    /// Text of tokens that begin a text. Bytes that are no UTF-8 become U+FFFD, as `String::from_utf8_lossy` does.
    /// (`tokenizers` differs there for sentencepiece: it replaces a whole run of byte tokens, even its good part.)
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let special = if skip_special { SpecialTokens::Hide } else { SpecialTokens::Show };
        let mut decoder = self.incremental(special, TextStart::Beginning);
        let mut text = decoder.push_all(ids);
        text.push_str(&decoder.finish());
        text
    }

    /// A decoder for a stream of tokens.
    pub fn incremental(&self, special: SpecialTokens, start: TextStart) -> IncrementalDecoder {
        IncrementalDecoder::new(self, special, start)
    }

    /// Every token that ends a sequence: the union of `generation_config.json`, `config.json` and the tokenizer's
    /// own. Sorted.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.inner.eos
    }

    /// The token that closes a text: the tokenizer's `eos_token`, else one of [`Tokenizer::eos_token_ids`].
    pub fn end_token_id(&self) -> Option<u32> {
        self.inner.end
    }

    /// The token that begins a sequence, if the model has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.inner.bos
    }

    /// One more than the largest token id. A model's logits may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.pieces.len()
    }

    /// The id of a token given as it stands in the vocabulary (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.encoder.token_to_id(token)
    }

    /// The exact bytes of a token in the middle of a text; a special token's are its name. Empty for unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.inner.pieces.get(id as usize).map_or(&[], |piece| &piece.bytes)
    }

    /// Text of one token for log-probabilities, beside [`Tokenizer::token_bytes`]; parts of characters become U+FFFD.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.token_bytes(id)).into_owned()
    }

    /// Whether this is a control token, which is not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner.pieces.get(id as usize).is_some_and(|piece| piece.special)
    }

    /// Whether this token marks a tool call or reasoning.
    pub fn is_marker(&self, id: u32) -> bool {
        self.inner.markers.binary_search(&id).is_ok()
    }

    /// The checkpoint's chat template.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.inner.template.as_ref()
    }

    /// How this model writes tool calls, told from its template.
    pub fn tool_format(&self) -> Option<ToolFormat> {
        self.inner.tool_format
    }

    /// How this model marks reasoning, told from its template.
    pub fn reasoning(&self) -> Option<&ReasoningMarkers> {
        self.inner.reasoning.as_ref()
    }

    /// Every token with its id, as it stands in the vocabulary.
    pub(crate) fn vocabulary(&self) -> HashMap<String, u32> {
        self.inner.encoder.vocabulary()
    }

    pub(crate) fn leading_space(&self) -> LeadingSpace {
        self.inner.leading_space
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("bos", &self.inner.bos)
            .field("eos", &self.inner.eos)
            .field("tool_format", &self.inner.tool_format)
            .finish_non_exhaustive()
    }
}
