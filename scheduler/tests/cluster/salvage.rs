//! What is left of KV caches when a replica comes up again.

use super::{Test, assignments, config};
use ashlar_protocol::membership::Assignment;
use ashlar_scheduler::cluster::{ClusterConfig, Effect, NodeConnection};
use ashlar_scheduler::engine::ReplicaUp;

/// Three nodes with a stage each, by stage; with what they are told.
fn three(boundary_log: bool) -> (Test, Vec<(NodeConnection, Assignment)>) {
    let mut test = Test::new(ClusterConfig { stages: Some(3), boundary_log, ..config() });
    let mut effects = Vec::new();
    for name in ["a", "b", "c"] {
        effects = test.join(name).1;
    }
    let mut assigned = assignments(&effects);
    assigned.sort_by_key(|(_, assignment)| assignment.stage);
    (test, assigned)
}

fn up(effects: &[Effect]) -> ReplicaUp {
    let up = effects.iter().find_map(|effect| match effect {
        Effect::ReplicaUp(up) => Some(up.clone()),
        _ => None,
    });
    up.expect("it serves")
}

/// Blocks that all have, and those that stages from the first to the last of these lack.
type Salvaged = (Vec<u32>, Option<(u32, u32, Vec<u32>)>);

/// What comes up once each stage has told what it has kept: blocks, and whether what it handed on.
fn comes_up_with(told: [(&[u32], bool); 3]) -> Salvaged {
    let (mut test, assigned) = three(true);
    let mut effects = Vec::new();
    for ((connection, assignment), (kept, logged)) in assigned.into_iter().zip(told) {
        effects = test.ready_with(connection, assignment.revision, kept, logged);
    }
    let up = up(&effects);
    let numbers =
        |blocks: Vec<(ashlar_vocabulary::BlockId, _)>| blocks.iter().map(|(block, _)| block.0).collect();
    let lost = up.lost.map(|lost| (lost.stages.first.0, lost.stages.last.0, numbers(lost.blocks)));
    (numbers(up.kept), lost)
}

#[test]
fn all_stages_but_the_last_are_told_to_keep_what_they_hand_on() {
    let told =
        |boundary_log| three(boundary_log).1.iter().map(|(_, told)| told.boundary_log).collect::<Vec<_>>();
    assert_eq!(told(true), [true, true, false]);
    assert_eq!(told(false), [false; 3]);
}

#[test]
fn what_all_have_is_kept_and_what_one_stage_lacks_is_filled_again() {
    let all: (&[u32], bool) = (&[1, 2, 3, 4], true);
    let none: (&[u32], bool) = (&[], true);
    assert_eq!(comes_up_with([all, all, all]), (vec![1, 2, 3, 4], None));
    assert_eq!(comes_up_with([none, all, all]), (vec![], Some((0, 0, vec![1, 2, 3, 4]))));
    assert_eq!(comes_up_with([all, none, all]), (vec![], Some((1, 1, vec![1, 2, 3, 4]))));
    assert_eq!(comes_up_with([all, all, none]), (vec![], Some((2, 2, vec![1, 2, 3, 4]))));
    assert_eq!(comes_up_with([none, none, none]), (vec![], None));
}

#[test]
fn stages_between_lost_ones_are_filled_again_with_them() {
    let all: (&[u32], bool) = (&[1, 2, 3, 4], true);
    let none: (&[u32], bool) = (&[], true);
    assert_eq!(comes_up_with([all, none, none]), (vec![], Some((1, 2, vec![1, 2, 3, 4]))));
    assert_eq!(comes_up_with([none, none, all]), (vec![], Some((0, 1, vec![1, 2, 3, 4]))));
    assert_eq!(comes_up_with([none, all, none]), (vec![], None), "nobody is left who has anything");
}

#[test]
fn what_a_stage_still_has_needs_no_filling() {
    let all: (&[u32], bool) = (&[1, 2, 3, 4], true);
    assert_eq!(comes_up_with([all, (&[3], true), all]), (vec![3], Some((1, 1, vec![1, 2, 4]))));
    // Others have given block 4 to somebody else.
    let most: (&[u32], bool) = (&[1, 2, 3], true);
    assert_eq!(comes_up_with([all, (&[], true), most]), (vec![], Some((1, 1, vec![1, 2, 3]))));
}

#[test]
fn without_what_was_handed_on_only_the_first_stage_can_be_filled_again() {
    let unlogged: (&[u32], bool) = (&[1, 2], false);
    let none: (&[u32], bool) = (&[], false);
    assert_eq!(comes_up_with([none, unlogged, unlogged]), (vec![], Some((0, 0, vec![1, 2]))));
    assert_eq!(comes_up_with([unlogged, none, unlogged]), (vec![], None));
}
