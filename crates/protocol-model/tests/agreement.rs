//! The models, the simulation and the real cores agree about the protocol's rules.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_protocol::membership::Join;
use ashlar_protocol_model::checker::Model;
use ashlar_protocol_model::lease::{self, Lease, is_fenced_by_gateway, is_fenced_by_join, is_fenced_by_rank};
use ashlar_protocol_model::observed::{Counts, Rules};
use ashlar_scheduler::cluster::{Cluster, ClusterConfig, Effect, Event, NodeConnection};
use ashlar_scheduler::time::Millis;
use ashlar_shard_node::fence::Fence;
use ashlar_shard_plan::Links;
use ashlar_simulation::{Observed, observe};
use ashlar_vocabulary::{
    Bytes, FloatType, LayerVectors, LeaseTerm, ModelDigest, ModelShape, NodeId, Precision, ReplicaRevision,
    WeightType, WeightTypes,
};

const SEEDS: u64 = 60;

/// A generator of the walks' choices (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

#[test]
fn what_the_simulation_does_the_rules_allow() {
    let mut sum = Counts::default();
    for seed in 0..SEEDS {
        // Training takes longer to simulate.
        for with_jobs in [false, true].into_iter().take(if seed % 3 == 0 { 2 } else { 1 }) {
            let seen = observe(seed, with_jobs).unwrap_or_else(|violation| panic!("{violation}"));
            let mut rules = Rules::default();
            for (number, event) in seen.iter().enumerate() {
                if let Err(why) = rules.see(event) {
                    let before = &seen[number.saturating_sub(20)..number];
                    panic!("seed {seed}, jobs {with_jobs}: {before:#?}\n{why}");
                }
            }
            sum = sum.and(rules.counts());
        }
    }
    println!("the simulation, {SEEDS} seeds: {sum:?}");
    assert!(sum.assigned > SEEDS && sum.answered > 50 * SEEDS && sum.refused > 0, "{sum:?}");
    assert!(sum.prepared > SEEDS && sum.committed > SEEDS && sum.repeated > 0, "{sum:?}");
}

#[test]
fn what_the_model_of_the_lease_does_the_rules_allow() {
    let model = Lease {
        ranks: 2,
        faults: 8,
        steps: 2,
        layouts: u64::MAX,
        gateway: true,
        kinds: lease::Kinds::ALL,
        rules: lease::Rules::ALL,
    };
    let mut sum = Counts::default();
    for walk in 0..300 {
        let (mut dice, mut rules, mut state) = (Dice(walk), Rules::default(), model.start());
        for _ in 0..150 {
            let mut steps = Vec::new();
            model.steps(&state, &mut steps);
            // Most of what can happen is a fault; with few of them more of the protocol is seen.
            if dice.below(12) > 0 {
                steps.retain(|step| !step.fault);
            }
            if steps.is_empty() {
                continue;
            }
            let step = steps.swap_remove(dice.below(steps.len()));
            for seen in lease::observe(step.action, &state, &step.to) {
                rules.see(&seen).unwrap_or_else(|why| panic!("walk {walk}: {why}"));
            }
            state = step.to;
        }
        sum = sum.and(rules.counts());
    }
    println!("walks through the model: {sum:?}");
    assert!(sum.assigned > 300 && sum.answered > 30 && sum.refused > 30, "{sum:?}");
}

