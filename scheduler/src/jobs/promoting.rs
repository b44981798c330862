//! A finished adapter that is served only if it is better than what is: it is stored, compared, then served or kept.
//!
//! Where it is, is decided and recorded here; a gateway only measures. Everything may be asked for again: a new scheduler goes on
//! from the record, and does not know what its predecessor has asked for. A verdict is durable before anything follows from it,
//! as afterwards the candidate may be what it would be compared with.

use super::events::Effect;
use super::job::{self, Phase};
use super::lifecycle::error;
use super::publishing::retry_ms;
use super::{Jobs, names};
use crate::engine::GatewayId;
use crate::time::Millis;
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, Candidate, Comparison, JobEventKind, JobStatus, LoadAdapter, Promotion,
    PromotionOutcome, PromotionVerdict,
};
use ashlar_protocol::serving::CompareAdapters;
use ashlar_vocabulary::JobId;

/// Most candidates that are compared at once: each takes spare slots of those that serve.
const COMPARING_MAX: usize = 2;
/// How often it is tried to store a candidate, or to have it served.
const ATTEMPTS_MAX: u32 = 10;
/// How often a comparison may fail.
const COMPARISONS_MAX: u32 = 3;
/// How long a gateway may take for a comparison.
const COMPARISON_MS_MAX: u64 = 3_600_000;

/// A candidate on its way.
#[derive(Debug, Clone)]
pub(super) struct Promoting {
    at: At,
    /// Nothing is asked for before.
    due: Millis,
    /// What was asked for in vain.
    attempts: u32,
}

/// Where a candidate is.
#[derive(Debug, Clone)]
enum At {
    /// It is to become a generation of its name.
    Storing { asked: bool },
    /// It is to be compared: who does it, since when.
    Comparing { with: Option<(GatewayId, Millis)> },
    /// It is better, and to be served once that is durable.
    Serving { asked: bool },
}

impl Promoting {
    /// The gateway that compares it.
    fn with(&self) -> Option<GatewayId> {
        match self.at {
            At::Comparing { with: Some((gateway, _)) } => Some(gateway),
            _ => None,
        }
    }

    /// Whether it may be served at any moment, so that it is too late to end the job.
    pub(super) fn is_being_served(&self) -> bool {
        matches!(self.at, At::Serving { asked: true })
    }

    /// This gateway is gone: another one compares.
    pub(super) fn gateway_gone(&mut self, gone: GatewayId) {
        if self.with() == Some(gone) {
            self.at = At::Comparing { with: None };
        }
    }

    fn again(&mut self, at: At, now: Millis) {
        self.attempts += 1;
        self.due = now.plus(retry_ms(self.attempts));
        self.at = at;
    }
}

impl Jobs {
    /// A job is trained whose adapter is served only if it is better than what is. It goes on from where its record stands.
    pub(super) fn promote(&mut self, id: JobId) {
        let due = self.now;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let at = match job.record.candidate.as_ref().map(|candidate| &candidate.outcome) {
            None => At::Storing { asked: false },
            Some(None) => At::Comparing { with: None },
            Some(Some(_)) => At::Serving { asked: false },
        };
        job.phase = Phase::Promoting(Promoting { at, due, attempts: 0 });
        // How long it takes depends on who else is served.
        job.record.remaining_s = None;
        job.saving.dirty = true;
        self.promote_on(id);
    }

    /// Asks for what comes next, if it is time for it.
    pub(super) fn promote_on(&mut self, id: JobId) {
        let Some(job) = self.jobs.get(id) else { return };
        let Phase::Promoting(promoting) = &job.phase else { return };
        if promoting.due > self.now {
            return;
        }
        match promoting.at {
            At::Storing { asked: false } => self.ask_to_store(id),
            At::Comparing { with: None } => self.ask_to_compare(id),
            At::Serving { asked: false } if job.saving.is_done() => self.ask_to_serve(id),
            At::Storing { .. } | At::Comparing { .. } | At::Serving { .. } => {}
        }
    }

    fn promoting(&mut self, id: JobId) -> Option<&mut Promoting> {
        match &mut self.jobs.get_mut(id)?.phase {
            Phase::Promoting(promoting) => Some(promoting),
            _ => None,
        }
    }

    fn ask_to_store(&mut self, id: JobId) {
        let created_at = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let Some(adapter) = job.record.checkpoints.last().map(|last| last.adapter) else { return };
        let load = LoadAdapter {
            name: names::served(&job.record.request),
            adapter,
            root: names::root(id),
            created_at,
            replace: true,
            expected_generation: None,
            hold_back: true,
            owner: job.record.request.owner.clone(),
        };
        if let Some(promoting) = self.promoting(id) {
            promoting.at = At::Storing { asked: true };
        }
        self.effects.push(Effect::StoreCandidate { job: id, load });
    }

