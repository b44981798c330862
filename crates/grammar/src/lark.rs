//! Writing grammars in llguidance's Lark.

use ashlar_tokenizer::Tokenizer;
use std::fmt::Write;

/// A literal: Lark's strings are JSON's, without raw control characters.
pub(crate) fn literal(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            c if c < ' ' || c == '\u{7f}' => {
                let _ = write!(quoted, "\\u{:04x}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// Text as the inside of a regular expression between slashes. Only what has a meaning there is escaped, because an
/// escaped `<` or `>` is a word boundary.
pub(crate) fn escape_regex(text: &str) -> String {
    let escape = |c: char| r"\.+*?()|[]{}^$/&~#-".contains(c);
    text.chars().flat_map(|c| escape(c).then_some('\\').into_iter().chain([c])).collect()
}

/// A marker of the model: one special token where the vocabulary has it as such, else text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Marker {
    /// Can only come as this token.
    Token(u32),
    /// Can come in any tokens, an added token among them.
    Text(String),
}

impl Marker {
    pub(crate) fn of(tokenizer: &Tokenizer, text: &str) -> Marker {
        match tokenizer.token_to_id(text) {
            Some(id) if tokenizer.is_special(id) => Marker::Token(id),
            _ => Marker::Text(text.to_string()),
        }
    }

    pub(crate) fn lark(&self) -> String {
        match self {
            Marker::Token(id) => format!("<[{id}]>"),
            Marker::Text(text) => literal(text),
        }
    }
}
