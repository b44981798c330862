//! [`Blobs`], what callers use.

use super::backend::{Backend, Key, Kind, Opened};
use super::error::BlobError;
use super::reader::{self, BlobReader};
use super::writer::BlobWriter;
use super::{PAGE_BLOBS_MAX, PIECE_BYTES, READ_BYTES_MAX};
use ashlar_vocabulary::BlobId;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

/// What an owner may choose about a blob store.
#[derive(Debug, Clone)]
pub struct BlobOptions {
    /// The largest blob.
    pub blob_bytes_max: u64,
    /// In a directory: how much of its file system is never filled with blobs, for the state that lies beside them.
    pub keep_free_bytes: u64,
    /// Longest time of one operation on the disk, or of one request to a service.
    pub timeout: Duration,
    /// In a service: how often a request is sent in all before it is given up.
    pub attempts: u32,
    /// In a service: the wait before the second attempt; it doubles with each.
    pub backoff: Duration,
    /// In a service: the size of the parts in which large blobs travel. At least 5 MiB for Amazon's.
    pub part_bytes: usize,
    /// In a service: up to this size the service copies an object in one request, above it in parts of this size. At most
    /// 5 GiB for Amazon's; small enough to be copied well within the time-out.
    pub copy_bytes: u64,
}

impl Default for BlobOptions {
    fn default() -> BlobOptions {
        BlobOptions {
            blob_bytes_max: 128 << 30,
            keep_free_bytes: 256 << 20,
            timeout: Duration::from_secs(60),
            attempts: 5,
            backoff: Duration::from_millis(100),
            part_bytes: 16 << 20,
            copy_bytes: 256 << 20,
        }
    }
}

/// A blob that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobInfo {
    /// Its name.
    pub id: BlobId,
    /// Its length.
    pub bytes: u64,
}

/// A part of the list of all blobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In the order of ids.
    pub blobs: Vec<BlobInfo>,
    /// What to list after for the next page; `None` at the end.
    pub next: Option<BlobId>,
}

/// A blob store. Clones share it.
#[derive(Clone)]
pub struct Blobs {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) blob_bytes_max: u64,
}

impl std::fmt::Debug for Blobs {
    /// Not where they are: an address may hold a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Blobs")
    }
}

impl Blobs {
    pub(super) fn new(backend: impl Backend, options: &BlobOptions) -> Blobs {
        let blob_bytes_max = options.blob_bytes_max.min(backend.object_bytes_max());
        Blobs { backend: Arc::new(backend), blob_bytes_max }
    }

    /// Begins a blob. Whatever becomes of the writer, nothing is visible before [`BlobWriter::finish`].
    pub fn writer(&self) -> BlobWriter {
        BlobWriter::new(self.clone())
    }

    /// Stores bytes that are in memory.
    ///
    /// # Errors
    /// Those of [`BlobWriter::write`] and [`BlobWriter::finish`].
    pub async fn put(&self, bytes: &[u8]) -> Result<BlobInfo, BlobError> {
        let mut writer = self.writer();
        writer.write(bytes).await?;
        writer.finish().await
    }

    /// Opens a blob to read it from its beginning, checked.
    ///
    /// # Errors
    /// [`BlobError::NotFound`].
    pub async fn get(&self, id: BlobId) -> Result<BlobReader, BlobError> {
        let opened = self.backend.read(Key::content(id), None).await?.ok_or(BlobError::NotFound(id))?;
        Ok(BlobReader::new(id, opened))
    }

    /// Reads a whole blob into memory, checked.
    ///
    /// # Errors
    /// [`BlobError::TooLarge`] above `limit` or [`READ_BYTES_MAX`]; [`BlobError::NotFound`]; [`BlobError::Corrupt`].
    pub async fn read(&self, id: BlobId, limit: usize) -> Result<Vec<u8>, BlobError> {
        let limit = limit.min(READ_BYTES_MAX);
        let mut reader = self.get(id).await?;
        let size = usize::try_from(reader.bytes()).unwrap_or(usize::MAX);
        if size > limit {
            let what = format!("blob {id}");
            return Err(BlobError::TooLarge { what, size: reader.bytes(), limit: limit as u64 });
        }
        let mut bytes = Vec::with_capacity(size);
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Reads a range, checked piece by piece: a range of a large blob costs its pieces, not the whole.
    ///
    /// # Errors
    /// [`BlobError::Invalid`] for a range beyond the end, [`BlobError::TooLarge`] above [`READ_BYTES_MAX`];
    /// [`BlobError::NotFound`]; [`BlobError::Corrupt`].
    pub async fn read_range(&self, id: BlobId, range: Range<u64>) -> Result<Vec<u8>, BlobError> {
        let length = range.end.saturating_sub(range.start);
        if range.start > range.end {
            return Err(BlobError::Invalid("a range ends before it begins".into()));
        }
        if length > READ_BYTES_MAX as u64 {
            let what = format!("a range of blob {id}");
            return Err(BlobError::TooLarge { what, size: length, limit: READ_BYTES_MAX as u64 });
        }
        reader::read_range(&*self.backend, id, range).await
    }

    /// The length of a blob; `None` if it is not stored.
    ///
    /// # Errors
    /// [`BlobError::Unavailable`], [`BlobError::Disk`], [`BlobError::Refused`].
    pub async fn size(&self, id: BlobId) -> Result<Option<u64>, BlobError> {
        self.backend.size(Key::content(id)).await
    }

    /// Deletes a blob, whoever refers to it; whether there was one.
    ///
    /// # Errors
    /// As [`size`](Blobs::size).
    pub async fn delete(&self, id: BlobId) -> Result<bool, BlobError> {
        // The table goes last: a blob without one is only slower.
        let deleted = self.backend.delete(Key::content(id)).await?;
        self.backend.delete(Key::pieces(id)).await?;
        Ok(deleted)
    }

    /// Lists blobs after `after` in the order of their ids, at most [`PAGE_BLOBS_MAX`].
    ///
    /// # Errors
    /// As [`size`](Blobs::size).
    pub async fn list(&self, after: Option<BlobId>, limit: usize) -> Result<Page, BlobError> {
        let limit = limit.clamp(1, PAGE_BLOBS_MAX);
        let (listed, more) = self.backend.list(Kind::Content, after, limit).await?;
        let blobs: Vec<_> = listed.iter().map(|one| BlobInfo { id: one.id, bytes: one.bytes }).collect();
        let next = if more { blobs.last().map(|last| last.id) } else { None };
        Ok(Page { blobs, next })
    }
}

/// Which pieces a range touches.
pub(super) fn pieces_of(range: &Range<u64>) -> Range<u64> {
    let piece = PIECE_BYTES as u64;
    range.start / piece..range.end.div_ceil(piece)
}

/// Everything an opened object still has, which is known to be short.
pub(super) async fn drain(mut opened: Opened, limit: usize) -> Result<Vec<u8>, BlobError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = opened.source.next().await? {
        if bytes.len() + chunk.len() > limit {
            return Err(BlobError::Unavailable("more bytes came than were asked for".into()));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}
