//! A job's files, validated for the scheduler: from upload to settled settings and samples, or to the job's error.

use crate::jobs::{examples, preferences};
use crate::world::World;
use ashlar_dataset::plan::{JobPlan, PlanSettings, split};
use ashlar_dataset::{DatasetReader, Method};
use ashlar_protocol::admin::{JobError, PreparedJob};
use ashlar_protocol::training::{TrainingMethod, ValidationData};
use ashlar_vocabulary::Decay;
use serde_json::{Value, json};
use std::io::Cursor;

async fn outcome(
    world: &World,
    training: &[u8],
    validation: Option<&[u8]>,
    more: Value,
) -> Result<PreparedJob, JobError> {
    let mut body = json!({"model": "tiny", "training_file": world.upload(training).await, "seed": 1});
    if let Some(validation) = validation {
        body["validation_file"] = world.upload(validation).await.into();
    }
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let before = world.scheduler.admin(|admin| admin.prepared.len());
    let answer = world.tune(body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    world.scheduler.until_admin(|admin| admin.prepared.len() > before).await;
    world.scheduler.admin(|admin| admin.prepared[before].1.clone())
}

async fn dataset(world: &World, prepared: &PreparedJob) -> DatasetReader<Cursor<Vec<u8>>> {
    let bytes = world.blobs().await.read(prepared.settings.dataset, 1 << 20).await.unwrap();
    DatasetReader::open(Cursor::new(bytes)).unwrap()
}

#[tokio::test]
async fn good_files_become_samples_and_settings() {
    let world = World::tuning().await;
    let prepared = outcome(&world, &examples(40), None, json!({})).await.unwrap();
    let mut samples = dataset(&world, &prepared).await;
    assert_eq!((samples.method(), samples.sizes().len()), (Method::Supervised, 40));
    let first = samples.read(0).unwrap();
    assert!(first.sequences[0].target_count() >= 2, "the answer and the token that ends it");
    let settings = &prepared.settings;
    assert_eq!((settings.epochs, settings.batch_size), (3, 1));
    assert_eq!((settings.steps, settings.steps_per_epoch), (120, 40));
    assert_eq!((settings.method, &settings.validation), (TrainingMethod::Supervised, &ValidationData::None));
    assert_eq!((settings.learning_rate, settings.adam), (2e-4, (0.9, 0.999, 1e-8)));
    assert_eq!((settings.schedule.warmup_steps, settings.norm_max), (4, Some(1.0)));
    assert_eq!(settings.schedule.decay, Decay::Linear { floor: 0.0 });
    assert_eq!((prepared.data.examples, prepared.data.samples), (40, 40));
    assert_eq!((prepared.data.truncated_examples, prepared.data.warnings.len()), (0, 0));
    let plan = PlanSettings { epochs: 3, batch_size: 1, seed: 1 };
    let all = split(samples.sizes(), 0, 1).training;
    let plan = JobPlan::new(samples.sizes().to_vec(), all, plan).unwrap();
    plan.check_micro_batch_rows(settings.micro_batch_rows).unwrap();
    assert_eq!(plan.steps(), settings.steps);
}

#[tokio::test]
async fn asked_again_it_gives_the_same() {
    let world = World::tuning().await;
    let first = outcome(&world, &examples(20), None, json!({})).await.unwrap();
    let job = world.scheduler.admin(|admin| admin.jobs[0].request.id);
    for _ in 0..3 {
        world.scheduler.prepare(job).await;
    }
    world.scheduler.until_admin(|admin| admin.prepared.len() > 1).await;
    let again = world.scheduler.admin(|admin| admin.prepared[1].1.clone()).unwrap();
    assert_eq!(again, first);
}

#[tokio::test]
async fn validation_data_is_a_file_or_set_aside() {
    let world = World::tuning().await;
    let hyper = json!({"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}});
    let prepared = outcome(&world, &examples(20), Some(&examples(3)), hyper).await.unwrap();
    let ValidationData::File(blob) = prepared.settings.validation else { panic!("{prepared:?}") };
    let bytes = world.blobs().await.read(blob, 1 << 20).await.unwrap();
    assert_eq!(DatasetReader::open(Cursor::new(bytes)).unwrap().sizes().len(), 3);
    assert_eq!((prepared.settings.steps, prepared.settings.evaluate_every), (10, 1));
    assert_eq!((prepared.settings.learning_rate, prepared.settings.patience), (1e-4, None));

    let early = json!({"early_stopping": {"patience": 2, "validation_split": 0.25}, "hyperparameters": {"n_epochs": 1}});
    let prepared = outcome(&world, &examples(20), None, early).await.unwrap();
    assert_eq!(prepared.settings.validation, ValidationData::Split { examples: 5 });
    assert_eq!((prepared.settings.steps, prepared.settings.patience), (15, Some(2)));
}

#[tokio::test]
async fn each_method_takes_its_own_files() {
    let world = World::tuning().await;
    let dpo = json!({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}});
    let prepared = outcome(&world, &preferences(10), None, dpo.clone()).await.unwrap();
    assert_eq!(prepared.settings.method, TrainingMethod::Dpo { beta: 0.1 });
    let samples = dataset(&world, &prepared).await;
    assert_eq!((samples.method(), samples.sizes().len()), (Method::Dpo, 10));
    for (file, validation, body, field) in [
        (preferences(10), None, json!({}), "training_file"),
        (examples(10), None, dpo.clone(), "training_file"),
        (preferences(10), Some(examples(10)), dpo, "validation_file"),
        (examples(10), Some(preferences(10)), json!({}), "validation_file"),
    ] {
        let error = outcome(&world, &file, validation.as_deref(), body).await.unwrap_err();
        assert_eq!((error.code, error.param), (format!("invalid_{field}"), Some(field.to_owned())));
        assert!(error.message.contains("does not take"), "{}", error.message);
    }
}

#[tokio::test]
async fn a_bad_file_fails_the_job_with_line_numbers() {
    let world = World::tuning().await;
    let mut malformed = examples(12);
    malformed.extend_from_slice(b"{\"messages\": [}\nnot json\n");
    let cases: Vec<(&str, Vec<u8>, &str, &str)> = vec![
        ("too few", examples(9), "invalid_n_examples", "has 9 example(s), but must have at least 10"),
        ("malformed lines", malformed, "invalid_training_file", "line 13"),
        ("no text", b"\xff\xfe\n".to_vec(), "invalid_training_file", "line 1"),
        ("blank", b"\n\n".to_vec(), "invalid_n_examples", "has 0 example(s)"),
    ];
    let mut blobs = 0;
    for (what, file, code, words) in cases {
        let error = outcome(&world, &file, None, json!({})).await.unwrap_err();
        assert_eq!((error.code.as_str(), error.param.as_deref()), (code, Some("training_file")), "{what}");
        assert!(error.message.contains(words), "{what}: {}", error.message);
        blobs += 1;
        let stored = world.blobs().await.list(None, 100).await.unwrap().blobs.len();
        assert_eq!(stored, blobs, "{what}: the upload is stored, and no samples");
    }
    let error = outcome(&world, &examples(10), Some(b"{}\n"), json!({})).await.unwrap_err();
    assert_eq!(
        (error.code.as_str(), error.param.as_deref()),
        ("invalid_validation_file", Some("validation_file"))
    );
    // As the job shows it.
    let id = world.scheduler.admin(|admin| admin.jobs.last().unwrap().request.id);
    let job = world.http.get(&format!("/v1/fine_tuning/jobs/ftjob-{id}")).await.json();
    assert_eq!(
        (&job["status"], &job["error"]["code"]),
        (&json!("failed"), &json!("invalid_validation_file"))
    );
}

#[tokio::test]
async fn what_is_cut_off_is_told() {
    let world = World::tuning().await;
    let long = json!({"text": "a long text ".repeat(20)});
    let file: String = (0..10).map(|_| format!("{long}\n")).collect();
    let prepared = outcome(&world, file.as_bytes(), None, json!({"max_seq_len": 16})).await.unwrap();
    assert_eq!(prepared.data.truncated_examples, 10);
    assert!(prepared.data.warnings[0].contains("longer than 16 tokens"), "{:?}", prepared.data.warnings);
    let sizes = dataset(&world, &prepared).await.sizes().to_vec();
    assert!(sizes.iter().all(|size| size.rows < 16));
}

#[tokio::test]
async fn content_that_is_gone_fails_the_job() {
    let world = World::tuning().await;
    let id = world.upload(&examples(10)).await;
    let blob = world.scheduler.admin(|admin| admin.files[0].blob);
    world.blobs().await.delete(blob).await.unwrap();
    world.tune(json!({"model": "tiny", "training_file": id})).await;
    world.scheduler.until_admin(|admin| !admin.prepared.is_empty()).await;
    let error = world.scheduler.admin(|admin| admin.prepared[0].1.clone()).unwrap_err();
    assert!(error.code == "server_error" && error.message.contains("not stored"), "{error:?}");
}
