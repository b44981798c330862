//! Who has a model's files: the seam between fetching and the ways to fetch.

use ashlar_model::partial::{RangeSet, is_plain_name, is_weight_file};
use ashlar_protocol::frame::FrameError;
use std::ops::Range;

/// Longest small file that is taken.
const SMALL_BYTES_MAX: u64 = 256 << 20;
/// Most files of a model.
const FILES_MAX: usize = 4096;

/// Somebody who has files of the model that is wanted.
pub(crate) trait Source {
    /// Who it is, for people.
    fn name(&self) -> &str;

    /// The model's files.
    fn files(&self) -> &[SourceFile];

    /// The most bytes and ranges that it is asked for at once.
    fn batch(&self) -> (u64, usize);

    /// Bytes of a file, one range after the other, found to have come whole; `None` where it does not have them any more.
    fn read(&mut self, file: &str, ranges: &[Range<u64>]) -> Result<Option<Vec<u8>>, SourceError>;
}

/// A file that a source has, or has a part of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SourceFile {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// What the source has of it; `None` for all of it.
    pub(crate) present: Option<RangeSet>,
}

impl SourceFile {
    /// Whether it has weights: others are small, and fetched whole.
    pub(crate) fn has_weights(&self) -> bool {
        is_weight_file(&self.name)
    }

    /// What of `wanted` the source has.
    pub(crate) fn of(&self, wanted: &RangeSet) -> RangeSet {
        self.present.as_ref().map_or_else(|| wanted.clone(), |present| wanted.common(present))
    }
}

/// Why a source is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// The connection.
    #[error(transparent)]
    Connection(#[from] FrameError),
    /// It does not have the model, or not yet.
    #[error("it does not have that model")]
    Unknown,
    /// It serves others.
    #[error("it serves as many others as it can")]
    Busy,
    /// What came is not what was sent.
    #[error("bytes of {0} came damaged")]
    Damaged(String),
    /// What it says makes no sense.
    #[error("it said something improper: {0}")]
    Improper(String),
    /// It would not.
    #[error("it refused: {0}")]
    Refused(String),
    /// A hub.
    #[error(transparent)]
    Hub(#[from] ashlar_model::hub::HubError),
}

/// Refuses lists of files that no model has: what is named there becomes names of files here.
pub(crate) fn check_files(files: &[SourceFile]) -> Result<(), SourceError> {
    let improper = |what: String| Err(SourceError::Improper(what));
    if files.len() > FILES_MAX || !files.iter().any(SourceFile::has_weights) {
        return improper(format!("{} files", files.len()));
    }
    for (index, file) in files.iter().enumerate() {
        let small_enough = file.has_weights() || file.bytes <= SMALL_BYTES_MAX;
        let new = files[..index].iter().all(|other| other.name != file.name);
        if !is_plain_name(&file.name) || !small_enough || !new || file.bytes > i64::MAX as u64 {
            return improper(format!("a file `{}` of {} bytes", file.name.escape_debug(), file.bytes));
        }
    }
    Ok(())
}
