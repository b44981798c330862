//! What operators want of the cluster: empty a node, use it again; serve other models ([`models`]).

pub(crate) mod models;

use crate::app::App;
use crate::openai::error::ApiError;
use ashlar_protocol::admin::{AdminRequest, DrainNode};
use ashlar_vocabulary::NodeId;
use axum::Json;
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// How a node is to be drained.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DrainQuery {
    /// Even if nothing can take its place.
    #[serde(default)]
    force: bool,
}

/// `POST /admin/nodes/{node}/drain`: others take its place, then it holds nothing.
pub(crate) async fn drain(
    State(app): State<Arc<App>>,
    Path(node): Path<String>,
    query: Query<DrainQuery>,
) -> Result<Json<Value>, ApiError> {
    wish(&app, node, true, query.force).await
}

/// `DELETE /admin/nodes/{node}/drain`: it is of use again.
pub(crate) async fn undrain(
    State(app): State<Arc<App>>,
    Path(node): Path<String>,
) -> Result<Json<Value>, ApiError> {
    wish(&app, node, false, false).await
}

async fn wish(app: &App, node: String, drain: bool, force: bool) -> Result<Json<Value>, ApiError> {
    let answer = json!({"node": node, "leaving": drain});
    let wish = DrainNode { node: NodeId(node), drain, force };
    app.scheduler.call(AdminRequest::DrainNode(wish)).await?;
    Ok(Json(answer))
}
