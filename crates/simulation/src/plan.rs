//! Planning: a cluster and a load that somebody has in mind, instead of ones that a seed makes up, and what would come of them.
//!
//! Layout: [`Plan`] (what is asked), [`plan`] (the run), `report` (what came of it), `pace` (how long things take), `faults` (what
//! goes wrong, from a rate).
//!
//! The processes are those of the seeded worlds, around the same cores. What differs: steps take as long as the plan's cost
//! model says of the stage, slices take their bytes' time to load, the network is faithful and as fast as its links, and arrivals,
//! layout and limits are given. What must hold still must; what takes long to look at is looked at now and then
//! ([`Plan::check_every`]), and at the end.

mod faults;
mod pace;
mod report;

pub use report::{FaultReport, Objectives, PlanReport, ReplicaCut, Spread};

pub(crate) use pace::{Pace, delay_us, load_us, slice_of};
pub(crate) use report::{Observed, RequestLog, Struck};

use crate::Violation;
use crate::gateway::DIGEST;
use crate::process::Process;
use crate::scenario::VOCAB_SIZE;
use crate::world::World;

use ashlar_scheduler::cluster::ClusterConfig;
use ashlar_scheduler::engine::EngineConfig;
use ashlar_shard_plan::{DeviceReport, Links};
use ashlar_vocabulary::{LeaseTerm, ModelShape, Precision};
use std::sync::Arc;

/// What is to be planned for.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The model.
    pub shape: ModelShape,
    /// The nodes. What they report is what their steps take: see [`Times::step_overhead_us`].
    pub nodes: Vec<DeviceReport>,
    /// Gateways, to which requests go in turn.
    pub gateways: usize,
    /// How the model is cut.
    pub cut: Cut,
    /// The scheduler's settings.
    pub limits: Limits,
    /// The network between all processes.
    pub links: Links,
    /// How long things take.
    pub times: Times,
    /// What is asked, in order of arrival.
    pub requests: Vec<TracedRequest>,
    /// What goes wrong, and when.
    pub faults: Vec<PlannedFault>,
    /// What goes wrong besides, at random.
    pub fault_rates: Vec<FaultRate>,
    /// What a request must meet to count for goodput.
    pub objectives: Objectives,
    /// Whole-state checks (the engine's blocks and lists, a rank's whole KV cache of a sequence) happen with every so many inputs of
    /// the scheduler, and steps of a rank. 1 checks everything always.
    pub check_every: u64,
    /// Decides the content of prompts, delays of connections and random faults.
    pub seed: u64,
}

/// How the model is cut; `None` leaves it to the scheduler's planner.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Pipeline stages per replica.
    pub stages: Option<usize>,
    /// Ranks per stage.
    pub tensor_parallel_size: Option<usize>,
    /// Replicas.
    pub replicas: Option<usize>,
    /// Whether all stages share the head.
    pub spread_head: Option<bool>,
}

/// The scheduler's settings, as in its configuration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Longest sequence, prompt and answer together.
    pub max_context_tokens: u32,
    /// Most sequences running per replica.
    pub max_num_seqs: usize,
    /// Most rows in a step.
    pub max_num_batched_tokens: u32,
    /// How long a step should take at most.
    pub step_target_ms: u64,
    /// Most sequences waiting.
    pub queue_max: usize,
    /// A request that takes longer has failed.
    pub deadline_ms: u64,
    /// Most of a node's memory that KV blocks may take, 0…1.
    pub kv_memory_share: f64,
    /// Longest silence of a node that serves.
    pub silence_ms_max: u64,
    /// How long a layout with a vacant place is kept.
    pub replan_after_ms: u64,
    /// How long requests wait for a replica while there is none.
    pub repair_patience_ms: u64,
    /// Whether equal beginnings of prompts are computed once.
    pub enable_prefix_caching: bool,
}

