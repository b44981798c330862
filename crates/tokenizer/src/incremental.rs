//! A stream of tokens turned into a stream of whole characters.

use crate::pieces::LeadingSpace;
use crate::tokenizer::Tokenizer;

/// Which special tokens appear in decoded text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpecialTokens {
    /// All, as themselves.
    Show,
    /// None.
    Hide,
    /// Only those that mark tool calls and reasoning, for a parser of the output to see.
    ShowMarkers,
}

/// Where the decoded tokens stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextStart {
    /// They begin a text: the space that sentencepiece puts before a first word is dropped.
    Beginning,
    /// They continue a prompt: that space separates them from it.
    Continuation,
}

/// Decodes one sequence token by token.
///
/// The increments and [`finish`](IncrementalDecoder::finish) concatenate to what [`Tokenizer::decode`] gives for the
/// whole. At most three bytes of an unfinished character are held, whatever the length of the sequence.
#[derive(Debug, Clone)]
pub struct IncrementalDecoder {
    tokenizer: Tokenizer,
    special: SpecialTokens,
    /// Nothing has been decoded yet, so the leading-space rule still applies.
    at_start: bool,
    /// The beginning of a character, at most three bytes.
    held: Vec<u8>,
}

impl IncrementalDecoder {
    /// A decoder that has seen nothing.
    pub fn new(tokenizer: &Tokenizer, special: SpecialTokens, start: TextStart) -> IncrementalDecoder {
        IncrementalDecoder {
            tokenizer: tokenizer.clone(),
            special,
            at_start: start == TextStart::Beginning,
            held: Vec::new(),
        }
    }

    /// The text that this token completes; often empty. An id outside the vocabulary contributes nothing.
    pub fn push(&mut self, token: u32) -> String {
        let mut bytes = std::mem::take(&mut self.held);
        self.append(token, &mut bytes);
        let (text, rest) = split_complete(&bytes);
        self.held = rest.to_vec();
        text
    }

    /// The text of several tokens at once.
    pub fn push_all(&mut self, tokens: &[u32]) -> String {
        let mut bytes = std::mem::take(&mut self.held);
        for &token in tokens {
            self.append(token, &mut bytes);
        }
        let (text, rest) = split_complete(&bytes);
        self.held = rest.to_vec();
        text
    }

    /// What is left: U+FFFD for a character that never became complete, else nothing.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.held).is_empty() { String::new() } else { '\u{fffd}'.to_string() }
    }

    fn append(&mut self, token: u32, bytes: &mut Vec<u8>) {
        let special = self.tokenizer.is_special(token);
        let shown = match self.special {
            SpecialTokens::Show => true,
            SpecialTokens::Hide => !special,
            SpecialTokens::ShowMarkers => !special || self.tokenizer.is_marker(token),
        };
        let piece = self.tokenizer.token_bytes(token);
        if !shown || piece.is_empty() {
            return;
        }
        if std::mem::take(&mut self.at_start) {
            match self.tokenizer.leading_space() {
                LeadingSpace::Keep => bytes.extend_from_slice(piece),
                LeadingSpace::DropOne => bytes.extend_from_slice(piece.strip_prefix(b" ").unwrap_or(piece)),
                LeadingSpace::DropFromFirstToken => bytes.extend(piece.iter().filter(|&&b| b != b' ')),
            }
        } else {
            bytes.extend_from_slice(piece);
        }
    }
}

/// The complete characters (broken ones as U+FFFD, as `String::from_utf8_lossy` does) and the unfinished last one.
fn split_complete(bytes: &[u8]) -> (String, &[u8]) {
    let mut text = String::with_capacity(bytes.len());
    let mut chunks = bytes.utf8_chunks().peekable();
    while let Some(chunk) = chunks.next() {
        text.push_str(chunk.valid());
        let broken = chunk.invalid();
        if broken.is_empty() {
            continue;
        }
        // Only at the very end may a broken sequence still become a character.
        let unfinished = std::str::from_utf8(broken).is_err_and(|e| e.error_len().is_none());
        if chunks.peek().is_none() && unfinished {
            return (text, broken);
        }
        text.push('\u{fffd}');
    }
    (text, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_character_is_held_and_a_broken_one_is_replaced() {
        assert_eq!(split_complete("aé".as_bytes()), ("aé".into(), &[][..]));
        assert_eq!(split_complete(b"a\xf0\x9f\x98"), ("a".into(), &b"\xf0\x9f\x98"[..]));
        assert_eq!(split_complete(b"\xf0\x9fa"), ("\u{fffd}a".into(), &[][..]));
        assert_eq!(split_complete(b"\xff\xe4"), ("\u{fffd}".into(), &b"\xe4"[..]));
        assert_eq!(split_complete(b"\xff"), ("\u{fffd}".into(), &[][..]));
    }
}
