//! What a seed stands for: a layout, clients, a network and its faults.

use crate::durable::Half;
use crate::gateway::{DIGEST, Request};
use crate::owner::Want;
use crate::plan::Plan;
use crate::process::Process;
use crate::random::Random;
use crate::tuning::Tuning;
use ashlar_scheduler::cluster::ClusterConfig;
use ashlar_scheduler::engine::EngineConfig;
use ashlar_shard_plan::Links;
use ashlar_vocabulary::{FloatType, LayerVectors, LeaseTerm, ModelShape, Precision, WeightType, WeightTypes};
use std::sync::Arc;

/// Faults happen before this moment; afterwards the world must heal.
pub(crate) const FAULTS_END_US: u64 = 12_000_000;
/// By this moment it must serve again.
pub(crate) const PROBES_US: u64 = 30_000_000;
/// By this moment everything must be over.
pub(crate) const END_US: u64 = 40_000_000;

/// Tokens that a request may name.
pub(crate) const VOCAB_SIZE: u32 = 512;

/// Everything that a seed decides beforehand.
pub(crate) struct Scenario {
    pub(crate) stages: usize,
    pub(crate) tensor_parallel_size: usize,
    pub(crate) replicas: usize,
    /// Whether the head is on every stage wherever it can be; `None` leaves it to the plan.
    pub(crate) spread_head: Option<bool>,
    /// Time of a step on each node, standbys included.
    pub(crate) step_us: Vec<u64>,
    /// Time of a pass of a training step on each of them.
    pub(crate) pass_us: Vec<u64>,
    pub(crate) clients: Vec<Vec<Request>>,
    pub(crate) faults: Vec<(u64, Fault)>,
    pub(crate) hostility: Hostility,
    max_num_seqs: usize,
    max_num_batched_tokens: u32,
    step_target_ms: u64,
    max_context_tokens: u32,
    scarce_blocks: bool,
    queue_max: usize,
    /// Whether there are as many replicas as nodes suffice for, and `replicas` is but what was thought of.
    open: bool,
    /// Fine-tuning jobs, in worlds that have some.
    pub(crate) tuning: Option<Tuning>,
    /// What somebody has in mind, where no seed decides.
    pub(crate) plan: Option<Arc<Plan>>,
}

/// Something goes wrong.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// `kill -9`, and a supervisor that starts the process again.
    Kill { process: Process, for_us: u64 },
    /// SIGSTOP, then SIGCONT.
    Pause { process: Process, for_us: u64 },
    /// SIGTERM: a node leaves once others have its place, and is started again so long after that.
    Leave { node: usize, for_us: u64 },
    /// Some connection breaks.
    Break,
    /// Some connection loses everything, unnoticed by either side, and breaks only later.
    Blackhole { for_us: u64 },
    /// The scheduler is killed and its store has forgotten its term.
    ForgetTerm,
    /// Whoever is reached next by something of this kind is killed, before it or after it has acted on it.
    Trap { moment: Moment, before: bool, for_us: u64 },
    /// The store or the blobs answer late, or not at all: everybody, or one process.
    Outage { half: Half, whom: Option<Process>, slow: bool, for_us: u64 },
}

/// What happens between the processes of a fine-tuning job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A rank is to open a session.
    Open,
    /// A rank is to compute a step.
    Step,
    /// A rank is to measure.
    Evaluate,
    /// A rank is to put an adapter together.
    Export,
    /// A rank is to close a session.
    Close,
    /// A rank is to load an adapter.
    Load,
    /// Ranks exchange something.
    Exchange,
    /// A rank's blob is stored or read.
    Blob,
    /// The scheduler hears of an open session.
    Opened,
    /// The scheduler hears a vote.
    Vote,
    /// The scheduler hears of an adapter that was made.
    Exported,
    /// The scheduler hears of an adapter that was loaded.
    Loaded,
    /// A record is written.
    Written,
    /// Blobs are deleted, or a table is written.
    Kept,
    /// A name's record is written.
    Named,
    /// Somebody asks for something.
    Asked,
}

/// All of them.
const MOMENTS: [Moment; 16] = [
    Moment::Open,
    Moment::Step,
    Moment::Evaluate,
    Moment::Export,
    Moment::Close,
    Moment::Load,
    Moment::Exchange,
    Moment::Blob,
    Moment::Opened,
    Moment::Vote,
    Moment::Exported,
    Moment::Loaded,
    Moment::Written,
    Moment::Kept,
    Moment::Named,
    Moment::Asked,
];

/// What the network does to single messages of the data plane, in millionths. TCP does none of it; bugs do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Hostility {
    pub(crate) lose: u64,
    pub(crate) duplicate: u64,
    pub(crate) reorder: u64,
}

