//! Adapters, event by event.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_protocol::admin::{AdapterView, AdminFailureKind, AdminReply, LoadAdapter};
use ashlar_protocol::membership::AdapterRefusal;
use ashlar_scheduler::adapters::{
    AdapterRecord, Adapters, AdaptersConfig, Caller, Effect, Event, GENERATIONS_KEPT, LOAD_MS_MAX, Usage,
    Users,
};
use ashlar_scheduler::cluster::NodeConnection;
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{AdapterId, BlobId, Bytes, ReplicaId, ReplicaRevision};
use std::collections::BTreeMap;

/// What sequences and jobs do, as the test says.
#[derive(Default)]
struct Others {
    sequences: BTreeMap<(ReplicaId, AdapterId), Usage>,
    /// What jobs leave on each replica where they have reserved something.
    beside_jobs: BTreeMap<ReplicaId, Bytes>,
}

impl Users for Others {
    fn usage(&self, replica: ReplicaId, adapter: AdapterId) -> Usage {
        self.sequences.get(&(replica, adapter)).copied().unwrap_or_default()
    }

    fn beside_jobs(&self, replica: ReplicaId) -> Option<Bytes> {
        self.beside_jobs.get(&replica).copied()
    }
}

struct Test {
    adapters: Adapters,
    others: Others,
    now: u64,
    calls: u64,
    /// The latest load of each adapter in each layout.
    loads: BTreeMap<(ReplicaRevision, AdapterId), u64>,
}

fn id(number: u8) -> AdapterId {
    AdapterId(BlobId([number; 32]))
}

fn load(name: &str, adapter: u8) -> LoadAdapter {
    LoadAdapter {
        name: name.into(),
        adapter: id(adapter),
        root: format!("adapters/{name}"),
        created_at: 7,
        replace: false,
        expected_generation: None,
        hold_back: false,
        owner: None,
    }
}

fn ranks(replica: u32) -> Vec<NodeConnection> {
    [1, 2].map(|rank| NodeConnection(u64::from(replica) * 10 + rank)).to_vec()
}

fn revision(replica: u32) -> ReplicaRevision {
    ReplicaRevision(100 + u64::from(replica))
}

impl Test {
    fn new(max_adapters: usize) -> Test {
        let config = AdaptersConfig { max_adapters, memory: Bytes(1000) };
        Test {
            adapters: Adapters::new(config),
            others: Others::default(),
            now: 0,
            calls: 0,
            loads: BTreeMap::new(),
        }
    }

    /// With one replica of two ranks.
    fn up(max_adapters: usize) -> Test {
        let mut test = Test::new(max_adapters);
        test.replica_up(0);
        test
    }

    fn send(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.adapters.handle(Millis(self.now), event, &self.others, &mut effects);
        for effect in &effects {
            if let Effect::Load { revision, adapter, load, .. } = effect {
                self.loads.insert((*revision, *adapter), *load);
            }
        }
        effects
    }

    fn replica_up(&mut self, replica: u32) -> Vec<Effect> {
        let (revision, ranks) = (revision(replica), ranks(replica));
        self.send(Event::ReplicaUp { replica: ReplicaId(replica), revision, ranks })
    }

    fn call(&mut self, load: LoadAdapter) -> Vec<Effect> {
        self.calls += 1;
        let caller = Caller::Gateway { gateway: GatewayId(1), call: self.calls };
        self.send(Event::Load(caller, load))
    }

    /// A rank's answer to the latest load; what it cannot load it never will.
    fn answer(&mut self, replica: u32, rank: usize, adapter: u8, outcome: Result<u64, &str>) -> Vec<Effect> {
        self.refuse(replica, rank, adapter, outcome.map_err(|why| (why, false)))
    }

