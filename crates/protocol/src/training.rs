//! Fine-tuning between scheduler and ranks: sessions, steps, votes.
//!
//! A job trains in a *session*: every rank of the replicas that take part opens it, with links of its own. Then each
//! piece of work is broadcast. A step commits when every rank has *prepared* it: the next state of a rank's share is durable,
//! as a blob, before it says so. Ranks delete no blob: the scheduler deletes those of a former state once its record of a later one is
//! durable. So whatever dies, one committed step at most is computed again, and the one that was being computed.
//!
//! Ranks derive a step's batches from the dataset and the settings; a message only names the step.

use ashlar_vocabulary::{
    AdapterId, BlobId, Bytes, JobId, ReplicaRevision, Schedule, SessionId, StageIndex, TensorRank,
};
use serde::{Deserialize, Serialize};

/// How a job trains, settled: nothing is left to be chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingSettings {
    /// The samples, as the dataset crate stores them.
    pub dataset: BlobId,
    /// What is measured and never trained.
    pub validation: ValidationData,
    /// What is learnt.
    pub method: TrainingMethod,
    /// The adapter that is trained, unless all weights are.
    pub lora: LoraSettings,
    /// All weights of a private copy of the model are trained instead of an adapter.
    #[serde(default)]
    pub full: Option<FullSettings>,
    /// How often every sample is trained.
    pub epochs: u32,
    /// Samples of a global batch.
    pub batch_size: u32,
    /// Of the order, the split, the adapter's start and dropout.
    pub seed: u64,
    /// Most rows of a micro-batch; a session may have fewer, where memory is short. It changes no bit.
    pub micro_batch_rows: u32,
    /// Whether a micro-batch holds as many samples as it has room for, or one. It changes no bit.
    #[serde(default = "packed")]
    pub packing: bool,
    /// Whether blocks may keep their activations for the backward pass instead of computing them again; a session does where
    /// there is room. It changes no bit.
    pub keep_activations: bool,
    /// Highest learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// AdamW's β₁, β₂ and ε.
    pub adam: (f32, f32, f32),
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Largest norm of a gradient; a larger one is scaled down to it.
    pub norm_max: Option<f64>,
    /// Steps of the whole job, as the plan has them.
    pub steps: u64,
    /// Steps of an epoch.
    pub steps_per_epoch: u64,
    /// Steps between two measurements of the validation data, where there are any.
    pub evaluate_every: u64,
    /// Ends the job early where the validation loss has not fallen for so many measurements.
    pub patience: Option<u32>,
}

/// What jobs do that were stored before there was a choice.
fn packed() -> bool {
    true
}

impl TrainingSettings {
    /// Whether the state after so many steps is made durable: an adapter's always; a whole model's after every
    /// [`durable_every`](FullSettings::durable_every) steps and after the last, and wherever the job may end early.
    pub fn is_durable(&self, steps: u64) -> bool {
        let Some(full) = &self.full else { return true };
        let measured = self.patience.is_some() && self.is_measured(steps);
        steps >= self.steps || measured || steps.is_multiple_of(full.durable_every.max(1))
    }

    /// Whether the validation data, where there are any, is measured after so many steps: at the end of an epoch, too.
    pub fn is_measured(&self, steps: u64) -> bool {
        let epoch = steps >= self.steps || steps.is_multiple_of(self.steps_per_epoch.max(1));
        epoch || steps.is_multiple_of(self.evaluate_every.max(1))
    }
}

/// How all weights are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FullSettings {
    /// What the copy starts from.
    pub start: ModelStart,
    /// Steps between two durable states. A job that is interrupted or paused repeats what came after the last one.
    pub durable_every: u64,
}

/// What a copy of the model starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelStart {
    /// The weights of the served model's files.
    Model,
    /// Random ones, by the seed.
    Random,
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ValidationData {
    /// Nothing.
    None,
    /// So many examples of the training file, chosen by the seed, which are not trained.
    Split {
        /// How many.
        examples: u32,
    },
    /// A dataset of its own.
    File(BlobId),
}

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub enum TrainingMethod {
    /// The targets of every sample.
    Supervised,
    /// To prefer one answer to another, with the model without adapter as the reference.
    Dpo {
        /// How closely the model stays at the reference.
        beta: f64,
    },
}

/// A low-rank adapter on linear layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoraSettings {
    /// Rows of A.
    pub rank: u32,
    /// α.
    pub alpha: f64,
    /// Whether the factor is α/√rank instead of α/rank.
    pub rank_stabilized: bool,
    /// Share of an adapter's inputs that are left out while it trains.
    pub dropout: f32,
    /// Modules, as Hugging Face names them (`q_proj`, …).
    pub targets: Vec<String>,
}

/// From the scheduler to a rank: take part in a session. Answered by [`TrainingReport::Opened`] or
/// [`TrainingReport::Failed`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenSession {
    /// The session; a job that is opened again has a new one.
    pub session: SessionId,
    /// The job.
    pub job: JobId,
    /// The layout of the rank's replica; a rank that has left it refuses.
    pub revision: ReplicaRevision,
    /// What to train.
    pub settings: TrainingSettings,
    /// Where it starts.
    pub start: SessionStart,
    /// Which of the replicas that take part this rank belongs to.
    pub replica: u32,
    /// How many take part: 1, 2, 4 or 8.
    pub replicas: u32,
    /// Data addresses of this stage's ranks, by rank (this rank's own included).
    pub group: Vec<String>,
    /// Data address of the same rank in the next stage; `None` on the last.
    pub next: Option<String>,
    /// Data addresses of the same stage and rank in every replica, by replica (this rank's own included).
    pub peers: Vec<String>,
}

