//! The format of a packed copy.
//!
//! ```text
//! header, 128 bytes: magic 16, format version u32, 0 u32, length of the file u64, start of the manifest u64,
//!                    place 16, 0 u64, key 32, checksum of the manifest 32
//! segments           each from a multiple of 4096 on
//! manifest           JSON: one entry per segment, up to the file's end
//! ```
//!
//! Numbers are little-endian. The manifest comes last because checksums are known once the data are written; the header
//! is written last of all. A file is what its header says only if the key, the length and the manifest's checksum hold.

use ashlar_vocabulary::WeightType;
use serde::{Deserialize, Serialize};

/// Raised whenever this format changes.
pub(super) const FORMAT_VERSION: u32 = 1;

/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 128;

/// Where segments may begin.
pub(super) const ALIGNMENT: u64 = 4096;

/// Longest manifest that is read: some two hundred thousand segments.
pub(super) const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// Bytes that are read, or written, and checked together: several fit a core's own cache.
pub(super) const CHUNK_BYTES: usize = 256 << 10;

const MAGIC: [u8; 16] = *b"ashlar packed\r\n\x1a";

/// A BLAKE3 hash.
pub(super) type Checksum = [u8; 32];

/// The first bytes of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) file_bytes: u64,
    pub(super) manifest_at: u64,
    pub(super) place: [u8; 16],
    pub(super) key: [u8; 32],
    pub(super) manifest: Checksum,
}

impl Header {
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[16..20].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.file_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.manifest_at.to_le_bytes());
        bytes[40..56].copy_from_slice(&self.place);
        bytes[64..96].copy_from_slice(&self.key);
        bytes[96..].copy_from_slice(&self.manifest);
        bytes
    }

    /// Takes a header apart, or says why it is none.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Header, String> {
        if bytes[..16] != MAGIC {
            return Err("it is no packed copy".into());
        }
        let version = u32::from_le_bytes(array(&bytes[16..20]));
        if version != FORMAT_VERSION {
            return Err(format!("its format has version {version}, this program's {FORMAT_VERSION}"));
        }
        Ok(Header {
            file_bytes: u64::from_le_bytes(array(&bytes[24..32])),
            manifest_at: u64::from_le_bytes(array(&bytes[32..40])),
            place: array(&bytes[40..56]),
            key: array(&bytes[64..96]),
            manifest: array(&bytes[96..]),
        })
    }
}

/// The place that any version's header names, if `bytes` are one.
pub(super) fn place_of(bytes: &[u8; HEADER_BYTES]) -> Option<[u8; 16]> {
    (bytes[..16] == MAGIC).then(|| array(&bytes[40..56]))
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    std::array::from_fn(|index| bytes[index])
}

/// Where one segment lies, and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// What it is called; segments of one matrix are numbered.
    pub(super) name: String,
    pub(super) kind: WeightType,
    /// Outputs of a matrix, rows of a table, 1 for a vector.
    pub(super) n: usize,
    /// Inputs, or length.
    pub(super) k: usize,
    /// Of brain floats that are multiplied: see [`ashlar_kernels::StoredSegment`].
    pub(super) exponent: i32,
    pub(super) offset: u64,
    pub(super) bytes: u64,
    /// Of its chunks' checksums, in order; in hexadecimal.
    pub(super) checksum: String,
}

/// The name of segment `index` of a matrix.
pub(super) fn segment_name(matrix: &str, index: usize) -> String {
    format!("{matrix}.{index}")
}

/// The checksum of a chunk.
pub(super) fn chunk_checksum(chunk: &[u8]) -> Checksum {
    *blake3::hash(chunk).as_bytes()
}

/// The checksum of a segment, as an entry has it.
pub(super) fn segment_checksum(chunks: impl Iterator<Item = Checksum>) -> String {
    let mut hasher = blake3::Hasher::new();
    chunks.for_each(|chunk| {
        hasher.update(&chunk);
    });
    hasher.finalize().to_hex().to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_header_comes_back_and_a_foreign_one_is_refused() {
        let header = Header {
            file_bytes: 1 << 40,
            manifest_at: 8192,
            place: [3; 16],
            key: [4; 32],
            manifest: [5; 32],
        };
        let mut bytes = header.to_bytes();
        assert_eq!(Header::from_bytes(&bytes), Ok(header));
        bytes[16] += 1;
        assert!(Header::from_bytes(&bytes).unwrap_err().contains("version 2"));
        assert_eq!(place_of(&bytes), Some([3; 16]), "older and newer files can be told to be superseded");
        bytes[0] ^= 1;
        assert!(Header::from_bytes(&bytes).unwrap_err().contains("no packed copy"));
        assert_eq!(place_of(&bytes), None);
    }
}
