//! `POST /tokenize` and `/detokenize`, shaped as vLLM's.

use super::chat::{encode_chat, render_chat};
use super::chat_request::ChatInput;
use super::chat_tools::take_tools;
use super::error::ApiError;
use super::fields::Fields;
use super::respond::{add_warning, read_body};
use super::sampling::token_id;
use crate::app::{App, ForCaller, unix_seconds};
use crate::models;
use ashlar_vocabulary::TokenId;
use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) async fn tokenize(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    answer(app, request, |app, fields| {
        let max_model_len = app.scheduler.link().cluster.map(|cluster| cluster.max_context_tokens);
        let tokens = tokens_of(app, fields)?;
        let texts: Option<Vec<String>> = fields
            .bool("return_token_strs")?
            .unwrap_or(false)
            .then(|| tokens.iter().map(|token| app.text.tokenizer.token_text(*token)).collect());
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }))
    })
    .await
}

pub(crate) async fn detokenize(ForCaller(app): ForCaller, request: Request) -> Result<Response, ApiError> {
    answer(app, request, |app, fields| {
        let tokens = fields.array("tokens")?.ok_or_else(|| fields.required("tokens"))?;
        let tokens = tokens
            .iter()
            .map(|token| token_id(token, "tokens", &app.text))
            .collect::<Result<Vec<TokenId>, ApiError>>()?;
        Ok(json!({"prompt": app.text.tokenizer.decode(&tokens, false)}))
    })
    .await
}

/// Tokens of a `prompt`, or of `messages` as the chat template writes them.
pub(crate) fn tokens_of(app: &App, fields: &mut Fields) -> Result<Vec<TokenId>, ApiError> {
    if let Some(prompt) = fields.string("prompt")? {
        let add_special = fields.bool("add_special_tokens")?.unwrap_or(true);
        return app
            .text
            .tokenizer
            .encode(&prompt, add_special)
            .map_err(|error| ApiError::field("prompt", error.to_string()));
    }
    let chat = match ChatInput::take(fields) {
        Err(error) if error.param.as_deref() == Some("messages") && error.message.contains("missing") => {
            return Err(ApiError::field("prompt", "`prompt` is missing: send it, or `messages`"));
        }
        chat => chat?,
    };
    let tools = take_tools(fields, &app.config)?;
    fields.bool("add_special_tokens")?;
    encode_chat(&app.text, &render_chat(&app.text, &chat, tools.offered.as_ref(), unix_seconds())?)
}

/// Reads the body, checks the model, and does the work off the threads that serve streams.
async fn answer(
    app: Arc<App>,
    request: Request,
    work: impl FnOnce(&App, &mut Fields) -> Result<Value, ApiError> + Send + 'static,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    let app = models::of_body(app, &body).await?;
    let worker = app.clone();
    let (value, unknown) = app
        .work(move || {
            let mut fields = Fields::parse(&body)?;
            worker.served(fields.string("model")?.as_deref())?;
            let value = work(&worker, &mut fields)?;
            Ok((value, fields.unknown()))
        })
        .await?;
    let mut response = Json(value).into_response();
    add_warning(response.headers_mut(), &unknown);
    Ok(response)
}