/// Where a session starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionStart {
    /// With what the seed gives.
    New,
    /// After the last committed step.
    Resume {
        /// Steps committed.
        steps: u64,
        /// The shares of every rank that held one then, whatever the layout was.
        shards: Vec<BlobId>,
    },
}

/// From the scheduler to every rank of a session: what to do next. It also says that everything before is committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainingWork {
    /// Compute a step, prepare it, and answer [`TrainingReport::Prepared`].
    Step {
        /// Counted from 0 over the whole job: the number of committed steps.
        step: u64,
    },
    /// Measure the validation data with the state after the committed steps; the root answers [`TrainingReport::Evaluated`].
    Evaluate,
    /// Put these shares of all ranks together as PEFT files, or as those of a whole model; the root answers [`TrainingReport::Exported`].
    Export {
        /// Blobs of the shares.
        shards: Vec<BlobId>,
    },
    /// End the session and free what it holds.
    Close,
}

/// From a rank to the scheduler. The *root* is rank 0 of stage 0 of replica 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TrainingReport {
    /// The session's links stand and its state is in memory.
    Opened {
        /// What it has reserved.
        reserved: Bytes,
    },
    /// A step is computed and this rank's next state durable, where it is to be ([`TrainingSettings::is_durable`]).
    Prepared {
        /// The step.
        step: u64,
        /// The rank's share of the state after it; of equal shares on several replicas, replica 0 names its own.
        shard: Option<BlobId>,
        /// From the root: what the step showed.
        metrics: Option<StepMetrics>,
        /// How this rank spent it.
        timing: TrainingTiming,
    },
    /// The validation data was measured.
    Evaluated {
        /// Mean loss of its targets, or pairs of answers, in nats.
        loss: f64,
        /// Share of its targets that were the most probable token, or of pairs with a positive margin.
        accuracy: f64,
    },
    /// The adapter is stored.
    Exported {
        /// A manifest with `adapter_config.json` and `adapter_model.safetensors`.
        adapter: AdapterId,
        /// What the manifest holds.
        files: Vec<ExportedFile>,
        /// Whether every number of it is finite, and some pair changes something.
        usable: Result<(), String>,
    },
    /// The whole model that was trained is stored.
    ModelExported {
        /// A manifest of the files.
        manifest: BlobId,
        /// What it holds: a directory as Hugging Face has models.
        files: Vec<ExportedFile>,
        /// Whether every number of it is finite, and every tensor had a gradient.
        usable: Result<(), String>,
    },
    /// This rank cannot go on; its session is closed.
    Failed {
        /// What to tell.
        message: String,
        /// Whether another attempt may succeed (a lost link), or never will (a module that does not exist).
        retry: bool,
    },
    /// Where this rank keeps samples, states and results there is no room left; its session is closed. Another attempt is of use
    /// once somebody has made room.
    NoRoom {
        /// What to tell.
        message: String,
    },
}

/// A file of an adapter or a model that is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedFile {
    /// Its name, for example `adapter_config.json`.
    pub name: String,
    /// Where its bytes are.
    pub blob: BlobId,
    /// How many there are.
    pub bytes: u64,
}

/// What a step showed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// Mean loss of the batch's targets, or pairs of answers, in nats, before the step.
    pub loss: f64,
    /// Share of the targets that were the most probable token, or of pairs with a positive margin.
    pub accuracy: f64,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// The gradient's norm before clipping.
    pub gradient_norm: f64,
    /// Targets of the batch.
    pub targets: u64,
    /// Tokens of the batch. Those of a preference are computed without the adapter, too, but count once.
    pub tokens: u64,
    /// The loss or the gradient was no number, so the weights stayed as they were.
    pub skipped: bool,
    /// How much more probable the answers have become, where pairs of them are learnt.
    #[serde(default)]
    pub rewards: Option<Rewards>,
}

/// Mean rewards of a batch's answers: β times what their log-probability, in nats, has gained on the model without the adapter. The
/// difference is the mean margin.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rewards {
    /// Of the preferred answers.
    pub preferred: f64,
    /// Of the others.
    pub non_preferred: f64,
}

impl Rewards {
    /// The mean margin.
    pub fn margin(&self) -> f64 {
        self.preferred - self.non_preferred
    }
}

/// How a rank spent a step, in microseconds.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingTiming {
    /// Computing, interruptions by serving included.
    pub compute_us: u64,
    /// Waiting for another stage.
    pub wait_us: u64,
    /// Exchanging within the tensor-parallel group and between replicas.
    pub exchange_us: u64,
    /// Making the next state durable.
    pub durable_us: u64,
}

impl TrainingTiming {
    /// Adds another step's.
    pub fn add(&mut self, other: &TrainingTiming) {
        self.compute_us += other.compute_us;
        self.wait_us += other.wait_us;
        self.exchange_us += other.exchange_us;
        self.durable_us += other.durable_us;
    }
}

/// Names a rank of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionRank {
    /// Which replica of the session.
    pub replica: u32,
    /// Which stage.
    pub stage: StageIndex,
    /// Which rank of it.
    pub rank: TensorRank,
}
