//! State in one file, owned by one process.
//!
//! The file's lock makes this process the only one that can grant leases. So only terms are durable; who holds a lease
//! and until when is kept in memory: after a restart every earlier holder is gone, and a lease can be had at once at the
//! next term.

use crate::api::{Entry, Expected, Lease, LeaseAnswer, Store, StoreFuture, Version};
use crate::error::StoreError;
use crate::limits;
use ashlar_vocabulary::LeaseTerm;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Key → (version, value).
const ENTRIES: TableDefinition<'_, &str, (u64, &[u8])> = TableDefinition::new("entries");
/// Lease name → last term granted.
const TERMS: TableDefinition<'_, &str, u64> = TableDefinition::new("terms");
/// Counters and the format of the file.
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const LAST_VERSION: &str = "last_version";
const FORMAT: &str = "format";
/// Raised when the tables change their meaning.
const FORMAT_VERSION: u64 = 1;
/// The state is small; the page cache need not be large.
const CACHE_BYTES: usize = 8 << 20;

/// A clock that never goes back and, where the system has one, runs on during suspend: time since any fixed moment.
pub type LeaseClock = Arc<dyn Fn() -> Duration + Send + Sync>;

/// A store in one file.
#[derive(Clone)]
pub struct EmbeddedStore {
    inner: Arc<Inner>,
}

struct Inner {
    path: PathBuf,
    /// `None` after the disk has refused something: the database then refuses everything until it is opened again.
    database: Mutex<Option<Arc<Database>>>,
    /// How often it was opened.
    opened: AtomicU64,
    clock: LeaseClock,
    /// Who holds which lease. Locked around the write of its term, so that grants have one order; only blocking tasks
    /// take it.
    tenures: Mutex<BTreeMap<String, Tenure>>,
}

#[derive(Debug, Clone)]
struct Tenure {
    holder: String,
    term: u64,
    until: Duration,
    /// Which opening of the file it was granted or last checked in: between two of them another process may have granted.
    opened: u64,
}

impl EmbeddedStore {
    /// Opens or creates the file, readable by its owner only, with leases on the standard library's monotonic clock.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if a process has it open, [`StoreError::Corrupt`] if it is no state file of ours.
    pub async fn open(path: &Path) -> Result<EmbeddedStore, StoreError> {
        let start = Instant::now();
        EmbeddedStore::open_with_clock(path, Arc::new(move || start.elapsed())).await
    }

    /// As [`open`](EmbeddedStore::open), with a clock for leases.
    ///
    /// # Errors
    /// As [`open`](EmbeddedStore::open).
    pub async fn open_with_clock(path: &Path, clock: LeaseClock) -> Result<EmbeddedStore, StoreError> {
        let path = path.to_owned();
        let inner = blocking(move || {
            let database = open_database(&path)?;
            let database = Mutex::new(Some(Arc::new(database)));
            let inner = Inner { path, database, opened: AtomicU64::new(1), clock, tenures: Mutex::default() };
            inner.check_format()?;
            Ok(inner)
        });
        Ok(EmbeddedStore { inner: Arc::new(inner.await?) })
    }

    fn run<'a, T: Send + 'static>(
        &'a self,
        work: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> StoreFuture<'a, T> {
        let inner = Arc::clone(&self.inner);
        Box::pin(blocking(move || work(&inner)))
    }
}

/// Runs file work off the async threads. A panic inside the database is a damaged file.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) if error.is_cancelled() => Err(StoreError::Unavailable("shutting down".into())),
        Err(_) => Err(StoreError::Corrupt("the database stopped while reading it".into())),
    }
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
    let disk = |error: std::io::Error| StoreError::Disk { path: path.to_owned(), reason: error.to_string() };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        std::fs::create_dir_all(folder).map_err(disk)?;
    }
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    drop(options.open(path).map_err(disk)?);
    let opened = Database::builder().set_cache_size(CACHE_BYTES).create(path);
    opened.map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Locked { path: path.to_owned() },
        DatabaseError::Storage(StorageError::Io(error))
            if error.kind() != std::io::ErrorKind::InvalidData =>
        {
            disk(error)
        }
        other => StoreError::Corrupt(format!("{}: {other}", path.display())),
    })
}