impl Scenario {
    pub(crate) fn new(random: &mut Random) -> Scenario {
        let stages = random.between(1, 4) as usize;
        let tensor_parallel_size = if random.chance(250_000) { 2 } else { 1 };
        let replicas = if random.chance(250_000) { 2 } else { 1 };
        let standbys = random.between(0, 2) as usize;
        let nodes = stages * tensor_parallel_size * replicas + standbys;
        let gateways = random.between(1, 3) as usize;
        let max_context_tokens = [96, 160, 256][random.between(0, 3) as usize];
        let clients = (0..gateways).map(|_| clients(random, max_context_tokens)).collect();
        let calm = random.chance(150_000);
        let hostile = !calm && random.chance(300_000);
        let faults = if calm { 0 } else { random.between(1, 8) };
        Scenario {
            stages,
            tensor_parallel_size,
            replicas,
            spread_head: [None, Some(false), Some(true), Some(true)][random.between(0, 4) as usize],
            step_us: (0..nodes).map(|_| random.between(300, 12_000)).collect(),
            pass_us: vec![0; nodes],
            clients,
            faults: (0..faults).map(|_| fault(random, nodes, gateways)).collect(),
            hostility: if hostile {
                Hostility {
                    lose: random.between(0, 4_000),
                    duplicate: 20_000,
                    reorder: random.between(0, 4_000),
                }
            } else {
                Hostility { duplicate: random.between(0, 30_000), ..Hostility::default() }
            },
            max_num_seqs: random.between(1, 10) as usize,
            max_num_batched_tokens: random.between(16, 96) as u32,
            step_target_ms: random.between(1, 60),
            max_context_tokens,
            scarce_blocks: random.chance(600_000),
            queue_max: random.between(2, 40) as usize,
            open: random.chance(300_000),
            tuning: None,
            plan: None,
        }
    }

    /// Most replicas that there can be.
    pub(crate) fn replicas_max(&self) -> usize {
        match self.open {
            true => self.step_us.len() / (self.stages * self.tensor_parallel_size),
            false => self.replicas,
        }
    }

    /// Nothing but what somebody has in mind: what a seed decides otherwise is not looked at.
    pub(crate) fn planned(plan: Arc<Plan>) -> Scenario {
        Scenario {
            stages: 0,
            tensor_parallel_size: 0,
            replicas: 0,
            spread_head: None,
            step_us: Vec::new(),
            pass_us: Vec::new(),
            clients: Vec::new(),
            faults: Vec::new(),
            hostility: Hostility::default(),
            max_num_seqs: plan.limits.max_num_seqs,
            max_num_batched_tokens: plan.limits.max_num_batched_tokens,
            step_target_ms: plan.limits.step_target_ms,
            max_context_tokens: plan.limits.max_context_tokens,
            scarce_blocks: false,
            queue_max: plan.limits.queue_max,
            open: false,
            tuning: None,
            plan: Some(plan),
        }
    }

    /// A world as any other, in which jobs train beside the streams.
    pub(crate) fn with_jobs(random: &mut Random) -> Scenario {
        let mut scenario = Scenario::new(random);
        let nodes = scenario.step_us.len();
        scenario.pass_us = (0..nodes).map(|_| random.between(3_000, 60_000)).collect();
        scenario.tuning = Some(Tuning::new(random));
        for request in scenario.clients.iter_mut().flatten() {
            if random.chance(400_000) {
                request.want = Some(Want::Some(random.next()));
            }
        }
        if !scenario.faults.is_empty() {
            let more = random.between(1, 7);
            scenario.faults.extend((0..more).map(|_| fault_of_jobs(random, nodes)));
        }
        scenario
    }

    pub(crate) fn max_context_tokens(&self) -> u32 {
        self.max_context_tokens
    }

    pub(crate) fn cluster(&self, term: LeaseTerm, holder: String) -> ClusterConfig {
        if let Some(plan) = &self.plan {
            return plan.cluster(term, holder);
        }
        ClusterConfig {
            model: "simulated".into(),
            precision: Precision::default(),
            model_digest: DIGEST,
            shape: ModelShape {
                hidden_size: 64,
                intermediate_size: 256,
                num_layers: 8,
                num_heads: 8,
                num_kv_heads: 8,
                head_dim: 8,
                vocab_size: 512,
                max_position_embeddings: 512,
                tied_head: true,
                weights: WeightTypes::uniform(WeightType::F32, 8),
                kv_cache: FloatType::F32,
                activations: FloatType::F32,
                vectors: LayerVectors::default(),
            },
            max_context_tokens: self.max_context_tokens,
            term,
            holder,
            stages: Some(self.stages),
            tensor_parallel_size: Some(self.tensor_parallel_size),
            replicas: (!self.open).then_some(self.replicas),
            expected_nodes: None,
            settle_ms: 200,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            spread_head: self.spread_head,
            // So small a share leaves the blocks of one sequence of full length.
            kv_memory_share: if self.scarce_blocks { 1e-9 } else { 0.25 },
            silence_ms_max: 1_000,
            boundary_log: true,
            replan_after_ms: 5_000,
            links: Links::default(),
        }
    }

