//! Sequences with adapters: they wait for theirs, share steps with others, and never a block.

use crate::world::{End, World, config, prompt, submit};
use ashlar_protocol::serving::{ChoiceId, FailureKind};
use ashlar_scheduler::adapters::Users;
use ashlar_scheduler::engine::Event;
use ashlar_vocabulary::{AdapterId, BlobId, ReplicaId};

fn id(number: u8) -> AdapterId {
    AdapterId(BlobId([number; 32]))
}

/// Adapters 1 to 3 are known; none is loaded.
fn world() -> World {
    let mut world = World::with(config(), 1, 64);
    world.send(Event::AdaptersKnown([1, 2, 3].map(id).into()));
    world
}

fn resident(world: &mut World, adapter: u8) {
    world.send(Event::AdapterResident { replica: ReplicaId(0), adapter: id(adapter) });
}

fn ask(world: &mut World, number: u128, adapter: Option<u8>) -> ChoiceId {
    let mut asked = submit(number, prompt(64, 1), 4);
    asked.adapter = adapter.map(id);
    world.submit(asked)
}

#[test]
fn a_sequence_waits_for_its_adapter_and_holds_up_nobody() {
    let mut world = world();
    let waits = ask(&mut world, 1, Some(1));
    let too = ask(&mut world, 2, Some(1));
    let goes = ask(&mut world, 3, None);
    world.run();
    assert!(matches!(world.heard(goes).end, Some(End::Finished(..))));
    assert_eq!(world.wants, [(0, id(1))], "told once");
    resident(&mut world, 1);
    world.run();
    assert_eq!(world.receipt(waits).generated_tokens + world.receipt(too).generated_tokens, 8);
    let new = world.replica().plans.iter().flat_map(|plan| &plan.new_sequences);
    let mut adapters: Vec<_> = new.map(|new| new.adapter).collect();
    adapters.sort();
    assert_eq!(adapters, [None, Some(id(1)), Some(id(1))]);
}

#[test]
fn neither_the_model_nor_another_adapter_hits_the_blocks_of_an_adapter() {
    let mut world = world();
    resident(&mut world, 1);
    resident(&mut world, 2);
    for (number, adapter, cached) in
        [(1, None, 0), (2, Some(1), 0), (3, Some(2), 0), (4, Some(1), 48), (5, None, 48), (6, Some(2), 48)]
    {
        let asked = ask(&mut world, number, adapter);
        world.run();
        assert_eq!(world.receipt(asked).cached_tokens, cached, "{adapter:?}");
    }
}

#[test]
fn rows_of_one_adapter_are_neighbours_in_a_step() {
    let mut world = world();
    resident(&mut world, 1);
    resident(&mut world, 2);
    for (number, adapter) in (1..).zip([Some(2), None, Some(1), Some(2), None, Some(1)]) {
        let mut asked = submit(number, prompt(5, number as u32), 4);
        asked.adapter = adapter.map(id);
        world.submit(asked);
    }
    world.run();
    let known: std::collections::BTreeMap<_, _> = world
        .replica()
        .plans
        .iter()
        .flat_map(|plan| &plan.new_sequences)
        .map(|new| (new.id, new.adapter))
        .collect();
    for plan in &world.replica().plans {
        let adapters: Vec<_> = plan.slices.iter().map(|slice| known[&slice.id]).collect();
        assert!(adapters.is_sorted(), "{adapters:?}");
    }
}

#[test]
fn an_adapter_is_bound_from_the_first_step_of_a_sequence_to_its_end() {
    let mut world = world();
    let usage = |world: &World| world.engine.usage(ReplicaId(0), id(1));
    assert!(!usage(&world).wanted);
    let asked = ask(&mut world, 1, Some(1));
    assert!(usage(&world).wanted && !usage(&world).bound);
    resident(&mut world, 1);
    assert!(usage(&world).bound);
    world.run();
    assert!(matches!(world.heard(asked).end, Some(End::Finished(..))));
    assert!(!usage(&world).bound && !usage(&world).wanted);
    assert!(usage(&world).last.0 > 0, "its end counts as use");
}

#[test]
fn an_adapter_that_is_unknown_or_cannot_be_loaded_fails_its_requests_alone() {
    let mut world = world();
    let unknown = ask(&mut world, 1, Some(9));
    assert_eq!(world.failure(unknown).kind, FailureKind::UnknownModel);
    let (waits, other) = (ask(&mut world, 2, Some(1)), ask(&mut world, 3, Some(2)));
    let reason = "no room".to_owned();
    world.send(Event::AdapterFailed { replica: ReplicaId(0), adapter: id(1), reason });
    assert_eq!(world.failure(waits).kind, FailureKind::Unavailable);
    assert_eq!(world.heard(other).end, None);
    ask(&mut world, 4, Some(1));
    assert_eq!(world.wants.iter().filter(|(_, adapter)| *adapter == id(1)).count(), 2, "asked for again");
}
