//! What a client sees of an adapter that is served only if it is better than what is.

use super::ids::file_name;
use ashlar_protocol::admin::{
    Comparison, JobRecord, Promotion, PromotionMetric, PromotionOutcome, PromotionVerdict,
};
use serde_json::{Value, json};

/// The request's field, with what it left open.
pub(super) fn asked(promote: &Promotion) -> Value {
    let bound = match promote.metric {
        PromotionMetric::ExactMatch => "at_least",
        PromotionMetric::Loss => "at_most",
    };
    json!({"metric": promote.metric, "file": file_name(promote.file), bound: promote.bound})
}

/// How far it is, once the adapter is trained; null before.
pub(super) fn object(job: &JobRecord) -> Value {
    let Some(candidate) = &job.candidate else { return Value::Null };
    let mut object = json!({
        "model": candidate.name,
        "generation": candidate.generation,
        "candidate": job.checkpoints.last().map(|last| &last.model),
        "promoted": null,
    });
    if let Some(outcome) = &candidate.outcome {
        add_outcome(job, outcome, &mut object);
    }
    object
}

/// Level, message and data of the event.
pub(super) fn told(job: &JobRecord, outcome: &PromotionOutcome) -> (&'static str, String, Value) {
    let level = match outcome.verdict {
        PromotionVerdict::NotCompared(_) => "warn",
        _ => "info",
    };
    let mut data = json!({});
    add_outcome(job, outcome, &mut data);
    (level, message(job, outcome), data)
}

fn add_outcome(job: &JobRecord, outcome: &PromotionOutcome, to: &mut Value) {
    to["promoted"] = outcome.is_promoted().into();
    to["verdict"] = match outcome.verdict {
        PromotionVerdict::Better => "better",
        PromotionVerdict::ServedAlready => "served_already",
        PromotionVerdict::NotBetter => "not_better",
        PromotionVerdict::OutOfBound => "out_of_bound",
        PromotionVerdict::NotCompared(_) => "not_compared",
    }
    .into();
    to["reason"] = message(job, outcome).into();
    to["metric"] = json!(job.request.promote.map(|promote| promote.metric));
    if let Some(comparison) = &outcome.comparison {
        to["candidate_value"] = comparison.candidate.into();
        to["served_value"] = comparison.served.into();
        to["served_generation"] = comparison.against.into();
        to["compared_on"] = comparison.count.into();
    }
}

/// The outcome with its figures.
fn message(job: &JobRecord, outcome: &PromotionOutcome) -> String {
    let figures = match (&outcome.comparison, job.request.promote) {
        (Some(comparison), Some(promote)) => figures(comparison, promote.metric),
        _ => String::new(),
    };
    match &outcome.verdict {
        PromotionVerdict::Better => format!("Promoted: {figures}"),
        PromotionVerdict::ServedAlready => "Promoted: the same adapter is served already".to_owned(),
        PromotionVerdict::NotBetter => {
            format!("Not promoted, as it is no better than what is served: {figures}")
        }
        PromotionVerdict::OutOfBound => {
            format!("Not promoted, as it is better, but not as good as was asked for: {figures}")
        }
        PromotionVerdict::NotCompared(why) => format!("Not promoted, as it could not be compared: {why}"),
    }
}

fn figures(comparison: &Comparison, metric: PromotionMetric) -> String {
    let Comparison { candidate, served, against, count } = comparison;
    let than = match against {
        Some(generation) => format!("generation {generation}"),
        None => "the base model".to_owned(),
    };
    match metric {
        PromotionMetric::ExactMatch => {
            format!("exact match {candidate:.3} against {served:.3} of {than}, on {count} answers")
        }
        PromotionMetric::Loss => {
            format!("loss {candidate:.4} against {served:.4} of {than}, on {count} targets")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_say_what_was_compared_with_what() {
        let comparison = Comparison { candidate: 0.97, served: 0.0, against: None, count: 100 };
        let told = figures(&comparison, PromotionMetric::ExactMatch);
        assert_eq!(told, "exact match 0.970 against 0.000 of the base model, on 100 answers");
        let comparison = Comparison { candidate: 0.5, served: 1.25, against: Some(3), count: 70 };
        let told = figures(&comparison, PromotionMetric::Loss);
        assert_eq!(told, "loss 0.5000 against 1.2500 of generation 3, on 70 targets");
    }
}
