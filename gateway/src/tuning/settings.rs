//! What a client chose, as the scheduler keeps it with the job; and how a job trains, once its files are samples.

use ashlar_dataset::plan::{JobPlan, PlanError, PlanSettings, auto_batch_size, auto_epochs, split};
use ashlar_dataset::{Method, SampleSize};
use ashlar_protocol::training::{
    FullSettings, LoraSettings, ModelStart, TrainingMethod, TrainingSettings, ValidationData,
};
use ashlar_vocabulary::{BlobId, Decay, Schedule};
use serde::{Deserialize, Serialize};

/// Linear modules of a block, as Hugging Face names them.
pub(crate) const LINEAR_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Highest learning rate of supervised jobs at multiplier 1: usual for adapters of rank 8 to 64.
pub(crate) const LEARNING_RATE: f64 = 2e-4;
/// The same for preferences, which move a model much faster.
pub(crate) const LEARNING_RATE_DPO: f64 = 2e-5;
/// The same where all weights are trained from those that are served: each moves, so each has to move little.
pub(crate) const LEARNING_RATE_FULL: f64 = 1e-5;
/// The same from random weights.
pub(crate) const LEARNING_RATE_RANDOM: f64 = 1e-3;
/// Steps between two durable states where all weights are trained: storing one costs as much as some steps.
const DURABLE_EVERY: u64 = 20;
/// Share of all steps in which the learning rate rises.
pub(crate) const WARMUP_SHARE: f64 = 0.03;
/// Share of the steps in which the schedule `late` falls.
pub(crate) const LATE_SHARE: f64 = 0.2;
/// AdamW's β₁, β₂ and ε.
const ADAM: (f32, f32, f32) = (0.9, 0.999, 1e-8);
/// A gradient of a larger norm is scaled down to it, unless the client chooses otherwise.
pub(crate) const GRADIENT_NORM_MAX: f64 = 1.0;
/// Longest sequence of a job that names none, where the model takes longer ones.
pub(crate) const SEQUENCE_TOKENS_MAX: u32 = 4096;
/// Rows of a micro-batch, unless a single sample has more.
const MICRO_BATCH_ROWS: u32 = 512;
/// So often a job measures its validation data.
const EVALUATIONS: u64 = 10;

/// Everything a client may choose of how a job trains. `None` is chosen with the files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Choices {
    pub(crate) method: MethodChoice,
    pub(crate) epochs: Option<u32>,
    pub(crate) batch_size: Option<u32>,
    pub(crate) learning_rate_multiplier: Option<f64>,
    /// At multiplier 1.
    pub(crate) learning_rate: f64,
    pub(crate) weight_decay: f32,
    /// `None` clips nothing.
    pub(crate) grad_clip: Option<f64>,
    pub(crate) seed: u64,
    pub(crate) lora: LoraSettings,
    /// All weights are trained, from these.
    #[serde(default)]
    pub(crate) full: Option<ModelStart>,
    pub(crate) schedule: ScheduleChoice,
    pub(crate) max_seq_len: u32,
    pub(crate) early_stopping: Option<EarlyStopping>,
    /// Whether samples share micro-batches.
    #[serde(default = "packed")]
    pub(crate) packing: bool,
}

fn packed() -> bool {
    true
}

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MethodChoice {
    Supervised,
    Dpo {
        /// `None` is [`DPO_BETA`].
        beta: Option<f64>,
    },
}

/// How closely a preference job stays at the model it starts from.
pub(crate) const DPO_BETA: f64 = 0.1;

/// When a job ends before its last step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct EarlyStopping {
    /// Measurements without a lower loss.
    pub(crate) patience: u32,
    /// Share of the training file's examples to measure on, where there is no validation file.
    pub(crate) validation_split: f64,
}

/// The course of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct ScheduleChoice {
    pub(crate) decay: DecayChoice,
    pub(crate) warmup: Span,
    /// What is left of the learning rate at the end.
    pub(crate) floor: f64,
    /// Of [`DecayChoice::Late`]: when it falls.
    pub(crate) late: Span,
}

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DecayChoice {
    Constant,
    Linear,
    Cosine,
    Late,
}

/// A number of steps.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Span {
    /// Of all.
    Share(f64),
    Steps(u64),
}

