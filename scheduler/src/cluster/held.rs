//! What nodes hold in memory already: a layout that keeps it is preferred to one that would be a little faster.
//!
//! A new scheduler, or one that has lost its lease, plans from what nodes measured. A cut that has moved by a layer would have
//! them load gigabytes for a few per cent.

use super::events::ClusterConfig;
use super::place::{Node, Replica, Seat};
use ashlar_protocol::membership::HeldSlice;
use ashlar_shard_plan::{DeviceReport, Layout, PlanRequest, plan};
use ashlar_vocabulary::{HeadSlice, NodeId, TensorRank};
use std::collections::BTreeMap;

/// A layout that is slower than the planned one by at most this factor is kept for what nodes hold.
const SLOWER_BY_MAX: f64 = 1.1;

/// The slice of a seat.
pub(super) fn slice_of(config: &ClusterConfig, replica: &Replica, seat: &Seat) -> HeldSlice {
    let place = (seat.place.stage.0 as usize, seat.place.rank.0);
    let cut = (replica.num_stages, replica.tensor_parallel_size, replica.spread_head);
    slice(config, place, cut, seat.place.layers)
}

fn slice(
    config: &ClusterConfig,
    (stage, rank): (usize, u32),
    (stages, ranks, spread_head): (usize, usize, bool),
    layers: ashlar_vocabulary::LayerRange,
) -> HeldSlice {
    HeldSlice {
        model_digest: config.model_digest,
        layers,
        tensor_rank: TensorRank(rank),
        tensor_parallel_size: ranks as u32,
        head: HeadSlice::of_rank(spread_head, (stage, stages), (rank as usize, ranks)),
    }
}

/// Nodes that would keep what they hold.
fn kept(config: &ClusterConfig, layout: &Layout, nodes: &BTreeMap<NodeId, Node>) -> usize {
    let mut kept = 0;
    for replica in &layout.replicas {
        let cut = (replica.stages.len(), layout.tensor_parallel_size, replica.spread_head);
        for (stage, cut_stage) in replica.stages.iter().enumerate() {
            for (rank, node) in (0..).zip(&cut_stage.ranks) {
                let slice = slice(config, (stage, rank), cut, cut_stage.layers);
                let holds = nodes.get(node).and_then(|node| node.holds.as_ref());
                kept += usize::from(holds == Some(&slice));
            }
        }
    }
    kept
}

/// `planned`, or a layout with as many replicas and stages in which more nodes keep what they hold, if there is one that is
/// hardly slower and has nearly as much room.
pub(super) fn prefer(
    config: &ClusterConfig,
    planned: Layout,
    nodes: &BTreeMap<NodeId, Node>,
    devices: &[DeviceReport],
    request: &PlanRequest,
) -> Layout {
    let fixed = devices.iter().any(|device| device.layers.is_some());
    let held = |device: &DeviceReport| {
        let holds = nodes.get(&device.node)?.holds.as_ref()?;
        (holds.model_digest == config.model_digest
            && holds.tensor_parallel_size as usize == planned.tensor_parallel_size)
            .then_some(holds)
    };
    let count = devices.iter().filter(|device| held(device).is_some()).count();
    let keeps = kept(config, &planned, nodes);
    if fixed || keeps == count {
        return planned;
    }
    // Ranges alone decide a layout of fixed ranges, and among nodes of one range their order: rank by rank, replica by
    // replica.
    let mut seen: BTreeMap<(usize, u32), usize> = BTreeMap::new();
    let mut ordered: Vec<((usize, u32), DeviceReport)> = Vec::with_capacity(devices.len());
    for device in devices {
        let mut device = device.clone();
        let mut key = (usize::MAX, 0);
        if let Some(holds) = held(&device) {
            let replica = seen.entry((holds.layers.start, holds.tensor_rank.0)).or_default();
            key = (*replica, holds.tensor_rank.0);
            *replica += 1;
            device.layers = Some(holds.layers);
        }
        ordered.push((key, device));
    }
    ordered.sort_by_key(|(key, _)| *key);
    let ordered: Vec<DeviceReport> = ordered.into_iter().map(|(_, device)| device).collect();
    let spread = devices.iter().filter_map(held).filter_map(|holds| holds.head);
    let spread_head = Some(spread.map(|head| head.of).max().unwrap_or(1) > planned.tensor_parallel_size);
    let request = PlanRequest {
        stages: planned.replicas.first().map(|replica| replica.stages.len()),
        replicas: Some(planned.replicas.len()),
        spread_head: request.spread_head.or(spread_head),
        ..request.clone()
    };
    match plan(&config.shape, &ordered, &config.links, &request) {
        Ok(held) if kept(config, &held, nodes) > keeps && is_as_good(&held, &planned) => held,
        _ => planned,
    }
}

/// Whether `held` is hardly worse than `planned` wherever that is predicted.
fn is_as_good(held: &Layout, planned: &Layout) -> bool {
    let worst = |layout: &Layout, of: fn(&ashlar_shard_plan::ReplicaLayout) -> f64| {
        layout.replicas.iter().map(of).fold(0.0, f64::max)
    };
    let costs: [fn(&ashlar_shard_plan::ReplicaLayout) -> f64; 4] = [
        |replica| replica.prediction.seconds_per_token,
        |replica| replica.prediction.seconds_to_first_token,
        |replica| replica.prediction.slowest_stage_s,
        |replica| 1.0 / f64::from(replica.kv_blocks.max(1)),
    ];
    costs.into_iter().all(|cost| worst(held, cost) <= SLOWER_BY_MAX * worst(planned, cost))
}
