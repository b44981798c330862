//! What operators want of the cluster: empty a node, use it again, see what that would change; serve other models ([`models`]); look
//! ([`observe`]); let clients in ([`keys`]).

pub(crate) mod keys;
pub(crate) mod models;
pub(crate) mod observe;

use crate::app::{App, ForCaller};
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::respond::{add_warning, read_body};
use ashlar_protocol::admin::{
    AdminReply, AdminRequest, DrainNode, PlanView, PlannedChange, PlannedRank, PlannedReplica, PlannedStage,
};
use ashlar_vocabulary::NodeId;
use axum::Json;
use axum::extract::{Path, Query, Request};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

/// Nodes that a dry run may leave out.
const PLAN_NODES_MAX: usize = 256;

/// How a node is to be drained.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DrainQuery {
    /// Even if nothing can take its place.
    #[serde(default)]
    force: bool,
}

/// `POST /admin/nodes/{node}/drain`: others take its place, then it holds nothing.
pub(crate) async fn drain(
    ForCaller(app): ForCaller,
    Path(node): Path<String>,
    query: Query<DrainQuery>,
) -> Result<Json<Value>, ApiError> {
    wish(&app, node, true, query.force).await
}

/// `DELETE /admin/nodes/{node}/drain`: it is of use again.
pub(crate) async fn undrain(
    ForCaller(app): ForCaller,
    Path(node): Path<String>,
) -> Result<Json<Value>, ApiError> {
    wish(&app, node, false, false).await
}

/// `POST /admin/plan`: what would become of the layout `without` these nodes. Changes nothing.
pub(crate) async fn plan(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    let mut fields = Fields::parse(&body)?;
    let listed = fields.array("without")?.unwrap_or_default();
    if listed.len() > PLAN_NODES_MAX {
        return Err(ApiError::field("without", format!("`without` may name at most {PLAN_NODES_MAX} nodes")));
    }
    let node = |value: Value| match value {
        Value::String(name) => Ok(NodeId(name)),
        other => Err(fields.mistyped("without", "an array of nodes' names", &other)),
    };
    let without = listed.into_iter().map(node).collect::<Result<Vec<_>, _>>()?;
    let AdminReply::Plan(plan) = app.scheduler.call(AdminRequest::PlanWithout(without)).await? else {
        return Err(ApiError::internal("the scheduler has answered something else"));
    };
    let mut response = Json(plan_json(&plan)).into_response();
    add_warning(response.headers_mut(), &fields.unknown());
    Ok(response)
}

/// `POST /admin/replan`: has the model laid out as it would be planned from nothing now; with `dry_run`, says what that would be.
pub(crate) async fn replan(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let mut fields = Fields::parse(&read_body(&app, &parts.headers, body).await?)?;
    let dry_run = fields.bool("dry_run")?.unwrap_or(false);
    let AdminReply::Plan(plan) = app.scheduler.call(AdminRequest::Replan { dry_run }).await? else {
        return Err(ApiError::internal("the scheduler has answered something else"));
    };
    let mut response = Json(plan_json(&plan)).into_response();
    add_warning(response.headers_mut(), &fields.unknown());
    Ok(response)
}

fn plan_json(plan: &PlanView) -> Value {
    let rank = |rank: &PlannedRank| json!({"node": rank.node, "memory_bytes": rank.memory});
    let stage = |stage: &PlannedStage| json!({"layers": stage.layers, "ranks": stage.ranks.iter().map(rank).collect::<Vec<_>>()});
    let replica = |replica: &PlannedReplica| {
        json!({
            "replica": replica.replica,
            "kv_blocks": replica.kv_blocks,
            "stages": replica.stages.iter().map(stage).collect::<Vec<_>>(),
        })
    };
    json!({
        "possible": plan.change != PlannedChange::Impossible,
        "change": plan.change,
        "problem": plan.problem,
        "replicas": plan.replicas.iter().map(replica).collect::<Vec<_>>(),
    })
}

async fn wish(app: &App, node: String, drain: bool, force: bool) -> Result<Json<Value>, ApiError> {
    let answer = json!({"node": node, "leaving": drain});
    let wish = DrainNode { node: NodeId(node), drain, force };
    app.scheduler.call(AdminRequest::DrainNode(wish)).await?;
    Ok(Json(answer))
}
