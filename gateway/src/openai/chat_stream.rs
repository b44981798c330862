//! The chunks of a streamed chat answer.

use super::answer::{AnswerParser, Piece};
use super::chat::{ChatForm, chat_finish_reason};
use super::logprobs::chat_logprobs;
use super::sampling::Delivery;
use super::stream::StreamForm;
use super::usage::{receipt_json, usage_json};
use crate::app::App;
use crate::generation::Generation;
use crate::transcript::Delta;
use ashlar_protocol::serving::FinishReason;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) struct ChatStream {
    app: Arc<App>,
    form: ChatForm,
    delivery: Delivery,
    choices: Vec<ChoiceStream>,
}

struct ChoiceStream {
    parser: AnswerParser,
    role_sent: bool,
}

impl ChatStream {
    pub(crate) fn new(app: Arc<App>, form: ChatForm, delivery: Delivery) -> ChatStream {
        let choices = (0..form.choices)
            .map(|choice| ChoiceStream { parser: form.parser(choice), role_sent: false })
            .collect();
        ChatStream { app, form, delivery, choices }
    }

    /// Appends pieces as chunks; the log-probabilities go with the first, or alone.
    fn pieces(&mut self, choice: usize, pieces: Vec<Piece>, mut logprobs: Value, out: &mut Chunks<'_>) {
        if pieces.is_empty() && logprobs.is_null() {
            return;
        }
        self.role(choice, out);
        if pieces.is_empty() {
            return self.chunk(choice, json!({}), logprobs, Value::Null, out);
        }
        for piece in pieces {
            self.chunk(choice, piece_json(piece), logprobs.take(), Value::Null, out);
        }
    }

    /// The first chunk of a choice names the speaker.
    fn role(&mut self, choice: usize, out: &mut Chunks<'_>) {
        let Some(state) = self.choices.get_mut(choice) else { return };
        if !std::mem::replace(&mut state.role_sent, true) {
            let delta = json!({"role": "assistant", "content": "", "refusal": null});
            self.chunk(choice, delta, Value::Null, Value::Null, out);
        }
    }

    fn chunk(
        &self,
        choice: usize,
        delta: Value,
        logprobs: Value,
        finish_reason: Value,
        out: &mut Chunks<'_>,
    ) {
        let mut chunk = self.form.head.with_choices(vec![json!({
            "index": choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        })]);
        if self.delivery.continuous_usage {
            chunk["usage"] = usage_json(out.generation.counts());
        } else if self.delivery.include_usage {
            chunk["usage"] = Value::Null;
        }
        out.chunks.push(chunk);
    }
}

/// Where chunks go, and the state that they may tell of.
struct Chunks<'a> {
    generation: &'a Generation,
    chunks: &'a mut Vec<Value>,
}

impl StreamForm for ChatStream {
    fn delta(&mut self, choice: usize, delta: Delta, generation: &Generation, chunks: &mut Vec<Value>) {
        let Some(state) = self.choices.get_mut(choice) else { return };
        let pieces = state.parser.push(&delta.text);
        let logprobs = match self.form.top_logprobs {
            Some(top) => chat_logprobs(&delta.tokens, top, &self.app.text),
            None => Value::Null,
        };
        self.pieces(choice, pieces, logprobs, &mut Chunks { generation, chunks });
    }

    fn end(&mut self, choice: usize, reason: FinishReason, generation: &Generation, chunks: &mut Vec<Value>) {
        let Some(state) = self.choices.get_mut(choice) else { return };
        let pieces = state.parser.finish();
        let reason = chat_finish_reason(reason, state.parser.has_tool_calls());
        let out = &mut Chunks { generation, chunks };
        self.pieces(choice, pieces, Value::Null, out);
        self.role(choice, out);
        self.chunk(choice, json!({}), Value::Null, Value::from(reason), out);
    }

    fn last(&mut self, generation: &Generation, chunks: &mut Vec<Value>) {
        if !self.delivery.include_usage && !self.delivery.receipt {
            return;
        }
        let mut chunk = self.form.head.with_choices(Vec::new());
        if self.delivery.include_usage {
            chunk["usage"] = usage_json(generation.counts());
        }
        if self.delivery.receipt {
            chunk["ashlar"] = receipt_json(generation);
        }
        chunks.push(chunk);
    }
}

fn piece_json(piece: Piece) -> Value {
    match piece {
        Piece::Reasoning(text) => json!({"reasoning_content": text}),
        Piece::Content(text) => json!({"content": text}),
        Piece::ToolCall { index, id, name } => json!({"tool_calls": [{
            "index": index,
            "id": id,
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }]}),
        Piece::Arguments { index, text } => json!({"tool_calls": [{
            "index": index,
            "function": {"arguments": text},
        }]}),
    }
}
