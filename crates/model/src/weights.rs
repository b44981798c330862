//! Weight files: safetensors, one file or an index of shards, read by position.
//!
//! Only headers are kept in memory. A reader asks for rows (or a column range of a row) of a named tensor and gets f32;
//! f16 and bf16 widen exactly.

use crate::config::ModelConfig;
use crate::gguf;
use crate::pack::{tensor_type, weight_type};
use crate::partial::{PresentError, RangeSet, read_present};
use crate::stage::LoadError;
use ashlar_gguf::{BlockError, GgufError, GgufFiles, dequantize};
use ashlar_kernels::FileRows;
use ashlar_vocabulary::{Precision, WeightType};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The index of a model whose weights are in several files.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Longest safetensors header accepted, in bytes.
pub(crate) const HEADER_BYTES_MAX: u64 = 100 << 20;

/// What is wrong with a model's weights.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The directory has no weights.
    #[error("no model.safetensors or model.safetensors.index.json in {0}")]
    Missing(PathBuf),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not valid safetensors, or is shorter than its header says.
    #[error("{path} is corrupt: {reason}; fetch it again")]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// What is wrong, with the offset where known.
        reason: String,
    },
    /// The index names a file outside the model's directory.
    #[error("{path} names the file `{name}`: only plain file names are allowed")]
    UnsafeName {
        /// The index.
        path: PathBuf,
        /// The offending name.
        name: String,
    },
    /// A GGUF file that cannot be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The journal of a file of which only a part is here.
    #[error(transparent)]
    Present(#[from] PresentError),
    /// That part of the file is not here.
    #[error(
        "bytes {start} to {end} of {path} (tensor `{name}`) were not fetched: this node has only what its slice takes"
    )]
    NotFetched {
        /// Which file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The first byte asked for.
        start: u64,
        /// The one behind the last.
        end: u64,
    },
    /// A tensor that the architecture needs is absent.
    #[error("tensor `{name}` is missing from {directory}")]
    NoTensor {
        /// The tensor.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A tensor has another shape than the configuration demands.
    #[error("tensor `{name}` in {path} has shape {found:?}, config.json demands {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Its file.
        path: PathBuf,
        /// The file's shape.
        found: Vec<usize>,
        /// The configuration's.
        expected: Vec<usize>,
    },
    /// A tensor's element type is not supported.
    #[error("tensor `{name}` in {path} is {dtype}: f32, f16 and bf16 are supported")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its file.
        path: PathBuf,
        /// Its type.
        dtype: String,
    },
}

/// Widens stored weights to f32: floats exactly, blocks as their format defines.
pub(crate) fn widen(kind: WeightType, bytes: &[u8], out: &mut [f32]) -> Result<(), BlockError> {
    match kind {
        WeightType::F32 => {
            for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
            Ok(())
        }
        WeightType::F16 => {
            for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
            Ok(())
        }
        WeightType::Bf16 => {
            for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                let wide = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                // Subnormal brain floats are zero, as in products: a tied table and a head agree.
                *value = if wide.abs() < f32::MIN_POSITIVE { 0f32.copysign(wide) } else { wide };
            }
            Ok(())
        }
        kind => dequantize(tensor_type(kind), bytes, out),
    }
}

#[derive(Debug)]
struct WeightFile {
    path: PathBuf,
    file: File,
    /// What is here of it, if not all.
    present: Option<RangeSet>,
}

#[derive(Debug, Clone)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
}

