//! Files to structs: raw TOML is read into a type that denies unknown fields, and errors name file, line and key.
//!
//! Values never appear in errors, for they may be secrets.

use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Largest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a configuration file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's words.
        reason: String,
    },
    /// A key that nobody knows.
    #[error("unknown key `{key}` in {file} line {line}; known keys: {}", known.join(", "))]
    UnknownKey {
        /// The key.
        key: String,
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What may stand there.
        known: Vec<String>,
    },
    /// A key that is not there.
    #[error("missing key `{key}` in {file} (table of line {line}): add it")]
    MissingKey {
        /// The key.
        key: String,
        /// The file.
        file: PathBuf,
        /// Line of the table that lacks it, from 1.
        line: usize,
    },
    /// A value that does not go with its key.
    #[error("key `{key}` in {file} line {line}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is expected.
        reason: String,
    },
    /// No TOML.
    #[error("{file} line {line} is not TOML: {reason}")]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
}

/// Reads a configuration file. `T` should carry `#[serde(deny_unknown_fields)]`, and so should its tables.
///
/// # Errors
/// [`ConfigError`].
pub fn load<T: DeserializeOwned>(file: &Path) -> Result<T, ConfigError> {
    let unreadable = |reason: String| ConfigError::Read { file: file.to_owned(), reason };
    let size = std::fs::metadata(file).map_err(|error| unreadable(error.to_string()))?.len();
    if size > FILE_BYTES_MAX {
        return Err(unreadable(format!("it has {size} bytes, a configuration has at most {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read_to_string(file).map_err(|error| unreadable(error.to_string()))?;
    parse(file, &text)
}

/// As [`load`], for text that is already in memory; `file` only names it in errors.
///
/// # Errors
/// [`ConfigError`].
pub fn parse<T: DeserializeOwned>(file: &Path, text: &str) -> Result<T, ConfigError> {
    let file = file.to_owned();
    if let Err(error) = text.parse::<toml::Table>() {
        let line = line_of(text, error.span().map_or(0, |span| span.start));
        return Err(ConfigError::Syntax { file, line, reason: without_values(error.message()) });
    }
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start);
        let line = line_of(text, start);
        let message = error.message();
        let mut quoted = message.split('`').skip(1).step_by(2).map(str::to_owned);
        let mut first = || quoted.next().unwrap_or_default();
        if message.starts_with("unknown field") {
            ConfigError::UnknownKey { key: first(), file, line, known: quoted.collect() }
        } else if message.starts_with("missing field") {
            ConfigError::MissingKey { key: first(), file, line }
        } else {
            ConfigError::Value { key: key_at(text, start), file, line, reason: without_values(message) }
        }
    })
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

/// The nearest key to the left of a value.
fn key_at(text: &str, offset: usize) -> String {
    let before = text.get(..offset).unwrap_or_default();
    let line = before.rsplit('\n').find(|line| line.contains('=')).unwrap_or(before);
    let key = line.split('=').next().unwrap_or_default();
    key.trim().trim_start_matches(['{', '[']).trim().to_owned()
}

/// `invalid type: string "hunter2", expected u16` → `expected u16, found a string`; other messages lose what stands
/// between quotation marks.
fn without_values(message: &str) -> String {
    let detail = ["invalid type: ", "invalid value: ", "invalid length: "]
        .iter()
        .find_map(|p| message.strip_prefix(p));
    if let Some((found, expected)) = detail.and_then(|detail| detail.rsplit_once(", expected ")) {
        let kind = found.split(['"', '`']).next().unwrap_or_default().trim();
        return format!(
            "expected {expected}, found {}",
            if kind.is_empty() { "something else" } else { kind }
        );
    }
    let mut parts = message.split('"');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for (index, part) in parts.enumerate() {
        text.push_str(if index % 2 == 0 { "\"…\"" } else { part });
    }
    if let Some(rest) = text.strip_prefix("unknown variant `")
        && let Some((_, expected)) = rest.split_once("`, ")
    {
        return expected.to_owned();
    }
    text.lines().next().unwrap_or_default().to_owned()
}
