//! A thousand worlds. `ASHLAR_SEED=n` runs one of them, with its trace; `ASHLAR_SEEDS=n` runs more.

use ashlar_simulation::{Report, replay, run};

const SEEDS: u64 = 1_200;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn whatever_breaks_tokens_are_exact_blocks_are_conserved_and_every_request_ends() {
    let seeds = match number("ASHLAR_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ASHLAR_SEEDS").unwrap_or(SEEDS),
    };
    let count = seeds.end - seeds.start;
    let mut sum = Report::default();
    for seed in seeds {
        match run(seed) {
            Ok(report) => sum = sum.and(report),
            Err(_) => match replay(seed) {
                Err(violation) => panic!("{violation}\nrun it again with ASHLAR_SEED={seed}"),
                Ok(_) => panic!("seed {seed} failed once and passed when it was replayed"),
            },
        }
    }
    eprintln!("{sum:?}");
    if count >= SEEDS {
        // The worlds are not so kind that nothing is tested, nor so hard that nothing is served.
        assert!(sum.finished > 8 * count && sum.failed > count, "{sum:?}");
        assert!(2 * sum.preemptions > count && sum.cached_tokens > 50 * count, "{sum:?}");
        assert!(sum.replica_losses > count && sum.duplicated > 10 * count, "{sum:?}");
        assert!(sum.head_slices > 20 * count && sum.audits > count, "{sum:?}");
        assert!(10 * sum.lost > count && 10 * sum.reordered > count, "{sum:?}");
    }
}

#[test]
fn a_seed_always_gives_the_same_run() {
    for seed in 0..20 {
        assert_eq!(run(seed), replay(seed));
    }
}
