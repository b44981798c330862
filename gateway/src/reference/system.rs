//! The server itself.

use super::{Answer, Operation, get};

const SUBJECT: &str = "Server";

pub(crate) const HEALTH: Operation = get(SUBJECT, "The process runs", Answer::Json(r#"{"status": "ok"}"#));
pub(crate) const READY: Operation =
    get(SUBJECT, "A request would be computed now", Answer::Json(r#"{"status": "ready"}"#))
        .details("503 with what is missing otherwise.");
pub(crate) const METRICS: Operation = get(
    SUBJECT,
    "Figures in Prometheus' text format",
    Answer::Text("vllm:num_requests_running{model_name=\"ashlar-demo\"} 0"),
);
pub(crate) const DASHBOARD: Operation = get(SUBJECT, "The dashboard", Answer::Page);
pub(crate) const ASSET: Operation =
    get(SUBJECT, "A part of the dashboard", Answer::Bytes).parameters(&[super::in_path("file", "Its name.")]);
pub(crate) const DOCS: Operation = get(SUBJECT, "This reference, to browse", Answer::Page);
pub(crate) const DOCS_ASSET: Operation = get(SUBJECT, "A part of the reference's page", Answer::Bytes)
    .parameters(&[super::in_path("file", "Its name.")]);
pub(crate) const OPENAPI: Operation =
    get(SUBJECT, "This reference, as an OpenAPI document", Answer::Json(r#"{"openapi": "3.1.0"}"#));
