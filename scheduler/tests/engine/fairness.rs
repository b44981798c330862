//! Keys beside each other: nobody waits for what another one asks for.

use crate::world::{EngineConfig, World, config, prompt, submit};
use ashlar_protocol::access::Charge;
use ashlar_protocol::serving::{FailureKind, Submit};
use ashlar_scheduler::engine::Event;
use ashlar_vocabulary::KeyId;
use std::collections::BTreeMap;

fn of(key: u64, number: u128, tokens: u32) -> Submit {
    let mut asked = submit(number, prompt(20, number as u32), tokens);
    let prompt_tokens = asked.prompt.len() as u32;
    asked.charge = Some(Charge { key: KeyId(key), requests: 1, prompt_tokens, resumed: false });
    asked
}

fn one_at_a_time() -> EngineConfig {
    EngineConfig { max_num_seqs: 1, ..config() }
}

#[test]
fn whoever_asks_once_goes_before_the_rest_of_a_flood() {
    let mut world = World::with(one_at_a_time(), 1, 64);
    let flood: Vec<_> = (1..=10).map(|number| world.submit(of(1, number, 5))).collect();
    let single = world.submit(of(2, 100, 5));
    world.run();
    let first = |id| world.heard(id).first_token_at;
    assert!(first(single) > first(flood[0]));
    assert!(flood[2..].iter().all(|id| first(single) < first(*id)), "it waited behind a flood");
}

#[test]
fn keys_take_turns_by_what_they_ask_for_not_by_how_often() {
    let mut world = World::with(one_at_a_time(), 1, 64);
    // The same amount: eight short answers, and two long ones.
    let short: Vec<_> = (1..=8).map(|number| world.submit(of(1, number, 20))).collect();
    let long: Vec<_> = (11..=12).map(|number| world.submit(of(2, number, 140))).collect();
    world.run();
    let first = |id| world.heard(id).first_token_at;
    let before_the_second = short.iter().filter(|id| first(**id) < first(long[1])).count();
    assert!((3..=6).contains(&before_the_second), "{before_the_second} of 8");
}

#[test]
fn a_key_that_was_idle_has_saved_up_nothing() {
    let mut world = World::with(one_at_a_time(), 1, 64);
    for number in 1..=20 {
        world.submit(of(1, number, 5));
        world.run();
    }
    let (late, other): (Vec<_>, Vec<_>) =
        (0..6).map(|at| (world.submit(of(2, 100 + at, 5)), world.submit(of(1, 200 + at, 5)))).unzip();
    world.run();
    let first = |id| world.heard(id).first_token_at;
    assert!(first(late[5]) > first(other[3]), "what it did not use before is not owed to it now");
}

#[test]
fn a_flood_does_not_fill_the_queue_for_others() {
    let mut world = World::with(EngineConfig { queue_max: 4, ..one_at_a_time() }, 1, 64);
    let flood: Vec<_> = (1..=8).map(|number| world.submit(of(1, number, 5))).collect();
    let other = world.submit(of(2, 100, 5));
    world.run();
    assert_eq!(world.heard(other).tokens.len(), 5);
    let refused = flood.iter().filter(|id| world.heard(**id).tokens.is_empty()).count();
    assert_eq!(refused, 4, "three that did not fit, and one that gave its place up");
}

#[test]
fn without_keys_arrival_decides() {
    let mut world = World::with(one_at_a_time(), 1, 64);
    let ids: Vec<_> = (1..=6)
        .map(|number| world.submit(submit(number, prompt(20, number as u32), 7 - number as u32)))
        .collect();
    world.run();
    assert!(ids.is_sorted_by_key(|id| world.heard(*id).first_token_at));
}

#[test]
fn a_key_holds_no_more_of_the_cache_than_its_share_and_others_pass_it() {
    let mut world = World::with(config(), 1, 64);
    world.send(Event::KvShares(BTreeMap::from([(KeyId(1), 25)])));
    // Five blocks each at the end: three fit into a quarter of 64.
    let greedy: Vec<_> = (1..=8).map(|number| world.submit(of(1, number, 50))).collect();
    let other = world.submit(of(2, 100, 50));
    while world.engine.counters().running < 4 {
        assert!(world.advance());
    }
    assert_eq!(world.engine.counters().waiting, 5, "the other one has passed them");
    assert_eq!(world.engine.in_progress(KeyId(1)), 8);
    world.run();
    assert!(greedy.iter().all(|id| world.heard(*id).tokens.len() == 50));
    assert!(world.heard(other).first_token_at < world.heard(greedy[3]).first_token_at);
    let generated = world.engine.take_generated();
    assert_eq!(generated, BTreeMap::from([(KeyId(1), 400), (KeyId(2), 50)]));
    assert!(world.engine.take_generated().is_empty());
}

#[test]
fn a_sequence_larger_than_the_share_of_its_key_runs_alone() {
    let mut world = World::with(config(), 1, 64);
    world.send(Event::KvShares(BTreeMap::from([(KeyId(1), 1)])));
    let ids = [1, 2].map(|number| world.submit(of(1, number, 30)));
    assert_eq!(world.engine.counters().running, 1);
    world.run();
    assert!(ids.iter().all(|id| world.heard(*id).tokens.len() == 30));
}

#[test]
fn whoever_would_wait_too_long_is_told_at_once_and_when_to_come_back() {
    let mut world = World::with(EngineConfig { queue_wait_ms_max: 2_000, ..one_at_a_time() }, 1, 64);
    // Each takes some 100 ms: before any has ended nobody knows.
    let first: Vec<_> = (1..=60).map(|number| world.submit(of(1, number, 10))).collect();
    while world.engine.counters().waiting > 35 {
        assert!(world.advance());
    }
    let late = world.submit(of(1, 1000, 10));
    let refused = world.failure(late);
    assert_eq!(refused.kind, FailureKind::Overloaded);
    assert!(refused.retry_after_ms.is_some_and(|ms| (1_000..=60_000).contains(&ms)), "{refused:?}");
    let urgent = world.submit(of(2, 2000, 10));
    world.run();
    assert!(first.iter().chain([&urgent]).all(|id| world.heard(*id).tokens.len() == 10));
    let later = world.submit(of(1, 3000, 10));
    world.run();
    assert_eq!(world.heard(later).tokens.len(), 10);
}
