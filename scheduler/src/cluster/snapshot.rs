//! What gateways and operators may know about the cluster, and what those may who share nodes out between several.

use super::place::{Node, Observed, Phase};
use super::{Cluster, ClusterConfig, NodeConnection, costs};
use crate::engine::Engine;
use ashlar_protocol::serving::{ClusterSnapshot, NodeView, ReplicaView};
use ashlar_shard_plan::{DeviceReport, plan};
use ashlar_vocabulary::{Bytes, ModelDigest, NodeId, ReplicaId};
use std::collections::BTreeMap;

/// A joined node, as whoever shares nodes out between models sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its connection.
    pub connection: NodeConnection,
    /// What it offers.
    pub device: DeviceReport,
    /// The replica in which it has a place.
    pub replica: Option<ReplicaId>,
    /// Whether it is taken for harmless.
    pub sound: bool,
    /// Of which model it has a slice in memory.
    pub holds: Option<ModelDigest>,
}

/// Whether these nodes could hold a model as it is to be laid out.
///
/// # Errors
/// Why not, with the bytes that are missing.
pub fn could_hold(config: &ClusterConfig, devices: &[DeviceReport]) -> Result<(), String> {
    let layout = plan(&config.shape, devices, &config.links, &costs::plan_request(config));
    layout.map(|_| ()).map_err(|error| error.to_string())
}

impl Cluster {
    /// Every joined node, by name.
    pub fn members(&self) -> Vec<Member> {
        let member = |(name, node): (&NodeId, &Node)| Member {
            connection: node.connection,
            device: super::reconcile::device_report(node),
            replica: node.place.map(|place| place.replica),
            sound: !self.suspicions.is_quarantined(name),
            holds: node.holds.as_ref().map(|holds| holds.model_digest),
        };
        self.nodes.iter().map(member).collect()
    }

    /// Whether a replica serves.
    pub fn serves(&self) -> bool {
        self.replicas.values().any(|replica| replica.phase == Phase::Up)
    }

    /// Has several clusters under one lease count their revisions together: no two of them ever use the same, and a node that goes
    /// from one to another only sees higher ones. To be called before and after each event.
    pub fn share_revisions(&mut self, used: &mut u64) {
        self.revisions = self.revisions.max(*used);
        *used = self.revisions;
    }

    /// The cluster as it is now, with the engine's numbers; what adapters and jobs take is others' to say.
    pub fn snapshot(&self, engine: &Engine) -> ClusterSnapshot {
        let nodes = self.nodes.iter().map(|(name, node)| NodeView {
            node: name.clone(),
            address: node.join.data_address.clone(),
            threads: node.join.threads,
            isa: node.join.isa.clone(),
            memory: node.join.memory,
            bandwidth_bytes_per_s: node.join.bandwidth_bytes_per_s,
            flops_per_s: node.join.flops_per_s,
            place: node.place.map(|place| (place.replica, place.stage, place.rank)),
            layers: node.place.map(|place| place.layers).unwrap_or_default(),
            loaded: match node.observed {
                Observed::Standby | Observed::Failed { .. } => 0.0,
                Observed::Loading { share, .. } => share,
                Observed::Ready { .. } => 1.0,
            },
            leaving: node.leaving,
            quarantined: self.suspicions.reason(name),
            reserved: node.reserved,
            ledger: self.ledger_of(name),
            adapters: Bytes(0),
            jobs: Bytes(0),
            resident: node.resident,
            busy: node.busy,
            trained: node.trained,
        });
        let replicas = self.replicas.values().map(|replica| {
            let running = engine.replica(replica.id);
            ReplicaView {
                replica: replica.id,
                revision: replica.revision,
                ready: replica.phase == Phase::Up,
                kv_blocks: (replica.kv_blocks, running.map_or(0, |running| running.pool.held() as u32)),
                steps: running.map_or(0, |running| running.steps),
                hops_us: replica.links.hops_us(replica.num_stages),
            }
        });
        ClusterSnapshot {
            adapters: Vec::new(),
            term: self.config.term,
            model: self.config.model.clone(),
            model_digest: self.config.model_digest,
            max_context_tokens: self.config.max_context_tokens,
            nodes: nodes.collect(),
            replicas: replicas.collect(),
            problem: self.problem.clone(),
            counters: engine.counters(),
            holder: self.config.holder.clone(),
            // Others know.
            gateways: 0,
            requests: Vec::new(),
        }
    }

    /// What a node's place is planned to take, line by line.
    fn ledger_of(&self, node: &NodeId) -> BTreeMap<String, Bytes> {
        let place = self.nodes.get(node).and_then(|node| node.place);
        let replica = place.and_then(|place| self.replicas.get(&place.replica));
        let seat = replica.and_then(|replica| replica.seats.iter().find(|seat| Some(seat.place) == place));
        let rows = seat.into_iter().flat_map(|seat| seat.ledger.rows());
        rows.map(|row| (row.name.to_owned(), row.bytes)).collect()
    }
}
