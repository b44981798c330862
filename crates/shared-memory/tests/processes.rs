//! Two real processes: this test starts itself again as the second rank.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_shared_memory::{Attendant, Exchange, Geometry, HandoverError, Offer, SLOT_VALUES, Token, attach};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 2000;
/// Tells the second process the socket's name and its token.
const OFFER: &str = "ASHLAR_TEST_OFFER";

fn own(rank: usize, round: usize) -> Vec<f32> {
    (0..round * 97 % 3000).map(|index| (rank * 1_000_000 + round * 3000 + index) as f32).collect()
}

/// This test again, as another process that runs `test` alone and knows the offer.
fn process(test: &str, offer: &Offer) -> Command {
    let token = u128::from_be_bytes(offer.token(1).unwrap().to_bytes());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([test, "--exact"])
        .env(OFFER, format!("{} {token:032x}", offer.name()))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// What the other process was told.
fn told() -> Option<(String, Token)> {
    let offer = std::env::var(OFFER).ok()?;
    let (name, token) = offer.split_once(' ').unwrap();
    let token = u128::from_str_radix(token, 16).unwrap().to_be_bytes();
    Some((name.to_owned(), Token::from_bytes(token)))
}

/// Gives up after a second.
struct Patience(Instant);

impl Attendant for Patience {
    fn waiting(&mut self) -> Result<(), String> {
        if self.0.elapsed() < Duration::from_secs(1) { Ok(()) } else { Err("a second has passed".into()) }
    }
}

/// Not a test of its own: what the second process runs.
#[test]
fn second_rank() {
    let Some((name, token)) = told() else { return };
    let memory = attach(&name, token, 1, Geometry::new(2, SLOT_VALUES).unwrap()).unwrap();
    let mut exchange = Exchange::new(memory, Duration::from_micros(20));
    for round in 0..ROUNDS {
        let own = own(1, round);
        let mut all = vec![0.0; 2 * own.len()];
        exchange.all_gather(round as u64, &own, &mut all, &mut ()).unwrap();
    }
    // Dies in the middle, without a word.
    std::process::abort();
}

#[test]
fn two_processes_exchange_exactly_and_a_dead_one_is_not_waited_for_for_ever() {
    let mut offer = Offer::new(Geometry::new(2, SLOT_VALUES).unwrap()).unwrap();
    let mut second = process("second_rank", &offer).spawn().unwrap();
    let limit = Instant::now() + Duration::from_secs(20);
    while !offer.has_given(1) {
        assert!(Instant::now() < limit, "the second process did not come");
        offer.serve_one().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut exchange = Exchange::new(offer.into_memory(), Duration::from_micros(20));
    for round in 0..ROUNDS {
        let first = own(0, round);
        let mut all = vec![0.0; 2 * first.len()];
        exchange.all_gather(round as u64, &first, &mut all, &mut ()).unwrap();
        assert_eq!(all, [first, own(1, round)].concat(), "round {round}");
    }
    assert!(!second.wait().unwrap().success());
    let error = exchange.all_gather(0, &[0.0], &mut [0.0; 2], &mut Patience(Instant::now())).unwrap_err();
    assert_eq!(error.rank(), 1, "{error}");
}

/// Not a test of its own: what a process of another user runs.
#[test]
fn another_user() {
    let Some((name, token)) = told() else { return };
    assert!(attach(&name, token, 1, Geometry::new(2, SLOT_VALUES).unwrap()).is_err());
}

#[test]
fn a_process_of_another_user_does_not_get_the_memory_even_with_the_token() {
    const NOBODY: u32 = 65_534;
    let mut offer = Offer::new(Geometry::new(2, SLOT_VALUES).unwrap()).unwrap();
    let Ok(mut other) = process("another_user", &offer).uid(NOBODY).spawn() else {
        return eprintln!("SKIPPED: this user cannot start processes of another one");
    };
    let limit = Instant::now() + Duration::from_secs(20);
    let refused = loop {
        assert!(Instant::now() < limit, "the other process did not come");
        match offer.serve_one() {
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
            Ok(Some(rank)) => panic!("rank {rank} got the memory"),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, HandoverError::User { theirs: NOBODY, .. }), "{refused}");
    assert!(other.wait().unwrap().success());
    assert!(!offer.has_given(1));
}
