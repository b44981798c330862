//! A packed copy from a loaded slice: straight from memory to a file that gets its name when it is whole.

use super::PackedCopy;
use super::file::{self, ALIGNMENT, CHUNK_BYTES, Entry, HEADER_BYTES, Header};
use super::key::EXTENSION;
use crate::source::Content;
use crate::stage::StageModel;
use ashlar_vocabulary::{Bytes, WeightType};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Written bytes after which the disk is waited for: memory holds no more of the copy than this.
const UNSYNCED_BYTES_MAX: u64 = 64 << 20;

/// How the names of unfinished files end.
const PARTIAL: &str = ".partial";

/// Unfinished files of one copy and process number: containers on one volume may all be process 1.
const PARTIALS_MAX: usize = 64;

/// Why there is no packed copy afterwards.
#[derive(Debug, thiserror::Error)]
pub enum CopyWriteError {
    /// It was told to stop.
    #[error("writing the packed copy was stopped")]
    Stopped,
    /// Somebody else is at it.
    #[error("another process is writing the packed copy {0}")]
    Busy(PathBuf),
    /// The file system refuses.
    #[error(
        "cannot keep a packed copy of the weights in {directory}: {source}; make room or let this user write there, or name \
         another directory (`--cache=DIR`, or `cache = \"DIR\"` for a node). Serving goes on without it"
    )]
    Failed {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl PackedCopy {
    /// Writes the copy of `model`, which this is the place of, and removes those of earlier versions; answers the file's
    /// length. Takes no memory to speak of, and gives up soon after `stop` says so. Whatever fails leaves no file behind.
    pub fn write(&self, model: &StageModel, stop: &dyn Fn() -> bool) -> Result<Bytes, CopyWriteError> {
        debug_assert_eq!(model.slice(), self.slice(), "the copy is of another slice");
        let directory = self.path.parent().unwrap_or(Path::new("."));
        let failed = |source| CopyWriteError::Failed { directory: directory.to_owned(), source };
        fs::create_dir_all(directory).map_err(failed)?;
        if self.remove_abandoned(directory).map_err(failed)? {
            return Err(CopyWriteError::Busy(self.path.clone()));
        }
        let mut partial = Partial::create(directory, &self.key.file_name()).map_err(failed)?;
        let mut out = Writer { file: &partial.file, stop, at: HEADER_BYTES as u64, unsynced: 0 };
        let file_bytes = self.fill(&mut out, model).map_err(|error| error.unless_stopped(failed))?;
        partial.take_name(&self.path).map_err(failed)?;
        // The name must last, too.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        self.remove_superseded(directory);
        Ok(Bytes(file_bytes))
    }

    fn fill(&self, out: &mut Writer<'_>, model: &StageModel) -> Result<u64, Interrupted> {
        let mut entries = Vec::new();
        for (name, content) in model.contents() {
            match content {
                Content::Matrix(matrix) => {
                    for (index, segment) in matrix.stored().enumerate() {
                        let (shape, exponent) = ([segment.n, segment.k], segment.exponent);
                        let name = file::segment_name(&name, index);
                        entries.push(out.segment(name, segment.kind, shape, exponent, segment.bytes)?);
                    }
                }
                Content::Vector(values) => {
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    entries.push(out.segment(name, WeightType::F32, [1, values.len()], 0, &bytes)?);
                }
                Content::Table { kind, columns, bytes } => {
                    let rows = bytes.len() / kind.bytes(columns);
                    entries.push(out.segment(name, kind, [rows, columns], 0, bytes)?);
                }
            }
        }
        let manifest = serde_json::to_vec(&entries).map_err(io::Error::other)?;
        let manifest_at = out.at;
        out.write(&manifest)?;
        let header = Header {
            file_bytes: out.at,
            manifest_at,
            place: self.key.place,
            key: self.key.digest,
            manifest: file::chunk_checksum(&manifest),
        };
        out.file.write_all_at(&header.to_bytes(), 0)?;
        Ok(out.at)
    }

    /// Removes unfinished files of this copy and its predecessors whose writers are dead; answers whether one of this very
    /// copy is alive.
    fn remove_abandoned(&self, directory: &Path) -> io::Result<bool> {
        let own = format!(".{}.", self.key.file_name());
        let mut alive = false;
        for (path, name) in names(directory)? {
            if !name.starts_with(&format!(".{}.", self.key.stem())) || !name.ends_with(PARTIAL) {
                continue;
            }
            let Ok(file) = File::open(&path) else { continue };
            // A writer holds the lock for as long as it lives.
            match file.try_lock() {
                Ok(()) => drop(fs::remove_file(&path)),
                Err(TryLockError::WouldBlock) => alive |= name.starts_with(&own),
                Err(TryLockError::Error(_)) => {}
            }
        }
        Ok(alive)
    }

    /// Removes copies of the same cut of what was in the model's place before, or was packed by another version. A file that
    /// cannot be removed does no harm.
    fn remove_superseded(&self, directory: &Path) {
        let (own, stem) = (self.key.file_name(), format!("{}.", self.key.stem()));
        let older = |(_, name): &(PathBuf, String)| {
            name.starts_with(&stem) && name.ends_with(EXTENSION) && *name != own
        };
        for (path, _) in names(directory).into_iter().flatten().filter(older) {
            let mut header = [0; HEADER_BYTES];
            let read = File::open(&path).and_then(|file| file.read_exact_at(&mut header, 0));
            if read.is_ok() && file::place_of(&header) == Some(self.key.place) {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// The regular files of a directory.
fn names(directory: &Path) -> io::Result<Vec<(PathBuf, String)>> {
    let regular = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        entry.file_type().is_ok_and(|kind| kind.is_file()).then(|| (entry.path(), name))
    };
    Ok(fs::read_dir(directory)?.flatten().filter_map(regular).collect())
}

/// Why a file is not whole.
enum Interrupted {
    Stopped,
    Failed(io::Error),
}

impl From<io::Error> for Interrupted {
    fn from(error: io::Error) -> Interrupted {
        Interrupted::Failed(error)
    }
}

impl Interrupted {
    fn unless_stopped(self, failed: impl Fn(io::Error) -> CopyWriteError) -> CopyWriteError {
        match self {
            Interrupted::Stopped => CopyWriteError::Stopped,
            Interrupted::Failed(error) => failed(error),
        }
    }
}

/// Writes one thing behind the other.
struct Writer<'a> {
    file: &'a File,
    stop: &'a dyn Fn() -> bool,
    at: u64,
    unsynced: u64,
}

impl Writer<'_> {
    fn segment(
        &mut self,
        name: String,
        kind: WeightType,
        [n, k]: [usize; 2],
        exponent: i32,
        bytes: &[u8],
    ) -> Result<Entry, Interrupted> {
        self.at = self.at.next_multiple_of(ALIGNMENT);
        let offset = self.at;
        let mut checksums = Vec::with_capacity(bytes.len().div_ceil(CHUNK_BYTES));
        for chunk in bytes.chunks(CHUNK_BYTES) {
            if (self.stop)() {
                return Err(Interrupted::Stopped);
            }
            self.write(chunk)?;
            checksums.push(file::chunk_checksum(chunk));
        }
        let checksum = file::segment_checksum(checksums.into_iter());
        Ok(Entry { name, kind, n, k, exponent, offset, bytes: bytes.len() as u64, checksum })
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= UNSYNCED_BYTES_MAX {
            self.unsynced = 0;
            self.file.sync_data()?;
        }
        Ok(())
    }
}

/// An unfinished file, locked; removed unless it has got its name.
struct Partial {
    path: PathBuf,
    file: File,
    named: bool,
}

fn inode(file: &File) -> Option<u64> {
    file.metadata().ok().map(|metadata| metadata.ino())
}

impl Partial {
    fn create(directory: &Path, name: &str) -> io::Result<Partial> {
        let mut taken = io::Error::from(io::ErrorKind::AlreadyExists);
        for attempt in 0..PARTIALS_MAX {
            let path = directory.join(format!(".{name}.{}-{attempt}{PARTIAL}", std::process::id()));
            match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => taken = error,
                Err(error) => return Err(error),
                Ok(file) => {
                    // Before it was locked, somebody may have taken it for abandoned and removed it.
                    let ours = match file.try_lock() {
                        Ok(()) => fs::metadata(&path).is_ok_and(|m| Some(m.ino()) == inode(&file)),
                        Err(TryLockError::WouldBlock) => false,
                        // Where there are no locks, nobody takes a file for abandoned.
                        Err(TryLockError::Error(_)) => true,
                    };
                    if ours {
                        return Ok(Partial { path, file, named: false });
                    }
                }
            }
        }
        Err(taken)
    }

    /// Gives the file its name, once it is on the disk.
    fn take_name(&mut self, name: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, name)?;
        self.named = true;
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // Once it is named, its old name may be somebody else's.
        if !self.named {
            let _ = fs::remove_file(&self.path);
        }
    }
}