impl Default for Limits {
    /// The scheduler's own defaults, with a context of 4096 tokens.
    fn default() -> Limits {
        Limits {
            max_context_tokens: 4096,
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            step_target_ms: 100,
            queue_max: 1024,
            deadline_ms: 600_000,
            kv_memory_share: 0.25,
            silence_ms_max: 1_000,
            replan_after_ms: 10_000,
            repair_patience_ms: 30_000,
            enable_prefix_caching: true,
        }
    }
}

/// How long things take, in microseconds and bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Times {
    /// What a step takes on every rank beside what the cost model says of it (messages, waking up).
    pub step_overhead_us: u64,
    /// From a message that reaches the scheduler until the steps that it makes possible go out; what arrives meanwhile shares them.
    pub scheduler_us: u64,
    /// How fast a slice is loaded.
    pub load_bytes_per_s: f64,
    /// From the kill of a process until another one in its place runs.
    pub restart_us: u64,
}

impl Default for Times {
    fn default() -> Times {
        Times { step_overhead_us: 200, scheduler_us: 50, load_bytes_per_s: 2e9, restart_us: 100_000 }
    }
}

/// One request of a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TracedRequest {
    /// When it arrives, counted from the moment from which the cluster serves.
    pub at_us: u64,
    /// Tokens of its prompt, which it shares with no other; at least 1.
    pub prompt_tokens: u32,
    /// Tokens that it generates; at least 1.
    pub output_tokens: u32,
}

/// A kind of process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Shard nodes, standbys included.
    Node,
    /// The scheduler.
    Scheduler,
    /// Gateways: what is in flight there is cut off with them.
    Gateway,
}

/// What happens to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// It is killed, and started again after [`Times::restart_us`].
    Kill,
    /// It stands still for so long.
    Freeze {
        /// How long, in microseconds.
        for_us: u64,
    },
}

/// A fault at a given moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedFault {
    /// When, counted as [`TracedRequest::at_us`] is.
    pub at_us: u64,
    /// Whom.
    pub role: Role,
    /// Which of them, from 0; there is one scheduler.
    pub index: usize,
    /// What.
    pub kind: FaultKind,
}

/// Faults at random: a Poisson process over all processes of a role, for as long as requests arrive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FaultRate {
    /// Whom: each of them is as likely.
    pub role: Role,
    /// What.
    pub kind: FaultKind,
    /// Mean time between two such faults in the whole cluster, in seconds.
    pub mean_time_between_s: f64,
}

/// Why there is no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanFailure {
    /// Something cannot be as it was asked for.
    #[error("{0}")]
    Settings(String),
    /// The cluster never came to serve.
    #[error("the cluster never came to serve: {0}")]
    NeverServed(String),
    /// What must never happen.
    #[error("what must never happen has happened, please report it: {0}")]
    Violation(#[from] Violation),
}

/// Simulates a cluster under a load. `progress` is told now and then which share of the time of the arrivals is over, 0…1.
///
/// # Errors
/// See [`PlanFailure`]; a violation names the seed.
pub fn plan(settings: &Plan, progress: &mut dyn FnMut(f64)) -> Result<PlanReport, PlanFailure> {
    settings.check()?;
    let mut settings = settings.clone();
    settings.faults.extend(faults::of_rates(&settings));
    settings.faults.sort_by_key(|fault| fault.at_us);
    let settings = Arc::new(settings);
    let observed = World::planned(Arc::clone(&settings)).run_plan(progress)?;
    Ok(PlanReport::new(&settings, observed))
}

impl Plan {
    /// A plan for these nodes and this trace, with everything else as is usual.
    pub fn new(shape: ModelShape, nodes: Vec<DeviceReport>, requests: Vec<TracedRequest>) -> Plan {
        Plan {
            shape,
            nodes,
            gateways: 1,
            cut: Cut::default(),
            limits: Limits::default(),
            links: Links::default(),
            times: Times::default(),
            requests,
            faults: Vec::new(),
            fault_rates: Vec::new(),
            objectives: Objectives::default(),
            check_every: 1_000,
            seed: 0,
        }
    }

