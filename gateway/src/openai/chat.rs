//! `POST /v1/chat/completions`.

use super::answer::{AnswerGrammar, AnswerParser, Piece};
use super::chat_grammar::answer_grammar;
use super::chat_request::{ChatInput, ChatRequest};
use super::chat_stream::ChatStream;
use super::chat_tools::ToolChoice;
use super::error::ApiError;
use super::logprobs::chat_logprobs;
use super::respond::{AnswerHead, add_headers, check_min_tokens, finish_reason, read_body, token_budget};
use super::stream;
use super::usage::{receipt_json, usage_json};
use crate::app::{App, ForCaller, ServedModel, unix_seconds};
use crate::context::RequestContext;
use crate::generation::{Generation, GenerationSpec, Output, PromptSpec};
use crate::models;
use crate::text::ModelText;
use crate::transcript::{End, OutputToken};
use ashlar_protocol::serving::FinishReason;
use ashlar_tokenizer::{RenderInput, SpecialTokens, TemplateError, TemplateTime, TextStart};
use ashlar_vocabulary::{GrammarSpec, RequestId, TokenId};
use axum::Extension;
use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What the answer's form depends on.
#[derive(Debug)]
pub(crate) struct ChatForm {
    pub(crate) head: AnswerHead,
    /// Alternatives per token, where log-probabilities are asked for.
    pub(crate) top_logprobs: Option<u32>,
    pub(crate) choices: usize,
    request: RequestId,
    reading: AnswerGrammar,
}

impl ChatForm {
    /// A parser for one choice's text.
    pub(crate) fn parser(&self, choice: usize) -> AnswerParser {
        AnswerParser::new(&self.reading, self.request, choice)
    }
}

/// A request with all that takes time to derive from it.
pub(crate) struct Prepared {
    request: ChatRequest,
    served: ServedModel,
    prompt: Vec<TokenId>,
    constraint: Option<GrammarSpec>,
    reading: AnswerGrammar,
}

impl Prepared {
    pub(crate) fn new(body: &[u8], app: &App) -> Result<Prepared, ApiError> {
        let request = ChatRequest::parse(body, &app.text, &app.config)?;
        let served = app.served(request.model.as_deref())?;
        let rendered = render_chat(&app.text, &request.chat, request.tools.offered.as_ref(), unix_seconds())?;
        let prompt = encode_chat(&app.text, &rendered)?;
        let (constraint, reading) = answer_grammar(&request, &rendered, &app.text)?;
        Ok(Prepared { request, served, prompt, constraint, reading })
    }
}

pub(crate) async fn chat_completions(
    ForCaller(app): ForCaller,
    Extension(context): Extension<RequestContext>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parts, body) = request.into_parts();
    let body = read_body(&app, &parts.headers, body).await?;
    app.first_contact().await;
    let app = models::of_body(app, &body).await?;
    app.check_refusals(&body)?;
    let worker = app.clone();
    let Prepared { request, served, prompt, constraint, reading } =
        app.work(move || Prepared::new(&body, &worker)).await?;

    let cluster = app.cluster()?;
    let context_max = cluster.max_context_tokens;
    let max_new_tokens =
        token_budget(context_max, prompt.len(), request.max_tokens, request.max_tokens_param, "messages")?;
    check_min_tokens(request.sampling.params.min_tokens, max_new_tokens)?;
    let seed = request.sampling.params.seed;
    context.record(&served.name, &request.sampling.params, max_new_tokens);
    let special = shown_tokens(&request, &app.text);
    let object = if request.delivery.stream { "chat.completion.chunk" } else { "chat.completion" };
    let form = ChatForm {
        head: AnswerHead::new(&served, &cluster, "chatcmpl-", context.id, object),
        top_logprobs: request.sampling.params.top_logprobs,
        choices: request.sampling.n as usize,
        request: context.id,
        reading,
    };
    let mut sampling = request.sampling;
    sampling.params.grammar = constraint;
    let spec = GenerationSpec {
        id: context.id,
        adapter: served.adapter,
        prompts: vec![PromptSpec { tokens: prompt.into(), max_new_tokens }],
        n: sampling.n,
        sampling: sampling.params,
        stop_strings: sampling.stop_strings,
        include_stop: sampling.include_stop,
        stop_tokens: sampling.stop_tokens,
        special,
        start: TextStart::Beginning,
        priority: sampling.priority,
        kept: false,
        resumed: false,
        traceparent: context.traceparent.clone(),
    };
    let generation = Generation::start(&app, &cluster, spec)?;
    let mut response = if request.delivery.stream {
        let form = ChatStream::new(app.clone(), form, request.delivery);
        stream::respond(app, generation, form).await?
    } else {
        collect(&app, generation, form, request.delivery.receipt).await?.into_response()
    };
    add_headers(&mut response, &request.unknown, seed);
    Ok(response)
}

