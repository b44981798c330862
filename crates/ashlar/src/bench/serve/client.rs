//! One request, and when its parts arrived.

use super::workload::Planned;
use crate::http::{Client, EventStream, StatusError};
use anyhow::Result;
use serde::Serialize;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// What all requests have in common.
#[derive(Debug, Clone)]
pub(super) struct Template {
    /// Model to ask.
    pub(super) model: String,
    /// Sampling temperature.
    pub(super) temperature: f32,
    /// Only OpenAI's own fields: no `ignore_eos`.
    pub(super) plain: bool,
    /// Ask an Ashlar service where the time went.
    pub(super) receipt: bool,
    /// A request that takes longer has failed.
    pub(super) timeout: Duration,
}

/// How one request went. Times are in seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Outcome {
    /// How much later than planned it was sent: the client's own delay.
    pub(super) lag_s: f64,
    /// From sending to the first token.
    pub(super) ttft_s: Option<f64>,
    /// Gaps between chunks with text.
    pub(super) gaps_s: Vec<f64>,
    /// From sending to the end of the stream.
    pub(super) e2e_s: f64,
    /// From the first token to the last.
    pub(super) decode_s: f64,
    /// Prompt tokens as the service counts them.
    pub(super) input_tokens: u64,
    /// Of which it found in its prefix cache.
    pub(super) cached_tokens: u64,
    /// Generated tokens as the service counts them; chunks where it does not.
    pub(super) output_tokens: u64,
    /// Waiting in the service's queue, where it tells.
    pub(super) queue_ms: Option<f64>,
    /// Computing the prompt, where it tells.
    pub(super) prefill_ms: Option<f64>,
    /// Why it failed.
    pub(super) failure: Option<Failure>,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(super) struct Failure {
    /// An HTTP status, or what else happened.
    pub(super) status: String,
    /// The service's words.
    pub(super) message: String,
}

impl Outcome {
    /// Seconds per output token after the first; `None` of a single one.
    pub(super) fn tpot_s(&self) -> Option<f64> {
        (self.output_tokens > 1).then(|| self.decode_s / (self.output_tokens - 1) as f64)
    }

    /// Whether the service said that there is too much.
    pub(super) fn is_refused(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.status == "429")
    }

    fn failed(status: impl Into<String>, message: String) -> Outcome {
        Outcome { failure: Some(Failure { status: status.into(), message }), ..Outcome::default() }
    }
}

/// Sends `planned` now and reads its stream to the end. `due` is when it should have been sent.
pub(super) async fn execute(
    client: &Client,
    template: &Template,
    planned: &Planned,
    due: Instant,
) -> Outcome {
    let body = body(template, planned);
    let started = Instant::now();
    let lag_s = started.saturating_duration_since(due).as_secs_f64();
    let answered = tokio::time::timeout(template.timeout, receive(client, &body, started)).await;
    let outcome = match answered {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(error)) => Outcome::failed("broken", format!("{error:#}")),
        Err(_) => Outcome::failed("timeout", format!("no end within {} s", template.timeout.as_secs())),
    };
    // Of an answer until its end, of a refusal until it was heard.
    let e2e_s = if outcome.failure.is_some() { started.elapsed().as_secs_f64() } else { outcome.e2e_s };
    Outcome { lag_s, e2e_s, ..outcome }
}

fn body(template: &Template, planned: &Planned) -> Value {
    let mut body = json!({
        "model": template.model,
        "prompt": planned.prompt,
        "max_tokens": planned.output_tokens,
        "temperature": template.temperature,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    if !template.plain {
        body["ignore_eos"] = json!(true);
    }
    if template.receipt {
        body["ashlar_receipt"] = json!(true);
    }
    body
}

async fn receive(client: &Client, body: &Value, started: Instant) -> Result<Outcome> {
    let mut events = match client.try_stream("/v1/completions", body).await? {
        Ok(events) => events,
        Err(StatusError { status, message }) => {
            return Ok(Outcome::failed(status.as_u16().to_string(), message));
        }
    };
    let mut arrivals = Arrivals::default();
    let mut outcome = Outcome::default();
    while let Some(event) = events.next().await? {
        arrivals.note(&event, &events);
        if let Some(tokens) = event["usage"]["prompt_tokens"].as_u64() {
            outcome.input_tokens = tokens;
            outcome.cached_tokens =
                event["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
            outcome.output_tokens = event["usage"]["completion_tokens"].as_u64().unwrap_or(0);
        }
        if event["ashlar"].is_object() {
            outcome.queue_ms = event["ashlar"]["queue_ms"].as_f64();
            outcome.prefill_ms = event["ashlar"]["prefill_ms"].as_f64();
        }
    }
    let Some((first, last)) = arrivals.first.zip(arrivals.last) else {
        return Ok(Outcome::failed("empty", "the stream had no token".to_owned()));
    };
    if outcome.output_tokens == 0 {
        outcome.output_tokens = arrivals.gaps_s.len() as u64 + 1;
    }
    outcome.ttft_s = Some((first - started).as_secs_f64());
    outcome.decode_s = (last - first).as_secs_f64();
    outcome.e2e_s = (events.received() - started).as_secs_f64();
    outcome.gaps_s = arrivals.gaps_s;
    Ok(outcome)
}

/// Arrivals of chunks, at the moment when their bytes came.
#[derive(Debug, Default)]
struct Arrivals {
    first: Option<Instant>,
    /// The last chunk with text.
    text: Option<Instant>,
    /// The last chunk with text or the end of the answer.
    last: Option<Instant>,
    gaps_s: Vec<f64>,
}

impl Arrivals {
    fn note(&mut self, event: &Value, events: &EventStream) {
        let choice = &event["choices"][0];
        let text = choice["text"].as_str().is_some_and(|text| !text.is_empty());
        if !text && choice["finish_reason"].is_null() {
            return;
        }
        let now = events.received();
        // A token that has no text yet (half a character) shows with a later one, or at the end.
        self.first.get_or_insert(now);
        self.last = Some(now);
        if text {
            self.gaps_s.extend(self.text.map(|before| (now - before).as_secs_f64()));
            self.text = Some(now);
        }
    }
}
