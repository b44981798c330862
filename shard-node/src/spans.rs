//! One span per traced sequence and rank: from the plan that brings it to the plan that ends it.

use ashlar_protocol::membership::Assignment;
use ashlar_protocol::step::{NewSequence, StepTiming};
use ashlar_service_kit::set_parent;
use ashlar_vocabulary::SequenceId;
use std::collections::BTreeMap;
use tracing::{Span, field::Empty, info_span};

#[derive(Debug)]
struct Traced {
    span: Span,
    steps: u64,
    spent: StepTiming,
}

/// The spans of sequences in progress; only traced ones have any.
#[derive(Debug, Default)]
pub struct Spans(BTreeMap<SequenceId, Traced>);

impl Spans {
    /// Opens a span if the sequence is traced.
    pub fn begin(&mut self, new: &NewSequence, place: &Assignment) {
        let Some(traceparent) = &new.traceparent else { return };
        let span = info_span!(
            "stage",
            stage = place.stage.0,
            tensor_rank = place.tensor_rank.0,
            steps = Empty,
            compute_us = Empty,
            wait_us = Empty,
            collective_us = Empty,
            send_us = Empty,
        );
        set_parent(&span, traceparent);
        self.0.insert(new.id, Traced { span, steps: 0, spent: StepTiming::default() });
    }

    /// Adds a step to the sequence's account; a step's whole time counts for each of its sequences.
    pub fn step(&mut self, id: SequenceId, timing: &StepTiming) {
        if let Some(traced) = self.0.get_mut(&id) {
            traced.steps += 1;
            traced.spent.compute_us += timing.compute_us;
            traced.spent.wait_us += timing.wait_us;
            traced.spent.collective_us += timing.collective_us;
            traced.spent.send_us += timing.send_us;
        }
    }

    /// Whether nothing is traced, so that accounts need not be kept.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Closes a sequence's span.
    pub fn end(&mut self, id: SequenceId) {
        if let Some(Traced { span, steps, spent }) = self.0.remove(&id) {
            span.record("steps", steps);
            span.record("compute_us", spent.compute_us);
            span.record("wait_us", spent.wait_us);
            span.record("collective_us", spent.collective_us);
            span.record("send_us", spent.send_us);
        }
    }
}
