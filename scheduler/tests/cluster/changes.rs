//! From one layout to another: nodes that leave are replaced, nodes that have joined are made use of.

use super::{Test, assignments, came_up, config, down};
use ashlar_protocol::admin::PlannedChange;
use ashlar_scheduler::cluster::{ClusterConfig, Effect, Event, NodeConnection, Spent};
use ashlar_vocabulary::{NodeId, ReplicaId, ReplicaRevision};

fn leave(test: &mut Test, connection: NodeConnection) -> Vec<Effect> {
    test.send(Event::Leaving { connection, leaving: true })
}

/// What nodes are told to prepare, with the revision of the order.
fn orders(effects: &[Effect]) -> Vec<(NodeConnection, ReplicaRevision)> {
    let order = |effect: &Effect| match effect {
        Effect::Prepare { connection, order: Some((assignment, _)) } => {
            Some((*connection, assignment.revision))
        }
        _ => None,
    };
    effects.iter().filter_map(order).collect()
}

fn dismissed(effects: &[Effect], node: NodeConnection) -> bool {
    effects.contains(&Effect::Dismiss { connection: node })
}

fn drains(effects: &[Effect]) -> Option<bool> {
    effects.iter().find_map(|effect| match effect {
        Effect::ReplicaDrains { drains, .. } => Some(*drains),
        _ => None,
    })
}

fn is_prepared(test: &mut Test, (connection, revision): (NodeConnection, ReplicaRevision)) -> Vec<Effect> {
    test.send(Event::Prepared { connection, revision, outcome: Ok(()) })
}

fn all_ready(test: &mut Test, assigned: &[Effect]) -> Vec<Effect> {
    let mut effects = Vec::new();
    for (connection, assignment) in assignments(assigned) {
        effects.extend(test.ready(connection, assignment.revision));
    }
    effects
}

/// Everybody says something, so that nobody is taken for dead while time passes.
fn pass(test: &mut Test, nodes: &[NodeConnection], ms: u64) -> Vec<Effect> {
    let mut effects = Vec::new();
    for _ in 0..ms.div_ceil(100) {
        for connection in nodes {
            effects.extend(test.send(Event::Heard { connection: *connection, spent: Spent::Nothing }));
        }
        effects.extend(test.tick(100));
    }
    effects
}

#[test]
fn a_standby_prepares_beside_a_node_that_leaves_and_then_takes_its_place() {
    let (mut test, a, b) = Test::up();
    let (c, _) = test.join("c");
    let effects = leave(&mut test, b);
    assert_eq!(down(&effects), None, "it serves while the standby prepares");
    let ordered = orders(&effects);
    assert_eq!(ordered.iter().map(|(to, _)| *to).collect::<Vec<_>>(), [c]);
    assert!(!dismissed(&test.seen.clone(), b));
    let effects = is_prepared(&mut test, ordered[0]);
    assert_eq!(down(&effects).as_deref(), Some("node b leaves"));
    let assigned: Vec<NodeConnection> = assignments(&effects).iter().map(|(to, _)| *to).collect();
    assert!(assigned.len() == 2 && assigned.contains(&a) && assigned.contains(&c));
    assert!(dismissed(&effects, b));
    assert!(came_up(&all_ready(&mut test, &effects)));
}

#[test]
fn a_standby_that_holds_the_slice_already_takes_the_place_at_once() {
    let (mut test, a, b) = Test::up();
    let (c, _) = test.join("c");
    let effects = leave(&mut test, b);
    let effects = is_prepared(&mut test, orders(&effects)[0]);
    all_ready(&mut test, &effects);
    // It is of use again, and still has what it had.
    test.send(Event::Leaving { connection: b, leaving: false });
    let effects = leave(&mut test, c);
    assert!(orders(&effects).is_empty(), "nothing is to be loaded");
    let assigned: Vec<NodeConnection> = assignments(&effects).iter().map(|(to, _)| *to).collect();
    assert!(assigned.contains(&a) && assigned.contains(&b) && dismissed(&effects, c));
}

#[test]
fn where_another_replica_serves_a_node_that_leaves_is_dismissed_at_once() {
    let mut test = Test::new(ClusterConfig { replicas: Some(2), ..config() });
    let nodes: Vec<NodeConnection> = ["a", "b", "c", "d"].map(|name| test.join(name).0).to_vec();
    let seen = test.seen.clone();
    all_ready(&mut test, &seen);
    let effects = leave(&mut test, nodes[0]);
    assert!(down(&effects).is_some() && dismissed(&effects, nodes[0]));
    // Its place stays vacant: nobody is taken away from the other replica.
    assert!(assignments(&effects).is_empty());
    test.lose(nodes[0]);
    let (_, effects) = test.join("a");
    assert_eq!(assignments(&effects).len(), 2, "it gets its place back");
}