    /// As [`answer`](Self::answer), with whether another attempt may succeed.
    fn refuse(
        &mut self,
        replica: u32,
        rank: usize,
        adapter: u8,
        outcome: Result<u64, (&str, bool)>,
    ) -> Vec<Effect> {
        let refusal = |(message, retry): (&str, bool)| AdapterRefusal { message: message.to_owned(), retry };
        let (revision, adapter) = (revision(replica), id(adapter));
        self.send(Event::Answer {
            connection: ranks(replica)[rank],
            revision,
            adapter,
            load: self.loads.get(&(revision, adapter)).copied().unwrap_or(0),
            outcome: outcome.map(Bytes).map_err(refusal),
        })
    }

    /// A job asks for it.
    fn job_wants(&mut self, wish: u64, load: LoadAdapter) -> Vec<Effect> {
        self.send(Event::Load(Caller::Job(wish), load))
    }

    /// A job takes it back.
    fn job_withdraws(&mut self, wish: u64, name: &str) -> Vec<Effect> {
        self.send(Event::Unload { caller: Caller::Job(wish), name: name.into(), expected_generation: None })
    }

    /// Both ranks of a replica have it.
    fn loaded(&mut self, replica: u32, adapter: u8, bytes: u64) -> Vec<Effect> {
        let mut effects = self.answer(replica, 0, adapter, Ok(bytes));
        effects.extend(self.answer(replica, 1, adapter, Ok(bytes)));
        effects
    }

    fn persisted(&mut self, name: &str) -> Vec<Effect> {
        self.send(Event::Persisted { name: name.into(), outcome: Ok(()) })
    }

    /// From the call to the publication.
    fn publish(&mut self, name: &str, adapter: u8) -> Vec<Effect> {
        self.call(LoadAdapter { replace: true, ..load(name, adapter) });
        self.loaded(0, adapter, 10);
        self.persisted(name)
    }

    fn served(&self) -> Vec<(String, u64, AdapterId)> {
        let views = self.adapters.views().into_iter();
        views.map(|view| (view.name, view.generation, view.adapter)).collect()
    }

    fn tick(&mut self, ms: u64) -> Vec<Effect> {
        self.now += ms;
        self.send(Event::Tick)
    }

    fn uses(&mut self, adapter: u8, usage: Usage) {
        self.others.sequences.insert((ReplicaId(0), id(adapter)), usage);
    }

    /// Jobs have reserved all but so many bytes of a replica's fullest rank.
    fn jobs_leave(&mut self, replica: u32, bytes: u64) {
        self.others.beside_jobs.insert(ReplicaId(replica), Bytes(bytes));
    }

    fn jobs_end(&mut self) {
        self.others.beside_jobs.clear();
    }
}

fn loads(effects: &[Effect]) -> Vec<AdapterId> {
    let load = |effect: &Effect| match effect {
        Effect::Load { adapter, .. } => Some(*adapter),
        _ => None,
    };
    effects.iter().filter_map(load).collect()
}

fn unloads(effects: &[Effect]) -> Vec<AdapterId> {
    let unload = |effect: &Effect| match effect {
        Effect::Unload { adapter, .. } => Some(*adapter),
        _ => None,
    };
    effects.iter().filter_map(unload).collect()
}

fn refusal(effects: &[Effect]) -> (AdminFailureKind, String) {
    let refused = |effect: &Effect| match effect {
        Effect::Reply(_, AdminReply::Refused(failure)) => Some((failure.kind, failure.message.clone())),
        _ => None,
    };
    effects.iter().find_map(refused).unwrap_or_else(|| panic!("a refusal, not {effects:?}"))
}

#[test]
fn a_name_is_shown_once_every_rank_has_loaded_and_the_store_has_it() {
    let mut test = Test::up(4);
    test.replica_up(1);
    assert_eq!(loads(&test.call(load("poet", 1))), [id(1), id(1)]);
    test.loaded(0, 1, 10);
    test.answer(1, 0, 1, Ok(10));
    assert_eq!(test.served(), []);
    let effects = test.answer(1, 1, 1, Ok(10));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Persist { record: Some(_), .. })));
    assert_eq!(test.served(), []);
    let effects = test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
    // The caller hears of it last: what it asks next finds the name.
    assert!(matches!(
        &effects[..],
        [Effect::Known(_), Effect::Published, Effect::Reply(_, AdminReply::Adapter(view))] if view.generation == 1
    ));
}

