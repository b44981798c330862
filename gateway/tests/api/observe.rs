//! What operators look at: the recent past, requests with their receipts, dry runs.

use crate::scheduler::{Action, cluster, say};
use crate::world::{World, ask};
use ashlar_protocol::serving::{ChoiceId, FailureKind, RequestState, RequestView};
use ashlar_vocabulary::{ReplicaId, RequestId};
use serde_json::{Value, json};

#[tokio::test]
async fn the_recent_past_counts_tokens_requests_and_latencies() {
    let world = World::new(|_| say("abc")).await;
    let before = world.http.get("/admin/live").await.json();
    assert_eq!((&before["ttft_ms"]["count"], &before["ttft_ms"]["p99"]), (&json!(0), &Value::Null));
    for _ in 0..3 {
        assert_eq!(world.chat(ask(json!({}))).await.status, 200);
    }
    let live = world.http.get("/admin/live").await.json();
    assert_eq!(live["ttft_ms"]["count"], 3);
    assert_eq!(live["itl_ms"]["count"], 9);
    assert!(live["e2e_ms"]["p99"].as_f64() >= live["e2e_ms"]["p50"].as_f64());
    let sum = |name: &str| {
        let seconds = live["history"].as_array().unwrap().iter();
        seconds.map(|second| second[name].as_u64().unwrap()).sum::<u64>()
    };
    // Of six prompt tokens two are found in the cache.
    assert_eq!((sum("generated_tokens"), sum("requests"), sum("prompt_tokens")), (12, 3, 12));
}

#[tokio::test]
async fn ended_requests_are_shown_with_their_receipts() {
    let world = World::new(|submit| match submit.sampling.seed {
        1 => vec![Action::Fail(FailureKind::Internal, "it broke")],
        _ => say("abc"),
    })
    .await;
    let good = world.chat(ask(json!({"seed": 7}))).await;
    world.chat(ask(json!({"seed": 1}))).await;
    let recent = world.http.get("/admin/requests").await.json()["recent"].clone();
    assert_eq!((&recent[0]["reason"], &recent[0]["error"]), (&json!("failed"), &json!("it broke")));
    assert_eq!((&recent[1]["reason"], &recent[1]["model"]), (&json!("stop"), &json!("tiny")));
    let receipt = &recent[1]["receipt"];
    assert_eq!((&receipt["generated_tokens"], &receipt["stages"][0]["compute_us"]), (&json!(4), &json!(7)));
    let id = good.json()["id"].as_str().unwrap().to_owned();
    let one = world.http.get(&format!("/admin/requests/{id}")).await.json();
    assert_eq!(one["recent"], json!([recent[1]]));
    let none = world.http.get("/admin/requests/chatcmpl-0").await;
    assert_eq!((none.status, &none.json()["error"]["code"]), (404, &json!("unknown_request")));
}

#[tokio::test]
async fn requests_in_progress_are_shown_with_how_far_they_are() {
    let world = World::new(|_| say("x")).await;
    world.scheduler.change_cluster(|cluster| {
        cluster.requests = vec![RequestView {
            id: ChoiceId { request: RequestId(u128::MAX), choice: 2 },
            adapter: None,
            state: RequestState::Prefill,
            replica: Some(ReplicaId(0)),
            prompt_tokens: 100,
            computed_tokens: 64,
            generated_tokens: 0,
            age_ms: 12,
            queue_ms: 3,
        }];
    });
    let shown = loop {
        let shown = world.http.get("/admin/requests").await.json();
        if shown["in_flight"] != json!([]) {
            break shown["in_flight"][0].clone();
        }
    };
    assert_eq!(shown["id"], format!("{:032x}/2", u128::MAX));
    assert_eq!((&shown["state"], &shown["computed_tokens"]), (&json!("prefill"), &json!(64)));
    assert_eq!(world.http.get("/admin/cluster").await.status, 200);
    assert_eq!(cluster().requests, []);
}

#[tokio::test]
async fn a_dry_run_takes_names_of_nodes() {
    let world = World::new(|_| say("x")).await;
    for body in [json!({"without": "a"}), json!({"without": [1]})] {
        let wrong = world.http.post("/admin/plan", body).await;
        assert_eq!((wrong.status, &wrong.json()["error"]["param"]), (400, &json!("without")));
    }
}
