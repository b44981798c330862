use crate::world::{ADAPTER_FILES, World, file, settings};
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, AdminReply, AdminRequest, FileRecord, JobAction, JobError, JobEventKind,
    JobStatus,
};
use ashlar_protocol::training::{TrainingReport, TrainingSettings, TrainingTiming, ValidationData};
use ashlar_scheduler::jobs::{Event, checkpoint_file, results_file};
use ashlar_vocabulary::{BlobId, JobId};

fn created(replicas: u32) -> (World, JobId) {
    let mut world = World::new(replicas);
    let id = world.create(1);
    (world, id)
}

fn kind(reply: &AdminReply) -> AdminFailureKind {
    match reply {
        AdminReply::Refused(failure) => failure.kind,
        other => panic!("{other:?}"),
    }
}

/// The step that the job is at, once it has a session.
fn at_step(world: &mut World, id: JobId, steps: u64) {
    world.until(id, |record| record.steps == steps);
}

#[test]
fn a_job_goes_from_its_files_to_a_model_that_is_served() {
    let (mut world, id) = created(2);
    world.settle();
    let story = [
        "created",
        "validating",
        "queued",
        "started",
        "step 1",
        "step 2",
        "evaluated 2",
        "step 3",
        "evaluated 3",
        "checkpoint 3",
        "step 4",
        "evaluated 4",
        "step 5",
        "step 6",
        "evaluated 6",
        "checkpoint 6",
        "model",
        "succeeded",
    ];
    assert_eq!(world.story(id), story);
    let record = world.record(id).clone();
    let name = "ft:demo:ashlar:mine:00000001";
    assert_eq!(record.fine_tuned_model.as_deref(), Some(name));
    assert_eq!(record.adapter, record.checkpoints.last().map(|last| last.adapter));
    assert_eq!(record.checkpoints[0].model, format!("{name}:ckpt-step-3"));
    assert_eq!(record.checkpoints[1].validation, Some((1.0, 0.25)));
    assert_eq!((record.trained_tokens, record.steps), (60, 6));
    let results = results_file(id);
    let [config, weights] = ADAPTER_FILES.map(|name| checkpoint_file(id, 6, name));
    assert_eq!(record.result_files, [results, config, weights]);
    assert_eq!(record.checkpoints[1].files, [config, weights]);
    assert_eq!(world.stored.files[&weights].name, "adapter_model.safetensors");
    assert_eq!(world.stored.files[&results].purpose, "fine-tune-results");
    assert!(record.shards.is_empty() && world.stored.blobs.is_empty(), "the states are needed no more");
    assert_eq!(world.stored.jobs[&id].record, record);
    assert!(world.jobs.is_idle());
}

#[test]
fn a_job_waits_for_ranks_and_jobs_beyond_the_limit_wait_for_their_turn() {
    let mut world = World::new(0);
    let ids = [1, 2, 3].map(|id| world.create(id));
    world.settle();
    assert!(ids.iter().all(|id| world.status(*id) == JobStatus::Queued));
    world.replica_up(0);
    let status = ids.map(|id| world.status(id));
    assert_eq!(status, [JobStatus::Running, JobStatus::Running, JobStatus::Queued]);
    world.until(ids[2], |record| record.status == JobStatus::Running);
    assert!(ids[..2].iter().any(|id| world.record(*id).steps == 6), "one of the first two is trained");
    world.settle();
    assert!(ids.iter().all(|id| world.status(*id) == JobStatus::Succeeded));
}

#[test]
fn files_that_cannot_be_used_end_the_job_with_the_gateways_words() {
    let (mut world, id) = created(1);
    let (gateway, job) = world.preparing.pop_front().unwrap();
    let error = JobError {
        code: "invalid_n_examples".into(),
        message: "too few".into(),
        param: Some("training_file".into()),
    };
    world.event(Event::Prepared { gateway, job, outcome: Box::new(Err(error.clone())) });
    assert_eq!(world.record(id).error, Some(error));
    world.settle();
    assert_eq!(world.story(id), ["created", "validating", "failed invalid_n_examples"]);
    assert!(world.record(id).result_files.is_empty(), "nothing was trained");
}

#[test]
fn settings_that_are_no_numbers_are_refused_before_they_are_stored() {
    let (mut world, id) = created(1);
    world.settings = TrainingSettings { learning_rate: f64::NAN, ..settings() };
    world.settle();
    assert_eq!(world.record(id).error.as_ref().unwrap().code, "invalid_hyperparameters");
}

