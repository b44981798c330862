//! The exact bytes of every token, and the rule for a space at the start of a text.

use serde_json::Value;

/// What one token contributes to a text.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    /// Bytes in the middle of a text; may be part of a character.
    pub(crate) bytes: Box<[u8]>,
    /// Control token, left out of text shown to a client.
    pub(crate) special: bool,
}

/// How the tokenizer writes bytes as token strings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PieceCoding {
    /// GPT-2's alphabet: every byte is one printable character.
    ByteLevel,
    /// Sentencepiece: `▁` is a space; `<0xNN>` is a byte where the vocabulary has byte fallback.
    Sentencepiece {
        /// Whether `<0xNN>` is a byte.
        byte_fallback: bool,
    },
}

/// What decoding does to the space that sentencepiece puts before the first word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeadingSpace {
    /// It is part of the text.
    Keep,
    /// One space at the very start is dropped.
    DropOne,
    /// Every space of the first token is dropped (the `Metaspace` decoder).
    DropFromFirstToken,
}

/// Coding and leading space, read from the `decoder` of a `tokenizer.json`. `None` when it is of no known kind.
pub(crate) fn read_decoder(decoder: &Value) -> Option<(PieceCoding, LeadingSpace)> {
    let mut steps = Vec::new();
    flatten(decoder, &mut steps);
    let mut byte_level = false;
    let mut spaces = false;
    let mut byte_fallback = false;
    let mut leading = LeadingSpace::Keep;
    for step in steps {
        match step.get("type").and_then(Value::as_str)? {
            "ByteLevel" => byte_level = true,
            "ByteFallback" => byte_fallback = true,
            "Fuse" => {}
            "Replace" => {
                let from = step.pointer("/pattern/String").and_then(Value::as_str)?;
                let to = step.get("content").and_then(Value::as_str)?;
                if (from, to) != ("▁", " ") {
                    return None;
                }
                spaces = true;
            }
            "Strip" => {
                let strips = (
                    step.get("content").and_then(Value::as_str)?,
                    step.get("start").and_then(Value::as_u64)?,
                    step.get("stop").and_then(Value::as_u64)?,
                );
                match strips {
                    (" ", 1, 0) => leading = LeadingSpace::DropOne,
                    (_, 0, 0) => {}
                    _ => return None,
                }
            }
            "Metaspace" => {
                if step.get("replacement").and_then(Value::as_str).is_some_and(|r| r != "▁") {
                    return None;
                }
                spaces = true;
                // Files of before 2024 say `add_prefix_space`, newer ones `prepend_scheme`.
                let never = step.get("prepend_scheme").and_then(Value::as_str) == Some("never")
                    || step.get("add_prefix_space").and_then(Value::as_bool) == Some(false);
                if !never {
                    leading = LeadingSpace::DropFromFirstToken;
                }
            }
            _ => return None,
        }
    }
    match (byte_level, spaces || byte_fallback) {
        (true, false) => Some((PieceCoding::ByteLevel, LeadingSpace::Keep)),
        (false, true) => Some((PieceCoding::Sentencepiece { byte_fallback }, leading)),
        _ => None,
    }
}

fn flatten<'v>(decoder: &'v Value, steps: &mut Vec<&'v Value>) {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(inner) => inner.iter().for_each(|d| flatten(d, steps)),
        None => steps.push(decoder),
    }
}

impl PieceCoding {
    /// The bytes of a vocabulary entry.
    pub(crate) fn bytes(self, token: &str) -> Box<[u8]> {
        match self {
            PieceCoding::ByteLevel => {
                // A token with a character outside the alphabet stands for itself, as in `tokenizers`.
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec()).into()
            }
            PieceCoding::Sentencepiece { byte_fallback } => {
                if byte_fallback && let Some(byte) = fallback_byte(token) {
                    return Box::new([byte]);
                }
                token.replace('▁', " ").into_bytes().into()
            }
        }
    }

    /// The bytes of an added token, which is written as itself.
    pub(crate) fn added_bytes(self, token: &str) -> Box<[u8]> {
        match self {
            PieceCoding::ByteLevel => token.as_bytes().into(),
            PieceCoding::Sentencepiece { .. } => token.replace('▁', " ").into_bytes().into(),
        }
    }
}

/// The byte that `<0xNN>` stands for.
pub(crate) fn fallback_byte(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() != 2 { None } else { u8::from_str_radix(hex, 16).ok() }
}

/// The inverse of GPT-2's `bytes_to_unicode`: printable Latin-1 stands for itself, the other 68 bytes follow from
/// U+0100 in byte order.
fn byte_of_char(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x143 => {
            let rank = (code - 0x100) as u8;
            Some(match rank {
                0..=32 => rank,
                33..=66 => 0x7f + (rank - 33),
                _ => 0xad,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for code in 0..0x200 {
            if let Some(byte) = char::from_u32(code).and_then(byte_of_char) {
                assert!(!std::mem::replace(&mut seen[usize::from(byte)], true), "byte {byte} twice");
            }
        }
        assert!(seen.iter().all(|&s| s));
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
    }

    #[test]
    fn unknown_decoders_are_refused() {
        assert_eq!(read_decoder(&json!({"type": "WordPiece", "prefix": "##"})), None);
        assert_eq!(read_decoder(&Value::Null), None);
        assert_eq!(
            read_decoder(&json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})),
            Some((PieceCoding::Sentencepiece { byte_fallback: false }, LeadingSpace::DropFromFirstToken))
        );
    }
}
