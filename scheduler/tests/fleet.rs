//! Which node serves which model, with made-up events and with random ones.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(dead_code, reason = "not all is used here")]
mod model;

use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use ashlar_protocol::models::{DeployModel, ScaleModel};
use ashlar_scheduler::ModelCard;
use ashlar_scheduler::cluster::ClusterConfig;
use ashlar_scheduler::engine::GatewayId;
use ashlar_scheduler::fleet::{Caller, Effect, Event, Facts, Fleet, FleetRecord, NodeFact};
use ashlar_scheduler::time::Millis;
use ashlar_shard_plan::{DeviceReport, Links};
use ashlar_vocabulary::{Bytes, LeaseTerm, ModelDigest, NodeId, Precision, ReplicaId};
use model::{card_of, shape};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const CALLER: Caller = (GatewayId(1), 1);

fn card(number: u8) -> ModelCard {
    card_of(&format!("/models/{number}"), ModelDigest([number; 32]))
}

fn template() -> ClusterConfig {
    ClusterConfig {
        model: "own".into(),
        precision: Precision::default(),
        model_digest: ModelDigest([0; 32]),
        shape: shape(),
        max_context_tokens: 512,
        term: LeaseTerm(1),
        holder: "holder".into(),
        stages: Some(2),
        tensor_parallel_size: None,
        replicas: Some(1),
        spread_head: None,
        expected_nodes: None,
        settle_ms: 500,
        max_num_seqs: 4,
        max_num_batched_tokens: 128,
        kv_memory_share: 0.5,
        silence_ms_max: 1000,
        boundary_log: true,
        replan_after_ms: 10_000,
        links: Links::default(),
    }
}

fn wish(name: &str, nodes: u32) -> DeployModel {
    DeployModel {
        name: name.into(),
        model: format!("/models/{name}"),
        nodes,
        stages: None,
        tensor_parallel_size: None,
        replicas: None,
        quantize: None,
        max_context_tokens: None,
    }
}

/// A cluster around the fleet: nodes that go where they belong, and take places there, one after the other. A node with a place
/// keeps it unless it is withheld.
struct World {
    now: u64,
    fleet: Fleet,
    stored: BTreeMap<String, FleetRecord>,
    nodes: BTreeMap<NodeId, NodeFact>,
    away: BTreeMap<NodeId, DeviceReport>,
    started: BTreeSet<String>,
    withheld: BTreeSet<NodeId>,
    replies: Vec<Result<Option<String>, AdminFailure>>,
    moves: usize,
    /// Whether the store answers.
    store: bool,
    /// Models by name whose files can be read.
    cards: BTreeMap<String, ModelCard>,
    busy: bool,
}

impl World {
    fn new(nodes: usize) -> World {
        let mut world = World {
            now: 0,
            fleet: Fleet::new(template(), Vec::new()),
            stored: BTreeMap::new(),
            nodes: BTreeMap::new(),
            away: BTreeMap::new(),
            started: BTreeSet::new(),
            withheld: BTreeSet::new(),
            replies: Vec::new(),
            moves: 0,
            store: true,
            cards: (1..=4)
                .map(|number| (["a", "b", "c", "d"][number - 1].into(), card(number as u8)))
                .collect(),
            busy: false,
        };
        for number in 0..nodes {
            world.join(device(number));
        }
        world.settle();
        world
    }

    fn join(&mut self, device: DeviceReport) {
        let at = self.fleet.route(&device.node).map(str::to_owned);
        let fact =
            NodeFact { at, replica: None, leaving: false, sound: true, holds: None, device: device.clone() };
        self.nodes.insert(device.node, fact);
    }

    fn lose(&mut self, node: &str) {
        if let Some(fact) = self.nodes.remove(&NodeId(node.into())) {
            self.away.insert(fact.device.node.clone(), fact.device);
        }
    }

    fn come_back(&mut self) {
        for (_, device) in std::mem::take(&mut self.away) {
            self.join(device);
        }
    }