/// The weight files of one model.
#[derive(Debug)]
pub struct WeightFiles {
    directory: PathBuf,
    files: Vec<WeightFile>,
    tensors: BTreeMap<String, Entry>,
    /// Where the model is in GGUF files, and not in safetensors.
    gguf: Option<GgufFiles>,
    /// What is here of each of these, if not all.
    gguf_present: Vec<Option<RangeSet>>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Opens the files in `directory`, or the GGUF file that it names, and reads their headers.
    pub fn open(directory: &Path) -> Result<WeightFiles, WeightError> {
        let mut weights = WeightFiles {
            directory: directory.to_owned(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            gguf: None,
            gguf_present: Vec::new(),
        };
        if let Some(file) = gguf::file_of(directory) {
            let files = GgufFiles::open(&file)?;
            weights.gguf_present = files.paths().map(read_present).collect::<Result<_, _>>()?;
            weights.gguf = Some(files);
            return Ok(weights);
        }
        for name in file_names(directory)? {
            weights.add(directory.join(name))?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), WeightError> {
        let read = |source| WeightError::Read { path: path.clone(), source };
        let corrupt = |reason: String| WeightError::Corrupt { path: path.clone(), reason };
        let file = File::open(&path).map_err(read)?;
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(corrupt("not a regular file".into()));
        }
        let length = metadata.len();
        if length < 8 {
            return Err(corrupt(format!("{length} bytes are too few for a safetensors file")));
        }
        let mut prefix = [0u8; 8];
        file.read_exact_at(&mut prefix, 0).map_err(read)?;
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > HEADER_BYTES_MAX || header_bytes > length - 8 {
            return Err(corrupt(format!("header claims {header_bytes} bytes of a {length}-byte file")));
        }
        let mut header = vec![0u8; header_bytes as usize];
        file.read_exact_at(&mut header, 8).map_err(read)?;
        // Deserialising checks that offsets are ordered, without holes, and agree with shapes and types.
        let parsed: Metadata =
            serde_json::from_slice(&header).map_err(|error| corrupt(format!("bad header: {error}")))?;
        let data_start = 8 + header_bytes;
        for (name, info) in parsed.tensors() {
            let (start, end) = info.data_offsets;
            let (start, end) = (data_start + start as u64, data_start + end as u64);
            if end > length {
                return Err(corrupt(format!(
                    "tensor `{name}` ends at byte {end}, the file at {length} (truncated)"
                )));
            }
            let entry =
                Entry { file: self.files.len(), dtype: info.dtype, shape: info.shape.clone(), offset: start };
            self.tensors.insert(name.clone(), entry);
        }
        let present = read_present(&path)?;
        self.files.push(WeightFile { path, file, present });
        Ok(())
    }

    /// The configuration in the metadata of GGUF files, to be served in `precision`.
    pub(crate) fn gguf_config(&self, precision: Precision) -> Result<ModelConfig, LoadError> {
        let Some(files) = &self.gguf else {
            return Err(WeightError::Missing(self.directory.clone()).into());
        };
        let mut config = ModelConfig::from_gguf(files)?;
        config.serve_in(precision);
        Ok(config)
    }

    /// The name of one of the files, in the order in which they were opened.
    pub(crate) fn file_name(&self, index: usize) -> String {
        let path = match &self.gguf {
            Some(files) => files.paths().nth(index),
            None => self.files.get(index).map(|file| file.path.as_path()),
        };
        path.and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether a tensor is present.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Names, shapes and element types of all tensors, sorted by name; bytes of the element type as `usize`.
    pub fn list(&self) -> impl Iterator<Item = (&str, &[usize], String)> {
        self.tensors.iter().map(|(name, e)| (name.as_str(), e.shape.as_slice(), format!("{:?}", e.dtype)))
    }

    /// A reader for the tensor `name`, which must have `shape`.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorReader<'_>, WeightError> {
        if let Some(files) = &self.gguf {
            return self.gguf_tensor(files, name, shape);
        }
        let entry = self.tensors.get(name).ok_or_else(|| WeightError::NoTensor {
            name: name.to_owned(),
            directory: self.directory.clone(),
        })?;
        let file = &self.files[entry.file];
        if entry.shape != shape {
            return Err(WeightError::Shape {
                name: name.to_owned(),
                path: file.path.clone(),
                found: entry.shape.clone(),
                expected: shape.to_vec(),
            });
        }
        let kind = match entry.dtype {
            Dtype::F32 => WeightType::F32,
            Dtype::F16 => WeightType::F16,
            Dtype::BF16 => WeightType::Bf16,
            other => {
                return Err(WeightError::Dtype {
                    name: name.to_owned(),
                    path: file.path.clone(),
                    dtype: format!("{other:?}"),
                });
            }
        };
        let columns = shape.last().copied().unwrap_or(1);
        let source = Source::Safetensors { file: &file.file, offset: entry.offset };
        Ok(TensorReader {
            source,
            file: entry.file,
            present: file.present.as_ref(),
            path: &file.path,
            name: name.to_owned(),
            kind,
            columns,
            interleaved: None,
            is_vector: shape.len() == 1,
        })
    }

    fn gguf_tensor<'a>(
        &'a self,
        files: &'a GgufFiles,
        name: &str,
        shape: &[usize],
    ) -> Result<TensorReader<'a>, WeightError> {
        let stored = gguf::name_of(name);
        if !files.has(&stored) {
            return Err(WeightError::NoTensor { name: stored, directory: self.directory.clone() });
        }
        let reader = files.tensor(&stored)?;
        let found = reader.info().shape();
        if found != shape {
            return Err(WeightError::Shape {
                name: stored,
                path: self.directory.clone(),
                found,
                expected: shape.to_vec(),
            });
        }
        Ok(TensorReader {
            source: Source::Gguf(reader),
            file: reader.info().file,
            present: self.gguf_present.get(reader.info().file).and_then(Option::as_ref),
            path: &self.directory,
            kind: weight_type(reader.info().tensor_type),
            columns: reader.info().columns(),
            interleaved: gguf::interleaved(files, name),
            is_vector: shape.len() == 1,
            name: stored,
        })
    }
}

