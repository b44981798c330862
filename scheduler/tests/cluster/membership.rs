//! Who is there, and where: nodes come, go, fall silent, fail.

use super::{Test, assignments, came_up, config, down};
use ashlar_protocol::membership::Assignment;
use ashlar_protocol::membership::{HeldSlice, Join};
use ashlar_scheduler::cluster::{ClusterConfig, Effect, Event, NodeConnection, Spent};
use ashlar_vocabulary::{
    Bytes, HeadSlice, LeaseTerm, ModelDigest, NodeId, ReplicaRevision, WeightType, WeightTypes,
};

#[test]
fn a_replica_is_laid_out_once_enough_nodes_have_joined() {
    let mut test = Test::new(config());
    let (a, effects) = test.join("a");
    assert!(assignments(&effects).is_empty());
    assert_eq!(test.cluster.problem(), Some("waiting for nodes: 1 of 2 have joined"));
    let (b, effects) = test.join("b");
    let assigned = assignments(&effects);
    assert_eq!(assigned.len(), 2);
    let find = |node| assigned.iter().find(|(to, _)| *to == node).map(|(_, assignment)| assignment).unwrap();
    let (first, last) = if find(a).stage.0 == 0 { (find(a), find(b)) } else { (find(b), find(a)) };
    assert_eq!((first.layers.start, last.layers.end), (0, 8));
    assert_eq!(first.layers.end, last.layers.start);
    assert_eq!(first.next.as_ref(), last.group.first());
    assert_eq!((last.next.as_ref(), first.group.len(), first.term), (None, 1, LeaseTerm(3)));
    assert_eq!(first.revision, last.revision);
}

#[test]
fn it_serves_only_when_every_rank_is_ready_at_the_present_revision() {
    let mut test = Test::new(config());
    let (a, _) = test.join("a");
    let (b, effects) = test.join("b");
    let revision = assignments(&effects)[0].1.revision;
    assert!(!came_up(&test.ready(a, revision)));
    assert!(!came_up(&test.ready(b, ReplicaRevision(revision.0 - 1))));
    assert!(test.cluster.problem().is_some());
    let effects = test.ready(b, revision);
    assert!(came_up(&effects));
    assert!(effects.contains(&Effect::Problem { problem: None, lasting: false }));
    assert!(!came_up(&test.ready(b, revision)), "once");
}

#[test]
fn a_lost_node_stops_its_replica_and_gets_its_place_back() {
    let (mut test, a, b) = Test::up();
    let before = assignments(&test.seen.clone());
    let effects = test.lose(b);
    assert_eq!(down(&effects).as_deref(), Some("node b was lost: connection closed by the peer"));
    assert!(test.cluster.problem().is_some_and(|problem| problem.contains("waiting for node b")));
    let (again, effects) = test.join("b");
    let assigned = assignments(&effects);
    assert_eq!(assigned.len(), 2, "the other rank gets the new revision and links, too");
    assert!(assigned.iter().all(|(_, new)| new.revision > before[0].1.revision));
    for (connection, new) in &assigned {
        let former = if *connection == again { b } else { a };
        let (_, old) = before.iter().find(|(to, _)| *to == former).unwrap();
        assert_eq!((new.stage, new.layers), (old.stage, old.layers));
    }
}

#[test]
fn a_standby_takes_a_vacant_place_at_once() {
    let (mut test, _, b) = Test::up();
    let (standby, effects) = test.join("c");
    assert!(assignments(&effects).is_empty());
    let effects = test.lose(b);
    assert!(down(&effects).is_some());
    assert!(assignments(&effects).iter().any(|(to, _)| *to == standby));
}

#[test]
fn a_standby_without_the_memory_is_left_alone() {
    let (mut test, _, b) = Test::up();
    test.join_with("tiny", 1000);
    assert!(assignments(&test.lose(b)).is_empty());
}

