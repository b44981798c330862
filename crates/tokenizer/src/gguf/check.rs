//! What is refused about a vocabulary, before anything is built from it.

use super::{GgufVocabulary, pre_tokenizers};
use crate::tokenizer::VOCAB_SIZE_MAX;
use std::collections::{HashMap, HashSet};

/// `tokenizer.ggml.model` of sentencepiece by scores.
pub(crate) const LLAMA: &str = "llama";
/// `tokenizer.ggml.model` of byte-level pairs by merges.
pub(crate) const GPT2: &str = "gpt2";
/// A longer token is taken for a broken file; real ones have at most some hundred bytes.
const TOKEN_BYTES_MAX: usize = 64 << 10;

/// Why a vocabulary cannot be used, or a tokenizer not be written as one.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum GgufVocabularyError {
    /// The kind of tokenizer is not known here.
    #[error(
        "tokenizer.ggml.model is `{model}`: only `llama` and `gpt2` are supported, so use the model's directory with \
         its tokenizer.json instead"
    )]
    UnsupportedModel {
        /// What the file says.
        model: String,
    },
    /// The way to cut words is not known here.
    #[error("tokenizer.ggml.pre is `{pre}`, which is not supported: known are {known}")]
    UnknownPreTokenizer {
        /// What the file says.
        pre: String,
        /// All that are known.
        known: String,
    },
    /// A key that this kind of tokenizer needs is missing.
    #[error("tokenizer.ggml.{key} is missing, but a `{model}` tokenizer needs it: convert the model again")]
    Missing {
        /// The key without its prefix.
        key: &'static str,
        /// The kind of tokenizer.
        model: String,
    },
    /// No tokens, or too many to be a real vocabulary.
    #[error("tokenizer.ggml.tokens has {size} tokens: there must be 1 to {max}")]
    Size {
        /// How many there are.
        size: usize,
        /// The most that are accepted.
        max: u32,
    },
    /// A list that goes by token id has another length.
    #[error("tokenizer.ggml.{key} has {length} entries for {tokens} tokens: both must be the same")]
    Length {
        /// The key without its prefix.
        key: &'static str,
        /// Its length.
        length: usize,
        /// How many tokens there are.
        tokens: usize,
    },
    /// A token is too long to be real.
    #[error("token {id} has {bytes} bytes: a token may have at most {max}")]
    TokenTooLong {
        /// Which token.
        id: usize,
        /// Its length.
        bytes: usize,
        /// The longest that is accepted.
        max: usize,
    },
    /// A score is not a number.
    #[error("tokenizer.ggml.scores holds no number for token {id}: convert the model again")]
    Score {
        /// Which token.
        id: usize,
    },
    /// An id is not in the vocabulary.
    #[error("tokenizer.ggml.{key} is {id}, but there are only {size} tokens")]
    Id {
        /// The key without its prefix.
        key: &'static str,
        /// What it says.
        id: u32,
        /// How many tokens there are.
        size: usize,
    },
    /// A flag asks for a token that the file does not name.
    #[error("tokenizer.ggml.{flag} is true, but tokenizer.ggml.{key} is missing: set both or neither")]
    FlagWithoutId {
        /// The flag without its prefix.
        flag: &'static str,
        /// The key without its prefix.
        key: &'static str,
    },
    /// A merge is not two tokens with a space between.
    #[error("tokenizer.ggml.merges[{index}] is {merge:?}: it must be two tokens with a space between")]
    Merge {
        /// Which merge.
        index: usize,
        /// Its text, shortened.
        merge: String,
    },
    /// A merge names or makes a text that is no token.
    #[error("tokenizer.ggml.merges[{index}] needs the token {token:?}, which is not in the vocabulary")]
    MergeToken {
        /// Which merge.
        index: usize,
        /// The missing token, shortened.
        token: String,
    },
    /// The embedded `tokenizer.json` numbers tokens differently from the list of tokens.
    #[error(
        "tokenizer.huggingface.json and tokenizer.ggml.tokens disagree about token {id}: convert the model again, or \
         leave the former out"
    )]
    Disagreement {
        /// The first id where they differ.
        id: u32,
    },
    /// The pieces are valid one by one, but the tokenizer cannot be built of them.
    #[error("no tokenizer can be built from this vocabulary: {0}")]
    Build(String),
    /// A checkpoint's tokenizer that GGUF has no form for, or none that is known here.
    #[error("the tokenizer cannot be written as GGUF: {0}")]
    NotExportable(String),
}

