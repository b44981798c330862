//! From tensors in files to packed products: read, quantised where asked for, and stacked.

use crate::source::{self, MatrixSource, VectorSource, WeightSource};
use crate::weights::{TensorReader, WeightError, WeightFiles};
use ashlar_gguf::{TensorType, quantize};
use ashlar_kernels::{BlockAxis, FileRows, Kernels, PackedMatrix};
use ashlar_vocabulary::WeightType;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The model's files, packed on the threads of `kernels`.
#[derive(Debug)]
pub(crate) struct FileSource<'a> {
    pub(crate) files: &'a WeightFiles,
    pub(crate) kernels: &'a Kernels,
}

impl WeightSource for FileSource<'_> {
    type Error = WeightError;

    fn matrix(
        &self,
        _name: &str,
        sources: &[MatrixSource],
        parts: &[Range<usize>],
    ) -> Result<PackedMatrix, WeightError> {
        pack(self.files, self.kernels, sources, parts)
    }

    fn vector(&self, _name: &str, sources: &[VectorSource]) -> Result<Vec<f32>, WeightError> {
        let mut values = Vec::new();
        for source in sources {
            let reader = self.files.tensor(&source.name, &[source.length])?;
            values.extend(reader.read(0..1, source.range.clone())?);
        }
        Ok(values)
    }

    fn table(&self, _name: &str, source: &MatrixSource) -> Result<Vec<u8>, WeightError> {
        table(&self.files.tensor(&source.name, &source.shape)?, source.kind, source.rows.clone())
    }
}

/// The rows `rows` of an embedding in `kind`.
fn table(reader: &TensorReader<'_>, kind: WeightType, rows: Range<usize>) -> Result<Vec<u8>, WeightError> {
    let hidden = reader.columns();
    if reader.kind() == kind {
        return reader.read_bytes(rows, 0..hidden);
    }
    const ROWS_AT_ONCE: usize = 512;
    let mut bytes = Vec::with_capacity(rows.len() * kind.bytes(hidden));
    for first in rows.clone().step_by(ROWS_AT_ONCE) {
        let values = reader.read(first..rows.end.min(first + ROWS_AT_ONCE), 0..hidden)?;
        bytes.extend(quantized(reader, kind, &values)?);
    }
    Ok(bytes)
}

/// Packs `sources`, one above the other, as one product over inputs in `parts`.
fn pack(
    files: &WeightFiles,
    kernels: &Kernels,
    sources: &[MatrixSource],
    parts: &[Range<usize>],
) -> Result<PackedMatrix, WeightError> {
    let mut matrices = Vec::new();
    for alike in source::runs(sources) {
        matrices.push(match alike[0].kind {
            kind if !kind.is_quantized() => pack_dense(files, kernels, kind, alike, parts)?,
            kind => pack_blocks(files, kernels, kind, alike, parts)?,
        });
    }
    Ok(PackedMatrix::stack(matrices))
}

fn readers<'a>(
    files: &'a WeightFiles,
    sources: &[MatrixSource],
) -> Result<Vec<TensorReader<'a>>, WeightError> {
    sources.iter().map(|source| files.tensor(&source.name, &source.shape)).collect()
}

fn pack_dense(
    files: &WeightFiles,
    kernels: &Kernels,
    kind: WeightType,
    sources: &[MatrixSource],
    parts: &[Range<usize>],
) -> Result<PackedMatrix, WeightError> {
    let readers = readers(files, sources)?;
    let outputs = sources.iter().map(|s| s.rows.len()).sum();
    let (stored, columns) = (readers[0].kind(), sources[0].columns.clone());
    if readers.iter().all(|reader| reader.kind() == stored) && PackedMatrix::packs_file_floats(stored, kind) {
        return PackedMatrix::pack_file_floats(stored, kind, outputs, parts, kernels, &|outputs, to| {
            for_sources(sources, outputs, &mut |source, rows| {
                readers[source].append_rows(rows, columns.clone(), to)
            })
        });
    }
    let failure = Mutex::new(None);
    let packed = PackedMatrix::pack(kind, outputs, parts, kernels.pool(), &|row, to| {
        let (source, row) = locate(sources, row);
        match readers[source].read(row..row + 1, sources[source].columns.clone()) {
            Ok(values) => to.copy_from_slice(&values),
            Err(error) => keep(&failure, error),
        }
    });
    finish(failure, packed)
}

