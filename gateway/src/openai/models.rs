//! `GET /v1/models` and `/v1/models/{id}`: the base model under its names, and the adapters on it.

use super::error::ApiError;
use crate::app::App;
use ashlar_protocol::admin::AdapterView;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) async fn list_models(State(app): State<Arc<App>>) -> Json<Value> {
    let mut cards: Vec<Value> = app.names.iter().map(|name| base_card(&app, name)).collect();
    cards.extend(app.adapters().iter().filter(|view| !app.is_base(&view.name)).map(|view| card(&app, view)));
    Json(json!({"object": "list", "data": cards}))
}

pub(crate) async fn show_model(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let id = model_in(path)?;
    app.served(Some(&id))?;
    let adapter = app.adapters().into_iter().find(|view| view.name == id && !app.is_base(&id));
    Ok(Json(adapter.map_or_else(|| base_card(&app, &id), |view| card(&app, &view))))
}

/// The model that a path names.
pub(crate) fn model_in(path: Result<Path<String>, PathRejection>) -> Result<String, ApiError> {
    let not_utf8 = |_| ApiError::field("model", "the model's name in the path is not UTF-8: correct it");
    path.map(|Path(id)| id).map_err(not_utf8)
}

fn base_card(app: &App, name: &str) -> Value {
    let link = app.scheduler.link();
    let cluster = link.cluster.as_deref();
    json!({
        "id": name,
        "object": "model",
        "created": app.created,
        "owned_by": "ashlar",
        "root": cluster.map_or(app.model_name(), |cluster| &cluster.model),
        "parent": null,
        "max_model_len": cluster.map(|cluster| cluster.max_context_tokens),
    })
}

fn card(app: &App, view: &AdapterView) -> Value {
    let link = app.scheduler.link();
    json!({
        "id": view.name,
        "object": "model",
        "created": view.created_at,
        "owned_by": "ashlar",
        "root": view.root,
        "parent": app.model_name(),
        "max_model_len": link.cluster.as_deref().map(|cluster| cluster.max_context_tokens),
        "generation": view.generation,
    })
}
