//! `/admin/models`: which models the cluster serves, and on how many nodes.

use crate::app::{App, ForCaller};
use crate::models::view_of;
use crate::openai::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::respond::{add_warning, read_body};
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::models::{DeployModel, ModelStatus, ModelView, ModelsView, ScaleModel, check_name};
use ashlar_protocol::serving::ClusterSnapshot;
use ashlar_vocabulary::Quantization;
use axum::Json;
use axum::extract::{Path, Request};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;

/// The scheduler may have to fetch a model from a hub before it can say what it is.
const DEPLOY_TIMEOUT: Duration = Duration::from_secs(600);
const COUNT_MAX: i64 = 1024;

/// `GET /admin/models`.
pub(crate) async fn list(ForCaller(app): ForCaller) -> Result<Json<Value>, ApiError> {
    app.cluster()?;
    let link = app.scheduler.link();
    let own = own_json(&app, &link.models, link.cluster.as_deref());
    let deployed = link.models.deployed.iter().map(model_json);
    let models: Vec<Value> = [own].into_iter().chain(deployed).collect();
    Ok(Json(json!({"object": "list", "data": models})))
}

/// `GET /admin/models/{name}`.
pub(crate) async fn show(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.cluster()?;
    if app.is_base(&name) {
        let link = app.scheduler.link();
        return Ok(Json(own_json(&app, &link.models, link.cluster.as_deref())));
    }
    view_of(&app, &name).map(|view| Json(model_json(&view))).ok_or_else(|| unknown(&app, &name))
}

/// `POST /admin/models`: one more.
pub(crate) async fn deploy(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let mut fields = body(&app, request).await?;
    let wish = deployment(&mut fields)?;
    app.cluster()?;
    if app.is_base(&wish.name) || app.adapters().iter().any(|view| view.name == wish.name) {
        let message = format!("`{}` is served already: choose another `name`", wish.name);
        return Err(ApiError { param: Some("name".to_owned()), ..ApiError::conflict(message) });
    }
    let reply = app.scheduler.call_within(AdminRequest::DeployModel(Box::new(wish)), DEPLOY_TIMEOUT).await?;
    Ok(answer(&app, reply, &fields.unknown()))
}

/// `PATCH /admin/models/{name}`: more nodes, or fewer.
pub(crate) async fn scale(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body(&app, request).await?;
    let own = app.is_base(&name);
    let all = fields.take_if("nodes", Value::is_null) && own;
    let nodes = count(&mut fields, "nodes")?;
    if nodes.is_none() && !all {
        return Err(fields.required("nodes"));
    }
    app.cluster()?;
    let wish = ScaleModel { name: (!own).then(|| name.clone()), nodes };
    let reply = app.scheduler.call(AdminRequest::ScaleModel(wish)).await?;
    Ok(answer(&app, reply, &fields.unknown()))
}

/// `DELETE /admin/models/{name}`: requests in progress end, then its nodes are free.
pub(crate) async fn remove(
    ForCaller(app): ForCaller,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    if app.is_base(&name) {
        return Err(ApiError::conflict(format!(
            "`{name}` is the model that the scheduler is configured with, which cannot be removed: start the cluster with another \
             one instead"
        )));
    }
    app.cluster()?;
    let removed = match app.scheduler.call(AdminRequest::RemoveModel { name: name.clone() }).await? {
        AdminReply::Model(view) => model_json(&view),
        // Nothing was in progress.
        _ => json!({"object": "ashlar.model", "name": name, "own": false, "status": "removed"}),
    };
    Ok(Json(removed))
}

async fn body(app: &App, request: Request) -> Result<Fields, ApiError> {
    let (parts, body) = request.into_parts();
    Fields::parse(&read_body(app, &parts.headers, body).await?)
}

fn count(fields: &mut Fields, name: &str) -> Result<Option<u32>, ApiError> {
    Ok(fields.integer(name, 1, COUNT_MAX)?.map(|count| count as u32))
}