    pub(crate) fn engine(&self) -> EngineConfig {
        if let Some(plan) = &self.plan {
            return plan.engine();
        }
        EngineConfig {
            // One sequence in five.
            audit_per_million: 200_000,
            vocab_size: VOCAB_SIZE,
            enable_prefix_caching: true,
            model_digest: DIGEST,
            max_context_tokens: self.max_context_tokens,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            step_target_ms: self.step_target_ms,
            queue_max: self.queue_max,
            queue_wait_ms_max: 30_000,
            deadline_default_ms: 8_000,
            // Longer than any deadline: nobody is refused because something is being repaired.
            repair_patience_ms: 60_000,
        }
    }
}

fn clients(random: &mut Random, context: u32) -> Vec<Request> {
    let count = random.between(4, 24);
    let mut requests: Vec<Request> = (0..count).map(|_| request(random, context)).collect();
    let mut probe = request(random, context);
    (probe.arrival_us, probe.departure_us) = (PROBES_US, None);
    (probe.deadline_ms, probe.priority) = (9_000, -1);
    // The slowest worlds take 50 ms per token, and one request after the other.
    probe.max_new_tokens = probe.max_new_tokens.min(64);
    requests.push(probe);
    requests
}

fn request(random: &mut Random, context: u32) -> Request {
    let len = random.between(1, u64::from(context) * 2 / 3) as usize;
    // Few prompts, so that prefixes are shared.
    let family = random.between(0, 4) as u32;
    let max_new_tokens = random.between(1, u64::from(context) - len as u64) as u32;
    let arrival_us = random.between(400_000, FAULTS_END_US);
    let some = |random: &mut Random, chance| {
        random.chance(chance).then(|| random.between(0, u64::from(max_new_tokens)) as usize)
    };
    Request {
        arrival_us,
        departure_us: random.chance(200_000).then(|| arrival_us + random.between(0, 400_000)),
        prompt: (0..len as u32).map(|at| (at * 31 + family * 1009) % 487).collect(),
        max_new_tokens,
        stop_token_at: some(random, 150_000),
        stop_string_at: some(random, 150_000),
        seed: random.next(),
        tenant_salt: random.between(0, 2),
        priority: random.between(0, 3) as i32 - 1,
        deadline_ms: random.between(200, 8_000),
        kept: random.chance(300_000),
        want: None,
        promise: None,
        received: Vec::new(),
        outcome: None,
        begun: false,
    }
}

/// A short request for an adapter that has to be served.
pub(crate) fn probe(random: &mut Random, context: u32, name: &str, arrival_us: u64) -> Request {
    let probe = request(random, context);
    Request {
        arrival_us,
        departure_us: None,
        max_new_tokens: probe.max_new_tokens.min(8),
        priority: -1,
        deadline_ms: 9_000,
        want: Some(Want::Name(name.to_owned())),
        ..probe
    }
}

fn fault(random: &mut Random, nodes: usize, gateways: usize) -> (u64, Fault) {
    let at = random.between(200_000, FAULTS_END_US);
    let node = Process::Node(random.between(0, nodes as u64) as usize);
    let for_us = random.between(20_000, 2_500_000);
    let fault = match random.between(0, 13) {
        0..4 => Fault::Kill { process: node, for_us },
        4 => Fault::Kill { process: Process::Scheduler, for_us: for_us / 4 },
        5 => {
            let process = Process::Gateway(random.between(0, gateways as u64) as usize);
            Fault::Kill { process, for_us: for_us / 4 }
        }
        6 => Fault::Pause { process: node, for_us },
        7 => Fault::Break,
        8 => Fault::Blackhole { for_us },
        9 => Fault::Pause { process: Process::Scheduler, for_us },
        10 => Fault::ForgetTerm,
        _ => Fault::Leave { node: random.between(0, nodes as u64) as usize, for_us: for_us / 2 },
    };
    (at, fault)
}

/// What goes wrong where jobs train.
fn fault_of_jobs(random: &mut Random, nodes: usize) -> (u64, Fault) {
    let at = random.between(500_000, FAULTS_END_US);
    let for_us = random.between(20_000, 2_500_000);
    if random.chance(600_000) {
        let moment = MOMENTS[random.between(0, MOMENTS.len() as u64) as usize];
        return (at, Fault::Trap { moment, before: random.chance(500_000), for_us: for_us / 2 });
    }
    let half = [Half::Records, Half::Blobs, Half::Both][random.between(0, 3) as usize];
    let whom = match random.between(0, 3) {
        0 => None,
        1 => Some(Process::Scheduler),
        _ => Some(Process::Node(random.between(0, nodes as u64) as usize)),
    };
    (at, Fault::Outage { half, whom, slow: random.chance(400_000), for_us })
}
