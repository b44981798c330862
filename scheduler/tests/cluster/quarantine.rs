//! Nodes that do harm: others take their place where that is possible.

use super::{Test, assignments, came_up, config, down};
use ashlar_protocol::step::StepTiming;
use ashlar_scheduler::cluster::{ClusterConfig, Effect, Event, NodeConnection, Spent};
use ashlar_vocabulary::{LayerRange, NodeId, ReplicaId, ReplicaRevision, SequenceId, StepId};

fn quarantined(effects: &[Effect]) -> Option<(NodeId, String)> {
    effects.iter().find_map(|effect| match effect {
        Effect::Quarantined { node, reason } => Some((node.clone(), reason.clone())),
        _ => None,
    })
}

fn ordered(effects: &[Effect]) -> Vec<(NodeConnection, ReplicaRevision)> {
    let order = |effect: &Effect| match effect {
        Effect::Prepare { connection, order: Some((assignment, _)) } => {
            Some((*connection, assignment.revision))
        }
        _ => None,
    };
    effects.iter().filter_map(order).collect()
}

fn revision(test: &Test) -> ReplicaRevision {
    assignments(&test.seen).last().expect("an assignment").1.revision
}

fn not_finite(test: &mut Test, connection: NodeConnection, sequences: std::ops::Range<u64>) -> Vec<Effect> {
    let revision = revision(test);
    let mut effects = Vec::new();
    for sequence in sequences {
        let sequences = vec![SequenceId(sequence)];
        effects.extend(test.send(Event::NotFinite { connection, revision, sequences }));
    }
    effects
}

/// `steps` steps of two stages between which rows travel for so long.
fn serve(
    test: &mut Test,
    (first, last): (NodeConnection, NodeConnection),
    steps: std::ops::Range<u64>,
    link_us: u64,
) -> Vec<Effect> {
    let mut effects = Vec::new();
    for step in steps {
        let timing = |compute_us, wait_us| StepTiming { compute_us, wait_us, ..StepTiming::default() };
        for (connection, timing) in [(first, timing(5_000, 0)), (last, timing(5_000, 5_000 + link_us))] {
            let spent = Spent::Serving(StepId(step), timing);
            effects.extend(test.send(Event::Heard { connection, spent }));
        }
    }
    effects
}

/// The node of the first stage, and that of the last one.
fn stages(test: &Test) -> (NodeConnection, NodeConnection) {
    let all = assignments(&test.seen);
    let of =
        |stage: u32| all.iter().rev().find(|(_, assignment)| assignment.stage.0 == stage).expect("a stage").0;
    (of(0), of(1))
}

#[test]
fn a_node_whose_numbers_are_repeatedly_none_is_replaced_and_stands_by() {
    let (mut test, _, b) = Test::up();
    let (c, _) = test.join("c");
    assert_eq!(quarantined(&not_finite(&mut test, b, 1..3)), None, "twice is an accident");
    assert_eq!(quarantined(&not_finite(&mut test, b, 2..3)), None, "the same sequence says nothing new");
    let effects = not_finite(&mut test, b, 3..4);
    let (node, reason) = quarantined(&effects).expect("quarantined");
    assert!(node.0 == "b" && reason.contains("repeatedly not finite"), "{node}: {reason}");
    assert_eq!((ordered(&effects)[0].0, down(&effects)), (c, None));
    let (connection, revision) = ordered(&effects)[0];
    let effects = test.send(Event::Prepared { connection, revision, outcome: Ok(()) });
    assert!(!assignments(&effects).iter().any(|(to, _)| *to == b));
    for (connection, assignment) in assignments(&effects) {
        test.ready(connection, assignment.revision);
    }
    // The next one to compute these layers computes the same: it is not the node.
    assert_eq!(quarantined(&not_finite(&mut test, c, 10..20)), None);
    // It is better than nobody.
    let effects = test.lose(c);
    assert!(assignments(&effects).iter().any(|(to, _)| *to == b));
}

#[test]
fn without_anybody_else_a_node_serves_on_whatever_it_computes() {
    let (mut test, _, b) = Test::up();
    let effects = not_finite(&mut test, b, 1..4);
    assert!(quarantined(&effects).is_some() && down(&effects).is_none() && ordered(&effects).is_empty());
    // As soon as somebody is there, it is replaced.
    let (c, effects) = test.join("c");
    assert_eq!(ordered(&effects)[0].0, c);
}

#[test]
fn what_is_said_of_a_former_layout_or_by_one_of_a_group_charges_nobody() {
    let (mut test, _, b) = Test::up();
    for sequence in 1..9 {
        let event = Event::NotFinite {
            connection: b,
            revision: ReplicaRevision(1),
            sequences: vec![SequenceId(sequence)],
        };
        assert_eq!(quarantined(&test.send(event)), None);
    }
    let mut test = Test::new(ClusterConfig { stages: Some(1), tensor_parallel_size: Some(2), ..config() });
    let (_, _) = test.join("a");
    let (b, effects) = test.join("b");
    for (connection, assignment) in assignments(&effects) {
        test.ready(connection, assignment.revision);
    }
    assert_eq!(quarantined(&not_finite(&mut test, b, 1..9)), None);
}

