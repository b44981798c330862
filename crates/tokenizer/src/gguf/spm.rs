//! Sentencepiece's byte-pair encoding by scores, as llama.cpp runs it.
//!
//! Of all adjacent pairs whose joined text is a token, the pair of the highest score is joined, the leftmost of
//! equals, until none is left. This is not the same as ranked merges: there the two halves decide, here only the
//! result does, so a token may be reached through any split of it. Characters that are in no token become bytes.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, Model, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, Token, TokenizerImpl,
};

/// A pipeline of `tokenizers` around [`SpmModel`].
pub(crate) type SpmTokenizer =
    TokenizerImpl<SpmModel, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>;

/// The vocabulary with its scores.
pub(crate) struct SpmModel {
    ids: HashMap<String, u32>,
    /// By id.
    tokens: Vec<String>,
    /// By id; never NaN, never −0.
    scores: Vec<f32>,
    /// The tokens of single bytes.
    bytes: [Option<u32>; 256],
    unknown: Option<u32>,
    /// No longer text can be a token, in bytes.
    token_bytes_max: usize,
}

/// A part of the text while pairs are being joined.
struct Symbol {
    start: usize,
    /// Equal to `start` once the symbol has been joined to its left neighbour.
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two symbols that may be joined.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Length of the joined text; another length of the two symbols shows that the pair is out of date.
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SpmModel {
    /// Of tokens with the same text the first is encoded. `scores` has one number for every token.
    pub(crate) fn new(tokens: Vec<String>, scores: Vec<f32>, unknown: Option<u32>) -> SpmModel {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0_u32..).zip(&tokens) {
            if !token.is_empty() {
                ids.entry(token.clone()).or_insert(id);
            }
        }
        let bytes = std::array::from_fn(|byte| ids.get(&format!("<0x{byte:02X}>")).copied());
        SpmModel {
            token_bytes_max: tokens.iter().map(String::len).max().unwrap_or(0),
            // Adding zero makes −0 a 0, so that both are the same score.
            scores: scores.into_iter().map(|score| score + 0.0).collect(),
            ids,
            tokens,
            bytes,
            unknown,
        }
    }

    fn pair(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
    ) -> Option<Pair> {
        let (left, right) = (left?, right?);
        let range = symbols.get(left)?.start..symbols.get(right)?.end;
        let length = range.len();
        if length > self.token_bytes_max {
            return None;
        }
        let id = *self.ids.get(text.get(range)?)?;
        Some(Pair { score: *self.scores.get(id as usize)?, left, right, length })
    }

    /// Joins pairs until none is left; the symbols that remain are in the order of the text.
    fn join(&self, text: &str) -> Vec<Symbol> {
        let count = text.chars().count();
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (start, character))| Symbol {
                start,
                end: start + character.len_utf8(),
                previous: index.checked_sub(1),
                next: Some(index + 1).filter(|&next| next < count),
            })
            .collect();
        let mut queue: BinaryHeap<Pair> =
            (1..count).filter_map(|right| self.pair(text, &symbols, Some(right - 1), Some(right))).collect();
        while let Some(pair) = queue.pop() {
            let (left, right) = (&symbols[pair.left], &symbols[pair.right]);
            let gone = left.start == left.end || right.start == right.end;
            if gone || right.end - left.start != pair.length || left.end != right.start {
                continue;
            }
            let (end, next) = (right.end, right.next);
            symbols[pair.right].end = symbols[pair.right].start;
            symbols[pair.left].end = end;
            symbols[pair.left].next = next;
            if let Some(next) = next {
                symbols[next].previous = Some(pair.left);
            }
            let previous = symbols[pair.left].previous;
            queue.extend(self.pair(text, &symbols, previous, Some(pair.left)));
            queue.extend(self.pair(text, &symbols, Some(pair.left), next));
        }
        symbols.retain(|symbol| symbol.start != symbol.end);
        symbols
    }

    fn token(&self, id: u32, start: usize, end: usize) -> Token {
        let value = self.tokens.get(id as usize).cloned().unwrap_or_default();
        Token::new(id, value, (start, end))
    }
}

impl Model for SpmModel {
    type Trainer = BpeTrainer;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        let mut found = Vec::new();
        for Symbol { start, end, .. } in self.join(sequence) {
            let text = &sequence[start..end];
            if let Some(&id) = self.ids.get(text) {
                found.push(self.token(id, start, end));
                continue;
            }
            let bytes: Option<Vec<u32>> = text.bytes().map(|byte| self.bytes[usize::from(byte)]).collect();
            match (bytes, self.unknown) {
                (Some(ids), _) => {
                    found.extend(
                        ids.iter().enumerate().map(|(i, &id)| self.token(id, start + i, start + i + 1)),
                    );
                }
                (None, Some(unknown)) => found.push(self.token(unknown, start, end)),
                (None, None) => {
                    return Err(format!(
                        "the vocabulary has no token for {text:?} and none for unknown text"
                    )
                    .into());
                }
            }
        }
        Ok(found)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokens.get(id as usize).cloned()
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.ids.clone()
    }

    fn get_vocab_size(&self) -> usize {
        self.tokens.len()
    }

    fn save(&self, _folder: &Path, _prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary by scores is saved as GGUF only".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ids(model: &SpmModel, text: &str) -> Vec<u32> {
        model.tokenize(text).unwrap().iter().map(|token| token.id).collect()
    }

    fn model(tokens: &[(&str, f32)], unknown: Option<u32>) -> SpmModel {
        let (texts, scores) = tokens.iter().map(|&(text, score)| (text.to_string(), score)).unzip();
        SpmModel::new(texts, scores, unknown)
    }

    #[test]
    fn the_highest_score_is_joined_first_and_of_equals_the_leftmost() {
        let tokens = [("a", 0.0), ("b", 0.0), ("c", 0.0), ("ab", -2.0), ("bc", -1.0), ("aa", -3.0)];
        let model = model(&tokens, None);
        assert_eq!(ids(&model, "abc"), [0, 4]);
        assert_eq!(ids(&model, "aaa"), [5, 0]);
        assert_eq!(ids(&model, "abab"), [3, 3]);
    }

    #[test]
    fn a_token_is_reached_through_characters_that_are_no_tokens() {
        let model = model(&[("xy", -1.0), ("<unk>", 0.0)], Some(1));
        assert_eq!(ids(&model, "xyx"), [0, 1]);
    }

    #[test]
    fn characters_outside_the_vocabulary_become_bytes_or_unknown_or_an_error() {
        let bytes = model(&[("<0xC3>", 0.0), ("<0xA9>", 0.0)], None);
        assert_eq!(ids(&bytes, "éé"), [0, 1, 0, 1]);
        assert!(bytes.tokenize("z").unwrap_err().to_string().contains("\"z\""));
        assert_eq!(ids(&model(&[("<unk>", 0.0), ("a", 0.0)], Some(0)), "aé"), [1, 0]);
    }
}
