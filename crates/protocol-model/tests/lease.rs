//! Who leads: every reachable state within the bounds, and what each rule is for.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_protocol_model::checker::{Counterexample, explore};
use ashlar_protocol_model::lease::{Kinds, Lease, Rules};

const STATES_MAX: usize = 1_500_000;

/// One fault of any kind but copies, two ranks, no gateway. `ASHLAR_FAULTS` widens what is explored.
fn model() -> Lease {
    let faults = std::env::var("ASHLAR_FAULTS").ok().and_then(|faults| faults.parse().ok()).unwrap_or(1);
    let kinds = Kinds { copies: false, ..Kinds::ALL };
    Lease { ranks: 2, faults, steps: 1, layouts: 6, gateway: false, kinds, rules: Rules::ALL }
}

fn holds(what: &str, model: Lease) {
    match explore(&model, STATES_MAX) {
        Ok(explored) => println!("lease, {what}, faults: {}: {explored}", model.faults),
        Err(found) => panic!("{found}"),
    }
}

#[test]
fn two_ranks_obey_one_leader_at_a_time_and_always_find_one_again() {
    holds("two ranks", model());
}

#[test]
fn two_faults_without_the_store_change_nothing_about_that() {
    let kinds = Kinds { schedulers: true, ranks: true, ..Kinds::NONE };
    holds("two ranks; schedulers, ranks", Lease { faults: 2, kinds, ..model() });
}

#[test]
fn three_ranks_and_a_gateway_find_the_same_leader() {
    let kinds = Kinds { schedulers: true, ranks: true, ..Kinds::NONE };
    holds("three ranks, gateway; schedulers, ranks", Lease { ranks: 3, gateway: true, kinds, ..model() });
}

#[test]
fn one_rank_and_a_gateway_do_so_with_two_faults_of_any_kind() {
    holds("one rank, gateway", Lease { ranks: 1, faults: 2, gateway: true, ..model() });
}

#[test]
fn steps_and_results_that_come_again_change_nothing() {
    let kinds = Kinds { copies: true, ..Kinds::NONE };
    holds("two ranks, two steps; copies", Lease { steps: 2, faults: 3, kinds, ..model() });
    let kinds = Kinds { copies: true, ranks: true, ..Kinds::NONE };
    holds("two ranks; copies, ranks", Lease { faults: 2, layouts: 3, kinds, ..model() });
}

fn found_without(rules: Rules, model: Lease) -> Counterexample {
    let explored = explore(&Lease { rules, ..model }, STATES_MAX);
    let found = explored.map(|explored| explored.to_string()).expect_err("the checker did not notice");
    println!("{found}\n");
    found
}

#[test]
fn without_the_holder_two_leaders_of_one_term_drive_the_ranks() {
    let kinds = Kinds { store: true, ..Kinds::NONE };
    let found = found_without(Rules { holder_counts: false, ..Rules::ALL }, Lease { kinds, ..model() });
    assert!(found.what.contains("two"), "{found}");
}

#[test]
fn without_the_term_a_former_leader_completes_a_step() {
    let kinds = Kinds { schedulers: true, ranks: true, ..Kinds::NONE };
    let model = Lease { faults: 2, kinds, ..model() };
    let found = found_without(Rules { term_counts: false, ..Rules::ALL }, model);
    assert_eq!(found.what, "a term completes a step after a higher one has");
}

#[test]
fn a_fence_that_is_not_durable_lets_a_second_holder_in() {
    let kinds = Kinds { store: true, ranks: true, ..Kinds::NONE };
    let model = Lease { ranks: 1, faults: 2, kinds, ..model() };
    let found = found_without(Rules { fence_is_durable: false, ..Rules::ALL }, model);
    assert!(found.what.contains("two"), "{found}");
}

#[test]
fn a_place_that_is_kept_serves_two_leaders() {
    let kinds = Kinds { store: true, ranks: true, ..Kinds::NONE };
    let model = Lease { faults: 2, kinds, ..model() };
    let found = found_without(Rules { place_is_left: false, ..Rules::ALL }, model);
    assert!(found.what.contains("two"), "{found}");
}

#[test]
fn a_leader_that_does_not_give_way_to_its_own_term_never_gets_on() {
    let kinds = Kinds { store: true, ..Kinds::NONE };
    let found = found_without(Rules { equal_terms_fence: false, ..Rules::ALL }, Lease { kinds, ..model() });
    assert!(found.what.contains("never recovers"), "{found}");
}

#[test]
fn a_store_that_forgets_grants_a_process_its_own_term_again() {
    let found = found_without(Rules { never_twice: false, ..Rules::ALL }, model());
    assert_eq!(found.what, "a process leads twice under one term");
}
