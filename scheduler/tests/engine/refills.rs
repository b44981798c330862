//! One stage is lost with its node: it alone computes again what it had, and all goes on with the next token.

use crate::rank::oracle;
use crate::world::{World, config, prompt, submit};
use ashlar_protocol::step::SequenceSlice;
use ashlar_scheduler::engine::{BLOCK_TOKENS, EngineConfig};

const STAGES: usize = 3;
const BLOCKS: u32 = 256;

fn until_tokens(world: &mut World, number: u128, tokens: usize) {
    let id = crate::world::choice(number);
    while world.heard(id).tokens.len() < tokens {
        assert!(world.advance(), "tokens come");
    }
}

/// Rows that only some stages computed, and rows that all did.
fn rows(world: &mut World) -> (usize, usize) {
    let plans = &world.replica().plans;
    let rows = |slices: &[SequenceSlice]| slices.iter().map(|slice| slice.count as usize).sum::<usize>();
    let refilled = plans.iter().filter_map(|plan| plan.refill.as_ref()).map(|refill| rows(&refill.slices));
    (refilled.sum(), plans.iter().map(|plan| rows(&plan.slices)).sum())
}

#[test]
fn the_other_stages_compute_nothing_again_but_the_last_block() {
    for stage in 0..STAGES {
        let mut world = World::with(config(), STAGES, BLOCKS);
        let id = world.submit(submit(1, prompt(600, 1), 60));
        until_tokens(&mut world, 1, 20);
        world.replace(0, stage, (STAGES, BLOCKS));
        world.run();
        assert_eq!(world.heard(id).tokens, oracle(&prompt(600, 1), 1, 60));
        assert_eq!(world.receipt(id).replays, 1);
        let (refilled, others) = rows(&mut world);
        // The row of token 20 was on its way, and those of 17 to 19 had not been computed before.
        let known = 600 + 20;
        let full = (known - 1) / BLOCK_TOKENS * BLOCK_TOKENS;
        assert_eq!(refilled, full, "every full block, once");
        assert_eq!(others, known - full + 39, "what was in no full block, and the tokens to come");
        assert_eq!(world.engine.counters().refilled_tokens, full as u64);
    }
}

#[test]
fn what_several_share_is_filled_once() {
    let mut world = World::with(config(), STAGES, BLOCKS);
    let first = world.submit(submit(1, prompt(160, 1), 40));
    until_tokens(&mut world, 1, 2);
    let others: Vec<_> = (2..6).map(|number| world.submit(submit(number, prompt(160, 1), 40))).collect();
    until_tokens(&mut world, 5, 2);
    world.replace(0, 1, (STAGES, BLOCKS));
    world.run();
    for (number, id) in (1..).zip([vec![first], others].concat()) {
        assert_eq!(world.heard(id).tokens, oracle(&prompt(160, 1), number, 40));
    }
    let (refilled, _) = rows(&mut world);
    // Nine blocks of the prompt; each sequence may have filled one of its own.
    assert!((144..144 + 6 * 2 * BLOCK_TOKENS).contains(&refilled), "{refilled}");
}

#[test]
fn whoever_is_filled_again_goes_on_in_the_steps_that_fill_others() {
    let mut world = World::with(EngineConfig { max_num_batched_tokens: 32, ..config() }, STAGES, BLOCKS);
    world.submit(submit(1, prompt(1000, 1), 4));
    until_tokens(&mut world, 1, 1);
    let mut urgent = submit(2, prompt(20, 2), 30);
    urgent.priority = -1;
    world.submit(urgent);
    until_tokens(&mut world, 2, 1);
    world.replace(0, 2, (STAGES, BLOCKS));
    world.run();
    let finished = |world: &World, number| world.receipt(crate::world::choice(number));
    assert_eq!((finished(&world, 1).generated_tokens, finished(&world, 2).generated_tokens), (4, 30));
    let plans = &world.replica().plans;
    let both = plans.iter().filter(|plan| plan.refill.is_some() && !plan.slices.is_empty()).count();
    assert!(both >= 5, "{both} of {} steps", plans.len());
}

#[test]
fn those_who_came_later_do_not_overtake() {
    let mut world = World::with(EngineConfig { max_num_batched_tokens: 32, ..config() }, STAGES, BLOCKS);
    world.submit(submit(1, prompt(1000, 1), 4));
    until_tokens(&mut world, 1, 1);
    world.replace(0, 2, (STAGES, BLOCKS));
    let late: Vec<_> = (2..20).map(|number| world.submit(submit(number, prompt(200, 2), 4))).collect();
    until_tokens(&mut world, 1, 2);
    assert!(late.iter().all(|id| world.heard(*id).tokens.is_empty()));
    world.run();
    assert!(late.iter().all(|id| world.heard(*id).tokens.len() == 4));
}

#[test]
fn a_stage_that_is_lost_again_meanwhile_changes_nothing() {
    let mut world = World::with(EngineConfig { max_num_batched_tokens: 32, ..config() }, STAGES, BLOCKS);
    let id = world.submit(submit(1, prompt(400, 1), 30));
    until_tokens(&mut world, 1, 5);
    for stage in [1, 0, 2, 2] {
        world.replace(0, stage, (STAGES, BLOCKS));
        for _ in 0..4 {
            world.advance();
        }
    }
    world.run();
    assert_eq!(world.heard(id).tokens, oracle(&prompt(400, 1), 1, 30));
    assert_eq!(world.receipt(id).replays, 4);
}

#[test]
fn steps_that_hold_less_than_a_block_fill_it_in_parts() {
    let limits = EngineConfig { max_num_batched_tokens: 6, max_num_seqs: 4, ..config() };
    let mut world = World::with(limits, STAGES, BLOCKS);
    let id = world.submit(submit(1, prompt(100, 1), 10));
    until_tokens(&mut world, 1, 3);
    world.replace(0, 1, (STAGES, BLOCKS));
    world.run();
    assert_eq!(world.heard(id).tokens, oracle(&prompt(100, 1), 1, 10));
    assert_eq!(world.engine.counters().refilled_tokens, 96);
}
