//! Whether jobs fit: what is kept, what is computed again, who waits, and who never will.

use crate::world::{ADAPTER_MEMORY, SERVING, World, session_bytes, settings};
use ashlar_protocol::admin::{JobEventKind, JobStatus};
use ashlar_protocol::training::TrainingSettings;
use ashlar_scheduler::jobs::Event;
use ashlar_vocabulary::{Bytes, JobId, ReplicaId};

/// What the fullest rank needs.
fn largest(settings: &TrainingSettings, keep: bool, rows: u32) -> Bytes {
    session_bytes(settings, keep, rows).into_iter().max().unwrap()
}

/// A world without a replica yet, whose nodes offer this beside what serves and what is set aside for adapters.
fn world(left: Bytes) -> World {
    let mut world = World::new(0);
    // Of what is left beside what serves, at most half is set aside.
    world.memory = left + ADAPTER_MEMORY.min(left);
    world
}

/// (keeps activations, rows of a micro-batch) of a job's sessions, of all ranks.
fn opened(world: &World, id: JobId) -> Vec<(bool, u32)> {
    let of = world.opened.iter().filter(|(job, _)| *job == id);
    of.map(|(_, settings)| (settings.keep_activations, settings.micro_batch_rows)).collect()
}

#[test]
fn a_job_keeps_its_activations_where_there_is_room_else_computes_them_again_else_in_smaller_pieces() {
    let settings = settings();
    let rows = settings.micro_batch_rows;
    let need = |keep, rows| largest(&settings, keep, rows);
    let cases = [
        (need(true, rows), (true, rows)),
        (need(true, rows) - Bytes(1), (false, rows)),
        (need(false, rows), (false, rows)),
        (need(false, rows) - Bytes(1), (false, rows / 2)),
        (need(false, rows / 4), (false, rows / 4)),
        (need(false, 11), (false, 11)),
    ];
    for (left, way) in cases {
        let mut world = world(left);
        world.longest_sample_rows = 11;
        let id = world.create(1);
        world.replica_up(0);
        world.settle();
        assert_eq!(opened(&world, id), [way; 2], "{left}");
        assert_eq!(world.status(id), JobStatus::Succeeded);
        let record = world.record(id).settings.clone().unwrap();
        assert_eq!(
            (record.keep_activations, record.micro_batch_rows),
            (true, rows),
            "what was settled stays"
        );
    }
}

