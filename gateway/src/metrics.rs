//! What `/metrics` shows: vLLM's names with vLLM's buckets, OpenTelemetry's GenAI names, and the cluster under
//! `ashlar_`.
//!
//! Every label value comes from a closed set: names of served models, finish reasons, joined nodes and replicas.

mod cluster;
mod page;

pub(crate) use page::MetricsPage;

use crate::error::GatewayError;
use crate::transcript::End;
use ashlar_protocol::serving::{ClusterSnapshot, FinishReason, SchedulerCounters};
use axum::http::StatusCode;
use metrics::{Counter, Histogram, counter, histogram};
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use std::fmt;
use std::time::Duration;

const FIRST_TOKEN_S: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS_S: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const REQUEST_S: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// OpenTelemetry's advice for its GenAI histograms.
const GEN_AI_REQUEST_S: [f64; 14] =
    [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92];
const GEN_AI_FIRST_TOKEN_S: [f64; 16] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
const GEN_AI_TOKEN_S: [f64; 13] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5];

/// The gateway's own recorder: not the process's global one, so that two gateways in one process do not mix.
pub(crate) struct Metrics {
    handle: PrometheusHandle,
    model_name: String,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success_stop: Counter,
    success_length: Counter,
    failures: Counter,
    resubmissions: Counter,
    without_key: Counter,
    without_scope: Counter,
    without_place: Counter,
    first_token_s: Histogram,
    between_tokens_s: Histogram,
    e2e_s: Histogram,
    queue_s: Histogram,
    prefill_s: Histogram,
    decode_s: Histogram,
    step_tokens: Histogram,
    gen_ai_request_s: Histogram,
    gen_ai_first_token_s: Histogram,
    gen_ai_token_s: Histogram,
}

impl Metrics {
    /// Registers everything for the model served as `model_name`.
    pub(crate) fn new(model_name: &str) -> Result<Metrics, GatewayError> {
        let recorder = recorder(model_name).map_err(|error| GatewayError::Metrics(error.to_string()))?;
        let handle = recorder.handle();
        let model_name = model_name.to_owned();
        Ok(metrics::with_local_recorder(&recorder, || Metrics {
            handle,
            model_name,
            prompt_tokens: counter!("vllm:prompt_tokens_total"),
            generation_tokens: counter!("vllm:generation_tokens_total"),
            success_stop: counter!("vllm:request_success_total", "finished_reason" => "stop"),
            success_length: counter!("vllm:request_success_total", "finished_reason" => "length"),
            failures: counter!("ashlar_choices_failed_total"),
            resubmissions: counter!("ashlar_choices_resubmitted_total"),
            without_key: counter!("ashlar_turned_away_total", "status" => "401"),
            without_scope: counter!("ashlar_turned_away_total", "status" => "403"),
            without_place: counter!("ashlar_turned_away_total", "status" => "429"),
            first_token_s: histogram!("vllm:time_to_first_token_seconds"),
            between_tokens_s: histogram!("vllm:inter_token_latency_seconds"),
            e2e_s: histogram!("vllm:e2e_request_latency_seconds"),
            queue_s: histogram!("vllm:request_queue_time_seconds"),
            prefill_s: histogram!("vllm:request_prefill_time_seconds"),
            decode_s: histogram!("vllm:request_decode_time_seconds"),
            step_tokens: histogram!("vllm:iteration_tokens_total"),
            gen_ai_request_s: histogram!("gen_ai_server_request_duration_seconds"),
            gen_ai_first_token_s: histogram!("gen_ai_server_time_to_first_token_seconds"),
            gen_ai_token_s: histogram!("gen_ai_server_time_per_output_token_seconds"),
        }))
    }

    /// The page for Prometheus.
    pub(crate) fn render(&self, cluster: Option<&ClusterSnapshot>) -> MetricsPage {
        self.handle.run_upkeep();
        let mut page = MetricsPage::new(&self.handle.render());
        if let Some(cluster) = cluster {
            page.add(&MetricsPage::new(&cluster::render(cluster, &self.model_name, false)));
        }
        page
    }