/// Which special tokens are text to whoever reads the answer.
pub(crate) fn shown_tokens(request: &ChatRequest, text: &ModelText) -> SpecialTokens {
    match (&request.tools.choice, request.sampling.skip_special_tokens) {
        (_, false) => SpecialTokens::Show,
        (ToolChoice::None, true) if text.tokenizer.reasoning().is_none() => SpecialTokens::Hide,
        _ => SpecialTokens::ShowMarkers,
    }
}

/// A conversation, as the model's template writes it at a time in seconds since 1970.
pub(crate) fn render_chat(
    text: &ModelText,
    chat: &ChatInput,
    tools: Option<&Value>,
    unix_s: u64,
) -> Result<String, ApiError> {
    let template = text.tokenizer.chat_template().ok_or_else(|| {
        ApiError::invalid("this model has no chat template: use /v1/completions, or serve a chat model")
    })?;
    template
        .render(&RenderInput {
            messages: &chat.messages,
            tools,
            add_generation_prompt: chat.add_generation_prompt,
            kwargs: &chat.template_kwargs,
            now: TemplateTime::from_unix_seconds(unix_s),
        })
        .map_err(|error| match &error {
            TemplateError::ReservedArgument(_) => ApiError::field("chat_template_kwargs", error.to_string()),
            _ => ApiError::field("messages", error.to_string()),
        })
}

/// Its tokens.
pub(crate) fn encode_chat(text: &ModelText, rendered: &str) -> Result<Vec<TokenId>, ApiError> {
    let tokens = text
        .tokenizer
        .encode_chat(rendered)
        .map_err(|error| ApiError::field("messages", error.to_string()))?;
    if tokens.is_empty() {
        return Err(ApiError::field("messages", "the conversation renders to no tokens: send some text"));
    }
    Ok(tokens)
}

/// One choice's message in the making.
struct Message {
    parser: AnswerParser,
    reasoning: String,
    content: String,
    tool_calls: Vec<ToolCall>,
    tokens: Vec<OutputToken>,
    end: Option<FinishReason>,
}

struct ToolCall {
    id: String,
    name: String,
    arguments: String,
}

/// The whole answer at once.
async fn collect(
    app: &App,
    mut generation: Generation,
    form: ChatForm,
    wants_receipt: bool,
) -> Result<Json<Value>, ApiError> {
    let mut messages: Vec<Message> =
        (0..form.choices).map(|choice| Message::new(form.parser(choice))).collect();
    while let Some(output) = generation.next().await {
        match output {
            Output::Delta { choice, delta } => {
                if let Some(message) = messages.get_mut(choice) {
                    let pieces = message.parser.push(&delta.text);
                    message.add(pieces);
                    if form.top_logprobs.is_some() {
                        message.tokens.extend(delta.tokens);
                    }
                }
            }
            Output::End { end: End::Failed(failure), .. } => return Err(failure.into()),
            Output::End { choice, end: End::Finished { reason, .. } } => {
                if let Some(message) = messages.get_mut(choice) {
                    let pieces = message.parser.finish();
                    message.add(pieces);
                    message.end = Some(reason);
                }
            }
        }
    }
    let choices =
        messages.iter().enumerate().map(|(index, message)| message.json(index, &form, app)).collect();
    let mut answer = form.head.with_choices(choices);
    answer["usage"] = usage_json(generation.counts());
    if wants_receipt {
        answer["ashlar"] = receipt_json(&generation);
    }
    Ok(Json(answer))
}

impl Message {
    fn new(parser: AnswerParser) -> Message {
        Message {
            parser,
            reasoning: String::new(),
            content: String::new(),
            tool_calls: Vec::new(),
            tokens: Vec::new(),
            end: None,
        }
    }

    fn add(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning.push_str(&text),
                Piece::Content(text) => self.content.push_str(&text),
                Piece::ToolCall { id, name, .. } => {
                    self.tool_calls.push(ToolCall { id, name, arguments: String::new() });
                }
                Piece::Arguments { index, text } => {
                    if let Some(call) = self.tool_calls.get_mut(index) {
                        call.arguments.push_str(&text);
                    }
                }
            }
        }
    }

    fn json(&self, index: usize, form: &ChatForm, app: &App) -> Value {
        let content = if self.content.is_empty() && !self.tool_calls.is_empty() {
            Value::Null
        } else {
            Value::from(self.content.as_str())
        };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = Value::from(self.reasoning.as_str());
        }
        if !self.tool_calls.is_empty() {
            message["tool_calls"] = self.tool_calls.iter().map(ToolCall::json).collect();
        }
        let logprobs = form.top_logprobs.map(|top| chat_logprobs(&self.tokens, top, &app.text));
        json!({
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self.end.map(|reason| chat_finish_reason(reason, !self.tool_calls.is_empty())),
        })
    }
}

impl ToolCall {
    fn json(&self) -> Value {
        json!({
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        })
    }
}

/// OpenAI's word, which names tool calls where the answer ended with some.
pub(crate) fn chat_finish_reason(reason: FinishReason, has_tool_calls: bool) -> &'static str {
    match finish_reason(reason) {
        "stop" if has_tool_calls => "tool_calls",
        other => other,
    }
}
