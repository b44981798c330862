use crate::world::{ADAPTER_MEMORY, DIGEST, World, file, request, settings, shape};
use ashlar_protocol::admin::{
    AdminFailureKind, AdminReply, AdminRequest, JobRequest, JobStatus, LoadAdapter, Page,
};
use ashlar_protocol::training::{TrainingSettings, ValidationData};
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::jobs::{Effect, Event, Jobs, JobsConfig};
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{AdapterId, BlobId, FileId, JobId, LeaseTerm, ModelDigest};

fn kind(reply: &AdminReply) -> AdminFailureKind {
    match reply {
        AdminReply::Refused(failure) => failure.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn files_are_put_read_listed_newest_first_and_deleted() {
    let mut world = World::new(0);
    for id in 2..6 {
        let reply = world.ask(AdminRequest::PutFile(file(id)));
        assert_eq!(reply, AdminReply::File(file(id)));
        assert!(world.stored.files.contains_key(&FileId(id)), "it is durable before it is confirmed");
    }
    assert_eq!(world.ask(AdminRequest::PutFile(file(5))), AdminReply::File(file(5)), "it may be said twice");
    let mut other = file(5);
    other.bytes += 1;
    assert_eq!(kind(&world.ask(AdminRequest::PutFile(other))), AdminFailureKind::Conflict);
    let page = |after, limit| AdminRequest::ListFiles(Page { after, limit });
    assert_eq!(world.ask(page(None, 2)), AdminReply::Files(vec![file(5), file(4)], true));
    assert_eq!(
        world.ask(page(Some(FileId(4)), 9)),
        AdminReply::Files(vec![file(3), file(2), file(1)], false)
    );
    assert_eq!(kind(&world.ask(page(Some(FileId(77)), 9))), AdminFailureKind::Invalid);
    assert_eq!(world.ask(AdminRequest::DeleteFile(FileId(4))), AdminReply::Done);
    assert!(!world.stored.files.contains_key(&FileId(4)));
    assert_eq!(kind(&world.ask(AdminRequest::GetFile(FileId(4)))), AdminFailureKind::NotFound);
    world.scheduler_dies();
    assert_eq!(world.ask(AdminRequest::GetFile(FileId(3))), AdminReply::File(file(3)));
    assert_eq!(world.ask(page(Some(FileId(5)), 1)), AdminReply::Files(vec![file(3)], true));
}

#[test]
fn a_job_is_made_once_and_only_for_the_model_and_files_that_are_there() {
    let mut world = World::new(0);
    let id = world.create(1);
    assert_eq!(world.create(1), id, "it may be said twice");
    assert_eq!(world.preparing.len(), 1);
    let mut ask = |request: JobRequest| world.ask(AdminRequest::CreateJob(Box::new(request)));
    let other = JobRequest { suffix: None, ..request(1) };
    assert_eq!(kind(&ask(other)), AdminFailureKind::Conflict);
    let other = JobRequest { model_digest: ModelDigest([8; 32]), ..request(2) };
    assert_eq!(kind(&ask(other)), AdminFailureKind::NotFound);
    let other = JobRequest { training_file: FileId(9), ..request(2) };
    assert_eq!(kind(&ask(other)), AdminFailureKind::NotFound);
    let other = JobRequest { validation_file: Some(FileId(9)), ..request(2) };
    assert_eq!(kind(&ask(other)), AdminFailureKind::NotFound);
    let other = JobRequest { settings: "x".repeat(200_000), ..request(2) };
    assert_eq!(kind(&ask(other)), AdminFailureKind::Invalid);
}

#[test]
fn jobs_that_have_not_ended_are_bounded() {
    let mut world = World::new(0);
    for id in 1..=1000 {
        world.create(id);
    }
    let reply = world.ask(AdminRequest::CreateJob(Box::new(request(1001))));
    assert_eq!(kind(&reply), AdminFailureKind::Full);
    let AdminReply::Jobs(jobs, true) = world.ask(AdminRequest::ListJobs(Page { after: None, limit: 3 }))
    else {
        panic!("no list");
    };
    let ids: Vec<JobId> = jobs.iter().map(|job| job.request.id).collect();
    assert_eq!(ids, [1000, 999, 998].map(|id| request(id).id));
}

#[test]
fn events_come_newest_first_from_memory_and_store_alike() {
    let mut world = World::new(1);
    world.settings =
        TrainingSettings { validation: ValidationData::None, steps: 300, steps_per_epoch: 300, ..settings() };
    let id = world.create(1);
    world.until(id, |record| record.steps == 299);
    let middle = world.events(id).len();
    assert_eq!(middle as u64, world.record(id).events);
    world.settle();
    let all = world.events(id);
    assert_eq!(all.len(), 4 + 300 + 3);
    world.scheduler_dies();
    assert_eq!(world.events(id), all, "another scheduler knows them all");
    let page = Page { after: Some(130), limit: 4 };
    let AdminReply::Events(listed, true) = world.ask(AdminRequest::ListEvents(id, page)) else {
        panic!("no list");
    };
    assert!(listed.iter().map(|event| event.number).eq([129, 128, 127, 126]));
    let page = Page { after: None, limit: 1 };
    let AdminReply::Checkpoints(listed, false) = world.ask(AdminRequest::ListCheckpoints(id, page)) else {
        panic!("no list");
    };
    assert_eq!(listed[0].step, 300);
}

#[test]
fn a_file_that_is_deleted_does_not_concern_a_job_that_was_validated() {
    let mut world = World::new(1);
    let (first, second) = (world.create(1), world.create(2));
    assert!(world.prepare_one());
    world.ask(AdminRequest::DeleteFile(FileId(1)));
    let gateway = world.preparing[0].0;
    world.gateway_up(2);
    world.gateway_dies(gateway);
    world.settle();
    assert_eq!(world.status(first), JobStatus::Succeeded);
    assert_eq!(world.record(second).error.as_ref().unwrap().code, "file_not_found");
}

#[test]
fn before_the_store_is_read_and_without_blobs_nothing_is_promised() {
    let mut effects = Vec::new();
    let config = JobsConfig {
        term: LeaseTerm(1),
        model_digest: DIGEST,
        shape: shape(),
        adapter_memory: ADAPTER_MEMORY,
        max_jobs_running: 1,
        blobs: false,
    };
    let mut jobs = Jobs::new(config);
    let put = || Event::Admin {
        gateway: GatewayId(1),
        call: 1,
        tenant: None,
        request: Box::new(AdminRequest::PutFile(file(1))),
    };
    jobs.handle(Millis(0), put(), &mut effects);
    jobs.handle(Millis(0), Event::Loaded(Box::default()), &mut effects);
    jobs.handle(Millis(0), put(), &mut effects);
    let messages: Vec<String> = effects
        .iter()
        .map(|effect| match effect {
            Effect::Reply { reply, .. } => match &**reply {
                AdminReply::Refused(failure) => failure.message.clone(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(messages[0].contains("try again") && messages[1].contains("set `blobs`"), "{messages:?}");
    // Calls about adapters are not for this core.
    let load = LoadAdapter {
        name: "a".into(),
        adapter: AdapterId(BlobId([1; 32])),
        root: String::new(),
        created_at: 0,
        replace: false,
        expected_generation: None,
        hold_back: false,
        owner: None,
    };
    effects.clear();
    let request = Box::new(AdminRequest::LoadAdapter(load));
    jobs.handle(
        Millis(0),
        Event::Admin { gateway: GatewayId(1), call: 2, tenant: None, request },
        &mut effects,
    );
    assert!(effects.is_empty());
}