impl Inner {
    /// The open file; where the disk has refused something before, opened again, which goes back to what was committed last.
    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut open = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(database) = &*open {
            return Ok(Arc::clone(database));
        }
        let database = Arc::new(open_database(&self.path)?);
        *open = Some(Arc::clone(&database));
        self.opened.fetch_add(1, Ordering::Relaxed);
        Ok(database)
    }

    /// Has the file opened again by whoever needs it next, once nobody uses it any more.
    fn close(&self) {
        self.database.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Sorts errors of the database into those of the disk and those of the file.
    fn error(&self, error: impl Into<redb::Error>) -> StoreError {
        match error.into() {
            redb::Error::Io(error) => {
                self.close();
                StoreError::Disk { path: self.path.clone(), reason: error.to_string() }
            }
            redb::Error::PreviousIo => {
                self.close();
                let reason = "an earlier write failed".to_owned();
                StoreError::Disk { path: self.path.clone(), reason }
            }
            other => StoreError::Corrupt(format!("{}: {other}", self.path.display())),
        }
    }

    /// Marks a new file with its format, and refuses one of another.
    fn check_format(&self) -> Result<(), StoreError> {
        let database = self.database()?;
        let write = database.begin_write().map_err(|e| self.error(e))?;
        {
            let mut meta = write.open_table(META).map_err(|e| self.error(e))?;
            let format = meta.get(FORMAT).map_err(|e| self.error(e))?.map(|format| format.value());
            match format {
                None => {
                    meta.insert(FORMAT, FORMAT_VERSION).map_err(|e| self.error(e))?;
                }
                Some(FORMAT_VERSION) => {}
                Some(other) => {
                    let path = self.path.display();
                    return Err(StoreError::Corrupt(format!(
                        "{path} has format {other}, this program reads {FORMAT_VERSION}"
                    )));
                }
            }
            write.open_table(ENTRIES).map_err(|e| self.error(e))?;
            write.open_table(TERMS).map_err(|e| self.error(e))?;
        }
        write.commit().map_err(|e| self.error(e))
    }

    fn last_term(&self, name: &str) -> Result<u64, StoreError> {
        let database = self.database()?;
        let read = database.begin_read().map_err(|e| self.error(e))?;
        let terms = read.open_table(TERMS).map_err(|e| self.error(e))?;
        let term = terms.get(name).map_err(|e| self.error(e))?;
        Ok(term.map_or(0, |term| term.value()))
    }

    fn acquire(
        &self,
        name: String,
        holder: String,
        ttl: Duration,
        min_term: LeaseTerm,
    ) -> Result<LeaseAnswer, StoreError> {
        limits::check_lease(&name, &holder, ttl, min_term)?;
        let mut tenures = self.tenures.lock().unwrap_or_else(PoisonError::into_inner);
        let now = (self.clock)();
        if let Some(tenure) = tenures.get(&name)
            && tenure.until > now
            && tenure.holder != holder
        {
            return Ok(LeaseAnswer::Held {
                by: tenure.holder.clone(),
                term: LeaseTerm(tenure.term),
                remaining: tenure.until - now,
            });
        }
        let term = (self.last_term(&name)? + 1).max(min_term.0);
        let database = self.database()?;
        let write = database.begin_write().map_err(|e| self.error(e))?;
        {
            let mut terms = write.open_table(TERMS).map_err(|e| self.error(e))?;
            terms.insert(name.as_str(), term).map_err(|e| self.error(e))?;
        }
        write.commit().map_err(|e| self.error(e))?;
        let opened = self.opened.load(Ordering::Relaxed);
        tenures.insert(name.clone(), Tenure { holder: holder.clone(), term, until: now + ttl, opened });
        Ok(LeaseAnswer::Granted(Lease { name, holder, term: LeaseTerm(term), ttl }))
    }

    fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let mut tenures = self.tenures.lock().unwrap_or_else(PoisonError::into_inner);
        match tenures.get_mut(&lease.name) {
            Some(tenure) if tenure.term == lease.term.0 && tenure.holder == lease.holder => {
                let opened = self.opened.load(Ordering::Relaxed);
                if tenure.opened != opened && self.last_term(&lease.name)? != tenure.term {
                    return Err(StoreError::LeaseLost { name: lease.name.clone(), term: lease.term });
                }
                tenure.opened = opened;
                tenure.until = (self.clock)() + lease.ttl;
                Ok(())
            }
            _ => Err(StoreError::LeaseLost { name: lease.name.clone(), term: lease.term }),
        }
    }

    fn release(&self, lease: &Lease) {
        let mut tenures = self.tenures.lock().unwrap_or_else(PoisonError::into_inner);
        if tenures.get(&lease.name).is_some_and(|t| t.term == lease.term.0 && t.holder == lease.holder) {
            tenures.remove(&lease.name);
        }
    }

    fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        limits::check_name("key", key)?;
        let database = self.database()?;
        let read = database.begin_read().map_err(|e| self.error(e))?;
        let entries = read.open_table(ENTRIES).map_err(|e| self.error(e))?;
        let found = entries.get(key).map_err(|e| self.error(e))?;
        Ok(found.map(|found| entry(found.value())))
    }

    /// Writes `bytes`, or deletes where there are none. Returns the new version (or 0) and whether an entry was there.
    fn write(
        &self,
        key: &str,
        expected: Expected,
        bytes: Option<Vec<u8>>,
    ) -> Result<(u64, bool), StoreError> {
        limits::check_name("key", key)?;
        limits::check_value(bytes.as_deref().unwrap_or_default())?;
        let database = self.database()?;
        let write = database.begin_write().map_err(|e| self.error(e))?;
        let answer = {
            let mut entries = write.open_table(ENTRIES).map_err(|e| self.error(e))?;
            let found = entries.get(key).map_err(|e| self.error(e))?.map(|found| Version(found.value().0));
            let matches = match expected {
                Expected::Any => true,
                Expected::Absent => found.is_none(),
                Expected::At(version) => found == Some(version),
            };
            if !matches {
                return Err(StoreError::Conflict { key: key.to_owned(), current: found });
            }
            let version = match bytes {
                Some(bytes) => {
                    let mut meta = write.open_table(META).map_err(|e| self.error(e))?;
                    let last = meta.get(LAST_VERSION).map_err(|e| self.error(e))?.map_or(0, |v| v.value());
                    meta.insert(LAST_VERSION, last + 1).map_err(|e| self.error(e))?;
                    entries.insert(key, (last + 1, bytes.as_slice())).map_err(|e| self.error(e))?;
                    last + 1
                }
                None => {
                    entries.remove(key).map_err(|e| self.error(e))?;
                    0
                }
            };
            (version, found.is_some())
        };
        write.commit().map_err(|e| self.error(e))?;
        Ok(answer)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Entry)>, StoreError> {
        limits::check_prefix("key prefix", prefix)?;
        let database = self.database()?;
        let read = database.begin_read().map_err(|e| self.error(e))?;
        let entries = read.open_table(ENTRIES).map_err(|e| self.error(e))?;
        let mut found = Vec::new();
        let mut size = 0;
        for item in entries.range(prefix..).map_err(|e| self.error(e))? {
            let (key, value) = item.map_err(|e| self.error(e))?;
            if !key.value().starts_with(prefix) {
                break;
            }
            if found.len() == limits::LIST_ENTRIES_MAX {
                let what = format!("the number of keys under {prefix}");
                let limit = limits::LIST_ENTRIES_MAX;
                return Err(StoreError::TooLarge { what, size: limit + 1, limit });
            }
            size += value.value().1.len();
            if size > limits::LIST_BYTES_MAX {
                let what = format!("what is under {prefix} (in bytes)");
                return Err(StoreError::TooLarge { what, size, limit: limits::LIST_BYTES_MAX });
            }
            found.push((key.value().to_owned(), entry(value.value())));
        }
        Ok(found)
    }
}

