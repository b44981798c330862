//! Ranks as threads: every contribution arrives exactly, in rank order, whatever the lengths and the pace.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_shared_memory::{Attendant, Exchange, ExchangeError, Geometry, Offer, attach};
use std::time::{Duration, Instant};

/// Small, so that most contributions need several exchanges.
const SLOT: usize = 256;

/// A group whose memory has been handed over.
fn group(ranks: usize, spin: Duration) -> Vec<Exchange> {
    let geometry = Geometry::new(ranks, SLOT).unwrap();
    let mut offer = Offer::new(geometry).unwrap();
    let mut exchanges: Vec<Exchange> = (1..ranks)
        .map(|rank| {
            let (name, token) = (offer.name().to_owned(), offer.token(rank).unwrap());
            let attaching = std::thread::spawn(move || {
                Exchange::new(attach(&name, token, rank, geometry).unwrap(), spin)
            });
            while !offer.has_given(rank) {
                offer.serve_one().unwrap();
                std::thread::yield_now();
            }
            attaching.join().unwrap()
        })
        .collect();
    exchanges.insert(0, Exchange::new(offer.into_memory(), spin));
    exchanges
}

/// Small and good enough.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Any bits: also those of numbers that are none.
fn value(round: usize, rank: usize, index: usize) -> f32 {
    f32::from_bits((round as u32).wrapping_mul(2_654_435_761) ^ ((rank as u32) << 28) ^ index as u32)
}

fn contribution(round: usize, rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|index| value(round, rank, index)).collect()
}

#[track_caller]
fn assert_contribution(round: usize, rank: usize, got: &[f32]) {
    for (index, got) in got.iter().enumerate() {
        assert_eq!(
            got.to_bits(),
            value(round, rank, index).to_bits(),
            "round {round} rank {rank} value {index}"
        );
    }
}

fn length(random: &mut Random) -> usize {
    match random.below(8) {
        0 => 0,
        1 => SLOT,
        2 => SLOT + 1,
        3 => random.below(10 * SLOT as u64) as usize,
        _ => random.below(SLOT as u64) as usize,
    }
}

fn exchange_randomly(mut exchange: Exchange, rounds: usize) {
    let (rank, ranks) = (exchange.rank(), exchange.size());
    // One seed for all: they must agree on what is exchanged. Another for the pace: there they must not.
    let (mut random, mut pace) = (Random(0x9e37_79b9_7f4a_7c15), Random(rank as u64 + 1));
    for round in 0..rounds {
        if pace.below(64) == 0 {
            std::thread::sleep(Duration::from_micros(pace.below(300)));
        }
        if random.below(4) > 0 {
            let length = length(&mut random);
            let mut all = vec![0.0; length * ranks];
            exchange.all_gather(round as u64, &contribution(round, rank, length), &mut all, &mut ()).unwrap();
            for (peer, got) in all.chunks(length.max(1)).enumerate() {
                assert_contribution(round, peer, got);
            }
        } else {
            let lengths: Vec<usize> = (0..ranks).map(|_| length(&mut random)).collect();
            let mut all = vec![0.0; if rank == 0 { lengths.iter().sum() } else { 0 }];
            let own = contribution(round, rank, lengths[rank]);
            exchange.gather(round as u64, &own, &lengths, &mut all, &mut ()).unwrap();
            let mut rest = all.as_slice();
            for (peer, &length) in lengths.iter().enumerate().filter(|_| rank == 0) {
                let (got, after) = rest.split_at(length);
                assert_contribution(round, peer, got);
                rest = after;
            }
        }
    }
}

#[test]
fn every_contribution_arrives_exactly_and_in_rank_order() {
    for ranks in [2, 3, 4, 8] {
        for spin in [Duration::ZERO, Duration::from_micros(50)] {
            std::thread::scope(|scope| {
                for exchange in group(ranks, spin) {
                    scope.spawn(move || exchange_randomly(exchange, 3000));
                }
            });
        }
    }
}

/// The n-th wait or publication ends the exchange.
struct GivesUp {
    publications: usize,
    waits: usize,
}

impl Attendant for GivesUp {
    fn publishing(&mut self) -> Result<(), String> {
        self.publications = self.publications.checked_sub(1).ok_or("enough published")?;
        Ok(())
    }

    fn waiting(&mut self) -> Result<(), String> {
        self.waits = self.waits.checked_sub(1).ok_or("enough waited")?;
        Ok(())
    }
}

