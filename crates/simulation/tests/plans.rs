//! Worlds that somebody has in mind: what `ashlar simulate` runs.
#![allow(clippy::unwrap_used)]

use ashlar_shard_plan::DeviceReport;
use ashlar_simulation::plan::{
    Cut, FaultKind, FaultRate, Plan, PlanFailure, PlanReport, PlannedFault, Role, TracedRequest, plan,
};
use ashlar_vocabulary::{Bytes, FloatType, LayerVectors, ModelShape, NodeId, WeightType, WeightTypes};

/// About a billion weights in sixteen layers.
fn shape() -> ModelShape {
    ModelShape {
        hidden_size: 2048,
        intermediate_size: 8192,
        num_layers: 16,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 64,
        vocab_size: 128_256,
        max_position_embeddings: 131_072,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::Bf16, 16),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    }
}

fn nodes(count: usize, bandwidth_bytes_per_s: f64) -> Vec<DeviceReport> {
    let node = |index| DeviceReport {
        node: NodeId(format!("node-{index:04}")),
        memory: Bytes(8 << 30),
        bandwidth_bytes_per_s,
        flops_per_s: 7.5 * bandwidth_bytes_per_s,
        quantized_flops_per_s: 11.0 * bandwidth_bytes_per_s,
        threads: 1,
        layers: None,
    };
    (0..count).map(node).collect()
}

/// Equal requests at equal distances.
fn requests(count: u64, every_ms: u64) -> Vec<TracedRequest> {
    let request =
        |number| TracedRequest { at_us: 1_000 * every_ms * number, prompt_tokens: 200, output_tokens: 60 };
    (0..count).map(request).collect()
}

fn settings(count: usize, stages: usize, trace: Vec<TracedRequest>) -> Plan {
    let cut = Cut { stages: Some(stages), ..Cut::default() };
    Plan { cut, check_every: 10, ..Plan::new(shape(), nodes(count, 40e9), trace) }
}

fn run(settings: &Plan) -> PlanReport {
    plan(settings, &mut |_| {}).unwrap()
}

#[test]
fn a_plan_always_has_the_same_report_and_another_seed_another_one() {
    let rates = vec![
        FaultRate { role: Role::Node, kind: FaultKind::Kill, mean_time_between_s: 5.0 },
        FaultRate {
            role: Role::Scheduler,
            kind: FaultKind::Freeze { for_us: 1_500_000 },
            mean_time_between_s: 10.0,
        },
    ];
    let settings = Plan { fault_rates: rates, seed: 7, ..settings(5, 2, requests(40, 500)) };
    let report = run(&settings);
    assert_eq!(report, run(&settings));
    assert!(!report.faults.is_empty());
    let other = run(&Plan { seed: 8, ..settings.clone() });
    assert_ne!(report.faults, other.faults);
    // How often everything is looked at changes nothing but the time that it takes.
    assert_eq!(report, run(&Plan { check_every: 1, ..settings }));
}

#[test]
fn more_nodes_and_faster_nodes_serve_more() {
    let overload = requests(60, 50);
    let two = run(&settings(2, 2, overload.clone()));
    let four = run(&settings(4, 2, overload.clone()));
    let fast = run(&Plan { nodes: nodes(2, 80e9), ..settings(2, 2, overload) });
    assert_eq!((two.replicas.len(), four.replicas.len()), (1, 2));
    for report in [&two, &four, &fast] {
        assert_eq!((report.finished, report.output_tokens), (60, 3600));
    }
    for better in [&four, &fast] {
        assert!(better.output_tokens_per_s > 1.5 * two.output_tokens_per_s, "{two:?}\n{better:?}");
        assert!(better.goodput_share >= two.goodput_share);
    }
}

#[test]
fn a_quiet_cluster_keeps_to_its_cost_model() {
    // One request at a time, so that a token takes one step through both stages.
    let settings = settings(2, 2, requests(3, 20_000));
    let report = run(&settings);
    let layout =
        ashlar_shard_plan::plan(&shape(), &settings.nodes, &settings.links, &request(&settings)).unwrap();
    let predicted_ms = 1e3 * layout.replicas[0].prediction.seconds_per_token;
    let measured_ms = report.itl_ms.unwrap().p50;
    assert!((measured_ms / predicted_ms - 1.0).abs() < 0.05, "{measured_ms} ms, predicted {predicted_ms} ms");
    let stages: Vec<(usize, usize)> =
        layout.replicas[0].stages.iter().map(|stage| (stage.layers.start, stage.layers.end)).collect();
    assert_eq!(report.replicas[0].stages, stages);
}