    /// What each model's cores would do: the own one seats two, the others all that they have.
    fn seat(&mut self) {
        let mut own = self.nodes.values().filter(|fact| fact.at.is_none() && fact.seated()).count();
        for fact in self.nodes.values_mut() {
            let withheld = self.withheld.contains(&fact.device.node);
            if fact.seated() && withheld {
                fact.replica = None;
                own -= usize::from(fact.at.is_none());
            } else if !fact.seated() && !withheld && (fact.at.is_some() || own < 2) {
                fact.replica = Some(ReplicaId(0));
                own += usize::from(fact.at.is_none());
            }
        }
    }

    fn facts(&self) -> Facts {
        let own = self.nodes.values().filter(|fact| fact.at.is_none() && fact.seated()).count();
        let idle = if self.busy { BTreeSet::new() } else { self.started.clone() };
        Facts { nodes: self.nodes.clone(), own_serves: own >= 2, idle, unix_s: 7 }
    }

    fn handle(&mut self, event: Event) {
        let mut events = vec![event];
        while let Some(event) = events.pop() {
            let (facts, mut effects) = (self.facts(), Vec::new());
            self.fleet.handle(Millis(self.now), event, &facts, &mut effects);
            for effect in effects {
                match effect {
                    Effect::Open(request) => {
                        let outcome = self.cards.get(&request.name).cloned();
                        let outcome = outcome.ok_or_else(|| "no config.json is there".to_owned());
                        events.push(Event::Opened { name: request.name, outcome });
                    }
                    Effect::Persist(name, record) if self.store => {
                        match record {
                            Some(record) => self.stored.insert(name.clone(), record),
                            None => self.stored.remove(&name),
                        };
                        events.push(Event::Persisted { name, outcome: Ok(()) });
                    }
                    Effect::Persist(name, _) => {
                        events.push(Event::Persisted { name, outcome: Err("the store is away".into()) });
                    }
                    Effect::Start { name, .. } => assert!(self.started.insert(name)),
                    Effect::Stop(name) => assert!(self.started.remove(&name)),
                    Effect::Move { node, .. } => {
                        let fact = self.nodes.remove(&node).unwrap();
                        let taken = fact.at.is_none() && fact.seated() && !self.withheld.contains(&node);
                        assert!(!taken, "{node} has a place with the own model");
                        self.moves += 1;
                        self.join(fact.device);
                    }
                    Effect::Withhold { node, withheld: true } => assert!(self.withheld.insert(node)),
                    Effect::Withhold { node, withheld: false } => assert!(self.withheld.remove(&node)),
                    Effect::Reply(_, outcome) => self.replies.push(outcome),
                }
            }
        }
        self.check();
    }

    /// A node belongs to one model, and where it has joined at most one wants it.
    fn check(&self) {
        let mut members: BTreeSet<&NodeId> = BTreeSet::new();
        for (name, record) in self.fleet.deployed() {
            assert!(self.started.contains(name));
            record.members.iter().for_each(|node| assert!(members.insert(node), "{node} belongs twice"));
        }
        for (node, fact) in &self.nodes {
            assert!(fact.at.is_none() || fact.at.as_deref() == self.fleet.route(node) || fact.seated());
        }
    }

    fn step(&mut self, ms: u64) {
        self.now += ms;
        self.seat();
        self.handle(Event::Tick);
    }

    fn settle(&mut self) {
        (0..12).for_each(|_| self.step(50));
    }

    fn reply(&mut self, event: Event) -> Result<Option<String>, (AdminFailureKind, String)> {
        self.replies.clear();
        self.handle(event);
        assert_eq!(self.replies.len(), 1, "{:?}", self.replies);
        self.replies.remove(0).map_err(|failure| (failure.kind, failure.message))
    }

    fn deploy(&mut self, name: &str, nodes: u32) -> Result<Option<String>, (AdminFailureKind, String)> {
        self.reply(Event::Deploy(CALLER, Box::new(wish(name, nodes))))
    }

    fn scale(
        &mut self,
        name: Option<&str>,
        nodes: Option<u32>,
    ) -> Result<Option<String>, (AdminFailureKind, String)> {
        self.reply(Event::Scale(CALLER, ScaleModel { name: name.map(str::to_owned), nodes }))
    }

