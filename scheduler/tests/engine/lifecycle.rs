//! The life of one choice, and every way it can end.

use crate::rank::oracle;
use crate::world::{DIGEST, End, GATEWAY, World, choice, config, prompt, submit};
use ashlar_protocol::serving::{FailureKind, FinishReason};
use ashlar_protocol::step::{SampledToken, StepResult, StepTiming};
use ashlar_scheduler::engine::{Event, GatewayId};
use ashlar_vocabulary::{LeaseTerm, ModelDigest, ReplicaId, ReplicaRevision, SequenceId, StepId};

fn world() -> World {
    World::with(config(), 1, 256)
}

fn result(step: u64, sampled: Vec<SampledToken>) -> StepResult {
    StepResult {
        term: LeaseTerm(1),
        revision: ReplicaRevision(1),
        step: StepId(step),
        sampled,
        prompt_logprobs: Vec::new(),
        failed: Vec::new(),
        timing: StepTiming::default(),
    }
}

fn token(sequence: u64, position: u32, token: u32) -> SampledToken {
    SampledToken { id: SequenceId(sequence), position, token, logprobs: None, grammar_complete: false }
}

fn answer(world: &mut World, result: StepResult) {
    world.send(Event::StepResult { replica: ReplicaId(0), result });
}

#[test]
fn a_choice_is_generated_token_by_token_and_finishes_at_its_length() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(40, 1), 10));
    world.run();
    let heard = world.heard(id);
    assert_eq!(heard.tokens, oracle(&prompt(40, 1), 1, 10));
    assert_eq!(heard.indices, (0..10).collect::<Vec<u32>>());
    let receipt = world.receipt(id);
    assert!(matches!(heard.end, Some(End::Finished(FinishReason::Length, _))));
    assert_eq!((receipt.prompt_tokens, receipt.generated_tokens, receipt.cached_tokens), (40, 10, 0));
    assert_eq!((receipt.queue_ms, receipt.prefill_ms, receipt.decode_ms), (0, 10, 90));
    assert!(world.engine.is_idle());
    assert_eq!(world.replica().rank.known(), 0, "ranks are told even when nothing follows");
}

#[test]
fn a_stop_token_is_delivered_and_ends_the_answer() {
    let mut world = world();
    let expected = oracle(&prompt(5, 1), 1, 4);
    let mut asked = submit(1, prompt(5, 1), 100);
    asked.stop_tokens = vec![expected[3]];
    let id = world.submit(asked);
    world.run();
    assert_eq!(world.heard(id).tokens, expected);
    assert!(matches!(world.heard(id).end, Some(End::Finished(FinishReason::Stop, _))));
}

#[test]
fn a_complete_grammar_ends_the_answer() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(5, 1), 100));
    answer(&mut world, result(1, vec![SampledToken { grammar_complete: true, ..token(1, 5, 9) }]));
    assert_eq!(world.heard(id).tokens, [9]);
    assert!(matches!(world.heard(id).end, Some(End::Finished(FinishReason::Stop, _))));
}

#[test]
fn the_context_ends_an_answer_that_has_no_other_limit() {
    let mut world = World::with(crate::world::EngineConfig { max_context_tokens: 48, ..config() }, 1, 256);
    let id = world.submit(submit(1, prompt(40, 1), u32::MAX));
    world.run();
    assert_eq!(world.heard(id).tokens, oracle(&prompt(40, 1), 1, 8));
    assert!(matches!(world.heard(id).end, Some(End::Finished(FinishReason::Length, _))));
}

#[test]
fn a_replay_continues_at_the_next_index_and_samples_nothing_again() {
    let mut world = world();
    let expected = oracle(&prompt(40, 1), 1, 10);
    let mut asked = submit(1, prompt(40, 1), 10);
    asked.forced = expected[..7].to_vec();
    let id = world.submit(asked);
    world.run();
    assert_eq!(world.heard(id).tokens, expected[7..]);
    assert_eq!(world.heard(id).indices, [7, 8, 9]);
}

#[test]
fn a_replay_of_a_complete_answer_finishes_at_once() {
    let mut world = world();
    let mut asked = submit(1, prompt(40, 1), 3);
    asked.forced = vec![1, 2, 3];
    let id = world.submit(asked);
    assert!(matches!(world.heard(id).end, Some(End::Finished(FinishReason::Length, _))));
    assert!(world.heard(id).tokens.is_empty());
}

