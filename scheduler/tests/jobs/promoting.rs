//! Adapters that are served only if they are better than what is.

use crate::served::NAME;
use crate::world::{World, request};
use ashlar_protocol::admin::{
    AdminFailureKind, AdminReply, AdminRequest, Comparison, JobAction, JobRequest, JobStatus, Promotion,
    PromotionMetric, PromotionVerdict,
};
use ashlar_vocabulary::{FileId, JobId};

fn asking(id: u128, metric: PromotionMetric, bound: Option<f64>) -> JobRequest {
    JobRequest { promote: Some(Promotion { metric, file: FileId(1), bound }), ..request(id) }
}

fn created(metric: PromotionMetric, bound: Option<f64>) -> (World, JobId) {
    let mut world = World::new(1);
    let id = world.create_as(asking(1, metric, bound));
    (world, id)
}

fn verdict(world: &World, id: JobId) -> PromotionVerdict {
    world.record(id).candidate.clone().unwrap().outcome.unwrap().verdict
}

/// Goes on until a gateway compares the job's adapter.
fn until_compared(world: &mut World, id: JobId) {
    while !world.comparing().iter().any(|(_, job)| *job == id) {
        assert!(world.step(), "{:?}", world.record(id));
    }
}

#[test]
fn the_first_adapter_of_a_name_is_served_if_it_beats_the_base_model() {
    let (mut world, id) = created(PromotionMetric::ExactMatch, None);
    world.settle();
    let record = world.record(id).clone();
    assert_eq!((record.status, record.fine_tuned_model.as_deref()), (JobStatus::Succeeded, Some(NAME)));
    assert_eq!(
        (world.served.generation, world.served.generations.as_slice()),
        (1, &[record.adapter.unwrap()][..])
    );
    let outcome = record.candidate.unwrap().outcome.unwrap();
    let comparison = Comparison { candidate: 0.75, served: 0.5, against: None, count: 10 };
    assert_eq!((outcome.verdict, outcome.comparison), (PromotionVerdict::Better, Some(comparison)));
    let story = world.story(id).join(", ");
    assert!(story.ends_with("checkpoint 6, comparing 1, compared true, model, succeeded"), "{story}");
    assert_eq!(world.stored.jobs[&id].record, *world.record(id));
}

#[test]
fn an_adapter_that_is_no_better_is_kept_beside_what_is_served() {
    for (metric, figures, bound, expected) in [
        (PromotionMetric::ExactMatch, (0.5, 0.75), None, PromotionVerdict::NotBetter),
        (PromotionMetric::ExactMatch, (0.5, 0.5), None, PromotionVerdict::NotBetter),
        (PromotionMetric::Loss, (0.75, 0.5), None, PromotionVerdict::NotBetter),
        (PromotionMetric::Loss, (f64::NAN, 0.5), None, PromotionVerdict::NotBetter),
        (PromotionMetric::ExactMatch, (0.75, 0.5), Some(0.8), PromotionVerdict::OutOfBound),
        (PromotionMetric::Loss, (0.5, 0.75), Some(0.4), PromotionVerdict::OutOfBound),
    ] {
        let (mut world, id) = created(metric, bound);
        world.served.figures = Ok(figures);
        world.settle();
        let record = world.record(id).clone();
        assert_eq!(verdict(&world, id), expected);
        assert_eq!(
            (record.status, record.fine_tuned_model, record.error),
            (JobStatus::Succeeded, None, None)
        );
        assert_eq!((world.served.generation, world.served.generations.len()), (0, 1));
        assert_eq!(record.adapter, record.checkpoints.last().map(|last| last.adapter));
        assert!(world.story(id).join(", ").ends_with("comparing 1, compared false, succeeded"));
    }
    for (metric, figures, bound) in [
        (PromotionMetric::Loss, (0.25, 0.5), Some(0.25)),
        (PromotionMetric::ExactMatch, (0.75, 0.5), Some(0.75)),
    ] {
        let (mut world, id) = created(metric, bound);
        world.served.figures = Ok(figures);
        world.settle();
        assert_eq!(verdict(&world, id), PromotionVerdict::Better);
    }
}

