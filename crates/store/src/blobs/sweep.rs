//! What nobody refers to goes.

use super::PAGE_BLOBS_MAX;
use super::backend::{Key, Kind};
use super::error::BlobError;
use super::store::Blobs;
use ashlar_vocabulary::BlobId;
use std::collections::BTreeSet;
use std::time::Duration;

/// What is referred to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// Blobs.
    pub blobs: BTreeSet<BlobId>,
    /// Manifests: they and everything in them.
    pub manifests: BTreeSet<BlobId>,
}

/// What a sweep removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many blobs.
    pub blobs: u64,
    /// How many bytes they had.
    pub bytes: u64,
    /// How many writes that nobody finished.
    pub unfinished: u64,
}

impl Blobs {
    /// Deletes every blob that `roots` do not hold and that was last written at least `grace` ago, by the clock of the
    /// place where it lies; with it, writes that nobody finished in that time. The grace is for blobs that have been
    /// written, but that are not yet referred to: it should be longer than the longest upload, a day for example.
    ///
    /// Run one sweep at a time. Where it stops, by an error or because it is dropped, the next goes on. In a directory an
    /// old blob that is uploaded again while it is swept survives for certain. A service has no operation for that: there
    /// the age is looked at immediately before the deletion, and the moment in between remains.
    ///
    /// # Errors
    /// Those of [`get_manifest`](Blobs::get_manifest), before anything is deleted; [`BlobError::Unavailable`],
    /// [`BlobError::Disk`], [`BlobError::Refused`].
    pub async fn sweep(&self, roots: &Roots, grace: Duration) -> Result<Swept, BlobError> {
        let mut held = roots.blobs.clone();
        for id in &roots.manifests {
            held.insert(*id);
            held.extend(self.get_manifest(*id).await?.entries().map(|(_, entry)| entry.blob));
        }
        let mut swept = Swept::default();
        let mut after = None;
        loop {
            let (page, more) = self.backend.list(Kind::Content, after, PAGE_BLOBS_MAX).await?;
            for one in page.iter().filter(|one| one.age >= grace && !held.contains(&one.id)) {
                if self.backend.delete_older(Key::content(one.id), grace).await? {
                    self.backend.delete_older(Key::pieces(one.id), grace).await?;
                    swept.blobs += 1;
                    swept.bytes += one.bytes;
                }
            }
            after = page.last().map(|last| last.id);
            if !more || after.is_none() {
                break;
            }
        }
        self.sweep_tables(grace).await?;
        swept.unfinished = self.backend.clean(grace).await?;
        Ok(swept)
    }

    /// Tables without a blob: a crash between the two leaves them.
    async fn sweep_tables(&self, grace: Duration) -> Result<(), BlobError> {
        let mut after = None;
        loop {
            let (page, more) = self.backend.list(Kind::Pieces, after, PAGE_BLOBS_MAX).await?;
            for one in page.iter().filter(|one| one.age >= grace) {
                if self.backend.size(Key::content(one.id)).await?.is_none() {
                    self.backend.delete_older(Key::pieces(one.id), grace).await?;
                }
            }
            after = page.last().map(|last| last.id);
            if !more || after.is_none() {
                return Ok(());
            }
        }
    }
}