#[test]
fn one_rank_that_cannot_load_it_ends_the_attempt_everywhere() {
    let mut test = Test::up(4);
    test.replica_up(1);
    test.call(load("poet", 1));
    test.loaded(0, 1, 10);
    test.answer(1, 0, 1, Ok(10));
    let effects = test.answer(1, 1, 1, Err("of another model"));
    let (kind, message) = refusal(&effects);
    assert_eq!(kind, AdminFailureKind::Invalid);
    assert!(message.contains("of another model"), "{message}");
    assert_eq!(unloads(&effects), [id(1)], "on its own replica");
    assert_eq!(unloads(&test.tick(50)), [id(1)], "and on the other");
    assert_eq!(test.served(), []);
    assert_eq!(loads(&test.call(load("poet", 2))), [id(2), id(2)], "the name is free");
}

#[test]
fn a_store_that_refuses_leaves_what_was_served() {
    let mut test = Test::up(4);
    test.publish("poet", 1);
    test.call(LoadAdapter { replace: true, ..load("poet", 2) });
    test.loaded(0, 2, 10);
    let outcome = Err("no space".to_owned());
    let effects = test.send(Event::Persisted { name: "poet".into(), outcome });
    assert_eq!(refusal(&effects).0, AdminFailureKind::Unavailable);
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
    assert_eq!(unloads(&test.tick(50)), [id(2)]);
}

#[test]
fn changes_are_refused_that_make_no_sense() {
    let mut test = Test::new(4);
    assert_eq!(refusal(&test.call(load("poet", 1))).0, AdminFailureKind::Unavailable);
    test.replica_up(0);
    test.publish("poet", 1);
    for name in ["", "two words", "naïve", &"x".repeat(300)] {
        assert_eq!(refusal(&test.call(load(name, 1))).0, AdminFailureKind::Invalid, "{name}");
    }
    assert_eq!(refusal(&test.call(load("poet", 2))).0, AdminFailureKind::Invalid, "it is loaded");
    let stale = LoadAdapter { replace: true, expected_generation: Some(3), ..load("poet", 2) };
    assert_eq!(refusal(&test.call(stale)).0, AdminFailureKind::Conflict);
    test.call(LoadAdapter { replace: true, expected_generation: Some(1), ..load("poet", 2) });
    let again = LoadAdapter { replace: true, ..load("poet", 3) };
    assert_eq!(refusal(&test.call(again)).0, AdminFailureKind::Conflict, "one change at a time");
    let caller = Caller::Gateway { gateway: GatewayId(1), call: 99 };
    let effects = test.send(Event::Unload { caller, name: "nobody".into(), expected_generation: None });
    assert_eq!(refusal(&effects).0, AdminFailureKind::NotFound);
}

#[test]
fn an_earlier_generation_can_be_served_again() {
    let mut test = Test::up(4);
    for adapter in 1..=3 {
        test.publish("poet", adapter);
    }
    assert_eq!(test.served(), [("poet".into(), 3, id(3))]);
    let back = |to_generation| Event::RollBack {
        caller: Caller::Gateway { gateway: GatewayId(1), call: 50 },
        name: "poet".into(),
        to_generation,
        expected_generation: Some(3),
    };
    assert_eq!(refusal(&test.send(back(9))).0, AdminFailureKind::NotFound);
    test.tick(50);
    assert_eq!(loads(&test.send(back(1))), [id(1)]);
    test.loaded(0, 1, 10);
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 4, id(1))]);
}

#[test]
fn only_the_latest_generations_are_kept() {
    let mut test = Test::up(4);
    for adapter in 1..=20 {
        let effects = test.publish("poet", adapter);
        let known = effects.iter().find_map(|effect| match effect {
            Effect::Known(known) => Some(known.len()),
            _ => None,
        });
        assert_eq!(known, Some(GENERATIONS_KEPT.min(adapter.into())));
        test.tick(50);
    }
}

