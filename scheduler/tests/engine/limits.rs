//! What is refused, what waits, and who goes first.

use crate::rank::oracle;
use crate::world::{EngineConfig, World, config, prompt, submit};
use ashlar_protocol::serving::FailureKind;

fn urgent(number: u128, priority: i32) -> ashlar_protocol::serving::Submit {
    let mut asked = submit(number, prompt(20, number as u32), 3);
    asked.priority = priority;
    asked
}

#[test]
fn a_full_queue_refuses_with_a_time_to_retry() {
    let mut world = World::with(EngineConfig { max_num_seqs: 1, queue_max: 2, ..config() }, 1, 64);
    let ids: Vec<_> = (1..=4).map(|number| world.submit(urgent(number, 0))).collect();
    let refused = world.failure(ids[3]);
    assert_eq!(refused.kind, FailureKind::Overloaded);
    assert!(refused.retry_after_ms.is_some_and(|ms| ms >= 1000));
    let counters = world.engine.counters();
    assert_eq!((counters.shed, counters.shedding), (1, true));
    world.run();
    assert!(ids[..3].iter().all(|id| world.heard(*id).tokens.len() == 3));
}

#[test]
fn an_urgent_request_displaces_the_least_urgent_one_of_a_full_queue() {
    let mut world = World::with(EngineConfig { max_num_seqs: 1, queue_max: 2, ..config() }, 1, 64);
    let running = world.submit(urgent(1, 5));
    let (first, last) = (world.submit(urgent(2, 5)), world.submit(urgent(3, 5)));
    let urgent = world.submit(urgent(4, 0));
    assert_eq!(world.failure(last).kind, FailureKind::Overloaded);
    world.run();
    assert!([running, first, urgent].iter().all(|id| world.heard(*id).tokens.len() == 3));
}

#[test]
fn priority_goes_before_arrival() {
    let mut world = World::with(EngineConfig { max_num_seqs: 1, ..config() }, 1, 64);
    let ids: Vec<_> = [(1, 0), (2, 1), (3, 0), (4, -1)].map(|(n, p)| world.submit(urgent(n, p))).into();
    world.run();
    let mut order = ids.clone();
    order.sort_by_key(|id| world.heard(*id).first_token_at);
    assert_eq!(order, [ids[0], ids[3], ids[2], ids[1]]);
}

#[test]
fn a_prompt_that_can_never_fit_is_invalid() {
    let mut world = World::with(config(), 1, 8);
    let context = world.submit(submit(1, prompt(2048, 1), 1));
    let empty = world.submit(submit(2, vec![], 1));
    let cache = world.submit(submit(3, prompt(128, 1), 1));
    for id in [context, empty, cache] {
        assert_eq!(world.failure(id).kind, FailureKind::Invalid, "{id:?}");
    }
}

#[test]
fn an_answer_longer_than_the_kv_cache_ends_where_it_is_full() {
    let mut world = World::with(config(), 1, 8);
    let id = world.submit(submit(1, prompt(100, 1), 1000));
    world.run();
    assert_eq!(world.heard(id).tokens, oracle(&prompt(100, 1), 1, 28));
}

#[test]
fn counters_say_what_was_done() {
    let mut world = World::with(config(), 1, 64);
    world.submit(submit(1, prompt(40, 1), 5));
    world.run();
    let counters = world.engine.counters();
    assert_eq!((counters.running, counters.waiting, counters.generated_tokens), (0, 0, 5));
    assert_eq!((counters.prefix_cache_queries, counters.scheduled_tokens), (40, 44));
    assert!(counters.steps >= 5);
}
