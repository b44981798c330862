//! Some hundred worlds with fine-tuning jobs. `ASHLAR_JOBS_SEED=n` runs one of them, with its trace; `ASHLAR_JOBS_SEEDS=n` runs
//! more.

use ashlar_simulation::{Report, replay_with_jobs, run_with_jobs};

const SEEDS: u64 = 300;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn whatever_breaks_jobs_end_with_the_bits_of_an_undisturbed_run_and_leave_nothing_behind() {
    let seeds = match number("ASHLAR_JOBS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("ASHLAR_JOBS_SEEDS").unwrap_or(SEEDS),
    };
    let count = seeds.end - seeds.start;
    let mut sum = Report::default();
    for seed in seeds {
        match run_with_jobs(seed) {
            Ok(report) => sum = sum.and(report),
            Err(_) => match replay_with_jobs(seed) {
                Err(violation) => panic!("{violation}\nrun it again with ASHLAR_JOBS_SEED={seed}"),
                Ok(_) => panic!("seed {seed} failed once and passed when it was replayed"),
            },
        }
    }
    eprintln!("{sum:?}");
    if count >= SEEDS {
        // The worlds are not so kind that nothing is tested, nor so hard that nothing is trained.
        assert!(sum.jobs_succeeded > count && 20 * sum.jobs_failed > count, "{sum:?}");
        assert!(40 * sum.jobs_cancelled > count && sum.train_steps > 8 * count, "{sum:?}");
        assert!(2 * sum.repeated_steps > count && sum.blobs_deleted > 10 * count, "{sum:?}");
        assert!(sum.adapted > 2 * count, "{sum:?}");
    }
}

#[test]
fn a_seed_with_jobs_always_gives_the_same_run() {
    for seed in 0..10 {
        assert_eq!(run_with_jobs(seed), replay_with_jobs(seed));
    }
}
