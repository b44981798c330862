//! Fine-tuning jobs as their owners want them, and what has to come of them.

use crate::gateway::DIGEST;
use crate::random::Random;
use crate::scenario::FAULTS_END_US;
use crate::session::{REFUSED, UNUSABLE};
use crate::weights;
use ashlar_protocol::admin::{DataReport, FileRecord, JobAction, JobRequest, PreparedJob};
use ashlar_protocol::training::{
    FullSettings, LoraSettings, ModelStart, TrainingMethod, TrainingSettings, ValidationData,
};
use ashlar_vocabulary::{AdapterId, BlobId, Decay, FileId, JobId, Schedule};
use std::collections::BTreeMap;

/// When owners who have paused a job let it go on.
pub(crate) const RESUMED_US: u64 = FAULTS_END_US + 500_000;

/// So many adapters have room where all names of a world together do.
pub(crate) const ADAPTERS_ENOUGH: usize = 32;

/// All jobs of a world.
#[derive(Debug, Clone)]
pub(crate) struct Tuning {
    pub(crate) jobs: Vec<Job>,
    pub(crate) max_jobs_running: usize,
    /// Most adapters in a rank's memory.
    pub(crate) max_adapters: usize,
    /// The uploaded file that all are trained on.
    pub(crate) file: FileRecord,
}

/// One job, and what has to come of it.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) request: JobRequest,
    pub(crate) prepared: PreparedJob,
    /// What its state comes to after 0, 1, … steps.
    pub(crate) digests: Vec<u64>,
    /// Why its result can never be served, if so.
    pub(crate) flaw: Option<Flaw>,
    /// What its owner does, and when.
    pub(crate) controls: Vec<(u64, JobAction)>,
    pub(crate) created_us: u64,
}

/// Why a job's result can never be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// The root sees that what was trained has no effect.
    Unusable,
    /// Ranks refuse it when they are to serve it.
    Refused,
}

impl Job {
    pub(crate) fn id(&self) -> JobId {
        self.request.id
    }

    pub(crate) fn steps(&self) -> u64 {
        self.prepared.settings.steps
    }

    /// Whether all weights are trained, so that its files are handed out.
    pub(crate) fn is_full(&self) -> bool {
        self.prepared.settings.full.is_some()
    }

    pub(crate) fn may_be_cancelled(&self) -> bool {
        self.controls.iter().any(|(_, action)| *action == JobAction::Cancel)
    }

    /// The adapter that an undisturbed run has after so many steps.
    pub(crate) fn adapter(&self, steps: u64) -> Option<AdapterId> {
        let digest = self.digests.get(usize::try_from(steps).ok()?)?;
        Some(weights::adapter(*digest, self.flaw == Some(Flaw::Refused)))
    }

    /// What its finished model is called.
    pub(crate) fn name(&self) -> String {
        let id = self.id().to_string();
        let suffix = self.request.suffix.as_deref().unwrap_or_default();
        format!("ft:simulated:ashlar:{suffix}:{}", id.get(..8).unwrap_or(&id))
    }
}

impl Tuning {
    pub(crate) fn new(random: &mut Random) -> Tuning {
        let count = random.between(1, 4);
        let file = FileRecord {
            id: FileId(1),
            name: "samples.jsonl".into(),
            purpose: "fine-tune".into(),
            bytes: 100,
            created_at: 1,
            blob: BlobId([9; 32]),
            owner: None,
        };
        Tuning {
            jobs: (1..=count).map(|number| job(random, number)).collect(),
            max_jobs_running: random.between(1, 4) as usize,
            max_adapters: if random.chance(250_000) {
                random.between(2, 5) as usize
            } else {
                ADAPTERS_ENOUGH
            },
            file,
        }
    }

