//! Replicas are lost: their sequences wait, are computed again elsewhere or later, and go on with the next token.

use crate::rank::oracle;
use crate::world::{End, GATEWAY, World, config, prompt, submit};
use ashlar_protocol::serving::FailureKind;
use ashlar_scheduler::engine::Event;

fn advance(world: &mut World, times: usize) {
    (0..times).for_each(|_| {
        world.advance();
    });
}

#[test]
fn a_lost_replica_that_comes_back_goes_on_with_the_next_token() {
    for stages in [1, 3] {
        let mut world = World::with(config(), stages, 256);
        let ids: Vec<_> = (1..=4).map(|n| world.submit(submit(n, prompt(40, n as u32), 30))).collect();
        for _ in 0..3 {
            advance(&mut world, 9);
            world.down(0, "node b was lost");
            world.wait(400);
            world.up(0, stages, 256);
        }
        world.run();
        for (number, id) in (1..).zip(ids) {
            assert_eq!(world.heard(id).tokens, oracle(&prompt(40, number as u32), number, 30));
            assert_eq!(world.heard(id).indices, (0..30).collect::<Vec<u32>>(), "none twice, none left out");
            assert_eq!(world.receipt(id).replays, 3);
        }
        assert_eq!(world.engine.counters().replays, 12);
    }
}

#[test]
fn another_replica_takes_over_what_one_had() {
    let mut world = World::new(config());
    world.up(0, 1, 256);
    world.up(1, 1, 256);
    let ids: Vec<_> = (1..=6).map(|n| world.submit(submit(n, prompt(40, n as u32), 20))).collect();
    advance(&mut world, 6);
    world.down(1, "node c was lost");
    world.run();
    for (number, id) in (1..).zip(&ids) {
        assert_eq!(world.heard(*id).tokens, oracle(&prompt(40, number as u32), number, 20));
    }
    let moved = ids.iter().filter(|id| world.receipt(**id).replays == 1).count();
    assert_eq!(moved, 3);
}

#[test]
fn preempted_sequences_of_a_lost_replica_are_computed_again_too() {
    let mut world = World::with(config(), 4, 9);
    let ids: Vec<_> = (1..=4).map(|n| world.submit(submit(n, prompt(17, n as u32), 100))).collect();
    while world.engine.counters().preemptions == 0 && world.advance() {}
    world.down(0, "node b was lost");
    world.up(0, 2, 9);
    world.run();
    for (number, id) in (1..).zip(ids) {
        assert_eq!(world.heard(id).tokens, oracle(&prompt(17, number as u32), number, 100));
    }
}

#[test]
fn who_comes_while_nothing_is_up_is_served_once_something_is() {
    let mut world = World::new(config());
    let early = world.submit(submit(1, prompt(40, 1), 5));
    world.wait(20_000);
    assert_eq!(world.heard(early).end, None);
    world.up(0, 1, 256);
    world.run();
    assert_eq!(world.heard(early).tokens, oracle(&prompt(40, 1), 1, 5));
}

#[test]
fn those_who_have_not_begun_are_refused_with_the_reason_once_patience_ends() {
    let mut world = World::with(config(), 1, 256);
    let begun = world.submit(submit(1, prompt(40, 1), 50));
    advance(&mut world, 3);
    let new = world.submit(submit(2, prompt(400, 2), 5));
    world.down(0, "node b was lost");
    let problem = Some("node b was lost; waiting for it".into());
    world.send(Event::Problem { problem, lasting: false });
    world.wait(29_999);
    assert_eq!(world.heard(new).end, None);
    world.wait(1);
    let failure = world.failure(new);
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::Unavailable, "node b was lost; waiting for it")
    );
    assert!(failure.retry_after_ms.is_some());
    let late = world.submit(submit(3, prompt(40, 3), 5));
    assert_eq!(world.failure(late).kind, FailureKind::Unavailable, "at once");
    // One that has begun, here or with another scheduler, waits until its deadline.
    let mut elsewhere = submit(4, prompt(40, 4), 50);
    elsewhere.forced = oracle(&prompt(40, 4), 4, 10);
    let elsewhere = world.submit(elsewhere);
    assert_eq!((world.heard(begun).end, world.heard(elsewhere).end), (None, None));
    world.up(0, 1, 256);
    world.run();
    assert_eq!(world.heard(begun).tokens, oracle(&prompt(40, 1), 1, 50));
    assert_eq!(world.heard(elsewhere).tokens, oracle(&prompt(40, 4), 4, 50)[10..]);
    assert_eq!(world.heard(elsewhere).indices, (10..50).collect::<Vec<u32>>());
}

