//! A packed copy as a source of weights: found, checked, and read into memory.

use super::PackedCopy;
use super::file::{self, CHUNK_BYTES, Entry, HEADER_BYTES, Header, MANIFEST_BYTES_MAX};
use crate::config::ModelConfig;
use crate::slice::RankSlice;
use crate::source::{self, MatrixSource, VectorSource, WeightSource};
use crate::stage::{LoadError, StageModel};
use ashlar_kernels::{Kernels, PackedMatrix, ThreadPool};
use ashlar_vocabulary::{Bytes, WeightType};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use tracing::{info, warn};

/// Why a slice could not be loaded from its packed copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyReadError {
    /// There is none yet.
    #[error("there is no packed copy yet")]
    Absent,
    /// There is something that cannot be trusted.
    #[error("{0}")]
    Unusable(String),
    /// The slice cannot be loaded in any way.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Where a slice was loaded from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The model's files; the packed copy is still to be written.
    Files,
    /// The packed copy.
    Copy,
}

impl PackedCopy {
    /// Loads the slice: from the copy if it can be trusted, otherwise from the model's files, which are not touched before.
    /// `progress` hears (bytes ready, bytes in all), and begins anew where a copy turns out damaged.
    pub fn load_or_pack(
        &self,
        kernels: &Arc<Kernels>,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<(StageModel, Origin), LoadError> {
        match self.load(kernels, progress) {
            Ok(model) => {
                info!("read the packed copy {}", self.path.display());
                return Ok((model, Origin::Copy));
            }
            Err(CopyReadError::Load(error)) => return Err(error),
            Err(CopyReadError::Absent) => {
                info!("no packed copy {} yet: packing the weights", self.path.display())
            }
            Err(CopyReadError::Unusable(reason)) => {
                warn!("packed copy {}: {reason}; packing the weights anew", self.path.display());
            }
        }
        let kernels = kernels.clone();
        let model = StageModel::load(&self.model, self.precision, self.slice.clone(), kernels, progress)?;
        Ok((model, Origin::Files))
    }

    /// Loads the slice from the copy alone; of the model itself only the configuration is read.
    pub fn load(
        &self,
        kernels: &Arc<Kernels>,
        progress: &mut dyn FnMut(Bytes, Bytes),
    ) -> Result<StageModel, CopyReadError> {
        let config = ModelConfig::open(&self.model, self.precision).map_err(LoadError::from)?;
        if let Some(problem) = self.slice.problem(&config.shape) {
            return Err(LoadError::Slice(problem).into());
        }
        let packer = kernels.clone();
        let copy = OpenCopy::open(&self.path, &self.key.digest, packer.pool())?;
        StageModel::assemble(config, self.slice.clone(), kernels.clone(), &copy, progress)
    }

    /// The slice that it is a copy of.
    pub(super) fn slice(&self) -> &RankSlice {
        &self.slice
    }
}

/// A copy whose header and manifest have been checked.
struct OpenCopy<'a> {
    file: File,
    entries: BTreeMap<String, Entry>,
    /// Where segments end at the latest.
    data_end: u64,
    pool: &'a ThreadPool,
}

fn unusable(reason: impl Into<String>) -> CopyReadError {
    CopyReadError::Unusable(reason.into())
}

impl<'a> OpenCopy<'a> {
    fn open(path: &Path, key: &[u8; 32], pool: &'a ThreadPool) -> Result<OpenCopy<'a>, CopyReadError> {
        let unreadable = |error: io::Error| unusable(format!("it cannot be read: {error}"));
        // Looked at before it is opened: opening a pipe would wait.
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(CopyReadError::Absent),
            metadata => metadata.map_err(unreadable)?,
        };
        if !metadata.is_file() {
            return Err(unusable("it is not a regular file"));
        }
        let file = File::open(path).map_err(unreadable)?;
        let length = file.metadata().map_err(unreadable)?.len();
        if length < HEADER_BYTES as u64 {
            return Err(unusable(format!("{length} bytes are too few for its header")));
        }
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
        let header = Header::from_bytes(&bytes).map_err(unusable)?;
        if header.key != *key {
            return Err(unusable("it is the copy of another model, slice or version"));
        }
        if header.file_bytes != length {
            return Err(unusable(format!("it has {length} bytes instead of {}", header.file_bytes)));
        }
        let manifest_bytes =
            length.checked_sub(header.manifest_at).filter(|&bytes| bytes <= MANIFEST_BYTES_MAX);
        let Some(manifest_bytes) = manifest_bytes else {
            return Err(unusable("its manifest lies outside of it, or is too long"));
        };
        let mut manifest = vec![0; manifest_bytes as usize];
        file.read_exact_at(&mut manifest, header.manifest_at).map_err(unreadable)?;
        if file::chunk_checksum(&manifest) != header.manifest {
            return Err(unusable("its manifest is damaged"));
        }
        let entries: Vec<Entry> = serde_json::from_slice(&manifest)
            .map_err(|error| unusable(format!("its manifest cannot be parsed: {error}")))?;
        let entries = entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        Ok(OpenCopy { file, entries, data_end: header.manifest_at, pool })
    }