    /// Nodes by the model with which they have joined; the own one is `-`.
    fn places(&self) -> String {
        let place = |fact: &NodeFact| {
            let at = fact.at.as_deref().unwrap_or("-");
            if fact.seated() { at.to_uppercase() } else { at.to_owned() }
        };
        self.nodes.values().map(place).collect()
    }
}

fn device(number: usize) -> DeviceReport {
    DeviceReport {
        node: NodeId(format!("n{number}")),
        memory: Bytes(1 << 30),
        bandwidth_bytes_per_s: 1e10,
        flops_per_s: 1e11,
        quantized_flops_per_s: 1e11,
        threads: 1,
        layers: None,
    }
}

#[test]
fn a_model_takes_nodes_that_stand_by_and_gives_them_back() {
    let mut world = World::new(5);
    assert_eq!(world.places(), "-----");
    assert_eq!(world.nodes.values().filter(|fact| fact.seated()).count(), 2);
    assert_eq!(world.deploy("a", 2), Ok(Some("a".into())));
    world.settle();
    assert_eq!(world.places(), "--AA-");
    assert_eq!(world.scale(Some("a"), Some(3)), Ok(Some("a".into())));
    world.settle();
    assert_eq!(world.places(), "--AAA");
    assert_eq!(world.scale(Some("a"), Some(1)), Ok(Some("a".into())));
    world.settle();
    assert_eq!(world.places(), "--A--");
    assert_eq!(world.reply(Event::Remove(CALLER, "a".into())), Ok(Some("a".into())));
    world.settle();
    assert_eq!(world.places(), "-----");
    assert!(world.started.is_empty() && world.stored.is_empty());
    assert!(world.fleet.is_plain());
}

#[test]
fn what_cannot_be_is_refused_with_numbers_and_leaves_nothing_behind() {
    let mut world = World::new(3);
    let (kind, message) = world.deploy("a", 2).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Conflict);
    assert!(message.contains("a wants 2 nodes, 1 is free (n2)"), "{message}");
    assert!(message.contains("the scheduler's own model has n0, n1"), "{message}");
    let (kind, message) = world.deploy("nowhere", 1).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Invalid);
    assert!(message.contains("`/models/nowhere` cannot be served: no config.json is there"), "{message}");
    let (kind, _) = world.deploy("no/name", 1).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Invalid);
    let stages = DeployModel { stages: Some(2), ..wish("a", 1) };
    let (kind, message) = world.reply(Event::Deploy(CALLER, Box::new(stages))).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Invalid);
    assert!(message.contains("`nodes` must be at least 2"), "{message}");
    let mut huge = card(4);
    huge.shape.intermediate_size = 1 << 24;
    world.cards.insert("d".into(), huge);
    let (kind, message) = world.deploy("d", 1).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Conflict);
    assert!(message.contains("d does not fit on 1 nodes"), "{message}");
    let (kind, _) = world.scale(Some("a"), Some(1)).unwrap_err();
    assert_eq!(kind, AdminFailureKind::NotFound);
    let (kind, _) = world.reply(Event::Remove(CALLER, "a".into())).unwrap_err();
    assert_eq!(kind, AdminFailureKind::NotFound);
    world.settle();
    assert!(world.fleet.is_plain() && world.stored.is_empty() && world.started.is_empty());
    assert_eq!((world.places().as_str(), world.moves), ("---", 0));
}

#[test]
fn the_same_wish_is_the_same_model_and_another_one_a_conflict() {
    let mut world = World::new(5);
    assert!(world.deploy("a", 1).is_ok());
    assert_eq!(world.deploy("a", 1), Ok(Some("a".into())));
    let (kind, message) = world.deploy("a", 2).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Conflict);
    assert!(message.contains("a model is called a already"), "{message}");
    world.cards.insert("b".into(), card(1));
    let (kind, message) = world.deploy("b", 1).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Conflict);
    assert!(message.contains("deployed already, as a"), "{message}");
    world.cards.insert("b".into(), ModelCard { digest: ModelDigest([0; 32]), ..card(1) });
    assert!(world.deploy("b", 1).unwrap_err().1.contains("the scheduler's own model"));
    assert_eq!(world.started.len(), 1);
}