#[test]
fn a_repeated_submission_is_ignored_before_and_after_the_end() {
    let mut world = world();
    let asked = submit(1, prompt(40, 1), 4);
    let id = world.submit(asked.clone());
    world.submit(asked.clone());
    world.run();
    world.submit(asked);
    world.run();
    assert_eq!(world.heard(id).tokens.len(), 4);
}

#[test]
fn a_submission_from_a_new_connection_takes_the_choice_over() {
    let mut world = world();
    let asked = submit(1, prompt(40, 1), 4);
    world.send(Event::Submit { gateway: GatewayId(9), submit: Box::new(asked.clone()) });
    let id = world.submit(asked);
    world.send(Event::GatewayGone { gateway: GatewayId(9) });
    world.run();
    assert_eq!(world.heard(id).tokens.len(), 4);
}

#[test]
fn a_cancelled_choice_falls_silent_and_frees_its_blocks_before_its_step_returns() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(40, 1), 100));
    world.advance();
    let before = world.heard(id).tokens.len();
    world.send(Event::Cancel { gateway: GATEWAY, id });
    assert_eq!(world.engine.replica(ReplicaId(0)).map(|replica| replica.pool.held()), Some(0));
    world.run();
    assert_eq!(world.heard(id).tokens.len(), before);
    assert_eq!(world.heard(id).end, None);
    assert_eq!(world.replica().rank.known(), 0);
}

#[test]
fn only_the_gateway_that_submitted_a_choice_may_cancel_it() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(40, 1), 4));
    world.send(Event::Cancel { gateway: GatewayId(9), id });
    world.run();
    assert_eq!(world.heard(id).tokens.len(), 4);
}

#[test]
fn a_gateway_that_is_gone_takes_its_choices_with_it() {
    let mut world = world();
    for number in 1..30 {
        world.submit(submit(number, prompt(40, number as u32), 100));
    }
    world.advance();
    world.send(Event::GatewayGone { gateway: GATEWAY });
    assert!(world.engine.is_idle());
    world.run();
    assert_eq!(world.replica().rank.known(), 0);
}

#[test]
fn a_deadline_ends_running_and_waiting_choices() {
    let mut world = World::with(crate::world::EngineConfig { max_num_seqs: 1, ..config() }, 1, 256);
    let late = |number| {
        let mut asked = submit(number, prompt(40, number as u32), 1000);
        asked.deadline_ms = 50;
        asked
    };
    let (running, waiting) = (world.submit(late(1)), world.submit(late(2)));
    while world.now < 50 && world.advance() {}
    world.wait(1);
    for id in [running, waiting] {
        assert_eq!(world.failure(id).kind, FailureKind::DeadlineExceeded);
        assert!(world.failure(id).message.contains("50 ms"));
    }
    assert!(world.engine.is_idle());
}

#[test]
fn a_sequence_that_fails_fails_alone_and_leaves_nothing_to_hit() {
    let mut world = world();
    let (bad, good) = (world.submit(submit(1, prompt(40, 1), 5)), world.submit(submit(2, prompt(40, 2), 5)));
    world.replica().rank.poison = Some(SequenceId(1));
    world.run();
    // The first step was executed when it was sent; the poison hits a later one.
    assert_eq!(world.failure(bad).kind, FailureKind::Internal);
    assert!(world.failure(bad).message.contains("not finite"));
    assert_eq!(world.heard(good).tokens, oracle(&prompt(40, 2), 2, 5));
    let again = world.submit(submit(3, prompt(40, 1), 5));
    world.run();
    assert_eq!(world.receipt(again).cached_tokens, 0);
}

#[test]
fn a_step_answered_without_a_token_fails_the_sequence() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(5, 1), 5));
    answer(&mut world, result(1, vec![]));
    assert_eq!(world.failure(id).kind, FailureKind::Internal);
}

#[test]
fn a_token_at_the_wrong_position_fails_the_sequence() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(5, 1), 5));
    answer(&mut world, result(1, vec![token(1, 6, 9)]));
    assert_eq!(world.failure(id).kind, FailureKind::Internal);
    assert!(world.heard(id).tokens.is_empty());
}