#[test]
fn another_gateway_validates_where_the_first_goes_away_but_not_for_ever() {
    let (mut world, id) = created(1);
    world.gateway_up(2);
    let first = world.preparing[0].0;
    assert_eq!(first.0, 1, "who asks for a job validates it");
    world.gateway_dies(first);
    assert_eq!(world.preparing[0].0.0, 2);
    for gateway in 3..6 {
        world.gateway_up(gateway);
        let with = world.preparing[0].0;
        world.gateway_dies(with);
    }
    world.settle();
    assert_eq!(world.record(id).error.as_ref().unwrap().code, "validation_interrupted");
}

#[test]
fn a_paused_job_finishes_its_step_frees_its_ranks_and_goes_on_from_there() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    let reply = world.control(id, JobAction::Pause);
    assert!(matches!(reply, AdminReply::Job(_)));
    world.settle();
    assert_eq!((world.status(id), world.record(id).steps), (JobStatus::Paused, 2));
    assert!(world.jobs.is_idle());
    assert!(matches!(world.control(id, JobAction::Pause), AdminReply::Job(_)), "it may be said twice");
    world.scheduler_dies();
    world.settle();
    assert_eq!(world.status(id), JobStatus::Paused);
    world.control(id, JobAction::Resume);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
    let story = world.story(id).join(", ");
    assert!(story.contains("step 2, paused, resumed, started, evaluated 2, step 3"), "{story}");
}

#[test]
fn a_wish_to_pause_can_be_taken_back_and_holds_from_validation_on() {
    let (mut world, id) = created(1);
    world.control(id, JobAction::Pause);
    world.settle();
    assert_eq!((world.status(id), world.record(id).steps), (JobStatus::Paused, 0));
    world.control(id, JobAction::Resume);
    at_step(&mut world, id, 1);
    world.control(id, JobAction::Pause);
    world.control(id, JobAction::Resume);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn a_job_can_be_cancelled_wherever_it_is() {
    for moment in 0..60 {
        let (mut world, id) = created(2);
        for _ in 0..moment {
            world.step();
        }
        if world.status(id).is_final() {
            continue;
        }
        let reply = world.control(id, JobAction::Cancel);
        assert!(matches!(reply, AdminReply::Job(job) if job.status == JobStatus::Cancelled));
        world.settle();
        assert!(world.jobs.is_idle(), "moment {moment}");
        assert_eq!(world.stored.jobs[&id].record.status, JobStatus::Cancelled);
        assert!(matches!(world.control(id, JobAction::Cancel), AdminReply::Job(_)));
        assert_eq!(kind(&world.control(id, JobAction::Resume)), AdminFailureKind::Conflict);
    }
}

#[test]
fn a_lost_rank_interrupts_the_job_which_goes_on_from_its_committed_step() {
    let (mut world, id) = created(2);
    at_step(&mut world, id, 2);
    world.replica_dies(1);
    assert_eq!(world.status(id), JobStatus::Running);
    world.pass(1_000);
    at_step(&mut world, id, 3);
    world.replica_dies(0);
    world.settle();
    world.pass(60_000);
    assert_eq!(world.record(id).steps, 3, "there is nobody to train");
    world.replica_up(0);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
    let story = world.story(id);
    assert_eq!(story.iter().filter(|what| *what == "interrupted").count(), 2);
    let steps: Vec<&String> = story.iter().filter(|what| what.starts_with("step")).collect();
    assert_eq!(steps, ["step 1", "step 2", "step 3", "step 4", "step 5", "step 6"]);
}

#[test]
fn a_session_that_is_lost_again_and_again_fails_the_job_after_growing_pauses() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    let mut lost = 0;
    while !world.status(id).is_final() {
        if !world.jobs.is_idle() {
            world.say(id, TrainingReport::Failed { message: "a link broke".into(), retry: true });
            let rank = world.talkative()[0];
            world.hear(rank);
            lost += 1;
        }
        while world.store_works() {}
        world.pass(500);
    }
    assert_eq!(lost, 9);
    assert!(world.now.0 > 60_000);
    world.settle();
    assert_eq!(world.record(id).error.as_ref().unwrap().code, "training_interrupted");
}

