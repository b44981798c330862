//! Bytes in, of a length that nobody knows yet.

use super::PIECE_BYTES;
use super::backend::{Incoming, Key};
use super::error::BlobError;
use super::store::{BlobInfo, Blobs};
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use ring::digest::{Context, SHA256};

/// A blob that is being written. Memory: a block (1 MiB for a directory, a few parts for a service) and 32 bytes per MiB.
///
/// To give up, drop it. When a call was dropped before it answered, or failed, the writer is of no use any more and says so.
pub struct BlobWriter {
    blobs: Blobs,
    digest: Digests,
    /// What has not been handed to `incoming`; less than a block between calls.
    pending: Vec<u8>,
    /// Begun when there is more than one block.
    incoming: Option<Box<dyn Incoming>>,
    bytes: u64,
    broken: bool,
}

impl BlobWriter {
    pub(super) fn new(blobs: Blobs) -> BlobWriter {
        BlobWriter {
            blobs,
            digest: Digests::new(),
            pending: Vec::new(),
            incoming: None,
            bytes: 0,
            broken: false,
        }
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// [`BlobError::TooLarge`] beyond the largest blob, [`BlobError::Full`], [`BlobError::Disk`],
    /// [`BlobError::Unavailable`], [`BlobError::Refused`]. Begin again after any of them.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.usable()?;
        // Until all is well: a call that is dropped in the middle has lost bytes.
        self.broken = true;
        let limit = self.blobs.blob_bytes_max;
        let size = self.bytes + bytes.len() as u64;
        if size > limit {
            return Err(BlobError::TooLarge { what: "the blob".into(), size, limit });
        }
        let block = self.blobs.backend.block_bytes();
        for chunk in bytes.chunks(PIECE_BYTES) {
            let mut chunk = chunk;
            self.digest.update(chunk);
            while !chunk.is_empty() {
                // Only when more comes, so that a blob of just one block is put at once.
                if self.pending.len() == block {
                    self.hand_over().await?;
                }
                let (now, later) = chunk.split_at(chunk.len().min(block - self.pending.len()));
                self.pending.extend_from_slice(now);
                chunk = later;
            }
            // Digests of a large slice take long: others get their turn.
            tokio::task::yield_now().await;
        }
        self.bytes = size;
        self.broken = false;
        Ok(())
    }

    /// Makes the blob durable and visible. Content that is stored already is stored once; it counts as written now.
    ///
    /// # Errors
    /// As [`write`](BlobWriter::write).
    pub async fn finish(mut self) -> Result<BlobInfo, BlobError> {
        self.usable()?;
        let (id, pieces) = std::mem::replace(&mut self.digest, Digests::new()).finish();
        let backend = &self.blobs.backend;
        // Before the blob: whoever sees the blob finds its table.
        if let Some(pieces) = pieces {
            backend.put(Key::pieces(id), pieces).await?;
        }
        if self.incoming.is_none() {
            backend.put(Key::content(id), Bytes::from(std::mem::take(&mut self.pending))).await?;
        } else {
            self.hand_over().await?;
            if let Some(incoming) = self.incoming.take() {
                incoming.commit(Key::content(id)).await?;
            }
        }
        Ok(BlobInfo { id, bytes: self.bytes })
    }

    /// How many bytes were written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn usable(&self) -> Result<(), BlobError> {
        if self.broken {
            return Err(BlobError::Invalid("an earlier write of this blob failed: begin it again".into()));
        }
        Ok(())
    }

    async fn hand_over(&mut self) -> Result<(), BlobError> {
        let incoming = match &mut self.incoming {
            Some(incoming) => incoming,
            None => self.incoming.insert(self.blobs.backend.begin().await?),
        };
        incoming.append(Bytes::from(std::mem::take(&mut self.pending))).await
    }
}

/// The digest of the whole, and those of the pieces.
struct Digests {
    whole: Context,
    piece: blake3::Hasher,
    /// Of the piece that is being filled.
    filled: usize,
    pieces: Vec<u8>,
}

impl Digests {
    fn new() -> Digests {
        Digests { whole: Context::new(&SHA256), piece: blake3::Hasher::new(), filled: 0, pieces: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        self.whole.update(bytes);
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PIECE_BYTES - self.filled));
            self.piece.update(now);
            self.filled += now.len();
            if self.filled == PIECE_BYTES {
                self.end_piece();
            }
            bytes = later;
        }
    }

    fn end_piece(&mut self) {
        self.pieces.extend_from_slice(self.piece.finalize().as_bytes());
        self.piece.reset();
        self.filled = 0;
    }

    /// The name, and the table if there is more than one piece.
    fn finish(mut self) -> (BlobId, Option<Bytes>) {
        if self.filled > 0 {
            self.end_piece();
        }
        let several = self.pieces.len() > blake3::OUT_LEN;
        (blob_id(self.whole), several.then(|| Bytes::from(self.pieces)))
    }
}

/// The name of what was hashed.
pub(super) fn blob_id(digest: Context) -> BlobId {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.finish().as_ref());
    BlobId(bytes)
}
