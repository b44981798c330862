//! Tensors: where they are, and slices of their blocks.

use crate::blocks::{BlockError, dequantize};
use crate::error::GgufError;
use crate::types::TensorType;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a file says about a tensor.
///
/// The file lists axes from the innermost: `dims[0]` values lie next to each other and make a row, and a weight with
/// N outputs and K inputs is `[K, N]`. [`TensorInfo::shape`] has the customary order, `[N, K]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name.
    pub name: String,
    /// How its values are stored.
    pub tensor_type: TensorType,
    /// One to four axes, innermost first, none of them empty. The first is whole blocks.
    pub dims: Vec<u64>,
    /// Which of the model's files holds the data.
    pub file: usize,
    /// Where in that file the data starts, in bytes.
    pub offset: u64,
    /// Bytes of the data.
    pub bytes: u64,
}

impl TensorInfo {
    /// Lengths of the axes, outermost first: `[rows, columns]` for a matrix.
    pub fn shape(&self) -> Vec<usize> {
        self.dims.iter().rev().map(|dim| *dim as usize).collect()
    }

    /// Values of a row, the innermost axis.
    pub fn columns(&self) -> usize {
        self.dims[0] as usize
    }

    /// Rows over all outer axes; a vector is one row.
    pub fn rows(&self) -> usize {
        self.dims[1..].iter().product::<u64>() as usize
    }

    /// Blocks of a row.
    pub fn blocks_per_row(&self) -> usize {
        self.columns() / self.tensor_type.block_len()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.blocks_per_row() * self.tensor_type.block_bytes()
    }
}

/// Reads the blocks of one tensor by position.
#[derive(Debug, Clone, Copy)]
pub struct TensorReader<'a> {
    pub(super) file: &'a File,
    pub(super) path: &'a Path,
    pub(super) info: &'a TensorInfo,
}

impl<'a> TensorReader<'a> {
    /// What the file says about the tensor.
    pub fn info(&self) -> &'a TensorInfo {
        self.info
    }

    /// The raw blocks of `rows`, one row after the other.
    pub fn read_rows(&self, rows: Range<usize>) -> Result<Vec<u8>, GgufError> {
        self.check("rows", &rows, self.info.rows())?;
        // Within the tensor, whose bytes were compared with the file's length.
        let mut bytes = vec![0; rows.len() * self.info.row_bytes()];
        self.read_at(rows.start * self.info.row_bytes(), &mut bytes)?;
        Ok(bytes)
    }

    /// The raw bytes of `blocks` of one row. `out` must have room for exactly these.
    pub fn read_blocks(&self, row: usize, blocks: Range<usize>, out: &mut [u8]) -> Result<(), GgufError> {
        self.check("rows", &(row..row.saturating_add(1)), self.info.rows())?;
        self.check("blocks of a row", &blocks, self.info.blocks_per_row())?;
        let block_bytes = self.info.tensor_type.block_bytes();
        if out.len() != blocks.len() * block_bytes {
            let needed = blocks.len() * block_bytes;
            return Err(self.range(format!("{} bytes were given for blocks of {needed}", out.len())));
        }
        self.read_at(row * self.info.row_bytes() + blocks.start * block_bytes, out)
    }

    /// Bytes from `start` on, counted from the tensor's first.
    pub fn read_bytes_at(&self, start: u64, out: &mut [u8]) -> Result<(), GgufError> {
        let end = start.saturating_add(out.len() as u64);
        if end > self.info.bytes {
            return Err(
                self.range(format!("bytes {start}..{end} were asked for, there are {}", self.info.bytes))
            );
        }
        self.read_at(start as usize, out)
    }

    /// The values of `rows` as f32.
    pub fn dequantize_rows(&self, rows: Range<usize>) -> Result<Vec<f32>, GgufError> {
        let mut values = vec![0.0; self.check("rows", &rows, self.info.rows())? * self.info.columns()];
        let bytes = self.read_rows(rows)?;
        let decoded = dequantize(self.info.tensor_type, &bytes, &mut values);
        decoded.map_err(|error: BlockError| self.range(error.to_string()))?;
        Ok(values)
    }

    fn read_at(&self, start: usize, out: &mut [u8]) -> Result<(), GgufError> {
        let read = self.file.read_exact_at(out, self.info.offset + start as u64);
        read.map_err(|source| GgufError::Read { path: self.path.to_owned(), source })
    }

    fn check(&self, what: &str, asked: &Range<usize>, there: usize) -> Result<usize, GgufError> {
        if asked.start > asked.end || asked.end > there {
            return Err(self.range(format!("{what} {asked:?} were asked for, there are {there}")));
        }
        Ok(asked.len())
    }

    fn range(&self, reason: String) -> GgufError {
        GgufError::Range { path: self.path.to_owned(), name: self.info.name.clone(), reason }
    }
}