#[test]
fn a_replaced_adapter_stays_in_memory_for_as_long_as_sequences_have_it() {
    let mut test = Test::up(4);
    test.publish("poet", 1);
    test.uses(1, Usage { bound: true, wanted: true, last: Millis(0) });
    test.publish("poet", 2);
    assert_eq!(unloads(&test.tick(50)), []);
    test.uses(1, Usage::default());
    let effects = test.tick(50);
    assert!(
        matches!(effects[..], [Effect::Gone { .. }, Effect::Unload { .. }]),
        "the engine hears of it first"
    );
    assert_eq!(unloads(&effects), [id(1)]);
}

#[test]
fn beyond_the_limit_the_one_used_longest_ago_makes_room_and_comes_back_when_it_is_wanted() {
    let mut test = Test::up(2);
    for (name, adapter, last) in [("a", 1, 30), ("b", 2, 20)] {
        test.publish(name, adapter);
        test.uses(adapter, Usage { last: Millis(last), ..Usage::default() });
    }
    let effects = test.call(load("c", 3));
    assert_eq!((unloads(&effects), loads(&effects)), (vec![id(2)], vec![id(3)]));
    test.loaded(0, 3, 10);
    test.persisted("c");
    assert_eq!(test.served().len(), 3, "b is registered still");
    // Everything in memory is in use: who wants b waits.
    test.uses(1, Usage { bound: true, wanted: true, last: Millis(30) });
    test.uses(3, Usage { bound: true, wanted: true, last: Millis(40) });
    test.uses(2, Usage { wanted: true, ..Usage::default() });
    assert_eq!(test.send(Event::Wanted { replica: ReplicaId(0), adapter: id(2) }), []);
    assert_eq!(test.tick(50), []);
    test.uses(1, Usage { last: Millis(50), ..Usage::default() });
    let effects = test.tick(50);
    assert_eq!((unloads(&effects), loads(&effects)), (vec![id(1)], vec![id(2)]));
    let effects = test.loaded(0, 2, 10);
    assert!(effects.contains(&Effect::Resident { replica: ReplicaId(0), adapter: id(2) }));
}

#[test]
fn memory_is_bounded_by_what_ranks_say_that_adapters_take() {
    let mut test = Test::up(8);
    test.publish("a", 1);
    test.call(load("b", 2));
    assert_eq!(unloads(&test.loaded(0, 2, 995)), [id(1)], "10 and 995 are more than 1000");
    test.persisted("b");
    test.call(load("c", 3));
    let effects = test.loaded(0, 3, 1001);
    assert!(refusal(&effects).1.contains("adapter_memory_bytes"));
    assert_eq!(unloads(&effects), [id(3)], "what is in memory stays");
}

#[test]
fn what_jobs_have_reserved_is_not_taken_by_adapters() {
    let mut test = Test::up(8);
    test.publish("a", 1);
    test.jobs_leave(0, 100);
    test.call(load("b", 2));
    let effects = test.loaded(0, 2, 101);
    let (kind, message) = refusal(&effects);
    assert_eq!(kind, AdminFailureKind::Unavailable, "later there may be room");
    assert!(message.contains("fine-tuning jobs") && message.contains("100 B"), "{message}");
    assert_eq!(unloads(&effects), [id(2)], "what is in memory stays");
    assert_eq!(test.adapters.held(ReplicaId(0)), Bytes(10));
    // One that fits in the place of another takes it.
    test.call(load("c", 3));
    assert_eq!(unloads(&test.loaded(0, 3, 95)), [id(1)]);
    test.persisted("c");
    // Where its size is known already, it is not even begun: it waits until jobs leave the room, as a request for it does.
    test.uses(3, Usage { bound: true, wanted: true, ..Usage::default() });
    test.uses(1, Usage { wanted: true, ..Usage::default() });
    assert_eq!(test.send(Event::Wanted { replica: ReplicaId(0), adapter: id(1) }), []);
    assert_eq!(test.tick(50), []);
    test.jobs_end();
    assert_eq!(loads(&test.tick(50)), [id(1)]);
    test.loaded(0, 1, 10);
    // What is too large with no job, either, is refused for good.
    test.jobs_leave(0, 100);
    test.call(load("d", 4));
    let effects = test.loaded(0, 4, 1001);
    assert_eq!(refusal(&effects).0, AdminFailureKind::Invalid);
}