#[test]
fn silence_is_noticed_within_a_second_and_the_schedulers_own_stall_is_forgiven() {
    let (mut test, a, b) = Test::up();
    for _ in 0..5 {
        test.now += 200;
        test.send(Event::Heard { connection: a, spent: Spent::Nothing });
        assert!(down(&test.send(Event::Tick { slowest_step_ms: 10 })).is_none());
    }
    test.send(Event::Heard { connection: a, spent: Spent::Nothing });
    let effects = test.tick(100);
    assert!(down(&effects).is_some_and(|reason| reason.contains("node b was lost: nothing heard")));
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Disconnect { connection, .. } if *connection == b))
    );

    let (mut test, ..) = Test::up();
    test.tick(50);
    test.now += 60_000;
    assert!(down(&test.send(Event::Tick { slowest_step_ms: 10 })).is_none());
}

#[test]
fn a_slow_step_may_be_silent_for_four_times_its_prediction() {
    let (mut test, ..) = Test::up();
    test.send(Event::Tick { slowest_step_ms: 500 });
    for _ in 0..9 {
        test.now += 200;
        assert!(down(&test.send(Event::Tick { slowest_step_ms: 500 })).is_none());
    }
    test.now += 250;
    assert!(down(&test.send(Event::Tick { slowest_step_ms: 500 })).is_some());
}

#[test]
fn a_failed_assignment_is_tried_again_after_a_growing_pause() {
    let mut test = Test::new(config());
    let (a, _) = test.join("a");
    let (b, effects) = test.join("b");
    let mut revision = assignments(&effects)[0].1.revision;
    let mut pauses = Vec::new();
    for _ in 0..3 {
        let message = "model.safetensors is truncated".to_owned();
        test.send(Event::Failed { connection: b, revision, message, weights: false });
        assert!(test.cluster.problem().is_some_and(|p| p.contains("node b failed: model.safetensors")));
        let started = test.now;
        loop {
            test.send(Event::Heard { connection: a, spent: Spent::Nothing });
            test.send(Event::Heard { connection: b, spent: Spent::Nothing });
            if let Some((_, assignment)) = assignments(&test.tick(50)).first() {
                assert!(assignment.revision > revision);
                revision = assignment.revision;
                break;
            }
        }
        pauses.push(test.now - started);
    }
    assert_eq!(pauses, [250, 500, 1000]);
}

#[test]
fn a_rank_that_loses_a_peer_while_serving_stops_the_replica() {
    let (mut test, a, _) = Test::up();
    let revision = assignments(&test.seen)[0].1.revision;
    let message = "lost the next stage: connection closed by the peer".to_owned();
    let effects = test.send(Event::Failed { connection: a, revision, message, weights: false });
    assert!(down(&effects).is_some_and(|reason| reason.contains("node a failed: lost the next stage")));
}

#[test]
fn what_is_reported_about_a_former_assignment_is_ignored() {
    let (mut test, a, _) = Test::up();
    let message = "late".to_owned();
    let effects =
        test.send(Event::Failed { connection: a, revision: ReplicaRevision(1), message, weights: false });
    assert!(effects.is_empty());
}

/// Two machines with one identity: the one that came first goes on, undisturbed.
#[test]
fn another_process_of_a_living_node_is_refused_until_that_is_gone() {
    let (mut test, a, _) = Test::up();
    let elsewhere = || Join { data_address: "elsewhere:1".into(), ..Test::join_of("a", 1 << 30, 1.0, None) };
    test.send(Event::Heard { connection: a, spent: Spent::Nothing });
    let (second, effects) = test.join_by(elsewhere());
    let [Effect::Disconnect { connection, reason }] = effects.as_slice() else { panic!("{effects:?}") };
    assert_eq!(*connection, second);
    assert!(
        reason.contains("a:1") && reason.contains("elsewhere:1") && reason.contains("stop one"),
        "{reason}"
    );
    // One whose end was not seen is not waited for.
    test.now += 1_000;
    let (_, effects) = test.join_by(elsewhere());
    assert!(matches!(&effects[0], Effect::ReplicaDown { .. }), "{effects:?}");
}

