//! The body of `POST /v1/chat/completions`, validated.

use super::chat_tools::{Tools, take_tools};
use super::error::ApiError;
use super::fields::{Fields, mistyped};
use super::sampling::{Delivery, Sampling};
use crate::config::GatewayConfig;
use crate::text::ModelText;
use ashlar_vocabulary::GrammarSpec;
use serde_json::{Map, Value};

/// Most alternatives per token that a client may ask for.
pub(crate) const TOP_LOGPROBS_MAX: i64 = 20;

/// A chat request whose fields are all of the right type and in range.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) model: Option<String>,
    pub(crate) chat: ChatInput,
    pub(crate) tools: Tools,
    /// What `response_format` asks for.
    pub(crate) grammar: Option<GrammarSpec>,
    pub(crate) sampling: Sampling,
    pub(crate) delivery: Delivery,
    pub(crate) max_tokens: Option<u32>,
    /// Name of the field that gave `max_tokens`.
    pub(crate) max_tokens_param: &'static str,
    pub(crate) unknown: Vec<String>,
}

/// What the chat template reads.
#[derive(Debug)]
pub(crate) struct ChatInput {
    /// An array of messages.
    pub(crate) messages: Value,
    pub(crate) add_generation_prompt: bool,
    pub(crate) template_kwargs: Map<String, Value>,
}

impl ChatRequest {
    pub(crate) fn parse(
        body: &[u8],
        text: &ModelText,
        config: &GatewayConfig,
    ) -> Result<ChatRequest, ApiError> {
        let mut fields = Fields::parse(body)?;
        let model = fields.string("model")?;
        let chat = ChatInput::take(&mut fields)?;
        let tools = take_tools(&mut fields, config)?;
        let grammar = response_format(&mut fields)?;
        let mut sampling = Sampling::take(&mut fields, text, config)?;
        sampling.params.top_logprobs = top_logprobs(&mut fields)?;
        let delivery = Delivery::take(&mut fields)?;
        let older = fields.integer("max_tokens", 1, i64::from(u32::MAX))?;
        let newer = fields.integer("max_completion_tokens", 1, i64::from(u32::MAX))?;
        let max_tokens_param = if newer.is_some() { "max_completion_tokens" } else { "max_tokens" };
        let unknown = fields.unknown();
        Ok(ChatRequest {
            model,
            chat,
            tools,
            grammar,
            sampling,
            delivery,
            max_tokens: newer.or(older).map(|max| max as u32),
            max_tokens_param,
            unknown,
        })
    }
}

impl ChatInput {
    pub(crate) fn take(fields: &mut Fields) -> Result<ChatInput, ApiError> {
        let mut messages = fields.array("messages")?.ok_or_else(|| fields.required("messages"))?;
        if messages.is_empty() {
            return Err(ApiError::field("messages", "`messages` is empty: send at least one message"));
        }
        for (index, message) in messages.iter_mut().enumerate() {
            check_message(message, &format!("messages[{index}]"))?;
        }
        let template_kwargs = match fields.take("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(fields.mistyped("chat_template_kwargs", "an object", &other)),
        };
        Ok(ChatInput {
            messages: Value::Array(messages),
            add_generation_prompt: fields.bool("add_generation_prompt")?.unwrap_or(true),
            template_kwargs,
        })
    }
}

fn check_message(message: &mut Value, path: &str) -> Result<(), ApiError> {
    let Value::Object(message) = message else { return Err(mistyped(path, "an object", message)) };
    let role_path = format!("{path}.role");
    let role = match message.get("role") {
        Some(Value::String(role)) => role.clone(),
        None | Some(Value::Null) => {
            return Err(ApiError::field(
                &role_path,
                format!("`{role_path}` is missing: every message needs one"),
            ));
        }
        Some(other) => return Err(mistyped(&role_path, "a string", other)),
    };
    match role.as_str() {
        "system" | "user" | "assistant" | "tool" => {}
        // OpenAI's newer word for the same thing; templates know only the older.
        "developer" => {
            message.insert("role".to_owned(), Value::from("system"));
        }
        _ => {
            return Err(ApiError::field(
                &role_path,
                format!("`{role_path}` must be system, developer, user, assistant or tool"),
            ));
        }
    }
    // Clients send back what they were sent, nulls included; templates ask whether a field is there, not whether it is null.
    message.retain(|name, value| name == "content" || !value.is_null());
    if message.get("tool_calls").and_then(Value::as_array).is_some_and(Vec::is_empty) {
        message.shift_remove("tool_calls");
    }
    if role == "assistant" && message.get("content").is_none_or(Value::is_null) {
        let none = if message.contains_key("tool_calls") { Value::Null } else { Value::from("") };
        message.insert("content".to_owned(), none);
    }
    let content_path = format!("{path}.content");
    match message.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => check_parts(parts, &content_path)?,
        None | Some(Value::Null) if role == "assistant" => {}
        None | Some(Value::Null) => {
            return Err(ApiError::field(
                &content_path,
                format!("`{content_path}` is missing: a {role} message needs content"),
            ));
        }
        Some(other) => return Err(mistyped(&content_path, "a string or an array of text parts", other)),
    }
    for name in ["name", "tool_call_id", "reasoning_content"] {
        match message.get(name) {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(other) => return Err(mistyped(&format!("{path}.{name}"), "a string", other)),
        }
    }
    check_tool_calls(message, path)
}

