//! The blob store as a session's thread sees it: every call waits, and ends with the session.

use super::alarm::Alarm;
use super::error::SessionError;
use ashlar_store::blobs::{BlobError, BlobInfo, Blobs, Manifest};
use ashlar_vocabulary::BlobId;
use std::fs::File;
use std::future::Future;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use tokio::runtime::Handle;

/// A blob store, and where its calls run.
#[derive(Clone)]
pub(crate) struct Storage {
    pub(crate) blobs: Blobs,
    pub(crate) runtime: Handle,
    pub(crate) alarm: Alarm,
}

impl Storage {
    fn wait<T>(&self, call: impl Future<Output = Result<T, BlobError>>) -> Result<T, SessionError> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                ended = self.alarm.raised() => Err(ended.into()),
                done = call => Ok(done?),
            }
        })
    }

    /// Copies a blob into a nameless file in `directory`, checked.
    pub(crate) fn fetch(&self, id: BlobId, directory: &Path) -> Result<File, SessionError> {
        std::fs::create_dir_all(directory)?;
        let mut file = tempfile::tempfile_in(directory)?;
        let mut reader = self.wait(self.blobs.get(id))?;
        while let Some(chunk) = self.wait(reader.next())? {
            file.write_all(&chunk)?;
        }
        file.seek(SeekFrom::Start(0))?;
        Ok(file)
    }

    /// Stores what `write` gives piece by piece; it is durable when this returns.
    pub(crate) fn put_pieces(
        &self,
        write: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), SessionError>) -> Result<(), SessionError>,
    ) -> Result<BlobInfo, SessionError> {
        let mut writer = self.blobs.writer();
        write(&mut |piece| self.wait(writer.write(piece)))?;
        self.wait(writer.finish())
    }

    /// Stores bytes; they are durable when this returns.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<BlobInfo, SessionError> {
        self.wait(self.blobs.put(bytes))
    }

    /// Stores a manifest.
    pub(crate) fn put_manifest(&self, manifest: &Manifest) -> Result<BlobInfo, SessionError> {
        self.wait(self.blobs.put_manifest(manifest))
    }
}
