//! Steps in flight: every stage works, one sequence alone is not slowed down, decodes are not held up by prompts.

use crate::world::{EngineConfig, World, config, prompt, submit};

fn tokens_per_second(stages: usize, sequences: u128) -> f64 {
    let mut world = World::with(config(), stages, 1024);
    for number in 1..=sequences {
        world.submit(submit(number, prompt(8, number as u32), 200));
    }
    world.run();
    (sequences * 200) as f64 * 1000.0 / world.now as f64
}

#[test]
fn one_sequence_has_one_step_in_flight_whatever_the_number_of_stages() {
    for stages in [1, 2, 4] {
        let mut world = World::with(config(), stages, 64);
        world.submit(submit(1, prompt(8, 1), 50));
        world.run();
        assert_eq!(world.replica().in_flight_most, 1);
        // 50 sampling steps, each through all stages, and one that tells of the end.
        assert_eq!(world.now, 51 * 10 * stages as u64);
    }
}

#[test]
fn several_sequences_keep_all_stages_at_work() {
    // A stage takes 10 ms: 100 steps per second, if it never idles.
    for stages in [2, 4] {
        let per_second = tokens_per_second(stages, 8);
        let best = 100.0 * 8.0 / stages as f64;
        assert!(per_second > 0.9 * best, "{stages} stages: {per_second} of {best} tokens/s");
    }
}

#[test]
fn a_single_stage_decodes_everybody_in_one_step() {
    let per_second = tokens_per_second(1, 8);
    assert!(per_second > 0.9 * 800.0, "{per_second} tokens/s");
}

#[test]
fn sequences_that_arrive_apart_come_to_share_steps() {
    for stages in [1, 2] {
        let mut world = World::with(config(), stages, 1024);
        for number in 1..=8 {
            world.submit(submit(number, prompt(8, number as u32), 100));
            world.advance();
        }
        world.run();
        let steps = world.replica().plans.len();
        let best = 100 * stages;
        assert!(steps < best + best / 4 + 20, "{stages} stages: {steps} steps, {best} would do");
    }
}

#[test]
fn a_long_prompt_fills_the_pipeline_with_chunks() {
    let mut world = World::with(config(), 4, 256);
    world.submit(submit(1, prompt(1200, 1), 1));
    assert_eq!(world.replica().in_flight_most, 5);
    world.run();
}

#[test]
fn a_long_prompt_in_a_single_stage_leaves_no_pause_between_chunks() {
    let mut world = World::with(config(), 1, 256);
    world.submit(submit(1, prompt(1200, 1), 1));
    assert_eq!(world.replica().in_flight_most, 2);
    world.run();
    let steps = world.replica().plans.len() as u64;
    assert_eq!(world.now, steps * 10);
}

#[test]
fn decodes_go_on_while_a_long_prompt_is_computed() {
    let mut world = World::with(EngineConfig { max_num_batched_tokens: 64, ..config() }, 1, 256);
    let steady = world.submit(submit(1, prompt(8, 1), 100));
    for _ in 0..10 {
        world.advance();
    }
    let before = world.heard(steady).tokens.len();
    let long = world.submit(submit(2, prompt(1000, 2), 1));
    let mut steps = 0;
    while world.heard(long).tokens.is_empty() && world.advance() {
        steps += 1;
    }
    assert!(steps >= 1000 / 64);
    assert!(world.heard(steady).tokens.len() >= before + steps - 1, "one token in each of {steps} steps");
}

#[test]
fn no_step_is_predicted_to_take_longer_than_the_target() {
    // 0.1 ms per row: 20 ms are 200 rows.
    let mut world = World::with(EngineConfig { step_target_ms: 20, ..config() }, 1, 256);
    world.submit(submit(1, prompt(1000, 1), 1));
    world.run();
    let rows = |plan: &ashlar_protocol::step::StepPlan| plan.slices.iter().map(|slice| slice.count).sum();
    let largest: u32 = world.replica().plans.iter().map(rows).max().unwrap_or(0);
    assert!((150..=200).contains(&largest), "{largest} rows");
}

#[test]
fn a_prompt_gets_its_chunk_even_where_decodes_fill_the_target() {
    let tight = EngineConfig { step_target_ms: 1, max_num_seqs: 16, ..config() };
    let mut world = World::with(tight, 1, 512);
    for number in 1..=15 {
        world.submit(submit(number, prompt(8, number as u32), 400));
    }
    for _ in 0..20 {
        world.advance();
    }
    let long = world.submit(submit(99, prompt(300, 99), 1));
    for _ in 0..60 {
        world.advance();
    }
    assert_eq!(world.heard(long).tokens.len(), 1);
}
