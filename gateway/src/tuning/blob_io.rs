//! Blobs as files of the standard library, for work on a thread of its own: readers, a writer, and a file with an index.
//!
//! Every call waits for the blob store, so none of them may be used on a thread that serves.

use ashlar_store::blobs::{BlobError, BlobInfo, BlobReader, BlobWriter, Blobs, PIECE_BYTES};
use ashlar_vocabulary::BlobId;
use bytes::{Buf, Bytes};
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Handle;

/// Ends work whose owner has gone, at its next read.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(super) fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::Error::other("this gateway is shutting down")),
            false => Ok(()),
        }
    }
}

/// A blob, read from its beginning.
pub(super) struct BlobSource {
    runtime: Handle,
    reader: BlobReader,
    chunk: Bytes,
    stop: Stop,
}

impl BlobSource {
    pub(super) fn open(blobs: &Blobs, id: BlobId, stop: Stop) -> Result<BlobSource, BlobError> {
        let runtime = Handle::current();
        let reader = runtime.block_on(blobs.get(id))?;
        Ok(BlobSource { runtime, reader, chunk: Bytes::new(), stop })
    }
}

impl BufRead for BlobSource {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.chunk.is_empty() {
            self.stop.check()?;
            let next = self.runtime.block_on(self.reader.next()).map_err(io::Error::other)?;
            self.chunk = next.unwrap_or_default();
        }
        Ok(&self.chunk)
    }

    fn consume(&mut self, amount: usize) {
        self.chunk.advance(amount.min(self.chunk.len()));
    }
}

impl Read for BlobSource {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut available = self.fill_buf()?;
        let read = available.read(into)?;
        self.consume(read);
        Ok(read)
    }
}

/// A blob that is being written. What is not finished is not stored.
pub(super) struct BlobSink {
    runtime: Handle,
    writer: BlobWriter,
}

impl BlobSink {
    pub(super) fn new(blobs: &Blobs) -> BlobSink {
        BlobSink { runtime: Handle::current(), writer: blobs.writer() }
    }

    pub(super) fn finish(self) -> Result<BlobInfo, BlobError> {
        self.runtime.block_on(self.writer.finish())
    }
}

impl Write for BlobSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.runtime.block_on(self.writer.write(bytes)).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A blob of which any part may be read.
pub(super) struct BlobFile<'a> {
    runtime: Handle,
    blobs: &'a Blobs,
    blob: BlobInfo,
    position: u64,
    /// The piece that was read last, and where it begins.
    piece: (u64, Vec<u8>),
}

impl BlobFile<'_> {
    pub(super) fn new(blobs: &Blobs, blob: BlobInfo) -> BlobFile<'_> {
        BlobFile { runtime: Handle::current(), blobs, blob, position: 0, piece: (0, Vec::new()) }
    }

    /// The same for one whose length is not known.
    pub(super) fn open(blobs: &Blobs, id: BlobId) -> io::Result<BlobFile<'_>> {
        let bytes = Handle::current().block_on(blobs.size(id)).map_err(io::Error::other)?;
        let missing = || io::Error::other(BlobError::NotFound(id));
        Ok(BlobFile::new(blobs, BlobInfo { id, bytes: bytes.ok_or_else(missing)? }))
    }
}

impl Read for BlobFile<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.position >= self.blob.bytes {
            return Ok(0);
        }
        let start = self.position - self.position % PIECE_BYTES as u64;
        if self.piece.0 != start || self.piece.1.is_empty() {
            let end = (start + PIECE_BYTES as u64).min(self.blob.bytes);
            let read = self.runtime.block_on(self.blobs.read_range(self.blob.id, start..end));
            self.piece = (start, read.map_err(io::Error::other)?);
        }
        let skipped = (self.position - start) as usize;
        let mut available = self.piece.1.get(skipped..).unwrap_or_default();
        let read = available.read(into)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl Seek for BlobFile<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.blob.bytes.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a position before the beginning"))?;
        Ok(self.position)
    }
}
