//! Everything dies at random moments. The world checks what must hold after every event; here jobs must come to an end.

use crate::world::{ADAPTER_MEMORY, World, request, session_bytes, settings};
use ashlar_protocol::admin::{AdminRequest, JobAction, JobRequest, JobStatus, Promotion, PromotionMetric};
use ashlar_protocol::training::{TrainingReport, TrainingSettings};
use ashlar_scheduler::jobs::results_file;
use ashlar_vocabulary::{Bytes, FileId, JobId};

struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % bound
    }
}

fn disturb(world: &mut World, dice: &mut Dice, jobs: &[JobId]) {
    match dice.below(1000) {
        0..500 => {
            let talkative = world.talkative();
            if !talkative.is_empty() {
                world.hear(talkative[dice.below(talkative.len() as u64) as usize]);
            }
        }
        500..700 => {
            world.store_works();
        }
        700..730 => {
            world.delete_one();
        }
        730..760 => {
            world.prepare_one();
        }
        760..790 => {
            world.publish_one();
        }
        790..820 => {
            world.promote_one();
        }
        820..900 => {
            let ms = dice.below(3_000);
            world.pass(ms);
        }
        900..915 => world.replica_dies(dice.below(3) as u32),
        915..950 => {
            let replica = dice.below(3) as u32;
            if !world.up.keys().any(|up| up.0 == replica) {
                world.replica_up(replica);
            }
        }
        950..955 => {
            if let Some(gateway) = world.gateways.first().copied() {
                world.gateway_dies(gateway);
            }
        }
        955..965 => world.gateway_up(1_000 + dice.below(1 << 40)),
        965..972 => world.scheduler_dies(),
        972..980 => world.store_goes(),
        980..990 => world.store_comes(),
        _ => {
            let job = jobs[dice.below(jobs.len() as u64) as usize];
            let action = [JobAction::Pause, JobAction::Resume, JobAction::Resume, JobAction::Cancel];
            let choices = if dice.below(8) == 0 { 4 } else { 3 };
            let action = action[dice.below(choices) as usize];
            world.call(AdminRequest::ControlJob(job, action));
        }
    }
}

fn run(seed: u64) -> (u64, u64) {
    let dice = &mut Dice(seed);
    let mut world = World::new(0);
    if seed % 2 == 1 {
        // Room for a job and a half: others wait, and some compute their activations again.
        let rank = session_bytes(&settings(), true, settings().micro_batch_rows).into_iter().max().unwrap();
        world.memory = ADAPTER_MEMORY + Bytes(rank.0 + rank.0 / 2);
    }
    (0..2).for_each(|replica| world.replica_up(replica));
    world.settings = TrainingSettings { steps: 12, steps_per_epoch: 5, ..settings() };
    let promote = Promotion { metric: PromotionMetric::ExactMatch, file: FileId(1), bound: None };
    world.served.figures = if seed.is_multiple_of(3) { Ok((0.5, 0.75)) } else { Ok((0.75, 0.5)) };
    let asks = (1..=3).map(|id| JobRequest { promote: (id > 2).then_some(promote), ..request(id) });
    let jobs: Vec<JobId> = asks.map(|request| world.create_as(request)).collect();
    for _ in 0..1_500 {
        disturb(&mut world, dice, &jobs);
    }
    world.store_comes();
    world.gateway_up(7);
    (0..3)
        .filter(|replica| !world.up.keys().any(|up| up.0 == *replica))
        .collect::<Vec<_>>()
        .into_iter()
        .for_each(|replica| world.replica_up(replica));
    for _ in 0..200 {
        world.settle();
        for id in &jobs {
            if world.status(*id) == JobStatus::Paused {
                world.call(AdminRequest::ControlJob(*id, JobAction::Resume));
            }
        }
        world.pass(10_000);
    }
    world.settle();
    let mut ended = (0, 0);
    for id in &jobs {
        let record = world.record(*id).clone();
        match record.status {
            JobStatus::Succeeded => {
                assert_eq!(record.steps, 12);
                ended.0 += 1;
                if let Some(candidate) = &record.candidate {
                    let better = candidate.outcome.as_ref().is_some_and(|outcome| outcome.is_promoted());
                    assert_eq!(
                        (better, better),
                        (!seed.is_multiple_of(3), record.fine_tuned_model.is_some())
                    );
                    assert_eq!(world.served.generation > 0, better, "seed {seed}");
                }
            }
            JobStatus::Cancelled => ended.1 += 1,
            JobStatus::Failed => {
                let code = record.error.as_ref().unwrap().code.clone();
                assert!(
                    ["validation_interrupted", "training_interrupted"].contains(&code.as_str()),
                    "{code}"
                );
            }
            other => panic!("seed {seed}: job {id} is {other:?} for ever"),
        }
        assert_eq!(world.stored.jobs[id].record, record, "seed {seed}");
        assert_eq!(world.events(*id).len() as u64, record.events);
        if record.steps > 0 {
            assert!(world.stored.files.contains_key(&results_file(*id)), "seed {seed}");
        }
        let steps = world.story(*id).iter().filter(|what| what.starts_with("step ")).count() as u64;
        assert_eq!(steps, record.steps, "seed {seed}: every committed step is told once");
    }
    assert!(world.jobs.is_idle());
    ended
}

#[test]
fn every_job_comes_to_an_end_whatever_dies_when() {
    let (mut succeeded, mut cancelled) = (0, 0);
    for seed in 0..300 {
        let ended = run(seed);
        succeeded += ended.0;
        cancelled += ended.1;
    }
    assert!(succeeded > 300 && cancelled > 30, "{succeeded} succeeded, {cancelled} were cancelled");
}

#[test]
fn a_rank_that_babbles_harms_no_job() {
    let mut world = World::new(1);
    let id = world.create(1);
    world.until(id, |record| record.steps == 2);
    for report in [
        TrainingReport::Evaluated { loss: f64::NAN, accuracy: f64::NAN },
        TrainingReport::Prepared { step: 77, shard: None, metrics: None, timing: Default::default() },
        TrainingReport::Failed { message: "ä".repeat(5_000), retry: true },
    ] {
        world.say(id, report);
        let rank = world.talkative()[0];
        world.hear(rank);
        while world.store_works() {}
        world.pass(30_000);
    }
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}