    /// The entry `name`, if it is what it must be.
    fn entry(
        &self,
        name: &str,
        kind: WeightType,
        [n, k]: [usize; 2],
        bytes: usize,
    ) -> Result<&Entry, CopyReadError> {
        let Some(entry) = self.entries.get(name) else {
            return Err(unusable(format!("it lacks `{name}`")));
        };
        let end = entry.offset.checked_add(entry.bytes);
        let fits = entry.offset >= HEADER_BYTES as u64 && end.is_some_and(|end| end <= self.data_end);
        if !fits || (entry.kind, entry.n, entry.k, entry.bytes) != (kind, n, k, bytes as u64) {
            return Err(unusable(format!("its `{name}` is not {n} × {k} of {kind}")));
        }
        Ok(entry)
    }

    /// Fills `to` from the entry's segment, on all threads, and checks it.
    fn read(&self, entry: &Entry, to: &mut [u8]) -> Result<(), CopyReadError> {
        let chunk = |(index, to)| Mutex::new((index * CHUNK_BYTES, to, Ok([0; 32])));
        let chunks: Vec<_> = to.chunks_mut(CHUNK_BYTES).enumerate().map(chunk).collect();
        self.pool.run(chunks.len(), &|index| {
            let mut chunk = chunks[index].lock().unwrap_or_else(PoisonError::into_inner);
            let (at, to, checksum) = &mut *chunk;
            let read = self.file.read_exact_at(to, entry.offset + *at as u64);
            *checksum = read.map(|()| file::chunk_checksum(to));
        });
        let checksums =
            chunks.into_iter().map(|chunk| chunk.into_inner().unwrap_or_else(PoisonError::into_inner).2);
        let checksums = checksums
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| unusable(format!("its `{}` cannot be read: {error}", entry.name)))?;
        if file::segment_checksum(checksums.into_iter()) != entry.checksum {
            return Err(unusable(format!("its `{}` is damaged: look after the disk", entry.name)));
        }
        Ok(())
    }

    fn read_vec(&self, name: &str, kind: WeightType, [n, k]: [usize; 2]) -> Result<Vec<u8>, CopyReadError> {
        let mut bytes = vec![0; n * kind.bytes(k)];
        self.read(self.entry(name, kind, [n, k], bytes.len())?, &mut bytes)?;
        Ok(bytes)
    }
}

impl WeightSource for OpenCopy<'_> {
    type Error = CopyReadError;

    fn matrix(
        &self,
        name: &str,
        sources: &[MatrixSource],
        parts: &[Range<usize>],
    ) -> Result<PackedMatrix, CopyReadError> {
        let mut segments = Vec::new();
        for (index, run) in source::runs(sources).enumerate() {
            let (name, layout) = (file::segment_name(name, index), source::layout(run, parts));
            let mut data = layout.buffer();
            let bytes = data.as_bytes().len();
            let entry = self.entry(&name, layout.kind(), [layout.n(), layout.k()], bytes)?;
            self.read(entry, data.as_bytes_mut())?;
            segments.push((layout, entry.exponent, data));
        }
        Ok(PackedMatrix::restored(segments))
    }

    fn vector(&self, name: &str, sources: &[VectorSource]) -> Result<Vec<f32>, CopyReadError> {
        let length = sources.iter().map(|source| source.range.len()).sum();
        let bytes = self.read_vec(name, WeightType::F32, [1, length])?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
    }

    fn table(&self, name: &str, source: &MatrixSource) -> Result<Vec<u8>, CopyReadError> {
        self.read_vec(name, source.kind, [source.rows.len(), source.columns.len()])
    }
}
