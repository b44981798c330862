//! The rows of one tensor: read in the order of the file that is written, converted to its type.

use super::ExportError;
use super::tensors::Planned;
use crate::gguf::interleaved_row;
use crate::pack::{tensor_type, weight_type};
use crate::weights::{TensorReader, widen};
use ashlar_gguf::quantize;
use ashlar_vocabulary::WeightType;
use std::ops::Range;

/// Weights that are converted at a time.
const CHUNK_WEIGHTS: usize = 1 << 18;

/// The smallest magnitude that rounds to an infinite half.
const F16_OVERFLOW: f32 = 65_520.0;

#[derive(Debug)]
enum Source<'a> {
    Checkpoint { reader: TensorReader<'a>, interleaved: Option<usize> },
    Gguf(ashlar_gguf::TensorReader<'a>),
    Values(&'a [f32]),
}

/// Reads one tensor.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    tensor: &'a Planned,
    source: Source<'a>,
}

impl<'a> Rows<'a> {
    /// From safetensors; rows of heads of size `interleaved` change places.
    pub(super) fn of_checkpoint(
        tensor: &'a Planned,
        reader: TensorReader<'a>,
        interleaved: Option<usize>,
    ) -> Rows<'a> {
        Rows { tensor, source: Source::Checkpoint { reader, interleaved } }
    }

    /// From a GGUF file.
    pub(super) fn of_gguf(tensor: &'a Planned, reader: ashlar_gguf::TensorReader<'a>) -> Rows<'a> {
        Rows { tensor, source: Source::Gguf(reader) }
    }

    /// A vector that is known.
    pub(super) fn of_values(tensor: &'a Planned, values: &'a [f32]) -> Rows<'a> {
        Rows { tensor, source: Source::Values(values) }
    }

    /// Ranges that [`Rows::read`] takes, in order: all rows of the tensor, whole heads where heads are interleaved. A
    /// vector is one row.
    pub(super) fn chunks(&self) -> Vec<Range<usize>> {
        let columns = self.tensor.columns().max(1);
        let rows = self.tensor.weights() / columns;
        let whole = match self.source {
            Source::Checkpoint { interleaved: Some(head_dim), .. } if self.tensor.is_matrix() => head_dim,
            _ => 1,
        };
        let length = (CHUNK_WEIGHTS / columns).max(1).next_multiple_of(whole);
        (0..rows).step_by(length).map(|start| start..(start + length).min(rows)).collect()
    }

    /// The rows `rows` of the file, in its type.
    pub(super) fn read(&self, rows: Range<usize>) -> Result<Vec<u8>, ExportError> {
        let columns = self.tensor.columns();
        match &self.source {
            Source::Values(values) => self.converted(WeightType::F32, to_bytes(values)),
            Source::Gguf(reader) => {
                self.converted(weight_type(reader.info().tensor_type), reader.read_rows(rows)?)
            }
            Source::Checkpoint { reader, interleaved } => {
                let count = rows.len();
                let bytes = self.converted(reader.kind(), reader.read_bytes(rows, 0..columns)?)?;
                Ok(match interleaved {
                    // Of a bias the elements are what a matrix has as rows.
                    Some(head_dim) if !self.tensor.is_matrix() => interleave(&bytes, columns, *head_dim),
                    Some(head_dim) => interleave(&bytes, count, *head_dim),
                    None => bytes,
                })
            }
        }
    }

    /// Weights that are stored as `stored`, as the tensor shall have them.
    fn converted(&self, stored: WeightType, bytes: Vec<u8>) -> Result<Vec<u8>, ExportError> {
        let kind = self.tensor.kind;
        if stored == kind {
            return Ok(bytes);
        }
        let name = || self.tensor.name.clone();
        let weights = bytes.len() / stored.block_bytes() * stored.block_len();
        let mut values = vec![0f32; weights];
        widen(stored, &bytes, &mut values).map_err(|reason| ExportError::Block { name: name(), reason })?;
        let overflows = |value: &&f32| value.is_finite() && value.abs() >= F16_OVERFLOW;
        if kind == WeightType::F16
            && let Some(&value) = values.iter().find(overflows)
        {
            return Err(ExportError::ExceedsF16 { name: name(), value });
        }
        let mut out = Vec::new();
        quantize(tensor_type(kind), &values, &mut out)
            .map_err(|reason| ExportError::Block { name: name(), reason })?;
        Ok(out)
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// `rows` rows of whole heads, each where GGUF files of llama have it.
fn interleave(bytes: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let width = bytes.len() / rows.max(1);
    let mut out = vec![0u8; bytes.len()];
    for row in 0..rows {
        let to = interleaved_row(row, head_dim);
        out[to * width..(to + 1) * width].copy_from_slice(&bytes[row * width..(row + 1) * width]);
    }
    out
}
