//! When a training step counts: every reachable state within the bounds, and what each rule is for.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_protocol_model::checker::{Counterexample, explore};
use ashlar_protocol_model::vote::{Rules, Vote};

const STATES_MAX: usize = 1_500_000;

fn model() -> Vote {
    Vote { ranks: 2, steps: 3, faults: 1, copies: true, forgets: false, rules: Rules::ALL }
}

fn holds(what: &str, model: Vote) {
    match explore(&model, STATES_MAX) {
        Ok(explored) => println!("vote, {what}, faults: {}: {explored}", model.faults),
        Err(found) => panic!("{found}"),
    }
}

#[test]
fn a_committed_step_is_prepared_everywhere_and_computed_once_more_at_most() {
    holds("two ranks, three steps, all kinds", model());
    holds("two ranks, two steps, no copies", Vote { steps: 2, faults: 2, copies: false, ..model() });
}

#[test]
fn three_ranks_agree_too() {
    holds("three ranks, one step, no copies", Vote { ranks: 3, steps: 1, copies: false, ..model() });
}

fn found_with(model: Vote) -> Counterexample {
    let explored = explore(&model, STATES_MAX);
    let found = explored.map(|explored| explored.to_string()).expect_err("the checker did not notice");
    println!("{found}\n");
    found
}

fn found_without(rules: Rules) -> Counterexample {
    found_with(Vote { rules, ..model() })
}

#[test]
fn a_step_with_one_vote_is_committed_too_soon() {
    let found = found_without(Rules { needs_all_votes: false, ..Rules::ALL });
    assert_eq!(found.what, "a step is committed that not every rank has prepared");
}

#[test]
fn without_waiting_for_the_record_two_committed_steps_are_lost() {
    let found = found_without(Rules { one_ahead: false, ..Rules::ALL });
    assert_eq!(found.what, "a leader is more than a step ahead of its record");
}

#[test]
fn a_state_that_is_deleted_before_the_next_record_is_durable_is_missed() {
    let found = found_without(Rules { deletes_after: false, ..Rules::ALL });
    assert_eq!(found.what, "the durable record names a state that is not there");
}

#[test]
fn without_a_claim_a_former_leader_deletes_what_its_successor_goes_on_from() {
    let found = found_without(Rules { claims: false, ..Rules::ALL });
    assert_eq!(found.what, "a session is to go on from a state that is not there");
}

#[test]
fn a_rank_that_computes_whatever_it_is_told_computes_a_step_twice() {
    let found = found_without(Rules { in_step: false, ..Rules::ALL });
    assert_eq!(found.what, "a rank has computed a step twice, or not at all");
}

/// What the protocol does not promise: Redis may forget a write that it has answered. The state before is deleted by then.
#[test]
fn a_store_that_forgets_a_jobs_latest_record_costs_the_job_its_state() {
    let found = found_with(Vote { forgets: true, ..model() });
    assert_eq!(found.what, "the durable record names a state that is not there");
}

/// What it would take to promise that.
#[test]
fn with_one_more_state_kept_a_forgotten_record_costs_two_steps() {
    let rules = Rules { keeps_one_more: true, ..Rules::ALL };
    holds("one more state kept, a store that forgets", Vote { forgets: true, rules, ..model() });
}
