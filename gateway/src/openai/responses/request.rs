//! The body of `POST /v1/responses`, validated, and all that is decided when it comes.

use super::items::{input_items, messages};
use super::object::ResponseObject;
use crate::app::{App, ServedModel};
use crate::openai::answer::AnswerGrammar;
use crate::openai::chat::{encode_chat, render_chat, shown_tokens};
use crate::openai::chat_grammar::answer_grammar;
use crate::openai::chat_request::{ChatInput, ChatRequest, TOP_LOGPROBS_MAX};
use crate::openai::chat_tools::take_tools;
use crate::openai::error::ApiError;
use crate::openai::fields::{Fields, mistyped};
use crate::openai::sampling::{Delivery, Sampling};
use ashlar_tokenizer::SpecialTokens;
use ashlar_vocabulary::{AdapterId, GrammarSpec, RequestId, TokenId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// What asks for log-probabilities.
const INCLUDE_LOGPROBS: &str = "message.output_text.logprobs";
/// Most entries of `metadata`, and most characters of a name and of a value: OpenAI's limits.
const METADATA_MAX: usize = 16;
const METADATA_CHARS_MAX: (usize, usize) = (64, 512);
/// Items of a conversation, earlier responses included.
const ITEMS_MAX: usize = 4_096;
const MAX_TOKENS: &str = "max_output_tokens";

/// A request as it is stored: enough for any gateway to make the same answer of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredRequest {
    pub(super) id: RequestId,
    /// Seconds since 1970.
    pub(super) created_at: u64,
    /// As sent, or drawn.
    pub(super) seed: Option<u64>,
    /// Name and adapter of the model, once they are settled.
    pub(super) served: Option<(String, Option<AdapterId>)>,
    /// Items of the responses that it follows.
    pub(super) prior: Vec<Value>,
    pub(super) body: Map<String, Value>,
}

/// A request with all that takes time to derive from it.
pub(super) struct Prepared {
    pub(super) stored: StoredRequest,
    pub(super) served: ServedModel,
    pub(super) request: ChatRequest,
    pub(super) prompt: Vec<TokenId>,
    pub(super) constraint: Option<GrammarSpec>,
    pub(super) reading: AnswerGrammar,
    pub(super) special: SpecialTokens,
    pub(super) object: ResponseObject,
    pub(super) store: bool,
    pub(super) background: bool,
}

/// The response that a request follows.
pub(super) fn previous(body: &Map<String, Value>) -> Result<Option<&str>, ApiError> {
    match body.get("previous_response_id") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(id)) => Ok(Some(id)),
        Some(other) => Err(mistyped("previous_response_id", "a string", other)),
    }
}

/// The items of a request, without those that it follows.
pub(super) fn own_items(body: &Map<String, Value>) -> Result<Vec<Value>, ApiError> {
    input_items(body.get("input").filter(|input| !input.is_null()).cloned())
}