#[test]
fn where_nobody_can_take_the_place_the_replica_finishes_what_it_has() {
    let (mut test, _, b) = Test::up();
    let effects = leave(&mut test, b);
    assert_eq!((drains(&effects), down(&effects)), (Some(true), None));
    assert_eq!(test.cluster.draining(), [ReplicaId(0)]);
    assert!(
        test.cluster.could_spare(&NodeId("b".into())).unwrap_err().contains("let another node join first")
    );
    let effects = test.send(Event::Drained { replica: ReplicaId(0) });
    assert!(down(&effects).is_some() && dismissed(&effects, b));
    // Back again, it takes its place.
    test.lose(b);
    let (_, effects) = test.join("b");
    assert_eq!(assignments(&effects).len(), 2);
}

#[test]
fn a_node_that_joins_while_a_replica_drains_takes_the_place() {
    let (mut test, _, b) = Test::up();
    leave(&mut test, b);
    let (c, effects) = test.join("c");
    assert_eq!(orders(&effects).iter().map(|(to, _)| *to).collect::<Vec<_>>(), [c]);
    let effects = is_prepared(&mut test, orders(&effects)[0]);
    assert!(dismissed(&effects, b));
    assert!(came_up(&all_ready(&mut test, &effects)));
}

#[test]
fn a_wish_to_leave_that_is_taken_back_lets_the_replica_go_on() {
    let (mut test, _, b) = Test::up();
    leave(&mut test, b);
    let effects = test.send(Event::Leaving { connection: b, leaving: false });
    assert_eq!((drains(&effects), down(&effects)), (Some(false), None));
    assert!(test.cluster.draining().is_empty());
}

#[test]
fn a_standby_that_is_lost_while_it_prepares_is_replaced_by_another_one() {
    let (mut test, _, b) = Test::up();
    let (c, _) = test.join("c");
    let (d, _) = test.join("d");
    assert_eq!(orders(&leave(&mut test, b))[0].0, c);
    let effects = test.lose(c);
    assert_eq!(down(&effects), None);
    assert_eq!(orders(&effects)[0].0, d);
    let effects = is_prepared(&mut test, orders(&effects)[0]);
    assert!(dismissed(&effects, b));
}

#[test]
fn a_standby_that_cannot_prepare_is_not_asked_again_and_another_one_is_at_once() {
    let (mut test, a, b) = Test::up();
    let (c, _) = test.join("c");
    let (d, _) = test.join("d");
    let fail = |test: &mut Test, (connection, revision): (NodeConnection, ReplicaRevision)| {
        let outcome = Err("the disk cannot be read".to_owned());
        test.send(Event::Prepared { connection, revision, outcome })
    };
    let first = orders(&leave(&mut test, b))[0];
    let effects = fail(&mut test, first);
    assert_eq!((first.0, down(&effects)), (c, None));
    let second = orders(&effects)[0];
    assert_eq!(second.0, d);
    let effects = fail(&mut test, second);
    assert!(orders(&effects).is_empty());
    assert_eq!(drains(&effects), Some(true), "nobody is left");
    assert!(orders(&pass(&mut test, &[a, b, c, d], 2_000)).is_empty());
}

#[test]
fn a_replica_that_drained_and_was_lost_meanwhile_drains_again_once_it_is_back() {
    let (mut test, a, b) = Test::up();
    leave(&mut test, b);
    test.lose(a);
    assert!(test.cluster.draining().is_empty());
    // Without anything to serve the one that leaves is not held back.
    assert!(dismissed(&test.seen.clone(), b));
    test.send(Event::Leaving { connection: b, leaving: false });
    let (_, effects) = test.join("a");
    assert!(came_up(&all_ready(&mut test, &effects)));
    assert_eq!(drains(&leave(&mut test, b)), Some(true));
}

#[test]
fn a_node_that_is_leaving_gets_no_place() {
    let mut test = Test::new(config());
    let (a, _) = test.join("a");
    leave(&mut test, a);
    let (_, effects) = test.join("b");
    assert!(assignments(&effects).is_empty());
    assert_eq!(test.cluster.problem(), Some("waiting for nodes: 1 of 2 have joined"));
    let (_, effects) = test.join("c");
    assert_eq!(assignments(&effects).len(), 2);
    assert!(!assignments(&effects).iter().any(|(to, _)| *to == a));
}

#[test]
fn nodes_that_join_become_another_replica_where_their_number_is_left_open() {
    let mut test = Test::new(ClusterConfig { replicas: None, ..config() });
    let (a, _) = test.join("a");
    let (b, _) = test.join("b");
    let assigned = test.tick(600);
    assert!(came_up(&all_ready(&mut test, &assigned)));
    let (c, _) = test.join("c");
    assert!(assignments(&pass(&mut test, &[a, b, c], 1000)).is_empty(), "one alone stands by");
    let (d, _) = test.join("d");
    let effects = pass(&mut test, &[a, b, c, d], 1000);
    assert_eq!(down(&effects), None, "the other one serves on");
    let mut assigned: Vec<NodeConnection> = assignments(&effects).iter().map(|(to, _)| *to).collect();
    assigned.sort();
    assert_eq!(assigned, [c, d]);
    assert!(assignments(&effects).iter().all(|(_, assignment)| assignment.replica == ReplicaId(1)));
}

