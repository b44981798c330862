//! One tensor of a model's files, read by position.

use super::WeightError;
use crate::gguf;
use crate::pack::tensor_type;
use crate::partial::RangeSet;
use ashlar_gguf::{BlockError, dequantize};
use ashlar_kernels::FileRows;
use ashlar_vocabulary::WeightType;
use half::{bf16, f16};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where a tensor's bytes are.
#[derive(Debug)]
pub(super) enum Source<'a> {
    Safetensors { file: &'a File, offset: u64 },
    Gguf(ashlar_gguf::TensorReader<'a>),
}

/// Reads rows of one tensor; a vector counts as one row.
#[derive(Debug)]
pub struct TensorReader<'a> {
    pub(super) source: Source<'a>,
    /// Which of the model's files has it.
    pub(super) file: usize,
    /// What is here of that file, if not all.
    pub(super) present: Option<&'a RangeSet>,
    pub(super) path: &'a Path,
    pub(super) name: String,
    pub(super) kind: WeightType,
    pub(super) columns: usize,
    /// The size of the heads whose rows the file interleaves.
    pub(super) interleaved: Option<usize>,
    pub(super) is_vector: bool,
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
