//! Several blobs under one id: the shards of a checkpoint, the files of an adapter.

use super::error::BlobError;
use super::store::{BlobInfo, Blobs};
use ashlar_vocabulary::BlobId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Raised when the record changes its meaning.
pub const MANIFEST_VERSION: u32 = 1;
/// Most entries of a manifest.
pub const MANIFEST_ENTRIES_MAX: usize = 4096;
/// Longest name of an entry, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a manifest's record.
const MANIFEST_BYTES_MAX: usize = 4 << 20;

/// Names and the blobs that they stand for. Equal manifests are equal bytes, so they have one id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    entries: BTreeMap<String, ManifestEntry>,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestEntry {
    /// The blob.
    pub blob: BlobId,
    /// Its length.
    pub bytes: u64,
}

/// The record as it is stored.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    ashlar_manifest: u32,
    entries: BTreeMap<String, ManifestEntry>,
}

/// What says which record it is.
#[derive(Deserialize)]
struct Head {
    ashlar_manifest: u32,
}

impl Manifest {
    /// Adds an entry. A name is made of letters, digits and `._-`, with `/` between parts; no part is empty, `.` or `..`, so
    /// that it may become a path below a directory.
    ///
    /// # Errors
    /// [`BlobError::Invalid`] for another name, one that is there already, or too many.
    pub fn insert(&mut self, name: &str, blob: BlobInfo) -> Result<(), BlobError> {
        check_name(name).map_err(BlobError::Invalid)?;
        if self.entries.len() == MANIFEST_ENTRIES_MAX {
            let text = format!("a manifest has at most {MANIFEST_ENTRIES_MAX} entries: make several");
            return Err(BlobError::Invalid(text));
        }
        if self.entries.contains_key(name) {
            return Err(BlobError::Invalid(format!(
                "the manifest has an entry {name} already: name each once"
            )));
        }
        self.entries.insert(name.to_owned(), ManifestEntry { blob: blob.id, bytes: blob.bytes });
        Ok(())
    }

    /// What `name` stands for.
    pub fn get(&self, name: &str) -> Option<ManifestEntry> {
        self.entries.get(name).copied()
    }

    /// Every entry, in the order of names.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (&str, ManifestEntry)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), *entry))
    }

    /// The length of all entries together.
    pub fn bytes(&self) -> u64 {
        self.entries.values().fold(0, |sum, entry| sum.saturating_add(entry.bytes))
    }

    fn decode(bytes: &[u8]) -> Result<Manifest, String> {
        // First the version, so that a later record is not called damaged. Errors tell places, not content.
        let place = |error: serde_json::Error| format!("it is no record of ours, column {}", error.column());
        let head: Head = serde_json::from_slice(bytes).map_err(place)?;
        if head.ashlar_manifest != MANIFEST_VERSION {
            let version = head.ashlar_manifest;
            return Err(format!("it has version {version}, this program reads {MANIFEST_VERSION}"));
        }
        let record: Record = serde_json::from_slice(bytes).map_err(place)?;
        if record.entries.len() > MANIFEST_ENTRIES_MAX {
            return Err(format!("it has more than {MANIFEST_ENTRIES_MAX} entries"));
        }
        record.entries.keys().try_for_each(|name| check_name(name))?;
        Ok(Manifest { entries: record.entries })
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let usual = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let good = |part: &str| !matches!(part, "" | "." | "..") && part.bytes().all(usual);
    if name.len() > NAME_BYTES_MAX || !name.split('/').all(good) {
        return Err(format!(
            "a name in a manifest is not of at most {NAME_BYTES_MAX} letters, digits and ._- with / between: rename it"
        ));
    }
    Ok(())
}

impl Blobs {
    /// Stores a manifest as a blob, after looking that every entry is stored with the length it names.
    ///
    /// # Errors
    /// [`BlobError::NotFound`] for an entry that is not stored; [`BlobError::Invalid`] for one of another length; those of
    /// [`put`](Blobs::put).
    pub async fn put_manifest(&self, manifest: &Manifest) -> Result<BlobInfo, BlobError> {
        for (name, entry) in manifest.entries() {
            match self.size(entry.blob).await? {
                Some(bytes) if bytes == entry.bytes => {}
                Some(bytes) => {
                    let told = entry.bytes;
                    let text = format!("manifest entry {name} tells {told} bytes, its blob has {bytes}");
                    return Err(BlobError::Invalid(text));
                }
                None => return Err(BlobError::NotFound(entry.blob)),
            }
        }
        let record = Record { ashlar_manifest: MANIFEST_VERSION, entries: manifest.entries.clone() };
        let bytes = serde_json::to_vec(&record)
            .map_err(|error| BlobError::Invalid(format!("the manifest has no JSON form: {error}")))?;
        self.put(&bytes).await
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// [`BlobError::Manifest`] if the blob is something else; those of [`read`](Blobs::read).
    pub async fn get_manifest(&self, id: BlobId) -> Result<Manifest, BlobError> {
        let bytes = self.read(id, MANIFEST_BYTES_MAX).await?;
        Manifest::decode(&bytes).map_err(|reason| BlobError::Manifest { id, reason })
    }
}
