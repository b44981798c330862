//! `/v1/fine_tuning/jobs`: what is asked for, what is shown, events as they come.

use crate::world::World;
use ashlar_protocol::admin::{Checkpoint, JobEventKind, JobStatus};
use ashlar_protocol::training::{Rewards, StepMetrics, TrainingMethod};
use ashlar_store::blobs::Manifest;
use ashlar_vocabulary::{AdapterId, BlobId, FileId, JobId};
use async_openai::types::finetuning::{
    FineTuningJob, FineTuningJobCheckpoint, FineTuningJobStatus, ListFineTuningJobCheckpointsResponse,
    ListFineTuningJobEventsResponse, ListPaginatedFineTuningJobsResponse,
};
use serde_json::{Value, json};

/// Enough good examples.
pub(crate) fn examples(count: usize) -> Vec<u8> {
    let line = |i: usize| {
        let messages = json!([
            {"role": "user", "content": format!("What is {i} + 1?")},
            {"role": "assistant", "content": format!("{}", i + 1)},
        ]);
        format!("{}\n", json!({ "messages": messages }))
    };
    (0..count).map(line).collect::<String>().into_bytes()
}

/// Enough good preferences.
pub(crate) fn preferences(count: usize) -> Vec<u8> {
    let answer = |text: &str| json!([{"role": "assistant", "content": text}]);
    let line = |i: usize| {
        let input = json!({"messages": [{"role": "user", "content": format!("{i}?")}]});
        let pair =
            json!({"input": input, "preferred_output": answer("yes"), "non_preferred_output": answer("no")});
        format!("{pair}\n")
    };
    (0..count).map(line).collect::<String>().into_bytes()
}

fn metrics(loss: f64) -> StepMetrics {
    StepMetrics {
        loss,
        accuracy: 0.5,
        learning_rate: 1e-4,
        gradient_norm: 2.0,
        targets: 10,
        tokens: 100,
        skipped: false,
        rewards: None,
    }
}

fn step(step: u64) -> JobEventKind {
    JobEventKind::Step { step, steps: 3, metrics: metrics(0.2249) }
}

/// A job whose files are validated.
async fn job(world: &World) -> (String, JobId) {
    let file = world.upload(&examples(12)).await;
    let answer = world.tune(json!({"model": "tiny", "training_file": file})).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    world.scheduler.until_admin(|admin| !admin.prepared.is_empty()).await;
    let name = answer.json()["id"].as_str().unwrap().to_owned();
    (name, world.scheduler.admin(|admin| admin.jobs[0].request.id))
}

#[tokio::test]
async fn a_job_has_openais_shape() {
    let world = World::tuning().await;
    let file = world.upload(&examples(12)).await;
    let body = json!({"model": "tiny", "training_file": file, "suffix": "mine", "seed": 7, "metadata": {"a": "b"},
        "shape": 1, "lora": {"rank": 3}});
    let answer = world.tune(body).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert_eq!(answer.header("x-ashlar-warning"), "ignored unknown fields: shape, lora.rank");
    let value = answer.json();
    let job: FineTuningJob = serde_json::from_value(value.clone()).unwrap();
    assert!(job.id.starts_with("ftjob-"));
    assert_eq!((job.object.as_str(), job.model.as_str()), ("fine_tuning.job", "tiny"));
    assert_eq!(job.status, FineTuningJobStatus::ValidatingFiles);
    assert_eq!((job.training_file, job.seed), (file, Some(7)));
    assert_eq!((job.finished_at, job.fine_tuned_model, job.trained_tokens), (None, None, None));
    assert!(job.error.is_none() && job.result_files.is_empty());
    let auto = json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"});
    assert_eq!(value["hyperparameters"], auto);
    assert_eq!(value["method"], json!({"type": "supervised", "supervised": {"hyperparameters": auto}}));
    assert_eq!(value["metadata"], json!({"a": "b"}));
    // Settled once the files are validated.
    world.scheduler.until_admin(|admin| !admin.prepared.is_empty()).await;
    let settled = world.http.get(&format!("/v1/fine_tuning/jobs/{}", job.id)).await.json();
    assert_eq!(settled["status"], "queued");
    assert_eq!(
        settled["hyperparameters"],
        json!({"n_epochs": 8, "batch_size": 1, "learning_rate_multiplier": 1.0})
    );
    assert_eq!(settled["ashlar"]["total_steps"], 96);
    assert_eq!(settled["ashlar"]["lora"]["r"], 16);
    assert_eq!(settled["ashlar"]["data"]["examples"], 12);
}

