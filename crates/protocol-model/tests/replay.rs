//! What a client receives: every reachable state within the bounds, and what each rule is for.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_protocol_model::checker::{Counterexample, explore};
use ashlar_protocol_model::replay::{Replay, Rules};

const STATES_MAX: usize = 1_500_000;

fn model(faults: u8) -> Replay {
    Replay { tokens: 3, faults, rules: Rules::ALL }
}

#[test]
fn a_stream_says_what_an_undisturbed_one_says_whatever_is_lost() {
    let faults = std::env::var("ASHLAR_FAULTS").ok().and_then(|faults| faults.parse().ok()).unwrap_or(2);
    let explored = explore(&model(faults), STATES_MAX).unwrap_or_else(|found| panic!("{found}"));
    println!("replay, 3 tokens, {faults} faults: {explored}");
}

fn found_without(rules: Rules) -> Counterexample {
    let explored = explore(&Replay { rules, ..model(2) }, STATES_MAX);
    let found = explored.map(|explored| explored.to_string()).expect_err("the checker did not notice");
    println!("{found}\n");
    found
}

#[test]
fn a_gateway_that_takes_any_index_repeats_tokens() {
    let found = found_without(Rules { index_counts: false, ..Rules::ALL });
    assert!(found.what.contains("received"), "{found}");
}

#[test]
fn a_sequence_that_counts_from_zero_behind_forced_tokens_loses_some() {
    let found = found_without(Rules { counts_forced: false, ..Rules::ALL });
    assert!(found.what.contains("received"), "{found}");
}

#[test]
fn a_sequence_that_forgets_what_was_delivered_says_something_else() {
    let found = found_without(Rules { forces_delivered: false, ..Rules::ALL });
    assert!(found.what.contains("received"), "{found}");
}

#[test]
fn results_of_former_layouts_disturb_a_sequence() {
    let found = found_without(Rules { drops_stale_results: false, ..Rules::ALL });
    assert_eq!(found.what, "a rank sampled another position than the sequence is at");
}

#[test]
fn a_choice_that_is_not_submitted_again_never_ends() {
    let found = found_without(Rules { resubmits: false, ..Rules::ALL });
    assert!(found.what.contains("never recovers"), "{found}");
}
