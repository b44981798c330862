//! A model becomes one GGUF file, its matrices in the types of a [`Quantization`].
//!
//! Layout: this file (what will be written, and writing it), `tensors` (names, order and types), `metadata` (what the
//! configuration says under GGUF's keys), `rows` (a tensor's rows, read and converted).
//!
//! **Invariants:** rows are converted each by itself with the codec that loading uses, so the file holds the bits that
//! quantising while loading would compute. Memory holds a few chunks of rows, never a tensor. `out` appears whole or
//! not at all.

mod metadata;
mod rows;
mod tensors;

use crate::config::{ConfigError, ModelConfig};
use crate::gguf;
use crate::weights::{WeightError, WeightFiles};
use ashlar_gguf::writer::write_file;
use ashlar_gguf::{BlockError, GgufError, GgufFiles, GgufHeader, GgufWriteError, GgufWriter, Value};
use ashlar_kernels::ThreadPool;
use ashlar_vocabulary::{Bytes, Quantization, WeightType};
use rows::Rows;
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tensors::{Origin, Planned};

/// Chunks of rows that wait for one another, per thread: enough that no thread runs out of work.
const CHUNKS_PER_THREAD: usize = 4;

/// Why a model could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights that are read.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The GGUF file that is read.
    #[error(transparent)]
    Read(#[from] GgufError),
    /// The file that is written.
    #[error(transparent)]
    Write(#[from] GgufWriteError),
    /// Weights that a type cannot hold, or stored blocks that are none.
    #[error("tensor `{name}` cannot be converted: {reason}")]
    Block {
        /// The tensor.
        name: String,
        /// Why.
        reason: BlockError,
    },
    /// A weight beyond the largest half.
    #[error("tensor `{name}` has the weight {value}, more than f16 holds: choose bf16 or f32")]
    ExceedsF16 {
        /// The tensor.
        name: String,
        /// The weight.
        value: f32,
    },
    /// The caller wanted no more.
    #[error("stopped before the file was complete: nothing was written under its name")]
    Stopped,
}

/// Where the weights come from.
#[derive(Debug)]
enum Source {
    Checkpoint(WeightFiles),
    Gguf(GgufFiles),
}

/// A model that is about to be written as a GGUF file.
#[derive(Debug)]
pub struct Export {
    config: ModelConfig,
    quantization: Quantization,
    source: Source,
    tensors: Vec<Planned>,
    notes: Vec<String>,
}

impl Export {
    /// Reads configuration and headers of `model` (a directory, or a GGUF file) and decides what will be written. A
    /// missing tensor is found here.
    pub fn open(model: &Path, quantization: Quantization) -> Result<Export, ExportError> {
        let config = ModelConfig::open(model, None)?;
        let types = config.stored(quantization);
        let (source, tensors) = match gguf::file_of(model) {
            Some(file) => {
                let files = GgufFiles::open(&file)?;
                let tensors = tensors::of_gguf(&files, &types);
                (Source::Gguf(files), tensors)
            }
            None => {
                let files = WeightFiles::open(model)?;
                let tensors = tensors::of_checkpoint(&config, &types);
                (Source::Checkpoint(files), tensors)
            }
        };
        let mut export = Export { config, quantization, source, tensors, notes: Vec::new() };
        for tensor in &export.tensors {
            export.rows(tensor)?;
        }
        export.notes = export.find_notes();
        Ok(export)
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether name and tokenizer are taken from the GGUF file that is read.
    pub fn has_metadata(&self) -> bool {
        matches!(self.source, Source::Gguf(_))
    }

    /// Sentences about what the file cannot say, or other programs will not obey.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Bytes of all tensors in the file.
    pub fn tensor_bytes(&self) -> Bytes {
        self.tensors.iter().map(Planned::bytes).sum()
    }

    /// Weights of all tensors in the file.
    pub fn weights(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.weights() as u64).sum()
    }

    /// How many tensors have which type.
    pub fn types(&self) -> BTreeMap<WeightType, usize> {
        let mut types = BTreeMap::new();
        for tensor in &self.tensors {
            *types.entry(tensor.kind).or_insert(0) += 1;
        }
        types
    }

    /// Writes the file `out`, converting rows on the threads of `pool`, and returns its size. `labels` are keys that the
    /// weights do not know: name and tokenizer; where the source is a GGUF file, its own are kept instead. `progress`
    /// hears (tensor bytes written, in all) and may stop the export. On any error `out` stays what it was.
    pub fn write(
        &self,
        out: &Path,
        labels: &[(&str, Value)],
        pool: &ThreadPool,
        progress: &mut dyn FnMut(Bytes, Bytes) -> ControlFlow<()>,
    ) -> Result<Bytes, ExportError> {
        let header = self.header(labels)?;
        let total = self.tensor_bytes();
        let mut written = Bytes(0);
        write_file(out, &header, |writer| {
            for tensor in &self.tensors {
                self.write_tensor(tensor, writer, pool, &mut |bytes| {
                    written += bytes;
                    match progress(written, total) {
                        ControlFlow::Continue(()) => Ok(()),
                        ControlFlow::Break(()) => Err(ExportError::Stopped),
                    }
                })?;
            }
            Ok::<(), ExportError>(())
        })?;
        Ok(Bytes(header.file_bytes()))
    }

    fn header(&self, labels: &[(&str, Value)]) -> Result<GgufHeader, ExportError> {
        let mut header = GgufHeader::new();
        match &self.source {
            Source::Gguf(files) => {
                for (key, value) in metadata::kept(files.metadata()) {
                    header.metadata(key, value)?;
                }
            }
            Source::Checkpoint(_) => {
                for (key, value) in metadata::of_config(&self.config) {
                    header.metadata(&key, &value)?;
                }
                for (key, value) in labels {
                    header.metadata(key, value)?;
                }
            }
        }
        for (key, value) in metadata::of_quantization(self.quantization) {
            header.metadata(key, &value)?;
        }
        for tensor in &self.tensors {
            let dims: Vec<u64> = tensor.shape.iter().rev().map(|&axis| axis as u64).collect();
            header.tensor(&tensor.name, crate::pack::tensor_type(tensor.kind), &dims)?;
        }
        Ok(header)
    }

    fn rows<'a>(&'a self, tensor: &'a Planned) -> Result<Rows<'a>, ExportError> {
        match (&tensor.origin, &self.source) {
            (Origin::Values(values), _) => Ok(Rows::of_values(tensor, values)),
            (Origin::Checkpoint { name, interleaved }, Source::Checkpoint(files)) => {
                Ok(Rows::of_checkpoint(tensor, files.tensor(name, &tensor.shape)?, *interleaved))
            }
            (_, Source::Checkpoint(files)) => {
                Ok(Rows::of_checkpoint(tensor, files.tensor(&tensor.name, &tensor.shape)?, None))
            }
            (_, Source::Gguf(files)) => Ok(Rows::of_gguf(tensor, files.tensor(&tensor.name)?)),
        }
    }

    fn write_tensor<W: Write>(
        &self,
        tensor: &Planned,
        writer: &mut GgufWriter<W>,
        pool: &ThreadPool,
        written: &mut dyn FnMut(Bytes) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        let rows = self.rows(tensor)?;
        let chunks = rows.chunks();
        writer.tensor(&tensor.name, |sink| {
            for chunks in chunks.chunks(CHUNKS_PER_THREAD * pool.threads()) {
                let converted: Vec<_> = chunks.iter().map(|_| Mutex::new(Ok(Vec::new()))).collect();
                pool.run(chunks.len(), &|index| {
                    let bytes = rows.read(chunks[index].clone());
                    *converted[index].lock().unwrap_or_else(PoisonError::into_inner) = bytes;
                });
                for bytes in converted {
                    let bytes = bytes.into_inner().unwrap_or_else(PoisonError::into_inner)?;
                    sink.write(&bytes)?;
                    written(Bytes(bytes.len() as u64))?;
                }
            }
            Ok(())
        })
    }

    fn find_notes(&self) -> Vec<String> {
        let mut notes = metadata::notes(&self.config);
        let wanted = self.quantization.base();
        let whole =
            |tensor: &&Planned| tensor.is_matrix() && !tensor.columns().is_multiple_of(wanted.block_len());
        let refitted = self.tensors.iter().filter(whole).count();
        if refitted > 0 {
            notes.push(format!(
                "the rows of {refitted} matrices are no whole blocks of {wanted}: these take a larger type with smaller \
                 blocks, or f16"
            ));
        }
        if let Source::Gguf(files) = &self.source {
            let lossy = |tensor: &&ashlar_gguf::TensorInfo| tensor.tensor_type.block_len() > 1;
            if files.tensors().iter().any(|tensor| lossy(&tensor)) {
                notes.push(
                    "the source is quantised already: its errors stay, and new ones may come on top".into(),
                );
            }
        }
        notes
    }
}
