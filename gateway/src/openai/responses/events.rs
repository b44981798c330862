//! The events of a response: a function of its request and its tokens, so that any gateway makes the same.
//!
//! Events are numbered from 0, and what a client has not seen is asked for by number. Nothing here may depend on a clock, on chance, or on
//! how tokens came together.

use super::object::{ResponseError, ResponseObject, ResponseUsage};
use crate::generation::TokenCounts;
use crate::openai::answer::{AnswerParser, Piece};
use crate::openai::logprobs::chat_logprobs_content;
use crate::text::ModelText;
use crate::transcript::Delta;
use ashlar_protocol::responses::ResponseStatus;
use ashlar_protocol::serving::{FailureKind, FinishReason, RequestFailure};
use ashlar_vocabulary::RequestId;
use bytes::Bytes;
use serde_json::{Value, json};
use std::sync::Arc;

/// The events so far, and what the next ones depend on.
pub(super) struct ResponseEvents {
    object: ResponseObject,
    request: RequestId,
    text: Arc<ModelText>,
    parser: AnswerParser,
    /// Alternatives per token, where log-probabilities are asked for.
    top_logprobs: Option<u32>,
    /// Items that are complete.
    output: Vec<Value>,
    open: Option<OpenItem>,
    reasoning_tokens: usize,
    events: u64,
    frames: Vec<Bytes>,
}

/// The item that is being written.
enum OpenItem {
    Reasoning { text: String },
    Message { text: String, logprobs: Vec<Value> },
    Call { call: String, name: String, arguments: String },
}

impl ResponseEvents {
    /// The beginning: two events.
    pub(super) fn new(
        object: ResponseObject,
        request: RequestId,
        parser: AnswerParser,
        top_logprobs: Option<u32>,
        text: Arc<ModelText>,
    ) -> ResponseEvents {
        let mut events = ResponseEvents {
            object,
            request,
            text,
            parser,
            top_logprobs,
            output: Vec::new(),
            open: None,
            reasoning_tokens: 0,
            events: 0,
            frames: Vec::new(),
        };
        let response = events.object.in_progress();
        events.emit("response.created", json!({"response": &response}));
        events.emit("response.in_progress", json!({"response": response}));
        events
    }

    /// Takes the events that have not been taken yet, as they are sent.
    pub(super) fn take(&mut self) -> Vec<Bytes> {
        std::mem::take(&mut self.frames)
    }

    /// The answer goes on.
    pub(super) fn delta(&mut self, delta: &Delta) {
        let pieces = self.parser.push(&delta.text);
        if !pieces.is_empty() && pieces.iter().all(|piece| matches!(piece, Piece::Reasoning(_))) {
            self.reasoning_tokens += delta.tokens.len();
        }
        let logprobs = self
            .top_logprobs
            .map(|top| chat_logprobs_content(&delta.tokens, top, &self.text))
            .unwrap_or_default();
        self.pieces(pieces, logprobs);
    }

    /// The answer is complete; the final object.
    pub(super) fn end(&mut self, reason: FinishReason, counts: TokenCounts) -> (ResponseStatus, Value) {
        let rest = self.parser.finish();
        self.pieces(rest, Vec::new());
        let (status, kind, item) = match reason {
            FinishReason::Stop => (ResponseStatus::Completed, "response.completed", "completed"),
            FinishReason::Length => (ResponseStatus::Incomplete, "response.incomplete", "incomplete"),
        };
        if self.open.is_none() && self.output.is_empty() {
            self.begin(OpenItem::Message { text: String::new(), logprobs: Vec::new() });
        }
        self.close(item);
        (status, self.last(kind, status, counts, None))
    }

    /// There will be no more of it, by its owner's wish or for a failure; the final object.
    pub(super) fn fail(&mut self, failure: &RequestFailure, counts: TokenCounts) -> (ResponseStatus, Value) {
        self.close("incomplete");
        if failure.kind == FailureKind::Cancelled {
            let status = ResponseStatus::Cancelled;
            // OpenAI has no event of its own for this; every stream ends with one that shows the status.
            return (status, self.last("response.incomplete", status, counts, None));
        }
        let code = match failure.kind {
            FailureKind::Overloaded => "rate_limit_exceeded",
            FailureKind::Invalid | FailureKind::UnknownModel => "invalid_prompt",
            _ => "server_error",
        };
        let error = ResponseError { code, message: failure.message.clone() };
        let status = ResponseStatus::Failed;
        (status, self.last("response.failed", status, counts, Some(&error)))
    }

    fn last(
        &mut self,
        kind: &str,
        status: ResponseStatus,
        counts: TokenCounts,
        error: Option<&ResponseError>,
    ) -> Value {
        let usage = ResponseUsage { counts, reasoning: self.reasoning_tokens };
        let response = self.object.ended(status, self.output.clone(), Some(usage), error);
        self.emit(kind, json!({"response": &response}));
        response
    }

