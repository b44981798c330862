//! `GET /v1/models` and `/v1/models/{id}`.

use super::error::ApiError;
use crate::app::App;
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) async fn list_models(State(app): State<Arc<App>>) -> Json<Value> {
    let cards: Vec<Value> = app.names.iter().map(|name| card(&app, name)).collect();
    Json(json!({"object": "list", "data": cards}))
}

pub(crate) async fn show_model(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let not_utf8 = |_| ApiError::field("model", "the model's name in the path is not UTF-8: correct it");
    let Path(id) = path.map_err(not_utf8)?;
    app.check_model(Some(&id))?;
    Ok(Json(card(&app, &id)))
}

fn card(app: &App, name: &str) -> Value {
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