fn check_parts(parts: &[Value], path: &str) -> Result<(), ApiError> {
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}[{index}]");
        let Value::Object(part) = part else { return Err(mistyped(&path, "an object", part)) };
        match part.get("type").and_then(Value::as_str) {
            Some("text") => {}
            Some("refusal") if part.get("refusal").is_some_and(Value::is_string) => continue,
            Some(other) => {
                let kind: String = other.chars().take(40).collect();
                let message = format!("`{path}` is of type `{kind}`: this model takes only `text` parts");
                return Err(ApiError::field(&path, message));
            }
            None => return Err(ApiError::field(&path, format!("`{path}.type` must be \"text\""))),
        }
        if !part.get("text").is_some_and(Value::is_string) {
            return Err(ApiError::field(&path, format!("`{path}.text` must be a string")));
        }
    }
    Ok(())
}

fn check_tool_calls(message: &Map<String, Value>, path: &str) -> Result<(), ApiError> {
    let calls = match message.get("tool_calls") {
        None | Some(Value::Null) => return Ok(()),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(mistyped(&format!("{path}.tool_calls"), "an array", other)),
    };
    for (index, call) in calls.iter().enumerate() {
        let path = format!("{path}.tool_calls[{index}].function");
        let Some(Value::Object(function)) = call.get("function") else {
            return Err(ApiError::field(
                &path,
                format!("`{path}` must be an object with `name` and `arguments`"),
            ));
        };
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(ApiError::field(&path, format!("`{path}.name` must be a string")));
        }
        if !matches!(
            function.get("arguments"),
            None | Some(Value::Null | Value::String(_) | Value::Object(_))
        ) {
            return Err(ApiError::field(&path, format!("`{path}.arguments` must be a string of JSON")));
        }
    }
    Ok(())
}

/// `logprobs: true` reports tokens; `top_logprobs` adds alternatives and needs it.
fn top_logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let logprobs = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        return Err(ApiError::field(
            "top_logprobs",
            "`top_logprobs` is only allowed when `logprobs` is true: set it, or leave this out",
        ));
    }
    Ok(logprobs.then(|| top.unwrap_or(0) as u32))
}

/// `response_format`, also of completions.
pub(crate) fn response_format(fields: &mut Fields) -> Result<Option<GrammarSpec>, ApiError> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let path = format.path("type");
    let kind = format.string("type")?.ok_or_else(|| format.required("type"))?;
    let grammar = match kind.as_str() {
        "text" => None,
        "json_object" => Some(GrammarSpec::JsonObject),
        "json_schema" => {
            let mut inner = format.object("json_schema")?.ok_or_else(|| format.required("json_schema"))?;
            inner.string("name")?;
            inner.string("description")?;
            inner.bool("strict")?;
            let schema_path = inner.path("schema");
            let schema = match inner.take("schema") {
                Some(schema @ (Value::Object(_) | Value::Bool(_))) => schema.to_string(),
                Some(other) => return Err(mistyped(&schema_path, "an object", &other)),
                None => return Err(inner.required("schema")),
            };
            format.finish(inner);
            Some(GrammarSpec::JsonSchema(schema))
        }
        _ => {
            let message = format!("`{path}` must be text, json_object or json_schema");
            return Err(ApiError::field(&path, message));
        }
    };
    fields.finish(format);
    Ok(grammar)
}