    /// What a page says of a deployed model: as for the scheduler's own, with its name where that has no labels.
    pub(crate) fn render_deployed(&self, cluster: &ClusterSnapshot) -> MetricsPage {
        let mut page = self.render(None);
        page.add(&MetricsPage::new(&cluster::render(cluster, &self.model_name, true)));
        page
    }

    /// Steps between two snapshots. These carry sums, so each step counts with the average size.
    pub(crate) fn steps(&self, before: &SchedulerCounters, after: &SchedulerCounters) {
        let steps = after.steps.saturating_sub(before.steps);
        let tokens = after.scheduled_tokens.saturating_sub(before.scheduled_tokens);
        if steps > 0 {
            let count = usize::try_from(steps).unwrap_or(usize::MAX);
            self.step_tokens.record_many(tokens as f64 / steps as f64, count);
        }
    }

    /// A choice's first token, this long after its request's arrival.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token_s.record(after);
        self.gen_ai_first_token_s.record(after);
    }

    /// A further token, this long after the one before it.
    pub(crate) fn next_token(&self, after: Duration) {
        self.between_tokens_s.record(after);
        self.gen_ai_token_s.record(after);
    }

    /// A choice was submitted again, to the scheduler that came after a lost one.
    pub(crate) fn resubmitted(&self) {
        self.resubmissions.increment(1);
    }

    /// A request was answered with this status instead of being let in.
    pub(crate) fn turned_away(&self, status: StatusCode) {
        match status {
            StatusCode::UNAUTHORIZED => self.without_key.increment(1),
            StatusCode::FORBIDDEN => self.without_scope.increment(1),
            StatusCode::TOO_MANY_REQUESTS => self.without_place.increment(1),
            _ => {}
        }
    }

    /// A choice has ended, this long after its request's arrival.
    pub(crate) fn ended(&self, end: &End, after: Duration) {
        match end {
            End::Finished { reason, receipt } => {
                match reason {
                    FinishReason::Stop => self.success_stop.increment(1),
                    FinishReason::Length => self.success_length.increment(1),
                }
                self.prompt_tokens.increment(u64::from(receipt.prompt_tokens));
                self.generation_tokens.increment(u64::from(receipt.generated_tokens));
                self.e2e_s.record(after);
                self.gen_ai_request_s.record(after);
                self.queue_s.record(Duration::from_millis(receipt.queue_ms));
                self.prefill_s.record(Duration::from_millis(receipt.prefill_ms));
                self.decode_s.record(Duration::from_millis(receipt.decode_ms));
            }
            End::Failed(_) => self.failures.increment(1),
        }
    }
}

fn recorder(model_name: &str) -> Result<PrometheusRecorder, BuildError> {
    let mut builder =
        PrometheusBuilder::new().add_global_label("model_name", model_name).add_global_label("engine", "0");
    let buckets: [(&str, &[f64]); 10] = [
        ("vllm:time_to_first_token_seconds", &FIRST_TOKEN_S),
        ("vllm:inter_token_latency_seconds", &BETWEEN_TOKENS_S),
        ("vllm:e2e_request_latency_seconds", &REQUEST_S),
        ("vllm:request_queue_time_seconds", &REQUEST_S),
        ("vllm:request_prefill_time_seconds", &REQUEST_S),
        ("vllm:request_decode_time_seconds", &REQUEST_S),
        ("vllm:iteration_tokens_total", &STEP_TOKENS),
        ("gen_ai_server_request_duration_seconds", &GEN_AI_REQUEST_S),
        ("gen_ai_server_time_to_first_token_seconds", &GEN_AI_FIRST_TOKEN_S),
        ("gen_ai_server_time_per_output_token_seconds", &GEN_AI_TOKEN_S),
    ];
    for (name, buckets) in buckets {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)?;
    }
    Ok(builder.build_recorder())
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").field("model_name", &self.model_name).finish_non_exhaustive()
    }
}
