//! Blobs in a directory, shared by the processes of one host (or of several, where the file system is).
//!
//! ```text
//! sha256/ab/ab34…   a blob, plain bytes: `sha256sum` shows its name
//! pieces/ab/ab34…   the table of its pieces
//! incoming/…        what is being written; each file is locked by its writer
//! lock              held shared to make a blob visible, exclusively to look at its age and delete it
//! ```
//! A file is written aside, synced, renamed, and its folder synced: a crash leaves the old state or the new one.

use super::backend::{Backend, BlobFuture, Incoming, Key, Kind, Listed, Opened, Source};
use super::error::BlobError;
use super::store::BlobOptions;
use ashlar_vocabulary::BlobId;
use bytes::Bytes;
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// What is written and read at a time.
const BLOCK_BYTES: usize = 1 << 20;
/// Written data is synced at least this often, so that no single call waits for a disk that lags far behind.
const UNSYNCED_BYTES_MAX: u64 = 64 << 20;
/// Between two tries for the lock, which is held for a rename or a deletion at a time.
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// A directory of blobs.
#[derive(Clone)]
pub(super) struct Directory {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    keep_free_bytes: u64,
    timeout: Duration,
}

impl Directory {
    /// Opens or creates it, readable by its owner only.
    pub(super) async fn open(root: &Path, options: &BlobOptions) -> Result<Directory, BlobError> {
        let inner = Inner {
            root: root.to_owned(),
            keep_free_bytes: options.keep_free_bytes,
            timeout: options.timeout,
        };
        let directory = Directory { inner: Arc::new(inner) };
        directory.run(Inner::prepare).await?;
        Ok(directory)
    }

    /// Runs file work off the async threads. After the time-out the work may still end well, unseen.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, BlobError> + Send + 'static,
    ) -> BlobFuture<'static, T> {
        let inner = Arc::clone(&self.inner);
        let timeout = inner.timeout;
        Box::pin(async move {
            match tokio::time::timeout(timeout, tokio::task::spawn_blocking(move || work(&inner))).await {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(BlobError::Unavailable("shutting down".into())),
                Err(_) => Err(BlobError::Unavailable(format!("no answer of the disk within {timeout:?}"))),
            }
        })
    }
}

impl Inner {
    fn prepare(&self) -> Result<(), BlobError> {
        for folder in [Kind::Content.folder(), Kind::Pieces.folder(), "incoming"] {
            let folder = self.root.join(folder);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
            made.map_err(|error| failed(&folder, error))?;
        }
        self.lock_file().map(drop)?;
        sync_folder(&self.root)
    }

    fn place(&self, key: Key) -> PathBuf {
        self.root.join(key.path())
    }

    fn lock_file(&self) -> Result<File, BlobError> {
        let path = self.root.join("lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        file.map_err(|error| failed(&path, error))
    }

    /// Tries for the lock until the time-out: a process that is stopped while it holds it must not stop us for ever.
    fn locked(&self, lock: impl Fn(&File) -> Result<(), TryLockError>) -> Result<File, BlobError> {
        let file = self.lock_file()?;
        let start = Instant::now();
        loop {
            match lock(&file) {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if start.elapsed() < self.timeout => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(BlobError::Unavailable("another process keeps the lock file locked".into()));
                }
                Err(TryLockError::Error(error)) => return Err(failed(&self.root.join("lock"), error)),
            }
        }
    }

    /// The time by the clock that stamps the files, which for a network file system is another host's.
    fn now(&self) -> Result<SystemTime, BlobError> {
        let file = self.lock_file()?;
        let written = file.write_all_at(b"1", 0).and_then(|()| file.metadata()?.modified());
        written.map_err(|error| failed(&self.root.join("lock"), error))
    }

