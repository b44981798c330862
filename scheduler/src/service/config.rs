//! What the scheduler is told before it starts.

use super::SchedulerError;
use ashlar_service_kit::config::{Schema, Secret};
use ashlar_shard_plan::Links;
use ashlar_vocabulary::{FloatType, ModelDigest, ModelShape, Precision, Quantization};
use schemars::{JsonSchema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A model that a scheduler serves. Whoever starts it has opened the model; the scheduler itself never does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// Directory or hub id, as nodes will open it.
    pub source: String,
    /// In which precision nodes serve it.
    pub precision: Precision,
    /// Digest; nodes and gateways refuse to mix others in.
    pub digest: ModelDigest,
    /// Dimensions.
    pub shape: ModelShape,
    /// Longest sequence, prompt and answer together.
    pub max_context_tokens: u32,
}

/// Configuration of `ashlar scheduler`. Unknown keys are refused; everything but `model` has a default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SchedulerConfig {
    /// Directory or hub id of the model.
    pub model: String,
    /// Quantise the weights while they are loaded: q8_0, q4_0, q4_k_m … (see `ashlar up --help`).
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub quantize: Option<Quantization>,
    /// Element type of the KV cache: f32, bf16 or f16.
    #[serde(default)]
    #[schemars(schema_with = "float_type")]
    pub kv_cache_type: FloatType,
    /// Element type of activations between layers, and so on their way from stage to stage: f32, bf16 or f16.
    #[serde(default)]
    #[schemars(schema_with = "float_type")]
    pub activation_type: FloatType,
    /// Where nodes connect, `host:port`; port 0 picks a free one.
    #[serde(default = "default_listen_nodes")]
    pub listen_nodes: String,
    /// Where gateways connect, `host:port`; port 0 picks a free one.
    #[serde(default = "default_listen_gateways")]
    pub listen_gateways: String,
    /// The directory of this scheduler's identity, which `ashlar identity` makes; with it every connection is encrypted and mutual.
    /// Default: in the clear, on this machine only.
    #[serde(default)]
    pub identity: Option<PathBuf>,
    /// Whether to listen for other machines without an identity, on a network that only the cluster is on.
    #[serde(default)]
    pub allow_plaintext: bool,
    /// Cluster state: `redb:PATH`, or `redis://HOST:PORT/DATABASE` where standbys shall be possible.
    #[serde(default = "default_store")]
    pub store: String,
    /// Where uploaded files, adapters and the states of fine-tuning jobs are kept: a directory, or `s3://BUCKET/PREFIX`; the
    /// same place for gateways, scheduler and nodes. Without it files and jobs are refused.
    #[serde(default)]
    pub blobs: Option<String>,
    /// Most fine-tuning jobs that train at once; the others wait.
    #[serde(default = "default_max_jobs_running")]
    pub max_jobs_running: usize,
    /// Longest sequence, prompt and answer together; default: what the model allows.
    #[serde(default)]
    pub max_context_tokens: Option<u32>,
    /// Pipeline stages per replica; default: the fewest that fit.
    #[serde(default)]
    pub stages: Option<usize>,
    /// Tensor-parallel ranks per stage: 1, 2, 4 or 8; default: 1.
    #[serde(default)]
    pub tensor_parallel_size: Option<usize>,
    /// Replicas; default: as many as fit.
    #[serde(default)]
    pub replicas: Option<usize>,
    /// Whether all stages share the head instead of leaving it to the last one, wherever a replica has 2, 4 or 8 ranks in all;
    /// default: where that is predicted to be faster.
    #[serde(default)]
    pub spread_head: Option<bool>,
    /// Nodes to wait for before the first layout; default: until nobody has joined for `settle_ms`.
    #[serde(default)]
    pub expected_nodes: Option<usize>,
    /// How long to wait for another node to join before the first layout, in milliseconds.
    #[serde(default = "default_settle_ms")]
    pub settle_ms: u64,
    /// Most sequences running per replica.
    #[serde(default = "default_max_num_seqs")]
    pub max_num_seqs: usize,
    /// Most rows in one step of one replica, at least `max_num_seqs`.
    #[serde(default = "default_max_num_batched_tokens")]
    pub max_num_batched_tokens: u32,
    /// Which share of the answers is computed again on another replica to compare the bits, 0…1; 0 for none.
    #[serde(default)]
    pub audit_share: f64,
    /// Whether computed KV blocks are kept for requests of the same tenant that begin the same.
    #[serde(default = "default_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Whether stages keep the rows that they hand on, where all nodes have room for that beside the plan: a stage that is lost is then
    /// the only one that computes again.
    #[serde(default = "default_boundary_log")]
    pub boundary_log: bool,
    /// No stage shall take longer than this for one step, in milliseconds, as far as that can be predicted.
    #[serde(default = "default_step_target_ms")]
    pub step_target_ms: u64,
    /// An API key with every scope, as `ashlar keys create --offline` makes one: with it the first others are made. Give it as a file
    /// (`ASHLAR_SCHEDULER__ADMIN_KEY_FILE`). Default: none.
    #[serde(default)]
    pub admin_key: Option<Secret>,
    /// An API key that reads metrics and does nothing else, likewise. Default: none.
    #[serde(default)]
    pub metrics_key: Option<Secret>,
    /// Requests that would wait longer than this for a place, in milliseconds, are refused with 429.
    #[serde(default = "default_queue_wait_ms_max")]
    pub queue_wait_ms_max: u64,
    /// Most requests waiting; more are refused with 429.
    #[serde(default = "default_queue_max")]
    pub queue_max: usize,
    /// Most adapters in a rank's memory at once; others stay registered, and are loaded when a request for them comes.
    #[serde(default = "default_max_adapters")]
    pub max_adapters: usize,
    /// Most memory that adapters may take on a rank, in bytes.
    #[serde(default = "default_adapter_memory_bytes")]
    pub adapter_memory_bytes: u64,
    /// Deadline of requests that name none, in milliseconds.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    /// Most of a node's memory that the KV cache may take, 0…1. Within it, the KV cache is as large as `max_num_seqs`
    /// sequences of at most 4,096 tokens need, and never smaller than one sequence of full length.
    #[serde(default = "default_kv_memory_share")]
    pub kv_memory_share: f64,
    /// A node that executes steps counts as lost after this silence, in milliseconds, or after four predicted steps if
    /// those take longer.
    #[serde(default = "default_silence_ms_max")]
    pub silence_ms_max: u64,
    /// How long a lost node is waited for before what is left is laid out anew, where stages or replicas are left open.
    #[serde(default = "default_replan_after_ms")]
    pub replan_after_ms: u64,
    /// How long requests that have not begun wait when no replica is up, in milliseconds; then they are refused with 503. Those that
    /// have begun wait until their deadline.
    #[serde(default = "default_repair_patience_ms")]
    pub repair_patience_ms: u64,
    /// Milliseconds for which a stored response goes on when no gateway follows it: its gateway was lost, or its client. One in the
    /// background is computed anew once a gateway can take it up; another one is then cancelled.
    #[serde(default = "default_resume_grace_ms")]
    pub resume_grace_ms: u64,
    /// Seconds after which a stored response that has ended is forgotten.
    #[serde(default = "default_responses_kept_s")]
    pub responses_kept_s: u64,
    /// Most stored responses; of those that have ended the oldest are forgotten first.
    #[serde(default = "default_responses_max")]
    pub responses_max: usize,
    /// How long running requests may take to finish when the scheduler is asked to end, in milliseconds.
    #[serde(default = "default_drain_grace_ms")]
    pub drain_grace_ms: u64,
    /// How long the scheduler's lease lasts without renewal, in milliseconds.
    #[serde(default = "default_lease_ttl_ms")]
    pub lease_ttl_ms: u64,
    /// The network between nodes, for predictions; default: processes of one host.
    #[serde(default)]
    pub links: Links,
    /// Where to send traces (OTLP over HTTP), for example `http://127.0.0.1:4318`. Off by default.
    #[serde(default)]
    pub otlp_endpoint: Option<String>,
}