impl Prepared {
    /// Settles what is not settled yet, and derives the rest.
    pub(super) fn new(mut stored: StoredRequest, app: &App) -> Result<Prepared, ApiError> {
        let mut fields = Fields::of_map(nested_tools(stored.body.clone()));
        let model = fields.string("model")?;
        let (name, adapter) = match stored.served.clone() {
            Some(settled) => settled,
            None => {
                model.as_deref().map_or(Ok(()), |model| app.check_not_deployed(model))?;
                let served = app.served(model.as_deref())?;
                (served.name, served.adapter)
            }
        };
        let served = ServedModel { name, adapter };
        stored.served = Some((served.name.clone(), served.adapter));

        let input = input_items(fields.take("input"))?;
        messages(&input, "input")?;
        if input.len() + stored.prior.len() > ITEMS_MAX {
            let message = format!("the conversation has more than {ITEMS_MAX} items: begin a new one");
            return Err(ApiError::field("input", message));
        }
        let instructions = fields.string("instructions")?;
        let system = instructions.iter().map(|text| json!({"role": "system", "content": text}));
        let items: Vec<Value> = stored.prior.iter().chain(&input).cloned().collect();
        let conversation: Vec<Value> = system.chain(messages(&items, "input")?).collect();
        let template_kwargs = match fields.take("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(map)) => map,
            Some(other) => return Err(fields.mistyped("chat_template_kwargs", "an object", &other)),
        };
        let tools = take_tools(&mut fields, &app.config).map_err(flat_path)?;
        let format = fields.take("text");
        let grammar = text_format(format.clone())?;
        let mut sampling = Sampling::take(&mut fields, &app.text, &app.config)?;
        if sampling.n != 1 {
            return Err(ApiError::field("n", "a response has one answer: leave `n` out"));
        }
        sampling.params.top_logprobs = logprobs(&mut fields)?;
        sampling.params.seed = *stored.seed.get_or_insert(sampling.params.seed);
        let max_tokens = fields.integer(MAX_TOKENS, 1, i64::from(u32::MAX))?.map(|max| max as u32);
        let delivery = Delivery::take(&mut fields)?;
        let background = fields.bool("background")?.unwrap_or(false);
        let can_store = app.responses.can_store();
        let store = fields.bool("store")?.unwrap_or(can_store);
        check_storage(store, background, can_store)?;
        let previous = fields.string("previous_response_id")?;
        let metadata = metadata(&mut fields)?;
        take_what_has_no_effect(&mut fields)?;
        if fields.take("conversation").is_some() {
            let message = "`conversation` is not supported: use `previous_response_id`";
            return Err(ApiError::field("conversation", message));
        }
        let request = ChatRequest {
            model,
            chat: ChatInput {
                messages: Value::Array(conversation),
                add_generation_prompt: true,
                template_kwargs,
            },
            tools,
            grammar,
            sampling,
            delivery,
            max_tokens,
            max_tokens_param: MAX_TOKENS,
            unknown: fields.unknown(),
        };
        let param = |error: ApiError| match error.param.as_deref() {
            Some("messages") => ApiError { param: Some("input".to_owned()), ..error },
            Some("response_format") => ApiError { param: Some("text.format".to_owned()), ..error },
            _ => error,
        };
        let offered = request.tools.offered.as_ref();
        let rendered = render_chat(&app.text, &request.chat, offered, stored.created_at).map_err(param)?;
        let prompt = encode_chat(&app.text, &rendered).map_err(param)?;
        let (constraint, reading) = answer_grammar(&request, &rendered, &app.text).map_err(param)?;
        let object = ResponseObject::new(json!({
            "id": super::response_name(stored.id),
            "object": "response",
            "created_at": stored.created_at,
            "status": "in_progress",
            "background": background,
            "error": null,
            "incomplete_details": null,
            "instructions": instructions,
            "max_output_tokens": max_tokens,
            "max_tool_calls": null,
            "model": served.name,
            "output": [],
            "parallel_tool_calls": request.tools.parallel,
            "previous_response_id": previous,
            "reasoning": {"effort": null, "summary": null},
            "service_tier": "default",
            "store": store,
            "temperature": request.sampling.params.temperature,
            "text": format.unwrap_or_else(|| json!({"format": {"type": "text"}})),
            "tool_choice": stored.body.get("tool_choice").filter(|choice| !choice.is_null())
                .cloned().unwrap_or_else(|| Value::from("auto")),
            "tools": stored.body.get("tools").filter(|tools| tools.is_array()).cloned().unwrap_or_else(|| json!([])),
            "top_logprobs": request.sampling.params.top_logprobs.unwrap_or(0),
            "top_p": request.sampling.params.top_p,
            "truncation": "disabled",
            "usage": null,
            "user": stored.body.get("user"),
            "metadata": metadata,
        }));
        let special = shown_tokens(&request, &app.text);
        Ok(Prepared {
            stored,
            served,
            request,
            prompt,
            constraint,
            reading,
            special,
            object,
            store,
            background,
        })
    }
}

