//! The seam between a rank's computation and the other ranks of its tensor-parallel group.

/// A collective failed; the step cannot be completed in this layout.
#[derive(Debug, thiserror::Error)]
#[error("lost rank {rank} of the tensor-parallel group: {reason}")]
pub struct CollectiveError {
    /// Which rank.
    pub rank: usize,
    /// What happened.
    pub reason: String,
}

/// Exchange within a tensor-parallel group. Every rank calls the same operations in the same order.
pub trait Collective {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Ranks in the group.
    fn size(&self) -> usize;

    /// Every rank contributes `own`, all of one length; `all` receives the contributions in rank order.
    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError>;

    /// Rank *r* contributes `lengths[r]` values; on rank 0 `all` receives them in rank order, elsewhere it is untouched.
    fn gather(&mut self, own: &[f32], lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError>;
}

/// A group of one.
#[derive(Debug, Default, Clone, Copy)]
pub struct SingleRank;

impl Collective for SingleRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather(&mut self, own: &[f32], all: &mut [f32]) -> Result<(), CollectiveError> {
        all.copy_from_slice(own);
        Ok(())
    }

    fn gather(&mut self, own: &[f32], _lengths: &[usize], all: &mut [f32]) -> Result<(), CollectiveError> {
        all.copy_from_slice(own);
        Ok(())
    }
}