#[test]
fn a_node_that_connects_anew_replaces_its_former_connection() {
    let (mut test, _, b) = Test::up();
    let (again, effects) = test.join("b");
    assert!(
        effects
            .iter()
            .any(|effect| matches!(effect, Effect::Disconnect { connection, .. } if *connection == b))
    );
    assert!(down(&effects).is_some());
    assert!(assignments(&effects).iter().any(|(to, _)| *to == again));
    assert!(test.lose(b).is_empty(), "the former connection's end says nothing any more");
}

#[test]
fn a_gateway_that_has_heard_of_a_higher_term_fences_this_scheduler() {
    let (mut test, ..) = Test::up();
    let same = test.send(Event::GatewayRefused { term: config().term });
    assert!(!same.iter().any(|effect| matches!(effect, Effect::Fenced { .. })), "{same:?}");
    let effects = test.send(Event::GatewayRefused { term: LeaseTerm(7) });
    assert_eq!(effects, [Effect::Fenced { by: LeaseTerm(7) }]);
}

#[test]
fn a_node_that_obeys_a_higher_term_fences_this_scheduler() {
    let mut test = Test::new(config());
    let connection = NodeConnection(1);
    let join = Join {
        node: NodeId("a".into()),
        data_address: "a:1".into(),
        memory: Bytes(1 << 30),
        bandwidth_bytes_per_s: 1e10,
        flops_per_s: 1e11,
        quantized_flops_per_s: 1e11,
        threads: 1,
        isa: "portable".into(),
        layers: None,
        holds: None,
        term: LeaseTerm(9),
        crashed: None,
        leaving: false,
    };
    let effects = test.send(Event::Join { connection, join: Box::new(join) });
    assert!(effects.contains(&Effect::Fenced { by: LeaseTerm(9) }));
    for term in [LeaseTerm(7), config().term] {
        let (mut test, a, _) = Test::up();
        let effects = test.send(Event::Refused { connection: a, term });
        assert!(effects.contains(&Effect::Fenced { by: term }), "an equal term belongs to another holder");
        assert!(down(&effects).is_some());
    }
}

#[test]
fn a_model_that_does_not_fit_is_a_problem_with_the_ledgers_words() {
    let mut test = Test::new(config());
    test.join_with("a", 100_000);
    let (_, effects) = test.join_with("b", 100_000);
    assert!(assignments(&effects).is_empty());
    let problem = test.cluster.problem().unwrap().to_owned();
    assert!(problem.contains("does not fit") && problem.contains("missing"), "{problem}");
    test.join("c");
    let (_, effects) = test.join("d");
    assert_eq!(assignments(&effects).len(), 2, "planned anew with the nodes that joined: {problem}");
}

#[test]
fn without_a_given_number_of_nodes_the_first_layout_waits_until_nobody_joins_any_more() {
    let mut test = Test::new(ClusterConfig { stages: None, replicas: None, ..config() });
    test.join("a");
    test.tick(400);
    test.join("b");
    assert!(assignments(&test.tick(450)).is_empty());
    let assigned = assignments(&test.tick(100));
    assert_eq!(assigned.len(), 2, "two replicas of one stage");
    assert!(assigned.iter().all(|(_, assignment)| assignment.num_stages == 1));
}

#[test]
fn expected_nodes_are_waited_for() {
    let mut test = Test::new(ClusterConfig { stages: None, expected_nodes: Some(3), ..config() });
    test.join("a");
    test.join("b");
    assert!(assignments(&test.tick(5000)).is_empty());
    let (_, effects) = test.join("c");
    assert!(!assignments(&effects).is_empty());
}