/// Which source has output `row` of the stack, and as which of its stored rows.
pub(crate) fn locate(sources: &[MatrixSource], row: usize) -> (usize, usize) {
    let (mut source, mut local) = (0, row);
    while local >= sources[source].rows.len() {
        local -= sources[source].rows.len();
        source += 1;
    }
    (source, sources[source].rows.start + local)
}

/// Calls `each` with every source that has some of the stack's `outputs`, and which of its stored rows they are.
fn for_sources(
    sources: &[MatrixSource],
    outputs: Range<usize>,
    each: &mut dyn FnMut(usize, Range<usize>) -> Result<(), WeightError>,
) -> Result<(), WeightError> {
    let mut next = outputs.start;
    while next < outputs.end {
        let (source, row) = locate(sources, next);
        let rows = row..sources[source].rows.end.min(row + outputs.end - next);
        next += rows.len();
        each(source, rows)?;
    }
    Ok(())
}

/// The first failure counts; the packing runs to its end.
fn keep(failure: &Mutex<Option<WeightError>>, error: WeightError) {
    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
}

fn finish(failure: Mutex<Option<WeightError>>, packed: PackedMatrix) -> Result<PackedMatrix, WeightError> {
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(packed), Err)
}

fn pack_blocks(
    files: &WeightFiles,
    kernels: &Kernels,
    kind: WeightType,
    sources: &[MatrixSource],
    parts: &[Range<usize>],
) -> Result<PackedMatrix, WeightError> {
    let readers = readers(files, sources)?;
    let outputs = sources.iter().map(|s| s.rows.len()).sum();
    let offset = sources.first().map_or(0, |s| s.columns.start);
    let axis = BlockAxis::new(offset, parts);
    let columns = axis.whole_blocks(kind.block_len());
    PackedMatrix::pack_file_blocks(kind, outputs, axis, kernels, &|outputs, to| {
        for_sources(sources, outputs, &mut |source, rows| {
            append_blocks(&readers[source], rows, columns.clone(), kind, to)
        })
    })
}

/// Appends the blocks of `kind` that `columns` of each row have: as they are stored, or quantised.
fn append_blocks(
    reader: &TensorReader<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    kind: WeightType,
    to: &mut FileRows,
) -> Result<(), WeightError> {
    if reader.kind() == kind {
        return reader.append_rows(rows, columns, to);
    }
    for row in rows {
        let blocks = quantized(reader, kind, &reader.read(row..row + 1, columns.clone())?)?;
        let (start, bytes) = to.grow(blocks.len());
        bytes.copy_from_slice(&blocks);
        to.push(start);
    }
    Ok(())
}

/// `values` in blocks of `kind`.
fn quantized(reader: &TensorReader<'_>, kind: WeightType, values: &[f32]) -> Result<Vec<u8>, WeightError> {
    let mut bytes = Vec::new();
    quantize(tensor_type(kind), values, &mut bytes).map_err(|error| reader.unusable(&error))?;
    Ok(bytes)
}

/// The file format's name for a type.
pub(crate) fn tensor_type(kind: WeightType) -> TensorType {
    match kind {
        WeightType::F32 => TensorType::F32,
        WeightType::F16 => TensorType::F16,
        WeightType::Bf16 => TensorType::Bf16,
        WeightType::Q8_0 => TensorType::Q8_0,
        WeightType::Q4_0 => TensorType::Q4_0,
        WeightType::Q4_1 => TensorType::Q4_1,
        WeightType::Q5_0 => TensorType::Q5_0,
        WeightType::Q5_1 => TensorType::Q5_1,
        WeightType::Q4K => TensorType::Q4K,
        WeightType::Q5K => TensorType::Q5K,
        WeightType::Q6K => TensorType::Q6K,
    }
}

/// The type that a file format calls `kind`.
pub(crate) fn weight_type(kind: TensorType) -> WeightType {
    match kind {
        TensorType::F32 => WeightType::F32,
        TensorType::F16 => WeightType::F16,
        TensorType::Bf16 => WeightType::Bf16,
        TensorType::Q8_0 => WeightType::Q8_0,
        TensorType::Q4_0 => WeightType::Q4_0,
        TensorType::Q4_1 => WeightType::Q4_1,
        TensorType::Q5_0 => WeightType::Q5_0,
        TensorType::Q5_1 => WeightType::Q5_1,
        TensorType::Q4K => WeightType::Q4K,
        TensorType::Q5K => WeightType::Q5K,
        TensorType::Q6K => WeightType::Q6K,
    }
}
