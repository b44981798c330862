//! A checkpoint's tokenizer as the vocabulary of a GGUF file.

use super::check::{GPT2, GgufVocabularyError, LLAMA};
use super::export_json::{TokenizerJson, frame, patterns, spaces, steps};
use super::{GgufTokenType, GgufVocabulary, padding_token, pre_tokenizers};
use crate::checkpoint_files::{CheckpointFiles, read_text};
use crate::pieces::{PieceCoding, fallback_byte, read_decoder};
use crate::tokenizer::{Tokenizer, TokenizerError};
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// A vocabulary to write, and where it says less than the tokenizer that it was made of.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufExport {
    /// What to write.
    pub vocabulary: GgufVocabulary,
    /// Each a sentence for the person who exports. Where there are none, llama.cpp encodes as the checkpoint does.
    pub notes: Vec<String>,
}

impl GgufVocabulary {
    /// The vocabulary of a model directory: of its `tokenizer.json` and the files that [`Tokenizer::from_dir`] reads.
    ///
    /// It has as many tokens as the tokenizer; where the model has more rows, see [`GgufVocabulary::pad_to`].
    pub fn from_checkpoint(dir: impl AsRef<Path>) -> Result<GgufExport, TokenizerError> {
        let dir = dir.as_ref();
        let tokenizer = Tokenizer::from_dir(dir)?;
        let files = CheckpointFiles::read(dir)?;
        let file = dir.join("tokenizer.json");
        let json = read_text(dir, "tokenizer.json")?
            .ok_or_else(|| TokenizerError::Missing { file: file.clone() })?;
        let parsed: TokenizerJson = serde_json::from_str(&json)
            .map_err(|source| TokenizerError::Json { file: file.clone(), source })?;
        let (coding, _) = read_decoder(&parsed.decoder).ok_or(TokenizerError::UnsupportedDecoder { file })?;
        let mut export = Exporter { tokenizer: &tokenizer, file: &parsed, coding, notes: Vec::new() };
        let mut vocabulary = export.lists()?;
        export.take_roles(&mut vocabulary, &files);
        export.take_frame(&mut vocabulary);
        vocabulary.chat_template = files.template.map(|(source, _)| source);
        vocabulary.tool_chat_template = files.tool_template;
        let notes = export.notes;
        vocabulary.huggingface_json = Some(json);
        Ok(GgufExport { vocabulary, notes })
    }
}

struct Exporter<'a> {
    tokenizer: &'a Tokenizer,
    file: &'a TokenizerJson,
    coding: PieceCoding,
    notes: Vec<String>,
}

fn refused(reason: impl Into<String>) -> TokenizerError {
    GgufVocabularyError::NotExportable(reason.into()).into()
}

impl<'a> Exporter<'a> {
    /// Everything that goes by token id, and the way to encode.
    fn lists(&mut self) -> Result<GgufVocabulary, TokenizerError> {
        let model = &self.file.model;
        if let Some(kind) = model.kind.as_deref().filter(|&kind| kind != "BPE") {
            return Err(refused(format!("its model is `{kind}`, and only `BPE` has a form here")));
        }
        let affixes = [&model.continuing_subword_prefix, &model.end_of_word_suffix];
        if affixes.into_iter().flatten().any(|affix| !affix.is_empty()) {
            return Err(refused("its tokens are marked as the beginning or end of words"));
        }
        if self.file.added_tokens.iter().any(|added| added.has_conditions()) {
            self.note(
                "some added tokens take spaces beside them or must be whole words, which GGUF cannot say",
            );
        }
        let ids = self.tokenizer.vocabulary();
        let (tokens, types) = self.tokens_and_types(&ids);
        let merges = self.merges(&ids)?;
        let mut vocabulary = GgufVocabulary { tokens, ..GgufVocabulary::default() };
        match self.coding {
            PieceCoding::ByteLevel => {
                vocabulary.model = GPT2.to_string();
                vocabulary.pre = Some(self.pre_tokenizer(merges.is_empty()).to_string());
                vocabulary.merges = Some(merges.iter().map(|(a, b)| format!("{a} {b}")).collect());
            }
            PieceCoding::Sentencepiece { byte_fallback } => {
                if !(byte_fallback && self.file.model.byte_fallback) {
                    self.note(
                        "it has no byte tokens, so llama.cpp fails on characters outside the vocabulary",
                    );
                }
                let spaces = spaces(self.file);
                self.notes.extend(spaces.notes);
                vocabulary.model = LLAMA.to_string();
                // The key has no meaning there, but llama.cpp's converter writes it too.
                vocabulary.pre = Some("default".to_string());
                vocabulary.add_space_prefix = Some(spaces.prefix);
                vocabulary.scores = Some(self.scores(&merges, &ids, &types));
            }
        }
        vocabulary.token_types = Some(types.into_iter().map(GgufTokenType::number).collect());
        Ok(vocabulary)
    }

    fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    fn tokens_and_types(&self, ids: &HashMap<String, u32>) -> (Vec<String>, Vec<GgufTokenType>) {
        let size = self.tokenizer.vocab_size();
        let mut tokens: Vec<Option<String>> = vec![None; size];
        let mut types = vec![GgufTokenType::Unused; size];
        let is_spm = matches!(self.coding, PieceCoding::Sentencepiece { .. });
        let unknown = self.file.model.unk_token.as_deref().filter(|_| is_spm);
        for (token, &id) in ids {
            let id = id as usize;
            tokens[id] = Some(token.clone());
            types[id] = match self.coding {
                PieceCoding::Sentencepiece { byte_fallback: true } if fallback_byte(token).is_some() => {
                    GgufTokenType::Byte
                }
                _ if unknown == Some(token) => GgufTokenType::Unknown,
                _ => GgufTokenType::Normal,
            };
        }
        for added in &self.file.added_tokens {
            let Some(&id) = ids.get(&added.content) else { continue };
            let id = id as usize;
            tokens[id] = Some(added.content.clone());
            types[id] = match added.special {
                true if unknown == Some(added.content.as_str()) => GgufTokenType::Unknown,
                true => GgufTokenType::Control,
                false => GgufTokenType::UserDefined,
            };
        }
        let taken: HashSet<String> = ids.keys().filter(|token| token.starts_with("[PAD")).cloned().collect();
        let tokens = tokens.into_iter().enumerate();
        let tokens = tokens.map(|(id, token)| token.unwrap_or_else(|| padding_token(id, &taken))).collect();
        (tokens, types)
    }

    /// The merges in order, each once. Of equal ones `tokenizers` obeys the last.
    fn merges(&self, ids: &HashMap<String, u32>) -> Result<Vec<(&'a str, &'a str)>, TokenizerError> {
        let mut seen = HashSet::new();
        let mut merges = Vec::with_capacity(self.file.model.merges.len());
        for merge in self.file.model.merges.iter().rev() {
            let pair = merge.pair().filter(|(first, second)| {
                let spaces = first.contains(' ') || second.contains(' ');
                !spaces && ids.contains_key(*first) && ids.contains_key(*second)
            });
            let pair =
                pair.ok_or_else(|| refused("one of its merges is not two tokens of the vocabulary"))?;
            if seen.insert(pair) {
                merges.push(pair);
            }
        }
        merges.reverse();
        Ok(merges)
    }