#[test]
fn stale_and_repeated_results_change_nothing() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(5, 1), 5));
    let good = result(1, vec![token(1, 5, 9)]);
    answer(&mut world, StepResult { term: LeaseTerm(0), ..good.clone() });
    answer(&mut world, StepResult { revision: ReplicaRevision(7), ..good.clone() });
    assert!(world.heard(id).tokens.is_empty());
    answer(&mut world, good.clone());
    answer(&mut world, good);
    assert_eq!(world.heard(id).tokens, [9]);
}

#[test]
fn a_lost_result_gives_the_replica_up() {
    let mut world = World::with(config(), 3, 256);
    let first = world.submit(submit(1, prompt(5, 1), 5));
    let second = world.submit(submit(2, prompt(5, 2), 5));
    answer(&mut world, result(2, vec![token(2, 5, 9)]));
    assert_eq!(world.faults.len(), 1);
    assert!(world.engine.replica(ReplicaId(0)).is_none());
    for id in [first, second] {
        assert_eq!(world.heard(id).end, None, "it waits for the replica to come back");
    }
}

#[test]
fn a_step_that_is_never_answered_gives_the_replica_up() {
    let mut world = world();
    let id = world.submit(submit(1, prompt(5, 1), 5));
    world.wait(4_900);
    assert!(world.faults.is_empty());
    world.wait(200);
    assert_eq!(world.faults, ["a step was never answered"]);
    assert_eq!(world.heard(id).end, None);
}

#[test]
fn draining_refuses_the_new_and_finishes_the_old() {
    let mut world = world();
    let old = world.submit(submit(1, prompt(40, 1), 5));
    world.send(Event::Drain);
    let new = world.submit(submit(2, prompt(40, 1), 5));
    assert_eq!(world.failure(new).kind, FailureKind::Leaving, "the next scheduler takes it");
    world.run();
    assert_eq!(world.heard(old).tokens.len(), 5);
}

#[test]
fn another_model_is_unknown() {
    let mut world = world();
    let mut asked = submit(1, prompt(40, 1), 5);
    asked.model_digest = ModelDigest([8; 32]);
    assert_ne!(asked.model_digest, DIGEST);
    let id = world.submit(asked);
    assert_eq!(world.failure(id).kind, FailureKind::UnknownModel);
}

#[test]
fn scoring_a_prompt_computes_all_of_it_and_delivers_no_token() {
    let mut world = world();
    let first = world.submit(submit(1, prompt(40, 1), 1));
    world.run();
    assert_eq!(world.heard(first).tokens.len(), 1);
    let mut asked = submit(2, prompt(40, 1), 0);
    asked.sampling.prompt_logprobs = true;
    let id = world.submit(asked);
    world.run();
    assert_eq!(world.receipt(id).cached_tokens, 0);
    assert!(world.heard(id).tokens.is_empty());
    assert_eq!(world.heard(choice(2)).end, Some(End::Finished(FinishReason::Length, world.receipt(id))));
}

#[test]
fn prompt_logprobs_are_delivered_once_and_in_order() {
    let mut world = world();
    let mut asked = submit(1, prompt(4, 1), 3);
    asked.sampling.prompt_logprobs = true;
    let id = world.submit(asked);
    let logprobs = |position: u32, count: usize| ashlar_protocol::step::PromptLogprobs {
        id: SequenceId(1),
        position,
        logprobs: vec![ashlar_vocabulary::TokenLogprobs { logprob: -1.0, top: vec![] }; count],
    };
    let mut first = result(1, vec![token(1, 4, 9)]);
    first.prompt_logprobs = vec![logprobs(1, 2), logprobs(1, 3)];
    answer(&mut world, first.clone());
    assert_eq!(world.heard(id).prompt_logprobs, [1, 2, 3]);
    // The prompt is computed again where its replica was lost.
    world.down(0, "node b was lost");
    world.up(0, 1, 256);
    first.sampled = vec![token(1, 5, 9)];
    answer(&mut world, first);
    assert_eq!(world.heard(id).prompt_logprobs, [1, 2, 3]);
    assert_eq!(world.heard(id).tokens, [9, 9]);
}
