//! From nothing to a slice that can be loaded: first what names the model, which decides whether a source is believed, then the
//! slice, from whoever has a part of it.

use super::cache::{ModelCache, SparseFile};
use super::portions::{batches, lacking, spread};
use super::source::{Source, SourceError, SourceFile};
use ashlar_model::digest::model_digest;
use ashlar_model::partial::{
    FileRanges, RangeSet, header_needed, identity_ranges, is_weight_file, slice_ranges,
};
use ashlar_model::{LoadError, RankSlice};
use ashlar_service_kit::lock::HeldFile;
use ashlar_vocabulary::{ModelDigest, Precision};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::{info, warn};

/// Between two rounds of asking everybody.
const PAUSE: Duration = Duration::from_millis(250);
/// Rounds without a single byte while nobody has the model yet: nodes that start together learn of theirs within seconds.
const UNKNOWN_ROUNDS: u32 = 20;
/// Rounds without a single byte while somebody serves others: they take minutes.
const BUSY_ROUNDS: u32 = 2400;
/// How often a connection to one source may fail.
const FAILURES_MAX: u32 = 3;

/// What is fetched.
#[derive(Debug, Clone)]
pub(crate) struct Goal {
    pub(crate) model: ModelDigest,
    pub(crate) precision: Precision,
    /// All of what is to be loaded.
    pub(crate) slices: Vec<RankSlice>,
}

/// Somebody who may have it.
pub(crate) struct Candidate<'a> {
    /// Who, for people.
    pub(crate) name: String,
    pub(crate) connect: Box<dyn Fn() -> Result<Box<dyn Source>, SourceError> + Send + 'a>,
    /// How often that has failed.
    failures: u32,
}

impl<'a> Candidate<'a> {
    pub(crate) fn new(
        name: String,
        connect: impl Fn() -> Result<Box<dyn Source>, SourceError> + Send + 'a,
    ) -> Candidate<'a> {
        Candidate { name, connect: Box::new(connect), failures: 0 }
    }
}

/// Why a slice was not fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// It is not wanted any more.
    #[error("the assignment was replaced while its files were fetched")]
    Stopped,
    /// The cache's directory.
    #[error(
        "cannot keep fetched files in {directory}: {source}; `models` in the node's configuration names another directory"
    )]
    Cache {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The model is none that this node can load.
    #[error("cannot tell what the slice takes: {0}")]
    Plan(#[from] LoadError),
    /// Everybody was asked.
    #[error("{}", if .0.is_empty() { "there is nobody to fetch it from".to_owned() } else { .0.join("; ") })]
    Nowhere(Vec<String>),
}

/// Why an attempt with one source ended.
enum Trouble {
    /// The source is to blame.
    Source(SourceError),
    /// Nobody else would help.
    Own(FetchError),
}

impl From<SourceError> for Trouble {
    fn from(error: SourceError) -> Trouble {
        Trouble::Source(error)
    }
}

/// Fetches a slice.
pub(crate) struct Fetch<'a> {
    pub(crate) cache: &'a ModelCache,
    pub(crate) goal: &'a Goal,
    /// Hears bytes that are there, and how many it will be.
    pub(crate) progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Raised when it is not wanted any more.
    pub(crate) stop: &'a AtomicBool,
}

