//! Audits: what is computed again where, and whom that accuses.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_protocol::serving::{AuditCounters, ChoiceId, Submit};
use ashlar_protocol::step::{Boundary, RowDigests};
use ashlar_scheduler::audit::{AUDITS_MAX, AuditId, Audits, Effect, Event, Finding, Transcript};
use ashlar_vocabulary::{ModelDigest, ReplicaId, ReplicaRevision, RequestId, SamplingParams, SequenceId};
use std::collections::{BTreeMap, BTreeSet};

/// Where and how a replica is wrong when it computes for the n-th time: a number that goes into every digest there and above.
type Fault = fn(u64) -> Option<(Boundary, u64)>;

/// Replicas of two stages of two layers, which compute what they are told to.
struct World {
    audits: Audits,
    sequences: u64,
    effects: Vec<Effect>,
    /// Of all repetitions.
    choices: BTreeSet<ChoiceId>,
    /// By replica.
    wrong: BTreeMap<u32, Fault>,
    times: BTreeMap<u32, u64>,
}

const TWO: Boundary = Boundary::Layers(2);
const FOUR: Boundary = Boundary::Layers(4);

impl World {
    fn with(replicas: u32) -> World {
        let mut world = World {
            audits: Audits::default(),
            sequences: 0,
            effects: Vec::new(),
            choices: BTreeSet::new(),
            wrong: BTreeMap::new(),
            times: BTreeMap::new(),
        };
        for replica in 0..replicas {
            world.send(Event::ReplicaUp { replica: ReplicaId(replica) });
        }
        world
    }

    fn send(&mut self, event: Event) {
        self.audits.handle(event, &mut self.effects);
    }

    fn begin(&mut self, repeats: Option<AuditId>) -> SequenceId {
        self.sequences += 1;
        let sequence = SequenceId(self.sequences);
        self.send(Event::Begun { sequence, repeats });
        sequence
    }

    /// What a replica's ranks say of a sequence of six tokens.
    fn compute(&mut self, sequence: SequenceId, replica: u32) {
        let times = self.times.entry(replica).or_default();
        *times += 1;
        let wrong = self.wrong.get(&replica).and_then(|wrong| wrong(*times));
        for (boundary, start) in [(TWO, 0), (FOUR, 0), (Boundary::Logits, 3)] {
            let spoilt = wrong.filter(|(from, _)| boundary >= *from).map_or(0, |(_, by)| by);
            let digests = (start..5).map(|position| u64::from(position) * 100 + spoilt).collect();
            let digests = vec![RowDigests { id: sequence, boundary, start, digests }];
            let (replica, revision) = (ReplicaId(replica), ReplicaRevision(1));
            self.send(Event::Digests { replica, revision, digests });
        }
    }

    fn end(&mut self, sequence: SequenceId, replica: u32) {
        let submit = Submit {
            adapter: None,
            id: ChoiceId { request: RequestId(7), choice: 0 },
            model_digest: ModelDigest([7; 32]),
            prompt: vec![1, 2, 3, 4],
            forced: Vec::new(),
            forced_logprobs: Vec::new(),
            kept: false,
            max_new_tokens: 2,
            stop_tokens: Vec::new(),
            sampling: SamplingParams::default(),
            tenant_salt: 0,
            charge: None,
            priority: 0,
            deadline_ms: 0,
            traceparent: None,
        };
        let transcript =
            Transcript { replica: ReplicaId(replica), submit: Box::new(submit), generated: vec![5, 6] };
        self.send(Event::Ended { sequence, transcript: Some(transcript) });
    }

    /// A client's sequence on a replica, and all repetitions that are wanted; where those took place, and what was found.
    fn audit(&mut self, replica: u32) -> (Vec<u32>, Option<Finding>) {
        let sequence = self.begin(None);
        self.compute(sequence, replica);
        self.end(sequence, replica);
        let mut places = Vec::new();
        loop {
            match self.effects.pop() {
                None => return (places, None),
                Some(Effect::Found(finding)) => return (places, Some(finding)),
                Some(Effect::Repeat { audit, replica, submit, logits_from }) => {
                    assert_eq!((submit.prompt.as_slice(), logits_from), (&[1, 2, 3, 4, 5][..], 3));
                    places.push(replica.0);
                    assert!(self.choices.insert(submit.id), "{:?} was begun before", submit.id);
                    let sequence = self.begin(Some(audit));
                    self.compute(sequence, replica.0);
                    self.end(sequence, replica.0);
                }
            }
        }
    }

