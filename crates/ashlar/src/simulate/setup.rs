//! From arguments, or from a running cluster, to what is simulated.

use super::SimulateArgs;
use super::units::Kind;
use crate::bench::serve::arrivals::{Lengths, Load};
use crate::demo;
use crate::drill::Role;
use crate::http::Client;
use crate::plan::{QUANTIZED_GAIN, model_shape};
use crate::roles;
use anyhow::{Context, Result, bail};
use ashlar_protocol::serving::NodeView;
use ashlar_shard_plan::{DeviceReport, Links};
use ashlar_simulation::plan::{
    Cut, FaultKind, FaultRate, Limits, Objectives, Plan, PlannedFault, Role as PlannedRole, Times,
    TracedRequest,
};
use ashlar_vocabulary::{ModelShape, NodeId};
use serde_json::Value;

/// For how long requests arrive, where nothing is said.
const DURATION_S: f64 = 600.0;
/// The longest sequence, where nothing is said.
const MAX_CONTEXT: u32 = 4096;

/// What is the same in every run.
pub(super) struct Setup {
    model: String,
    shape: ModelShape,
    nodes: Vec<DeviceReport>,
    cut: Cut,
    max_context: u32,
    /// Requests that the context shortened.
    shortened: usize,
}

impl Setup {
    pub(super) fn new(args: &SimulateArgs) -> Result<Setup> {
        let found = match &args.node_from {
            Some(url) => Some(roles::runtime()?.block_on(Found::ask(url, args.key.clone()))?),
            None => None,
        };
        let model = args.model.clone().or_else(|| found.as_ref().map(|found| found.model.clone()));
        let shape = match &model {
            Some(model) => model_shape(model, args.precision)?,
            None => demo_shape(args)?,
        };
        let max_context = args.max_context.or_else(|| found.as_ref().map(|found| found.max_context));
        let max_context = max_context.unwrap_or(MAX_CONTEXT).min(shape.max_position_embeddings as u32);
        let (nodes, cut) = match found {
            Some(found) => (found.nodes, found.cut),
            None => (devices(args), Cut::default()),
        };
        let cut = Cut {
            stages: args.stages.or(cut.stages),
            tensor_parallel_size: args.tp.or(cut.tensor_parallel_size),
            replicas: args.replicas.or(cut.replicas),
            spread_head: args.spread_head,
        };
        let model = model.unwrap_or_else(|| "the demo model".into());
        Ok(Setup { model, shape, nodes, cut, max_context, shortened: 0 })
    }

    /// What is simulated with this seed.
    pub(super) fn plan(&mut self, args: &SimulateArgs, seed: u64) -> Result<Plan> {
        let lengths = match &args.trace {
            Some(path) => Lengths::Trace { path, duration_s: args.duration },
            None => Lengths::Random {
                rate: args.requests_per_s,
                input: args.prompt_tokens,
                output: args.output_tokens,
                duration_s: args.duration.unwrap_or(DURATION_S),
            },
        };
        let arrivals = Load { lengths, context: self.max_context as usize, seed }.arrivals()?;
        if arrivals.is_empty() {
            bail!("no request arrives: raise --requests-per-s or --duration");
        }
        self.shortened = arrivals.iter().filter(|arrival| arrival.shortened).count();
        let request = |arrival: &crate::bench::serve::arrivals::Arrival| TracedRequest {
            at_us: (1e6 * arrival.at_s) as u64,
            prompt_tokens: arrival.prompt_tokens as u32,
            output_tokens: arrival.output_tokens as u32,
        };
        let requests = arrivals.iter().map(request).collect();
        let usual = Plan::new(self.shape.clone(), self.nodes.clone(), requests);
        let kind = |kind: Kind| match kind {
            Kind::Kill => FaultKind::Kill,
            Kind::Freeze => FaultKind::Freeze { for_us: 1_000 * args.freeze_ms },
        };
        let faults = args.fault.iter().map(|fault| PlannedFault {
            at_us: (1e6 * fault.at_s) as u64,
            role: role(fault.role),
            index: fault.index,
            kind: kind(fault.kind),
        });
        let each = args.faults_per_hour / (args.roles.len() * args.kinds.len()).max(1) as f64;
        let rates = args.roles.iter().flat_map(|of| args.kinds.iter().map(move |what| (*of, *what)));
        let rates = rates.filter(|_| each > 0.0).map(|(of, what)| FaultRate {
            role: role(of),
            kind: kind(what),
            mean_time_between_s: 3600.0 / each,
        });
        Ok(Plan {
            gateways: args.gateways,
            cut: self.cut,
            limits: Limits {
                max_context_tokens: self.max_context,
                max_num_seqs: args.max_num_seqs,
                max_num_batched_tokens: args.max_num_batched_tokens,
                step_target_ms: args.step_target_ms,
                ..Limits::default()
            },
            links: Links {
                round_trip_s: 1e-6 * args.round_trip_us,
                bytes_per_s: args.link_bandwidth,
                pairs: Vec::new(),
            },
            times: Times {
                step_overhead_us: args.step_overhead_us,
                load_bytes_per_s: args.load_bandwidth,
                restart_us: 1_000 * args.restart_ms,
                ..Times::default()
            },
            faults: faults.collect(),
            fault_rates: rates.collect(),
            objectives: Objectives { ttft_ms: args.slo_ttft_ms, tpot_ms: args.slo_tpot_ms },
            seed,
            ..usual
        })
    }