    pub(crate) fn job(&self, id: JobId) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id() == id)
    }

    /// What an adapter's digest is, whoever made it.
    pub(crate) fn digests(&self) -> BTreeMap<AdapterId, u64> {
        let of = |job: &Job| {
            let steps = 0..=job.steps();
            let digests = steps.filter_map(|step| Some((job.adapter(step)?, job.digests[step as usize])));
            digests.collect::<Vec<_>>()
        };
        self.jobs.iter().flat_map(of).collect()
    }

    /// Which adapter a name may stand for.
    pub(crate) fn named(&self, name: &str) -> Option<AdapterId> {
        self.jobs.iter().find_map(|job| {
            let rest = name.strip_prefix(&job.name())?;
            match rest.strip_prefix(":ckpt-step-") {
                Some(step) => job.adapter(step.parse().ok()?),
                None if rest.is_empty() => job.adapter(job.steps()),
                None => None,
            }
        })
    }
}

fn job(random: &mut Random, number: u64) -> Job {
    let steps = random.between(3, 15);
    let seed = random.next();
    let full = random.chance(200_000);
    let flaw = match random.between(0, 12) {
        0 => Some(Flaw::Unusable),
        1 if !full => Some(Flaw::Refused),
        _ => None,
    };
    // Ranks know a flawed job by what it trains.
    let target = match flaw {
        None => "q_proj",
        Some(Flaw::Unusable) => UNUSABLE,
        Some(Flaw::Refused) => REFUSED,
    };
    let settings = TrainingSettings {
        dataset: BlobId([8; 32]),
        validation: if random.chance(600_000) {
            ValidationData::Split { examples: 1 }
        } else {
            ValidationData::None
        },
        method: TrainingMethod::Supervised,
        lora: LoraSettings {
            rank: 4,
            alpha: 8.0,
            rank_stabilized: false,
            dropout: 0.0,
            targets: vec![target.into()],
        },
        full: full.then(|| FullSettings { start: ModelStart::Model, durable_every: random.between(2, 5) }),
        epochs: 1,
        batch_size: 8,
        seed,
        micro_batch_rows: 32,
        packing: true,
        keep_activations: true,
        learning_rate: 1e-4,
        schedule: Schedule { warmup_steps: 1, decay: Decay::Constant },
        adam: (0.9, 0.999, 1e-8),
        weight_decay: 0.0,
        norm_max: Some(1.0),
        steps,
        steps_per_epoch: random.between(2, 7),
        evaluate_every: random.between(2, 6),
        patience: None,
    };
    let data = DataReport {
        examples: 10,
        samples: 10,
        tokens: 100,
        target_tokens: 50,
        longest_sample_rows: 8,
        truncated_examples: 0,
        truncated_tokens: 0,
        warnings: Vec::new(),
    };
    let created_us = random.between(400_000, 6_000_000);
    Job {
        request: JobRequest {
            id: JobId((u128::from(number) << 96) | u128::from(random.next())),
            created_at: 10 + number,
            model: "simulated".into(),
            model_digest: DIGEST,
            training_file: FileId(1),
            validation_file: None,
            suffix: Some(format!("job{number}")),
            metadata: BTreeMap::new(),
            settings: "{}".into(),
            promote: None,
            owner: None,
            training_minutes_max: None,
        },
        digests: weights::undisturbed(seed, steps),
        prepared: PreparedJob { settings, data, evaluation: None },
        flaw,
        controls: controls(random, created_us),
        created_us,
    }
}

/// Some owners change their minds.
fn controls(random: &mut Random, created_us: u64) -> Vec<(u64, JobAction)> {
    let mut controls = Vec::new();
    for _ in 0..random.between(0, 4) {
        let action = [JobAction::Pause, JobAction::Pause, JobAction::Resume][random.between(0, 3) as usize];
        controls.push((random.between(created_us, FAULTS_END_US), action));
    }
    if random.chance(150_000) {
        controls.push((random.between(created_us, FAULTS_END_US), JobAction::Cancel));
    }
    controls.sort_by_key(|(at, _)| *at);
    controls.push((RESUMED_US, JobAction::Resume));
    controls
}