#[test]
fn expected_nodes_are_waited_for_once_and_those_who_leave_have_come() {
    let mut test = Test::new(ClusterConfig { expected_nodes: Some(3), ..config() });
    let mut leaving = Test::join_of("drained", 1 << 30, 1.0, None);
    leaving.leaving = true;
    test.join_by(leaving);
    test.join("a");
    assert_eq!(test.cluster.problem(), Some("waiting for nodes: 1 of 3 have joined"));
    let (_, effects) = test.join("b");
    assert_eq!(assignments(&effects).len(), 2);
}

#[test]
fn where_the_layout_is_left_open_what_is_left_is_laid_out_anew_in_the_end() {
    let mut test = Test::new(ClusterConfig { stages: None, replicas: None, ..config() });
    // Neither has room for the whole model.
    let half = 3_500_000;
    let (_, _) = test.join_with("a", half);
    let (b, _) = test.join_with("b", half);
    let assigned = assignments(&test.tick(600));
    assert_eq!(assigned.iter().map(|(_, a)| a.num_stages).collect::<Vec<_>>(), [2, 2]);
    test.join_with("big", 1 << 30);
    let before = test.seen.len();
    test.lose(b);
    let assigned = assignments(&test.seen[before..]);
    assert_eq!(assigned.len(), 2, "the big one stands in");
    let (big, _) = assigned.iter().find(|(to, _)| to.0 == 3).cloned().unwrap();
    let (a, _) = assigned.iter().find(|(to, _)| to.0 == 1).cloned().unwrap();
    test.lose(a);
    let mut effects = Vec::new();
    for _ in 0..60 {
        test.send(Event::Heard { connection: big, spent: Spent::Nothing });
        effects.extend(test.tick(100));
    }
    let anew = assignments(&effects);
    assert_eq!(anew.len(), 1);
    assert_eq!((anew[0].0, anew[0].1.num_stages), (big, 1));
}

#[test]
fn ranks_are_told_of_their_rows_of_the_head_and_who_samples() {
    for spread in [false, true] {
        let spread_head = Some(spread);
        let mut test = Test::new(ClusterConfig { tensor_parallel_size: Some(2), spread_head, ..config() });
        for name in ["a", "b", "c"] {
            test.join(name);
        }
        let assigned = assignments(&test.join("d").1);
        let sampler = assigned
            .iter()
            .find(|(_, a)| (a.stage.0, a.tensor_rank.0) == (1, 0))
            .map(|(_, a)| a.group[0].clone());
        for (_, a) in &assigned {
            let (stage, rank) = (a.stage.0 as usize, a.tensor_rank.0 as usize);
            let expected = match (spread, stage) {
                (true, _) => Some(HeadSlice { index: 2 * stage + rank, of: 4 }),
                (false, 0) => None,
                (false, _) => Some(HeadSlice { index: rank, of: 2 }),
            };
            assert_eq!(a.head, expected, "{stage} {rank}");
            assert_eq!(a.sampler, sampler.clone().filter(|_| spread && stage == 0));
        }
    }
}

#[test]
fn tensor_parallel_ranks_are_told_of_their_group_and_successors() {
    let mut test = Test::new(ClusterConfig { tensor_parallel_size: Some(2), ..config() });
    for name in ["a", "b", "c"] {
        assert!(assignments(&test.join(name).1).is_empty());
    }
    let assigned = assignments(&test.join("d").1);
    assert_eq!(assigned.len(), 4);
    let at = |stage, rank| {
        let found = assigned.iter().find(|(_, a)| (a.stage.0, a.tensor_rank.0) == (stage, rank));
        found.map(|(_, assignment)| assignment.clone()).unwrap()
    };
    for rank in 0..2 {
        assert_eq!(at(0, rank).group.len(), 2);
        assert_eq!(at(0, rank).next, at(1, 0).group.get(rank as usize).cloned());
        assert_eq!(at(1, rank).next, None);
    }
    assert!(assigned.iter().all(|(_, a)| a.kv_blocks == assigned[0].1.kv_blocks && a.kv_blocks >= 32));
}

