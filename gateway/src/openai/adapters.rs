//! Loading and unloading adapters: vLLM's `POST /v1/load_lora_adapter` and `/v1/unload_lora_adapter`, OpenAI's
//! `DELETE /v1/models/{id}`, and `POST /v1/roll_back_lora_adapter`, which serves an earlier generation again.
//!
//! `expected_generation`, which they all take, refuses the change with 409 where another generation is served.

use super::error::ApiError;
use super::fields::Fields;
use super::models::model_in;
use super::respond::{add_warning, read_body};
use crate::app::{App, ForCaller, unix_seconds};
use crate::import;
use ashlar_protocol::admin::{AdminReply, AdminRequest, LoadAdapter};
use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::time::Duration;

/// Longest wait for every rank to load an adapter; the scheduler gives up a little earlier.
const LOAD_TIMEOUT: Duration = Duration::from_secs(310);
/// Generations count from 1; this many are never reached.
const GENERATION_MAX: i64 = 1 << 53;

pub(crate) async fn load_adapter(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    let mut fields = body(&app, request).await?;
    let name = required(&mut fields, "lora_name")?;
    let path = required(&mut fields, "lora_path")?;
    let replace = fields.bool("load_inplace")?.unwrap_or(false);
    let expected_generation = generation(&mut fields, "expected_generation")?;
    let unknown = fields.unknown();
    if app.is_base(&name) {
        let message = format!("`{name}` is the base model: choose another name for the adapter");
        return Err(ApiError::field("lora_name", message));
    }
    // Before any file is read; the scheduler decides for good.
    if !replace && app.adapters().iter().any(|view| view.name == name) {
        let message = format!(
            "an adapter `{name}` is loaded already: unload it first, or replace it with load_inplace"
        );
        return Err(ApiError::field("lora_name", message));
    }
    let adapter = import::import(&app, &path).await?;
    let load = LoadAdapter {
        name: name.clone(),
        adapter,
        root: path,
        created_at: unix_seconds(),
        replace,
        expected_generation,
        hold_back: false,
        owner: None,
    };
    change(&app, AdminRequest::LoadAdapter(load)).await?;
    Ok(answer(format!("Success: LoRA adapter '{name}' added successfully."), &unknown))
}

pub(crate) async fn unload_adapter(
    ForCaller(app): ForCaller,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body(&app, request).await?;
    let name = required(&mut fields, "lora_name")?;
    // vLLM's clients may send it; names are enough here.
    fields.take("lora_int_id");
    let expected_generation = generation(&mut fields, "expected_generation")?;
    let unknown = fields.unknown();
    change(&app, AdminRequest::UnloadAdapter { name: name.clone(), expected_generation }).await?;
    Ok(answer(format!("Success: LoRA adapter '{name}' removed successfully."), &unknown))
}

pub(crate) async fn roll_back_adapter(
    ForCaller(app): ForCaller,
    request: Request,
) -> Result<Response, ApiError> {
    let mut fields = body(&app, request).await?;
    let name = required(&mut fields, "lora_name")?;
    let to_generation =
        generation(&mut fields, "to_generation")?.ok_or_else(|| fields.required("to_generation"))?;
    let expected_generation = generation(&mut fields, "expected_generation")?;
    let unknown = fields.unknown();
    let request = AdminRequest::RollBackAdapter { name: name.clone(), to_generation, expected_generation };
    change(&app, request).await?;
    let done = format!("Success: LoRA adapter '{name}' rolled back to generation {to_generation}.");
    Ok(answer(done, &unknown))
}

pub(crate) async fn delete_model(
    ForCaller(app): ForCaller,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let id = model_in(path)?;
    if app.is_base(&id) {
        let message = format!("`{id}` is the base model, which cannot be deleted: name an adapter");
        return Err(ApiError::field("model", message));
    }
    app.check_not_deployed(&id)?;
    app.served(Some(&id))?;
    change(&app, AdminRequest::UnloadAdapter { name: id.clone(), expected_generation: None }).await?;
    Ok(Json(json!({"id": id, "object": "model", "deleted": true})))
}

async fn body(app: &App, request: Request) -> Result<Fields, ApiError> {
    let (parts, body) = request.into_parts();
    Fields::parse(&read_body(app, &parts.headers, body).await?)
}

fn required(fields: &mut Fields, name: &str) -> Result<String, ApiError> {
    let value = fields.string(name)?.filter(|value| !value.is_empty());
    value.ok_or_else(|| fields.required(name))
}

fn generation(fields: &mut Fields, name: &str) -> Result<Option<u64>, ApiError> {
    Ok(fields.integer(name, 0, GENERATION_MAX)?.map(|generation| generation as u64))
}

async fn change(app: &App, request: AdminRequest) -> Result<AdminReply, ApiError> {
    app.cluster()?;
    Ok(app.scheduler.call_within(request, LOAD_TIMEOUT).await?)
}

fn answer(text: String, unknown: &[String]) -> Response {
    let mut response = text.into_response();
    add_warning(response.headers_mut(), unknown);
    response
}
