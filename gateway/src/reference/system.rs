//! The server itself.

use super::{Answer, Operation, get};
use crate::access::Access;

const SUBJECT: &str = "Server";

pub(crate) const HEALTH: Operation =
    get(SUBJECT, "The process runs", Answer::Json(r#"{"status": "ok"}"#)).access(Access::Public);
pub(crate) const READY: Operation =
    get(SUBJECT, "A request would be computed now", Answer::Json(r#"{"status": "ready", "degraded": []}"#))
        .details("503 with what is missing otherwise. `degraded` says what is less than it should be while requests are computed.")
        .access(Access::Public);
pub(crate) const METRICS: Operation = get(
    SUBJECT,
    "Figures in Prometheus' text format",
    Answer::Text("vllm:num_requests_running{model_name=\"ashlar-demo\"} 0"),
)
.access(Access::Metrics);
pub(crate) const DASHBOARD: Operation = get(SUBJECT, "The dashboard", Answer::Page).access(Access::Public);
pub(crate) const ASSET: Operation = get(SUBJECT, "A part of the dashboard", Answer::Bytes)
    .parameters(&[super::in_path("file", "Its name.")])
    .access(Access::Public);
pub(crate) const DOCS: Operation =
    get(SUBJECT, "This reference, to browse", Answer::Page).access(Access::Public);
pub(crate) const DOCS_ASSET: Operation = get(SUBJECT, "A part of the reference's page", Answer::Bytes)
    .parameters(&[super::in_path("file", "Its name.")])
    .access(Access::Public);
pub(crate) const OPENAPI: Operation =
    get(SUBJECT, "This reference, as an OpenAPI document", Answer::Json(r#"{"openapi": "3.1.0"}"#))
        .access(Access::Public);
