//! Who a request is: its id, its trace, and the span under which all of it happens.

use crate::access::{Caller, authenticate};
use crate::app::{App, unix_seconds};
use crate::openai::error::ApiError;
use crate::router::{Routing, Surface};
use ashlar_protocol::access::Quota;
use ashlar_service_kit::{current_traceparent, set_parent};
use ashlar_vocabulary::{RequestId, SamplingParams};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::any::Any;
use std::sync::{Arc, OnceLock};
use tracing::field::Empty;
use tracing::{Instrument, Span};
use uuid::Uuid;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACEPARENT_BYTES: usize = 55;
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Travels with a request as an extension.
#[derive(Debug, Clone)]
pub(crate) struct RequestContext {
    pub(crate) id: RequestId,
    pub(crate) traceparent: Option<String>,
    pub(crate) span: Span,
    /// Who asks.
    pub(crate) caller: Caller,
    /// What is left of the caller's limits, once the scheduler has said so.
    pub(crate) quota: Arc<OnceLock<Quota>>,
}

impl RequestContext {
    /// Writes down what was asked for, in OpenTelemetry's GenAI names. Never the text.
    pub(crate) fn record(&self, model: &str, sampling: &SamplingParams, max_tokens: u32) {
        self.span
            .record("gen_ai.request.model", model)
            .record("gen_ai.response.model", model)
            .record("gen_ai.request.max_tokens", max_tokens)
            .record("gen_ai.request.temperature", f64::from(sampling.temperature))
            .record("gen_ai.request.top_p", f64::from(sampling.top_p))
            .record("gen_ai.request.seed", sampling.seed);
    }
}

/// What the middleware around all routes needs.
#[derive(Clone)]
pub(crate) struct Surroundings {
    pub(crate) app: Arc<App>,
    /// What each route asks for.
    pub(crate) routes: Arc<Routing>,
    /// What is to be had at the address that was asked.
    pub(crate) surface: Surface,
}

/// Middleware: lets in whoever may, gives every request a context, every response its `x-request-id` and what is left of limits,
/// and writes down who has changed something.
pub(crate) async fn with_context(
    State(Surroundings { app, routes, surface }): State<Surroundings>,
    mut request: Request,
    next: Next,
) -> Response {
    let id = RequestId(Uuid::new_v4().as_u128());
    let name = request.headers().get(&REQUEST_ID).filter(|name| is_plain(name)).cloned();
    let name = name.or_else(|| HeaderValue::from_str(&id.to_string()).ok());
    let (operation, title) = operation(request.uri().path());
    let span = tracing::info_span!(
        "request",
        otel.name = if title { format!("{operation} {}", app.model_name()) } else { operation.to_owned() },
        otel.kind = "server",
        request_id = %id,
        gen_ai.operation.name = operation,
        gen_ai.provider.name = "ashlar",
        gen_ai.request.model = Empty,
        gen_ai.request.max_tokens = Empty,
        gen_ai.request.temperature = Empty,
        gen_ai.request.top_p = Empty,
        gen_ai.request.seed = Empty,
        gen_ai.response.model = Empty,
        gen_ai.usage.input_tokens = Empty,
        gen_ai.usage.output_tokens = Empty,
        http.response.status_code = Empty,
        key = Empty,
    );
    let parent =
        request.headers().get(&TRACEPARENT).and_then(|parent| parent.to_str().ok()).map(str::to_owned);
    if let Some(parent) = &parent {
        set_parent(&span, parent);
    }
    // Where no trace is made here, the client's own goes on to the nodes.
    let traceparent = span.in_scope(current_traceparent).or(parent.filter(|parent| is_traceparent(parent)));
    let access = routes.access(&request);
    let keys = app.scheduler.link().keys;
    let caller = authenticate(
        request.headers(),
        access,
        keys.as_deref(),
        app.config.keys_are_required(),
        unix_seconds(),
    );
    let mut response = match caller {
        _ if !surface.has(access, request.uri().path()) => {
            ApiError::not_found("this is not served at this address: see its configuration", "unknown_url")
                .into_response()
        }
        Err(refusal) => {
            app.metrics.turned_away(refusal.status);
            refusal.into_response()
        }
        Ok(caller) => {
            if let Some(key) = caller.key_id() {
                span.record("key", tracing::field::display(key));
            }
            let quota = Arc::<OnceLock<Quota>>::default();
            let audited = app.audit.of(access, &request, &caller, id);
            let context =
                RequestContext { id, traceparent, span: span.clone(), caller, quota: quota.clone() };
            request.extensions_mut().insert(context);
            let mut response = next.run(request).instrument(span.clone()).await;
            if let Some(quota) = quota.get() {
                add_limits(response.headers_mut(), quota);
            }
            if let Some(audited) = audited {
                app.audit.write(audited, response.status());
            }
            response
        }
    };
    span.record("http.response.status_code", response.status().as_u16());
    if let Some(name) = name {
        response.headers_mut().insert(REQUEST_ID, name);
    }
    response
}

/// OpenAI's headers of limits.
fn add_limits(headers: &mut HeaderMap, quota: &Quota) {
    let lines = [("requests", &quota.requests), ("tokens", &quota.tokens)];
    for (what, line) in lines.into_iter().filter_map(|(what, line)| Some((what, line.as_ref()?))) {
        let reset = format!("{}ms", line.reset_ms);
        let values =
            [("limit", line.limit.to_string()), ("remaining", line.remaining.to_string()), ("reset", reset)];
        for (name, value) in values {
            let name = HeaderName::try_from(format!("x-ratelimit-{name}-{what}"));
            if let (Ok(name), Ok(value)) = (name, HeaderValue::try_from(value)) {
                headers.insert(name, value);
            }
        }
    }
}

/// What a handler's panic looks like from outside.
pub(crate) fn panic_response(panic: Box<dyn Any + Send + 'static>) -> Response {
    let cause = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    tracing::error!(cause, "a request panicked");
    ApiError::internal("the server failed on this request: please report it").into_response()
}

/// GenAI's operation of a path, and whether spans name the model too.
fn operation(path: &str) -> (&'static str, bool) {
    match path {
        "/v1/chat/completions" => ("chat", true),
        "/v1/responses" => ("chat", true),
        "/v1/completions" => ("text_completion", true),
        _ => ("http", false),
    }
}

fn is_traceparent(text: &str) -> bool {
    text.len() == TRACEPARENT_BYTES && text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-')
}

fn is_plain(name: &HeaderValue) -> bool {
    (1..=REQUEST_ID_BYTES_MAX).contains(&name.len()) && name.as_bytes().iter().all(u8::is_ascii_graphic)
}