#[test]
fn jobs_of_a_suffix_share_a_name_and_each_has_to_beat_the_one_before() {
    let (mut world, first) = created(PromotionMetric::ExactMatch, None);
    world.settle();
    let worse = world.create_as(asking(2, PromotionMetric::ExactMatch, None));
    world.served.figures = Ok((0.5, 0.75));
    world.settle();
    let better = world.create_as(asking(3, PromotionMetric::ExactMatch, None));
    world.served.figures = Ok((0.8, 0.75));
    world.settle();
    let comparison = |id| world.record(id).candidate.clone().unwrap().outcome.unwrap().comparison.unwrap();
    assert_eq!([first, worse, better].map(|id| comparison(id).against), [None, Some(1), Some(1)]);
    assert_eq!((world.served.generation, world.served.generations.len()), (3, 3));
    let names = [first, worse, better].map(|id| world.record(id).fine_tuned_model.clone());
    assert_eq!(names, [Some(NAME.to_owned()), None, Some(NAME.to_owned())]);
    // Checkpoints keep names of their own.
    assert!(world.record(better).checkpoints[0].model.starts_with("ft:demo:ashlar:mine:00000003:ckpt-step-"));
}

#[test]
fn what_was_not_better_can_be_served_by_hand_and_counts_from_then_on() {
    let (mut world, _) = created(PromotionMetric::ExactMatch, None);
    world.served.figures = Ok((0.5, 0.75));
    world.settle();
    world.served.generation = 1;
    let second = world.create_as(asking(2, PromotionMetric::ExactMatch, None));
    world.settle();
    let against =
        world.record(second).candidate.clone().unwrap().outcome.unwrap().comparison.unwrap().against;
    assert_eq!(against, Some(1));
    // While it is compared, too: then there is nothing left to decide.
    let third = world.create_as(asking(3, PromotionMetric::ExactMatch, None));
    until_compared(&mut world, third);
    world.served.generation = 3;
    world.settle();
    assert_eq!(verdict(&world, third), PromotionVerdict::ServedAlready);
    assert_eq!(world.record(third).fine_tuned_model.as_deref(), Some(NAME));
}

#[test]
fn another_generation_that_is_served_meanwhile_is_compared_with_anew() {
    let (mut world, id) = created(PromotionMetric::ExactMatch, None);
    until_compared(&mut world, id);
    assert!(world.promote_one());
    // Between the comparison and what follows from it.
    world.served.generations.push(world.served.generations[0]);
    world.served.generation = 2;
    world.served.figures = Ok((0.75, 0.8));
    world.settle();
    world.pass(1_000);
    world.settle();
    assert_eq!((verdict(&world, id), world.served.compared), (PromotionVerdict::NotBetter, 2));
    assert_eq!((world.served.generation, world.status(id)), (2, JobStatus::Succeeded));
}

#[test]
fn a_gateway_that_dies_is_replaced_and_one_that_cannot_compare_is_asked_again_in_time() {
    let (mut world, id) = created(PromotionMetric::Loss, None);
    world.gateway_up(2);
    until_compared(&mut world, id);
    for _ in 0..8 {
        let (with, _) = world.comparing()[0];
        world.gateway_dies(with);
        assert!(world.comparing().iter().all(|(other, _)| *other != with));
        world.gateway_up(with.0 + 10);
    }
    assert_eq!(world.served.compared, 0);
    world.served.figures = Err("the samples are gone".into());
    for _ in 0..10 {
        world.settle();
        world.pass(60_000);
    }
    assert_eq!(verdict(&world, id), PromotionVerdict::NotCompared("the samples are gone".into()));
    assert_eq!((world.status(id), world.served.compared), (JobStatus::Succeeded, 3));
    assert_eq!(world.served.generation, 0, "what is not known to be better is not served");
}

