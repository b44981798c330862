//! Prints what an exchange costs; ignored, because it measures: `cargo test --release -p ashlar-shared-memory -- --ignored
//! --nocapture latency`.
#![allow(clippy::unwrap_used, missing_docs)]

use ashlar_shared_memory::{Exchange, Geometry, Offer, SLOT_VALUES, attach};
use std::time::{Duration, Instant};

#[test]
#[ignore = "measures; run it on a quiet machine"]
fn latency() {
    for spin_us in [0, 20, 200] {
        for bytes in [1 << 10, 8 << 10, 64 << 10, 1 << 20] {
            let mut offer = Offer::new(Geometry::new(2, SLOT_VALUES).unwrap()).unwrap();
            let (name, token, spin) =
                (offer.name().to_owned(), offer.token(1).unwrap(), Duration::from_micros(spin_us));
            let second = std::thread::spawn(move || {
                let memory = attach(&name, token, 1, Geometry::new(2, SLOT_VALUES).unwrap()).unwrap();
                measure(Exchange::new(memory, spin), bytes)
            });
            while !offer.has_given(1) {
                offer.serve_one().unwrap();
                std::thread::yield_now();
            }
            let times = measure(Exchange::new(offer.into_memory(), spin), bytes);
            second.join().unwrap();
            let at = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
            println!(
                "spin {spin_us:>3} µs, {:>4} KB: median {:.1} µs, 10 % {:.1}, 90 % {:.1}",
                bytes >> 10,
                at(50),
                at(10),
                at(90)
            );
        }
    }
}

/// Sorted times of exchanges, this rank's view.
fn measure(mut exchange: Exchange, bytes: usize) -> Vec<Duration> {
    let own = vec![1.0f32; bytes / 4];
    let mut all = vec![0.0; own.len() * 2];
    let mut times = Vec::new();
    for _ in 0..3000 {
        let started = Instant::now();
        exchange.all_gather(1, &own, &mut all, &mut ()).unwrap();
        times.push(started.elapsed());
    }
    times.sort();
    times
}