impl SchedulerConfig {
    /// Every key, for files, environment and flags.
    pub fn schema() -> Schema {
        Schema::of::<SchedulerConfig>("scheduler")
    }

    /// In which precision the model is served.
    pub fn precision(&self) -> Precision {
        Precision {
            quantization: self.quantize,
            kv_cache: self.kv_cache_type,
            activations: self.activation_type,
        }
    }

    /// The defaults, for `model`.
    pub fn new(model: impl Into<String>) -> SchedulerConfig {
        SchedulerConfig {
            model: model.into(),
            quantize: None,
            kv_cache_type: FloatType::default(),
            activation_type: FloatType::default(),
            listen_nodes: default_listen_nodes(),
            listen_gateways: default_listen_gateways(),
            identity: None,
            allow_plaintext: false,
            store: default_store(),
            blobs: None,
            max_jobs_running: default_max_jobs_running(),
            max_context_tokens: None,
            stages: None,
            tensor_parallel_size: None,
            replicas: None,
            spread_head: None,
            expected_nodes: None,
            settle_ms: default_settle_ms(),
            max_num_seqs: default_max_num_seqs(),
            max_num_batched_tokens: default_max_num_batched_tokens(),
            audit_share: 0.0,
            enable_prefix_caching: default_enable_prefix_caching(),
            boundary_log: default_boundary_log(),
            step_target_ms: default_step_target_ms(),
            admin_key: None,
            metrics_key: None,
            queue_wait_ms_max: default_queue_wait_ms_max(),
            queue_max: default_queue_max(),
            max_adapters: default_max_adapters(),
            adapter_memory_bytes: default_adapter_memory_bytes(),
            deadline_ms: default_deadline_ms(),
            kv_memory_share: default_kv_memory_share(),
            silence_ms_max: default_silence_ms_max(),
            replan_after_ms: default_replan_after_ms(),
            repair_patience_ms: default_repair_patience_ms(),
            resume_grace_ms: default_resume_grace_ms(),
            responses_kept_s: default_responses_kept_s(),
            responses_max: default_responses_max(),
            drain_grace_ms: default_drain_grace_ms(),
            lease_ttl_ms: default_lease_ttl_ms(),
            links: Links::default(),
            otlp_endpoint: None,
        }
    }