impl Fetch<'_> {
    /// Fetches what is not there, from `candidates` in their order; the model's directory.
    pub(crate) fn run(&self, mut candidates: Vec<Candidate<'_>>) -> Result<PathBuf, FetchError> {
        let model = self.goal.model;
        let directory = self.cache.directory(model);
        if self.is_complete(&directory) {
            return Ok(directory);
        }
        let _held = self.hold()?;
        let mut files = match self.open(&directory) {
            Ok(files) => files,
            Err(error) => {
                warn!("{}: {error}; it is fetched again", directory.display());
                self.kept(self.cache.forget(model))?;
                None
            }
        };
        if files.is_none() {
            self.ask_all(&mut candidates, &mut |source| self.identify(source))?;
            files = self.kept(self.open(&directory))?;
        }
        let mut files = files.unwrap_or_default();
        let wanted = self.wanted(&directory)?;
        let total: u64 = wanted.values().map(RangeSet::bytes).sum();
        let missing: u64 = lacking(&wanted, &files).values().map(RangeSet::bytes).sum();
        if missing > 0 {
            info!("fetching {} of the {} MiB that the slice takes", missing >> 20, total >> 20);
            self.ask_all(&mut candidates, &mut |source| self.complete(source, &wanted, &mut files))?;
        }
        Ok(directory)
    }

    /// Whether all is there: then it does not matter who fetches more.
    fn is_complete(&self, directory: &Path) -> bool {
        let Ok(Some(files)) = self.open(directory) else { return false };
        let lacks = |wanted: FileRanges| lacking(&wanted, &files).values().any(|ranges| !ranges.is_empty());
        self.wanted(directory).is_ok_and(|wanted| !lacks(wanted))
    }

    /// Waits until no other process fetches this model.
    fn hold(&self) -> Result<HeldFile, FetchError> {
        loop {
            if let Some(held) = self.kept(self.cache.hold(self.goal.model))? {
                return Ok(held);
            }
            self.pause()?;
        }
    }

    /// The model's files with weights, if its directory is there.
    fn open(&self, directory: &Path) -> io::Result<Option<Vec<SparseFile>>> {
        let entries = match fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            if is_weight_file(&entry.file_name().to_string_lossy()) {
                files.push(SparseFile::open(entry.path())?);
            }
        }
        Ok(Some(files))
    }

    /// What all slices take.
    fn wanted(&self, directory: &Path) -> Result<FileRanges, FetchError> {
        let mut wanted = FileRanges::new();
        for slice in &self.goal.slices {
            for (name, ranges) in slice_ranges(directory, self.goal.precision, slice)? {
                wanted.entry(name).or_default().extend(ranges.iter());
            }
        }
        Ok(wanted)
    }

    /// Tries everybody, round after round as long as somebody may have more, until `attempt` says that all is there.
    fn ask_all(
        &self,
        candidates: &mut [Candidate<'_>],
        attempt: &mut dyn FnMut(&mut dyn Source) -> Result<Attempt, Trouble>,
    ) -> Result<(), FetchError> {
        let mut rounds = 0;
        loop {
            let (mut reasons, mut patience) = (Vec::new(), 0);
            for candidate in candidates.iter_mut() {
                self.check()?;
                if candidate.failures >= FAILURES_MAX {
                    reasons.push(format!("{}: given up", candidate.name));
                    continue;
                }
                let outcome = (candidate.connect)()
                    .map_err(Trouble::Source)
                    .and_then(|mut source| attempt(&mut *source));
                match outcome {
                    Ok(Attempt::Complete) => return Ok(()),
                    Ok(Attempt::Partial(bytes)) => {
                        if bytes > 0 {
                            rounds = 0;
                        }
                        patience = patience.max(UNKNOWN_ROUNDS);
                        reasons.push(format!("{}: it has only a part", candidate.name));
                    }
                    Err(Trouble::Own(error)) => return Err(error),
                    Err(Trouble::Source(error)) => {
                        // Its end may be that of this assignment.
                        self.check()?;
                        reasons.push(format!("{}: {error}", candidate.name));
                        match error {
                            SourceError::Unknown => patience = patience.max(UNKNOWN_ROUNDS),
                            SourceError::Busy => patience = patience.max(BUSY_ROUNDS),
                            SourceError::Connection(_) | SourceError::Hub(_) => {
                                warn!("{}: {error}", candidate.name);
                                candidate.failures += 1;
                                patience = patience.max(UNKNOWN_ROUNDS);
                            }
                            // What it says cannot be believed.
                            SourceError::Damaged(_) | SourceError::Improper(_) | SourceError::Refused(_) => {
                                warn!("{}: {error}; it is not asked again", candidate.name);
                                candidate.failures = FAILURES_MAX;
                            }
                        }
                    }
                }
            }
            let hopeless = candidates.iter().all(|candidate| candidate.failures >= FAILURES_MAX);
            if hopeless || rounds >= patience {
                return Err(FetchError::Nowhere(reasons));
            }
            rounds += 1;
            self.pause()?;
        }
    }

    /// Fetches small files, headers and samples, and gives them their name if the digest is right.
    fn identify(&self, source: &mut dyn Source) -> Result<Attempt, Trouble> {
        let model = self.goal.model;
        let directory = self.own(self.cache.unchecked(model))?;
        let listed: Vec<SourceFile> = source.files().to_vec();
        let (weights, small): (Vec<_>, Vec<_>) = listed.into_iter().partition(SourceFile::has_weights);
        for file in small {
            let Some(bytes) = self.read_all(source, &file, &[0..file.bytes].into_iter().collect())? else {
                return Ok(Attempt::Partial(0));
            };
            self.own(write_small(&directory.join(&file.name), &bytes))?;
        }
        let mut files = Vec::new();
        for file in weights {
            let mut sparse = self.own(SparseFile::create(directory.join(&file.name), file.bytes))?;
            let mut have = 0;
            while let Some(needed) = header_needed(sparse.path(), have).map_err(unbelievable)? {
                if !self.read_into(source, &file, &[have..needed].into_iter().collect(), &mut sparse)? {
                    return Ok(Attempt::Partial(0));
                }
                have = needed;
            }
            files.push((file, sparse));
        }
        let wanted = identity_ranges(&directory).map_err(unbelievable)?;
        for (file, sparse) in &mut files {
            let wanted = wanted.get(&file.name).map(|wanted| wanted.without(sparse.present()));
            if !self.read_into(source, file, &wanted.unwrap_or_default(), sparse)? {
                return Ok(Attempt::Partial(0));
            }
            self.own(sparse.save())?;
        }
        let digest = model_digest(&directory, self.goal.precision).map_err(unbelievable)?;
        if digest != model {
            return Err(SourceError::Improper(format!("its model has digest {digest}, not {model}")).into());
        }
        self.own(self.cache.keep(&directory, model))?;
        info!("{} has the model", source.name());
        Ok(Attempt::Complete)
    }

    /// Fetches what the source has of what is missing.
    fn complete(
        &self,
        source: &mut dyn Source,
        wanted: &FileRanges,
        files: &mut [SparseFile],
    ) -> Result<Attempt, Trouble> {
        let total: u64 = wanted.values().map(RangeSet::bytes).sum();
        let listed: Vec<SourceFile> = source.files().to_vec();
        let before: u64 = lacking(wanted, files).values().map(RangeSet::bytes).sum();
        let mut left = before;
        for (name, ranges) in lacking(wanted, files) {
            let of_name = |file: &&mut SparseFile| file.path().file_name().is_some_and(|own| *own == *name);
            let (Some(listed), Some(file)) =
                (listed.iter().find(|listed| listed.name == name), files.iter_mut().find(of_name))
            else {
                continue;
            };
            let available = listed.of(&ranges);
            let mut fetch = || -> Result<(), Trouble> {
                for batch in batches(&available, source.batch()) {
                    self.check().map_err(Trouble::Own)?;
                    let Some(bytes) = source.read(&name, &batch)? else { return Ok(()) };
                    left = left.saturating_sub(bytes.len() as u64);
                    self.own(spread(&batch, &bytes, file))?;
                    (self.progress)(total - left, total);
                }
                Ok(())
            };
            let fetched = fetch();
            // What has come stays, whatever the end was.
            self.own(file.save())?;
            fetched?;
        }
        let lacks = lacking(wanted, files).values().any(|ranges| !ranges.is_empty());
        if !lacks {
            info!("fetched {} MiB, the last from {}", before >> 20, source.name());
        }
        Ok(if lacks { Attempt::Partial(before - left) } else { Attempt::Complete })
    }

    /// `ranges` of a file, one after the other; `None` where the source does not have all of them.
    fn read_all(
        &self,
        source: &mut dyn Source,
        file: &SourceFile,
        ranges: &RangeSet,
    ) -> Result<Option<Vec<u8>>, Trouble> {
        if file.of(ranges) != *ranges {
            return Ok(None);
        }
        let mut all = Vec::new();
        for batch in batches(ranges, source.batch()) {
            self.check().map_err(Trouble::Own)?;
            let Some(bytes) = source.read(&file.name, &batch)? else { return Ok(None) };
            all.extend(bytes);
        }
        Ok(Some(all))
    }

    /// The same, into the file; whether all of them came.
    fn read_into(
        &self,
        source: &mut dyn Source,
        file: &SourceFile,
        ranges: &RangeSet,
        to: &mut SparseFile,
    ) -> Result<bool, Trouble> {
        if file.of(ranges) != *ranges {
            return Ok(false);
        }
        for batch in batches(ranges, source.batch()) {
            self.check().map_err(Trouble::Own)?;
            let Some(bytes) = source.read(&file.name, &batch)? else { return Ok(false) };
            self.own(spread(&batch, &bytes, to))?;
        }
        Ok(true)
    }

    fn check(&self) -> Result<(), FetchError> {
        if self.stop.load(Ordering::Relaxed) { Err(FetchError::Stopped) } else { Ok(()) }
    }

    fn pause(&self) -> Result<(), FetchError> {
        self.check()?;
        std::thread::sleep(PAUSE);
        self.check()
    }

    fn kept<T>(&self, result: io::Result<T>) -> Result<T, FetchError> {
        let directory = || self.cache.root().to_owned();
        result.map_err(|source| FetchError::Cache { directory: directory(), source })
    }

    fn own<T>(&self, result: io::Result<T>) -> Result<T, Trouble> {
        self.kept(result).map_err(Trouble::Own)
    }
}

/// How far an attempt with one source came.
enum Attempt {
    /// All is there.
    Complete,
    /// The source has no more; so many bytes came from it.
    Partial(u64),
}

/// Something that no model has: the source is not to be believed.
fn unbelievable(error: ashlar_model::WeightError) -> Trouble {
    Trouble::Source(SourceError::Improper(error.to_string()))
}

fn write_small(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::options().create_new(true).write(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}
