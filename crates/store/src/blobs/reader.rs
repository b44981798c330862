//! Bytes out, compared with their name.

use super::PIECE_BYTES;
use super::backend::{Backend, Key, Opened, Source};
use super::error::BlobError;
use super::store::{drain, pieces_of};
use super::writer::blob_id;
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use ring::digest::{Context, SHA256};
use std::ops::Range;

/// A blob that is being read. Its last bytes are handed out only after the digest of all of them was found right, so
/// whoever has read to the end has read the blob. Until then nothing should be done that cannot be undone.
pub struct BlobReader {
    id: BlobId,
    bytes: u64,
    seen: u64,
    digest: Option<Context>,
    source: Box<dyn Source>,
}

impl BlobReader {
    pub(super) fn new(id: BlobId, opened: Opened) -> BlobReader {
        BlobReader {
            id,
            bytes: opened.total,
            seen: 0,
            digest: Some(Context::new(&SHA256)),
            source: opened.source,
        }
    }

    /// The length of the stored object. Proved by the digest, at the end.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next bytes; `None` after the last.
    ///
    /// # Errors
    /// [`BlobError::Corrupt`] when what was read is not the blob; [`BlobError::Unavailable`] and [`BlobError::Disk`] when
    /// it cannot be read. There is nothing after an error but more of them.
    pub async fn next(&mut self) -> Result<Option<Bytes>, BlobError> {
        let Some(mut digest) = self.digest.take() else {
            if self.seen == self.bytes {
                return Ok(None);
            }
            return Err(BlobError::Invalid("reading this blob has failed before: open it again".into()));
        };
        // Marks a failure until the digest is put back, or found right.
        let expected = std::mem::replace(&mut self.seen, u64::MAX);
        let chunk = match self.source.next().await? {
            Some(chunk) => chunk,
            None => Bytes::new(),
        };
        let seen = expected + chunk.len() as u64;
        if seen > self.bytes || (chunk.is_empty() && seen < self.bytes) {
            return Err(corrupt(self.id, "its length changed"));
        }
        digest.update(&chunk);
        if seen < self.bytes {
            self.digest = Some(digest);
        } else if blob_id(digest) != self.id {
            return Err(corrupt(self.id, "its digest is another"));
        }
        self.seen = seen;
        Ok(if chunk.is_empty() { None } else { Some(chunk) })
    }
}

fn corrupt(id: BlobId, reason: &str) -> BlobError {
    BlobError::Corrupt { id, reason: reason.into() }
}

/// Reads a range of at most [`READ_BYTES_MAX`](super::READ_BYTES_MAX), checked by the table of pieces where that is of use.
pub(super) async fn read_range(
    backend: &dyn Backend,
    id: BlobId,
    range: Range<u64>,
) -> Result<Vec<u8>, BlobError> {
    let piece = PIECE_BYTES as u64;
    let pieces = pieces_of(&range);
    // At least one piece, so that an empty range finds out what is there too.
    let aligned = pieces.start * piece..pieces.end.max(pieces.start + 1).saturating_mul(piece);
    let content = backend.read(Key::content(id), Some(aligned.clone())).await?;
    let content = content.ok_or(BlobError::NotFound(id))?;
    let total = content.total;
    if range.end > total {
        return Err(BlobError::Invalid(format!("a range ends at {}, blob {id} at {total}", range.end)));
    }
    if range.is_empty() {
        return Ok(Vec::new());
    }
    let limit = usize::try_from(aligned.end - aligned.start).unwrap_or(usize::MAX);
    let cut = |bytes: &[u8], start: u64| -> Option<Vec<u8>> {
        let from = usize::try_from(range.start - start).ok()?;
        let to = usize::try_from(range.end - start).ok()?;
        bytes.get(from..to).map(<[u8]>::to_vec)
    };
    if total <= piece {
        let bytes = drain(content, limit).await?;
        let mut digest = Context::new(&SHA256);
        digest.update(&bytes);
        if blob_id(digest) != id {
            return Err(corrupt(id, "its digest is another"));
        }
        return cut(&bytes, aligned.start).ok_or_else(|| corrupt(id, "its length changed"));
    }
    let entry = blake3::OUT_LEN as u64;
    let rows = aligned.start / piece * entry..(aligned.end.min(total)).div_ceil(piece) * entry;
    let rows_limit = usize::try_from(rows.end - rows.start).unwrap_or(usize::MAX);
    let table = async {
        match backend.read(Key::pieces(id), Some(rows)).await? {
            // A table of another length is another blob's.
            Some(opened) if opened.total == total.div_ceil(piece) * entry => {
                drain(opened, rows_limit).await.map(Some)
            }
            _ => Ok(None),
        }
    };
    let (bytes, table) = tokio::try_join!(drain(content, limit), table)?;
    let right = table.is_some_and(|table| {
        let found = bytes.chunks(PIECE_BYTES).flat_map(|piece| *blake3::hash(piece).as_bytes());
        found.eq(table)
    });
    if right && let Some(bytes) = cut(&bytes, aligned.start) {
        return Ok(bytes);
    }
    drop(bytes);
    tracing::warn!(blob = %id, "the table of pieces does not fit the blob: reading the whole to see which is right");
    read_range_of_whole(backend, id, range).await
}

/// Reads the whole blob to hand out a range of it.
async fn read_range_of_whole(
    backend: &dyn Backend,
    id: BlobId,
    range: Range<u64>,
) -> Result<Vec<u8>, BlobError> {
    let opened = backend.read(Key::content(id), None).await?.ok_or(BlobError::NotFound(id))?;
    let mut reader = BlobReader::new(id, opened);
    let mut bytes = Vec::new();
    let mut start = 0;
    while let Some(chunk) = reader.next().await? {
        let end = start + chunk.len() as u64;
        let within = |at: u64| usize::try_from(at.clamp(start, end) - start).unwrap_or(0);
        bytes.extend_from_slice(&chunk[within(range.start)..within(range.end)]);
        start = end;
    }
    Ok(bytes)
}
