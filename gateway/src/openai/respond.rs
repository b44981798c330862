//! What chat and completions do alike around a generation: the body, the token budget, identifiers, headers.

use super::error::ApiError;
use crate::app::{App, ServedModel, system_fingerprint, unix_seconds};
use ashlar_protocol::serving::{ClusterSnapshot, FinishReason};
use ashlar_vocabulary::RequestId;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::time::Duration;

const WARNING: HeaderName = HeaderName::from_static("x-ashlar-warning");
const SEED: HeaderName = HeaderName::from_static("x-ashlar-seed");
/// Bytes of a body that is too large, read so that its sender gets the answer.
const DISCARDED_BYTES_MAX: usize = 64 << 20;
const WARNING_CHARS_MAX: usize = 1_024;

/// Reads a request's body within the configured size and time.
pub(crate) async fn read_body(app: &App, headers: &HeaderMap, body: Body) -> Result<Bytes, ApiError> {
    let max = app.config.request_body_bytes_max;
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    let timeout = Duration::from_millis(app.config.body_timeout_ms);
    match tokio::time::timeout(timeout, collect(body, max, announced)).await {
        Ok(done) => done,
        Err(_) => Err(ApiError::request_timeout(format!(
            "the request body did not arrive within {} ms: send it faster, or less",
            app.config.body_timeout_ms
        ))),
    }
}

async fn collect(mut body: Body, max: usize, announced: Option<u64>) -> Result<Bytes, ApiError> {
    let mut bytes = BytesMut::new();
    let mut fits = announced.is_none_or(|length| length <= max as u64);
    let mut left_to_discard = DISCARDED_BYTES_MAX;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| ApiError::invalid("the request body ended early: send it whole"))?;
        let Ok(data) = frame.into_data() else { continue };
        fits = fits && bytes.len() + data.len() <= max;
        if fits {
            bytes.extend_from_slice(&data);
            continue;
        }
        // A client that is still sending would meet a closed connection and never read the answer.
        bytes = BytesMut::new();
        match left_to_discard.checked_sub(data.len()) {
            Some(left) => left_to_discard = left,
            None => break,
        }
    }
    if fits { Ok(bytes.freeze()) } else { Err(ApiError::body_too_large(max)) }
}

/// Reads what a client still sends, up to `max` bytes, so that it gets the answer.
pub(crate) async fn discard(mut body: Body, max: usize, timeout: Duration) {
    let reading = async {
        let mut left = max;
        while let Some(Ok(frame)) = body.frame().await {
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(bytes) {
                Some(less) => left = less,
                None => return,
            }
        }
    };
    let _ = tokio::time::timeout(timeout, reading).await;
}

/// How many tokens may be generated after a prompt of `prompt` tokens; `what` is what the prompt was given as.
pub(crate) fn token_budget(
    context: u32,
    prompt: usize,
    max_tokens: Option<u32>,
    max_tokens_param: &str,
    what: &str,
) -> Result<u32, ApiError> {
    let too_long = |param: &str, message: String| ApiError {
        code: Some("context_length_exceeded"),
        ..ApiError::field(param, message)
    };
    let room = u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt)).unwrap_or(0);
    if room == 0 {
        return Err(too_long(
            what,
            format!(
                "This model's maximum context length is {context} tokens. However, your {what} resulted in {prompt} \
                 tokens, which leaves no room for an answer. Please reduce the length of the {what}."
            ),
        ));
    }
    match max_tokens {
        Some(max) if max > room => Err(too_long(
            max_tokens_param,
            format!(
                "This model's maximum context length is {context} tokens. However, you requested {} tokens ({prompt} in \
                 the {what}, {max} in the completion). Please reduce the length of the {what} or `{max_tokens_param}`.",
                prompt as u64 + u64::from(max)
            ),
        )),
        Some(max) => Ok(max),
        None => Ok(room),
    }
}

/// Refuses a `min_tokens` that the budget cannot hold.
pub(crate) fn check_min_tokens(min_tokens: u32, budget: u32) -> Result<(), ApiError> {
    if min_tokens > budget {
        let message = format!(
            "`min_tokens` is {min_tokens}, more than the {budget} tokens that may be generated: lower it"
        );
        return Err(ApiError::field("min_tokens", message));
    }
    Ok(())
}

/// What every object of one answer repeats.
#[derive(Debug, Clone)]
pub(crate) struct AnswerHead {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

impl AnswerHead {
    pub(crate) fn new(
        served: &ServedModel,
        cluster: &ClusterSnapshot,
        prefix: &str,
        request: RequestId,
        object: &'static str,
    ) -> AnswerHead {
        AnswerHead {
            id: format!("{prefix}{request}"),
            object,
            created: unix_seconds(),
            model: served.name.clone(),
            system_fingerprint: system_fingerprint(cluster, served),
        }
    }

    /// An object with these choices.
    pub(crate) fn with_choices(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "system_fingerprint": self.system_fingerprint,
        })
    }
}

/// Adds the headers that tell of ignored fields and of the seed.
pub(crate) fn add_headers(response: &mut Response, unknown: &[String], seed: u64) {
    let headers = response.headers_mut();
    // As the client may send it back: a signed number.
    headers.insert(SEED, HeaderValue::from(seed as i64));
    add_warning(headers, unknown);
}

/// Adds the warning header, if there is anything to warn of.
pub(crate) fn add_warning(headers: &mut HeaderMap, unknown: &[String]) {
    if unknown.is_empty() {
        return;
    }
    let visible = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
    let text: String = format!("ignored unknown fields: {}", unknown.join(", "))
        .chars()
        .take(WARNING_CHARS_MAX)
        .map(visible)
        .collect();
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(WARNING, value);
    }
}

/// OpenAI's word.
pub(crate) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    }
}