#[test]
fn a_waiting_rank_asks_its_attendant_often_and_ends_when_it_gives_up() {
    let mut ranks = group(2, Duration::from_micros(10));
    let started = Instant::now();
    let mut attendant = GivesUp { publications: 5, waits: 3 };
    let error = ranks[0].all_gather(1, &[1.0], &mut [0.0; 2], &mut attendant).unwrap_err();
    assert_eq!(error, ExchangeError::GivenUp { rank: 1, reason: "enough waited".into() });
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    // What was left half-done is not gone on with.
    let again = ranks[0].all_gather(2, &[1.0], &mut [0.0; 2], &mut ()).unwrap_err();
    assert_eq!(again, ExchangeError::Broken { rank: 0 });
}

#[test]
fn an_alarm_ends_a_wait_at_once_and_every_later_exchange() {
    for spin in [Duration::ZERO, Duration::from_secs(60)] {
        let mut ranks = group(4, spin);
        let alarm = ranks[2].alarm();
        let (mut took, mut spent) = (Duration::MAX, Duration::MAX);
        for attempt in 0..5 {
            let mut fresh = group(4, spin).swap_remove(2);
            let alarm = fresh.alarm();
            let raising = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(20 + attempt));
                let at = Instant::now();
                alarm.raise(3, "its connection ended".into());
                at
            });
            let started = Instant::now();
            let error = fresh.all_gather(1, &[1.0], &mut [0.0; 4], &mut ()).unwrap_err();
            assert_eq!(error, ExchangeError::Lost { rank: 3, reason: "its connection ended".into() });
            took = took.min(raising.join().unwrap().elapsed());
            spent = spent.min(started.elapsed());
        }
        // The best of some: the machine may be busy, but the rank must not have slept its time out.
        assert!(took < Duration::from_millis(15), "woke after {took:?}");
        assert!(spent >= Duration::from_millis(20));
        alarm.raise(1, "first".into());
        alarm.raise(3, "second".into());
        let error = ranks[2].all_gather(1, &[1.0], &mut [0.0; 4], &mut ()).unwrap_err();
        assert_eq!(error.rank(), 1);
    }
}

#[test]
fn what_was_contributed_before_leaving_still_counts() {
    let mut ranks = group(2, Duration::ZERO);
    let mut second = ranks.pop().unwrap();
    let mut first = ranks.pop().unwrap();
    second.gather(1, &[2.0], &[1, 1], &mut [], &mut ()).unwrap();
    drop(second);
    let mut all = [0.0; 2];
    first.gather(1, &[1.0], &[1, 1], &mut all, &mut ()).unwrap();
    assert_eq!(all, [1.0, 2.0]);
}

#[test]
fn another_step_or_length_is_noticed() {
    for (label, length) in [(2, 3), (1, 4)] {
        let mut ranks = group(2, Duration::ZERO);
        let mut second = ranks.pop().unwrap();
        let other = std::thread::spawn(move || {
            second.all_gather(label, &vec![0.0; length], &mut vec![0.0; 2 * length], &mut ())
        });
        let error = ranks[0].all_gather(1, &[0.0; 3], &mut [0.0; 6], &mut ()).unwrap_err();
        assert_eq!(error, ExchangeError::Mismatch { rank: 1 });
        assert_eq!(other.join().unwrap().unwrap_err(), ExchangeError::Mismatch { rank: 0 });
    }
}

#[test]
fn buffers_that_do_not_fit_are_an_error_and_not_a_panic() {
    let shape = |done: Result<(), ExchangeError>| matches!(done, Err(ExchangeError::Shape { .. }));
    assert!(shape(group(2, Duration::ZERO)[0].all_gather(1, &[0.0; 3], &mut [0.0; 5], &mut ())));
    assert!(shape(group(2, Duration::ZERO)[0].gather(1, &[0.0; 3], &[2, 2], &mut [0.0; 9], &mut ())));
    assert!(shape(group(2, Duration::ZERO)[0].gather(1, &[0.0; 3], &[3], &mut [0.0; 9], &mut ())));
    assert!(shape(group(2, Duration::ZERO)[0].gather(1, &[0.0; 3], &[3, 3], &mut [0.0; 5], &mut ())));
    assert!(shape(group(2, Duration::ZERO)[0].gather(1, &[], &[0, usize::MAX], &mut [0.0; 5], &mut ())));
}

#[test]
fn an_attendant_may_end_an_exchange_before_its_contribution_is_published() {
    let mut ranks = group(2, Duration::ZERO);
    let mut attendant = GivesUp { publications: 0, waits: 9 };
    let error = ranks[1].all_gather(1, &[1.0], &mut [0.0; 2], &mut attendant).unwrap_err();
    assert_eq!(error, ExchangeError::GivenUp { rank: 1, reason: "enough published".into() });
    let mut attendant = GivesUp { publications: 9, waits: 2 };
    assert!(ranks[0].all_gather(1, &[1.0], &mut [0.0; 2], &mut attendant).is_err(), "nothing was published");
}
