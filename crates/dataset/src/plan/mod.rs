//! Which samples each step of a job computes, and in which order.
//!
//! Layout: `auto` (what `"auto"` means), `split` (samples set aside for validation), `order` (shuffling), `batch` (one step: eight runs
//! of samples, and micro-batches); this file puts them together. The learning rate's course is the vocabulary's.
//!
//! **Invariant:** a plan is a function of the samples' sizes, the settings and the seed. It does not know how many machines
//! there are: a replica takes whole runs of a batch, a stage the micro-batches of a run, and whoever resumes at a step finds the
//! same batch. Randomness is counter-based, so no step depends on having planned the ones before.

mod auto;
mod batch;
mod order;
mod split;

pub use auto::{auto_batch_size, auto_epochs};
pub use batch::{Batch, MicroBatch, replica_runs};
pub use split::{Split, split};

use crate::file::SampleSize;
use order::shuffled;

/// Why there is no plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Nothing to train on.
    #[error("there is no sample to train on: leave fewer for validation, or add examples")]
    NoSamples,
    /// A sample that the sizes do not have.
    #[error("the plan names sample {0}, which the dataset does not have")]
    NoSuchSample(u32),
    /// A setting of 0.
    #[error("`{0}` must be at least 1")]
    Zero(&'static str),
    /// A sample larger than a micro-batch may be.
    #[error(
        "sample {sample} has {rows} rows, but a micro-batch may have {rows_max}: allow larger micro-batches or lower \
         max_seq_len"
    )]
    SampleTooLarge {
        /// Its index.
        sample: u32,
        /// Its rows.
        rows: u32,
        /// The bound.
        rows_max: u32,
    },
}

/// What an owner chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanSettings {
    /// How often every sample is trained.
    pub epochs: u32,
    /// Samples of a global batch. The last one of an epoch has what is left.
    pub batch_size: u32,
    /// Of the order.
    pub seed: u64,
}

/// All steps of a job.
#[derive(Debug, Clone)]
pub struct JobPlan {
    settings: PlanSettings,
    /// Of every sample of the dataset.
    sizes: Vec<SampleSize>,
    /// The samples that are trained.
    training: Vec<u32>,
}

/// The steps of one epoch.
#[derive(Debug, Clone)]
pub struct EpochPlan<'p> {
    plan: &'p JobPlan,
    epoch: u32,
    order: Vec<u32>,
}

impl JobPlan {
    /// A plan that trains the samples `training` of a dataset whose samples have these sizes.
    pub fn new(
        sizes: Vec<SampleSize>,
        training: Vec<u32>,
        settings: PlanSettings,
    ) -> Result<JobPlan, PlanError> {
        if settings.epochs == 0 {
            return Err(PlanError::Zero("n_epochs"));
        }
        if settings.batch_size == 0 {
            return Err(PlanError::Zero("batch_size"));
        }
        if training.is_empty() {
            return Err(PlanError::NoSamples);
        }
        match training.iter().find(|&&sample| sample as usize >= sizes.len()) {
            Some(&sample) => Err(PlanError::NoSuchSample(sample)),
            None => Ok(JobPlan { settings, sizes, training }),
        }
    }

    /// What it was made with.
    pub fn settings(&self) -> PlanSettings {
        self.settings
    }

    /// Steps of each epoch: the number of samples over the batch size, rounded up.
    pub fn steps_per_epoch(&self) -> u32 {
        (self.training.len() as u32).div_ceil(self.settings.batch_size)
    }

    /// Steps of the whole job.
    pub fn steps(&self) -> u64 {
        u64::from(self.steps_per_epoch()) * u64::from(self.settings.epochs)
    }

    /// The order of an epoch; `None` beyond the last.
    pub fn epoch(&self, epoch: u32) -> Option<EpochPlan<'_>> {
        if epoch >= self.settings.epochs {
            return None;
        }
        let order = shuffled(&self.training, self.settings.seed, epoch);
        Some(EpochPlan { plan: self, epoch, order })
    }

    /// The batch of a step, counted from 0 over the whole job; `None` beyond the last. It takes as long as ordering its epoch:
    /// whoever computes many steps keeps the [`EpochPlan`].
    pub fn batch(&self, step: u64) -> Option<Batch> {
        let per_epoch = u64::from(self.steps_per_epoch());
        let epoch = u32::try_from(step / per_epoch).ok()?;
        self.epoch(epoch)?.batch((step % per_epoch) as u32)
    }

    /// Refuses a bound on micro-batches that some sample exceeds.
    pub fn check_micro_batch_rows(&self, rows_max: u32) -> Result<(), PlanError> {
        let rows = |sample: u32| self.size(sample).rows;
        match self.training.iter().find(|&&sample| rows(sample) > rows_max) {
            Some(&sample) => Err(PlanError::SampleTooLarge { sample, rows: rows(sample), rows_max }),
            None => Ok(()),
        }
    }

    /// Every sample is one of the dataset's, as `new` saw to.
    fn size(&self, sample: u32) -> SampleSize {
        self.sizes.get(sample as usize).copied().unwrap_or(SampleSize { example: 0, rows: 0, targets: 0 })
    }
}

impl EpochPlan<'_> {
    /// Every sample that is trained, in the order of this epoch.
    pub fn order(&self) -> &[u32] {
        &self.order
    }

    /// The batch of a step of this epoch, counted from 0; `None` beyond the last.
    pub fn batch(&self, step_of_epoch: u32) -> Option<Batch> {
        let samples =
            self.order.chunks(self.plan.settings.batch_size as usize).nth(step_of_epoch as usize)?;
        let step = u64::from(self.epoch) * u64::from(self.plan.steps_per_epoch()) + u64::from(step_of_epoch);
        let sized = samples.iter().map(|&sample| (sample, self.plan.size(sample))).collect();
        Some(Batch::new(step, self.epoch, sized))
    }
}

#[cfg(test)]
mod tests;
