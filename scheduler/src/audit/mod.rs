//! Audits: sampled sequences are computed again on another replica, and the bits of both compared, boundary by boundary.
//!
//! The numeric contract says that they are the same. If they are not, further repetitions tell who is wrong: a replica that
//! computes something else each time, or the one against which two others agree. Where two replicas each stand by what they
//! computed and there is no third, nobody can tell, and that is said.
//!
//! Layout: [`events`] (what goes in and out), `trail` (the digests of one computation, and how two compare).
//!
//! **Invariants:** pure. Whatever becomes of an audit, no client's request depends on it: what cannot be repeated is dropped. At most
//! [`AUDITS_MAX`] are in progress; one repetition of each at a time.

pub mod events;
mod trail;

pub use events::{AuditId, Effect, Event, Finding, Transcript};

use ashlar_protocol::serving::{AuditCounters, ChoiceId, Submit};
use ashlar_protocol::step::{Boundary, RowDigests};
use ashlar_vocabulary::{ReplicaId, ReplicaRevision, RequestId, SamplingParams, SequenceId};
use std::collections::{BTreeMap, BTreeSet};
use trail::{Comparison, Trail};

/// Audits in progress; what is sampled beyond that is not audited.
pub const AUDITS_MAX: usize = 32;
/// How often one replica computes the same sequence, its first time included.
const TIMES_MAX: usize = 2;

/// The audits of one term.
#[derive(Debug, Clone, Default)]
pub struct Audits {
    in_progress: BTreeMap<AuditId, Audit>,
    /// Which computation a sequence is, and of which audit.
    sequences: BTreeMap<SequenceId, AuditId>,
    last: u64,
    up: BTreeSet<ReplicaId>,
    counters: AuditCounters,
}

#[derive(Debug, Clone)]
struct Audit {
    /// What to submit for a repetition, once the client's sequence has ended.
    again: Option<(Box<Submit>, u32)>,
    /// The computation in progress, if any.
    present: Option<Computation>,
    done: Vec<Computation>,
}

/// One computation of a sequence.
#[derive(Debug, Clone, Default)]
struct Computation {
    /// Where it takes place, once a rank has said so.
    place: Option<(ReplicaId, ReplicaRevision)>,
    trail: Trail,
}

/// What to do next about an audit.
enum Verdict {
    Passed,
    Inconclusive,
    Repeat(ReplicaId),
    Found(Finding),
}

impl Audits {
    /// Applies one event.
    pub fn handle(&mut self, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Begun { sequence, repeats } => self.begun(sequence, repeats),
            Event::Digests { replica, revision, digests } => {
                for rows in digests {
                    self.observe((replica, revision), &rows);
                }
            }
            Event::Ended { sequence, transcript } => {
                let Some(audit) = self.sequences.remove(&sequence) else { return };
                match transcript {
                    Some(transcript) => self.complete(audit, transcript, effects),
                    None => self.drop_audit(audit),
                }
            }
            Event::Refused { audit } => self.drop_audit(audit),
            Event::ReplicaUp { replica } => {
                self.up.insert(replica);
            }
            Event::ReplicaDown { replica } => {
                self.up.remove(&replica);
                let there =
                    |computation: &Computation| computation.place.is_some_and(|(at, _)| at == replica);
                let lost = self
                    .in_progress
                    .iter()
                    .filter(|(_, audit)| audit.done.iter().chain(&audit.present).any(there))
                    .map(|(id, _)| *id);
                for audit in lost.collect::<Vec<_>>() {
                    self.drop_audit(audit);
                }
            }
        }
    }

    /// How audits went.
    pub fn counters(&self) -> AuditCounters {
        self.counters
    }

    fn begun(&mut self, sequence: SequenceId, repeats: Option<AuditId>) {
        let id = match repeats {
            Some(audit) => audit,
            None if self.in_progress.len() >= AUDITS_MAX => return,
            None => {
                self.last += 1;
                let audit = Audit { again: None, present: None, done: Vec::new() };
                self.in_progress.insert(AuditId(self.last), audit);
                AuditId(self.last)
            }
        };
        let Some(audit) = self.in_progress.get_mut(&id) else { return };
        audit.present = Some(Computation::default());
        self.sequences.insert(sequence, id);
    }

    fn observe(&mut self, place: (ReplicaId, ReplicaRevision), rows: &RowDigests) {
        let Some(audit) = self.sequences.get(&rows.id).and_then(|id| self.in_progress.get_mut(id)) else {
            return;
        };
        let Some(computation) = &mut audit.present else { return };
        let known = computation.place.get_or_insert(place);
        // Its replica has another layout now: the loss of the former one ends this audit.
        if *known == place {
            computation.trail.take(rows);
        }
    }

    /// A computation is complete: compares it with those before.
    fn complete(&mut self, id: AuditId, transcript: Transcript, effects: &mut Vec<Effect>) {
        let Some(audit) = self.in_progress.get_mut(&id) else { return };
        let Some(computation) = audit.present.take() else { return };
        if computation.place.is_none_or(|(replica, _)| replica != transcript.replica) {
            return self.drop_audit(id);
        }
        audit.done.push(computation);
        let (mut submit, logits_from) = audit.again.get_or_insert_with(|| again(id, transcript)).clone();
        // A choice of its own each time: one that has ended is not begun anew.
        submit.id.choice -= audit.done.len() as u32;
        match audit.verdict(&self.up) {
            Verdict::Repeat(replica) => {
                effects.push(Effect::Repeat { audit: id, replica, submit, logits_from });
            }
            Verdict::Passed => {
                self.counters.passed += 1;
                self.in_progress.remove(&id);
            }
            Verdict::Found(finding) => {
                self.counters.differed += 1;
                self.counters.undecided += u64::from(finding.wrong.is_none());
                self.in_progress.remove(&id);
                effects.push(Effect::Found(finding));
            }
            Verdict::Inconclusive => self.drop_audit(id),
        }
    }

    /// Gives an audit up.
    fn drop_audit(&mut self, id: AuditId) {
        if self.in_progress.remove(&id).is_some() {
            self.counters.dropped += 1;
        }
        self.sequences.retain(|_, audit| *audit != id);
    }
}

