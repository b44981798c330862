//! Files and jobs of others are not there, and training has its end where its owner's minutes have.

use crate::world::{World, file, request};
use ashlar_protocol::admin::{
    AdminFailureKind, AdminReply, AdminRequest, FileRecord, JobAction, JobRequest, JobStatus, Page,
};
use ashlar_vocabulary::{FileId, JobId, Tenant};

fn tenant(name: &str) -> Option<Tenant> {
    Some(Tenant(name.into()))
}

fn kind(reply: &AdminReply) -> Option<AdminFailureKind> {
    match reply {
        AdminReply::Refused(failure) => Some(failure.kind),
        _ => None,
    }
}

#[test]
fn what_belongs_to_others_is_not_there() {
    let mut world = World::new(0);
    let owned = |id, owner| FileRecord { owner, ..file(id) };
    for record in [owned(11, tenant("blue")), owned(12, tenant("red")), owned(13, tenant("blue"))] {
        assert_eq!(kind(&world.ask(AdminRequest::PutFile(record))), None);
    }
    let job = |id, file: u128, owner| JobRequest { training_file: FileId(file), owner, ..request(id) };
    let blues = world.create_as(job(1, 11, tenant("blue")));
    let reds = world.create_as(job(2, 12, tenant("red")));

    world.tenant = tenant("blue");
    let foreign = [
        AdminRequest::GetFile(FileId(12)),
        AdminRequest::DeleteFile(FileId(12)),
        AdminRequest::GetFile(FileId(1)),
        AdminRequest::CreateJob(Box::new(job(3, 12, tenant("blue")))),
        AdminRequest::CreateJob(Box::new(JobRequest {
            validation_file: Some(FileId(12)),
            ..job(3, 11, tenant("blue"))
        })),
        AdminRequest::GetJob(reds),
        AdminRequest::ControlJob(reds, JobAction::Cancel),
        AdminRequest::ListEvents(reds, Page { after: None, limit: 9 }),
        AdminRequest::ListCheckpoints(reds, Page { after: None, limit: 9 }),
    ];
    for request in foreign {
        let reply = world.ask(request.clone());
        assert_eq!(kind(&reply), Some(AdminFailureKind::NotFound), "{request:?}");
    }
    // And in the same words as what nobody has.
    let said = |reply: AdminReply| match reply {
        AdminReply::Refused(failure) => failure.message,
        other => panic!("{other:?}"),
    };
    let (foreign, unknown) = (JobId(2 << 96), JobId(7 << 96));
    let (foreign_said, unknown_said) =
        (said(world.ask(AdminRequest::GetJob(foreign))), said(world.ask(AdminRequest::GetJob(unknown))));
    assert_eq!(
        foreign_said.replace(&foreign.to_string(), ""),
        unknown_said.replace(&unknown.to_string(), "")
    );

    let files = world.ask(AdminRequest::ListFiles(Page { after: None, limit: 1 }));
    assert_eq!(files, AdminReply::Files(vec![owned(13, tenant("blue"))], true));
    let files = world.ask(AdminRequest::ListFiles(Page { after: Some(FileId(13)), limit: 9 }));
    assert_eq!(files, AdminReply::Files(vec![owned(11, tenant("blue"))], false));
    let after_a_foreign_one = world.ask(AdminRequest::ListFiles(Page { after: Some(FileId(12)), limit: 9 }));
    assert_eq!(kind(&after_a_foreign_one), Some(AdminFailureKind::Invalid));
    let AdminReply::Jobs(jobs, false) = world.ask(AdminRequest::ListJobs(Page { after: None, limit: 9 }))
    else {
        panic!("no list");
    };
    assert_eq!(jobs.iter().map(|job| job.request.id).collect::<Vec<_>>(), [blues]);

    world.tenant = None;
    for id in [blues, reds] {
        assert!(matches!(world.ask(AdminRequest::GetJob(id)), AdminReply::Job(_)), "who sees everything");
    }
}

#[test]
fn what_a_job_makes_is_its_owners() {
    let mut world = World::new(2);
    let id = world.create_as(JobRequest { owner: tenant("blue"), ..request(1) });
    world.settle();
    world.tenant = tenant("blue");
    let record = world.record(id).clone();
    assert_eq!(record.status, JobStatus::Succeeded);
    assert!(record.fine_tuned_model.as_ref().unwrap().starts_with("ft:demo:blue:mine:"), "{record:?}");
    let made = record.result_files.iter().chain(record.checkpoints.iter().flat_map(|at| &at.files));
    for file in made.copied().collect::<Vec<_>>() {
        assert!(matches!(world.ask(AdminRequest::GetFile(file)), AdminReply::File(_)));
        world.tenant = tenant("red");
        assert_eq!(kind(&world.ask(AdminRequest::GetFile(file))), Some(AdminFailureKind::NotFound));
        world.tenant = tenant("blue");
    }
}

#[test]
fn training_ends_with_its_owners_minutes() {
    let mut world = World::new(2);
    let limited = |id| JobRequest { owner: tenant("blue"), training_minutes_max: Some(0), ..request(id) };
    let reply = world.ask(AdminRequest::CreateJob(Box::new(limited(1))));
    assert_eq!(kind(&reply), Some(AdminFailureKind::Full));
    let free = world.create_as(JobRequest { training_minutes_max: Some(1), ..limited(2) });
    world.settle();
    assert_eq!(world.status(free), JobStatus::Succeeded);

    let long = world.create_as(JobRequest { training_minutes_max: Some(1), ..limited(3) });
    world.until(long, |record| record.steps == 1);
    world.later(61_000);
    world.settle();
    let record = world.record(long);
    assert_eq!(record.status, JobStatus::Failed, "{record:?}");
    assert_eq!(record.error.as_ref().unwrap().code, "quota_exceeded");
    assert_eq!(record.steps, 2, "the step that took so long counts");
}
