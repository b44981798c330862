//! Weight files: safetensors, one file or an index of shards, read by position.
//!
//! Only headers are kept in memory. A reader asks for rows (or a column range of a row) of a named tensor and gets f32;
//! f16 and bf16 widen exactly.

use crate::config::ModelConfig;
use crate::gguf;
use crate::pack::weight_type;
use crate::partial::{PresentError, RangeSet, read_present};
use crate::stage::LoadError;
use ashlar_gguf::{GgufError, GgufFiles};
use ashlar_vocabulary::{Precision, WeightType};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

mod tensor;

use tensor::Source;
pub use tensor::TensorReader;
pub(crate) use tensor::widen;

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
        if shape.contains(&0) {
            // Of nothing there are rows of any length.
            let reason = format!("tensor `{name}` is empty: {shape:?}");
            return Err(WeightError::Corrupt { path: file.path.clone(), reason });
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_empty_tensor_is_refused_whatever_it_says_of_its_rows() {
        let folder = tempfile::tempdir().unwrap();
        let header = r#"{"a":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}"#;
        let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
        let weights = WeightFiles::open(folder.path()).unwrap();
        let refused = weights.tensor("a", &[0, 1 << 62]).unwrap_err();
        assert!(refused.to_string().contains("is empty"), "{refused}");
    }
}
