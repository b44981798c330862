//! What a session trains and measures: local copies of the samples, and the plan.

use super::error::SessionError;
use super::storage::Storage;
use ashlar_dataset::plan::{Batch, JobPlan, PlanSettings, replica_runs, split};
use ashlar_dataset::{DatasetReader, Method, SampleSize};
use ashlar_model::stage::{MicroBatch, TargetRow};
use ashlar_protocol::training::{TrainingMethod, TrainingSettings, ValidationData};
use ashlar_vocabulary::TokenId;
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// The samples of a job.
pub(super) struct SessionData {
    training: DatasetReader<File>,
    plan: JobPlan,
    /// Where it is not a part of the training file.
    validation_file: Option<DatasetReader<File>>,
    /// What is measured.
    validation: Vec<u32>,
    rows_max: u32,
    /// Whether samples share micro-batches.
    packing: bool,
}

/// Samples that are computed together.
pub(super) struct Micro {
    pub(super) batch: MicroBatch,
    /// Of each sequence the sample's number in the file, and its own in the sample.
    pub(super) sequences: Vec<(u32, u32)>,
    pub(super) tokens: Vec<TokenId>,
    pub(super) targets: Vec<TargetRow>,
}

/// Which samples those will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MicroPlan {
    /// The run of the batch that they belong to.
    pub(super) run: usize,
    pub(super) samples: Vec<u32>,
}

/// A replica's part of a step.
pub(super) struct StepPlan {
    /// In the order of their gradients.
    pub(super) micros: Vec<MicroPlan>,
    pub(super) runs: Range<usize>,
    /// Targets of the whole batch, all replicas together.
    pub(super) targets: u64,
    /// Samples of the whole batch; of preferences, pairs.
    pub(super) samples: u64,
    /// Tokens of the whole batch.
    pub(super) rows: u64,
}

fn refused(error: impl std::fmt::Display) -> SessionError {
    SessionError::Refused(error.to_string())
}

/// Refuses samples that were made for another method than the job's.
fn check_method(file: &DatasetReader<File>, settings: &TrainingSettings) -> Result<(), SessionError> {
    let wanted = match settings.method {
        TrainingMethod::Supervised => Method::Supervised,
        TrainingMethod::Dpo { .. } => Method::Dpo,
    };
    if file.method() == wanted {
        return Ok(());
    }
    let found = file.method();
    Err(refused(format!(
        "the samples are for the method {found}, the job's is {wanted}: create the job again"
    )))
}

impl SessionData {
    /// Fetches the samples to nameless files in `directory`.
    pub(super) fn fetch(
        settings: &TrainingSettings,
        storage: &Storage,
        directory: &Path,
    ) -> Result<SessionData, SessionError> {
        let training = DatasetReader::open(storage.fetch(settings.dataset, directory)?)?;
        check_method(&training, settings)?;
        let sizes = training.sizes().to_vec();
        let all = |sizes: &[SampleSize]| (0..sizes.len() as u32).collect::<Vec<u32>>();
        let mut validation_file = None;
        let (trained, validation) = match &settings.validation {
            ValidationData::None => (all(&sizes), Vec::new()),
            ValidationData::Split { examples } => {
                let split = split(&sizes, *examples, settings.seed);
                (split.training, split.validation)
            }
            ValidationData::File(id) => {
                let file = DatasetReader::open(storage.fetch(*id, directory)?)?;
                check_method(&file, settings)?;
                let validation = all(file.sizes());
                validation_file = Some(file);
                (all(&sizes), validation)
            }
        };
        let of_plan =
            PlanSettings { epochs: settings.epochs, batch_size: settings.batch_size, seed: settings.seed };
        let plan = JobPlan::new(sizes, trained, of_plan).map_err(refused)?;
        plan.check_micro_batch_rows(settings.micro_batch_rows).map_err(refused)?;
        if plan.steps() != settings.steps {
            let (own, told) = (plan.steps(), settings.steps);
            return Err(refused(format!("the plan has {own} steps, the job {told}: create the job again")));
        }
        let (rows_max, packing) = (settings.micro_batch_rows, settings.packing);
        let data = SessionData { training, plan, validation_file, validation, rows_max, packing };
        let too_large = |&&sample: &&u32| data.validation_size(sample).rows > data.rows_max;
        if let Some(sample) = data.validation.iter().find(too_large) {
            let rows = data.validation_size(*sample).rows;
            return Err(refused(format!(
                "validation sample {sample} has {rows} rows, but a micro-batch may have {}: allow larger micro-batches",
                data.rows_max
            )));
        }
        Ok(data)
    }

