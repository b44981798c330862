//! Logs to standard error and, where configured, traces to an OpenTelemetry collector.

use crate::otlp_client::PlainHttpClient;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use serde::{Deserialize, Serialize};
use std::io::IsTerminal;
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// The filter of logs, in tracing's directives (`info`, `ashlar_scheduler=debug,info`).
pub const LOG_VARIABLE: &str = "ASHLAR_LOG";

/// Longest that the last export may take when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(3);

/// The `[telemetry]` table of every role's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Logs as one JSON object per line.
    pub json: bool,
    /// Where to send traces, for example `http://127.0.0.1:4318`; nowhere by default. Plain HTTP only.
    pub otlp_endpoint: Option<String>,
    /// Share of traces that are kept, 0 to 1; a trace that began elsewhere keeps that role's decision.
    pub trace_share: f64,
}

impl Default for TelemetryConfig {
    fn default() -> TelemetryConfig {
        TelemetryConfig { json: false, otlp_endpoint: None, trace_share: 1.0 }
    }
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The log filter cannot be read.
    #[error("{LOG_VARIABLE} is no filter ({0}): write for example info or ashlar_scheduler=debug,info")]
    Filter(String),
    /// The collector's address cannot be used.
    #[error("otlp_endpoint cannot be used ({0}): write for example http://127.0.0.1:4318")]
    Endpoint(String),
    /// There is a subscriber already.
    #[error("telemetry was started twice in this process: start it once, in main")]
    Twice,
}

/// Keeps telemetry going; dropping it sends what is left, for at most three seconds.
#[must_use = "dropping the guard ends the export of traces"]
#[derive(Debug)]
pub struct TelemetryGuard {
    provider: Option<SdkTracerProvider>,
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            tracing::warn!(%error, "the last traces could not be sent");
        }
    }
}

/// Starts logs and traces for the process; `role` names it (`gateway`, `scheduler`, `shard-node`).
///
/// # Errors
/// [`TelemetryError`].
pub fn init(role: &str, config: &TelemetryConfig) -> Result<TelemetryGuard, TelemetryError> {
    let directives = std::env::var(LOG_VARIABLE).unwrap_or_default();
    let filter = if directives.trim().is_empty() {
        EnvFilter::new("info")
    } else {
        EnvFilter::try_new(&directives).map_err(|error| TelemetryError::Filter(error.to_string()))?
    };
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let lines = if config.json { lines.json().boxed() } else { lines.compact().boxed() };
    let provider =
        config.otlp_endpoint.as_deref().map(|endpoint| provider(role, endpoint, config)).transpose()?;
    let traces = provider.as_ref().map(|provider| {
        // Spans of dependencies (HTTP, HTTP/2) would drown ours.
        let ours = tracing_subscriber::filter::filter_fn(|metadata| metadata.target().starts_with("ashlar"));
        tracing_opentelemetry::layer().with_tracer(provider.tracer("ashlar")).with_filter(ours)
    });
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .with(traces)
        .try_init()
        .map_err(|_| TelemetryError::Twice)?;
    Ok(TelemetryGuard { provider })
}

fn provider(
    role: &str,
    endpoint: &str,
    config: &TelemetryConfig,
) -> Result<SdkTracerProvider, TelemetryError> {
    if !endpoint.starts_with("http://") {
        return Err(TelemetryError::Endpoint("it does not start with http://".into()));
    }
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(PlainHttpClient)
        .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
        .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
        .with_timeout(FLUSH_TIMEOUT)
        .build()
        .map_err(|error| TelemetryError::Endpoint(error.to_string()))?;
    let sampler = Sampler::TraceIdRatioBased(config.trace_share.clamp(0.0, 1.0));
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_sampler(Sampler::ParentBased(Box::new(sampler)))
        .with_resource(Resource::builder().with_service_name(format!("ashlar-{role}")).build())
        .build())
}
