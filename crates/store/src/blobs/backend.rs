//! The seam between blobs and the place where they lie: objects under a few kinds of key, written at once or by blocks.
//!
//! A backend moves bytes and makes them durable. Digests, limits and what is deleted when are decided above it.

use super::error::BlobError;
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

/// The answer of a backend, to be awaited.
pub(crate) type BlobFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T, BlobError>> + Send + 'a>>;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The blob's own bytes.
    Content,
    /// The table of its pieces.
    Pieces,
}

impl Kind {
    /// The folder of these objects.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Kind::Content => "sha256",
            Kind::Pieces => "pieces",
        }
    }
}

/// Names an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) kind: Kind,
    pub(crate) id: BlobId,
}

impl Key {
    pub(crate) fn content(id: BlobId) -> Key {
        Key { kind: Kind::Content, id }
    }

    pub(crate) fn pieces(id: BlobId) -> Key {
        Key { kind: Kind::Pieces, id }
    }

    /// Below the store's root; the same in every backend, so that a store can be copied to another with plain tools. Two
    /// digits make a folder, so that no directory grows too long.
    pub(crate) fn path(self) -> String {
        let hex = self.id.hex();
        format!("{}/{}/{hex}", self.kind.folder(), &hex[..2])
    }
}

/// An object in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listed {
    pub(crate) id: BlobId,
    pub(crate) bytes: u64,
    /// Since it was last written, by the clock of the place.
    pub(crate) age: Duration,
}

/// A place for objects.
pub(crate) trait Backend: Send + Sync + 'static {
    /// How many bytes [`Incoming::append`] takes at a time, all but the last exactly.
    fn block_bytes(&self) -> usize;

    /// The largest object.
    fn object_bytes_max(&self) -> u64;

    /// Writes a small object (at most a block or a table of pieces), in place of what is there. Whole and durable, or not
    /// at all.
    fn put(&self, key: Key, bytes: Bytes) -> BlobFuture<'_, ()>;

    /// Begins an object of unknown length. Invisible until it is committed; dropped, it leaves at most something that
    /// [`clean`](Backend::clean) removes.
    fn begin(&self) -> BlobFuture<'_, Box<dyn Incoming>>;

    /// Opens an object, or a range of it whose end is cut to the object's. `None` if there is none.
    fn read(&self, key: Key, range: Option<Range<u64>>) -> BlobFuture<'_, Option<Opened>>;

    /// The length of an object.
    fn size(&self, key: Key) -> BlobFuture<'_, Option<u64>>;

    /// Deletes an object; whether there was one.
    fn delete(&self, key: Key) -> BlobFuture<'_, bool>;

    /// Deletes an object unless it is younger: looked at again here, as it may have been written anew since it was listed.
    fn delete_older(&self, key: Key, age: Duration) -> BlobFuture<'_, bool>;

    /// At most `limit` objects after `after`, in the order of ids, and whether there may be more.
    fn list(&self, kind: Kind, after: Option<BlobId>, limit: usize) -> BlobFuture<'_, (Vec<Listed>, bool)>;

    /// Removes writes that nobody finished and that are at least this old; how many.
    fn clean(&self, age: Duration) -> BlobFuture<'_, u64>;
}

/// An object that is being written.
pub(crate) trait Incoming: Send {
    /// Adds a block.
    fn append(&mut self, block: Bytes) -> BlobFuture<'_, ()>;

    /// Makes the object durable, then visible under `key`, in place of what is there.
    fn commit(self: Box<Self>, key: Key) -> BlobFuture<'static, ()>;
}

/// An object that is being read.
pub(crate) struct Opened {
    /// The length of the whole object.
    pub(crate) total: u64,
    pub(crate) source: Box<dyn Source>,
}

/// The bytes of an object or a range, one chunk after the other; `None` at the end.
pub(crate) trait Source: Send {
    fn next(&mut self) -> BlobFuture<'_, Option<Bytes>>;
}
