//! The prefix cache: what is hit, and what must not be.

use crate::rank::oracle;
use crate::world::{World, config, prompt, submit};

#[test]
fn an_equal_prompt_is_hit_except_for_its_last_token() {
    let mut world = World::with(config(), 1, 64);
    for (number, cached) in [(1, 0), (2, 48)] {
        let id = world.submit(submit(number, prompt(64, 1), 4));
        world.run();
        assert_eq!(world.receipt(id).cached_tokens, cached);
        assert_eq!(world.heard(id).tokens, oracle(&prompt(64, 1), number as u64, 4));
    }
}

#[test]
fn a_conversation_continues_from_its_own_answer() {
    let mut world = World::with(config(), 1, 64);
    let first = world.submit(submit(1, prompt(40, 1), 30));
    world.run();
    let mut next = prompt(40, 1);
    next.extend(world.heard(first).tokens);
    next.extend(prompt(10, 9));
    let second = world.submit(submit(2, next.clone(), 5));
    world.run();
    // 69 of its tokens have been computed, the 70th was only sampled.
    assert_eq!(world.receipt(second).cached_tokens, 64);
    assert_eq!(world.heard(second).tokens, oracle(&next, 2, 5));
}

#[test]
fn another_tenant_never_hits() {
    let mut world = World::with(config(), 1, 64);
    for salt in [1, 2] {
        let mut asked = submit(u128::from(salt), prompt(64, 1), 4);
        asked.tenant_salt = salt;
        let id = world.submit(asked);
        world.run();
        assert_eq!(world.receipt(id).cached_tokens, 0);
    }
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    for stages in [1, 3] {
        let mut world = World::with(config(), stages, 128);
        // A first request keeps the replica busy, so that the others arrive together.
        world.submit(submit(9, prompt(5, 9), 20));
        let ids: Vec<_> = (1..=4).map(|number| world.submit(submit(number, prompt(200, 1), 5))).collect();
        world.run();
        let cached: u32 = ids.iter().map(|id| world.receipt(*id).cached_tokens).sum();
        assert_eq!(cached, 3 * 192, "with {stages} stages");
        for (number, id) in (1..).zip(ids) {
            assert_eq!(world.heard(id).tokens, oracle(&prompt(200, 1), number, 5));
        }
    }
}

#[test]
fn the_least_recently_used_prefix_is_evicted_first() {
    let mut world = World::with(config(), 1, 12);
    let mut ask = |number: u128, salt: u32| {
        let id = world.submit(submit(number, prompt(65, salt), 2));
        world.run();
        world.receipt(id).cached_tokens
    };
    assert_eq!(ask(1, 1), 0);
    assert_eq!(ask(2, 2), 0);
    assert_eq!(ask(3, 1), 64, "used again, so 2 is older now");
    assert_eq!(ask(4, 3), 0);
    assert_eq!(ask(5, 1), 64);
    assert_eq!(ask(6, 2), 48, "one block was needed, and it lost its last one");
}

#[test]
fn a_prompt_goes_to_the_replica_that_has_its_prefix_else_to_the_idle_one() {
    let mut world = World::new(config());
    world.up(0, 1, 64);
    world.up(1, 1, 64);
    let first = world.submit(submit(1, prompt(64, 1), 4));
    let second = world.submit(submit(2, prompt(64, 2), 4));
    world.run();
    assert!(world.replicas.values().all(|replica| replica.rank.computed == 67), "one each");
    let again: Vec<_> = [(3, 2), (4, 2), (5, 1)]
        .map(|(number, salt)| world.submit(submit(number, prompt(64, salt), 4)))
        .into();
    world.run();
    assert!(again.iter().all(|id| world.receipt(*id).cached_tokens == 48));
    assert_ne!(world.heard(first).tokens, world.heard(second).tokens);
}