#[tokio::test]
async fn what_is_chosen_reaches_the_scheduler() {
    let world = World::tuning().await;
    let file = world.upload(&examples(12)).await;
    let base = json!({"model": "alias", "training_file": file, "seed": 1});
    let with = |more: Value| {
        let mut body = base.clone();
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let settings = |body: Value| {
        let world = &world;
        async move {
            let answer = world.tune(body).await;
            assert_eq!(answer.status, 200, "{}", answer.text());
            let settings = world.scheduler.admin(|admin| admin.jobs.last().unwrap().request.settings.clone());
            serde_json::from_str::<Value>(&settings).unwrap()
        }
    };
    let default = settings(base.clone()).await;
    assert_eq!((&default["method"], &default["epochs"]), (&json!("supervised"), &Value::Null));
    assert_eq!((&default["learning_rate"], &default["grad_clip"]), (&json!(2e-4), &json!(1.0)));
    assert_eq!(default["full"], Value::Null);
    let full = settings(with(json!({"full": true}))).await;
    assert_eq!((&full["full"], &full["learning_rate"]), (&json!("model"), &json!(1e-5)));
    let random = settings(with(json!({"full": true, "init": "random", "lora": null}))).await;
    assert_eq!((&random["full"], &random["learning_rate"]), (&json!("random"), &json!(1e-3)));
    assert_eq!((&default["lora"]["rank"], &default["lora"]["alpha"]), (&json!(16), &json!(32.0)));
    assert_eq!(default["lora"]["targets"].as_array().unwrap().len(), 7);
    assert_eq!(default["max_seq_len"], 4096);
    assert_eq!(default["schedule"]["decay"], "linear");
    let hyper = json!({"n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 0.5});
    let deprecated = settings(with(json!({"hyperparameters": hyper}))).await;
    let method = json!({"type": "supervised", "supervised": {"hyperparameters": hyper}});
    assert_eq!(settings(with(json!({"method": method}))).await, deprecated);
    assert_eq!((&deprecated["epochs"], &deprecated["batch_size"]), (&json!(2), &Value::Null));
    let ours = settings(with(json!({
        "lora": {"r": 8, "dropout": 0.25, "target_modules": ["v_proj", "q_proj", "q_proj"], "rslora": true},
        "schedule": {"type": "cosine", "warmup_steps": 5, "floor": 0.1},
        "max_seq_len": 100, "grad_clip": 0, "weight_decay": 0.5, "learning_rate": 1e-3,
        "early_stopping": {"patience": 2, "validation_split": 0.2}, "full": false, "integrations": [],
    })))
    .await;
    assert_eq!((&ours["lora"]["rank"], &ours["lora"]["alpha"]), (&json!(8), &json!(16.0)), "α follows r");
    assert_eq!(
        (&ours["lora"]["targets"], &ours["lora"]["dropout"]),
        (&json!(["q_proj", "v_proj"]), &json!(0.25))
    );
    assert_eq!((&ours["grad_clip"], &ours["max_seq_len"]), (&Value::Null, &json!(100)));
    assert_eq!(ours["schedule"]["warmup"], json!({"steps": 5}));
    assert_eq!(ours["early_stopping"], json!({"patience": 2, "validation_split": 0.2}));
    assert_eq!(default["packing"], true);
    assert_eq!(settings(with(json!({"packing": false}))).await["packing"], false);
    let among = json!({"hyperparameters": {"packing": false}});
    let method = json!({"method": {"type": "supervised", "supervised": among}});
    assert_eq!(settings(with(method)).await["packing"], false);
}

#[tokio::test]
async fn a_bad_request_names_its_field() {
    let world = World::tuning().await;
    let file = world.upload(&examples(12)).await;
    let results = world.upload(b"step\n").await;
    let other = world.upload(&examples(3)).await;
    world.scheduler.admin(|admin| admin.files[1].purpose = "fine-tune-results".into());
    let unknown = format!("file-{}", "0".repeat(32));
    let hyper =
        |value: Value| json!({"method": {"type": "supervised", "supervised": {"hyperparameters": value}}});
    let dpo = |value: Value| json!({"method": {"type": "dpo", "dpo": {"hyperparameters": value}}});
    let path = |method: &str, name: &str| format!("method.{method}.hyperparameters.{name}");
    let mut cases: Vec<(Value, String)> = vec![
        (json!({"model": null}), "model".into()),
        (json!({"model": 5}), "model".into()),
        (json!({"training_file": null}), "training_file".into()),
        (json!({"training_file": "mine.jsonl"}), "training_file".into()),
        (json!({"training_file": unknown}), "training_file".into()),
        (json!({"training_file": results}), "training_file".into()),
        (json!({"validation_file": unknown}), "validation_file".into()),
        (json!({"suffix": ""}), "suffix".into()),
        (json!({"suffix": "a:b"}), "suffix".into()),
        (json!({"suffix": "a".repeat(65)}), "suffix".into()),
        (json!({"seed": -1}), "seed".into()),
        (json!({"seed": 1_u64 << 31}), "seed".into()),
        (json!({"metadata": {"a": 1}}), "metadata".into()),
        (json!({"metadata": {"a": "b".repeat(513)}}), "metadata".into()),
        (json!({"full": "yes"}), "full".into()),
        (json!({"full": true, "lora": {"r": 8}}), "lora".into()),
        (json!({"full": true, "method": {"type": "dpo"}}), "full".into()),
        (json!({"full": true, "init": "zeros"}), "init".into()),
        (json!({"init": "random"}), "init".into()),
        (json!({"packing": "yes"}), "packing".into()),
        (json!({"packing": true, "hyperparameters": {"packing": false}}), "packing".into()),
        (dpo(json!({"packing": 1})), path("dpo", "packing")),
        (json!({"promote": true}), "promote".into()),
        (json!({"promote": {}}), "promote.metric".into()),
        (json!({"promote": {"metric": 1}}), "promote.metric".into()),
        (json!({"promote": {"metric": "bleu"}}), "promote.metric".into()),
        (json!({"promote": {"metric": "loss"}}), "promote.file".into()),
        (json!({"promote": {"metric": "loss", "file": "held-out.jsonl"}}), "promote.file".into()),
        (json!({"promote": {"metric": "loss", "file": unknown}}), "promote.file".into()),
        (json!({"promote": {"metric": "loss", "file": results}}), "promote.file".into()),
        (json!({"promote": {"metric": "loss", "file": file}}), "promote.file".into()),
        (json!({"promote": {"metric": "loss"}, "validation_file": file}), "promote.file".into()),
        (
            json!({"promote": {"metric": "loss"}, "validation_file": other, "method": {"type": "dpo"}}),
            "promote.file".into(),
        ),
        (json!({"promote": {"metric": "loss", "file": other}, "full": true}), "promote".into()),
        (
            json!({"promote": {"metric": "exact_match", "file": other, "at_least": 2}}),
            "promote.at_least".into(),
        ),
        (
            json!({"promote": {"metric": "exact_match", "file": other, "at_most": 1}}),
            "promote.at_most".into(),
        ),
        (json!({"promote": {"metric": "loss", "file": other, "at_least": 1}}), "promote.at_least".into()),
        (json!({"promote": {"metric": "loss", "file": other, "at_most": -1}}), "promote.at_most".into()),
        (json!({"integrations": [{"type": "wandb"}]}), "integrations".into()),
        (json!({"method": {}}), "method.type".into()),
        (json!({"method": {"type": "reinforcement"}}), "method.type".into()),
        (json!({"method": {"type": "dpo"}, "hyperparameters": {}}), "hyperparameters".into()),
        (json!({"hyperparameters": {"n_epochs": 0}}), "hyperparameters.n_epochs".into()),
        (dpo(json!({"beta": 0})), path("dpo", "beta")),
        (dpo(json!({"beta": -0.1})), path("dpo", "beta")),
        (dpo(json!({"beta": 2.5})), path("dpo", "beta")),
        (dpo(json!({"beta": "little"})), path("dpo", "beta")),
        (dpo(json!({"beta": [0.1]})), path("dpo", "beta")),
        (json!({"lora": {"dropout": -0.1}}), "lora.dropout".into()),
        (json!({"lora": {"r": 0}}), "lora.r".into()),
        (json!({"lora": {"r": 257}}), "lora.r".into()),
        (json!({"lora": {"dropout": 1}}), "lora.dropout".into()),
        (json!({"lora": {"target_modules": []}}), "lora.target_modules".into()),
        (json!({"lora": {"target_modules": ["lm_head"]}}), "lora.target_modules".into()),
        (json!({"schedule": "zigzag"}), "schedule".into()),
        (json!({"schedule": {"type": "linear", "floor": 2}}), "schedule.floor".into()),
        (json!({"schedule": {"warmup_steps": 1, "warmup_ratio": 0.1}}), "schedule.warmup_steps".into()),
        (json!({"max_seq_len": 1}), "max_seq_len".into()),
        (json!({"max_seq_len": 5000}), "max_seq_len".into()),
        (json!({"grad_clip": -1}), "grad_clip".into()),
        (json!({"weight_decay": 2}), "weight_decay".into()),
        (json!({"learning_rate": 0}), "learning_rate".into()),
        (json!({"early_stopping": "yes"}), "early_stopping".into()),
        (json!({"early_stopping": {"patience": 0}}), "early_stopping.patience".into()),
        (
            json!({"early_stopping": {"validation_split": 0.1}, "validation_file": file}),
            "early_stopping.validation_split".into(),
        ),
    ];
    for (name, wrong) in [
        ("n_epochs", json!(0)),
        ("n_epochs", json!(1000)),
        ("n_epochs", json!("many")),
        ("n_epochs", json!(1.5)),
        ("batch_size", json!(0)),
        ("batch_size", json!(1e9)),
        ("learning_rate_multiplier", json!(0)),
        ("learning_rate_multiplier", json!(-1)),
    ] {
        let mut value = json!({});
        value[name] = wrong;
        cases.push((hyper(value), path("supervised", name)));
    }
    for (more, param) in cases {
        let mut body = json!({"model": "tiny", "training_file": file});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = world.tune(body).await;
        assert_eq!(answer.status, 400, "{more}: {}", answer.text());
        assert_eq!(answer.json()["error"]["param"], param, "{more}: {}", answer.text());
    }
    for body in [&b"{"[..], b"[]", b"", b"\xff"] {
        assert_eq!(world.http.post_bytes("/v1/fine_tuning/jobs", body.to_vec()).await.status, 400);
    }
    let answer = world.tune(json!({"model": "other", "training_file": file})).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert!(world.scheduler.admin(|admin| admin.jobs.is_empty()));
}

#[tokio::test]
async fn preferences_are_taken_with_openais_hyperparameters() {
    let world = World::tuning().await;
    let file = world.upload(&preferences(12)).await;
    let auto =
        json!({"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "beta": "auto"});
    let chosen = json!({"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5, "beta": 0.3});
    for (index, (given, beta, rate)) in
        [(json!({}), 0.1, 2e-5), (auto, 0.1, 2e-5), (chosen, 0.3, 1e-5)].into_iter().enumerate()
    {
        let method = json!({"type": "dpo", "dpo": {"hyperparameters": given}});
        let answer = world.tune(json!({"model": "tiny", "training_file": file, "method": method})).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let job = answer.json();
        assert_eq!(job["method"]["type"], "dpo");
        assert_eq!(job["method"]["dpo"]["hyperparameters"]["beta"], beta);
        let typed: FineTuningJob = serde_json::from_value(job).unwrap();
        world.scheduler.until_admin(|admin| admin.prepared.len() > index).await;
        let prepared = world.scheduler.admin(|admin| admin.prepared[index].1.clone()).unwrap();
        assert_eq!(prepared.settings.method, TrainingMethod::Dpo { beta });
        assert_eq!(prepared.settings.learning_rate, rate);
        assert_eq!(typed.status, FineTuningJobStatus::ValidatingFiles);
    }
    // What a step shows: pairs, not tokens, and their rewards.
    let id = world.scheduler.admin(|admin| admin.jobs[0].request.id);
    let rewards = Some(Rewards { preferred: 0.5, non_preferred: -0.25 });
    let metrics = StepMetrics { rewards, ..metrics(0.5) };
    world.scheduler.admin(|admin| {
        admin.tell(id, JobEventKind::Step { step: 1, steps: 3, metrics });
        admin.tell(id, JobEventKind::Evaluated { step: 1, loss: 0.5, accuracy: 0.75 });
    });
    let path = format!("/v1/fine_tuning/jobs/ftjob-{id}/events?limit=2");
    let events = world.http.get(&path).await.json();
    let (measured, step) = (&events["data"][0]["data"], &events["data"][1]["data"]);
    assert_eq!((&measured["valid_accuracy"], &step["train_accuracy"]), (&json!(0.75), &json!(0.5)));
    assert_eq!(
        (&step["train_reward_preferred"], &step["train_reward_non_preferred"], &step["train_reward_margin"]),
        (&json!(0.5), &json!(-0.25), &json!(0.75))
    );
    assert!(
        step.get("train_mean_token_accuracy").is_none()
            && measured.get("valid_mean_token_accuracy").is_none()
    );
}

#[tokio::test]
async fn jobs_are_listed_and_steered() {
    let world = World::tuning().await;
    let (name, id) = job(&world).await;
    let list = world.http.get("/v1/fine_tuning/jobs?limit=1").await.json();
    assert_eq!((&list["first_id"], &list["has_more"]), (&json!(name), &json!(false)));
    let typed: ListPaginatedFineTuningJobsResponse = serde_json::from_value(list).unwrap();
    assert_eq!(typed.data[0].id, name);
    let path = format!("/v1/fine_tuning/jobs/{name}");
    for (action, status) in [("pause", "paused"), ("resume", "running"), ("cancel", "cancelled")] {
        let answer = world.http.post(&format!("{path}/{action}"), json!({})).await;
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!(status)));
    }
    let again = world.http.post(&format!("{path}/cancel"), json!({})).await;
    assert_eq!(again.status, 409, "{}", again.text());
    let ended = world.http.get(&path).await.json();
    assert_eq!((&ended["finished_at"], &ended["trained_tokens"]), (&json!(9), &json!(0)));
    world.scheduler.admin(|admin| {
        let job = admin.job(id).unwrap();
        (job.status, job.remaining_s, job.finished_at) = (JobStatus::Running, Some(1000), None);
        job.result_files.push(FileId(3));
    });
    let running = world.http.get(&path).await.json();
    assert!(running["estimated_finish"].as_u64().unwrap() > running["created_at"].as_u64().unwrap() + 900);
    assert_eq!(running["result_files"], json!([format!("file-{:032x}", 3)]));
}

#[tokio::test]
async fn unknown_jobs_are_404() {
    let world = World::tuning().await;
    for name in ["ftjob-1", "x", &format!("ftjob-{}", "0".repeat(32))] {
        let path = format!("/v1/fine_tuning/jobs/{name}");
        for below in ["", "/events", "/events?stream=true", "/checkpoints", "/adapter/adapter_config.json"] {
            let answer = world.http.get(&format!("{path}{below}")).await;
            assert_eq!(answer.status, 404, "{path}{below}: {}", answer.text());
            assert_eq!(answer.json()["error"]["code"], "fine_tune_not_found", "{path}{below}");
        }
        assert_eq!(world.http.post(&format!("{path}/cancel"), json!({})).await.status, 404);
    }
}

#[tokio::test]
async fn events_are_openais_newest_first() {
    let world = World::tuning().await;
    let (name, id) = job(&world).await;
    world.scheduler.admin(|admin| {
        admin.tell(id, JobEventKind::Started);
        admin.tell(id, step(1));
        admin.tell(id, JobEventKind::Evaluated { step: 1, loss: 0.5, accuracy: 0.75 });
        admin.tell(id, JobEventKind::ModelCreated("ft:tiny:ashlar::1".into()));
        admin.tell(id, JobEventKind::Succeeded);
    });
    let path = format!("/v1/fine_tuning/jobs/{name}/events");
    let list = world.http.get(&path).await.json();
    let typed: ListFineTuningJobEventsResponse = serde_json::from_value(list.clone()).unwrap();
    let messages: Vec<&str> = typed.data.iter().map(|event| event.message.as_str()).collect();
    let file = world.scheduler.admin(|admin| admin.files[0].id);
    assert_eq!(
        messages,
        [
            "The job has successfully completed",
            "New fine-tuned model created: ft:tiny:ashlar::1",
            "Step 1: validation loss=0.50",
            "Step 1/3: training loss=0.22",
            "Fine-tuning job started",
            "Files validated, moving job to queued state",
            &format!("Validating training file: file-{file}"),
            &format!("Created fine-tuning job: {name}"),
        ]
    );
    let metrics = &list["data"][3];
    assert_eq!((&metrics["type"], &metrics["data"]["train_loss"]), (&json!("metrics"), &json!(0.2249)));
    assert_eq!((&metrics["data"]["total_steps"], &list["data"][0]["type"]), (&json!(3), &json!("message")));
    let page = world.http.get(&format!("{path}?limit=2")).await.json();
    assert_eq!(page["has_more"], true);
    let next =
        world.http.get(&format!("{path}?limit=2&after={}", page["last_id"].as_str().unwrap())).await.json();
    assert_eq!(next["data"][0], list["data"][2]);
    let wrong = world.http.get(&format!("{path}?after=ftevent-{}-1", "0".repeat(32))).await;
    assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("after")));
}

#[tokio::test]
async fn a_follower_hears_all_events_as_they_come_and_the_end() {
    let world = World::tuning().await;
    let (name, id) = job(&world).await;
    let path = format!("/v1/fine_tuning/jobs/{name}/events?stream=true");
    let mut stream = world.http.follow(&path).await;
    let message = |event: &str| {
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        event["message"].as_str().unwrap().to_owned()
    };
    assert!(message(&stream.next().await.unwrap()).starts_with("Created fine-tuning job"));
    assert!(message(&stream.next().await.unwrap()).starts_with("Validating training file"));
    assert!(message(&stream.next().await.unwrap()).starts_with("Files validated"));
    // More than one page of them, at once.
    world.scheduler.admin(|admin| (1..=250).for_each(|number| admin.tell(id, step(number))));
    for number in 1..=250 {
        assert_eq!(message(&stream.next().await.unwrap()), format!("Step {number}/3: training loss=0.22"));
    }
    world.scheduler.admin(|admin| admin.tell(id, JobEventKind::Cancelled));
    let rest = stream.rest().await;
    assert_eq!(
        (message(&rest[0]), rest[1].as_str(), rest.len()),
        ("Fine-tuning job cancelled".into(), "data: [DONE]", 2)
    );
    // Again, after what was heard.
    let last = world.http.get(&format!("/v1/fine_tuning/jobs/{name}/events?limit=2")).await.json();
    let again = format!("{path}&after={}", last["last_id"].as_str().unwrap());
    assert_eq!(world.http.follow(&again).await.rest().await.len(), 2);
}

#[tokio::test]
async fn a_follower_is_told_when_the_server_ends() {
    let world = World::tuning().await;
    let (name, _) = job(&world).await;
    let mut stream = world.http.follow(&format!("/v1/fine_tuning/jobs/{name}/events?stream=true")).await;
    stream.next().await.unwrap();
    let draining = tokio::spawn(world.drain());
    let rest = stream.rest().await;
    assert!(rest.iter().any(|event| event.contains("shutting down")), "{rest:?}");
    draining.await.unwrap();
}

#[tokio::test]
async fn checkpoints_and_the_adapter_can_be_fetched() {
    let world = World::tuning().await;
    let (name, id) = job(&world).await;
    let path = format!("/v1/fine_tuning/jobs/{name}");
    let early = world.http.get(&format!("{path}/adapter/adapter_config.json")).await;
    assert_eq!((early.status, &early.json()["error"]["code"]), (404, &json!("adapter_not_found")));
    let blobs = world.blobs().await;
    let mut manifest = Manifest::default();
    manifest.insert("adapter_config.json", blobs.put(b"{}").await.unwrap()).unwrap();
    manifest.insert("adapter_model.safetensors", blobs.put(b"weights").await.unwrap()).unwrap();
    let adapter = AdapterId(blobs.put_manifest(&manifest).await.unwrap().id);
    world.scheduler.admin(|admin| {
        let job = admin.job(id).unwrap();
        (job.adapter, job.status) = (Some(adapter), JobStatus::Succeeded);
        let checkpoint = |number: u64, validation| Checkpoint {
            files: vec![FileId(20 + u128::from(number)), FileId(30)],
            number,
            created_at: 5,
            step: number + 1,
            adapter: AdapterId(BlobId([0; 32])),
            model: format!("ft:tiny:ashlar::1:ckpt-step-{}", number + 1),
            metrics: metrics(0.25),
            validation,
        };
        job.checkpoints = vec![checkpoint(0, None), checkpoint(1, Some((0.5, 0.75)))];
    });
    let weights = world.http.get(&format!("{path}/adapter/adapter_model.safetensors")).await;
    assert_eq!((weights.status, weights.text().as_str()), (200, "weights"));
    assert_eq!(world.http.get(&format!("{path}/adapter/config.json")).await.status, 404);
    let list = world.http.get(&format!("{path}/checkpoints?limit=1")).await.json();
    assert_eq!(list["has_more"], true);
    let typed: ListFineTuningJobCheckpointsResponse = serde_json::from_value(list.clone()).unwrap();
    let newest: &FineTuningJobCheckpoint = &typed.data[0];
    assert_eq!((newest.step_number, newest.metrics.valid_loss), (2, 0.5));
    assert_eq!(newest.fine_tuned_model_checkpoint, "ft:tiny:ashlar::1:ckpt-step-2");
    let files = [21, 30].map(|id: u128| format!("file-{id:032x}"));
    assert_eq!(list["data"][0]["files"], json!(files));
    let after = list["last_id"].as_str().unwrap();
    let rest = world.http.get(&format!("{path}/checkpoints?after={after}")).await.json();
    assert_eq!((&rest["data"][0]["step_number"], &rest["has_more"]), (&json!(1), &json!(false)));
    assert!(rest["data"][0]["metrics"].get("valid_loss").is_none(), "what was not measured is not there");
}
