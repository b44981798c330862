//! A tokenizer from the vocabulary of a GGUF file.

use super::check::{self, GgufVocabularyError, parse_merges};
use super::pre_tokenizers::{self, PreTokenizer};
use super::spm::{SpmModel, SpmTokenizer};
use super::{GgufTokenType, GgufVocabulary};
use crate::checkpoint_files::CheckpointFiles;
use crate::encoder::{Encoder, Pipeline};
use crate::pieces::{LeadingSpace, Piece, PieceCoding};
use crate::tokenizer::{Parts, Tokenizer, TokenizerError};
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::PathBuf;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{self, Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

/// Names that end a generation wherever they are tokens. Converters often record only one id, and llama.cpp finds
/// the others by these names.
const END_NAMES: [&str; 21] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// The key of an embedded `tokenizer.json`, for messages.
const HUGGINGFACE_JSON: &str = "tokenizer.huggingface.json";

impl Tokenizer {
    /// Builds a tokenizer from the metadata of a GGUF file. It encodes as llama.cpp does, except that text is
    /// normalised to NFC where the models of a `pre` do so; its `encode` adds what `add_bos` and `add_eos` say.
    pub fn from_gguf(vocabulary: GgufVocabulary) -> Result<Tokenizer, TokenizerError> {
        vocabulary.check_lists()?;
        let roles = Roles::of(&vocabulary);
        let ends = end_ids(&vocabulary, &roles);
        let special_tokens = roles.texts(&vocabulary);
        let template =
            vocabulary.chat_template.clone().map(|source| (source, "tokenizer.chat_template".to_string()));
        if let Some(json) = &vocabulary.huggingface_json {
            let files = CheckpointFiles {
                special_tokens,
                eos_ids: ends,
                bos_id: roles.bos,
                template,
                tool_template: vocabulary.tool_chat_template.clone(),
            };
            let tokenizer = Tokenizer::build(json, PathBuf::from(HUGGINGFACE_JSON), files)?;
            return agree(&tokenizer, &vocabulary).map(|()| tokenizer);
        }
        vocabulary.check_encoding()?;
        let (add_bos, add_eos) = frame(&vocabulary, &roles)?;
        let is_spm = vocabulary.model == check::LLAMA;
        let add_space_prefix = vocabulary.add_space_prefix.unwrap_or(true);
        let (coding, leading_space) = match (is_spm, add_space_prefix) {
            (true, true) => (PieceCoding::Sentencepiece { byte_fallback: true }, LeadingSpace::DropOne),
            (true, false) => (PieceCoding::Sentencepiece { byte_fallback: true }, LeadingSpace::Keep),
            (false, _) => (PieceCoding::ByteLevel, LeadingSpace::Keep),
        };
        let pieces = pieces(&vocabulary, coding);
        let added = added_tokens(&vocabulary);
        let tool_template = vocabulary.tool_chat_template.clone();
        let pipeline = if is_spm {
            scored(vocabulary, added, roles.unknown, add_space_prefix)?
        } else {
            byte_level(&vocabulary, added)?
        };
        let encoder =
            Encoder { pipeline, before: roles.bos.filter(|_| add_bos), after: roles.eos.filter(|_| add_eos) };
        Tokenizer::assemble(Parts {
            encoder,
            pieces,
            leading_space,
            eos: ends,
            bos: roles.bos,
            template,
            tool_template,
            special_tokens,
        })
    }
}

/// The ids with a role.
struct Roles {
    bos: Option<u32>,
    eos: Option<u32>,
    unknown: Option<u32>,
}

impl Roles {
    /// Early files of sentencepiece models left out ids that every such model had: 0, 1 and 2.
    fn of(vocabulary: &GgufVocabulary) -> Roles {
        let usual = |id: u32, expected: GgufTokenType| {
            let there = vocabulary.model == check::LLAMA && (id as usize) < vocabulary.tokens.len();
            let untyped = vocabulary.token_types.is_none();
            (there && (untyped || vocabulary.token_type(id as usize) == expected)).then_some(id)
        };
        Roles {
            bos: vocabulary.bos.or_else(|| usual(1, GgufTokenType::Control)),
            eos: vocabulary.eos.or_else(|| usual(2, GgufTokenType::Control)),
            unknown: vocabulary.unknown.or_else(|| usual(0, GgufTokenType::Unknown)),
        }
    }

    /// The variables of a chat template.
    fn texts(&self, vocabulary: &GgufVocabulary) -> Map<String, Value> {
        let ids = [
            ("bos_token", self.bos),
            ("eos_token", self.eos),
            ("unk_token", self.unknown),
            ("pad_token", vocabulary.padding),
        ];
        let text = |id: u32| vocabulary.tokens.get(id as usize).cloned();
        ids.into_iter().filter_map(|(role, id)| Some((role.to_string(), text(id?)?.into()))).collect()
    }
}

/// Whether a text gets a first and a last token.
fn frame(vocabulary: &GgufVocabulary, roles: &Roles) -> Result<(bool, bool), GgufVocabularyError> {
    let missing = |flag, key| GgufVocabularyError::FlagWithoutId { flag, key };
    if vocabulary.add_bos == Some(true) && roles.bos.is_none() {
        return Err(missing("add_bos_token", "bos_token_id"));
    }
    if vocabulary.add_eos == Some(true) && roles.eos.is_none() {
        return Err(missing("add_eos_token", "eos_token_id"));
    }
    let usual = match pre_tokenizers::by_name(vocabulary.pre.as_deref()) {
        _ if vocabulary.model == check::LLAMA => true,
        Some(pre) => pre.add_bos,
        None => false,
    };
    Ok((vocabulary.add_bos.unwrap_or(usual), vocabulary.add_eos.unwrap_or(false)))
}

/// Whether a token is one of [`END_NAMES`]. Plain text can be spelled like some of them (`</s>` is an ordinary token
/// of Qwen), so a normal token counts only where no text looks like it.
fn named_end(vocabulary: &GgufVocabulary, id: usize, token: &str) -> bool {
    let unmistakable = token.starts_with("<|") && token.ends_with("|>");
    END_NAMES.contains(&token)
        && match vocabulary.token_type(id) {
            GgufTokenType::Control | GgufTokenType::UserDefined => true,
            GgufTokenType::Normal => unmistakable || vocabulary.token_types.is_none(),
            GgufTokenType::Unknown | GgufTokenType::Unused | GgufTokenType::Byte => false,
        }
}

/// The type of a token as it is used: those that end a generation are control tokens whatever the file says.
fn used_type(vocabulary: &GgufVocabulary, id: usize, token: &str) -> GgufTokenType {
    if named_end(vocabulary, id, token) { GgufTokenType::Control } else { vocabulary.token_type(id) }
}

/// Every id that ends a generation, by number or by name.
fn end_ids(vocabulary: &GgufVocabulary, roles: &Roles) -> Vec<u32> {
    let mut ends: Vec<u32> = roles.eos.into_iter().chain(vocabulary.eot).collect();
    ends.extend(&vocabulary.end_of_generation);
    let named: HashMap<&str, u32> = (0_u32..)
        .zip(&vocabulary.tokens)
        .filter(|&(id, token)| named_end(vocabulary, id as usize, token))
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    // Where a model has separate tokens for the end of an answer and of a call, `<|end|>` only ends a part of it.
    let parts = named.contains_key("<|call|>") && named.contains_key("<|return|>")
        || named.contains_key("<|calls|>") && named.contains_key("<|flush|>");
    let of_whole = |name: &str| !(parts && name == "<|end|>");
    ends.extend(named.iter().filter(|(name, _)| of_whole(name)).map(|(_, &id)| id));
    ends.sort_unstable();
    ends.dedup();
    ends
}

fn pieces(vocabulary: &GgufVocabulary, coding: PieceCoding) -> Vec<Piece> {
    let piece = |(id, token): (usize, &String)| {
        let (bytes, special) = match used_type(vocabulary, id, token) {
            GgufTokenType::Normal | GgufTokenType::Byte => (coding.bytes(token), false),
            GgufTokenType::UserDefined => (coding.added_bytes(token), false),
            GgufTokenType::Control | GgufTokenType::Unknown => (coding.added_bytes(token), true),
            GgufTokenType::Unused => (Box::default(), false),
        };
        Piece { bytes, special }
    };
    vocabulary.tokens.iter().enumerate().map(piece).collect()
}

/// The tokens that are found in a text before it is cut into words.
fn added_tokens(vocabulary: &GgufVocabulary) -> Vec<AddedToken> {
    let added = |(id, token): (usize, &String)| {
        let special = match used_type(vocabulary, id, token) {
            GgufTokenType::Control | GgufTokenType::Unknown => true,
            GgufTokenType::UserDefined => false,
            GgufTokenType::Normal | GgufTokenType::Unused | GgufTokenType::Byte => return None,
        };
        (!token.is_empty()).then(|| AddedToken::from(token.clone(), special).normalized(false))
    };
    vocabulary.tokens.iter().enumerate().filter_map(added).collect()
}

fn build_error(error: impl std::fmt::Display) -> GgufVocabularyError {
    GgufVocabularyError::Build(error.to_string())
}

fn scored(
    vocabulary: GgufVocabulary,
    added: Vec<AddedToken>,
    unknown: Option<u32>,
    add_space_prefix: bool,
) -> Result<Pipeline, GgufVocabularyError> {
    let scores = vocabulary.scores.unwrap_or_default();
    let mut pipeline = SpmTokenizer::new(SpmModel::new(vocabulary.tokens, scores, unknown));
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if add_space_prefix {
        // Added tokens are cut out before, so that every part between two of them gets its own space.
        steps.push(Prepend::new("▁".to_string()).into());
    }
    steps.push(Replace::new(" ", "▁").map_err(build_error)?.into());
    let steps = normalizers::Sequence::new(steps);
    pipeline.with_normalizer(Some(NormalizerWrapper::from(steps))).map_err(build_error)?;
    pipeline.add_tokens(added).map_err(build_error)?;
    Ok(Pipeline::Scored(Box::new(pipeline)))
}

fn byte_level(vocabulary: &GgufVocabulary, added: Vec<AddedToken>) -> Result<Pipeline, GgufVocabularyError> {
    let pre = pre_tokenizers::by_name(vocabulary.pre.as_deref())
        .ok_or_else(|| build_error("its pre-tokenizer is not known"))?;
    let mut ids: HashMap<String, u32> = HashMap::with_capacity(vocabulary.tokens.len());
    for (id, token) in (0_u32..).zip(&vocabulary.tokens) {
        if !token.is_empty() {
            ids.entry(token.clone()).or_insert(id);
        }
    }
    let merges = parse_merges(vocabulary.merges.as_deref().unwrap_or_default(), &ids)?;
    let model = BPE::builder()
        .vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(pre.ignore_merges)
        .build()
        .map_err(build_error)?;
    let mut pipeline = tokenizers::Tokenizer::new(model);
    if pre.nfc {
        pipeline.with_normalizer(Some(normalizers::NFC)).map_err(build_error)?;
    }
    pipeline.with_pre_tokenizer(Some(cutting(pre)?));
    pipeline.add_tokens(added).map_err(build_error)?;
    Ok(Pipeline::Standard(Box::new(pipeline)))
}

fn cutting(pre: &PreTokenizer) -> Result<Sequence, GgufVocabularyError> {
    let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
    for pattern in pre.patterns {
        let pattern = SplitPattern::Regex((*pattern).to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(build_error)?;
        steps.push(split.into());
    }
    steps.push(ByteLevel::new(false, false, false).into());
    Ok(Sequence::new(steps))
}

/// Refuses an embedded `tokenizer.json` that numbers tokens differently: the model's rows follow the list.
fn agree(tokenizer: &Tokenizer, vocabulary: &GgufVocabulary) -> Result<(), TokenizerError> {
    let differs = |(token, id): &(String, u32)| vocabulary.tokens.get(*id as usize) != Some(token);
    match tokenizer.vocabulary().into_iter().filter(differs).map(|(_, id)| id).min() {
        Some(id) => Err(GgufVocabularyError::Disagreement { id }.into()),
        None => Ok(()),
    }
}
