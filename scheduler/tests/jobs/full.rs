//! Jobs that train all weights: not every step is durable, and the result is files.

use crate::world::{MODEL_FILES, World, settings};
use ashlar_protocol::admin::{AdminReply, JobAction, JobStatus};
use ashlar_protocol::training::{FullSettings, ModelStart, TrainingSettings};
use ashlar_scheduler::jobs::{checkpoint_file, results_file};
use ashlar_vocabulary::JobId;

/// Steps of the whole job.
const STEPS: u64 = 10;

fn created(replicas: u32) -> (World, JobId) {
    let mut world = World::new(replicas);
    let full = Some(FullSettings { start: ModelStart::Random, durable_every: 4 });
    world.settings =
        TrainingSettings { full, steps: STEPS, steps_per_epoch: 5, evaluate_every: 5, ..settings() };
    let id = world.create(1);
    (world, id)
}

#[test]
fn a_whole_model_ends_as_files_and_is_not_served() {
    let (mut world, id) = created(2);
    world.settle();
    let story = world.story(id).join(", ");
    let end = "step 9, step 10, evaluated 10, stored 2 files, succeeded";
    assert!(story.contains("step 5, evaluated 5, step 6") && story.ends_with(end), "{story}");
    let record = world.record(id).clone();
    assert_eq!((record.status, record.fine_tuned_model, record.adapter), (JobStatus::Succeeded, None, None));
    assert!(world.published.is_empty() && record.checkpoints.is_empty());
    let files = MODEL_FILES.map(|name| checkpoint_file(id, STEPS, name));
    assert_eq!(record.result_files, [&[results_file(id)][..], &files].concat());
    for (file, name) in files.iter().zip(MODEL_FILES) {
        let stored = &world.stored.files[file];
        assert_eq!((&stored.name[..], stored.bytes), (name, 10));
    }
    let manifest = record.trained_model.unwrap().manifest;
    assert!(world.jobs.references().adapters.iter().any(|adapter| adapter.0 == manifest));
}

#[test]
fn an_interrupted_job_repeats_what_came_after_its_last_durable_step() {
    let (mut world, id) = created(1);
    world.until(id, |record| record.steps == 7);
    assert_eq!(world.record(id).steps_since_shards, 3);
    let tokens = world.record(id).trained_tokens;
    world.replica_dies(0);
    world.replica_up(0);
    world.settle();
    world.pass(1_000);
    world.until(id, |record| record.steps == 7);
    assert_eq!(world.record(id).trained_tokens, tokens, "what is repeated counts once");
    world.settle();
    let story = world.story(id).join(", ");
    assert!(
        story.contains("step 7, interrupted, started, step 5, evaluated 5, step 6, step 7, step 8"),
        "{story}"
    );
    assert_eq!(world.record(id).trained_tokens, 100);
}

#[test]
fn a_job_that_dies_before_its_first_durable_step_begins_anew() {
    let (mut world, id) = created(1);
    world.until(id, |record| record.steps == 2);
    let reply = world.control(id, JobAction::Pause);
    assert!(matches!(reply, AdminReply::Job(_)));
    world.settle();
    assert_eq!(world.status(id), JobStatus::Paused);
    world.control(id, JobAction::Resume);
    world.settle();
    let story = world.story(id).join(", ");
    assert!(story.contains("step 3, paused, resumed, started, step 1, step 2"), "{story}");
    assert_eq!((world.status(id), world.record(id).trained_tokens), (JobStatus::Succeeded, 100));
}

#[test]
fn steps_that_are_only_ever_repeated_are_no_progress() {
    let (mut world, id) = created(1);
    for _ in 0..20 {
        for steps in [5, 7] {
            world.until(id, |record| record.steps == steps || record.status == JobStatus::Failed);
        }
        world.replica_dies(0);
        world.replica_up(0);
    }
    world.settle();
    let error = world.record(id).error.clone().unwrap();
    assert_eq!((world.status(id), &error.code[..]), (JobStatus::Failed, "training_interrupted"));
}

#[test]
fn whatever_dies_when_the_model_is_stored() {
    for moment in 0..90 {
        for scheduler in [true, false] {
            let (mut world, id) = created(2);
            for _ in 0..moment {
                world.step();
            }
            if scheduler {
                world.scheduler_dies();
            } else {
                world.replica_dies(moment % 2);
            }
            if scheduler && !world.stored.jobs.contains_key(&id) {
                continue;
            }
            for _ in 0..4 {
                world.settle();
                world.pass(5_000);
            }
            world.settle();
            assert_eq!(world.status(id), JobStatus::Succeeded, "moment {moment}, scheduler {scheduler}");
            assert_eq!(world.record(id).trained_tokens, 100, "moment {moment}, scheduler {scheduler}");
            for name in MODEL_FILES {
                assert!(
                    world.stored.files.contains_key(&checkpoint_file(id, STEPS, name)),
                    "moment {moment}: {name}"
                );
            }
        }
    }
}