#[test]
fn a_job_that_would_not_fit_alone_fails_with_what_is_missing_and_what_would_help() {
    let settings = settings();
    let left = largest(&settings, false, 24);
    let mut world = world(left);
    world.longest_sample_rows = 40;
    let id = world.create(1);
    world.replica_up(0);
    world.settle();
    assert_eq!(world.story(id).last().unwrap(), "failed does_not_fit");
    let error = world.record(id).error.clone().unwrap();
    let missing = largest(&settings, false, 40) - left;
    for part in [
        format!("so {missing} are missing"),
        "micro-batches of 40 rows".to_owned(),
        "a max_seq_len of at most 24".to_owned(),
        format!("{SERVING} serve"),
        "a node with more memory".to_owned(),
        "adapter_memory_bytes".to_owned(),
    ] {
        assert!(error.message.contains(&part), "{part} in {}", error.message);
    }
    assert!(world.opened.is_empty());
    // What it says would help does.
    let mut world = crate::room::world(left);
    world.longest_sample_rows = 24;
    let id = world.create(1);
    world.replica_up(0);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn a_job_whose_adapter_is_too_large_hears_which_rank_and_how_many_layers_would_fit() {
    let mut settings = settings();
    settings.lora.rank = 4096;
    let mut world = world(largest(&settings, false, 8) - Bytes(1));
    world.settings = settings;
    let id = world.create(1);
    world.replica_up(0);
    world.settle();
    let error = world.record(id).error.clone().unwrap();
    for part in ["lora.r of at most 4095", "holds 3 layers or fewer instead of 4"] {
        assert!(error.message.contains(part), "{part} in {}", error.message);
    }
}

#[test]
fn a_job_waits_in_the_queue_while_others_hold_the_room_and_nobody_overtakes_it() {
    let settings = settings();
    let one = largest(&settings, true, settings.micro_batch_rows);
    let mut world = world(one + Bytes(1));
    world.max_jobs_running = 2;
    world.longest_sample_rows = settings.micro_batch_rows;
    let ids = [1, 2, 3].map(|id| world.create(id));
    world.settle();
    world.replica_up(0);
    world.until(ids[0], |record| record.steps == 1);
    let status = ids.map(|id| world.status(id));
    assert_eq!(status, [JobStatus::Running, JobStatus::Queued, JobStatus::Queued]);
    world.settle();
    assert!(ids.iter().all(|id| world.status(*id) == JobStatus::Succeeded));
    let waited = ids.map(|id| world.story(id).iter().filter(|what| *what == "waits").count());
    assert_eq!(waited, [0, 1, 1], "each that had to is told once");
    let order: Vec<JobId> = world.opened.iter().map(|(id, _)| *id).collect();
    assert_eq!(order, [ids[0], ids[0], ids[1], ids[1], ids[2], ids[2]]);
    let events = world.events(ids[1]);
    let why = events.iter().find_map(|event| match &event.what {
        JobEventKind::WaitsForMemory(why) => Some(why.clone()),
        _ => None,
    });
    assert!(why.unwrap().contains("other jobs and adapters leave"));
}

#[test]
fn adapters_in_memory_count_and_what_they_give_back_is_used() {
    let settings = settings();
    let need = largest(&settings, false, 8);
    let mut world = world(need);
    let id = world.create(1);
    world.replica_up(0);
    let replica = ReplicaId(0);
    world.event(Event::AdaptersHeld { replica, bytes: ADAPTER_MEMORY + Bytes(1) });
    world.settle();
    assert_eq!(world.status(id), JobStatus::Queued);
    world.event(Event::AdaptersHeld { replica, bytes: ADAPTER_MEMORY });
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}

#[test]
fn what_a_session_has_reserved_is_shown_and_given_back() {
    let mut world = World::new(1);
    let id = world.create(1);
    world.until(id, |record| record.steps == 1);
    let ranks = world.up[&ReplicaId(0)].ranks.clone();
    let reserved = |world: &World| -> Vec<Bytes> {
        ranks.iter().map(|rank| world.jobs.reserved_on(rank.connection)).collect()
    };
    let own = session_bytes(&settings(), true, settings().micro_batch_rows);
    assert_eq!(reserved(&world), own);
    let left = world.memory - own.into_iter().max().unwrap();
    assert_eq!(world.jobs.left_for_adapters(ReplicaId(0)), Some(left), "of its fullest rank");
    assert_eq!(world.jobs.left_for_adapters(ReplicaId(1)), None);
    world.settle();
    assert_eq!(reserved(&world), [Bytes(0); 2]);
    assert_eq!(world.jobs.left_for_adapters(ReplicaId(0)), None, "nothing is reserved any more");
}

#[test]
fn a_job_that_has_learnt_something_waits_for_room_instead_of_failing() {
    let mut world = World::new(1);
    let id = world.create(1);
    world.until(id, |record| record.steps == 2);
    world.replica_dies(0);
    world.memory = Bytes(1 << 10);
    world.replica_up(0);
    for _ in 0..10 {
        world.settle();
        world.pass(10_000);
    }
    assert_eq!(world.status(id), JobStatus::Running);
    assert_eq!(world.story(id).iter().filter(|what| *what == "waits").count(), 1);
    world.replica_dies(0);
    world.memory = Bytes(1 << 40);
    world.replica_up(0);
    world.pass(60_000);
    world.settle();
    assert_eq!(world.status(id), JobStatus::Succeeded);
}
