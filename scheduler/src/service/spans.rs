//! One span per choice, a child of what the gateway traces and the parent of what the ranks trace.

use crate::engine::GatewayId;
use ashlar_protocol::serving::{ChoiceId, FromScheduler, Submit};
use ashlar_service_kit::{current_traceparent, set_parent};
use std::collections::BTreeMap;
use tracing::Span;

/// The spans of choices in progress; only traced ones have any.
#[derive(Debug, Default)]
pub(super) struct Spans {
    open: BTreeMap<ChoiceId, (GatewayId, Span)>,
}

impl Spans {
    /// Opens a span for a traced submission, which from now on names this span as its parent.
    pub(super) fn open(&mut self, gateway: GatewayId, submit: &mut Submit) {
        let Some(traceparent) = submit.traceparent.as_deref() else { return };
        let span = tracing::info_span!(
            "schedule",
            request = %submit.id.request,
            choice = submit.id.choice,
            queue_ms = tracing::field::Empty,
            prefill_ms = tracing::field::Empty,
            decode_ms = tracing::field::Empty,
            cached_tokens = tracing::field::Empty,
            preemptions = tracing::field::Empty,
            replays = tracing::field::Empty,
            failure = tracing::field::Empty,
        );
        set_parent(&span, traceparent);
        if let Some(own) = span.in_scope(current_traceparent) {
            submit.traceparent = Some(own);
        }
        self.open.insert(submit.id, (gateway, span));
    }

    /// Closes the span of a choice that ends with this message.
    pub(super) fn observe(&mut self, message: &FromScheduler) {
        match message {
            FromScheduler::Finished { id, receipt, .. } => {
                if let Some((_, span)) = self.open.remove(id) {
                    span.record("queue_ms", receipt.queue_ms);
                    span.record("prefill_ms", receipt.prefill_ms);
                    span.record("decode_ms", receipt.decode_ms);
                    span.record("cached_tokens", receipt.cached_tokens);
                    span.record("preemptions", receipt.preemptions);
                    span.record("replays", receipt.replays);
                }
            }
            FromScheduler::Failed { id, error } => {
                if let Some((_, span)) = self.open.remove(id) {
                    span.record("failure", tracing::field::debug(error.kind));
                }
            }
            FromScheduler::Cluster(_)
            | FromScheduler::Keys(_)
            | FromScheduler::Quota { .. }
            | FromScheduler::Models(_)
            | FromScheduler::Beat
            | FromScheduler::Admin { .. }
            | FromScheduler::Prepare(_)
            | FromScheduler::Compare(_)
            | FromScheduler::Adopt(_)
            | FromScheduler::Token(_)
            | FromScheduler::Tokens(_)
            | FromScheduler::PromptLogprobs { .. } => {}
        }
    }

    /// Closes the span of a cancelled choice.
    pub(super) fn cancelled(&mut self, id: ChoiceId) {
        self.open.remove(&id);
    }

    /// Closes the spans of a gateway that is gone.
    pub(super) fn gateway_gone(&mut self, gateway: GatewayId) {
        self.open.retain(|_, (owner, _)| *owner != gateway);
    }
}
