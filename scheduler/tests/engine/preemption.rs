//! Too few blocks: sequences are preempted, recomputed, and nobody can tell from the tokens.

use crate::rank::oracle;
use crate::world::{World, config, prompt, submit};
use ashlar_scheduler::engine::Event;

#[test]
fn preempted_sequences_are_recomputed_and_never_sampled_again() {
    for stages in [1, 2, 4] {
        let mut world = World::with(config(), stages, 20);
        let ids: Vec<_> =
            (1..=6).map(|number| world.submit(submit(number, prompt(20, number as u32), 60))).collect();
        world.run();
        assert!(world.engine.counters().preemptions > 0, "with {stages} stages");
        for (number, id) in (1..).zip(ids) {
            assert_eq!(world.heard(id).tokens, oracle(&prompt(20, number as u32), number, 60));
            assert_eq!(world.heard(id).indices, (0..60).collect::<Vec<u32>>());
        }
    }
}

#[test]
fn the_least_urgent_and_latest_is_preempted_first() {
    let mut world = World::with(config(), 1, 12);
    let ask = |number: u128, priority: i32| {
        let mut asked = submit(number, prompt(30, number as u32), 60);
        asked.priority = priority;
        asked
    };
    let ids = [(1, 1), (2, 0), (3, 0), (4, 1)].map(|(number, priority)| world.submit(ask(number, priority)));
    world.run();
    let preemptions = ids.map(|id| world.receipt(id).preemptions);
    assert_eq!((preemptions[1], preemptions[2]), (0, 0), "{preemptions:?}");
    assert!(preemptions[3] >= 1 && preemptions[3] >= preemptions[0], "{preemptions:?}");
}

#[test]
fn a_preempted_sequence_whose_step_is_in_flight_keeps_the_token_of_that_step() {
    // Four stages: when an older sequence takes the blocks, steps of the younger ones are still in flight.
    let mut world = World::with(config(), 4, 9);
    let ids: Vec<_> =
        (1..=4).map(|number| world.submit(submit(number, prompt(17, number as u32), 100))).collect();
    world.run();
    assert!(world.engine.counters().preemptions > 0);
    for (number, id) in (1..).zip(ids) {
        assert_eq!(world.heard(id).tokens, oracle(&prompt(17, number as u32), number, 100));
    }
}

#[test]
fn cancelling_a_preempted_sequence_tells_the_ranks() {
    let mut world = World::with(config(), 1, 8);
    let ids: Vec<_> =
        (1..=3).map(|number| world.submit(submit(number, prompt(30, number as u32), 60))).collect();
    while world.engine.counters().preemptions == 0 && world.advance() {}
    for id in ids {
        world.send(Event::Cancel { gateway: crate::world::GATEWAY, id });
    }
    assert!(world.engine.is_idle());
    world.run();
    assert_eq!(world.replica().rank.known(), 0);
}
