//! Models, tokens, health, metrics, the cluster.

use crate::scheduler::say;
use crate::world::{BOS, World, ask};
use ashlar_protocol::serving::ReplicaView;
use serde_json::{Value, json};

#[tokio::test]
async fn models_are_listed_and_shown() {
    let world = World::new(|_| say("x")).await;
    let list = world.http.get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    let ids: Vec<&Value> = list["data"].as_array().unwrap().iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["tiny", "alias"]);
    let card = world.http.get("/v1/models/tiny").await.json();
    assert_eq!((&card["max_model_len"], &card["root"]), (&json!(4096), &json!("models/tiny")));
    assert_eq!((&card["object"], &card["parent"]), (&json!("model"), &Value::Null));
    let missing = world.http.get("/v1/models/org/other").await;
    assert_eq!((missing.status, &missing.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[tokio::test]
async fn text_becomes_tokens_and_back() {
    let world = World::new(|_| say("x")).await;
    let body = world.http.post("/tokenize", json!({"prompt": "né", "return_token_strs": true})).await.json();
    assert_eq!(
        body,
        json!({"count": 4, "max_model_len": 4096, "tokens": [BOS, 110, 195, 169],
               "token_strs": ["<|bos|>", "n", "\u{fffd}", "\u{fffd}"]})
    );
    let plain =
        world.http.post("/tokenize", json!({"prompt": "n", "add_special_tokens": false})).await.json();
    assert_eq!(plain["tokens"], json!([110]));
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}]});
    assert_eq!(world.http.post("/tokenize", chat).await.json()["count"], 6);
    let back = world.http.post("/detokenize", json!({"tokens": [110, 195, 169]})).await.json();
    assert_eq!(back, json!({"prompt": "né"}));
    for body in [json!({}), json!({"prompt": 1})] {
        let wrong = world.http.post("/tokenize", body).await;
        assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("prompt")));
    }
}

#[tokio::test]
async fn readiness_tells_what_is_missing() {
    let world = World::new(|_| say("x")).await;
    assert_eq!(world.http.get("/health").await.status, 200);
    assert_eq!(world.http.get("/ready").await.json(), json!({"status": "ready", "degraded": []}));
    world.scheduler.change_cluster(|cluster| {
        let other = ReplicaView { ready: false, ..cluster.replicas[0].clone() };
        cluster.replicas.push(other);
        (cluster.counters.shed, cluster.counters.shedding) = (3, true);
        cluster.counters.predicted_wait_ms = Some(2_500);
    });
    let degraded = loop {
        let answer = world.http.get("/ready").await;
        assert_eq!(answer.status, 200, "what can be computed is");
        if answer.json()["degraded"] != json!([]) {
            break answer.json();
        }
    };
    let ways = ["more requests come than can be computed: some are refused", "1 of 2 replicas serve"];
    assert_eq!(degraded["degraded"], json!(ways));
    let page = world.http.get("/metrics").await.text();
    for line in [
        "ashlar_shed_requests_total 3",
        "ashlar_predicted_wait_seconds 2.5",
        "ashlar_degraded{reason=\"shedding\"} 1",
        "ashlar_degraded{reason=\"replicas\"} 1",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
    world.scheduler.change_cluster(|cluster| {
        cluster.replicas.clear();
        cluster.problem = Some("1.50 GiB are missing: join another node".into());
    });
    let unready = loop {
        let answer = world.http.get("/ready").await;
        if answer.status != 200 {
            break answer;
        }
    };
    assert_eq!(unready.status, 503);
    assert_eq!(unready.json()["problem"], "1.50 GiB are missing: join another node");
    assert_eq!(world.http.get("/health").await.status, 200);
}

#[tokio::test]
async fn metrics_keep_vllms_names() {
    let world = World::new(|_| say("abc")).await;
    assert_eq!(world.chat(ask(json!({}))).await.status, 200);
    let page = world.http.get("/metrics").await.text();
    for line in [
        "vllm:prompt_tokens_total{model_name=\"tiny\",engine=\"0\"} 6",
        "vllm:generation_tokens_total{model_name=\"tiny\",engine=\"0\"} 4",
        "vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} 2",
        "vllm:kv_cache_usage_perc{model_name=\"tiny\",engine=\"0\"} 0.25",
        "ashlar_replicas_ready 1",
        "ashlar_ledger_reserved_bytes{node=\"a\",replica=\"0\",stage=\"0\",rank=\"0\"} 1048576",
        "ashlar_stage_compute_seconds_total{node=\"a\",replica=\"0\",stage=\"0\",rank=\"0\"} 1.5",
        "ashlar_training_compute_seconds_total{node=\"a\",replica=\"0\",stage=\"0\",rank=\"0\"} 2.5",
    ] {
        assert!(page.contains(line), "{line}\n{page}");
    }
    for series in [
        "vllm:request_success_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{",
        "vllm:request_queue_time_seconds_sum{",
        "gen_ai_server_request_duration_seconds_bucket{",
    ] {
        assert!(page.contains(series), "{series}\n{page}");
    }
}

#[tokio::test]
async fn the_cluster_is_shown_as_json() {
    let world = World::new(|_| say("x")).await;
    let body = world.http.get("/admin/cluster").await.json();
    assert_eq!((&body["connected"], &body["ready"]), (&json!(true), &json!(true)));
    assert_eq!(body["cluster"]["nodes"][0]["node"], "a");
    assert_eq!(body["cluster"]["model_digest"], "abababababababab");
}