#[test]
fn a_fault_that_will_come_again_fails_the_job_at_once() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    world.say(id, TrainingReport::Failed { message: "no module q".into(), retry: false });
    world.settle();
    let error = world.record(id).error.clone().unwrap();
    assert_eq!((error.code.as_str(), error.message.as_str()), ("training_failed", "no module q"));
}

#[test]
fn a_job_without_room_for_its_state_is_paused_with_the_reason_and_goes_on_once_resumed() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 2);
    world.say(id, TrainingReport::NoRoom { message: "no room for the blob".into() });
    let rank = world.talkative()[0];
    world.hear(rank);
    assert_eq!(world.status(id), JobStatus::Paused);
    assert!(world.jobs.is_idle(), "nobody keeps memory for it");
    world.settle();
    assert_eq!(
        (world.status(id), world.record(id).steps),
        (JobStatus::Paused, 2),
        "it does not try again by itself"
    );
    let why = world.events(id).into_iter().rev().find_map(|event| match event.what {
        JobEventKind::Interrupted(why) => Some(why),
        _ => None,
    });
    let why = why.unwrap();
    assert!(why.contains("no room for the blob") && why.contains("resume it"), "{why}");
    world.control(id, JobAction::Resume);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn an_adapter_without_effect_fails_the_job() {
    let (mut world, id) = created(1);
    world.usable = Err("every pair is zero".into());
    world.settle();
    assert_eq!(world.record(id).error.as_ref().unwrap().code, "no_effect");
}

#[test]
fn four_steps_without_a_finite_loss_in_a_row_fail_the_job_and_what_is_stored_can_be_read() {
    let (mut world, id) = created(1);
    world.skipped = true;
    world.settle();
    let record = world.record(id).clone();
    assert_eq!(record.error.as_ref().unwrap().code, "loss_not_finite");
    assert_eq!((record.steps, record.trained_tokens), (4, 0));
    assert_eq!(record.last.unwrap().loss, f64::MAX);
}

#[test]
fn a_validation_loss_that_falls_no_longer_ends_the_job_early() {
    let (mut world, id) = created(1);
    world.settings = TrainingSettings { patience: Some(2), steps: 30, steps_per_epoch: 15, ..settings() };
    world.losses =
        (0..=30).map(|step| (step, if step <= 4 { 2.0 - step as f64 / 10.0 } else { 1.7 })).collect();
    world.settle();
    let story = world.story(id).join(", ");
    assert!(story.ends_with("step 8, evaluated 8, stopped 8, checkpoint 8, model, succeeded"), "{story}");
}

#[test]
fn without_validation_data_nothing_is_measured_and_three_checkpoints_are_kept() {
    let (mut world, id) = created(1);
    world.settings =
        TrainingSettings { validation: ValidationData::None, steps: 10, steps_per_epoch: 2, ..settings() };
    world.settle();
    let record = world.record(id).clone();
    let steps: Vec<(u64, u64)> = record.checkpoints.iter().map(|one| (one.number, one.step)).collect();
    assert_eq!(steps, [(2, 6), (3, 8), (4, 10)]);
    let name = record.fine_tuned_model.unwrap();
    assert_eq!(world.withdrawn, [2, 4].map(|step| format!("{name}:ckpt-step-{step}")));
    assert!(!world.story(id).iter().any(|what| what.starts_with("evaluated")));
}

#[test]
fn a_model_that_cannot_be_served_yet_is_tried_again_and_one_that_never_can_fails() {
    for (failure, status) in [
        (AdminFailureKind::Unavailable, JobStatus::Succeeded),
        (AdminFailureKind::Full, JobStatus::Succeeded),
        (AdminFailureKind::Conflict, JobStatus::Succeeded),
        (AdminFailureKind::Invalid, JobStatus::Failed),
        (AdminFailureKind::NotFound, JobStatus::Failed),
        (AdminFailureKind::Internal, JobStatus::Failed),
    ] {
        let (mut world, id) = created(1);
        while world.publishing.iter().all(|load| load.name.contains("ckpt")) {
            assert!(world.step());
        }
        world.publishing.retain(|load| !load.name.contains("ckpt"));
        let name = world.publishing.pop_front().unwrap().name;
        let failure = AdminFailure { kind: failure, message: "no".into() };
        world.event(Event::NotPublished { name, failure });
        world.settle();
        world.pass(1_000);
        world.settle();
        assert_eq!(world.status(id), status);
    }
}

