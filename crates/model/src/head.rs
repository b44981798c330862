//! The seam between the rank that wants logits and the ranks of earlier stages that hold slices of the head.

use std::ops::Range;

/// A slice of the logits cannot be had; the step cannot be completed in this layout.
#[derive(Debug, thiserror::Error)]
#[error("lost the rank that holds slice {index} of the head: {reason}")]
pub struct HeadError {
    /// Which slice.
    pub index: usize,
    /// What happened.
    pub reason: String,
}

/// Where a slice of the logits belongs: the same columns of every row.
#[derive(Debug)]
pub struct LogitColumns<'a> {
    logits: &'a mut [f32],
    row_values: usize,
    columns: Range<usize>,
}

impl LogitColumns<'_> {
    /// `columns` of `logits`, which are rows of `row_values` values.
    pub fn new(logits: &mut [f32], row_values: usize, columns: Range<usize>) -> LogitColumns<'_> {
        LogitColumns { logits, row_values, columns }
    }

    /// How many columns.
    pub fn width(&self) -> usize {
        self.columns.len()
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.logits.len() / self.row_values
    }

    /// The columns, row by row.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let columns = self.columns.clone();
        self.logits.chunks_exact_mut(self.row_values).map(move |row| &mut row[columns.clone()])
    }

    /// Puts a slice there that lies row by row.
    pub fn copy_from(&mut self, slice: &[f32]) {
        let width = self.width();
        for (columns, slice) in self.iter_mut().zip(slice.chunks_exact(width)) {
            columns.copy_from_slice(slice);
        }
    }
}

/// The ranks of earlier stages, as rank 0 of the last stage sees them. Rows are handed out first and slices collected
/// afterwards, so that everybody computes at the same time.
pub trait HeadRanks {
    /// Hands `rows` (one after the other, normed) to every one of them.
    fn hand_out(&mut self, rows: &[f32]) -> Result<(), HeadError>;

    /// Receives slice `index` of the logits of the rows handed out last.
    fn collect(&mut self, index: usize, slice: LogitColumns<'_>) -> Result<(), HeadError>;
}

/// A head that the last stage holds alone.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoHeadRanks;

impl HeadRanks for NoHeadRanks {
    fn hand_out(&mut self, _rows: &[f32]) -> Result<(), HeadError> {
        Ok(())
    }

    fn collect(&mut self, index: usize, _slice: LogitColumns<'_>) -> Result<(), HeadError> {
        Err(HeadError { index, reason: "it has no link to this rank".to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_lands_in_its_columns_and_nowhere_else() {
        let mut logits = [0.0; 10];
        let mut columns = LogitColumns::new(&mut logits, 5, 1..3);
        assert_eq!((columns.width(), columns.rows()), (2, 2));
        columns.copy_from(&[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(logits, [0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 3.0, 4.0, 0.0, 0.0]);
    }
}