    /// A candidate is stored as this generation of its name, or is not.
    pub(super) fn candidate_stored(&mut self, id: JobId, outcome: Result<u64, AdminFailure>) {
        let (now, unix_s) = (self.now, self.unix_s);
        let Some(promoting) = self.promoting(id) else { return };
        if !matches!(promoting.at, At::Storing { asked: true }) {
            return;
        }
        match outcome {
            Ok(generation) => {
                *promoting = Promoting { at: At::Comparing { with: None }, due: now, attempts: 0 };
                let Some(job) = self.jobs.get_mut(id) else { return };
                let name = names::served(&job.record.request);
                job.record.candidate = Some(Candidate { name: name.clone(), generation, outcome: None });
                job.happened(unix_s, JobEventKind::Comparing { name, generation });
            }
            Err(failure) => self.not_stored(id, &failure, "stored"),
        }
    }

    /// Tries again what did not work, or fails the job.
    fn not_stored(&mut self, id: JobId, failure: &AdminFailure, what: &str) {
        use AdminFailureKind as Kind;
        let now = self.now;
        let Some(promoting) = self.promoting(id) else { return };
        let passes = matches!(failure.kind, Kind::Unavailable | Kind::Full | Kind::Conflict | Kind::NotFound);
        if !passes || promoting.attempts + 1 >= ATTEMPTS_MAX {
            let why = job::short(failure.message.clone());
            let text = format!("the adapter is trained, but cannot be {what}: {why}");
            return self.fail(id, error("model_not_served", text));
        }
        let at = match (&promoting.at, failure.kind) {
            // Another generation is served meanwhile than it was compared with.
            (At::Serving { .. }, Kind::Conflict) => At::Comparing { with: None },
            (At::Serving { .. }, Kind::Unavailable | Kind::Full) => At::Serving { asked: false },
            // Its name, or its generation, was taken away.
            _ => At::Storing { asked: false },
        };
        let anew = !matches!(at, At::Serving { .. });
        promoting.again(at, now);
        let Some(job) = self.jobs.get_mut(id) else { return };
        if let Some(candidate) = job.record.candidate.as_mut().filter(|_| anew) {
            candidate.outcome = None;
            job.saving.dirty = true;
        }
    }

    fn ask_to_compare(&mut self, id: JobId) {
        let busy: Vec<GatewayId> = self
            .active
            .iter()
            .filter_map(|other| match &self.jobs.get(*other)?.phase {
                Phase::Promoting(promoting) => promoting.with(),
                _ => None,
            })
            .collect();
        let load = |gateway: &GatewayId| busy.iter().filter(|other| *other == gateway).count();
        let Some(gateway) = self.gateways.iter().copied().min_by_key(load) else { return };
        if busy.len() >= COMPARING_MAX {
            return;
        }
        let Some(record) = self.jobs.get(id).map(|job| &job.record) else { return };
        let Some(promote) = &record.request.promote else { return };
        let (Some(evaluation), Some(last)) = (record.evaluation, record.checkpoints.last()) else {
            let why = "the samples to compare on are not there".to_owned();
            return self.decide(id, PromotionVerdict::NotCompared(why), None);
        };
        let compare = CompareAdapters {
            job: id,
            model_digest: record.request.model_digest,
            metric: promote.metric,
            evaluation,
            candidate: last.adapter,
            served: None,
        };
        let name = names::served(&record.request);
        let with = Some((gateway, self.now));
        if let Some(promoting) = self.promoting(id) {
            promoting.at = At::Comparing { with };
        }
        self.effects.push(Effect::Compare { gateway, name, compare: Box::new(compare) });
    }

    /// A gateway has compared a candidate, or could not.
    pub(super) fn compared(&mut self, from: GatewayId, id: JobId, outcome: Result<Comparison, String>) {
        let Some(promoting) = self.promoting(id) else { return };
        // Figures that come late, from a gateway that was given up, are as good: what they are compared with is checked again.
        if !matches!(promoting.at, At::Comparing { .. }) {
            return;
        }
        match outcome {
            Ok(comparison) => {
                let comparison = printable(comparison);
                let Some(record) = self.jobs.get(id).map(|job| &job.record) else { return };
                let (Some(promote), Some(candidate)) = (&record.request.promote, &record.candidate) else {
                    return;
                };
                let verdict = verdict(promote, candidate.generation, &comparison);
                self.decide(id, verdict, Some(comparison));
            }
            Err(why) if promoting.with() == Some(from) => self.not_compared(id, why),
            Err(_) => {}
        }
    }