#[test]
fn a_slow_store_delays_no_step_but_the_one_after_the_next() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    while world.store_works() {}
    world.store_goes();
    let mut steps = Vec::new();
    while let Some(rank) = world.talkative().first().copied() {
        world.hear(rank);
        steps.push(world.record(id).steps);
    }
    assert_eq!(steps.last(), Some(&2), "{steps:?}");
    let refusal = world.call(AdminRequest::ControlJob(id, JobAction::Cancel));
    assert_eq!(kind(&world.replies[&refusal]), AdminFailureKind::Unavailable);
    world.store_comes();
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn a_step_counts_when_all_ranks_have_voted_before_one_dies() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    while world.store_works() {}
    // All votes for step 3 are heard while step 2 is not durable.
    world.store_goes();
    while let Some(rank) = world.talkative().first().copied() {
        world.hear(rank);
    }
    assert_eq!(world.record(id).steps, 2);
    world.replica_dies(0);
    world.store_comes();
    world.settle();
    assert_eq!(world.record(id).steps, 3);
    world.pass(1_000);
    world.replica_up(0);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn every_moment_is_a_good_one_for_the_scheduler_to_die() {
    for moment in 0..70 {
        let (mut world, id) = created(2);
        for _ in 0..moment {
            world.step();
        }
        world.scheduler_dies();
        if world.stored.jobs.contains_key(&id) {
            world.settle();
            for _ in 0..3 {
                world.pass(5_000);
                world.settle();
            }
            assert_eq!(world.status(id), JobStatus::Succeeded, "moment {moment}");
            let name = world.record(id).fine_tuned_model.clone().unwrap();
            assert!(world.published.contains(&name));
            assert!(world.stored.files.contains_key(&results_file(id)), "moment {moment}");
        }
    }
}

#[test]
fn every_moment_is_a_good_one_for_a_rank_to_die() {
    for moment in 0..70 {
        let (mut world, id) = created(2);
        for _ in 0..moment {
            world.step();
        }
        world.replica_dies(moment % 2);
        world.settle();
        world.pass(1_000);
        world.settle();
        assert_eq!(world.status(id), JobStatus::Succeeded, "moment {moment}");
    }
}

#[test]
fn a_session_that_says_nothing_for_half_an_hour_is_given_up() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    while world.store_works() {}
    world.pass(1_700_000);
    assert_eq!(world.record(id).events, 5);
    world.pass(200_000);
    assert_eq!(world.record(id).events, 6, "it is interrupted");
}

#[test]
fn files_of_a_checkpoint_are_there_as_long_as_it_is_and_longer_than_nobody_wants_them() {
    let (mut world, id) = created(1);
    world.settings = TrainingSettings { steps: 10, steps_per_epoch: 2, ..settings() };
    world.until(id, |record| record.checkpoints.len() == 1);
    while world.store_works() {}
    let of = |step| ADAPTER_FILES.map(|name| checkpoint_file(id, step, name));
    let [first, _] = of(2);
    let blob = world.stored.files[&first].blob;
    assert!(world.jobs.references().blobs.contains(&blob), "a sweep respects it");
    // Its owner may delete one; the rest goes with the checkpoint.
    let reply = world.ask(AdminRequest::DeleteFile(of(4)[0]));
    assert!(matches!(reply, AdminReply::Refused(_)), "there is no second checkpoint yet");
    world.until(id, |record| record.checkpoints.len() == 2);
    assert!(matches!(world.ask(AdminRequest::DeleteFile(of(4)[0])), AdminReply::Done));
    world.settle();
    let steps: Vec<u64> = world.record(id).checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
    assert_eq!(steps, [6, 8, 10]);
    let there = |step| of(step).map(|file| world.stored.files.contains_key(&file));
    assert_eq!([2, 4, 6, 8, 10].map(there), [[false; 2], [false; 2], [true; 2], [true; 2], [true; 2]]);
    assert_eq!(world.record(id).result_files[1..], of(10));
}

#[test]
fn a_state_that_somebody_has_uploaded_too_is_not_deleted() {
    let (mut world, id) = created(1);
    world.until(id, |record| record.steps == 1);
    let shard = world.record(id).shards[0];
    let reply = world.ask(AdminRequest::PutFile(FileRecord { blob: shard, ..file(9) }));
    assert!(matches!(reply, AdminReply::File(_)));
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
    assert_eq!(world.stored.blobs.iter().collect::<Vec<_>>(), [&shard]);
}