    /// Refuses values that make no sense, before a port is bound.
    ///
    /// # Errors
    /// [`SchedulerError::Config`].
    pub fn validate(&self, model: &ModelCard) -> Result<(), SchedulerError> {
        self.validate_alone()?;
        if model.max_context_tokens < 2 {
            return Err(SchedulerError::Config("max_context_tokens must be at least 2".into()));
        }
        Ok(())
    }

    /// As [`validate`](Self::validate), as far as that goes without the model.
    ///
    /// # Errors
    /// [`SchedulerError::Config`].
    pub fn validate_alone(&self) -> Result<(), SchedulerError> {
        let rules = [
            (self.max_num_seqs >= 1, "max_num_seqs must be at least 1"),
            (
                self.max_num_batched_tokens as usize >= self.max_num_seqs,
                "max_num_batched_tokens must be at least max_num_seqs",
            ),
            (self.step_target_ms >= 1, "step_target_ms must be at least 1"),
            (self.queue_max >= 1, "queue_max must be at least 1"),
            (self.max_jobs_running >= 1, "max_jobs_running must be at least 1"),
            (self.max_adapters >= 1, "max_adapters must be at least 1"),
            (self.responses_max >= 1, "responses_max must be at least 1"),
            (self.deadline_ms >= 1, "deadline_ms must be at least 1"),
            (
                self.kv_memory_share > 0.0 && self.kv_memory_share <= 1.0,
                "kv_memory_share must be greater than 0 and at most 1",
            ),
            (
                (0.0..=1.0).contains(&self.audit_share),
                "audit_share must be at least 0 and at most 1: 0.001 is one answer of a thousand",
            ),
            (self.silence_ms_max >= 500, "silence_ms_max must be at least 500: nodes beat every 200 ms"),
            (self.lease_ttl_ms >= 1_000, "lease_ttl_ms must be at least 1000"),
            (
                self.stages != Some(0) && self.replicas != Some(0) && self.expected_nodes != Some(0),
                "stages, replicas and expected_nodes must be at least 1: leave a key out for the default",
            ),
            (
                self.max_context_tokens != Some(0) && self.max_context_tokens != Some(1),
                "max_context_tokens must be at least 2",
            ),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(SchedulerError::Config((*rule).to_owned())),
            None => Ok(()),
        }
    }
}

fn float_type(_: &mut SchemaGenerator) -> schemars::Schema {
    json_schema!({ "type": "string", "enum": FloatType::ALL.map(FloatType::name) })
}

fn default_listen_nodes() -> String {
    "127.0.0.1:7401".to_owned()
}

fn default_listen_gateways() -> String {
    "127.0.0.1:7402".to_owned()
}

fn default_store() -> String {
    "redb:.ashlar/scheduler.redb".to_owned()
}

fn default_max_jobs_running() -> usize {
    2
}

fn default_settle_ms() -> u64 {
    500
}

fn default_boundary_log() -> bool {
    true
}

fn default_enable_prefix_caching() -> bool {
    true
}

fn default_max_num_seqs() -> usize {
    64
}

fn default_max_num_batched_tokens() -> u32 {
    512
}

fn default_step_target_ms() -> u64 {
    100
}

fn default_queue_wait_ms_max() -> u64 {
    30_000
}

fn default_queue_max() -> usize {
    1024
}

fn default_max_adapters() -> usize {
    16
}

fn default_adapter_memory_bytes() -> u64 {
    1 << 30
}

fn default_deadline_ms() -> u64 {
    600_000
}

fn default_kv_memory_share() -> f64 {
    0.25
}

fn default_silence_ms_max() -> u64 {
    1_000
}

fn default_replan_after_ms() -> u64 {
    10_000
}

fn default_repair_patience_ms() -> u64 {
    30_000
}

fn default_resume_grace_ms() -> u64 {
    30_000
}

fn default_responses_kept_s() -> u64 {
    30 * 24 * 3600
}

fn default_responses_max() -> usize {
    10_000
}

fn default_drain_grace_ms() -> u64 {
    10_000
}

fn default_lease_ttl_ms() -> u64 {
    1_500
}