#[test]
fn rules_that_are_broken_are_noticed() {
    let (term, revision, holder) = (LeaseTerm(2), ReplicaRevision(2_000_001), "a".to_owned());
    let assigned = Observed::Assigned { node: 0, term, holder: holder.clone(), revision };
    let stale =
        Observed::Assigned { node: 0, term: LeaseTerm(1), holder, revision: ReplicaRevision(1_000_001) };
    let second = Observed::Assigned { node: 0, term, holder: "b".into(), revision };
    let told = Observed::Told { node: 0, term, revision, step: ashlar_vocabulary::StepId(1) };
    let answered =
        Observed::Answered { node: 0, term: Some(term), revision, step: ashlar_vocabulary::StepId(1) };
    let left = Observed::Left { node: 0 };
    let wrong: [&[&Observed]; 6] = [
        &[&assigned, &stale, &left],
        &[&assigned, &second, &left],
        &[&assigned, &answered],
        &[&assigned, &told, &answered, &answered],
        &[&assigned, &told, &left, &answered],
        &[&assigned, &told, &stale, &answered],
    ];
    for events in wrong {
        let mut rules = Rules::default();
        let outcome = events.iter().try_for_each(|event| rules.see(event));
        assert!(outcome.is_err(), "{events:?}");
    }
}

#[test]
fn the_nodes_fence_decides_as_the_rule_does_over_restarts_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fence.toml");
    let (mut dice, mut accepted) = (Dice(1), (LeaseTerm(0), String::new()));
    let mut fence = Fence::open(path.clone()).unwrap();
    for _ in 0..200 {
        if dice.below(5) == 0 {
            fence = Fence::open(path.clone()).unwrap();
        }
        let (term, holder) = (LeaseTerm(accepted.0.0 + dice.below(3) as u64), ["a", "b"][dice.below(2)]);
        let term = LeaseTerm(term.0.saturating_sub(1).max(1));
        let lower = term < accepted.0 || (term == accepted.0 && holder != accepted.1);
        assert_eq!(fence.accept(term, holder).unwrap(), !lower);
        if !lower {
            accepted = (term, holder.to_owned());
        }
        assert_eq!(fence.term(), accepted.0);
    }
}

#[test]
fn the_schedulers_core_gives_way_exactly_where_the_model_does() {
    for mine in 1..5 {
        for theirs in 0..6 {
            let (mine, theirs) = (LeaseTerm(mine), LeaseTerm(theirs));
            assert_eq!(fenced(mine, join(theirs)), is_fenced_by_join(mine, theirs), "{mine} {theirs}");
            let connection = NodeConnection(1);
            let refused = [join(LeaseTerm(0)), vec![Event::Refused { connection, term: theirs }]].concat();
            assert_eq!(fenced(mine, refused), is_fenced_by_rank(mine, theirs), "{mine} {theirs}");
            let gateway = vec![Event::GatewayRefused { term: theirs }];
            assert_eq!(fenced(mine, gateway), is_fenced_by_gateway(mine, theirs), "{mine} {theirs}");
        }
    }
}

/// Whether the real core wants to lead no more after these events.
fn fenced(term: LeaseTerm, events: Vec<Event>) -> bool {
    let (mut cluster, mut effects) = (Cluster::new(config(term)), Vec::new());
    events.into_iter().for_each(|event| cluster.handle(Millis(0), event, &mut effects));
    effects.iter().any(|effect| matches!(effect, Effect::Fenced { .. }))
}

fn join(term: LeaseTerm) -> Vec<Event> {
    let join = Join {
        node: NodeId("n".into()),
        data_address: "n:1".into(),
        memory: Bytes(1 << 30),
        bandwidth_bytes_per_s: 1e10,
        flops_per_s: 1e11,
        quantized_flops_per_s: 1e11,
        threads: 1,
        isa: "portable".into(),
        layers: None,
        holds: None,
        term,
        crashed: None,
        leaving: false,
    };
    vec![Event::Join { connection: NodeConnection(1), join: Box::new(join) }]
}

fn config(term: LeaseTerm) -> ClusterConfig {
    let shape = ModelShape {
        hidden_size: 64,
        intermediate_size: 256,
        num_layers: 8,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 8,
        vocab_size: 1024,
        max_position_embeddings: 512,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 8),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    };
    ClusterConfig {
        model: "demo".into(),
        precision: Precision::default(),
        model_digest: ModelDigest([1; 32]),
        shape,
        max_context_tokens: 512,
        term,
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
