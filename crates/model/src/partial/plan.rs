//! Which bytes of a model's files are needed: to name it, and to load a slice of it.
//!
//! A slice's ranges are what loading it asks for: the same walk over the same names, with a source that notes instead of
//! reading. A cut of rows takes exactly these rows, a cut of columns whole ones.

use super::ranges::RangeSet;
use crate::config::ModelConfig;
use crate::digest;
use crate::gguf;
use crate::slice::RankSlice;
use crate::source::{MatrixSource, VectorSource, WeightSource};
use crate::stage::{LoadError, StageModel};
use crate::weights::{self, HEADER_BYTES_MAX, WeightError, WeightFiles};
use ashlar_gguf::{GgufFiles, reader};
use ashlar_kernels::{Isa, Kernels, PackedMatrix};
use ashlar_vocabulary::{Precision, WeightType};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

/// Bytes of files, by the files' names.
pub type FileRanges = BTreeMap<String, RangeSet>;

/// How many bytes from its start on are needed to read the header of the file with weights at `path`, of which the first `have`
/// are there; `None` once these suffice. Ask again with more: some headers tell their length only step by step.
///
/// # Errors
/// [`WeightError`], where it can be no such file.
pub fn header_needed(path: &Path, have: u64) -> Result<Option<u64>, WeightError> {
    let read = |source| WeightError::Read { path: path.to_owned(), source };
    let corrupt = |reason: String| WeightError::Corrupt { path: path.to_owned(), reason };
    let file = File::open(path).map_err(read)?;
    let length = file.metadata().map_err(read)?.len();
    if path.extension().is_some_and(|extension| extension == "gguf") {
        let first = digest::GGUF_HEADER_BYTES.min(length);
        if have < first {
            return Ok(Some(first));
        }
        return match reader::header_bytes(path) {
            Ok(header) if header <= have || have >= length => Ok(None),
            // Read from beyond what is there it may be anything, also no header.
            Ok(_) | Err(_) if have < length.min(reader::HEADER_BYTES_MAX) => {
                Ok(Some(have.saturating_mul(2).min(length)))
            }
            Ok(header) => Err(corrupt(format!("header claims {header} bytes"))),
            Err(error) => Err(error.into()),
        };
    }
    if length < 8 {
        return Err(corrupt(format!("{length} bytes are too few for a safetensors file")));
    }
    if have < 8 {
        return Ok(Some(8));
    }
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0).map_err(read)?;
    let header = u64::from_le_bytes(prefix);
    if header > HEADER_BYTES_MAX || header > length - 8 {
        return Err(corrupt(format!("header claims {header} bytes of a {length}-byte file")));
    }
    Ok((have < 8 + header).then_some(8 + header))
}

/// What names the model in `directory` and says how it computes, beside its small files: all that
/// [`model_digest`](crate::digest::model_digest) and [`ModelConfig::open`] look at. Headers must be there.
///
/// # Errors
/// [`WeightError`].
pub fn identity_ranges(directory: &Path) -> Result<FileRanges, WeightError> {
    let mut ranges = FileRanges::new();
    let mut add = |path: &Path, more: Vec<Range<u64>>| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        ranges.entry(name).or_default().extend(more);
    };
    if let Some(file) = gguf::file_of(directory) {
        let files = GgufFiles::open(&file)?;
        let paths: Vec<&Path> = files.paths().collect();
        for path in &paths {
            add(path, digest::sampled_ranges(path)?);
        }
        for tensor in files.tensors().iter().filter(|tensor| tensor.name == gguf::ROPE_FACTORS) {
            add(paths[tensor.file], vec![tensor.offset..tensor.offset + tensor.bytes]);
        }
        return Ok(ranges);
    }
    for name in weights::file_names(directory)? {
        let path = directory.join(name);
        add(&path, digest::sampled_ranges(&path)?);
    }
    Ok(ranges)
}

/// What loading `slice` of the model in `directory` reads, beside what names the model. Only what [`identity_ranges`] has must be
/// there.
///
/// # Errors
/// [`LoadError`].
pub fn slice_ranges(
    directory: &Path,
    precision: impl Into<Precision>,
    slice: &RankSlice,
) -> Result<FileRanges, LoadError> {
    let config = ModelConfig::open(directory, precision)?;
    if let Some(problem) = slice.problem(&config.shape) {
        return Err(LoadError::Slice(problem));
    }
    let files = WeightFiles::open(directory)?;
    let kernels = Arc::new(Kernels::new(Isa::best(), 1));
    let notes = Notes { files: &files, kernels: &kernels, wanted: RefCell::default() };
    StageModel::assemble(config, slice.clone(), kernels.clone(), &notes, &mut |_, _| {})?;
    Ok(notes.wanted.into_inner())
}

/// Notes what is asked for, and hands out nothing of use.
struct Notes<'a> {
    files: &'a WeightFiles,
    kernels: &'a Kernels,
    wanted: RefCell<FileRanges>,
}

impl Notes<'_> {
    fn want(&self, name: &str, shape: &[usize], rows: Range<usize>) -> Result<(), WeightError> {
        let (file, ranges) = self.files.tensor(name, shape)?.place_of(rows);
        let file = self.files.file_name(file);
        self.wanted.borrow_mut().entry(file).or_default().extend(ranges.iter());
        Ok(())
    }
}

impl WeightSource for Notes<'_> {
    type Error = WeightError;

    fn matrix(
        &self,
        _name: &str,
        sources: &[MatrixSource],
        parts: &[Range<usize>],
    ) -> Result<PackedMatrix, WeightError> {
        for source in sources {
            self.want(&source.name, &source.shape, source.rows.clone())?;
        }
        Ok(PackedMatrix::pack(WeightType::F32, 0, parts, self.kernels.pool(), &|_, _| {}))
    }

    fn vector(&self, _name: &str, sources: &[VectorSource]) -> Result<Vec<f32>, WeightError> {
        for source in sources {
            self.want(&source.name, &[source.length], 0..1)?;
        }
        Ok(Vec::new())
    }

    fn table(&self, _name: &str, source: &MatrixSource) -> Result<Vec<u8>, WeightError> {
        self.want(&source.name, &source.shape, source.rows.clone())?;
        Ok(Vec::new())
    }
}
