//! Packed copies of slices, kept beside the model: the second start reads what the first one packed.
//!
//! Layout, in reading order: `key` (which copy is meant, and its name), `file` (the format), `read` (a copy as a source
//! of weights), `write` (a copy from a loaded slice).
//!
//! A copy is read into memory, not mapped: pages of the page cache are small, which costs decoding about 4 %, and a file that
//! somebody truncates or overwrites would reach into a running node. What is read is checked on the way, chunk by chunk on
//! the pool's threads, while it is still in the processor's cache.
//!
//! **Invariants:** a copy is used only if its key is the one asked for and every byte has its checksum; whatever else is
//! found is packed anew. The copy appears under its name when it is whole and on the disk. Nothing is allocated from what
//! a file says.

mod file;
mod key;
mod read;
mod write;

pub use read::{CopyReadError, Origin};
pub use write::CopyWriteError;

use crate::slice::RankSlice;
use ashlar_vocabulary::{ModelDigest, Precision};
use std::path::{Path, PathBuf};

/// Where packed copies are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CachePlace {
    /// In `.ashlar` in the model's directory, or in that of its GGUF file.
    BesideModel,
    /// In a directory of their own, which models may share.
    Directory(PathBuf),
}

impl CachePlace {
    /// The directory that copies of `model` (a directory or a GGUF file) lie in.
    pub fn directory(&self, model: &Path) -> PathBuf {
        match self {
            CachePlace::Directory(directory) => directory.clone(),
            CachePlace::BesideModel if model.is_dir() => model.join(".ashlar"),
            CachePlace::BesideModel => model.with_file_name(".ashlar"),
        }
    }
}

/// The packed copy of one slice of one model, whether there is one yet or not.
#[derive(Debug, Clone)]
pub struct PackedCopy {
    model: PathBuf,
    precision: Precision,
    slice: RankSlice,
    key: key::Key,
    path: PathBuf,
}

impl PackedCopy {
    /// The copy of `slice` of the model in `model` (a directory or a GGUF file), to be served in `precision`, in `place`.
    /// `digest` is that of its weights, quantised if asked for, whatever the cache of keys and values holds.
    pub fn new(
        place: &CachePlace,
        model: &Path,
        digest: &ModelDigest,
        precision: impl Into<Precision>,
        slice: RankSlice,
    ) -> PackedCopy {
        let precision = precision.into();
        let key = key::Key::new(model, digest, precision.quantization, &slice);
        let path = place.directory(model).join(key.file_name());
        PackedCopy { model: model.to_owned(), precision, slice, key, path }
    }

    /// Where it is, or would be.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
