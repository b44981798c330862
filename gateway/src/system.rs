//! Endpoints about the server itself: health, readiness, metrics, the cluster.

use crate::app::{App, ForCaller, Phase};
use crate::degradation::Degradation;
use crate::openai::error::ApiError;
use ashlar_protocol::models::ModelView;
use ashlar_protocol::serving::ClusterSnapshot;
use axum::Json;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// The process runs.
pub(crate) async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// A request would be computed now; else 503 with what is missing.
pub(crate) async fn ready(ForCaller(app): ForCaller) -> Response {
    match readiness(&app) {
        Ok(()) => Json(json!({"status": "ready", "degraded": degraded(&app)})).into_response(),
        Err(problem) => {
            let body = Json(json!({"status": "unready", "problem": problem}));
            (StatusCode::SERVICE_UNAVAILABLE, [(header::RETRY_AFTER, "1")], body).into_response()
        }
    }
}

/// What is less than it should be while requests are computed nevertheless.
fn degraded(app: &App) -> Vec<String> {
    let Some(cluster) = app.scheduler.link().cluster else { return Vec::new() };
    let all = Degradation::ALL.into_iter().filter(|one| one.is_in(&cluster));
    all.map(|one| one.describe(&cluster)).collect()
}

fn readiness(app: &App) -> Result<(), String> {
    if *app.phase.borrow() != Phase::Serving {
        return Err("this server is shutting down".to_owned());
    }
    app.scheduler.link().ready()
}

/// Prometheus' text format.
pub(crate) async fn metrics(ForCaller(app): ForCaller) -> Response {
    let link = app.scheduler.link();
    let mut page = app.metrics.render(link.cluster.as_deref());
    let deployed = app.deployed.borrow().clone();
    for (view, model) in
        link.models.deployed.iter().filter_map(|view| Some((view, deployed.get(&view.request.name)?)))
    {
        if let Some(model) = model.app() {
            page.add(&model.metrics.render_deployed(&view.cluster));
        }
    }
    let page = page.text();
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

/// Requests have an address of their own, where their ids are written as clients know them.
fn without_requests(snapshot: &ClusterSnapshot) -> ClusterSnapshot {
    ClusterSnapshot { requests: Vec::new(), ..snapshot.clone() }
}

/// The scheduler's view of the cluster.
pub(crate) async fn cluster(ForCaller(app): ForCaller) -> Result<Json<Value>, ApiError> {
    let link = app.scheduler.link();
    let mut cluster = Value::Null;
    if let Some(snapshot) = link.cluster.as_deref() {
        cluster = serde_json::to_value(without_requests(snapshot))
            .map_err(|error| ApiError::internal(format!("the cluster cannot be shown: {error}")))?;
        // 32 numbers say less than the hexadecimal form that logs use.
        cluster["model_digest"] = Value::from(snapshot.model_digest.to_string());
    }
    let deployed = link
        .models
        .deployed
        .iter()
        .map(|view| ModelView { cluster: without_requests(&view.cluster), ..view.clone() });
    let mut models = serde_json::to_value(deployed.collect::<Vec<_>>())
        .map_err(|error| ApiError::internal(format!("the models cannot be shown: {error}")))?;
    for (model, view) in models.as_array_mut().into_iter().flatten().zip(&link.models.deployed) {
        model["cluster"]["model_digest"] = Value::from(view.cluster.model_digest.to_string());
    }
    Ok(Json(json!({
        "connected": link.connected,
        "ready": link.ready().is_ok(),
        "problem": link.ready().err(),
        "cluster": cluster,
        "models": models,
    })))
}

pub(crate) async fn unknown_path(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::not_found(format!("there is no {method} {path} here: see / for what there is"), "unknown_url")
}

pub(crate) async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(128).collect();
    ApiError::method_not_allowed(format!("{path} does not take {method}: inference takes POST, the rest GET"))
}