#[test]
fn a_replica_that_comes_up_loads_what_is_served_and_one_that_goes_is_not_waited_for() {
    let mut test = Test::new(4);
    let view = AdapterView {
        name: "poet".into(),
        generation: 5,
        adapter: id(1),
        root: "adapters/poet".into(),
        created_at: 7,
        owner: None,
    };
    test.send(Event::Stored(vec![(
        "poet".into(),
        AdapterRecord { generations: vec![view], ..Default::default() },
    )]));
    assert_eq!(test.served(), [("poet".into(), 5, id(1))], "a new term serves what the last one did");
    assert_eq!(loads(&test.replica_up(0)), [id(1)]);
    test.replica_up(1);
    test.loaded(0, 1, 10);
    test.call(LoadAdapter { replace: true, ..load("poet", 2) });
    test.loaded(0, 2, 10);
    let effects = test.send(Event::ReplicaDown { replica: ReplicaId(1) });
    assert!(matches!(effects[..], [Effect::Persist { .. }]));
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 6, id(2))]);
}

#[test]
fn a_load_that_is_never_answered_is_given_up() {
    let mut test = Test::up(4);
    test.call(load("poet", 1));
    assert_eq!(test.tick(LOAD_MS_MAX), []);
    assert_eq!(refusal(&test.tick(1)).0, AdminFailureKind::Unavailable);
    test.call(load("critic", 2));
    let effects = test.send(Event::ReplicaDown { replica: ReplicaId(0) });
    assert_eq!(refusal(&effects).0, AdminFailureKind::Unavailable);
}

#[test]
fn answers_of_a_former_layout_or_twice_say_nothing() {
    let mut test = Test::up(4);
    test.call(load("poet", 1));
    test.answer(0, 0, 1, Ok(10));
    assert_eq!(test.answer(0, 0, 1, Ok(10)), [], "the same rank again");
    let (connection, revision) = (ranks(0)[1], ReplicaRevision(3));
    let (adapter, outcome) = (id(1), Ok(Bytes(10)));
    assert_eq!(test.send(Event::Answer { connection, revision, adapter, load: 1, outcome }), []);
    assert_eq!(test.answer(0, 1, 9, Ok(10)), [], "nobody asked for it");
    assert_eq!(test.answer(0, 1, 1, Ok(10)).len(), 2, "resident, and to be stored");
}

#[test]
fn an_answer_to_an_earlier_load_is_none_to_a_later_one() {
    let mut test = Test::up(4);
    test.call(load("poet", 1));
    let earlier = test.loads[&(revision(0), id(1))];
    test.answer(0, 0, 1, Ok(10));
    test.answer(0, 1, 1, Err("of another model"));
    test.call(load("poet", 1));
    assert!(test.loads[&(revision(0), id(1))] > earlier);
    test.answer(0, 0, 1, Ok(10));
    let (connection, revision) = (ranks(0)[1], revision(0));
    let late = Event::Answer { connection, revision, adapter: id(1), load: earlier, outcome: Ok(Bytes(10)) };
    assert_eq!(test.send(late), [], "the second rank has not loaded it this time");
    assert_eq!(test.answer(0, 1, 1, Ok(10)).len(), 2, "resident, and to be stored");
}

#[test]
fn a_replica_that_comes_up_while_an_adapter_is_loaded_has_to_load_it_too() {
    let mut test = Test::up(4);
    test.call(load("poet", 1));
    test.answer(0, 0, 1, Ok(10));
    assert_eq!(loads(&test.replica_up(1)), [id(1)]);
    let effects = test.answer(0, 1, 1, Ok(10));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Persist { .. })), "{effects:?}");
    test.answer(1, 0, 1, Ok(10));
    assert!(matches!(test.answer(1, 1, 1, Ok(10))[..], [Effect::Resident { .. }, Effect::Persist { .. }]));
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
}