    /// Refuses to fill the file system to the last byte.
    fn check_room(&self, bytes: usize) -> Result<(), BlobError> {
        let found = rustix::fs::statvfs(&self.root).map_err(|error| failed(&self.root, error.into()))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        if free < self.keep_free_bytes.saturating_add(bytes as u64) {
            return Err(BlobError::Full { place: self.root.display().to_string() });
        }
        Ok(())
    }

    fn new_temp(&self) -> Result<Arc<Temp>, BlobError> {
        self.check_room(0)?;
        let path = self.root.join("incoming").join(uuid::Uuid::new_v4().simple().to_string());
        let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = opened.map_err(|error| failed(&path, error))?;
        let temp = Temp { path, file, published: AtomicBool::new(false) };
        // Tells a clean-up that the writer lives. A file system without locks leaves it the age.
        let _ = temp.file.try_lock();
        Ok(Arc::new(temp))
    }

    fn append(&self, temp: &Temp, block: &[u8]) -> Result<(), BlobError> {
        self.check_room(block.len())?;
        (&temp.file).write_all(block).map_err(|error| failed(&temp.path, error))
    }

    fn publish(&self, temp: &Temp, key: Key) -> Result<(), BlobError> {
        temp.file.sync_all().map_err(|error| failed(&temp.path, error))?;
        let place = self.place(key);
        let folder = place.parent().unwrap_or(&self.root);
        match DirBuilder::new().mode(0o700).create(folder) {
            Ok(()) => sync_folder(folder.parent().unwrap_or(&self.root))?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(folder, error)),
        }
        let _lock = self.locked(File::try_lock_shared)?;
        // Content that is there already is replaced by the same, which makes it young and heals a damaged copy. What
        // counts for its age is when it becomes visible.
        let times = temp.file.set_modified(self.now()?);
        times.map_err(|error| failed(&temp.path, error))?;
        std::fs::rename(&temp.path, &place).map_err(|error| failed(&place, error))?;
        temp.published.store(true, Ordering::Release);
        sync_folder(folder)
    }

    fn delete(&self, key: Key, older_than: Option<Duration>) -> Result<bool, BlobError> {
        let place = self.place(key);
        let _lock = self.locked(File::try_lock)?;
        let removed = match older_than {
            Some(age) => match std::fs::metadata(&place).and_then(|found| found.modified()) {
                Ok(written) if self.age(written)? < age => return Ok(false),
                Ok(_) => std::fs::remove_file(&place),
                Err(error) => Err(error),
            },
            None => std::fs::remove_file(&place),
        };
        match removed {
            Ok(()) => sync_folder(place.parent().unwrap_or(&self.root)).map(|()| true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(failed(&place, error)),
        }
    }

    fn age(&self, written: SystemTime) -> Result<Duration, BlobError> {
        Ok(self.now()?.duration_since(written).unwrap_or(Duration::ZERO))
    }

    fn list(
        &self,
        kind: Kind,
        after: Option<BlobId>,
        limit: usize,
    ) -> Result<(Vec<Listed>, bool), BlobError> {
        let now = self.now()?;
        let mut found = Vec::new();
        let first = after.map_or(0, |id| id.0[0]);
        for fan in first..=u8::MAX {
            let folder = self.root.join(kind.folder()).join(format!("{fan:02x}"));
            let mut ids = ids_in(&folder, fan)?;
            ids.retain(|id| after.is_none_or(|after| *id > after));
            ids.sort_unstable();
            for id in ids {
                let place = self.place(Key { kind, id });
                let about = match std::fs::metadata(&place) {
                    Ok(about) => about,
                    // Deleted meanwhile.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(failed(&place, error)),
                };
                if found.len() == limit {
                    return Ok((found, true));
                }
                let written = about.modified().map_err(|error| failed(&place, error))?;
                let age = now.duration_since(written).unwrap_or(Duration::ZERO);
                found.push(Listed { id, bytes: about.len(), age });
            }
        }
        Ok((found, false))
    }

    fn clean(&self, age: Duration) -> Result<u64, BlobError> {
        let folder = self.root.join("incoming");
        let mut removed = 0;
        for item in std::fs::read_dir(&folder).map_err(|error| failed(&folder, error))? {
            let path = item.map_err(|error| failed(&folder, error))?.path();
            let old = match std::fs::metadata(&path).and_then(|about| about.modified()) {
                Ok(written) => self.age(written)? >= age,
                Err(_) => false,
            };
            if !old {
                continue;
            }
            let Ok(file) = OpenOptions::new().write(true).open(&path) else { continue };
            // A slow writer that lives keeps its file, whatever its age.
            if !matches!(file.try_lock(), Err(TryLockError::WouldBlock))
                && std::fs::remove_file(&path).is_ok()
            {
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn open_object(&self, key: Key) -> Result<Option<(File, u64)>, BlobError> {
        let place = self.place(key);
        match File::open(&place) {
            Ok(file) => {
                let about = file.metadata().map_err(|error| failed(&place, error))?;
                Ok(Some((file, about.len())))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(&place, error)),
        }
    }
}

/// Sorts errors of the disk into want of room and the rest.
fn failed(path: &Path, error: std::io::Error) -> BlobError {
    let place = path.display().to_string();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            BlobError::Full { place }
        }
        _ => BlobError::Disk { place, reason: error.to_string() },
    }
}

fn sync_folder(folder: &Path) -> Result<(), BlobError> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(|error| failed(folder, error))
}