/// Runs a job until its model is asked to be served, and drops what its checkpoints want.
fn asked_to_publish(world: &mut World) -> String {
    while world.publishing.iter().all(|load| load.name.contains("ckpt")) {
        if !world.step() {
            world.pass(1_000);
        }
    }
    let model = world.publishing.drain(..).find(|load| !load.name.contains("ckpt"));
    model.unwrap().name
}

#[test]
fn a_model_that_can_never_be_served_fails_the_job_with_the_ranks_reason_at_once() {
    let (mut world, id) = created(1);
    let name = asked_to_publish(&mut world);
    let message = "the adapter has no effect: every B is zero".to_owned();
    let failure = AdminFailure { kind: AdminFailureKind::Invalid, message };
    world.event(Event::NotPublished { name, failure });
    world.settle();
    let error = world.record(id).error.clone().unwrap();
    assert_eq!((world.status(id), &error.code[..]), (JobStatus::Failed, "model_not_served"));
    assert!(error.message.ends_with("every B is zero"), "{}", error.message);
    assert!(world.publishing.is_empty() && world.stored.blobs.is_empty());
}

#[test]
fn a_model_that_is_refused_for_now_is_asked_for_ten_times_with_growing_pauses() {
    let (mut world, id) = created(1);
    let mut asked = 0;
    let began = world.now;
    while !world.status(id).is_final() {
        let name = asked_to_publish(&mut world);
        asked += 1;
        let failure = AdminFailure { kind: AdminFailureKind::Unavailable, message: "away".into() };
        world.event(Event::NotPublished { name, failure });
    }
    assert_eq!(asked, 10);
    assert!(world.now.since(began) > 100_000);
    world.settle();
    assert_eq!(world.record(id).error.as_ref().unwrap().code, "model_not_served");
}

#[test]
fn a_model_that_nobody_could_load_waits_for_a_replica_without_using_up_attempts() {
    let (mut world, id) = created(1);
    let name = asked_to_publish(&mut world);
    world.replica_dies(0);
    let message = "the last replica was lost while it loaded the adapter".to_owned();
    let failure = AdminFailure { kind: AdminFailureKind::Unavailable, message };
    world.event(Event::NotPublished { name, failure });
    for _ in 0..100 {
        world.pass(60_000);
        world.settle();
    }
    assert_eq!((world.status(id), world.publishing.len()), (JobStatus::Running, 0));
    world.replica_up(0);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn a_scheduler_that_dies_before_it_deletes_a_former_state_leaves_that_to_the_next_one() {
    for moment in 0..120 {
        let (mut world, id) = created(2);
        // Nothing is ever deleted by the first one.
        for _ in 0..moment {
            let heard = world.talkative().first().copied().map(|rank| world.hear(rank)).is_some();
            let _ = heard || world.store_works() || world.prepare_one() || world.publish_one();
        }
        world.scheduler_dies();
        for _ in 0..4 {
            world.settle();
            world.pass(5_000);
        }
        world.settle();
        if world.stored.jobs.contains_key(&id) {
            assert_eq!(world.status(id), JobStatus::Succeeded, "moment {moment}");
            assert!(world.stored.blobs.is_empty(), "moment {moment}: {:?}", world.stored.blobs);
            assert!(world.stored.jobs[&id].progress.superseded.is_empty(), "moment {moment}");
        }
    }
}

#[test]
fn pieces_of_a_step_that_was_interrupted_are_deleted_once_a_later_one_is_durable() {
    let (mut world, id) = created(1);
    at_step(&mut world, id, 1);
    // The first rank has stored a piece that no other layout has, and said so; then the second one dies.
    let piece = BlobId([77; 32]);
    world.stored.blobs.insert(piece);
    let (shard, timing) = (Some(piece), TrainingTiming::default());
    world.say(id, TrainingReport::Prepared { step: 1, shard, metrics: None, timing });
    let rank = world.talkative()[0];
    world.hear(rank);
    world.replica_dies(0);
    world.replica_up(0);
    world.settle();
    world.pass(1_000);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
    assert!(world.deleted.contains(&piece));
    assert!(world.stored.blobs.is_empty(), "{:?}", world.stored.blobs);
}