impl Span {
    fn steps(self, all: u64) -> u64 {
        match self {
            // A share is at most 1 and steps are far below 2^53.
            Span::Share(share) => ((all as f64 * share).ceil() as u64).min(all),
            Span::Steps(steps) => steps,
        }
    }
}

/// A file's samples.
#[derive(Debug)]
pub(crate) struct Samples<'a> {
    pub(crate) blob: BlobId,
    pub(crate) examples: u64,
    pub(crate) sizes: &'a [SampleSize],
}

/// Rows of the longest sample: no micro-batch can be smaller.
pub(crate) fn longest_sample(training: &Samples<'_>, validation: Option<&Samples<'_>>) -> u32 {
    let measured = validation.map_or(&[][..], |samples| samples.sizes);
    training.sizes.iter().chain(measured).map(|size| size.rows).max().unwrap_or(0)
}

impl Choices {
    /// The dataset's word for the method.
    pub(crate) fn dataset_method(&self) -> Method {
        match self.method {
            MethodChoice::Supervised => Method::Supervised,
            MethodChoice::Dpo { .. } => Method::Dpo,
        }
    }

    /// How the job trains on these samples.
    pub(crate) fn settle(
        &self,
        training: &Samples<'_>,
        validation: Option<&Samples<'_>>,
    ) -> Result<TrainingSettings, PlanError> {
        let aside = match (&self.early_stopping, validation) {
            (Some(early), None) => {
                ((training.examples as f64 * early.validation_split).round() as u32).max(1)
            }
            _ => 0,
        };
        let trained = split(training.sizes, aside, self.seed).training;
        let epochs = self.epochs.unwrap_or_else(|| auto_epochs(training.examples));
        let batch_size = self.batch_size.unwrap_or_else(|| auto_batch_size(trained.len() as u64));
        let settings = PlanSettings { epochs, batch_size, seed: self.seed };
        let plan = JobPlan::new(training.sizes.to_vec(), trained, settings)?;
        let (steps, steps_per_epoch) = (plan.steps(), u64::from(plan.steps_per_epoch()));
        let measured = validation.map_or(&[][..], |samples| samples.sizes);
        let largest = longest_sample(training, validation);
        // A small file never fills the micro-batches that are allowed.
        let all = |sizes: &[SampleSize]| sizes.iter().map(|size| u64::from(size.rows)).sum::<u64>();
        let rows = match self.packing {
            true => u32::try_from(all(training.sizes).max(all(measured))).unwrap_or(u32::MAX),
            false => largest,
        };
        Ok(TrainingSettings {
            dataset: training.blob,
            validation: match validation {
                Some(samples) => ValidationData::File(samples.blob),
                None if aside > 0 => ValidationData::Split { examples: aside },
                None => ValidationData::None,
            },
            method: match self.method {
                MethodChoice::Supervised => TrainingMethod::Supervised,
                MethodChoice::Dpo { beta } => TrainingMethod::Dpo { beta: beta.unwrap_or(DPO_BETA) },
            },
            lora: self.lora.clone(),
            full: self.full.map(|start| FullSettings { start, durable_every: DURABLE_EVERY }),
            epochs,
            batch_size,
            seed: self.seed,
            micro_batch_rows: rows.clamp(largest, largest.max(MICRO_BATCH_ROWS)).max(1),
            packing: self.packing,
            // Whether there is memory for it is seen when a session opens.
            keep_activations: true,
            learning_rate: self.learning_rate * self.learning_rate_multiplier.unwrap_or(1.0),
            schedule: Schedule { warmup_steps: self.schedule.warmup.steps(steps), decay: self.decay(steps) },
            adam: ADAM,
            weight_decay: self.weight_decay,
            norm_max: self.grad_clip,
            steps,
            steps_per_epoch,
            evaluate_every: steps.div_ceil(EVALUATIONS).clamp(1, steps_per_epoch.max(1)),
            patience: self.early_stopping.map(|early| early.patience),
        })
    }

    fn decay(&self, steps: u64) -> Decay {
        let floor = self.schedule.floor;
        match self.schedule.decay {
            DecayChoice::Constant => Decay::Constant,
            DecayChoice::Linear => Decay::Linear { floor },
            DecayChoice::Cosine => Decay::Cosine { floor },
            DecayChoice::Late => Decay::Late { steps: self.schedule.late.steps(steps), floor },
        }
    }
}