/// Functions stand flat in `tools` and `tool_choice`; nested, they are read as those of chat are.
fn nested_tools(mut body: Map<String, Value>) -> Map<String, Value> {
    let nest = |value: &mut Value| {
        let Value::Object(tool) = value else { return };
        if tool.get("type").and_then(Value::as_str) != Some("function") || tool.contains_key("function") {
            return;
        }
        let mut function = std::mem::take(tool);
        tool.insert("type".to_owned(), function.shift_remove("type").unwrap_or_default());
        tool.insert("function".to_owned(), Value::Object(function));
    };
    if let Some(Value::Array(tools)) = body.get_mut("tools") {
        tools.iter_mut().for_each(nest);
    }
    if let Some(choice) = body.get_mut("tool_choice") {
        nest(choice);
    }
    body
}

/// The place of an error as the client wrote it.
fn flat_path(error: ApiError) -> ApiError {
    let flat = |text: String| text.replace("].function", "]").replace("tool_choice.function", "tool_choice");
    ApiError { param: error.param.clone().map(flat), message: flat(error.message.clone()), ..error }
}

/// `text.format`.
fn text_format(text: Option<Value>) -> Result<Option<GrammarSpec>, ApiError> {
    let Some(text) = text else { return Ok(None) };
    let mut text = Fields::of(text, "text")?;
    let Some(mut format) = text.object("format")? else { return Ok(None) };
    let path = format.path("type");
    match format.string("type")?.ok_or_else(|| format.required("type"))?.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(GrammarSpec::JsonObject)),
        "json_schema" => match format.take("schema") {
            Some(schema @ (Value::Object(_) | Value::Bool(_))) => {
                Ok(Some(GrammarSpec::JsonSchema(schema.to_string())))
            }
            Some(other) => Err(format.mistyped("schema", "an object", &other)),
            None => Err(format.required("schema")),
        },
        _ => {
            let message = format!("`{path}` must be text, json_object or json_schema");
            Err(ApiError::field(path, message))
        }
    }
}

/// `top_logprobs`, or its place in `include`.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.integer("top_logprobs", 0, TOP_LOGPROBS_MAX)?.unwrap_or(0);
    let include = fields.array("include")?.unwrap_or_default();
    if let Some(other) = include.iter().find(|name| !name.is_string()) {
        return Err(mistyped("include", "an array of strings", other));
    }
    let asked = top > 0 || include.iter().any(|name| name == INCLUDE_LOGPROBS);
    Ok(asked.then_some(top as u32))
}

fn check_storage(store: bool, background: bool, can_store: bool) -> Result<(), ApiError> {
    if background && !store {
        return Err(ApiError::field("background", "`background` needs `store`: leave `store` out"));
    }
    if store && !can_store {
        let message = "this gateway has no place to store responses: set `blobs` in the configuration of every role, or send \
                       `store: false`";
        return Err(ApiError::field("store", message));
    }
    Ok(())
}

fn metadata(fields: &mut Fields) -> Result<Value, ApiError> {
    let metadata = match fields.take("metadata") {
        None => return Ok(json!({})),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(fields.mistyped("metadata", "an object", &other)),
    };
    let (name_max, value_max) = METADATA_CHARS_MAX;
    let fits = |(name, value): (&String, &Value)| {
        let value_fits = value.as_str().is_some_and(|value| value.chars().count() <= value_max);
        name.chars().count() <= name_max && value_fits
    };
    if metadata.len() > METADATA_MAX || !metadata.iter().all(fits) {
        let message = format!(
            "`metadata` may hold {METADATA_MAX} strings of {value_max} characters, under names of {name_max}"
        );
        return Err(ApiError::field("metadata", message));
    }
    Ok(Value::Object(metadata))
}

/// Fields that OpenAI's clients send and that ask for nothing here.
fn take_what_has_no_effect(fields: &mut Fields) -> Result<(), ApiError> {
    for name in ["service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"] {
        fields.string(name)?;
    }
    fields.take_if("reasoning", Value::is_object);
    if fields.string("truncation")?.as_deref() == Some("auto") {
        let message = "`truncation: \"auto\"` is not supported: shorten the conversation, or leave this out";
        return Err(ApiError::field("truncation", message));
    }
    Ok(())
}