#[test]
fn nobody_waits_for_what_time_alone_will_not_mend() {
    let mut world = World::new(config());
    let early = world.submit(submit(1, prompt(40, 1), 5));
    world.send(Event::Problem { problem: Some("the model does not fit".into()), lasting: true });
    world.wait(1);
    assert_eq!(world.failure(early).message, "the model does not fit");
    let late = world.submit(submit(2, prompt(40, 2), 5));
    assert_eq!(world.failure(late).kind, FailureKind::Unavailable);
}

#[test]
fn a_deadline_ends_one_that_waits_for_a_replica() {
    let mut world = World::with(config(), 1, 256);
    let mut asked = submit(1, prompt(40, 1), 50);
    asked.deadline_ms = 5_000;
    let id = world.submit(asked);
    advance(&mut world, 3);
    world.down(0, "node b was lost");
    world.wait(6_000);
    assert_eq!(world.failure(id).kind, FailureKind::DeadlineExceeded);
    assert!(world.engine.is_idle());
}

#[test]
fn cancelling_one_that_waits_for_a_replica_forgets_it() {
    let mut world = World::with(config(), 1, 256);
    let id = world.submit(submit(1, prompt(40, 1), 50));
    advance(&mut world, 3);
    world.down(0, "node b was lost");
    world.send(Event::Cancel { gateway: GATEWAY, id });
    assert!(world.engine.is_idle());
}

#[test]
fn too_long_for_what_has_come_up_is_refused_and_for_what_is_left_only_if_it_has_not_begun() {
    let mut world = World::new(config());
    let id = world.submit(submit(1, prompt(200, 1), 5));
    world.up(0, 1, 10);
    assert_eq!(world.failure(id).kind, FailureKind::Invalid);

    let mut world = World::new(config());
    world.up(0, 1, 10);
    world.up(1, 1, 40);
    let begun = world.submit(submit(1, prompt(200, 1), 50));
    advance(&mut world, 3);
    world.down(1, "node c was lost");
    world.run();
    assert_eq!(world.heard(begun).end, None);
    world.up(1, 1, 40);
    world.run();
    assert_eq!(world.heard(begun).tokens, oracle(&prompt(200, 1), 1, 50));
}

/// Whoever computes request 9 crashes.
#[test]
fn what_crashes_every_replica_that_computes_it_ends_alone() {
    let mut world = World::with(config(), 1, 256);
    let good: Vec<_> = (1..=3).map(|n| world.submit(submit(n, prompt(20, n as u32), 30))).collect();
    advance(&mut world, 4);
    let bad = world.submit(submit(9, prompt(20, 9), 30));
    let mut lost = 0;
    for _ in 0..200 {
        let computing = |world: &World| {
            world.replicas.get(&0).is_some_and(|replica| replica.rank.computes(&prompt(20, 9)))
        };
        if computing(&world) {
            lost += 1;
            world.crash(0, "a rank has crashed");
            world.up(0, 1, 256);
        } else {
            world.advance();
        }
    }
    world.run();
    assert_eq!(lost, 2, "once among others, once alone");
    let failure = world.failure(bad);
    assert_eq!(failure.kind, FailureKind::Suspect, "{}", failure.message);
    assert!(failure.retry_after_ms.is_none(), "it would do it again");
    for (number, id) in (1..).zip(good) {
        assert_eq!(world.heard(id).tokens, oracle(&prompt(20, number as u32), number, 30));
        assert!(matches!(world.heard(id).end, Some(End::Finished(..))));
    }
}

#[test]
fn replicas_that_are_merely_lost_accuse_nobody() {
    let mut world = World::with(config(), 1, 256);
    let id = world.submit(submit(1, prompt(20, 1), 30));
    for _ in 0..20 {
        world.down(0, "node b was lost");
        world.up(0, 1, 256);
    }
    world.run();
    assert_eq!(world.heard(id).tokens, oracle(&prompt(20, 1), 1, 30));
}

#[test]
fn a_crash_that_is_told_after_the_loss_accuses_what_was_computed_then() {
    let mut world = World::with(config(), 1, 256);
    let id = world.submit(submit(1, prompt(20, 1), 30));
    for _ in 0..2 {
        // Another rank noticed first that its neighbour is gone.
        world.down(0, "node a failed: lost another rank");
        assert_eq!(world.heard(id).end, None);
        world.crash(0, "a rank has crashed");
        world.up(0, 1, 256);
    }
    assert_eq!(world.failure(id).kind, FailureKind::Suspect);
}