    fn validation_size(&self, sample: u32) -> SampleSize {
        let sizes = self.validation_file.as_ref().unwrap_or(&self.training).sizes();
        sizes.get(sample as usize).copied().unwrap_or(SampleSize { example: 0, rows: 0, targets: 0 })
    }

    /// Most rows that any micro-batch will have.
    pub(super) fn rows_max(&self) -> usize {
        let files = [Some(&self.training), self.validation_file.as_ref()];
        let sizes = files.into_iter().flatten().map(DatasetReader::sizes);
        let most = |sizes: &[SampleSize]| {
            let rows = sizes.iter().map(|size| u64::from(size.rows));
            if self.packing { rows.sum() } else { rows.max().unwrap_or(0) }
        };
        // A small file never fills the micro-batches that were allowed, nor does a sample alone.
        sizes.map(most).max().unwrap_or(0).min(u64::from(self.rows_max)).max(1) as usize
    }

    /// A replica's part of a step; `None` beyond the last.
    pub(super) fn step(
        &self,
        step: u64,
        replica: usize,
        replicas: usize,
    ) -> Result<Option<StepPlan>, SessionError> {
        let Some(batch) = self.plan.batch(step) else { return Ok(None) };
        let runs = replica_runs(replica, replicas)
            .ok_or_else(|| refused(format!("{replicas} replicas cannot share a batch: use 1, 2, 4 or 8")))?;
        let mut micros = Vec::new();
        for run in runs.clone() {
            micros.extend(self.micro_plans(&batch, run)?);
        }
        let (targets, samples, rows) = (batch.targets(), batch.samples().len() as u64, batch.rows());
        Ok(Some(StepPlan { micros, runs, targets, samples, rows }))
    }

    fn micro_plans(&self, batch: &Batch, run: usize) -> Result<Vec<MicroPlan>, SessionError> {
        let micros = batch.micro_batches(run, self.rows_max, self.packing).map_err(refused)?;
        let plan = |micro: ashlar_dataset::plan::MicroBatch| MicroPlan {
            run,
            samples: batch.samples()[micro.positions].to_vec(),
        };
        // Samples without a row compute nothing.
        Ok(micros.into_iter().filter(|micro| micro.rows > 0).map(plan).collect())
    }

    /// Whether there is anything to measure.
    pub(super) fn is_validated(&self) -> bool {
        !self.validation.is_empty()
    }

    /// A replica's part of the validation data. What is measured is a sum, to which it does not matter who computes what.
    pub(super) fn validation(&self, replica: usize, replicas: usize) -> Vec<MicroPlan> {
        let mut plans: Vec<(u32, MicroPlan)> = Vec::new();
        for &sample in self.validation.iter().skip(replica).step_by(replicas.max(1)) {
            let rows = self.validation_size(sample).rows;
            match plans.last_mut() {
                _ if rows == 0 => {}
                Some((filled, plan)) if self.packing && *filled + rows <= self.rows_max => {
                    *filled += rows;
                    plan.samples.push(sample);
                }
                _ => plans.push((rows, MicroPlan { run: 0, samples: vec![sample] })),
            }
        }
        plans.into_iter().map(|(_, plan)| plan).collect()
    }

    /// Reads the samples of a micro-batch.
    pub(super) fn read(&mut self, plan: &MicroPlan, validation: bool) -> Result<Micro, SessionError> {
        let file = match &mut self.validation_file {
            Some(file) if validation => file,
            _ => &mut self.training,
        };
        let (mut lengths, mut tokens, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let mut of_samples = Vec::new();
        let pairs = file.method() == Method::Dpo;
        for &sample in &plan.samples {
            let sequences = file.read(sample)?.sequences;
            if pairs && (sequences.len() != 2 || sequences.iter().any(|answer| answer.target_count() == 0)) {
                return Err(refused(format!("sample {sample} is no pair of answers: create the job again")));
            }
            for (number, sequence) in (0..).zip(sequences) {
                let rows = sequence.rows() as usize;
                if rows == 0 {
                    continue;
                }
                let start = tokens.len();
                lengths.push(rows);
                of_samples.push((sample, number));
                tokens.extend_from_slice(&sequence.tokens()[..rows]);
                let of_row =
                    |(row, token): (u32, u32)| TargetRow { row: start + row as usize, token, weight: 1.0 };
                targets.extend(sequence.labels().map(of_row));
            }
        }
        Ok(Micro { batch: MicroBatch::new(&lengths), sequences: of_samples, tokens, targets })
    }
}
