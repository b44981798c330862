//! What operators look at: the recent past, and requests with their latency receipts.

use crate::app::{App, ForCaller, adapter_name};
use crate::live::{Ended, Percentiles, Second, WINDOW};
use crate::openai::error::ApiError;
use ashlar_protocol::serving::{ChoiceId, ClusterSnapshot, Receipt, RequestView};
use axum::Json;
use axum::extract::Path;
use serde_json::{Value, json};
use std::time::Duration;

/// `GET /admin/live`: latencies of the last minute and throughput by the second, of this gateway.
pub(crate) async fn live(ForCaller(app): ForCaller) -> Json<Value> {
    let glimpse = app.live.glimpse();
    let second = |second: &Second| {
        json!({
            "t": second.unix_s,
            "prompt_tokens": second.prompt_tokens,
            "generated_tokens": second.generated_tokens,
            "requests": second.requests,
            "failed": second.failed,
        })
    };
    Json(json!({
        "now": glimpse.unix_s,
        "window_s": WINDOW.as_secs(),
        "ttft_ms": percentiles_json(&glimpse.first_token),
        "itl_ms": percentiles_json(&glimpse.between_tokens),
        "e2e_ms": percentiles_json(&glimpse.request),
        "history": glimpse.seconds.iter().map(second).collect::<Vec<_>>(),
    }))
}

/// `GET /admin/requests`: choices in progress in the whole cluster, and those that ended at this gateway lately.
pub(crate) async fn requests(ForCaller(app): ForCaller) -> Json<Value> {
    Json(json!({"in_flight": in_flight(&app), "recent": recent(&app)}))
}

/// `GET /admin/requests/{id}`: the choices of one request, by the id of its answer or its `x-request-id` (if that was not the client's own).
pub(crate) async fn request(
    ForCaller(app): ForCaller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    // Or by the name of its answer: `chatcmpl-…`.
    let id = id.rsplit('-').next().unwrap_or_default();
    let is_of_it = |choice: &Value| {
        let name = choice["id"].as_str().unwrap_or_default();
        name.strip_prefix(id).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let mut in_flight = in_flight(&app);
    let mut recent = recent(&app);
    in_flight.retain(is_of_it);
    recent.retain(is_of_it);
    if in_flight.is_empty() && recent.is_empty() {
        let message =
            format!("there is no request {id:.64} among those in progress and the latest of this gateway");
        return Err(ApiError::not_found(message, "unknown_request"));
    }
    Ok(Json(json!({"in_flight": in_flight, "recent": recent})))
}

fn in_flight(app: &App) -> Vec<Value> {
    let link = app.scheduler.link();
    let own = link.cluster.as_deref().map(|cluster| (cluster, app.model_name()));
    let deployed = link.models.deployed.iter().map(|view| (&view.cluster, view.request.name.as_str()));
    let of_model = |(cluster, model): (&ClusterSnapshot, &str)| {
        let view = |request: &RequestView| view_json(request, cluster, model);
        cluster.requests.iter().map(view).collect::<Vec<_>>()
    };
    own.into_iter().chain(deployed).flat_map(of_model).collect()
}

fn recent(app: &App) -> Vec<Value> {
    app.live.recent().iter().map(ended_json).collect()
}

fn view_json(request: &RequestView, cluster: &ClusterSnapshot, model: &str) -> Value {
    let adapter = request.adapter.map(|adapter| adapter_name(&cluster.adapters, adapter));
    json!({
        "id": choice_name(request.id),
        "model": model,
        "adapter": adapter,
        "state": request.state,
        "replica": request.replica,
        "prompt_tokens": request.prompt_tokens,
        "computed_tokens": request.computed_tokens,
        "generated_tokens": request.generated_tokens,
        "age_ms": request.age_ms,
        "queue_ms": request.queue_ms,
    })
}

fn ended_json(ended: &Ended) -> Value {
    json!({
        "id": choice_name(ended.id),
        "model": ended.model,
        "finished": ended.unix_s,
        "reason": ended.outcome.name(),
        "error": ended.error,
        "e2e_ms": milliseconds(ended.took),
        "ttft_ms": ended.first_token.map(milliseconds),
        "receipt": ended.receipt.as_ref().map(receipt_json),
    })
}

fn receipt_json(receipt: &Receipt) -> Value {
    json!({
        "prompt_tokens": receipt.prompt_tokens,
        "cached_tokens": receipt.cached_tokens,
        "generated_tokens": receipt.generated_tokens,
        "queue_ms": receipt.queue_ms,
        "prefill_ms": receipt.prefill_ms,
        "decode_ms": receipt.decode_ms,
        "preemptions": receipt.preemptions,
        "replays": receipt.replays,
        "stages": receipt.stages,
    })
}

fn percentiles_json(latencies: &Percentiles) -> Value {
    json!({
        "count": latencies.count,
        "p50": latencies.p50.map(milliseconds),
        "p90": latencies.p90.map(milliseconds),
        "p99": latencies.p99.map(milliseconds),
    })
}

/// The request's id, and which choice where there are several.
fn choice_name(id: ChoiceId) -> String {
    match id.choice {
        0 => id.request.to_string(),
        choice => format!("{}/{choice}", id.request),
    }
}

/// With microseconds.
fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}