/// Where a tensor's bytes are.
#[derive(Debug)]
enum Source<'a> {
    Safetensors { file: &'a File, offset: u64 },
    Gguf(ashlar_gguf::TensorReader<'a>),
}

/// Reads rows of one tensor; a vector counts as one row.
#[derive(Debug)]
pub struct TensorReader<'a> {
    source: Source<'a>,
    /// Which of the model's files has it.
    file: usize,
    /// What is here of that file, if not all.
    present: Option<&'a RangeSet>,
    path: &'a Path,
    name: String,
    kind: WeightType,
    columns: usize,
    /// The size of the heads whose rows the file interleaves.
    interleaved: Option<usize>,
    is_vector: bool,
}

impl TensorReader<'_> {
    /// Type in the file.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// Inputs of a row in the file.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Raw bytes of `columns` (whole blocks) of the rows `rows`, row after row; whole rows are one read where the file has
    /// them in order.
    pub fn read_bytes(&self, rows: Range<usize>, columns: Range<usize>) -> Result<Vec<u8>, WeightError> {
        let (width, stride) = (self.stored_bytes(columns.len()), self.stored_bytes(self.columns));
        let mut bytes = vec![0u8; rows.len() * width];
        if let (Some(head_dim), true) = (self.interleaved, self.is_vector && self.kind == WeightType::F32) {
            // Of a bias the elements are what a matrix has as rows.
            for (element, chunk) in columns.zip(bytes.chunks_exact_mut(4)) {
                self.read_at(chunk, 4 * gguf::interleaved_row(element, head_dim) as u64)?;
            }
        } else if columns.len() == self.columns && self.interleaved.is_none() {
            self.read_at(&mut bytes, (rows.start * stride) as u64)?;
        } else {
            for (row, chunk) in rows.zip(bytes.chunks_exact_mut(width.max(1))) {
                let row = self.interleaved.map_or(row, |head_dim| gguf::interleaved_row(row, head_dim));
                self.read_at(chunk, (row * stride + self.stored_bytes(columns.start)) as u64)?;
            }
        }
        Ok(bytes)
    }

    /// Appends `columns` (whole blocks) of the rows `rows` to `to`; whole rows that lie near each other are one read.
    pub(crate) fn append_rows(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        to: &mut FileRows,
    ) -> Result<(), WeightError> {
        let (width, stride) = (self.stored_bytes(columns.len()), self.stored_bytes(self.columns));
        let stored = |row| self.interleaved.map_or(row, |head_dim| gguf::interleaved_row(row, head_dim));
        let (first, last) =
            rows.clone().map(stored).fold((usize::MAX, 0), |(a, b), row| (a.min(row), b.max(row)));
        // Of interleaved heads every second row is wanted, or all of them in another order.
        if columns.len() == self.columns && last < first.saturating_add(2 * rows.len()) {
            let (start, bytes) = to.grow((last + 1 - first) * stride);
            self.read_at(bytes, (first * stride) as u64)?;
            rows.for_each(|row| to.push(start + (stored(row) - first) * stride));
            return Ok(());
        }
        for row in rows {
            let (start, bytes) = to.grow(width);
            self.read_at(bytes, (stored(row) * stride + self.stored_bytes(columns.start)) as u64)?;
            to.push(start);
        }
        Ok(())
    }

    /// Bytes of `columns` weights of a row.
    fn stored_bytes(&self, columns: usize) -> usize {
        columns / self.kind.block_len() * self.kind.block_bytes()
    }

    /// The weights `columns` (whole blocks) of the rows `rows`, widened to f32.
    pub fn read(&self, rows: Range<usize>, columns: Range<usize>) -> Result<Vec<f32>, WeightError> {
        let mut values = vec![0f32; rows.len() * columns.len()];
        widen(self.kind, &self.read_bytes(rows, columns)?, &mut values)
            .map_err(|error| self.unusable(&error))?;
        Ok(values)
    }

    /// The error for blocks that cannot be what they should.
    pub(crate) fn unusable(&self, error: &BlockError) -> WeightError {
        WeightError::Corrupt {
            path: self.path.to_owned(),
            reason: format!("tensor `{}`: {error}", self.name),
        }
    }

    /// Where the tensor begins in its file.
    fn offset(&self) -> u64 {
        match &self.source {
            Source::Gguf(reader) => reader.info().offset,
            Source::Safetensors { offset, .. } => *offset,
        }
    }

    /// Which of the model's files has the tensor, and where in it the rows `rows` lie, whole; of a vector all of it.
    pub(crate) fn place_of(&self, rows: Range<usize>) -> (usize, RangeSet) {
        let (offset, stride) = (self.offset(), self.stored_bytes(self.columns) as u64);
        let place =
            |rows: Range<usize>| offset + rows.start as u64 * stride..offset + rows.end as u64 * stride;
        let ranges = match self.interleaved {
            _ if self.is_vector => [place(0..1)].into_iter().collect(),
            Some(head_dim) => {
                rows.map(|row| gguf::interleaved_row(row, head_dim)).map(|row| place(row..row + 1)).collect()
            }
            None => [place(rows)].into_iter().collect(),
        };
        (self.file, ranges)
    }

    fn read_at(&self, buffer: &mut [u8], relative: u64) -> Result<(), WeightError> {
        if let Some(present) = self.present {
            let start = self.offset() + relative;
            let end = start + buffer.len() as u64;
            if !present.covers(&(start..end)) {
                let (path, name) = (self.path.to_owned(), self.name.clone());
                return Err(WeightError::NotFetched { path, name, start, end });
            }
        }
        match &self.source {
            Source::Gguf(reader) => Ok(reader.read_bytes_at(relative, buffer)?),
            Source::Safetensors { file, offset } => {
                let offset = offset + relative;
                file.read_exact_at(buffer, offset).map_err(|source| WeightError::Corrupt {
                    path: self.path.to_owned(),
                    reason: format!("tensor `{}` at byte {offset}: {source}", self.name),
                })
            }
        }
    }
}

/// File names of the weights in `directory`: the single file, or the shards its index names.
pub(crate) fn file_names(directory: &Path) -> Result<Vec<String>, WeightError> {
    let index = directory.join(INDEX_FILE);
    if !index.exists() {
        return if directory.join("model.safetensors").exists() {
            Ok(vec!["model.safetensors".into()])
        } else {
            Err(WeightError::Missing(directory.to_owned()))
        };
    }
    let text = std::fs::read(&index).map_err(|source| WeightError::Read { path: index.clone(), source })?;
    let names = index_names(&text)
        .map_err(|error| WeightError::Corrupt { path: index.clone(), reason: error.to_string() })?;
    for name in &names {
        if !is_plain(name) {
            return Err(WeightError::UnsafeName { path: index, name: name.clone() });
        }
    }
    Ok(names.into_iter().collect())
}

/// The files that an index names, whatever they are called.
pub(crate) fn index_names(index: &[u8]) -> Result<BTreeSet<String>, serde_json::Error> {
    Ok(serde_json::from_slice::<ShardIndex>(index)?.weight_map.into_values().collect())
}

/// Whether `name` names a file in its own folder, and nothing hidden.
pub(crate) fn is_plain(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}