    fn counters(&self) -> AuditCounters {
        self.audits.counters()
    }
}

fn wrong(finding: &Option<Finding>) -> Option<u32> {
    finding.as_ref().unwrap().wrong.map(|(replica, _)| replica.0)
}

#[test]
fn equal_bits_pass_after_one_repetition_elsewhere() {
    let mut world = World::with(2);
    assert_eq!(world.audit(1), (vec![0], None));
    assert_eq!(world.counters(), AuditCounters { passed: 1, ..AuditCounters::default() });
}

#[test]
fn a_single_replica_is_compared_with_itself() {
    let mut world = World::with(1);
    assert_eq!(world.audit(0), (vec![0], None));
    // Its third computation is other than its fourth.
    world.wrong.insert(0, |times| (times == 3).then_some((TWO, 9)));
    let (_, finding) = world.audit(0);
    assert_eq!(wrong(&finding), Some(0));
}

#[test]
fn who_does_not_agree_with_itself_is_wrong() {
    let mut world = World::with(2);
    world.wrong.insert(0, |times| (times == 1).then_some((FOUR, 9)));
    let (places, finding) = world.audit(0);
    assert_eq!(places, [1, 0]);
    let finding = finding.unwrap();
    assert_eq!((finding.boundary, finding.same_until_layer, finding.position), (FOUR, 2, 0));
    assert_eq!(finding.wrong, Some((ReplicaId(0), ReplicaRevision(1))));
    assert_eq!(finding.compared, [ReplicaId(0), ReplicaId(1)]);
}

#[test]
fn whom_two_others_contradict_is_wrong_wherever_the_client_was() {
    for replica in 0..3 {
        let mut world = World::with(3);
        world.wrong.insert(2, |_| Some((Boundary::Logits, 9)));
        let (places, finding) = world.audit(replica);
        // Two that are right agree: without the third nothing is seen.
        if finding.is_none() {
            assert_eq!(places.len(), 1);
            assert!(replica != 2 && places[0] != 2);
            continue;
        }
        assert_eq!((wrong(&finding), places.len()), (Some(2), 2));
        let finding = finding.unwrap();
        assert_eq!((finding.boundary, finding.same_until_layer, finding.position), (Boundary::Logits, 4, 3));
    }
}

#[test]
fn two_replicas_that_stand_by_what_they_computed_accuse_nobody() {
    let mut world = World::with(2);
    world.wrong.insert(1, |_| Some((TWO, 9)));
    let (places, finding) = world.audit(1);
    assert_eq!(places, [0, 0, 1]);
    assert_eq!(wrong(&finding), None);
    let said = finding.unwrap().to_string();
    assert!(said.contains("replicas 0 and 1") && said.contains("layer 2"), "{said}");
    let expected = AuditCounters { differed: 1, undecided: 1, ..AuditCounters::default() };
    assert_eq!(world.counters(), expected);
}

#[test]
fn what_is_lost_or_refused_or_moves_is_dropped_and_accuses_nobody() {
    let mut world = World::with(2);
    // Cancelled.
    let sequence = world.begin(None);
    world.compute(sequence, 0);
    world.send(Event::Ended { sequence, transcript: None });
    // Its replica goes, and it goes on elsewhere.
    let sequence = world.begin(None);
    world.compute(sequence, 0);
    world.send(Event::ReplicaDown { replica: ReplicaId(0) });
    world.compute(sequence, 1);
    world.end(sequence, 1);
    assert_eq!(world.effects, []);
    // The repetition is refused.
    let sequence = world.begin(None);
    world.compute(sequence, 1);
    world.end(sequence, 1);
    let Some(Effect::Repeat { audit, .. }) = world.effects.pop() else { panic!("no repetition") };
    world.send(Event::Refused { audit });
    assert_eq!(world.counters(), AuditCounters { dropped: 3, ..AuditCounters::default() });
    // Nothing of it is left that could stand in the way of others.
    for _ in 0..2 * AUDITS_MAX {
        assert_eq!(world.audit(1).1, None);
    }
    assert_eq!(world.counters().passed, 2 * AUDITS_MAX as u64);
}

#[test]
fn only_so_many_are_in_progress_at_once() {
    let mut world = World::with(2);
    let begun: Vec<SequenceId> = (0..AUDITS_MAX + 5).map(|_| world.begin(None)).collect();
    for sequence in begun {
        world.compute(sequence, 0);
        world.end(sequence, 0);
    }
    assert_eq!(world.effects.len(), AUDITS_MAX);
}