fn held(assignment: &Assignment) -> HeldSlice {
    HeldSlice {
        model_digest: assignment.model_digest,
        layers: assignment.layers,
        tensor_rank: assignment.tensor_rank,
        tensor_parallel_size: assignment.tensor_parallel_size,
        head: assignment.head,
    }
}

/// What two nodes of these speeds are told to hold, if they hold `holds` when they join.
fn cut(speeds: [f64; 2], holds: [Option<HeldSlice>; 2]) -> Vec<HeldSlice> {
    let mut config = config();
    // So many layers that one more or less is a few per cent.
    (config.shape.num_layers, config.shape.weights) = (64, WeightTypes::uniform(WeightType::F32, 64));
    let mut test = Test::new(config);
    let mut effects = Vec::new();
    for ((name, speed), holds) in ["a", "b"].into_iter().zip(speeds).zip(holds) {
        effects = test.join_as(name, 1 << 30, speed, holds).1;
    }
    assignments(&effects).iter().map(|(_, assignment)| held(assignment)).collect()
}

#[test]
fn a_new_scheduler_keeps_the_cut_that_nodes_hold_unless_another_is_much_faster() {
    let even = cut([1.0, 1.0], [None, None]);
    let skewed = cut([1.0, 0.85], [None, None]);
    assert_ne!(even, skewed);
    let holding = |slices: &[HeldSlice]| [Some(slices[0].clone()), Some(slices[1].clone())];
    // Measured otherwise this time, but what they hold is nearly as fast.
    let cut_again = cut([1.0, 0.85], holding(&even));
    assert_eq!(cut_again, even);
    assert_eq!(cut([1.0, 1.0], holding(&skewed)), skewed);
    let lopsided = cut([1.0, 0.1], [None, None]);
    assert_eq!(cut([1.0, 1.0], holding(&lopsided)), even, "far from balanced");
    // Half a layout is none, and neither is one of another model.
    assert_eq!(cut([1.0, 1.0], [Some(skewed[0].clone()), None]), even);
    let mut foreign = skewed.clone();
    foreign.iter_mut().for_each(|slice| slice.model_digest = ModelDigest([9; 32]));
    assert_eq!(cut([1.0, 1.0], holding(&foreign)), even);
}

#[test]
fn a_node_that_comes_back_after_a_crash_tells_the_engine_of_it() {
    let (mut test, _, b) = Test::up();
    test.lose(b);
    let crashed = |name| Join { crashed: Some(11), ..Test::join_of(name, 1 << 30, 1.0, None) };
    let (_, effects) = test.join_by(crashed("b"));
    let accused = effects.iter().any(
        |effect| matches!(effect, Effect::ReplicaCrashed { reason, .. } if reason.contains("signal 11")),
    );
    assert!(accused, "{effects:?}");
    let (_, effects) = test.join_by(crashed("stranger"));
    assert!(
        !effects.iter().any(|effect| matches!(effect, Effect::ReplicaCrashed { .. })),
        "it computed nothing here"
    );
}

#[test]
fn an_assignment_names_others_that_may_have_the_files_likely_ones_first() {
    let (mut test, _, b) = Test::up();
    for standby in 'c'..='m' {
        test.join(&standby.to_string());
    }
    let mut effects = test.lose(b);
    effects.extend(test.tick(10_000));
    let assigned = assignments(&effects);
    let [(_, first), (_, second), ..] = &assigned[..] else { panic!("{assigned:?}") };
    for (own, other) in [(first, second), (second, first)] {
        let own_address = &own.group[0];
        assert!(own.sources.len() == 8 && !own.sources.contains(own_address), "{:?}", own.sources);
        assert_eq!(own.sources[0], other.group[0], "who is of the replica");
    }
}
