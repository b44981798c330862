//! Writing: a header that is checked as it is put together, then the data of one tensor after the other.
//!
//! Files are version 3, little-endian, every tensor aligned and padded, offsets without gaps: what ggml demands. Memory
//! holds the header and whatever the caller hands over at a time.

use crate::metadata::{Array, Value};
use crate::reader::header::{ALIGNMENT_DEFAULT, DIMS_MAX, KEY_BYTES_MAX, tensor_bytes};
use crate::types::TensorType;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Longest tensor name that ggml holds.
const NAME_BYTES_MAX: usize = 63;

/// Why a file cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum GgufWriteError {
    /// The operating system refuses.
    #[error("cannot write the GGUF file: {0}")]
    Write(#[from] io::Error),
    /// The operating system refuses something about a named file.
    #[error("cannot write {path}: {source}")]
    WriteFile {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A key is empty, too long, there already, or has a value that it cannot have.
    #[error("metadata `{key}` {reason}")]
    Key {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor's name or axes cannot be.
    #[error("tensor `{name}` {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// Data came for another tensor than the next one, or after the last.
    #[error(
        "data of tensor `{found}` was given where {expected} is due: write tensors in the header's order"
    )]
    Order {
        /// Whose data it is.
        found: String,
        /// What is due.
        expected: String,
    },
    /// A tensor got more or less data than its axes demand.
    #[error("tensor `{name}` got {found} bytes of its {expected}")]
    Length {
        /// The tensor.
        name: String,
        /// Bytes given; when too many, counted with the piece that was refused.
        found: u64,
        /// Bytes that it has.
        expected: u64,
    },
    /// Tensors are missing at the end.
    #[error("the file is not complete: tensor `{name}` has no data yet")]
    Incomplete {
        /// The first without data.
        name: String,
    },
}

#[derive(Debug, Clone)]
struct PlannedTensor {
    name: String,
    bytes: u64,
}

/// Everything before the data.
#[derive(Debug, Clone)]
pub struct GgufHeader {
    alignment: u64,
    entries: Vec<u8>,
    keys: BTreeSet<String>,
    infos: Vec<u8>,
    names: BTreeSet<String>,
    tensors: Vec<PlannedTensor>,
    data_bytes: u64,
}

impl Default for GgufHeader {
    fn default() -> GgufHeader {
        GgufHeader::new()
    }
}

impl GgufHeader {
    /// A header without keys and tensors, whose data will be aligned to 32 bytes.
    pub fn new() -> GgufHeader {
        GgufHeader {
            alignment: ALIGNMENT_DEFAULT,
            entries: Vec::new(),
            keys: BTreeSet::new(),
            infos: Vec::new(),
            names: BTreeSet::new(),
            tensors: Vec::new(),
            data_bytes: 0,
        }
    }

    /// Adds a key. `general.alignment` changes the alignment and must come before the first tensor. Readers other than
    /// this crate's know no nested arrays.
    pub fn metadata(&mut self, key: &str, value: &Value) -> Result<(), GgufWriteError> {
        let wrong = |reason: &str| GgufWriteError::Key { key: key.to_owned(), reason: reason.to_owned() };
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return Err(wrong("must have 1 to 65535 bytes"));
        }
        if self.keys.contains(key) {
            return Err(wrong("was given twice"));
        }
        if key == "general.alignment" {
            match value {
                Value::U32(alignment) if alignment.is_power_of_two() && *alignment >= 8 => {
                    self.alignment = u64::from(*alignment);
                }
                _ => return Err(wrong("must be a u32, a power of two, and at least 8")),
            }
            if !self.tensors.is_empty() {
                return Err(wrong("must come before the first tensor"));
            }
        }
        self.keys.insert(key.to_owned());
        push_string(&mut self.entries, key);
        self.entries.extend(value.kind().id().to_le_bytes());
        push_value(&mut self.entries, value);
        Ok(())
    }

    /// Adds a tensor. `dims` are its axes from the innermost: `[columns, rows]` for a matrix.
    pub fn tensor(
        &mut self,
        name: &str,
        tensor_type: TensorType,
        dims: &[u64],
    ) -> Result<(), GgufWriteError> {
        let wrong = |reason: String| GgufWriteError::Tensor { name: name.to_owned(), reason };
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(wrong(format!("must have a name of 1 to {NAME_BYTES_MAX} bytes")));
        }
        if self.names.contains(name) {
            return Err(wrong("was given twice".into()));
        }
        if dims.is_empty() || dims.len() > DIMS_MAX {
            return Err(wrong(format!("has {} axes, 1 to {DIMS_MAX} are allowed", dims.len())));
        }
        let bytes = tensor_bytes(tensor_type, dims).map_err(wrong)?;
        let offset = self.data_bytes;
        let padded = bytes.checked_next_multiple_of(self.alignment);
        let end = padded.and_then(|padded| offset.checked_add(padded)).filter(|end| *end <= i64::MAX as u64);
        self.data_bytes = end.ok_or_else(|| wrong("makes the file larger than files can be".into()))?;
        self.names.insert(name.to_owned());
        push_string(&mut self.infos, name);
        self.infos.extend((dims.len() as u32).to_le_bytes());
        self.infos.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.infos.extend(tensor_type.id().to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.tensors.push(PlannedTensor { name: name.to_owned(), bytes });
        Ok(())
    }

    /// Bytes that the whole file will have.
    pub fn file_bytes(&self) -> u64 {
        self.header_bytes().next_multiple_of(self.alignment) + self.data_bytes
    }

    fn header_bytes(&self) -> u64 {
        (4 + 4 + 8 + 8 + self.entries.len() + self.infos.len()) as u64
    }
}

