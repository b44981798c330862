//! What gateways and operators may know about the cluster.

use super::Cluster;
use super::place::{Observed, Phase};
use crate::engine::Engine;
use ashlar_protocol::serving::{ClusterSnapshot, NodeView, ReplicaView};
use ashlar_vocabulary::Bytes;

impl Cluster {
    /// The cluster as it is now, with the engine's numbers; what adapters and jobs take is others' to say.
    pub fn snapshot(&self, engine: &Engine) -> ClusterSnapshot {
        let nodes = self.nodes.iter().map(|(name, node)| NodeView {
            node: name.clone(),
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
        }
    }
}
