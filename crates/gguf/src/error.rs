//! What is wrong with a file that was to be read.

use crate::types::UnsupportedType;
use std::path::PathBuf;

/// Why a GGUF file cannot be used. Every case names the file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not what GGUF prescribes, or shorter than it says.
    #[error("{path} is corrupt at byte {offset}: {reason}; fetch it again")]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// Where the offending field starts.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The file is not GGUF at all, or of a version or byte order that is not read.
    #[error("cannot use {path}: {reason}")]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A tensor's element type is not supported.
    #[error("tensor `{name}` in {path} is {source}")]
    TensorType {
        /// Which file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        source: UnsupportedType,
    },
    /// The files of a split model do not belong together.
    #[error("{path} is not the file of a split model that it should be: {reason}")]
    Split {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A tensor is absent.
    #[error("tensor `{name}` is missing from {path}")]
    NoTensor {
        /// The (first) file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A key is absent.
    #[error("{path} has no metadata `{key}`, which is needed")]
    NoKey {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A key's value is of another type, or out of range.
    #[error("metadata `{key}` in {path} is {found}: {expected} is needed")]
    KeyType {
        /// Which file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What the file has.
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// More of a tensor was asked for than there is. A mistake of the caller, not of the file.
    #[error("tensor `{name}` in {path}: {reason}")]
    Range {
        /// Which file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What was asked for, and what there is.
        reason: String,
    },
}