/// A merge as its two tokens.
pub(crate) type Merge = (String, String);

impl GgufVocabulary {
    /// Checks what the lists alone must hold to encode text, except for the merges, which [`parse_merges`] checks.
    pub(crate) fn check_encoding(&self) -> Result<(), GgufVocabularyError> {
        let missing = |key| GgufVocabularyError::Missing { key, model: self.model.clone() };
        match self.model.as_str() {
            LLAMA if self.scores.is_none() => Err(missing("scores")),
            GPT2 if self.merges.is_none() => Err(missing("merges")),
            GPT2 if pre_tokenizers::by_name(self.pre.as_deref()).is_none() => {
                Err(GgufVocabularyError::UnknownPreTokenizer {
                    pre: shortened(self.pre.as_deref().unwrap_or_default()),
                    known: pre_tokenizers::names(),
                })
            }
            LLAMA | GPT2 => Ok(()),
            other => Err(GgufVocabularyError::UnsupportedModel { model: shortened(other) }),
        }
    }

    /// Checks lengths, numbers and ids.
    pub(crate) fn check_lists(&self) -> Result<(), GgufVocabularyError> {
        let size = self.tokens.len();
        if size == 0 || size > VOCAB_SIZE_MAX as usize {
            return Err(GgufVocabularyError::Size { size, max: VOCAB_SIZE_MAX });
        }
        let lengths = [
            ("scores", self.scores.as_ref().map(Vec::len)),
            ("token_type", self.token_types.as_ref().map(Vec::len)),
        ];
        for (key, length) in lengths {
            if let Some(length) = length.filter(|&length| length != size) {
                return Err(GgufVocabularyError::Length { key, length, tokens: size });
            }
        }
        let longest = self.tokens.iter().enumerate().max_by_key(|(_, token)| token.len());
        if let Some((id, token)) = longest.filter(|(_, token)| token.len() > TOKEN_BYTES_MAX) {
            return Err(GgufVocabularyError::TokenTooLong { id, bytes: token.len(), max: TOKEN_BYTES_MAX });
        }
        if let Some(id) = self.scores.iter().flatten().position(|score| score.is_nan()) {
            return Err(GgufVocabularyError::Score { id });
        }
        self.check_ids(size)
    }

    fn check_ids(&self, size: usize) -> Result<(), GgufVocabularyError> {
        let named = [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("eot_token_id", self.eot),
            ("unknown_token_id", self.unknown),
            ("padding_token_id", self.padding),
        ];
        let further = self.end_of_generation.iter().map(|&id| ("eom_token_id", Some(id)));
        for (key, id) in named.into_iter().chain(further) {
            if let Some(id) = id.filter(|&id| id as usize >= size) {
                return Err(GgufVocabularyError::Id { key, id, size });
            }
        }
        Ok(())
    }
}

/// The merges in order, each once: of equal ones the first counts, as in llama.cpp.
pub(crate) fn parse_merges(
    merges: &[String],
    ids: &HashMap<String, u32>,
) -> Result<Vec<Merge>, GgufVocabularyError> {
    let mut seen = HashSet::with_capacity(merges.len());
    let mut parsed = Vec::with_capacity(merges.len());
    for (index, merge) in merges.iter().enumerate() {
        let broken = || GgufVocabularyError::Merge { index, merge: shortened(merge) };
        // The first token has a character at least, which may itself be a space.
        let first_end = merge.chars().next().map_or(0, char::len_utf8);
        let (_, rest) = merge.split_at(first_end);
        let (head, second) = rest.split_once(' ').ok_or_else(broken)?;
        let first = &merge[..first_end + head.len()];
        if second.is_empty() {
            return Err(broken());
        }
        let joined = format!("{first}{second}");
        for token in [first, second, joined.as_str()] {
            if !ids.contains_key(token) {
                return Err(GgufVocabularyError::MergeToken { index, token: shortened(token) });
            }
        }
        if seen.insert((first, second)) {
            parsed.push((first.to_string(), second.to_string()));
        }
    }
    Ok(parsed)
}

/// A text from the file, short enough for a message.
fn shortened(text: &str) -> String {
    const CHARACTERS_MAX: usize = 60;
    match text.char_indices().nth(CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}