#[test]
fn nodes_with_a_place_are_given_up_only_where_their_model_is_to_have_fewer() {
    let mut world = World::new(4);
    assert!(world.deploy("a", 2).is_ok());
    world.settle();
    assert!(
        world
            .deploy("b", 1)
            .unwrap_err()
            .1
            .contains("none is free; the scheduler's own model has n0, n1; a has n2, n3")
    );
    // One that the own model cannot do without.
    let (kind, message) = world.scale(None, Some(1)).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Conflict);
    assert!(message.contains("does not fit on 1 nodes"), "{message}");
    assert!(world.scale(Some("a"), Some(1)).is_ok());
    world.settle();
    assert!(world.deploy("b", 1).is_ok());
    world.settle();
    assert_eq!(world.places(), "--AB");
}

#[test]
fn the_own_model_gives_up_what_it_is_not_to_have() {
    let mut world = World::new(4);
    assert_eq!(world.scale(None, Some(3)), Ok(None));
    world.settle();
    assert_eq!(world.withheld.len(), 1);
    // The other standby is the own model's.
    assert!(world.deploy("a", 2).unwrap_err().1.contains("a wants 2 nodes, 1 is free"));
    assert!(world.deploy("a", 1).is_ok());
    world.settle();
    assert_eq!(world.places(), "---A");
    assert!(world.withheld.is_empty());
    assert_eq!(world.scale(None, None), Ok(None));
    assert!(world.scale(Some("a"), Some(2)).is_ok());
    world.settle();
    assert_eq!(world.places(), "--AA");
}

#[test]
fn a_member_that_does_not_come_back_is_replaced_and_one_that_does_is_not() {
    let mut world = World::new(4);
    assert!(world.deploy("a", 1).is_ok());
    world.settle();
    assert_eq!(world.places(), "--A-");
    world.lose("n2");
    world.step(30_000);
    let facts = world.facts();
    let problem = world.fleet.shortage("a", &facts).unwrap();
    assert!(problem.contains("1 of those that belong to it have not joined: n2"), "{problem}");
    world.come_back();
    world.settle();
    assert_eq!((world.places().as_str(), world.moves), ("--A-", 1));
    world.lose("n2");
    world.settle();
    world.step(61_000);
    world.settle();
    assert_eq!(world.places(), "--A");
    world.come_back();
    world.settle();
    assert_eq!(world.places(), "---A");
}

#[test]
fn what_cannot_be_stored_is_not_done() {
    let mut world = World::new(4);
    world.store = false;
    let (kind, message) = world.deploy("a", 1).unwrap_err();
    assert_eq!(kind, AdminFailureKind::Unavailable);
    assert!(message.contains("the store is away"), "{message}");
    world.settle();
    assert_eq!((world.started.len(), world.moves), (0, 0));
    world.store = true;
    assert!(world.deploy("a", 1).is_ok());
    world.settle();
    world.store = false;
    world.now += 5_000;
    assert!(world.scale(Some("a"), Some(2)).is_err());
    world.settle();
    assert_eq!(world.places(), "--A-");
    world.now += 5_000;
    assert!(world.reply(Event::Remove(CALLER, "a".into())).is_err());
    world.settle();
    assert_eq!(world.places(), "--A-");
}

#[test]
fn requests_in_progress_end_before_a_model_is_gone() {
    let mut world = World::new(4);
    assert!(world.deploy("a", 2).is_ok());
    world.settle();
    world.busy = true;
    assert!(world.reply(Event::Remove(CALLER, "a".into())).is_ok());
    world.settle();
    assert_eq!(world.places(), "--AA");
    assert!(world.deploy("a", 2).unwrap_err().1.contains("is being removed"));
    world.busy = false;
    world.settle();
    assert_eq!(world.places(), "----");
}

