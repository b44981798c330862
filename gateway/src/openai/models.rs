//! `GET /v1/models` and `/v1/models/{id}`: the base model under its names, the adapters on it, and the models beside it.

use super::error::ApiError;
use crate::app::{App, ForCaller};
use crate::models::{may_ask, view_of};
use ashlar_protocol::admin::AdapterView;
use ashlar_protocol::models::ModelView;
use axum::Json;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use serde_json::{Value, json};

pub(crate) async fn list_models(ForCaller(app): ForCaller) -> Json<Value> {
    let base = app.names.iter().filter(|_| app.caller.may_ask(&app.names));
    let mut cards: Vec<Value> = base.map(|name| base_card(&app, name)).collect();
    cards.extend(app.adapters().iter().filter(|view| !app.is_base(&view.name)).map(|view| card(&app, view)));
    let models = app.scheduler.link().models;
    cards.extend(models.deployed.iter().filter(|view| may_ask(&app, view)).map(deployed_card));
    Json(json!({"object": "list", "data": cards}))
}

pub(crate) async fn show_model(
    ForCaller(app): ForCaller,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let id = model_in(path)?;
    if let Some(view) = view_of(&app, &id).filter(|_| !app.is_base(&id)) {
        return Ok(Json(deployed_card(&view)));
    }
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

fn deployed_card(view: &ModelView) -> Value {
    json!({
        "id": view.request.name,
        "object": "model",
        "created": view.created_at,
        "owned_by": "ashlar",
        "root": view.cluster.model,
        "parent": null,
        "max_model_len": view.cluster.max_context_tokens,
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
