//! A finished adapter, compared with what is served: what is asked for, what is measured, what is shown.

use crate::jobs::{examples, preferences};
use crate::scheduler::{Action, Script};
use crate::world::World;
use ashlar_dataset::DatasetReader;
use ashlar_protocol::admin::{
    Candidate, Comparison, JobError, JobEventKind, JobStatus, PreparedJob, Promotion, PromotionMetric,
    PromotionOutcome, PromotionVerdict,
};
use ashlar_protocol::serving::{CompareAdapters, FailureKind, FinishReason, Submit};
use ashlar_vocabulary::{AdapterId, BlobId, FileId, JobId, ModelDigest, TokenId};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::Cursor;
use std::sync::{Arc, Mutex};

const CANDIDATE: AdapterId = AdapterId(BlobId([1; 32]));
const SERVED: AdapterId = AdapterId(BlobId([2; 32]));

/// The right answers, by what they are asked with.
type Answers = Arc<Mutex<HashMap<Vec<TokenId>, Vec<TokenId>>>>;

fn says(tokens: &[TokenId]) -> Script {
    let mut script: Script = tokens.iter().map(|token| Action::Token(*token)).collect();
    script.push(Action::Finish(FinishReason::Stop));
    script
}

/// A job with a file to compare on, prepared.
async fn prepared(world: &World, body: Value) -> Result<PreparedJob, JobError> {
    let before = world.scheduler.admin(|admin| admin.prepared.len());
    let answer = world.tune(body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    world.scheduler.until_admin(|admin| admin.prepared.len() > before).await;
    world.scheduler.admin(|admin| admin.prepared[before].1.clone())
}

async fn body(world: &World, held_out: &[u8], metric: &str) -> Value {
    let (training, held_out) = (world.upload(&examples(12)).await, world.upload(held_out).await);
    json!({"model": "tiny", "training_file": training, "promote": {"metric": metric, "file": held_out}})
}

fn asked(evaluation: BlobId, metric: PromotionMetric, served: Option<(u64, AdapterId)>) -> CompareAdapters {
    let (job, model_digest) = (JobId(7), ModelDigest([0xab; 32]));
    CompareAdapters { job, model_digest, metric, evaluation, candidate: CANDIDATE, served }
}

async fn compared(world: &World, asked: &CompareAdapters) -> Result<Comparison, String> {
    let before = world.scheduler.admin(|admin| admin.compared.len());
    world.scheduler.compare(asked).await;
    world.scheduler.until_admin(|admin| admin.compared.len() > before).await;
    world.scheduler.admin(|admin| {
        let (job, outcome) = admin.compared[before].clone();
        assert_eq!(job, asked.job);
        outcome
    })
}

#[tokio::test]
async fn both_are_asked_the_same_questions_greedily_and_behind_everybody_else() {
    let answers = Answers::default();
    let known = answers.clone();
    let world = World::tuning_with(move |submit: &Submit| {
        let right = known.lock().unwrap().get(&submit.prompt).cloned().unwrap();
        let number = submit.prompt.iter().sum::<u32>();
        match submit.adapter {
            Some(CANDIDATE) => says(&right),
            // Half of the answers, and others that begin wrong: what comes after is not waited for.
            Some(SERVED) if number % 2 == 0 => says(&right),
            Some(SERVED) => vec![Action::Token(submit.prompt[0]), Action::Gate],
            // It stops too early.
            _ => says(&right[right.len() - 1..]),
        }
    })
    .await;
    let prepared = prepared(&world, body(&world, &examples(20), "exact_match").await).await.unwrap();
    let evaluation = prepared.evaluation.unwrap();
    let bytes = world.blobs().await.read(evaluation, 1 << 20).await.unwrap();
    let mut samples = DatasetReader::open(Cursor::new(bytes)).unwrap();
    let mut odd = 0;
    for index in 0..20 {
        let sequence = samples.read(index).unwrap().sequences.remove(0);
        let [range] = sequence.targets() else { panic!("{sequence:?}") };
        let (prompt, answer) = sequence.tokens().split_at(range.start as usize);
        odd += prompt.iter().sum::<u32>() % 2;
        answers.lock().unwrap().insert(prompt.to_vec(), answer.to_vec());
    }
    let asked_of = |served| asked(evaluation, PromotionMetric::ExactMatch, served);
    let figures = compared(&world, &asked_of(Some((3, SERVED)))).await.unwrap();
    let share = f64::from(20 - odd) / 20.0;
    assert_eq!(figures, Comparison { candidate: 1.0, served: share, against: Some(3), count: 20 });
    let figures = compared(&world, &asked_of(None)).await.unwrap();
    assert_eq!(figures, Comparison { candidate: 1.0, served: 0.0, against: None, count: 20 });
    let submits = world.scheduler.submits();
    assert_eq!(submits.len(), 80);
    for submit in submits {
        assert_eq!((submit.sampling.temperature, submit.priority), (0.0, i32::MAX));
        assert!(!submit.stop_tokens.is_empty() && submit.max_new_tokens < 32, "{submit:?}");
    }
}

#[tokio::test]
async fn losses_are_measured_on_the_targets_without_generating() {
    let world = World::tuning_with(|submit: &Submit| {
        assert_eq!((submit.max_new_tokens, submit.sampling.prompt_logprobs), (0, true));
        vec![Action::PromptLogprobs, Action::Finish(FinishReason::Length)]
    })
    .await;
    let prepared = prepared(&world, body(&world, &examples(5), "loss").await).await.unwrap();
    let evaluation = prepared.evaluation.unwrap();
    let bytes = world.blobs().await.read(evaluation, 1 << 20).await.unwrap();
    let samples = DatasetReader::open(Cursor::new(bytes)).unwrap();
    let targets: u32 = samples.sizes().iter().map(|size| size.targets).sum();
    let figures = compared(&world, &asked(evaluation, PromotionMetric::Loss, None)).await.unwrap();
    let count = u64::from(targets);
    assert_eq!(figures, Comparison { candidate: 0.5, served: 0.5, against: None, count });
    assert_eq!(world.scheduler.submits().len(), 10);
}

#[tokio::test]
async fn what_cannot_be_compared_says_why_and_what_has_no_room_is_asked_again() {
    let refusals = Arc::new(Mutex::new(1));
    let world = World::tuning_with(move |submit: &Submit| {
        let mut left = refusals.lock().unwrap();
        match submit.adapter {
            Some(_) if *left > 0 => {
                *left -= 1;
                vec![Action::Fail(FailureKind::Overloaded, "the queue is full")]
            }
            Some(_) => vec![Action::PromptLogprobs, Action::Finish(FinishReason::Length)],
            None => vec![Action::Fail(FailureKind::UnknownModel, "another model is served")],
        }
    })
    .await;
    let prepared = prepared(&world, body(&world, &examples(3), "loss").await).await.unwrap();
    let evaluation = prepared.evaluation.unwrap();
    let served = Some((1, SERVED));
    assert!(compared(&world, &asked(evaluation, PromotionMetric::Loss, served)).await.is_ok());
    let why = compared(&world, &asked(evaluation, PromotionMetric::Loss, None)).await.unwrap_err();
    assert_eq!(why, "another model is served");
    let why = compared(&world, &asked(BlobId([9; 32]), PromotionMetric::Loss, None)).await.unwrap_err();
    assert!(why.contains("cannot read the samples"), "{why}");
}

#[tokio::test]
async fn a_file_to_compare_on_is_checked_with_the_others() {
    let world = World::tuning().await;
    let text = json!({"text": "Once upon a time."}).to_string();
    for (held_out, metric, code) in [
        (preferences(3), "loss", "invalid_evaluation_file"),
        (b"no json\n".to_vec(), "exact_match", "invalid_evaluation_file"),
        (b"\n".to_vec(), "loss", "invalid_n_examples"),
        (text.clone().into_bytes(), "exact_match", "invalid_evaluation_file"),
    ] {
        let error = prepared(&world, body(&world, &held_out, metric).await).await.unwrap_err();
        assert_eq!((error.code.as_str(), error.param.as_deref()), (code, Some("promote.file")), "{metric}");
    }
    let good = prepared(&world, body(&world, text.as_bytes(), "loss").await).await.unwrap();
    assert!(good.evaluation.is_some());
    // The validation file is as good, and preferences are learnt beside examples with an answer.
    let (training, held_out) = (world.upload(&examples(12)).await, world.upload(&examples(3)).await);
    let body = json!({"model": "tiny", "training_file": training, "validation_file": held_out,
        "promote": {"metric": "exact_match"}});
    assert!(prepared(&world, body).await.unwrap().evaluation.is_some());
    let training = world.upload(&preferences(12)).await;
    let body = json!({"model": "tiny", "training_file": training, "method": {"type": "dpo"},
        "promote": {"metric": "exact_match", "file": held_out, "at_least": 0.5}});
    assert!(prepared(&world, body).await.unwrap().evaluation.is_some());
    let promote = world.scheduler.admin(|admin| admin.jobs.last().unwrap().request.promote.unwrap());
    assert_eq!((promote.metric, promote.bound), (PromotionMetric::ExactMatch, Some(0.5)));
}

#[tokio::test]
async fn the_outcome_is_in_the_job_and_its_event() {
    let world = World::tuning().await;
    let answer = world.tune(body(&world, &examples(3), "exact_match").await).await;
    let (name, id) = (
        answer.json()["id"].as_str().unwrap().to_owned(),
        world.scheduler.admin(|admin| admin.jobs[0].request.id),
    );
    assert_eq!(answer.json()["ashlar"]["promote"]["metric"], "exact_match");
    assert_eq!(answer.json()["ashlar"]["promotion"], Value::Null);
    let comparison = Comparison { candidate: 0.25, served: 0.5, against: Some(2), count: 8 };
    let outcome = PromotionOutcome { verdict: PromotionVerdict::NotBetter, comparison: Some(comparison) };
    let served = "ft:tiny:ashlar:mine";
    world.scheduler.admin(|admin| {
        let job = admin.job(id).unwrap();
        job.request.promote =
            Some(Promotion { metric: PromotionMetric::ExactMatch, file: FileId(1), bound: Some(0.1) });
        job.status = JobStatus::Succeeded;
        job.candidate =
            Some(Candidate { name: served.into(), generation: 3, outcome: Some(outcome.clone()) });
        admin.tell(id, JobEventKind::Comparing { name: served.into(), generation: 3 });
        admin.tell(id, JobEventKind::Compared(outcome));
    });
    let job = world.http.get(&format!("/v1/fine_tuning/jobs/{name}")).await.json();
    assert_eq!((&job["status"], &job["fine_tuned_model"]), (&json!("succeeded"), &Value::Null));
    let promotion = &job["ashlar"]["promotion"];
    assert_eq!((&promotion["model"], &promotion["generation"]), (&json!(served), &json!(3)));
    assert_eq!((&promotion["promoted"], &promotion["verdict"]), (&json!(false), &json!("not_better")));
    assert_eq!(job["ashlar"]["promote"]["at_least"], 0.1);
    let events = world.http.get(&format!("/v1/fine_tuning/jobs/{name}/events")).await.json();
    // That its files are valid may be told before or after.
    let told = |text: &str| {
        let mut events = events["data"].as_array().unwrap().iter();
        events.find(|event| event["message"] == text).unwrap_or_else(|| panic!("{events:?}"))
    };
    let event = told(
        "Not promoted, as it is no better than what is served: exact match 0.250 against 0.500 of generation 2, on 8 answers",
    );
    let data = &event["data"];
    assert_eq!((&data["candidate_value"], &data["served_value"]), (&json!(0.25), &json!(0.5)));
    assert_eq!((&data["served_generation"], &data["compared_on"]), (&json!(2), &json!(8)));
    told("Adapter stored as generation 3 of ft:tiny:ashlar:mine, comparing it with what is served there");
}