#[test]
fn another_scheduler_finds_what_this_one_has_stored() {
    let mut world = World::new(5);
    assert!(world.scale(None, Some(2)).is_ok());
    world.settle();
    assert!(world.deploy("a", 2).is_ok());
    world.settle();
    let before = world.places();
    let stored: Vec<(String, FleetRecord)> = world.stored.clone().into_iter().collect();
    // As they are in the store.
    let stored = serde_json::from_str(&serde_json::to_string(&stored).unwrap()).unwrap();
    world.fleet = Fleet::new(template(), stored);
    let nodes = std::mem::take(&mut world.nodes);
    (world.started, world.withheld) = Default::default();
    world.handle(Event::Tick);
    assert_eq!(world.started.len(), 1);
    nodes.into_values().rev().for_each(|fact| world.join(fact.device));
    let moves = world.moves;
    world.settle();
    assert_eq!((world.places(), world.moves), (before, moves));
    assert_eq!(world.fleet.own_nodes(), Some(2));
}

#[derive(Debug, Clone)]
enum Happening {
    Deploy(usize, u32),
    Scale(usize, u32),
    ScaleOwn(Option<u32>),
    Remove(usize),
    Lose(usize),
    ComeBack,
    Store(bool),
    Busy(bool),
    Pass(u64),
    Restart,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        (0..4usize, 1..4u32).prop_map(|(model, nodes)| Happening::Deploy(model, nodes)),
        (0..4usize, 1..4u32).prop_map(|(model, nodes)| Happening::Scale(model, nodes)),
        prop::option::of(2..6u32).prop_map(Happening::ScaleOwn),
        (0..4usize).prop_map(Happening::Remove),
        (0..7usize).prop_map(Happening::Lose),
        Just(Happening::ComeBack),
        any::<bool>().prop_map(Happening::Store),
        any::<bool>().prop_map(Happening::Busy),
        (50..90_000u64).prop_map(Happening::Pass),
        Just(Happening::Restart),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_happens_every_node_belongs_to_one_model_and_then_nothing_moves(
        happenings in prop::collection::vec(happening(), 1..40),
    ) {
        let mut world = World::new(7);
        let name = |model: usize| ["a", "b", "c", "d"][model].to_owned();
        for happening in happenings {
            match happening {
                Happening::Deploy(model, nodes) => {
                    world.handle(Event::Deploy(CALLER, Box::new(wish(&name(model), nodes))));
                }
                Happening::Scale(model, nodes) => {
                    let wish = ScaleModel { name: Some(name(model)), nodes: Some(nodes) };
                    world.handle(Event::Scale(CALLER, wish));
                }
                Happening::ScaleOwn(nodes) => {
                    world.handle(Event::Scale(CALLER, ScaleModel { name: None, nodes }));
                }
                Happening::Remove(model) => world.handle(Event::Remove(CALLER, name(model))),
                Happening::Lose(node) => world.lose(&format!("n{node}")),
                Happening::ComeBack => world.come_back(),
                Happening::Store(answers) => world.store = answers,
                Happening::Busy(busy) => world.busy = busy,
                Happening::Pass(ms) => world.step(ms),
                Happening::Restart => {
                    let stored = world.stored.clone().into_iter().collect();
                    world.fleet = Fleet::new(template(), stored);
                    let nodes = std::mem::take(&mut world.nodes);
                    (world.started, world.withheld) = Default::default();
                    world.handle(Event::Tick);
                    nodes.into_values().for_each(|fact| world.join(fact.device));
                }
            }
            world.step(50);
        }
        // Whoever can come back does, and then it is quiet.
        world.come_back();
        (world.store, world.busy) = (true, false);
        world.step(2_000);
        (0..20).for_each(|_| world.step(2_000));
        let moves = world.moves;
        (0..20).for_each(|_| world.step(5_000));
        prop_assert_eq!(world.moves, moves, "nodes go to and fro");
        for (node, fact) in &world.nodes {
            prop_assert_eq!(fact.at.as_deref(), world.fleet.route(node));
        }
        let facts = world.facts();
        for (model, record) in world.fleet.deployed() {
            let short = record.members.len() < record.request.nodes as usize;
            prop_assert!(record.members.len() <= record.request.nodes as usize);
            prop_assert_eq!(short, world.fleet.shortage(model, &facts).is_some());
        }
        for (name, record) in &world.stored {
            if let FleetRecord::Deployed(record) = record {
                let now = world.fleet.deployed().find(|(model, _)| model == name).map(|(_, now)| now.clone());
                prop_assert_eq!(now.as_ref(), Some(&**record));
            }
        }
    }
}