/// Files named like blobs; anything else is not ours and stays.
fn ids_in(folder: &Path, fan: u8) -> Result<Vec<BlobId>, BlobError> {
    let items = match std::fs::read_dir(folder) {
        Ok(items) => items,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(folder, error)),
    };
    let mut ids = Vec::new();
    for item in items {
        let name = item.map_err(|error| failed(folder, error))?.file_name();
        if let Some(Ok(id)) = name.to_str().map(BlobId::from_hex)
            && id.0[0] == fan
        {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// A file in `incoming/`, removed when its last user is gone unless it was published.
struct Temp {
    path: PathBuf,
    file: File,
    published: AtomicBool,
}

impl Drop for Temp {
    fn drop(&mut self) {
        if !self.published.load(Ordering::Acquire) {
            // What cannot be removed now is left to a clean-up.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

struct FileIncoming {
    directory: Directory,
    temp: Option<Arc<Temp>>,
    unsynced: u64,
}

impl FileIncoming {
    fn temp(&self) -> Result<Arc<Temp>, BlobError> {
        self.temp.clone().ok_or_else(|| BlobError::Invalid("this write has ended: begin it again".into()))
    }
}

impl Incoming for FileIncoming {
    fn append(&mut self, block: Bytes) -> BlobFuture<'_, ()> {
        Box::pin(async move {
            let temp = self.temp()?;
            self.unsynced += block.len() as u64;
            let sync = self.unsynced >= UNSYNCED_BYTES_MAX;
            let appended = self.directory.run(move |inner| {
                inner.append(&temp, &block)?;
                if sync {
                    temp.file.sync_data().map_err(|error| failed(&temp.path, error))?;
                }
                Ok(())
            });
            appended.await?;
            if sync {
                self.unsynced = 0;
            }
            Ok(())
        })
    }

    fn commit(self: Box<Self>, key: Key) -> BlobFuture<'static, ()> {
        Box::pin(async move {
            let temp = self.temp()?;
            self.directory.run(move |inner| inner.publish(&temp, key)).await
        })
    }
}

impl Drop for FileIncoming {
    fn drop(&mut self) {
        // Removing a large file takes a while, so not on a thread that serves others.
        if let (Some(temp), Ok(runtime)) = (self.temp.take(), tokio::runtime::Handle::try_current()) {
            runtime.spawn_blocking(move || drop(temp));
        }
    }
}

struct FileSource {
    directory: Directory,
    file: Arc<File>,
    place: PathBuf,
    rest: Range<u64>,
}

impl Source for FileSource {
    fn next(&mut self) -> BlobFuture<'_, Option<Bytes>> {
        Box::pin(async move {
            let length = (self.rest.end - self.rest.start).min(BLOCK_BYTES as u64);
            let (at, length) = (self.rest.start, usize::try_from(length).unwrap_or(BLOCK_BYTES));
            if length == 0 {
                return Ok(None);
            }
            let (file, place) = (Arc::clone(&self.file), self.place.clone());
            let read = self.directory.run(move |_| {
                let mut bytes = vec![0; length];
                let mut filled = 0;
                while filled < length {
                    match file.read_at(&mut bytes[filled..], at + filled as u64) {
                        Ok(0) => break,
                        Ok(more) => filled += more,
                        Err(error) if error.kind() == ErrorKind::Interrupted => {}
                        Err(error) => return Err(failed(&place, error)),
                    }
                }
                bytes.truncate(filled);
                Ok(bytes)
            });
            let bytes = read.await?;
            self.rest.start += bytes.len() as u64;
            Ok(if bytes.is_empty() { None } else { Some(Bytes::from(bytes)) })
        })
    }
}

impl Backend for Directory {
    fn block_bytes(&self) -> usize {
        BLOCK_BYTES
    }

    fn object_bytes_max(&self) -> u64 {
        u64::MAX
    }

    fn put(&self, key: Key, bytes: Bytes) -> BlobFuture<'_, ()> {
        self.run(move |inner| {
            let temp = inner.new_temp()?;
            inner.append(&temp, &bytes)?;
            inner.publish(&temp, key)
        })
    }

    fn begin(&self) -> BlobFuture<'_, Box<dyn Incoming>> {
        Box::pin(async move {
            let temp = self.run(Inner::new_temp).await?;
            let incoming = FileIncoming { directory: self.clone(), temp: Some(temp), unsynced: 0 };
            Ok(Box::new(incoming) as Box<dyn Incoming>)
        })
    }

    fn read(&self, key: Key, range: Option<Range<u64>>) -> BlobFuture<'_, Option<Opened>> {
        Box::pin(async move {
            let Some((file, total)) = self.run(move |inner| inner.open_object(key)).await? else {
                return Ok(None);
            };
            let rest = range.map_or(0..total, |range| range.start.min(total)..range.end.min(total));
            let place = self.inner.place(key);
            let source = FileSource { directory: self.clone(), file: Arc::new(file), place, rest };
            Ok(Some(Opened { total, source: Box::new(source) }))
        })
    }

    fn size(&self, key: Key) -> BlobFuture<'_, Option<u64>> {
        self.run(move |inner| Ok(inner.open_object(key)?.map(|(_, total)| total)))
    }

    fn delete(&self, key: Key) -> BlobFuture<'_, bool> {
        self.run(move |inner| inner.delete(key, None))
    }

    fn delete_older(&self, key: Key, age: Duration) -> BlobFuture<'_, bool> {
        self.run(move |inner| inner.delete(key, Some(age)))
    }

    fn list(&self, kind: Kind, after: Option<BlobId>, limit: usize) -> BlobFuture<'_, (Vec<Listed>, bool)> {
        self.run(move |inner| inner.list(kind, after, limit))
    }

    fn clean(&self, age: Duration) -> BlobFuture<'_, u64> {
        self.run(move |inner| inner.clean(age))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_and_a_spent_quota_are_told_from_other_errors() {
        let kind = |code| failed(Path::new("/blobs"), std::io::Error::from_raw_os_error(code));
        for code in [28, 122, 27] {
            let error = kind(code);
            assert!(error.is_full(), "{error}");
            assert!(error.to_string().contains("free some space"), "{error}");
        }
        assert!(matches!(kind(5), BlobError::Disk { .. }));
    }
}
