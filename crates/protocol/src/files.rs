//! Files of a model, from a node that has them to one that does not: after the hello of a data connection
//! ([`LinkPurpose::Files`](crate::data::LinkPurpose::Files)), one question at a time, each answered once.

use ashlar_vocabulary::ModelDigest;
use serde::{Deserialize, Serialize};

/// Most bytes of one answer's content.
pub const CHUNK_BYTES_MAX: u64 = 4 << 20;
/// Most ranges of one question.
pub const RANGES_MAX: usize = 2048;
/// Most files of a model.
pub const FILES_MAX: usize = 4096;
/// Most ranges that [`FileEntry::present`] has, over all files of an answer.
pub const PRESENT_MAX: usize = 1 << 16;
/// Longest frame of a question, in bytes.
pub const QUESTION_BYTES_MAX: usize = 128 << 10;
/// Longest frame of an answer, in bytes: a chunk, or the names of a model's files.
pub const ANSWER_BYTES_MAX: usize = (CHUNK_BYTES_MAX as usize) + (64 << 10);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileQuestion {
    /// Which files a model has. Comes first: what follows is about this model.
    List {
        /// The model's digest in the precision in which the cluster serves it.
        model: ModelDigest,
    },
    /// Some bytes of one of its files.
    Read {
        /// The file's name.
        name: String,
        /// Starts and lengths: at most [`RANGES_MAX`], and [`CHUNK_BYTES_MAX`] bytes together.
        ranges: Vec<(u64, u32)>,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileAnswer {
    /// All files of the model, at most [`FILES_MAX`].
    Files(Vec<FileEntry>),
    /// The bytes, one range after the other.
    Chunk {
        /// Their BLAKE3 hash.
        checksum: [u8; 32],
        /// Themselves.
        bytes: Vec<u8>,
    },
    /// This node does not have (all of) that any more; another one may.
    Absent,
    /// This node does not serve that model, or not yet. The connection is closed afterwards.
    Unknown,
    /// This node serves as many others as it does at a time. The connection is closed afterwards.
    Busy,
    /// It was asked something improper. The connection is closed afterwards.
    Refused(String),
}

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Its name, without a folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Starts and ends of what the node has of it; `None` for all of it.
    pub present: Option<Vec<(u64, u64)>>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::frame;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = frame::decode::<FileQuestion>(&bytes);
            let _ = frame::decode::<FileAnswer>(&bytes);
        }
    }

    #[test]
    fn the_largest_messages_fit_their_frames() {
        let ranges = vec![(u64::MAX, u32::MAX); RANGES_MAX];
        let question = FileQuestion::Read { name: "n".repeat(255), ranges };
        assert!(frame::encode(&question).len() <= QUESTION_BYTES_MAX);
        let answer = FileAnswer::Chunk { checksum: [1; 32], bytes: vec![255; CHUNK_BYTES_MAX as usize] };
        assert!(frame::encode(&answer).len() <= ANSWER_BYTES_MAX);
        let present = Some(vec![(u64::MAX, u64::MAX); PRESENT_MAX / FILES_MAX]);
        let entry = FileEntry { name: "n".repeat(200), bytes: u64::MAX, present };
        assert!(frame::encode(&FileAnswer::Files(vec![entry; FILES_MAX])).len() <= ANSWER_BYTES_MAX);
    }
}