fn request(settings: &Plan) -> ashlar_shard_plan::PlanRequest {
    ashlar_shard_plan::PlanRequest {
        stages: settings.cut.stages,
        // The prediction is for half of it: the streams here are about so long.
        max_context_tokens: 460,
        ..ashlar_shard_plan::PlanRequest::default()
    }
}

#[test]
fn without_faults_no_stream_stalls_for_longer_than_steps_take() {
    let settings = settings(2, 2, requests(40, 400));
    let report = run(&settings);
    assert_eq!(report.finished, 40);
    // A token's step takes the target at most on each of the two stages, behind up to three others in flight.
    let most_ms = 5.0 * settings.limits.step_target_ms as f64;
    assert!(report.stall_ms.unwrap().max < most_ms, "{:?}", report.stall_ms);
    assert_eq!((report.replica_losses, report.faults.len()), (0, 0));
}

#[test]
fn after_every_fault_every_running_stream_goes_on() {
    let fault = |at_s: u64, role, index, kind| PlannedFault { at_us: 1_000_000 * at_s, role, index, kind };
    let freeze = FaultKind::Freeze { for_us: 2_500_000 };
    let faults = vec![
        fault(5, Role::Node, 0, FaultKind::Kill),
        // The standby has taken the first one's place: this one still has its own.
        fault(12, Role::Node, 1, freeze),
        fault(20, Role::Scheduler, 0, FaultKind::Kill),
        fault(27, Role::Scheduler, 0, freeze),
    ];
    let report = run(&Plan { faults, ..settings(3, 2, requests(30, 1_500)) });
    assert_eq!((report.finished, report.faults.len()), (30, 4));
    assert!(report.failed.is_empty() && report.replica_losses >= 2);
    for fault in &report.faults {
        assert!(fault.streams > 0 && fault.lost == 0, "{fault:?}");
        // Computing a stream's tokens again takes such a cluster the better part of a second, one after the other.
        assert!(fault.recovery_ms.unwrap() < 2_500.0 + 1_000.0 * fault.streams as f64, "{fault:?}");
    }
    // A node that stands still is noticed after a second, one that is killed at once; with it, its KV cache is gone.
    let recovery = |index: usize| report.faults[index].recovery_ms.unwrap();
    assert!(recovery(0) > 100.0 && recovery(1) > 1_000.0, "{:?}", report.faults);
}

#[test]
fn streams_of_a_killed_gateway_are_counted_as_lost() {
    let fault = PlannedFault { at_us: 3_000_000, role: Role::Gateway, index: 0, kind: FaultKind::Kill };
    let report = run(&Plan { faults: vec![fault], gateways: 2, ..settings(2, 2, requests(20, 300)) });
    let lost = report.failed.get("GatewayDied").copied().unwrap_or_default();
    assert!(lost > 0 && report.finished + lost == 20, "{:?}", report.failed);
    // Some had no token yet.
    assert!((1..=lost).contains(&report.faults[0].lost), "{:?}", report.faults[0]);
}

#[test]
fn a_thousand_nodes_serve() {
    let rates = vec![FaultRate { role: Role::Node, kind: FaultKind::Kill, mean_time_between_s: 1.0 }];
    let settings = Plan { fault_rates: rates, check_every: 1_000, ..settings(1_000, 4, requests(600, 5)) };
    let report = run(&settings);
    assert_eq!((report.finished, report.replicas.len()), (600, 250));
    assert!(report.faults.iter().all(|fault| fault.lost == 0));
}

#[test]
fn what_cannot_be_is_refused() {
    let too_large = settings(1, 1, requests(1, 1));
    let mut little = nodes(1, 40e9);
    little[0].memory = Bytes(1 << 30);
    let failure = plan(&Plan { nodes: little, ..too_large.clone() }, &mut |_| {}).unwrap_err();
    assert!(
        matches!(&failure, PlanFailure::NeverServed(why) if why.contains("memory") || why.contains("fit")),
        "{failure}"
    );
    let long = vec![TracedRequest { at_us: 0, prompt_tokens: 4_000, output_tokens: 200 }];
    let failure = plan(&Plan { requests: long, ..too_large.clone() }, &mut |_| {}).unwrap_err();
    assert!(matches!(&failure, PlanFailure::Settings(why) if why.contains("request 1")), "{failure}");
    let nobody = PlannedFault { at_us: 0, role: Role::Node, index: 9, kind: FaultKind::Kill };
    assert!(plan(&Plan { faults: vec![nobody], ..too_large }, &mut |_| {}).is_err());
}
