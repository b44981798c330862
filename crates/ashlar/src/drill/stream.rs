//! One stream of the load: what it asks for, and what comes of it.

use crate::http::{Client, EventStream};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A stream that says nothing for this long hangs.
pub(super) const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Before a gateway that is gone is asked again.
pub(super) const PAUSE: Duration = Duration::from_millis(50);

/// What a stream asks for, and what it came to undisturbed.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    way: Way,
    request: Value,
    expected: Vec<Choice>,
}

/// How it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// `/v1/completions`: a stream that ends with its gateway.
    Completions,
    /// `/v1/responses`: a client that reconnects goes on with the next event.
    Responses,
}

/// A choice as its client has it.
#[derive(Debug, Default, Clone, PartialEq)]
struct Choice {
    text: String,
    tokens: Vec<Value>,
    logprobs: Vec<Value>,
    finish_reason: Value,
}

/// It says nothing any more.
#[derive(Debug, thiserror::Error)]
#[error("nothing came for {} s", SILENCE_MAX.as_secs())]
pub(super) struct Hung;

/// An event of a response came twice, or did not come.
#[derive(Debug, thiserror::Error)]
#[error("expected event {expected} of a response, and got {got}")]
pub(super) struct OutOfOrder {
    expected: u64,
    got: String,
}

/// Who hears of a stream while it runs.
pub(super) trait Hear {
    /// Something came.
    fn event(&mut self, at: Instant);
    /// The connection broke, and its client comes back for the rest.
    fn resumed(&mut self);
}

/// Nobody.
struct Nobody;

impl Hear for Nobody {
    fn event(&mut self, _at: Instant) {}
    fn resumed(&mut self) {}
}

impl Shape {
    /// Asks for `count` different ones, one after the other; every other one as a response.
    pub(super) async fn ask_all(client: &Client, count: u32, tokens: u32) -> Result<Vec<Shape>> {
        let mut shapes = Vec::new();
        for number in 0..count {
            let way = if number % 2 == 0 { Way::Completions } else { Way::Responses };
            let text = format!("Story number {number}, told slowly:");
            let mut request = json!({
                "temperature": if number % 4 == 3 { 0 } else { 1 }, "seed": number, "ignore_eos": true, "presence_penalty": 0.5,
                "stream": true,
            });
            let own = match way {
                Way::Completions => {
                    json!({"prompt": text, "max_tokens": tokens, "n": 1 + number % 4 / 2, "logprobs": 2})
                }
                Way::Responses => json!({"input": text, "max_output_tokens": tokens, "top_logprobs": 2}),
            };
            if let (Value::Object(request), Value::Object(own)) = (&mut request, own) {
                request.extend(own);
            }
            let mut shape = Shape { way, request, expected: Vec::new() };
            shape.expected = shape.read(client, &mut Nobody).await.context("an undisturbed stream")?;
            shapes.push(shape);
        }
        Ok(shapes)
    }

    /// Asks once, and reads to the end; whether it came to the same as undisturbed.
    pub(super) async fn run(&self, client: &Client, hear: &mut impl Hear) -> Result<bool> {
        Ok(self.read(client, hear).await? == self.expected)
    }

    async fn read(&self, client: &Client, hear: &mut impl Hear) -> Result<Vec<Choice>> {
        match self.way {
            Way::Completions => completion(client, &self.request, hear).await,
            Way::Responses => response(client, &self.request, hear).await.map(|choice| vec![choice]),
        }
    }
}

async fn within<T>(asked: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(SILENCE_MAX, asked).await.map_err(|_| Hung)?
}

async fn completion(client: &Client, request: &Value, hear: &mut impl Hear) -> Result<Vec<Choice>> {
    let mut events = within(client.stream("/v1/completions", request)).await?;
    let count = request["n"].as_u64().unwrap_or(1) as usize;
    let mut choices = vec![Choice::default(); count];
    while let Some(event) = within(events.next()).await? {
        hear.event(events.received());
        for part in event["choices"].as_array().into_iter().flatten() {
            let index = part["index"].as_u64().unwrap_or(u64::MAX) as usize;
            choices.get_mut(index).context("a choice that was not asked for")?.extend(part);
        }
    }
    let whole = choices.iter().all(|choice| !choice.finish_reason.is_null());
    if whole { Ok(choices) } else { bail!("the stream ended before its end") }
}

/// A response, by a client that comes back for the next event whenever its connection breaks.
async fn response(client: &Client, request: &Value, hear: &mut impl Hear) -> Result<Choice> {
    let mut events = within(client.stream("/v1/responses", request)).await?;
    let (mut id, mut next, mut choice) = (String::new(), 0, Choice::default());
    loop {
        match within(events.next()).await {
            Ok(Some(event)) => {
                hear.event(events.received());
                if event["sequence_number"] != next {
                    return Err(
                        OutOfOrder { expected: next, got: event["sequence_number"].to_string() }.into()
                    );
                }
                next += 1;
                if choice.take(&event, &mut id) {
                    return Ok(choice);
                }
            }
            Err(error) if id.is_empty() || error.is::<Hung>() => return Err(error),
            Ok(None) if id.is_empty() => bail!("the stream ended before its end"),
            Ok(None) | Err(_) => {
                hear.resumed();
                events = within(resume(client, &id, next)).await?;
            }
        }
    }
}

/// The rest of a response, as soon as a gateway is there.
async fn resume(client: &Client, id: &str, next: u64) -> Result<EventStream> {
    let after = next.saturating_sub(1);
    let path = format!("/v1/responses/{id}?stream=true&starting_after={after}");
    loop {
        match client.follow(&path).await {
            Ok(events) => return Ok(events),
            // No connection, or a gateway that goes.
            Err(error) if !crate::http::is_refusal(&error) => tokio::time::sleep(PAUSE).await,
            Err(error) => return Err(error),
        }
    }
}

impl Choice {
    fn extend(&mut self, part: &Value) {
        self.text.push_str(part["text"].as_str().unwrap_or_default());
        let list = |field: &str| part["logprobs"][field].as_array().cloned().unwrap_or_default();
        self.tokens.extend(list("tokens"));
        self.logprobs.extend(list("token_logprobs"));
        if !part["finish_reason"].is_null() {
            self.finish_reason = part["finish_reason"].clone();
        }
    }

    /// Takes an event of a response; whether it was the last.
    fn take(&mut self, event: &Value, id: &mut String) -> bool {
        match event["type"].as_str().unwrap_or_default() {
            "response.created" => event["response"]["id"].as_str().unwrap_or_default().clone_into(id),
            "response.output_text.delta" => {
                self.text.push_str(event["delta"].as_str().unwrap_or_default());
                self.logprobs.extend(event["logprobs"].as_array().cloned().unwrap_or_default());
            }
            "response.completed" | "response.incomplete" | "response.failed" => {
                self.finish_reason = event["response"]["status"].clone();
                return true;
            }
            _ => {}
        }
        false
    }
}