    fn pre_tokenizer(&mut self, no_merges: bool) -> &'static str {
        let normalizers: Vec<&str> =
            steps(&self.file.normalizer, "normalizers").into_iter().map(|(kind, _)| kind).collect();
        let nfc = normalizers == ["NFC"];
        if nfc {
            self.note("it normalises text to NFC, which llama.cpp does not do");
        } else if !normalizers.is_empty() {
            self.note(format!("its normalisers {normalizers:?} are left out"));
        }
        let ignore_merges = self.file.model.ignore_merges;
        let found = patterns(&self.file.pre_tokenizer)
            .and_then(|patterns| pre_tokenizers::by_patterns(&patterns, ignore_merges, nfc));
        match found {
            Some(found) => {
                if nfc != found.nfc {
                    self.note(format!("read back as `{}`, it normalises differently", found.names[0]));
                }
                found.names[0]
            }
            // Where nothing is merged every character is a token, however the text is cut.
            None if no_merges && !ignore_merges => "gpt-2",
            None => {
                self.note(
                    "its pre-tokenizer is none that GGUF has a name for: `default` cuts text in another way, so some \
                     texts are encoded differently",
                );
                "default"
            }
        }
    }

    /// Scores under which joining by score joins in the order of the merges: minus the rank of the first merge that
    /// makes a token.
    fn scores(
        &mut self,
        merges: &[(&str, &str)],
        ids: &HashMap<String, u32>,
        types: &[GgufTokenType],
    ) -> Vec<f32> {
        let mut ranks: HashMap<u32, usize> = HashMap::new();
        let mut previous = None;
        let mut scattered = false;
        for (first, second) in merges {
            let Some(&made) = ids.get(&format!("{first}{second}")) else { continue };
            let next = ranks.len();
            scattered |= previous != Some(made) && ranks.contains_key(&made);
            ranks.entry(made).or_insert(next);
            previous = Some(made);
        }
        if scattered || self.has_unlisted_splits(merges, ids, &ranks) {
            self.note(
                "its merges are not those of a vocabulary by scores, so rare texts may be encoded differently",
            );
        }
        let ranked = ranks.len();
        let mut unranked = 0;
        let scores = types.iter().enumerate().map(|(id, kind)| match (ranks.get(&(id as u32)), kind) {
            (Some(&rank), _) => -(rank as f32),
            (None, GgufTokenType::Normal) => {
                unranked += 1;
                -((ranked + unranked) as f32)
            }
            (None, _) => 0.0,
        });
        scores.collect()
    }

    /// Whether a token can be cut into two others that no merge joins, though joining by score would.
    fn has_unlisted_splits(
        &self,
        merges: &[(&str, &str)],
        ids: &HashMap<String, u32>,
        ranks: &HashMap<u32, usize>,
    ) -> bool {
        let listed: HashSet<&(&str, &str)> = merges.iter().collect();
        let added: HashSet<&str> =
            self.file.added_tokens.iter().map(|added| added.content.as_str()).collect();
        ids.iter().filter(|(token, id)| ranks.contains_key(id) || !added.contains(token.as_str())).any(
            |(token, _)| {
                token.char_indices().skip(1).any(|(cut, _)| {
                    let halves = token.split_at(cut);
                    ids.contains_key(halves.0) && ids.contains_key(halves.1) && !listed.contains(&halves)
                })
            },
        )
    }

    fn take_roles(&self, vocabulary: &mut GgufVocabulary, files: &CheckpointFiles) {
        let id_of = |role: &str| {
            files
                .special_tokens
                .get(role)
                .and_then(Value::as_str)
                .and_then(|text| self.tokenizer.token_to_id(text))
        };
        let unknown = self.file.model.unk_token.as_deref();
        vocabulary.bos = self.tokenizer.bos_token_id();
        vocabulary.unknown =
            unknown.and_then(|text| self.tokenizer.token_to_id(text)).or_else(|| id_of("unk_token"));
        vocabulary.padding = id_of("pad_token");
        let mut ends = self.tokenizer.eos_token_ids().to_vec();
        let eos = id_of("eos_token").or_else(|| ends.first().copied());
        ends.retain(|&id| Some(id) != eos);
        vocabulary.eos = eos;
        let mut further = ends.into_iter();
        vocabulary.eot = further.next();
        vocabulary.end_of_generation = further.collect();
    }

    /// What goes around a text. A file whose tokenizer adds a token that has no role gets it as that role.
    fn take_frame(&mut self, vocabulary: &mut GgufVocabulary) {
        let (before, after) = frame(&self.file.post_processor);
        for (ids, role, flag) in [
            (before, &mut vocabulary.bos, &mut vocabulary.add_bos),
            (after, &mut vocabulary.eos, &mut vocabulary.add_eos),
        ] {
            let fits = match ids.as_slice() {
                [] => true,
                [id] => *role.get_or_insert(*id) == *id,
                _ => false,
            };
            *flag = Some(fits && !ids.is_empty());
            if !fits {
                self.notes
                    .push("it puts other tokens around a text than GGUF can say: they are left out".into());
            }
        }
    }
}