pub(crate) fn deployment(fields: &mut Fields) -> Result<DeployModel, ApiError> {
    let model = fields.string("model")?.filter(|model| !model.is_empty());
    let model = model.ok_or_else(|| fields.required("model"))?;
    let name = fields.string("name")?.unwrap_or_else(|| name_of(&model));
    check_name(&name).map_err(|message| ApiError::field("name", message))?;
    let stages = count(fields, "stages")?;
    let tensor_parallel_size = count(fields, "tensor_parallel_size")?;
    let replicas = count(fields, "replicas")?;
    let quantize = fields.string("quantize")?.map(|kind| kind.parse::<Quantization>()).transpose();
    let quantize = quantize.map_err(|error| ApiError::field("quantize", error.to_string()))?;
    let max_context_tokens =
        fields.integer("max_context_tokens", 2, i64::from(u32::MAX))?.map(|tokens| tokens as u32);
    let ranks = [stages, tensor_parallel_size, replicas].into_iter().flatten();
    let nodes = count(fields, "nodes")?.unwrap_or_else(|| ranks.fold(1, u32::saturating_mul));
    Ok(DeployModel {
        name,
        model,
        nodes,
        stages,
        tensor_parallel_size,
        replicas,
        quantize,
        max_context_tokens,
    })
}

/// What a model is called whom nobody has given a name.
fn name_of(model: &str) -> String {
    let last = model.trim_end_matches('/').rsplit('/').next().unwrap_or(model);
    last.strip_suffix(".gguf").unwrap_or(last).to_owned()
}

/// The model as it is now.
fn answer(app: &App, reply: AdminReply, unknown: &[String]) -> Response {
    let link = app.scheduler.link();
    let model = match reply {
        AdminReply::Model(view) => model_json(&view),
        _ => own_json(app, &link.models, link.cluster.as_deref()),
    };
    let mut response = Json(model).into_response();
    add_warning(response.headers_mut(), unknown);
    response
}

fn unknown(app: &App, name: &str) -> ApiError {
    let names: Vec<String> = app.names.iter().cloned().chain(crate::models::names(app)).collect();
    ApiError::unknown_model(name, &names)
}

fn own_json(app: &App, models: &ModelsView, cluster: Option<&ClusterSnapshot>) -> Value {
    let ready = app.scheduler.link().ready();
    let nodes = cluster.map(|cluster| cluster.nodes.as_slice()).unwrap_or_default();
    let held = nodes.iter().filter(|node| node.place.is_some()).map(|node| &node.node);
    json!({
        "object": "ashlar.model",
        "name": app.model_name(),
        "own": true,
        "model": cluster.map(|cluster| &cluster.model),
        "status": if ready.is_ok() { "serving" } else { "loading" },
        "problem": ready.err(),
        "nodes": models.own_nodes,
        "members": held.collect::<Vec<_>>(),
        "standbys": nodes.iter().filter(|node| node.place.is_none()).map(|node| &node.node).collect::<Vec<_>>(),
        "replicas_ready": cluster.map_or(0, replicas_ready),
        "max_context_tokens": cluster.map(|cluster| cluster.max_context_tokens),
        "model_digest": cluster.map(|cluster| cluster.model_digest.to_string()),
    })
}

/// A deployed model, for people and programs.
pub(crate) fn model_json(view: &ModelView) -> Value {
    let status = match view.status {
        ModelStatus::Loading => "loading",
        ModelStatus::Serving => "serving",
        ModelStatus::Removing => "removing",
    };
    json!({
        "object": "ashlar.model",
        "name": view.request.name,
        "own": false,
        "model": view.cluster.model,
        "created_at": view.created_at,
        "status": status,
        "problem": view.problem,
        "nodes": view.request.nodes,
        "members": view.members,
        "stages": view.request.stages,
        "tensor_parallel_size": view.request.tensor_parallel_size,
        "replicas": view.request.replicas,
        "replicas_ready": replicas_ready(&view.cluster),
        "quantize": view.request.quantize,
        "max_context_tokens": view.cluster.max_context_tokens,
        "model_digest": view.cluster.model_digest.to_string(),
    })
}

fn replicas_ready(cluster: &ClusterSnapshot) -> usize {
    cluster.replicas.iter().filter(|replica| replica.ready).count()
}
