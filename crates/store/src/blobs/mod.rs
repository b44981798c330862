//! Large immutable bytes under the name of their digest: uploaded files, adapters, checkpoints.
//!
//! Layout: [`store`] ([`Blobs`]: what callers use), [`writer`] (bytes in), [`reader`] (bytes out, checked), [`manifest`]
//! (several blobs under one id), [`sweep`] (what nobody refers to goes), [`error`], [`open`](mod@open) (from an address);
//! `backend` is the seam to where objects lie: `directory` or `s3`.
//!
//! **Invariants:** a blob is visible only when it is whole and durable. Its last byte is handed out only after the digest
//! of all was found right. Nothing holds a blob in memory. No operation waits for ever, and no message carries a secret.
//!
//! Beside a blob above [`PIECE_BYTES`] lies the table of its pieces: the BLAKE3 digest of each, one after the other. With it
//! a range is checked without reading the whole. The table is a help, not the truth: where it is missing or disagrees, the
//! whole blob is read and compared with its name.

mod backend;
mod directory;
pub mod error;
pub mod manifest;
pub mod open;
pub mod reader;
mod s3;
pub mod store;
pub mod sweep;
pub mod writer;

pub use error::BlobError;
pub use manifest::{Manifest, ManifestEntry};
pub use open::open;
pub use reader::BlobReader;
pub use s3::{Credentials, S3Address};
pub use store::{BlobInfo, BlobOptions, Blobs, Page};
pub use sweep::{Roots, Swept};
pub use writer::BlobWriter;

/// What a range is checked by, and the largest blob that has no table of pieces.
pub const PIECE_BYTES: usize = 1 << 20;
/// Most bytes of one ranged read, and of a blob that is read into memory at once.
pub const READ_BYTES_MAX: usize = 64 << 20;
/// Most blobs of one page of a list.
pub const PAGE_BLOBS_MAX: usize = 1000;