#[test]
fn a_slow_link_has_its_node_replaced_and_then_its_other_end() {
    let (mut test, _, _) = Test::up();
    let (first, last) = stages(&test);
    let (c, _) = test.join("c");
    assert_eq!(quarantined(&serve(&mut test, (first, last), 1..100, 1_000)), None, "fast");
    let mut effects = serve(&mut test, (first, last), 100..131, 50_000);
    effects.extend(serve(&mut test, (first, last), 131..132, 1_000));
    effects.extend(serve(&mut test, (first, last), 132..163, 50_000));
    assert_eq!(quarantined(&effects), None, "now and then");
    let effects = serve(&mut test, (first, last), 163..200, 50_000);
    let (_, reason) = quarantined(&effects).expect("quarantined");
    assert!(reason.contains("is slow"), "{reason}");
    let (connection, revision) = ordered(&effects)[0];
    assert_eq!(connection, c, "in the place of the later stage");
    let effects = test.send(Event::Prepared { connection, revision, outcome: Ok(()) });
    for (connection, assignment) in assignments(&effects) {
        test.ready(connection, assignment.revision);
    }
    assert_eq!(stages(&test), (first, c));
    // Still slow: then it is the other end, and the first one was innocent.
    let effects = serve(&mut test, (first, c), 1..40, 50_000);
    let (connection, revision) = ordered(&effects)[0];
    assert_eq!(connection, last);
    let effects = test.send(Event::Prepared { connection, revision, outcome: Ok(()) });
    let assigned: Vec<NodeConnection> = assignments(&effects).iter().map(|(to, _)| *to).collect();
    assert!(assigned.contains(&last) && assigned.contains(&c) && !assigned.contains(&first));
}

#[test]
fn a_slow_link_without_an_alternative_is_put_up_with() {
    let (mut test, _, _) = Test::up();
    let (first, last) = stages(&test);
    let effects = serve(&mut test, (first, last), 1..200, 50_000);
    assert!(quarantined(&effects).is_none() && down(&effects).is_none());
}

#[test]
fn a_stage_whose_bits_are_others_is_replaced_and_no_other_stage() {
    let (mut test, a, b) = Test::up();
    let (c, _) = test.join("c");
    let (first, _) = stages(&test);
    let (replica, revision) = (ReplicaId(0), revision(&test));
    let split = assignments(&test.seen).iter().map(|(_, assignment)| assignment.layers.start).max().unwrap();
    let differs =
        |revision, start, end| Event::Differs { replica, revision, layers: LayerRange { start, end } };
    // Of both stages together nothing is known, nor of a layout that is gone.
    assert_eq!(quarantined(&test.send(differs(revision, 0, 8))), None);
    assert_eq!(quarantined(&test.send(differs(ReplicaRevision(99), 0, split))), None);
    let effects = test.send(differs(revision, 0, split));
    let (node, reason) = quarantined(&effects).expect("a quarantine");
    assert_eq!(node.0, if first == a { "a" } else { "b" });
    assert!(reason.contains(&format!("0..{split}")), "{reason}");
    assert_eq!(ordered(&effects).iter().map(|(connection, _)| *connection).collect::<Vec<_>>(), [c]);
    let _ = b;
}

#[test]
fn other_logits_accuse_the_stage_that_has_the_head() {
    let (mut test, a, _) = Test::up();
    test.join("c");
    let (first, _) = stages(&test);
    let layers = LayerRange { start: 8, end: 8 };
    let event = Event::Differs { replica: ReplicaId(0), revision: revision(&test), layers };
    let (node, reason) = quarantined(&test.send(event)).expect("a quarantine");
    assert_eq!(node.0, if first == a { "b" } else { "a" });
    assert!(reason.contains("head"), "{reason}");
}

#[test]
fn a_replica_that_is_wrong_serves_only_where_no_other_one_does() {
    let mut test = Test::new(ClusterConfig { stages: Some(1), replicas: Some(2), ..config() });
    let (a, _) = test.join("a");
    let (b, _) = test.join("b");
    let ready = |test: &mut Test, effects: &[Effect]| {
        assignments(effects)
            .iter()
            .flat_map(|(node, order)| test.ready(*node, order.revision))
            .collect::<Vec<_>>()
    };
    let seen = test.seen.clone();
    assert!(came_up(&ready(&mut test, &seen)));
    let (_, order) = assignments(&seen).into_iter().find(|(node, _)| *node == a).unwrap();
    let layers = LayerRange { start: 0, end: 8 };
    let effects = test.send(Event::Differs { replica: order.replica, revision: order.revision, layers });
    assert!(down(&effects).unwrap().contains("node a computed other bits"), "{effects:?}");
    // It is not taken again, however long nobody else comes.
    assert!(assignments(&effects).is_empty());
    test.ready(b, order.revision);
    for _ in 0..20 {
        test.send(Event::Heard { connection: a, spent: Spent::Nothing });
        test.send(Event::Heard { connection: b, spent: Spent::Nothing });
        assert!(assignments(&test.tick(200)).is_empty());
    }
    // Nobody else is left: an answer that may be wrong, and is known to be, is better than none.
    let mut effects = test.lose(b);
    effects.extend(test.tick(100));
    assert_eq!(assignments(&effects)[0].0, a);
    assert!(came_up(&ready(&mut test, &effects)));
    // Until the other one is back, in whichever place.
    let (b, mut effects) = test.join("b");
    let mut released = false;
    for _ in 0..10 {
        let mut next = ready(&mut test, &effects);
        for (connection, revision) in ordered(&effects) {
            next.extend(test.send(Event::Prepared { connection, revision, outcome: Ok(()) }));
        }
        for connection in [a, b] {
            next.extend(test.send(Event::Heard { connection, spent: Spent::Nothing }));
        }
        next.extend(test.tick(100));
        released |= next
            .iter()
            .any(|effect| matches!(effect, Effect::Release { connection, .. } if *connection == a));
        assert!(assignments(&next).iter().all(|(node, _)| *node == b), "{next:?}");
        effects = next;
    }
    assert!(released);
}
