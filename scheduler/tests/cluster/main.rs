//! Membership and layout, event by event.
//!
//! Layout: here what all tests share, `membership` (who is there, and where), `changes` (from one layout to another), `quarantine` (nodes
//! that do harm), `salvage` (what is left of KV caches).
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod changes;
mod membership;
#[allow(dead_code, reason = "shared with tests that start schedulers")]
#[path = "../model/mod.rs"]
mod model;
mod quarantine;
mod salvage;

use ashlar_protocol::membership::{Assignment, HeldSlice, Join};
use ashlar_protocol::prefix::BlockHash;
use ashlar_scheduler::cluster::{Cluster, ClusterConfig, Effect, Event, NodeConnection};
use ashlar_scheduler::time::Millis;
use ashlar_shard_plan::Links;
use ashlar_vocabulary::{BlockId, Bytes, LeaseTerm, NodeId, Precision, ReplicaRevision};
use model::{CONTEXT_TOKENS, DIGEST, shape};

fn config() -> ClusterConfig {
    ClusterConfig {
        model: "demo".into(),
        precision: Precision::default(),
        model_digest: DIGEST,
        shape: shape(),
        max_context_tokens: CONTEXT_TOKENS,
        term: LeaseTerm(3),
        holder: "test".into(),
        stages: Some(2),
        tensor_parallel_size: None,
        replicas: Some(1),
        expected_nodes: None,
        settle_ms: 500,
        max_num_seqs: 8,
        max_num_batched_tokens: 128,
        spread_head: None,
        kv_memory_share: 0.25,
        silence_ms_max: 1000,
        boundary_log: true,
        replan_after_ms: 5000,
        links: Links::default(),
    }
}

struct Test {
    cluster: Cluster,
    now: u64,
    next_connection: u64,
    seen: Vec<Effect>,
}

impl Test {
    fn new(config: ClusterConfig) -> Test {
        Test { cluster: Cluster::new(config), now: 0, next_connection: 0, seen: Vec::new() }
    }

    fn send(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.cluster.handle(Millis(self.now), event, &mut effects);
        self.seen.extend(effects.clone());
        effects
    }

    fn join_with(&mut self, name: &str, memory: u64) -> (NodeConnection, Vec<Effect>) {
        self.join_as(name, memory, 1.0, None)
    }

    fn join_as(
        &mut self,
        name: &str,
        memory: u64,
        speed: f64,
        holds: Option<HeldSlice>,
    ) -> (NodeConnection, Vec<Effect>) {
        self.join_by(Test::join_of(name, memory, speed, holds))
    }

    fn join_of(name: &str, memory: u64, speed: f64, holds: Option<HeldSlice>) -> Join {
        Join {
            node: NodeId(name.into()),
            data_address: format!("{name}:1"),
            memory: Bytes(memory),
            bandwidth_bytes_per_s: 1e10 * speed,
            flops_per_s: 1e11 * speed,
            quantized_flops_per_s: 1e11 * speed,
            threads: 1,
            isa: "portable".into(),
            layers: None,
            holds,
            term: LeaseTerm(0),
            crashed: None,
            leaving: false,
        }
    }

    fn join_by(&mut self, join: Join) -> (NodeConnection, Vec<Effect>) {
        self.next_connection += 1;
        let connection = NodeConnection(self.next_connection);
        let effects = self.send(Event::Join { connection, join: Box::new(join) });
        (connection, effects)
    }

    fn join(&mut self, name: &str) -> (NodeConnection, Vec<Effect>) {
        self.join_with(name, 1 << 30)
    }

    fn ready(&mut self, connection: NodeConnection, revision: ReplicaRevision) -> Vec<Effect> {
        self.ready_with(connection, revision, &[], false)
    }

    /// With blocks that it has kept, named by numbers, and perhaps what it handed on of them.
    fn ready_with(
        &mut self,
        connection: NodeConnection,
        revision: ReplicaRevision,
        kept: &[u32],
        logged: bool,
    ) -> Vec<Effect> {
        let name = |block: u32| BlockHash::default().followed_by(|_| block);
        let kept = kept.iter().map(|&block| (BlockId(block), name(block))).collect();
        let (reserved, resident) = (Bytes(1), Bytes(2));
        self.send(Event::Ready { connection, revision, reserved, resident, kept, logged })
    }

    fn lose(&mut self, connection: NodeConnection) -> Vec<Effect> {
        self.send(Event::Lost { connection, reason: "connection closed by the peer".into() })
    }

    fn tick(&mut self, ms: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..ms.div_ceil(50) {
            self.now += 50;
            effects.extend(self.send(Event::Tick { slowest_step_ms: 10 }));
        }
        effects
    }

    /// Two nodes, serving.
    fn up() -> (Test, NodeConnection, NodeConnection) {
        let mut test = Test::new(config());
        let (a, _) = test.join("a");
        let (b, effects) = test.join("b");
        let revision = assignments(&effects)[0].1.revision;
        test.ready(a, revision);
        let effects = test.ready(b, revision);
        assert!(came_up(&effects));
        (test, a, b)
    }
}

fn assignments(effects: &[Effect]) -> Vec<(NodeConnection, Assignment)> {
    let assignment = |effect: &Effect| match effect {
        Effect::Assign { connection, assignment } => Some((*connection, (**assignment).clone())),
        _ => None,
    };
    effects.iter().filter_map(assignment).collect()
}

fn came_up(effects: &[Effect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::ReplicaUp(_)))
}

fn down(effects: &[Effect]) -> Option<String> {
    effects.iter().find_map(|effect| match effect {
        Effect::ReplicaDown { reason, .. } => Some(reason.clone()),
        _ => None,
    })
}
