#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

fn sizes(rows: &[u32]) -> Vec<SampleSize> {
    let size = |(example, &rows): (u32, &u32)| SampleSize { example, rows, targets: rows / 2 + 1 };
    (0..).zip(rows).map(size).collect()
}

fn plan(rows: &[u32], settings: PlanSettings) -> JobPlan {
    JobPlan::new(sizes(rows), (0..rows.len() as u32).collect(), settings).unwrap()
}

fn settings() -> impl Strategy<Value = PlanSettings> {
    (1_u32..4, 1_u32..40, any::<u64>()).prop_map(|(epochs, batch_size, seed)| PlanSettings {
        epochs,
        batch_size,
        seed,
    })
}

proptest! {
    #[test]
    fn every_sample_is_trained_once_in_each_epoch(
        rows in prop::collection::vec(1_u32..300, 1..120),
        settings in settings(),
    ) {
        let plan = plan(&rows, settings);
        let mut trained: Vec<Vec<u32>> = vec![Vec::new(); settings.epochs as usize];
        for step in 0..plan.steps() {
            let batch = plan.batch(step).unwrap();
            prop_assert_eq!(batch.step, step);
            prop_assert!(!batch.samples().is_empty());
            prop_assert!(batch.samples().len() <= settings.batch_size as usize);
            trained[batch.epoch as usize].extend(batch.samples());
        }
        prop_assert_eq!(plan.batch(plan.steps()), None);
        for (epoch, mut trained) in trained.into_iter().enumerate() {
            let planned = plan.epoch(epoch as u32).unwrap();
            prop_assert_eq!(&trained[..], planned.order());
            trained.sort_unstable();
            prop_assert_eq!(trained, (0..rows.len() as u32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn runs_tile_the_batch_and_are_shared_out_whole(
        rows in prop::collection::vec(0_u32..1000, 1..80),
        settings in settings(),
    ) {
        let plan = plan(&rows, settings);
        let batch = plan.batch(0).unwrap();
        let mut next = 0;
        for run in 0..8 {
            prop_assert_eq!(batch.run(run).start, next);
            next = batch.run(run).end;
        }
        prop_assert_eq!(next, batch.samples().len());
        prop_assert_eq!((0..8).map(|run| batch.run_rows(run)).sum::<u64>(), batch.rows());
        // No run has more than its eighth by more than one sample.
        let largest = batch.samples().iter().map(|&sample| u64::from(rows[sample as usize])).max().unwrap();
        for run in 0..8 {
            prop_assert!(batch.run_rows(run) <= batch.rows() / 8 + largest + 1);
        }
        for replicas in [1, 2, 4, 8] {
            let owned: Vec<usize> = (0..replicas).flat_map(|r| replica_runs(r, replicas).unwrap()).collect();
            prop_assert_eq!(owned, (0..8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn micro_batches_hold_whole_samples_of_one_run_in_order_and_never_too_many_rows(
        rows in prop::collection::vec(0_u32..100, 1..80),
        settings in settings(),
        rows_max in 99_u32..400,
    ) {
        let plan = plan(&rows, settings);
        plan.check_micro_batch_rows(rows_max).unwrap();
        for step in 0..plan.steps() {
            let batch = plan.batch(step).unwrap();
            for run in 0..8 {
                let packed = batch.micro_batches(run, rows_max, true).unwrap();
                let alone = batch.micro_batches(run, rows_max, false).unwrap();
                prop_assert!(alone.iter().all(|micro| micro.positions.len() == 1));
                prop_assert!(alone.iter().map(|micro| micro.positions.start).eq(batch.run(run)));
                let mut next = batch.run(run).start;
                for (index, micro) in packed.iter().enumerate() {
                    prop_assert_eq!(micro.positions.start, next);
                    prop_assert!(!micro.positions.is_empty());
                    next = micro.positions.end;
                    let held = &batch.samples()[micro.positions.clone()];
                    prop_assert_eq!(held.iter().map(|&s| rows[s as usize]).sum::<u32>(), micro.rows);
                    prop_assert!(micro.rows <= rows_max);
                    if let Some(after) = packed.get(index + 1) {
                        let first = rows[batch.samples()[after.positions.start] as usize];
                        prop_assert!(micro.rows + first > rows_max, "the next sample would have fitted");
                    }
                }
                prop_assert_eq!(next, batch.run(run).end);
            }
        }
    }

    #[test]
    fn a_split_keeps_examples_whole(
        examples in prop::collection::vec(1_usize..4, 1..60),
        aside in 0_u32..70,
        seed in any::<u64>(),
    ) {
        let sizes: Vec<SampleSize> = (0_u32..)
            .zip(&examples)
            .flat_map(|(example, &n)| std::iter::repeat_n(SampleSize { example, rows: 1, targets: 1 }, n))
            .collect();
        let split = split(&sizes, aside, seed);
        let mut all: Vec<u32> = split.training.iter().chain(&split.validation).copied().collect();
        all.sort_unstable();
        prop_assert_eq!(all, (0..sizes.len() as u32).collect::<Vec<_>>());
        let examples_of = |samples: &[u32]| -> std::collections::BTreeSet<u32> {
            samples.iter().map(|&sample| sizes[sample as usize].example).collect()
        };
        let (training, validation) = (examples_of(&split.training), examples_of(&split.validation));
        prop_assert!(training.is_disjoint(&validation));
        prop_assert_eq!(validation.len(), (aside as usize).min(examples.len() - 1));
        prop_assert!(split.training.is_sorted() && split.validation.is_sorted());
    }
}

#[test]
fn the_same_seed_gives_the_same_plan_and_another_one_another() {
    let rows: Vec<u32> = (0..100).map(|i| i % 17 + 1).collect();
    let at = |seed| plan(&rows, PlanSettings { epochs: 2, batch_size: 16, seed });
    let (one, two) = (at(7), at(8));
    for step in 0..one.steps() {
        assert_eq!(one.batch(step), at(7).batch(step));
    }
    assert_ne!(one.epoch(0).unwrap().order(), two.epoch(0).unwrap().order());
    assert_ne!(one.epoch(0).unwrap().order(), one.epoch(1).unwrap().order());
    assert_ne!(split(&sizes(&rows), 10, 7).validation, split(&sizes(&rows), 10, 8).validation);
    // Pinned: a job that resumes under another release must find its order.
    assert_eq!(
        plan(&[1; 8], PlanSettings { epochs: 1, batch_size: 8, seed: 42 }).epoch(0).unwrap().order(),
        [6, 1, 0, 4, 7, 5, 3, 2]
    );
}

#[test]
fn equal_samples_fill_runs_equally() {
    let batch = |samples: usize| {
        let settings = PlanSettings { epochs: 1, batch_size: samples as u32, seed: 0 };
        let batch = plan(&vec![5; samples], settings).batch(0).unwrap();
        (0..8).map(|run| batch.run(run).len()).collect::<Vec<_>>()
    };
    assert_eq!(batch(8), [1; 8]);
    assert_eq!(batch(32), [4; 8]);
    assert_eq!(batch(4).iter().sum::<usize>(), 4);
    assert_eq!(batch(4).iter().max(), Some(&1));
}

#[test]
fn every_order_of_three_is_about_equally_likely() {
    let mut counts = std::collections::BTreeMap::new();
    for seed in 0..6000 {
        *counts.entry(order::shuffled(&[0, 1, 2], seed, 0)).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 6);
    assert!(counts.values().all(|count| (880..1120).contains(count)), "{counts:?}");
}

#[test]
fn impossible_settings_are_refused_with_the_reason() {
    let settings = PlanSettings { epochs: 1, batch_size: 1, seed: 0 };
    let new = |training, settings| JobPlan::new(sizes(&[5, 9]), training, settings).unwrap_err();
    assert_eq!(new(vec![], settings), PlanError::NoSamples);
    assert_eq!(new(vec![2], settings), PlanError::NoSuchSample(2));
    assert_eq!(new(vec![0], PlanSettings { epochs: 0, ..settings }), PlanError::Zero("n_epochs"));
    assert_eq!(new(vec![0], PlanSettings { batch_size: 0, ..settings }), PlanError::Zero("batch_size"));
    let plan = plan(&[5, 9], PlanSettings { batch_size: 2, ..settings });
    let too_large = PlanError::SampleTooLarge { sample: 1, rows: 9, rows_max: 8 };
    assert_eq!(plan.check_micro_batch_rows(8), Err(too_large));
    assert!((0..8).any(|run| plan.batch(0).unwrap().micro_batches(run, 8, true) == Err(too_large)));
    assert_eq!((replica_runs(0, 3), replica_runs(2, 2), replica_runs(0, 0)), (None, None, None));
}