/// Writes a file as a stream.
#[derive(Debug)]
pub struct GgufWriter<W: Write> {
    out: W,
    alignment: u64,
    tensors: std::vec::IntoIter<PlannedTensor>,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the header.
    pub fn new(mut out: W, header: &GgufHeader) -> Result<GgufWriter<W>, GgufWriteError> {
        out.write_all(b"GGUF")?;
        out.write_all(&3u32.to_le_bytes())?;
        out.write_all(&(header.tensors.len() as u64).to_le_bytes())?;
        out.write_all(&(header.keys.len() as u64).to_le_bytes())?;
        out.write_all(&header.entries)?;
        out.write_all(&header.infos)?;
        pad(&mut out, header.header_bytes(), header.alignment)?;
        Ok(GgufWriter { out, alignment: header.alignment, tensors: header.tensors.clone().into_iter() })
    }

    /// Writes the data of `name`, which must be the next tensor of the header. `fill` gives it piece by piece, of any
    /// size, and may fail with an error of its own.
    pub fn tensor<E: From<GgufWriteError>>(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut TensorSink<'_, W>) -> Result<(), E>,
    ) -> Result<(), E> {
        let order = |expected: String| GgufWriteError::Order { found: name.to_owned(), expected };
        let Some(tensor) = self.tensors.as_slice().first().cloned() else {
            return Err(order("the end of the file".into()).into());
        };
        if tensor.name != name {
            return Err(order(format!("`{}`", tensor.name)).into());
        }
        self.tensors.next();
        let mut sink = TensorSink { out: &mut self.out, tensor, written: 0 };
        fill(&mut sink)?;
        let TensorSink { tensor, written, .. } = sink;
        if written != tensor.bytes {
            let length = GgufWriteError::Length { name: tensor.name, found: written, expected: tensor.bytes };
            return Err(length.into());
        }
        pad(&mut self.out, written, self.alignment).map_err(|error| GgufWriteError::from(error).into())
    }

    /// Flushes and gives the output back, if every tensor was written.
    pub fn finish(mut self) -> Result<W, GgufWriteError> {
        if let Some(tensor) = self.tensors.next() {
            return Err(GgufWriteError::Incomplete { name: tensor.name });
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

/// Takes the data of one tensor.
#[derive(Debug)]
pub struct TensorSink<'a, W: Write> {
    out: &'a mut W,
    tensor: PlannedTensor,
    written: u64,
}

impl<W: Write> TensorSink<'_, W> {
    /// Appends blocks, or any part of them. More than the tensor has is refused.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), GgufWriteError> {
        let written = self.written + bytes.len() as u64;
        if written > self.tensor.bytes {
            let name = self.tensor.name.clone();
            return Err(GgufWriteError::Length { name, found: written, expected: self.tensor.bytes });
        }
        self.out.write_all(bytes)?;
        self.written = written;
        Ok(())
    }

    /// Bytes that are still due.
    pub fn bytes_left(&self) -> u64 {
        self.tensor.bytes - self.written
    }
}

/// Writes the file at `path`: `fill` writes every tensor into it. The data goes to a file beside it, which takes the
/// name only when it is complete and on the disk; on any error it is removed, and what `path` was before stays.
pub fn write_file<E: From<GgufWriteError>>(
    path: &Path,
    header: &GgufHeader,
    fill: impl FnOnce(&mut GgufWriter<BufWriter<File>>) -> Result<(), E>,
) -> Result<(), E> {
    let failed = |path: &Path, source| GgufWriteError::WriteFile { path: path.to_owned(), source };
    let Some(name) = path.file_name() else {
        return Err(failed(path, io::Error::new(io::ErrorKind::InvalidInput, "it has no file name")).into());
    };
    let mut partial_name = std::ffi::OsString::from(".");
    partial_name.push(name);
    partial_name.push(format!(".{}.partial", std::process::id()));
    let partial = Partial { path: path.with_file_name(partial_name) };
    let file = File::create(&partial.path).map_err(|source| failed(&partial.path, source))?;
    let mut writer = GgufWriter::new(BufWriter::with_capacity(1 << 20, file), header)?;
    fill(&mut writer)?;
    let out = writer.finish()?;
    out.get_ref().sync_all().map_err(|source| failed(&partial.path, source))?;
    fs::rename(&partial.path, path).map_err(|source| failed(path, source).into())
}

/// Removes an unfinished file, also when the caller panics. After the renaming there is nothing to remove.
struct Partial {
    path: PathBuf,
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn pad(out: &mut impl Write, written: u64, alignment: u64) -> io::Result<()> {
    io::copy(&mut io::Read::take(io::repeat(0), written.next_multiple_of(alignment) - written), out)?;
    Ok(())
}

fn push_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn push_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => out.push(*value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push(u8::from(*value)),
        Value::Str(value) => push_string(out, value),
        Value::Array(value) => push_array(out, value),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
    }
}

fn push_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.kind().id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => out.extend(values.iter().map(|value| u8::from(*value))),
        Array::Str(values) => values.iter().for_each(|value| push_string(out, value)),
        Array::Array(values) => values.iter().for_each(|value| push_array(out, value)),
        Array::U64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
}