    /// What is simulated, for people.
    pub(super) fn print(&self, plan: &Plan) {
        println!(
            "{}: {} nodes, {} requests in {:.0} s, {} gateways",
            self.model,
            plan.nodes.len(),
            plan.requests.len(),
            plan.requests.last().map_or(0.0, |last| last.at_us as f64 / 1e6),
            plan.gateways
        );
        if self.shortened > 0 {
            println!(
                "{} requests are shortened to the context of {} tokens",
                self.shortened, self.max_context
            );
        }
        for node in plan.nodes.iter().take(if plan.nodes.len() > 8 { 1 } else { 8 }) {
            println!(
                "{:<10} {:>11} memory, {:>6.1} GB/s, {:>7.1} GFLOP/s, {:>7.1} quantised",
                node.node,
                node.memory,
                node.bandwidth_bytes_per_s / 1e9,
                node.flops_per_s / 1e9,
                node.quantized_flops_per_s / 1e9
            );
        }
    }
}

fn role(role: Role) -> PlannedRole {
    match role {
        Role::Node => PlannedRole::Node,
        Role::Scheduler => PlannedRole::Scheduler,
        Role::Gateway => PlannedRole::Gateway,
    }
}

fn demo_shape(args: &SimulateArgs) -> Result<ModelShape> {
    let place = std::env::temp_dir().join(format!("ashlar-simulate-{}", std::process::id()));
    let directory = demo::unpack(&place)?;
    let shape = model_shape(&directory.to_string_lossy(), args.precision);
    std::fs::remove_dir_all(&place).with_context(|| format!("cannot remove {}", place.display()))?;
    shape
}

/// The nodes that the arguments describe.
fn devices(args: &SimulateArgs) -> Vec<DeviceReport> {
    if !args.device.is_empty() {
        return args.device.clone();
    }
    let device = |index: u32| DeviceReport {
        // In the order of their numbers wherever names are sorted.
        node: NodeId(format!("node-{index:05}")),
        memory: args.memory,
        bandwidth_bytes_per_s: args.bandwidth,
        flops_per_s: args.flops,
        quantized_flops_per_s: args.quantized_flops.unwrap_or(QUANTIZED_GAIN * args.flops),
        threads: 1,
        layers: None,
    };
    (0..args.nodes).map(device).collect()
}

/// What a running cluster tells of itself.
pub(super) struct Found {
    pub(super) model: String,
    pub(super) max_context: u32,
    pub(super) nodes: Vec<DeviceReport>,
    pub(super) cut: Cut,
}

impl Found {
    async fn ask(url: &str, key: Option<String>) -> Result<Found> {
        let answer = Client::new(url, key)?.get_ok("/admin/cluster").await?;
        Found::read(&answer["cluster"]).with_context(|| format!("/admin/cluster of {url}"))
    }

    /// Takes the answer apart.
    pub(super) fn read(cluster: &Value) -> Result<Found> {
        let Some(model) = cluster["model"].as_str() else {
            bail!("no scheduler is reached, so nothing is known")
        };
        let views: Vec<NodeView> = serde_json::from_value(cluster["nodes"].clone())?;
        let (mut stages, mut ranks, mut replicas) = (0, 0, 0);
        for (replica, stage, rank) in views.iter().filter_map(|view| view.place) {
            stages = stages.max(stage.0 as usize + 1);
            ranks = ranks.max(rank.0 as usize + 1);
            replicas = replicas.max(replica.0 as usize + 1);
        }
        if stages == 0 {
            bail!("the model is not laid out yet: wait until the cluster is ready");
        }
        let device = |view: &NodeView| DeviceReport {
            node: view.node.clone(),
            memory: view.memory,
            bandwidth_bytes_per_s: view.bandwidth_bytes_per_s,
            flops_per_s: view.flops_per_s,
            quantized_flops_per_s: QUANTIZED_GAIN * view.flops_per_s,
            threads: 1,
            // The very cut that is there.
            layers: view.place.map(|_| view.layers),
        };
        Ok(Found {
            model: model.to_owned(),
            max_context: cluster["max_context_tokens"].as_u64().unwrap_or(0) as u32,
            nodes: views.iter().map(device).collect(),
            cut: Cut {
                stages: Some(stages),
                tensor_parallel_size: Some(ranks),
                replicas: Some(replicas),
                spread_head: None,
            },
        })
    }
}