#[test]
fn a_much_better_cut_is_prepared_beside_the_one_that_serves_and_a_little_better_one_is_not() {
    let open = || {
        let mut test = Test::new(ClusterConfig { stages: None, replicas: Some(1), ..config() });
        let (a, _) = test.join("a");
        let assigned = test.tick(600);
        assert!(came_up(&all_ready(&mut test, &assigned)));
        (test, a)
    };
    let (mut test, a) = open();
    let (b, _) = test.join_as("b", 1 << 30, 1.1, None);
    assert!(orders(&pass(&mut test, &[a, b], 2000)).is_empty());
    let (mut test, a) = open();
    let (b, _) = test.join_as("b", 1 << 30, 3.0, None);
    let effects = pass(&mut test, &[a, b], 2000);
    assert_eq!(orders(&effects).iter().map(|(to, _)| *to).collect::<Vec<_>>(), [b]);
    assert_eq!(down(&effects), None);
    let effects = is_prepared(&mut test, orders(&effects)[0]);
    assert_eq!(down(&effects).as_deref(), Some("nodes have joined"));
    assert_eq!(assignments(&effects).iter().map(|(to, _)| *to).collect::<Vec<_>>(), [b]);
    assert!(came_up(&all_ready(&mut test, &effects)));
    // That was that.
    assert!(orders(&pass(&mut test, &[a, b], 5000)).is_empty());
}

#[test]
fn without_a_standby_all_is_laid_out_anew_on_those_who_stay_if_that_is_left_open() {
    let mut test = Test::new(ClusterConfig { stages: None, replicas: Some(1), ..config() });
    // Neither has room for the whole model.
    let half = 3_500_000;
    let (a, _) = test.join_with("a", half);
    let (b, _) = test.join_with("b", half);
    let assigned = test.tick(600);
    assert!(came_up(&all_ready(&mut test, &assigned)));
    let (big, _) = test.join_with("big", 1 << 30);
    pass(&mut test, &[a, b, big], 2000);
    leave(&mut test, a);
    leave(&mut test, b);
    let effects = pass(&mut test, &[a, b, big], 300);
    let seen = test.seen.clone();
    let ordered = *orders(&seen).last().unwrap();
    assert_eq!(ordered.0, big);
    let mut effects = [effects, is_prepared(&mut test, ordered)].concat();
    // One after the other may be replaced, or both at once.
    for _ in 0..3 {
        let mut more = all_ready(&mut test, &effects);
        more.extend(pass(&mut test, &[a, b, big], 100));
        let ordered = orders(&more);
        effects = more;
        for order in ordered {
            effects.extend(is_prepared(&mut test, order));
        }
    }
    let seen = test.seen.clone();
    assert!(dismissed(&seen, a) && dismissed(&seen, b));
    assert_eq!(assignments(&seen).last().unwrap().0, big);
}

#[test]
fn an_operator_has_a_little_better_layout_made_which_is_not_made_by_itself() {
    let mut test = Test::new(ClusterConfig { stages: None, replicas: Some(1), ..config() });
    let (a, _) = test.join("a");
    assert_eq!(test.cluster.plan_anew().change, PlannedChange::NewLayout, "there is none yet");
    let assigned = test.tick(600);
    assert!(test.cluster.is_in_motion().is_some_and(|reason| reason.contains("replica 0 is being loaded")));
    assert!(came_up(&all_ready(&mut test, &assigned)));
    assert_eq!(test.cluster.plan_anew().change, PlannedChange::Nothing);
    assert!(orders(&test.send(Event::Replan)).is_empty(), "it is laid out so already");
    let (b, _) = test.join_as("b", 1 << 30, 1.2, None);
    assert!(orders(&pass(&mut test, &[a, b], 2000)).is_empty());

    let plan = test.cluster.plan_anew();
    assert_eq!((plan.change, &plan.problem), (PlannedChange::NewLayout, &None));
    assert_eq!(plan.replicas[0].stages[0].ranks[0].node, NodeId("b".into()));
    assert!(orders(&pass(&mut test, &[a, b], 500)).is_empty(), "a preview changes nothing");
    let effects = test.send(Event::Replan);
    assert_eq!((orders(&effects)[0].0, down(&effects)), (b, None), "what serves goes on meanwhile");
    assert!(test.cluster.is_in_motion().is_some_and(|reason| reason.contains("is being prepared")));
    assert!(orders(&test.send(Event::Replan)).is_empty(), "one at a time");
    let effects = is_prepared(&mut test, orders(&effects)[0]);
    assert_eq!(down(&effects).as_deref(), Some("the operator had it laid out anew"));
    assert!(came_up(&all_ready(&mut test, &effects)));
    assert_eq!(test.cluster.plan_anew().change, PlannedChange::Nothing);
    assert!(orders(&pass(&mut test, &[a, b], 5000)).is_empty(), "that was that");

    // Nothing that it could be laid out on.
    leave(&mut test, a);
    leave(&mut test, b);
    let plan = test.cluster.plan_anew();
    assert_eq!(plan.change, PlannedChange::Impossible);
    assert!(plan.problem.is_some() && plan.replicas.len() == 1);
    assert!(orders(&test.send(Event::Replan)).is_empty());
}
