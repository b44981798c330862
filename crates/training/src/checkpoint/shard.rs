//! A shard's bytes, read by position.

use super::{
    CheckpointError, FRAME_BYTES, HEADER_BYTES_MAX, Header, KINDS, MAGIC, Position, StoredShare, VERSION,
    adapter_header,
};
use ashlar_model::Trained;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

/// A shard whose header has been read and found whole.
#[derive(Debug)]
pub struct Shard<R> {
    pub(super) header: Header,
    source: R,
    /// Where the numbers begin.
    body: u64,
}

impl<R: Read + Seek> Shard<R> {
    /// Reads what a shard says of itself.
    ///
    /// # Errors
    /// [`CheckpointError::Version`], [`CheckpointError::Damaged`] and [`CheckpointError::Read`].
    pub fn open(mut source: R) -> Result<Shard<R>, CheckpointError> {
        let damaged = CheckpointError::Damaged;
        let length = source.seek(SeekFrom::End(0))?;
        source.seek(SeekFrom::Start(0))?;
        let mut read = |bytes: &mut [u8]| {
            source.read_exact(bytes).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => damaged("it is cut off"),
                _ => error.into(),
            })
        };
        let mut frame = [0; FRAME_BYTES];
        read(&mut frame)?;
        if frame[..8] != MAGIC || frame[8..12] != VERSION.to_le_bytes() {
            return Err(CheckpointError::Version);
        }
        let header_bytes = u32::from_le_bytes([frame[12], frame[13], frame[14], frame[15]]) as usize;
        let body = (FRAME_BYTES + header_bytes) as u64;
        if header_bytes > HEADER_BYTES_MAX || body > length {
            return Err(damaged("its header"));
        }
        let mut header = vec![0; header_bytes];
        read(&mut header)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| damaged("its header"))?;
        let numbers = header.tensors.iter().fold(0_usize, |sum, share| sum.saturating_add(share.numbers()));
        if numbers.saturating_mul(4 * KINDS) as u64 != length - body {
            return Err(damaged("its length"));
        }
        Ok(Shard { header, source, body })
    }

    pub(super) fn check(&self, trained: &Trained, at: Position) -> Result<(), CheckpointError> {
        let mismatch = |what| Err(CheckpointError::Mismatch(what));
        let header = &self.header;
        if header.job != at.job.to_string() {
            return mismatch("job");
        }
        if header.steps != at.steps {
            return mismatch("step");
        }
        if header.adapter != adapter_header(trained) {
            return mismatch("adapter");
        }
        Ok(())
    }

    /// The share that it has of a tensor, and where its numbers begin, counted from the first of all.
    pub(super) fn find(&self, name: &str) -> Option<(StoredShare, usize)> {
        let mut before = 0;
        for share in &self.header.tensors {
            if share.name == name {
                return Some((share.clone(), before));
            }
            before += KINDS * share.numbers();
        }
        None
    }

    /// Reads numbers, counted from the first of all.
    pub(super) fn read(&mut self, numbers: Range<usize>, to: &mut [f32]) -> Result<(), CheckpointError> {
        self.source.seek(SeekFrom::Start(self.body + 4 * numbers.start as u64))?;
        let mut bytes = vec![0; 4 * numbers.len()];
        self.source.read_exact(&mut bytes)?;
        for (to, x) in to.iter_mut().zip(bytes.chunks_exact(4)) {
            *to = f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
        }
        Ok(())
    }
}