    /// Log-probabilities go with the first piece of text.
    fn pieces(&mut self, pieces: Vec<Piece>, mut logprobs: Vec<Value>) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.reason(&text),
                Piece::Content(text) => self.say(&text, std::mem::take(&mut logprobs)),
                Piece::ToolCall { id: call, name, .. } => {
                    self.begin(OpenItem::Call { call, name, arguments: String::new() });
                }
                Piece::Arguments { text, .. } => self.argue(&text),
            }
        }
    }

    fn reason(&mut self, more: &str) {
        if !matches!(self.open, Some(OpenItem::Reasoning { .. })) {
            self.begin(OpenItem::Reasoning { text: String::new() });
        }
        if let Some(OpenItem::Reasoning { text }) = &mut self.open {
            text.push_str(more);
            self.emit_in_part("response.reasoning_text.delta", json!({"delta": more}));
        }
    }

    fn say(&mut self, more: &str, more_logprobs: Vec<Value>) {
        if !matches!(self.open, Some(OpenItem::Message { .. })) {
            self.begin(OpenItem::Message { text: String::new(), logprobs: Vec::new() });
        }
        if let Some(OpenItem::Message { text, logprobs }) = &mut self.open {
            text.push_str(more);
            logprobs.extend(more_logprobs.iter().cloned());
            let delta = json!({"delta": more, "logprobs": more_logprobs});
            self.emit_in_part("response.output_text.delta", delta);
        }
    }

    fn argue(&mut self, more: &str) {
        if let Some(OpenItem::Call { arguments, .. }) = &mut self.open {
            arguments.push_str(more);
            self.emit_in_item("response.function_call_arguments.delta", json!({"delta": more}));
        }
    }

    fn begin(&mut self, item: OpenItem) {
        self.close("completed");
        let begun = self.item(&item, "in_progress", false);
        let part = item.part();
        self.open = Some(item);
        let place = self.output.len();
        self.emit("response.output_item.added", json!({"output_index": place, "item": begun}));
        if let Some(part) = part {
            self.emit_in_part("response.content_part.added", json!({"part": part}));
        }
    }

    /// Ends the item that is being written, if there is one.
    fn close(&mut self, status: &str) {
        let Some(item) = &self.open else { return };
        let part = item.part();
        let (kind, text) = match item {
            OpenItem::Reasoning { text } => ("response.reasoning_text.done", json!({"text": text})),
            OpenItem::Message { text, logprobs } => {
                ("response.output_text.done", json!({"text": text, "logprobs": logprobs}))
            }
            OpenItem::Call { name, arguments, .. } => {
                ("response.function_call_arguments.done", json!({"name": name, "arguments": arguments}))
            }
        };
        let complete = self.item(item, status, true);
        match part {
            Some(part) => {
                self.emit_in_part(kind, text);
                self.emit_in_part("response.content_part.done", json!({"part": part}));
            }
            None => self.emit_in_item(kind, text),
        }
        self.open = None;
        let place = self.output.len();
        self.emit("response.output_item.done", json!({"output_index": place, "item": &complete}));
        self.output.push(complete);
    }

    /// The item as an object, with or without what has been written.
    fn item(&self, item: &OpenItem, status: &str, written: bool) -> Value {
        let id = self.item_id(item);
        let content = || item.part().filter(|_| written).into_iter().collect::<Vec<_>>();
        match item {
            OpenItem::Reasoning { .. } => {
                json!({"id": id, "type": "reasoning", "summary": [], "content": content(), "status": status})
            }
            OpenItem::Message { .. } => json!({
                "id": id, "type": "message", "status": status, "role": "assistant", "content": content(),
            }),
            OpenItem::Call { call, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call, "name": name,
                "arguments": arguments,
            }),
        }
    }

    fn item_id(&self, item: &OpenItem) -> String {
        let prefix = match item {
            OpenItem::Reasoning { .. } => "rs",
            OpenItem::Message { .. } => "msg",
            OpenItem::Call { .. } => "fc",
        };
        format!("{prefix}_{}_{}", self.request, self.output.len())
    }

    /// An event of the item that is being written.
    fn emit_in_item(&mut self, kind: &str, mut data: Value) {
        let Some(item) = &self.open else { return };
        data["item_id"] = Value::from(self.item_id(item));
        data["output_index"] = Value::from(self.output.len());
        self.emit(kind, data);
    }

    /// An event of its only part.
    fn emit_in_part(&mut self, kind: &str, mut data: Value) {
        data["content_index"] = Value::from(0);
        self.emit_in_item(kind, data);
    }

    fn emit(&mut self, kind: &str, mut data: Value) {
        data["type"] = Value::from(kind);
        data["sequence_number"] = Value::from(self.events);
        self.events += 1;
        self.frames.push(Bytes::from(format!("event: {kind}\ndata: {data}\n\n")));
    }
}

impl OpenItem {
    /// What has been written, where it is text.
    fn part(&self) -> Option<Value> {
        match self {
            OpenItem::Reasoning { text } => Some(json!({"type": "reasoning_text", "text": text})),
            OpenItem::Message { text, logprobs } => Some(json!({
                "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs,
            })),
            OpenItem::Call { .. } => None,
        }
    }
}
