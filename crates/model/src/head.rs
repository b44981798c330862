//! The seam between the rank that wants logits and the ranks of earlier stages that hold slices of the head.

/// A slice of the logits cannot be had; the step cannot be completed in this layout.
#[derive(Debug, thiserror::Error)]
#[error("lost the rank that holds slice {index} of the head: {reason}")]
pub struct HeadError {
    /// Which slice.
    pub index: usize,
    /// What happened.
    pub reason: String,
}

/// The ranks of earlier stages, as rank 0 of the last stage sees them. Rows are handed out first and slices collected
/// afterwards, so that everybody computes at the same time.
pub trait HeadRanks {
    /// Hands `rows` (one after the other, normed) to every one of them.
    fn hand_out(&mut self, rows: &[f32]) -> Result<(), HeadError>;

    /// Receives slice `index` of the logits of the rows handed out last: row by row.
    fn collect(&mut self, index: usize, slice: &mut [f32]) -> Result<(), HeadError>;
}

/// A head that the last stage holds alone.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoHeadRanks;

impl HeadRanks for NoHeadRanks {
    fn hand_out(&mut self, _rows: &[f32]) -> Result<(), HeadError> {
        Ok(())
    }

    fn collect(&mut self, index: usize, _slice: &mut [f32]) -> Result<(), HeadError> {
        Err(HeadError { index, reason: "it has no link to this rank".to_owned() })
    }
}
