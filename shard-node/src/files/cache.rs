//! Where fetched files are kept: `DIRECTORY/<digest in hexadecimal>/`, sparse, each with a journal of what is there.
//!
//! Several nodes of one machine may share the directory: whoever fetches holds `<digest>.lock` beside it. Reading takes no lock,
//! because what is there stays as it is.

use ashlar_model::partial::{RangeSet, read_present, write_present};
use ashlar_service_kit::lock::{HeldFile, LockError};
use ashlar_vocabulary::ModelDigest;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// So many bytes may have to be fetched again after a power cut.
const UNSAVED_MAX: u64 = 64 << 20;

/// The directory.
#[derive(Debug, Clone)]
pub(crate) struct ModelCache {
    root: PathBuf,
}

impl ModelCache {
    pub(crate) fn new(root: PathBuf) -> ModelCache {
        ModelCache { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where the model with this digest is, or would be.
    pub(crate) fn directory(&self, model: ModelDigest) -> PathBuf {
        self.root.join(hexadecimal(model))
    }

    /// Makes the model's directory one's own to change; `None` while it is another process's.
    pub(crate) fn hold(&self, model: ModelDigest) -> io::Result<Option<HeldFile>> {
        fs::create_dir_all(&self.root)?;
        match HeldFile::hold(&self.root.join(format!("{}.lock", hexadecimal(model)))) {
            Ok(held) => Ok(Some(held)),
            Err(LockError::Held { .. }) => Ok(None),
            Err(LockError::Files { source, .. }) => Err(source),
        }
    }

    /// An empty directory for a model whose digest is still to be checked. Whoever asks holds the model.
    pub(crate) fn unchecked(&self, model: ModelDigest) -> io::Result<PathBuf> {
        let directory = self.root.join(format!("{}.partial", hexadecimal(model)));
        remove(&directory)?;
        fs::create_dir(&directory)?;
        Ok(directory)
    }

    /// Gives that directory the name under which it is found.
    pub(crate) fn keep(&self, unchecked: &Path, model: ModelDigest) -> io::Result<()> {
        File::open(unchecked)?.sync_all()?;
        fs::rename(unchecked, self.directory(model))?;
        File::open(&self.root)?.sync_all()
    }

    /// Forgets a model. Whoever asks holds it.
    pub(crate) fn forget(&self, model: ModelDigest) -> io::Result<()> {
        remove(&self.directory(model))
    }
}

fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn hexadecimal(model: ModelDigest) -> String {
    model.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A file of which more and more is there.
#[derive(Debug)]
pub(crate) struct SparseFile {
    path: PathBuf,
    file: File,
    present: RangeSet,
    unsaved: u64,
}

impl SparseFile {
    /// A new one, so many bytes long, of which nothing is there.
    pub(crate) fn create(path: PathBuf, bytes: u64) -> io::Result<SparseFile> {
        let file = File::options().create_new(true).write(true).open(&path)?;
        file.set_len(bytes)?;
        Ok(SparseFile { path, file, present: RangeSet::default(), unsaved: 0 })
    }

    /// One that is there, with what is there of it.
    pub(crate) fn open(path: PathBuf) -> io::Result<SparseFile> {
        let present = read_present(&path).map_err(io::Error::other)?;
        let present =
            present.ok_or_else(|| io::Error::other(format!("{} has no journal", path.display())))?;
        let file = File::options().write(true).open(&path)?;
        Ok(SparseFile { path, file, present, unsaved: 0 })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn present(&self) -> &RangeSet {
        &self.present
    }

    /// Adds bytes; that they are there is said from time to time.
    pub(crate) fn write(&mut self, start: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, start)?;
        self.present.insert(start..start + bytes.len() as u64);
        self.unsaved += bytes.len() as u64;
        if self.unsaved >= UNSAVED_MAX { self.save() } else { Ok(()) }
    }

    /// Says durably what is there, once it is durable.
    pub(crate) fn save(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        write_present(&self.path, &self.present)?;
        self.unsaved = 0;
        Ok(())
    }
}
