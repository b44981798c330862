//! Samples as bytes: made once, stored under their digest, read by every stage.
//!
//! All numbers are little-endian.
//!
//! ```text
//! header    magic "ASHDATA\0", version u32, method u8 (0 supervised, 1 dpo), three zero bytes
//! records   per sample: example u32, sequences u32;
//!           per sequence: tokens u32, target ranges u32, the tokens (u32 each), the ranges (start u32, end u32 each);
//!           crc32 of all that
//! index     per sample: where its record ends u64, example u32, rows u32, targets u32
//! trailer   where the index begins u64, samples u32, crc32 of header and index u32, magic "ASHDEND\0"
//! ```
//!
//! It is written from the front to the end without looking back, and a sample is read without reading those before it. The
//! index alone is what a plan is made from.

mod read;
mod write;

pub use read::DatasetReader;
pub use write::{DatasetSummary, DatasetWriter};

use crate::example::Method;
use std::fmt;
use std::io::{self, Read};

const MAGIC: [u8; 8] = *b"ASHDATA\0";
const END_MAGIC: [u8; 8] = *b"ASHDEND\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const INDEX_ENTRY_BYTES: usize = 20;
const TRAILER_BYTES: usize = 24;

/// Why samples could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The storage failed.
    #[error("cannot read or write the tokenised dataset: {0}")]
    Io(#[from] io::Error),
    /// The bytes are no dataset of this version.
    #[error("the tokenised dataset is not of version {VERSION}: tokenise the training file again")]
    Version,
    /// The bytes are not what was written.
    #[error("the tokenised dataset is damaged ({what}): fetch it again, or tokenise the training file again")]
    Damaged {
        /// Where.
        what: &'static str,
    },
    /// A sample that is not there.
    #[error("sample {index} was asked for, but the dataset has {samples}")]
    NoSuchSample {
        /// The one asked for.
        index: u32,
        /// How many there are.
        samples: u32,
    },
    /// More than the format holds.
    #[error(
        "the training file makes more than 2^32 samples, or a sample of more than 2^32 rows: split the file"
    )]
    TooLarge,
}

/// What a plan needs to know of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleSize {
    /// 0-based number of the example that it was made from; never falls from one sample to the next.
    pub example: u32,
    /// Positions that a forward pass computes.
    pub rows: u32,
    /// Tokens that carry loss.
    pub targets: u32,
}

/// BLAKE3 of a dataset's bytes: its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DatasetDigest(pub [u8; 32]);

impl DatasetDigest {
    /// The digest of everything that `bytes` yields.
    pub fn of(mut bytes: impl Read) -> io::Result<DatasetDigest> {
        let mut hasher = blake3::Hasher::new();
        io::copy(&mut bytes, &mut hasher)?;
        Ok(DatasetDigest(hasher.finalize().into()))
    }
}

impl fmt::Display for DatasetDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn header(method: Method) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12] = match method {
        Method::Supervised => 0,
        Method::Dpo => 1,
    };
    header
}

#[cfg(test)]
mod tests;