#[test]
fn a_replica_that_comes_back_while_an_adapter_is_loaded_is_waited_for_again() {
    let mut test = Test::up(4);
    test.replica_up(1);
    test.call(load("poet", 1));
    test.loaded(1, 1, 10);
    test.answer(0, 0, 1, Ok(10));
    test.send(Event::ReplicaDown { replica: ReplicaId(1) });
    assert_eq!(loads(&test.replica_up(1)), [id(1)], "in its new layout it has nothing");
    let effects = test.answer(0, 1, 1, Ok(10));
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Persist { .. })), "{effects:?}");
    assert!(test.loaded(1, 1, 10).iter().any(|effect| matches!(effect, Effect::Persist { .. })));
}

#[test]
fn a_replica_that_comes_up_while_the_store_writes_a_name_loads_its_adapter() {
    let mut test = Test::up(4);
    test.publish("critic", 2);
    test.call(load("poet", 1));
    test.loaded(0, 1, 10);
    assert_eq!(loads(&test.replica_up(1)), [id(1), id(2)], "what is about to be served, and what is");
    test.persisted("poet");
    assert_eq!(test.served().len(), 2, "it does not hold up what the store has");
    let resident = Effect::Resident { replica: ReplicaId(1), adapter: id(1) };
    assert!(test.loaded(1, 1, 10).contains(&resident));
}

#[test]
fn a_refusal_says_whether_it_is_worth_asking_again() {
    let ended = |first: (&str, bool), second: (&str, bool)| {
        let mut test = Test::up(4);
        test.call(load("poet", 1));
        test.refuse(0, 0, 1, Err(first));
        refusal(&test.refuse(0, 1, 1, Err(second)))
    };
    let (away, missing) = (("the store does not answer", true), ("the adapter has no weights", false));
    assert_eq!(ended(away, away).0, AdminFailureKind::Unavailable);
    for (kind, message) in [ended(away, missing), ended(missing, away)] {
        assert_eq!(kind, AdminFailureKind::Invalid);
        assert!(message.contains("no weights"), "what lasts is told: {message}");
    }
    // Alone it would fit; beside what is in use it does not.
    let mut test = Test::up(4);
    test.publish("a", 1);
    test.uses(1, Usage { bound: true, wanted: true, last: Millis(0) });
    test.call(load("b", 2));
    assert_eq!(refusal(&test.loaded(0, 2, 995)).0, AdminFailureKind::Full);
    test.call(load("c", 3));
    assert_eq!(refusal(&test.loaded(0, 3, 1001)).0, AdminFailureKind::Invalid);
}

#[test]
fn a_job_can_take_back_a_name_that_is_being_published() {
    let mut test = Test::up(4);
    test.job_wants(1, load("poet", 1));
    assert_eq!(refusal(&test.job_withdraws(2, "poet")).0, AdminFailureKind::Conflict, "for the first wish");
    test.loaded(0, 1, 10);
    assert_eq!((test.served(), unloads(&test.tick(50))), (vec![], vec![id(1)]));
    // What the store writes already is written, and then deleted.
    test.job_wants(3, load("poet", 1));
    test.loaded(0, 1, 10);
    assert_eq!(test.job_withdraws(4, "poet"), []);
    let effects = test.persisted("poet");
    assert!(matches!(effects.last(), Some(Effect::Persist { record: None, .. })), "{effects:?}");
    test.persisted("poet");
    assert_eq!(test.served(), []);
    // Of a name that is served already no generation is left.
    test.publish("poet", 1);
    test.job_wants(5, LoadAdapter { replace: true, ..load("poet", 2) });
    let effects = test.job_withdraws(6, "poet");
    assert!(effects.contains(&Effect::Persist { name: "poet".into(), record: None }), "{effects:?}");
    test.persisted("poet");
    assert_eq!(test.served(), []);
}