    fn not_compared(&mut self, id: JobId, why: String) {
        let now = self.now;
        let Some(promoting) = self.promoting(id) else { return };
        if promoting.attempts + 1 >= COMPARISONS_MAX {
            return self.decide(id, PromotionVerdict::NotCompared(job::short(why)), None);
        }
        promoting.again(At::Comparing { with: None }, now);
    }

    /// Gives up a gateway that takes too long.
    pub(super) fn compare_anew_if_late(&mut self, id: JobId) {
        let now = self.now;
        let late = self.promoting(id).is_some_and(|promoting| match promoting.at {
            At::Comparing { with: Some((_, since)) } => now.since(since) > COMPARISON_MS_MAX,
            _ => false,
        });
        if late {
            self.not_compared(id, "no gateway could finish comparing them in time".to_owned());
        }
    }

    /// Records a verdict, and acts on it.
    fn decide(&mut self, id: JobId, verdict: PromotionVerdict, comparison: Option<Comparison>) {
        let (now, unix_s) = (self.now, self.unix_s);
        let Some(job) = self.jobs.get_mut(id) else { return };
        let outcome = PromotionOutcome { verdict: verdict.clone(), comparison };
        if let Some(candidate) = &mut job.record.candidate {
            candidate.outcome = Some(outcome.clone());
        }
        job.happened(unix_s, JobEventKind::Compared(outcome));
        match verdict {
            PromotionVerdict::Better => {
                if let Some(promoting) = self.promoting(id) {
                    (promoting.at, promoting.due) = (At::Serving { asked: false }, now);
                }
            }
            PromotionVerdict::ServedAlready => self.is_served(id),
            PromotionVerdict::NotBetter | PromotionVerdict::OutOfBound | PromotionVerdict::NotCompared(_) => {
                job.record.adapter = job.record.checkpoints.last().map(|last| last.adapter);
                self.effects.push(Effect::Note(format!("job {id} has ended: its adapter is not served")));
                self.end(id, JobStatus::Succeeded, JobEventKind::Succeeded);
            }
        }
    }

    fn ask_to_serve(&mut self, id: JobId) {
        let Some(candidate) = self.jobs.get(id).and_then(|job| job.record.candidate.clone()) else { return };
        let against = candidate.outcome.and_then(|outcome| outcome.comparison?.against);
        if let Some(promoting) = self.promoting(id) {
            promoting.at = At::Serving { asked: true };
        }
        self.effects.push(Effect::Promote {
            job: id,
            name: candidate.name,
            generation: candidate.generation,
            // 0 is what a name has under which nothing is served.
            expected_generation: against.unwrap_or(0),
        });
    }

    /// A candidate is served, or is not.
    pub(super) fn promoted(&mut self, id: JobId, outcome: Result<(), AdminFailure>) {
        if self.promoting(id).is_none_or(|promoting| !promoting.is_being_served()) {
            return;
        }
        match outcome {
            Ok(()) => self.is_served(id),
            Err(failure) => self.not_stored(id, &failure, "served"),
        }
    }

    fn is_served(&mut self, id: JobId) {
        let unix_s = self.unix_s;
        let Some(job) = self.jobs.get_mut(id) else { return };
        let name = names::served(&job.record.request);
        job.record.fine_tuned_model = Some(name.clone());
        job.record.adapter = job.record.checkpoints.last().map(|last| last.adapter);
        self.effects.push(Effect::Note(format!("job {id} has ended: {name} is served")));
        job.happened(unix_s, JobEventKind::ModelCreated(name));
        self.end(id, JobStatus::Succeeded, JobEventKind::Succeeded);
    }
}

/// Figures as JSON can hold them.
fn printable(comparison: Comparison) -> Comparison {
    let Comparison { candidate, served, .. } = comparison;
    Comparison { candidate: job::finite(candidate), served: job::finite(served), ..comparison }
}

/// Whether a candidate, which is this generation of its name, is to be served.
fn verdict(promote: &Promotion, generation: u64, comparison: &Comparison) -> PromotionVerdict {
    let Comparison { candidate, served, against, count } = *comparison;
    let outside = promote.bound.is_some_and(|bound| promote.metric.is_better(bound, candidate));
    match () {
        () if against == Some(generation) => PromotionVerdict::ServedAlready,
        () if count == 0 => PromotionVerdict::NotCompared("there is nothing to compare on".to_owned()),
        () if !promote.metric.is_better(candidate, served) => PromotionVerdict::NotBetter,
        () if outside => PromotionVerdict::OutOfBound,
        () => PromotionVerdict::Better,
    }
}
