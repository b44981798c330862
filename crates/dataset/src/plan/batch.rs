//! One step: a global batch, its eight runs, their micro-batches.

use super::PlanError;
use crate::file::SampleSize;
use ashlar_vocabulary::PARTS;
use std::ops::Range;

/// The samples of one step, in order, as eight consecutive runs.
///
/// A gradient is summed over a run in the order of its samples, and over runs in the fixed tree of eight parts, so the runs are
/// part of what a step computes. They hold about equally many rows: a run ends where the middle of the next sample lies beyond its
/// eighth of the rows. Runs may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Counted from 0 over the whole job.
    pub step: u64,
    /// Counted from 0.
    pub epoch: u32,
    samples: Vec<u32>,
    sizes: Vec<SampleSize>,
    /// Positions in the batch at which runs begin, and its end.
    bounds: [usize; PARTS + 1],
}

/// Consecutive samples of one run that are computed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Positions in the batch.
    pub positions: Range<usize>,
    /// Rows of all its samples.
    pub rows: u32,
}

/// The runs that a data-parallel replica owns: whole ones, neighbours, so that the sum over replicas is the upper levels of the
/// tree. `None` unless there are 1, 2, 4 or 8 replicas and this is one of them.
pub fn replica_runs(replica: usize, replicas: usize) -> Option<Range<usize>> {
    if !matches!(replicas, 1 | 2 | 4 | PARTS) || replica >= replicas {
        return None;
    }
    let each = PARTS / replicas;
    Some(replica * each..(replica + 1) * each)
}

impl Batch {
    pub(super) fn new(step: u64, epoch: u32, sized: Vec<(u32, SampleSize)>) -> Batch {
        let (samples, sizes): (Vec<u32>, Vec<SampleSize>) = sized.into_iter().unzip();
        let total: u128 = sizes.iter().map(|size| u128::from(size.rows)).sum();
        let mut bounds = [samples.len(); PARTS + 1];
        let (mut run, mut before) = (0, 0_u128);
        for (position, size) in sizes.iter().enumerate() {
            // In sixteenths of the total: where the middle of this sample lies.
            let middle = (2 * before + u128::from(size.rows)) * PARTS as u128;
            while run < PARTS && middle >= 2 * total * run as u128 {
                bounds[run] = position;
                run += 1;
            }
            before += u128::from(size.rows);
        }
        bounds[0] = 0;
        Batch { step, epoch, samples, sizes, bounds }
    }

    /// Its samples, by their index in the dataset.
    pub fn samples(&self) -> &[u32] {
        &self.samples
    }

    /// Positions of a run (0…8) in [`Batch::samples`]; none for other numbers.
    pub fn run(&self, run: usize) -> Range<usize> {
        match (self.bounds.get(run), self.bounds.get(run + 1)) {
            (Some(&start), Some(&end)) => start..end,
            _ => 0..0,
        }
    }

    /// Rows of the whole batch.
    pub fn rows(&self) -> u64 {
        self.sizes.iter().map(|size| u64::from(size.rows)).sum()
    }

    /// Targets of the whole batch, all replicas together: what a supervised loss is divided by. (The loss of a preference is divided
    /// by the number of samples.)
    pub fn targets(&self) -> u64 {
        self.sizes.iter().map(|size| u64::from(size.targets)).sum()
    }

    /// Rows of one run.
    pub fn run_rows(&self, run: usize) -> u64 {
        self.sizes[self.run(run)].iter().map(|size| u64::from(size.rows)).sum()
    }

    /// A run as micro-batches of at most `rows_max` rows: whole samples in their order, each micro-batch as full as the next sample
    /// allows; without `packing` each sample has one of its own. How large they are does not show in the result.
    ///
    /// # Errors
    /// [`PlanError::SampleTooLarge`].
    pub fn micro_batches(
        &self,
        run: usize,
        rows_max: u32,
        packing: bool,
    ) -> Result<Vec<MicroBatch>, PlanError> {
        let mut packed: Vec<MicroBatch> = Vec::new();
        for position in self.run(run) {
            let (sample, rows) = (self.samples[position], self.sizes[position].rows);
            if rows > rows_max {
                return Err(PlanError::SampleTooLarge { sample, rows, rows_max });
            }
            match packed.last_mut() {
                Some(last) if packing && rows_max - last.rows >= rows => {
                    last.positions.end += 1;
                    last.rows += rows;
                }
                _ => packed.push(MicroBatch { positions: position..position + 1, rows }),
            }
        }
        Ok(packed)
    }
}
