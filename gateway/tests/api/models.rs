//! Models beside the scheduler's own one: routed by name, each with its own tokenizer and its part of the cluster.

use crate::scheduler::{cluster, say};
use crate::world::{World, ask, write_model};
use ashlar_protocol::models::{DeployModel, ModelStatus, ModelView, ModelsView};
use ashlar_vocabulary::{ModelDigest, NodeId};
use serde_json::{Value, json};
use std::path::Path;

const OTHER: ModelDigest = ModelDigest([7; 32]);

fn view(source: &Path, status: ModelStatus) -> ModelsView {
    let request = DeployModel {
        name: "other".into(),
        model: source.to_string_lossy().into_owned(),
        nodes: 1,
        stages: None,
        tensor_parallel_size: None,
        replicas: None,
        quantize: None,
        max_context_tokens: None,
    };
    let mut part = cluster();
    (part.model, part.model_digest) = (request.model.clone(), OTHER);
    part.max_context_tokens = 99;
    let problem = (status == ModelStatus::Loading).then(|| "it wants 1 nodes, has 0".to_owned());
    let deployed = ModelView {
        request,
        created_at: 5,
        status,
        members: vec![NodeId("b".into())],
        problem,
        cluster: part,
    };
    ModelsView { own_nodes: None, deployed: vec![deployed] }
}

#[tokio::test]
async fn a_deployed_model_is_served_under_its_name_once_it_is_ready() {
    let world = World::new(|submit| say(if submit.model_digest == OTHER { "two" } else { "one" })).await;
    let files = tempfile::tempdir().unwrap();
    // Another template, so that it can be told whose it was.
    write_model(files.path(), "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}");
    let request = || ask(json!({"model": "other"}));

    let unknown = world.chat(request()).await;
    assert_eq!(unknown.status, 404);
    world.scheduler.tell_models(view(files.path(), ModelStatus::Loading)).await;
    let loading = loop {
        let answer = world.chat(request()).await;
        if answer.status != 404 {
            break answer;
        }
    };
    assert_eq!((loading.status, loading.header("retry-after")), (503, "1"));
    let message = loading.json()["error"]["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("the model `other` is not served yet: "), "{message}");
    assert_eq!(world.chat(ask(json!({}))).await.json()["choices"][0]["message"]["content"], "one");

    world.scheduler.tell_models(view(files.path(), ModelStatus::Serving)).await;
    let served = loop {
        let answer = world.chat(request()).await;
        if answer.status != 503 {
            break answer;
        }
    };
    assert_eq!(served.status, 200, "{}", served.text());
    let served = served.json();
    assert_eq!((&served["model"], &served["usage"]["prompt_tokens"]), (&json!("other"), &json!(3)));
    assert_eq!(served["choices"][0]["message"]["content"], "two");
    let streamed =
        world.http.stream("/v1/completions", json!({"model": "other", "prompt": "a", "stream": true}));
    assert!(streamed.await.rest().await.iter().any(|event| event.contains("other")));
    let tokens = world.http.post("/tokenize", json!({"model": "other", "prompt": "a"})).await.json();
    assert_eq!(tokens["max_model_len"], 99);
    let list = world.http.get("/v1/models").await.json();
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["tiny", "alias", "other"]);
    assert_eq!(world.http.get("/v1/models/other").await.json()["max_model_len"], 99);
    let all = world.http.get("/admin/models").await.json();
    assert_eq!((&all["data"][0]["name"], &all["data"][0]["own"]), (&json!("tiny"), &json!(true)));
    assert_eq!((&all["data"][1]["status"], &all["data"][1]["members"]), (&json!("serving"), &json!(["b"])));
    let page = world.http.get("/metrics").await.text();
    assert!(page.contains("vllm:num_requests_running{model_name=\"other\",engine=\"0\"} 2"), "{page}");
    assert!(page.contains("ashlar_nodes 1\nashlar_nodes{model_name=\"other\"} 1\n"), "{page}");
    let mut types: Vec<&str> = page.lines().filter(|line| line.starts_with("# TYPE")).collect();
    let before = types.len();
    types.sort_unstable();
    types.dedup();
    assert_eq!(types.len(), before, "one head for each family");

    // What is the first model's alone.
    let response = world.http.post("/v1/responses", json!({"model": "other", "input": "a"})).await;
    assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!("model")));

    world.scheduler.tell_models(ModelsView::default()).await;
    while world.chat(request()).await.status != 404 {}
    assert_eq!(world.chat(ask(json!({}))).await.status, 200);
    world.drain().await;
}

#[tokio::test]
async fn files_that_cannot_be_read_here_are_named() {
    let world = World::new(|_| say("x")).await;
    world.scheduler.tell_models(view(Path::new("/no/where"), ModelStatus::Serving)).await;
    loop {
        let answer = world.chat(ask(json!({"model": "other"}))).await;
        let message = answer.json()["error"]["message"].as_str().unwrap_or_default().to_owned();
        if message.contains("`/no/where` is not on this machine") {
            assert_eq!(answer.status, 503);
            break;
        }
    }
}

#[tokio::test]
async fn a_deployment_is_checked_before_the_scheduler_hears_of_it() {
    let world = World::new(|_| say("x")).await;
    let cases = [
        (json!({}), 400, "model"),
        (json!({"model": "x", "name": "a b"}), 400, "name"),
        (json!({"model": "x", "nodes": 0}), 400, "nodes"),
        (json!({"model": "x", "stages": "two"}), 400, "stages"),
        (json!({"model": "x", "quantize": "q1_9"}), 400, "quantize"),
        (json!({"model": "models/tiny"}), 409, "name"),
    ];
    for (body, status, param) in cases {
        let answer = world.http.post("/admin/models", body.clone()).await;
        assert_eq!((answer.status, &answer.json()["error"]["param"]), (status, &json!(param)), "{body}");
    }
}