fn entry((version, bytes): (u64, &[u8])) -> Entry {
    Entry { version: Version(version), bytes: bytes.to_vec() }
}

impl Store for EmbeddedStore {
    fn acquire_lease<'a>(
        &'a self,
        name: &'a str,
        holder: &'a str,
        ttl: Duration,
        min_term: LeaseTerm,
    ) -> StoreFuture<'a, LeaseAnswer> {
        let (name, holder) = (name.to_owned(), holder.to_owned());
        self.run(move |inner| inner.acquire(name, holder, ttl, min_term))
    }

    fn renew<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()> {
        let lease = lease.clone();
        self.run(move |inner| inner.renew(&lease))
    }

    fn release<'a>(&'a self, lease: &'a Lease) -> StoreFuture<'a, ()> {
        let lease = lease.clone();
        self.run(move |inner| {
            inner.release(&lease);
            Ok(())
        })
    }

    fn last_term<'a>(&'a self, name: &'a str) -> StoreFuture<'a, LeaseTerm> {
        let name = name.to_owned();
        self.run(move |inner| {
            limits::check_name("lease name", &name)?;
            inner.last_term(&name).map(LeaseTerm)
        })
    }

    fn get<'a>(&'a self, key: &'a str) -> StoreFuture<'a, Option<Entry>> {
        let key = key.to_owned();
        self.run(move |inner| inner.get(&key))
    }

    fn put<'a>(&'a self, key: &'a str, expected: Expected, bytes: Vec<u8>) -> StoreFuture<'a, Version> {
        let key = key.to_owned();
        self.run(move |inner| inner.write(&key, expected, Some(bytes)).map(|(version, _)| Version(version)))
    }

    fn delete<'a>(&'a self, key: &'a str, expected: Expected) -> StoreFuture<'a, bool> {
        let key = key.to_owned();
        self.run(move |inner| inner.write(&key, expected, None).map(|(_, existed)| existed))
    }

    fn list<'a>(&'a self, prefix: &'a str) -> StoreFuture<'a, Vec<(String, Entry)>> {
        let prefix = prefix.to_owned();
        self.run(move |inner| inner.list(&prefix))
    }
}