impl Audit {
    fn verdict(&self, up: &BTreeSet<ReplicaId>) -> Verdict {
        if self.done.len() < 2 {
            return self.next_replica(up).map_or(Verdict::Inconclusive, Verdict::Repeat);
        }
        let place = |computation: &Computation| computation.place;
        let mut differences = Vec::new();
        for (index, one) in self.done.iter().enumerate() {
            for other in &self.done[index + 1..] {
                match one.trail.compare(&other.trail) {
                    Comparison::Apart => return Verdict::Inconclusive,
                    Comparison::Same => {}
                    Comparison::Differ { boundary, same_until_layer, position } => {
                        differences.push((place(one), place(other), boundary, same_until_layer, position));
                    }
                }
            }
        }
        if differences.is_empty() {
            return Verdict::Passed;
        }
        let finding = |wrong, boundary: Boundary, same_until_layer, position| {
            let replicas: BTreeSet<ReplicaId> =
                self.done.iter().filter_map(|done| done.place).map(|(replica, _)| replica).collect();
            let compared = replicas.into_iter().collect();
            Verdict::Found(Finding { boundary, same_until_layer, position, wrong, compared })
        };
        // Whoever does not agree with itself is wrong at least once.
        if let Some((wrong, _, boundary, until, position)) =
            differences.iter().find(|(one, other, ..)| one == other)
        {
            return finding(*wrong, *boundary, *until, *position);
        }
        // Otherwise whoever two others, who agree, disagree with.
        let agree = |one: &Computation, other: &Computation| {
            place(one) != place(other) && one.trail.compare(&other.trail) == Comparison::Same
        };
        for suspect in &self.done {
            let others: Vec<&Computation> =
                self.done.iter().filter(|other| place(other) != place(suspect)).collect();
            let outvoted = others.iter().enumerate().any(|(index, one)| {
                let differs = one.trail.compare(&suspect.trail) != Comparison::Same;
                differs && others[index + 1..].iter().any(|other| agree(one, other))
            });
            let difference = differences
                .iter()
                .find(|(one, other, ..)| *one == place(suspect) || *other == place(suspect));
            if let (true, Some((_, _, boundary, until, position))) = (outvoted, difference) {
                return finding(place(suspect), *boundary, *until, *position);
            }
        }
        match (self.next_replica(up), differences.first()) {
            (Some(replica), _) => Verdict::Repeat(replica),
            (None, Some((_, _, boundary, until, position))) => finding(None, *boundary, *until, *position),
            (None, None) => Verdict::Inconclusive,
        }
    }

    /// Who computes it next: replicas that have not yet, then those that have once.
    fn next_replica(&self, up: &BTreeSet<ReplicaId>) -> Option<ReplicaId> {
        let times = |replica: &ReplicaId| {
            self.done.iter().filter(|done| done.place.is_some_and(|(at, _)| at == *replica)).count()
        };
        up.iter().copied().filter(|replica| times(replica) < TIMES_MAX).min_by_key(|replica| times(replica))
    }
}

/// What to submit to have all of it computed again: everything that was known but for the last token, whose row nobody has
/// computed; and from where on the head was used.
fn again(id: AuditId, transcript: Transcript) -> (Box<Submit>, u32) {
    let Transcript { submit, generated, .. } = transcript;
    let mut prompt = submit.prompt.clone();
    let logits_from = prompt.len().saturating_sub(1) as u32;
    let known = generated.len().saturating_sub(1);
    prompt.extend(generated.iter().take(known));
    let submit = Submit {
        // Gateways choose theirs at random.
        id: ChoiceId { request: RequestId(u128::from(id.0)), choice: u32::MAX },
        prompt,
        forced: Vec::new(),
        forced_logprobs: Vec::new(),
        kept: false,
        max_new_tokens: 1,
        stop_tokens: Vec::new(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        // After everything that somebody waits for.
        priority: i32::MAX,
        deadline_ms: 0,
        traceparent: None,
        ..*submit
    };
    (Box::new(submit), logits_from)
}