#[test]
fn a_gateway_that_never_answers_is_given_up() {
    let (mut world, id) = created(PromotionMetric::Loss, None);
    until_compared(&mut world, id);
    while world.store_works() {}
    for _ in 0..3 {
        world.pass(3_600_001);
        world.pass(60_000);
    }
    let PromotionVerdict::NotCompared(why) = verdict(&world, id) else { panic!("{:?}", world.record(id)) };
    assert!(why.contains("in time"), "{why}");
}

#[test]
fn whenever_the_scheduler_dies_the_outcome_is_the_same() {
    for (figures, model) in [((0.75, 0.5), Some(NAME)), ((0.5, 0.75), None)] {
        for moment in 0..100 {
            let (mut world, id) = created(PromotionMetric::ExactMatch, None);
            world.served.figures = Ok(figures);
            for _ in 0..moment {
                world.step();
            }
            world.scheduler_dies();
            for _ in 0..4 {
                world.settle();
                world.pass(1_000);
            }
            let record = world.record(id);
            assert_eq!(
                (record.status, record.fine_tuned_model.as_deref()),
                (JobStatus::Succeeded, model),
                "moment {moment}"
            );
            assert_eq!(world.served.generations.len(), 1, "moment {moment}: it is stored once");
            assert_eq!(world.served.generation, u64::from(model.is_some()), "moment {moment}");
            let story = world.story(id);
            let told = story.iter().filter(|what| what.starts_with("compared")).count();
            assert_eq!(told, 1, "moment {moment}: {story:?}");
        }
    }
}

#[test]
fn nothing_follows_from_a_verdict_before_it_is_durable() {
    let (mut world, id) = created(PromotionMetric::ExactMatch, None);
    until_compared(&mut world, id);
    while world.store_works() {}
    world.store_goes();
    assert!(world.promote_one(), "the figures");
    assert!(!world.promote_one(), "the candidate is not asked to be served");
    world.store_comes();
    world.settle();
    assert_eq!((world.served.generation, world.served.compared), (1, 1));
}

#[test]
fn a_job_whose_adapter_is_compared_can_be_cancelled_but_not_paused() {
    let (mut world, id) = created(PromotionMetric::ExactMatch, None);
    until_compared(&mut world, id);
    let reply = world.control(id, JobAction::Pause);
    assert!(matches!(reply, AdminReply::Refused(failure) if failure.kind == AdminFailureKind::Conflict));
    let reply = world.control(id, JobAction::Cancel);
    assert!(matches!(reply, AdminReply::Job(job) if job.status == JobStatus::Cancelled));
    world.settle();
    assert_eq!((world.served.generation, world.status(id)), (0, JobStatus::Cancelled));
    assert!(!world.withdrawn.contains(&NAME.to_owned()), "the name may be others'");
    // Once it may be served at any moment it is too late.
    let id = world.create_as(asking(2, PromotionMetric::ExactMatch, None));
    until_compared(&mut world, id);
    assert!(world.promote_one());
    while world.store_works() {}
    let reply = world.control(id, JobAction::Cancel);
    assert!(matches!(reply, AdminReply::Refused(failure) if failure.kind == AdminFailureKind::Conflict));
    world.settle();
    assert_eq!((world.status(id), world.served.generation), (JobStatus::Succeeded, 2));
}

#[test]
fn a_file_to_compare_on_has_to_be_there() {
    let mut world = World::new(1);
    let promote = Some(Promotion { metric: PromotionMetric::Loss, file: FileId(9), bound: None });
    let reply = world.ask(AdminRequest::CreateJob(Box::new(JobRequest { promote, ..request(1) })));
    assert!(matches!(reply, AdminReply::Refused(failure) if failure.kind == AdminFailureKind::NotFound));
}