    fn check(&self) -> Result<(), PlanFailure> {
        let refuse = |what: String| Err(PlanFailure::Settings(what));
        if self.nodes.is_empty() || self.gateways == 0 {
            return refuse("a cluster needs at least one node and one gateway".into());
        }
        if self.check_every == 0 || self.limits.max_num_seqs == 0 || self.limits.max_num_batched_tokens == 0 {
            return refuse("check_every, max_num_seqs and max_num_batched_tokens must be at least 1".into());
        }
        let speeds = [self.times.load_bytes_per_s, self.links.bytes_per_s];
        if !speeds.into_iter().all(|speed| speed.is_finite() && speed > 0.0) {
            return refuse("speeds of loading and of links must be positive".into());
        }
        let context = u64::from(self.limits.max_context_tokens);
        for (index, request) in self.requests.iter().enumerate() {
            let len = u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
            if request.prompt_tokens == 0 || request.output_tokens == 0 || len > context {
                return refuse(format!(
                    "request {} of the trace has {} and {} tokens: at least one of each, at most {context} together",
                    index + 1,
                    request.prompt_tokens,
                    request.output_tokens
                ));
            }
        }
        if !self.requests.is_sorted_by_key(|request| request.at_us) {
            return refuse("the trace is not in order of arrival".into());
        }
        for fault in &self.faults {
            if fault.index >= self.count(fault.role) {
                return refuse(format!("there is no {:?} {}: it cannot fail", fault.role, fault.index));
            }
        }
        let rate = |rate: &FaultRate| rate.mean_time_between_s.is_finite() && rate.mean_time_between_s > 0.0;
        match self.fault_rates.iter().all(rate) {
            true => Ok(()),
            false => refuse("the mean time between faults must be positive".into()),
        }
    }

    /// How many processes have this role.
    pub(crate) fn count(&self, role: Role) -> usize {
        match role {
            Role::Node => self.nodes.len(),
            Role::Scheduler => 1,
            Role::Gateway => self.gateways,
        }
    }

    /// When the last request arrives.
    pub(crate) fn last_arrival_us(&self) -> u64 {
        self.requests.last().map_or(0, |request| request.at_us)
    }

    pub(crate) fn cluster(&self, term: LeaseTerm, holder: String) -> ClusterConfig {
        ClusterConfig {
            model: "simulated".into(),
            precision: Precision::default(),
            model_digest: DIGEST,
            shape: self.shape.clone(),
            max_context_tokens: self.limits.max_context_tokens,
            term,
            holder,
            stages: self.cut.stages,
            tensor_parallel_size: self.cut.tensor_parallel_size,
            replicas: self.cut.replicas,
            spread_head: self.cut.spread_head,
            expected_nodes: Some(self.nodes.len()),
            settle_ms: 500,
            max_num_seqs: self.limits.max_num_seqs,
            max_num_batched_tokens: self.limits.max_num_batched_tokens,
            kv_memory_share: self.limits.kv_memory_share,
            silence_ms_max: self.limits.silence_ms_max,
            boundary_log: true,
            replan_after_ms: self.limits.replan_after_ms,
            links: self.links.clone(),
        }
    }

    pub(crate) fn engine(&self) -> EngineConfig {
        EngineConfig {
            audit_per_million: 0,
            // Of the simulated tokens, not of the model's.
            vocab_size: VOCAB_SIZE,
            enable_prefix_caching: self.limits.enable_prefix_caching,
            model_digest: DIGEST,
            max_context_tokens: self.limits.max_context_tokens,
            max_num_seqs: self.limits.max_num_seqs,
            max_num_batched_tokens: self.limits.max_num_batched_tokens,
            step_target_ms: self.limits.step_target_ms,
            queue_max: self.limits.queue_max,
            queue_wait_ms_max: self.limits.deadline_ms,
            deadline_default_ms: self.limits.deadline_ms,
            repair_patience_ms: self.limits.repair_patience_ms,
        }
    }
}

impl PlannedFault {
    pub(crate) fn process(&self) -> Process {
        match self.role {
            Role::Node => Process::Node(self.index),
            Role::Scheduler => Process::Scheduler,
            Role::Gateway => Process::Gateway(self.index),
        }
    }
}
