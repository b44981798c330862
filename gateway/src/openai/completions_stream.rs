//! The chunks of a streamed completion.

use super::completions::CompletionForm;
use super::completions_logprobs::LegacyLogprobs;
use super::sampling::Delivery;
use super::stream::StreamForm;
use super::usage::{receipt_json, usage_json};
use crate::app::App;
use crate::generation::Generation;
use crate::transcript::Delta;
use ashlar_protocol::serving::FinishReason;
use serde_json::{Value, json};
use std::sync::Arc;

pub(crate) struct CompletionStream {
    app: Arc<App>,
    form: CompletionForm,
    delivery: Delivery,
    /// Which choices have sent their echo.
    begun: Vec<bool>,
}

impl CompletionStream {
    pub(crate) fn new(app: Arc<App>, form: CompletionForm, delivery: Delivery) -> CompletionStream {
        CompletionStream { begun: vec![false; form.choices()], app, form, delivery }
    }

    fn chunk(
        &mut self,
        choice: usize,
        delta: &Delta,
        finish_reason: Option<&str>,
        generation: &Generation,
        chunks: &mut Vec<Value>,
    ) {
        let Some(begun) = self.begun.get_mut(choice) else { return };
        let first = !std::mem::replace(begun, true);
        let echoed = self.form.echoed(choice);
        let text = if first { format!("{echoed}{}", delta.text) } else { delta.text.clone() };
        let logprobs = self.form.logprobs.then(|| {
            let mut logprobs = match first {
                true => self.form.prompt_logprobs(choice, generation.prompt_logprobs(choice), &self.app.text),
                false => LegacyLogprobs::default(),
            };
            logprobs.add_generated(&delta.tokens, echoed.chars().count(), &self.app.text);
            logprobs.json()
        });
        let mut chunk = self.form.head.with_choices(vec![json!({
            "index": choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        })]);
        if self.delivery.continuous_usage {
            chunk["usage"] = usage_json(self.form.counts(generation));
        } else if self.delivery.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunks.push(chunk);
    }
}

impl StreamForm for CompletionStream {
    fn delta(&mut self, choice: usize, delta: Delta, generation: &Generation, chunks: &mut Vec<Value>) {
        if self.form.echo_only || (delta.text.is_empty() && !self.form.logprobs) {
            return;
        }
        self.chunk(choice, &delta, None, generation, chunks);
    }

    fn end(&mut self, choice: usize, reason: FinishReason, generation: &Generation, chunks: &mut Vec<Value>) {
        let reason = self.form.finish_reason(reason);
        self.chunk(choice, &Delta::default(), Some(reason), generation, chunks);
    }

    fn last(&mut self, generation: &Generation, chunks: &mut Vec<Value>) {
        if !self.delivery.include_usage && !self.delivery.receipt {
            return;
        }
        let mut chunk = self.form.head.with_choices(Vec::new());
        if self.delivery.include_usage {
            chunk["usage"] = usage_json(self.form.counts(generation));
        }
        if self.delivery.receipt {
            chunk["ashlar"] = receipt_json(generation);
        }
        chunks.push(chunk);
    }
}