impl Test {
    /// Stores an adapter beside what is served.
    fn hold_back(&mut self, name: &str, adapter: u8) -> Vec<Effect> {
        let mut effects = self.call(LoadAdapter { replace: true, hold_back: true, ..load(name, adapter) });
        if effects.iter().any(|effect| matches!(effect, Effect::Persist { .. })) {
            effects.extend(self.persisted(name));
        }
        effects
    }

    fn roll_back(&mut self, caller: Caller, to_generation: u64, expected: u64) -> Vec<Effect> {
        let (name, expected_generation) = ("poet".into(), Some(expected));
        self.send(Event::RollBack { caller, name, to_generation, expected_generation })
    }
}

/// Of which generation the caller hears.
fn heard(effects: &[Effect]) -> Option<u64> {
    effects.iter().find_map(|effect| match effect {
        Effect::Reply(_, AdminReply::Adapter(view)) => Some(view.generation),
        _ => None,
    })
}

#[test]
fn a_generation_that_is_held_back_is_stored_and_not_served_until_somebody_says_so() {
    let mut test = Test::up(4);
    test.publish("poet", 1);
    let effects = test.hold_back("poet", 2);
    assert_eq!((loads(&effects), heard(&effects)), (vec![], Some(2)), "no rank has to load it");
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
    let known = effects.iter().any(|effect| matches!(effect, Effect::Known(known) if known.contains(&id(2))));
    assert!(known, "but it can be asked for, to be compared");
    assert!(test.adapters.referenced().any(|adapter| adapter == id(2)), "and its files stay");
    assert_eq!(heard(&test.hold_back("poet", 2)), Some(2), "asked for again, nothing changes");
    assert_eq!(heard(&test.hold_back("poet", 1)), Some(1), "what is served need not be stored");
    let gateway = Caller::Gateway { gateway: GatewayId(1), call: 60 };
    assert_eq!(refusal(&test.roll_back(gateway, 2, 2)).0, AdminFailureKind::Conflict, "1 is served");
    assert_eq!(loads(&test.roll_back(gateway, 2, 1)), [id(2)]);
    test.loaded(0, 2, 10);
    assert_eq!(heard(&test.persisted("poet")), Some(2));
    assert_eq!(test.served(), [("poet".into(), 2, id(2))], "under its own number");
    // A job that asks again is told so; a person's wish is a new generation.
    assert_eq!(heard(&test.roll_back(Caller::Job(1), 2, 1)), Some(2));
    test.tick(50);
    assert_eq!(loads(&test.roll_back(gateway, 1, 2)), [id(1)]);
    test.loaded(0, 1, 10);
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 3, id(1))]);
}

#[test]
fn a_name_may_have_only_what_is_held_back() {
    let mut test = Test::up(4);
    assert_eq!(heard(&test.hold_back("poet", 1)), Some(1));
    assert_eq!(test.served(), []);
    assert_eq!(loads(&test.roll_back(Caller::Job(1), 1, 0)), [id(1)]);
    test.loaded(0, 1, 10);
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
    // One that was passed over by another is served as a new generation.
    test.hold_back("poet", 2);
    test.publish("poet", 3);
    test.roll_back(Caller::Job(2), 2, 3);
    test.loaded(0, 2, 10);
    test.persisted("poet");
    assert_eq!(test.served(), [("poet".into(), 4, id(2))]);
}

#[test]
fn what_is_served_is_kept_however_many_are_held_back() {
    let mut test = Test::up(4);
    test.publish("poet", 1);
    for adapter in 2..=20 {
        test.hold_back("poet", adapter);
    }
    assert_eq!(test.served(), [("poet".into(), 1, id(1))]);
    let kept: Vec<AdapterId> = test.adapters.referenced().collect();
    assert_eq!(kept.len(), GENERATIONS_KEPT);
    assert_eq!((kept[0], kept[GENERATIONS_KEPT - 1]), (id(1), id(20)));
}
