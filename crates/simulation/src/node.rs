//! A node: the real sequencer, around it a rank that serves (`steps`), trains and has adapters.

mod kv;
mod steps;

use crate::plan::{self, Pace, Plan};
use crate::process::{Action, Activations, Connection, Errand, Input, Message, Process, Purpose, Timer};
use crate::random::Random;
use crate::session::Sessions;
use crate::shelf::Shelf;
use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::membership::{Assignment, BEAT_INTERVAL_MS, FromNode, HeldSlice, Join, ToNode};
use ashlar_protocol::step::StepPlan;
use ashlar_shard_node::fence::{self, Verdict};
use ashlar_shard_node::sequencer::{self, Event, Sequencer, StepWork};
use ashlar_vocabulary::{AdapterId, Bytes, LeaseTerm, NodeId, ReplicaRevision, SequenceId};
use kv::Kv;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

/// A node process, and what survives its death on disk.
pub(crate) struct Node {
    number: usize,
    /// Time of one step, in microseconds.
    step_us: u64,
    /// Time of a pass of a training step.
    pass_us: u64,
    /// On disk: the highest term accepted, and its holder.
    fence: (LeaseTerm, String),
    control: Option<Connection>,
    place: Option<Place>,
    /// Slices of logits computed for the rank that samples.
    head_slices: u64,
    /// Links of layouts that this node has not been told of yet.
    early: Vec<(Connection, LinkHello)>,
    sequencer: Sequencer,
    sessions: Sessions,
    /// In a world that somebody has in mind.
    plan: Option<Arc<Plan>>,
    /// What it has in memory there.
    held: Option<HeldSlice>,
    /// The place before, with its KV cache and what it handed on: of use again if the same slice is assigned.
    former: Option<Former>,
    /// What it has prepared for a place to come, or is preparing, and whether it is there.
    prepared: Option<(Box<Assignment>, bool)>,
    /// Whether it was asked to end, and for how long it will be gone.
    ending_us: Option<u64>,
    /// Whether an operator wants it empty.
    drained: bool,
}

/// What is left of a place.
struct Former {
    assignment: Assignment,
    kv: Kv,
    log: Option<(Kv, bool)>,
}

/// How long a node that was asked to end waits until others have its place.
const GRACE_US: u64 = 1_500_000;

struct Place {
    assignment: Assignment,
    loaded: bool,
    announced: bool,
    previous: Option<Connection>,
    next: Option<Connection>,
    /// To the rank that samples, where this one holds a slice of the head for it.
    sampler: Option<Connection>,
    /// On the rank that samples: from those ranks, by slice.
    head_ranks: BTreeMap<u32, Connection>,
    kv: Kv,
    /// What was handed on to the next stage, and whether it has all that the cache has.
    log: Option<(Kv, bool)>,
    seeds: BTreeMap<SequenceId, u64>,
    /// Sequences that are audited.
    audited: BTreeSet<SequenceId>,
    adapters: Shelf,
    /// What the scheduler wants, in order: an adapter is forgotten after every step sent before.
    orders: VecDeque<Order>,
    arrived: VecDeque<Activations>,
    current: Option<Current>,
    /// How long its steps take, in a world that somebody has in mind.
    pace: Option<Pace>,
}

/// What a rank does in the order in which it is told.
enum Order {
    Step(Box<StepPlan>),
    /// Under the number of the load.
    Load(AdapterId, u64),
    Unload(AdapterId),
}

/// The step at hand.
struct Current {
    work: StepWork,
    /// States of its rows, once they have been computed.
    rows: Option<Vec<u64>>,
    /// Slices of the logits that have come, once their rows have been handed out.
    logits: Option<BTreeMap<u32, Vec<u64>>>,
    /// What computing them takes, in microseconds.
    compute_us: u64,
}

impl Place {
    fn links(&self) -> impl Iterator<Item = Connection> {
        let single = [self.previous, self.next, self.sampler];
        single.into_iter().flatten().chain(self.head_ranks.values().copied())
    }

    /// Ranks of earlier stages that hold slices of the head, if this one samples.
    fn head_ranks_wanted(&self) -> usize {
        let samples = self.assignment.sampler.is_none() && self.assignment.tensor_rank.0 == 0;
        let head = self.assignment.head.filter(|_| samples);
        head.map_or(0, |head| head.of.saturating_sub(self.assignment.tensor_parallel_size as usize))
    }
}

/// Either the layout must be renewed, or the contract is broken and the simulation has found something.
enum Trouble {
    Layout(String),
    Violation(String),
}

/// Where a node's peers reach it.
pub(crate) fn address(number: usize) -> String {
    format!("node-{number}:1")
}

/// The node behind an address.
pub(crate) fn number_of(address: &str) -> Option<usize> {
    address.strip_prefix("node-")?.strip_suffix(":1")?.parse().ok()
}

impl Node {
    pub(crate) fn new(number: usize, step_us: u64, pass_us: u64) -> Node {
        Node {
            number,
            step_us,
            pass_us,
            fence: (LeaseTerm(0), String::new()),
            control: None,
            place: None,
            head_slices: 0,
            early: Vec::new(),
            sequencer: Sequencer::default(),
            sessions: Sessions::new(pass_us),
            plan: None,
            held: None,
            former: None,
            prepared: None,
            ending_us: None,
            drained: false,
        }
    }

    /// A node of a world that somebody has in mind.
    pub(crate) fn planned(number: usize, plan: Arc<Plan>) -> Node {
        Node { plan: Some(plan), ..Node::new(number, 0, 0) }
    }

    /// What a kill leaves.
    pub(crate) fn killed(&self) -> Node {
        let (fence, head_slices) = (self.fence.clone(), self.head_slices);
        let plan = self.plan.clone();
        Node { fence, head_slices, plan, ..Node::new(self.number, self.step_us, self.pass_us) }
    }

    /// Slices of logits that it has computed for another rank, over all its lives.
    pub(crate) fn head_slices(&self) -> u64 {
        self.head_slices
    }

    /// Fine-tuning sessions that this rank has.
    pub(crate) fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// The layout in which it has a place, and its adapters there.
    pub(crate) fn shelf(&self) -> Option<(ReplicaRevision, &Shelf)> {
        self.place.as_ref().map(|place| (place.assignment.revision, &place.adapters))
    }

    /// Its connection to the scheduler.
    pub(crate) fn control(&self) -> Option<Connection> {
        self.control
    }

    /// Sequences that this rank still tracks in its present layout.
    pub(crate) fn tracked(&self) -> usize {
        if self.place.is_some() { self.sequencer.len() } else { 0 }
    }

    pub(crate) fn handle(
        &mut self,
        input: Input,
        random: &mut Random,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        match input {
            Input::Timer(Timer::Start) => {
                self.reach_scheduler(actions);
                actions.push(Action::Wake { after_us: BEAT_INTERVAL_MS * 1000, timer: Timer::Beat });
            }
            Input::Timer(Timer::Reconnect) if self.control.is_none() => self.reach_scheduler(actions),
            Input::Timer(Timer::Beat) => {
                self.tell(FromNode::Beat, actions);
                actions.push(Action::Wake { after_us: BEAT_INTERVAL_MS * 1000, timer: Timer::Beat });
            }
            Input::Timer(Timer::Loaded(revision)) => {
                if let Some(place) = self.place.as_mut().filter(|place| place.assignment.revision == revision)
                {
                    place.loaded = true;
                    self.held = Some(plan::slice_of(&place.assignment));
                }
            }
            Input::Timer(Timer::Asked(for_us)) => {
                self.ending_us = Some(for_us);
                match self.control {
                    Some(_) => self.tell(FromNode::Leaving(true), actions),
                    None => actions.push(Action::Exit { for_us }),
                }
                actions.push(Action::Wake { after_us: GRACE_US, timer: Timer::Impatient });
            }
            Input::Timer(Timer::Impatient) => self.end(actions),
            Input::Timer(Timer::Sliced(revision)) => {
                let prepared = self.prepared.as_mut().filter(|(order, _)| order.revision == revision);
                if let Some((_, there)) = prepared {
                    *there = true;
                    let outcome = match random.chance(50_000) {
                        true => Err("the disk cannot be read".to_owned()),
                        false => Ok(()),
                    };
                    self.tell(FromNode::Prepared { revision, outcome }, actions);
                }
            }
            Input::Timer(Timer::Computed(revision, step)) => {
                let current = self.place.as_ref().filter(|place| place.assignment.revision == revision);
                let current = current.and_then(|place| place.current.as_ref());
                if current.is_some_and(|current| current.work.step == step) {
                    self.hand_out(actions);
                }
            }
            Input::Timer(timer) => self.sessions.timer(timer, actions)?,
            Input::Answered(Errand::Adapter(revision, adapter, load), answer) => {
                let place = self.place.as_mut().filter(|place| place.assignment.revision == revision);
                let ended = place.and_then(|place| place.adapters.finish(adapter, load, answer));
                if let Some(outcome) = ended {
                    self.tell(FromNode::AdapterLoaded { revision, adapter, load, outcome }, actions);
                }
            }
            Input::Answered(errand, answer) => self.sessions.answered(errand, answer, actions)?,
            Input::Opened {
                connection,
                purpose: Purpose::Link(revision, purpose @ LinkPurpose::Training { session, .. }),
                initiator: true,
            } => {
                let hello = LinkHello { term: self.fence.0, revision, purpose };
                self.sessions.reached(session, hello, connection, actions)?;
            }
            Input::Opened { connection, purpose: Purpose::Control, .. } => {
                self.control = Some(connection);
                self.tell(FromNode::Join(Box::new(self.join())), actions);
            }
            Input::Opened { connection, purpose: Purpose::Link(revision, purpose), initiator: true } => {
                match self.place.as_mut().filter(|place| place.assignment.revision == revision) {
                    Some(place) => {
                        match purpose {
                            LinkPurpose::Head { .. } => place.sampler = Some(connection),
                            LinkPurpose::Training { .. } | LinkPurpose::Files => {}
                            LinkPurpose::Activations | LinkPurpose::Group { .. } => {
                                place.next = Some(connection)
                            }
                        }
                        let hello = LinkHello { term: place.assignment.term, revision, purpose };
                        actions.push(Action::Send(connection, Message::Hello(hello)));
                    }
                    None => actions.push(Action::Close(connection)),
                }
            }
            Input::Opened { .. } => {}
            Input::Refused(Purpose::Control) => self.try_again(random, actions),
            Input::Refused(Purpose::Link(_, LinkPurpose::Training { session, .. })) => {
                self.sessions.not_reached(session, actions)?;
            }
            Input::Refused(Purpose::Link(revision, _)) => {
                if self.place.as_ref().is_some_and(|place| place.assignment.revision == revision) {
                    self.fail("cannot reach another rank".to_owned(), actions);
                }
            }
            Input::Refused(Purpose::Serving) => {}
            Input::Message(_, Message::ToNode(message)) => self.obey(message, random, actions)?,
            Input::Message(connection, Message::Hello(hello)) => match hello.purpose {
                LinkPurpose::Training { session, link } => {
                    self.sessions.arrived(session, link, connection, actions)?;
                }
                _ => self.early.push((connection, hello)),
            },
            Input::Message(connection, Message::Training(payload)) => {
                self.sessions.received(connection, payload, actions)?;
            }
            Input::Message(connection, Message::Activations(activations)) => {
                if let Some(place) = self.place.as_mut().filter(|place| place.previous == Some(connection)) {
                    place.arrived.push_back(activations);
                }
            }
            Input::Message(connection, Message::HeadRows(asked)) => self.answer(connection, asked, actions),
            Input::Message(connection, Message::Logits(logits)) => {
                if let Err(trouble) = self.take_slice(connection, logits, actions) {
                    self.give_in(trouble, actions)?;
                }
            }
            Input::Message(..) => return Err(format!("node {} received a foreign message", self.number)),
            Input::Closed(connection) if self.control == Some(connection) => {
                self.control = None;
                self.leave_place(actions);
                self.prepared = None;
                self.end(actions);
                self.try_again(random, actions);
            }
            Input::Closed(connection) => {
                self.sessions.closed(connection, actions)?;
                self.link_closed(connection, actions);
            }
        }
        self.take_links(actions);
        if let Err(trouble) = self.work(actions) {
            self.give_in(trouble, actions)?;
        }
        for (session, report) in self.sessions.take_reports() {
            self.tell(FromNode::Training { session, report: Box::new(report) }, actions);
        }
        Ok(())
    }

    fn give_in(&mut self, trouble: Trouble, actions: &mut Vec<Action>) -> Result<(), String> {
        match trouble {
            Trouble::Violation(violation) => Err(format!("node {}: {violation}", self.number)),
            Trouble::Layout(reason) => {
                self.fail(reason, actions);
                Ok(())
            }
        }
    }

    fn reach_scheduler(&self, actions: &mut Vec<Action>) {
        actions.push(Action::Connect { to: Process::Scheduler, purpose: Purpose::Control });
    }

    fn try_again(&self, random: &mut Random, actions: &mut Vec<Action>) {
        actions.push(Action::Wake { after_us: random.between(20_000, 200_000), timer: Timer::Reconnect });
    }

    fn tell(&self, message: FromNode, actions: &mut Vec<Action>) {
        if let Some(control) = self.control {
            actions.push(Action::Send(control, Message::FromNode(message)));
        }
    }

    fn join(&self) -> Join {
        if let Some(device) = self.plan.as_ref().and_then(|plan| plan.nodes.get(self.number)) {
            return Join {
                node: device.node.clone(),
                data_address: address(self.number),
                memory: device.memory,
                bandwidth_bytes_per_s: device.bandwidth_bytes_per_s,
                flops_per_s: device.flops_per_s,
                quantized_flops_per_s: device.quantized_flops_per_s,
                threads: device.threads,
                isa: "simulated".into(),
                layers: device.layers,
                holds: self.held.clone(),
                term: self.fence.0,
                crashed: None,
                leaving: self.is_leaving(),
            };
        }
        Join {
            node: NodeId(format!("node-{}", self.number)),
            data_address: address(self.number),
            memory: Bytes(1 << 30),
            bandwidth_bytes_per_s: 1e9,
            flops_per_s: 1e10,
            quantized_flops_per_s: 1e10,
            threads: 1,
            isa: "portable".into(),
            layers: None,
            holds: None,
            term: self.fence.0,
            crashed: None,
            leaving: self.is_leaving(),
        }
    }

    fn obey(
        &mut self,
        message: ToNode,
        random: &mut Random,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        match message {
            ToNode::Assign(assignment) => self.assign(*assignment, random, actions),
            ToNode::Release { .. } => {
                self.leave_place(actions);
                self.former = None;
            }
            ToNode::Step(plan) => {
                if let Some(place) = &mut self.place {
                    place.orders.push_back(Order::Step(plan));
                }
            }
            ToNode::LoadAdapter { revision, adapter, load } => {
                let place = self.place.as_mut().filter(|place| place.assignment.revision == revision);
                place.into_iter().for_each(|place| place.orders.push_back(Order::Load(adapter, load)));
            }
            ToNode::UnloadAdapter { adapter } => {
                let place = self.place.as_mut();
                place.into_iter().for_each(|place| place.orders.push_back(Order::Unload(adapter)));
            }
            ToNode::OpenSession(open) => {
                let place = self.place.as_ref().filter(|place| place.announced);
                self.sessions.open(*open, place.map(|place| &place.assignment), actions)?;
            }
            ToNode::Training { session, work } => self.sessions.work(session, work, actions)?,
            ToNode::Prepare(order) => {
                self.prepared = order.map(|order| (order, false));
                if let Some((order, _)) = &self.prepared {
                    let after_us = match &self.plan {
                        Some(plan) => plan::load_us(plan, order, self.held.as_ref()),
                        None => random.between(5_000, 300_000),
                    };
                    actions.push(Action::Wake { after_us, timer: Timer::Sliced(order.revision) });
                }
            }
            ToNode::Drain(drained) => {
                self.drained = drained;
                self.tell(FromNode::Leaving(self.is_leaving()), actions);
            }
            ToNode::Dismissed => self.end(actions),
            ToNode::Beat | ToNode::Closing(_) | ToNode::Rejected(_) => {}
        }
        Ok(())
    }

    fn is_leaving(&self) -> bool {
        self.drained || self.ending_us.is_some()
    }

    /// Ends, if it was asked to.
    fn end(&mut self, actions: &mut Vec<Action>) {
        if let Some(for_us) = self.ending_us {
            actions.push(Action::Exit { for_us });
        }
    }

    fn assign(&mut self, assignment: Assignment, random: &mut Random, actions: &mut Vec<Action>) {
        self.leave_place(actions);
        let asked = (assignment.term, assignment.holder.clone());
        if fence::verdict((self.fence.0, &self.fence.1), (asked.0, &asked.1)) == Verdict::Refuse {
            let refusal = FromNode::Refused { revision: assignment.revision, term: self.fence.0 };
            return self.tell(refusal, actions);
        }
        self.fence = asked;
        self.former.take_if(|former| !sequencer::is_same_cache(&former.assignment, &assignment));
        let assigned = Event::Assigned {
            term: assignment.term,
            revision: assignment.revision,
            kv_blocks: assignment.kv_blocks,
            max_rows: assignment.max_num_batched_tokens,
            cache_kept: self.former.is_some(),
        };
        self.sequencer.handle(assigned, &mut Vec::new());
        if let Some(next) = assignment.next.as_deref().and_then(number_of) {
            let purpose = Purpose::Link(assignment.revision, LinkPurpose::Activations);
            actions.push(Action::Connect { to: Process::Node(next), purpose });
        }
        if let (Some(sampler), Some(head)) =
            (assignment.sampler.as_deref().and_then(number_of), assignment.head)
        {
            let purpose = Purpose::Link(assignment.revision, LinkPurpose::Head { index: head.index as u32 });
            actions.push(Action::Connect { to: Process::Node(sampler), purpose });
        }
        let loaded = Timer::Loaded(assignment.revision);
        let is_it = |order: &Assignment| plan::slice_of(order) == plan::slice_of(&assignment);
        let prepared = self.prepared.take().is_some_and(|(order, there)| there && is_it(&order));
        let load_us = match &self.plan {
            _ if prepared => 1_000,
            Some(plan) => plan::load_us(plan, &assignment, self.held.as_ref()),
            None => random.between(5_000, 150_000),
        };
        actions.push(Action::Wake { after_us: load_us, timer: loaded });
        // For another slice it gives up what it has.
        self.held.take_if(|held| *held != plan::slice_of(&assignment));
        let pace = self.plan.as_ref().map(|plan| Pace::new(plan, &assignment));
        let (kv, log) = match self.former.take() {
            Some(former) => (Some(former.kv), former.log),
            None => (None, None),
        };
        let logs = assignment.boundary_log && assignment.next.is_some();
        let log = logs.then(|| log.unwrap_or_else(|| (Kv::default(), kv.is_none())));
        self.place = Some(Place {
            assignment,
            loaded: false,
            announced: false,
            previous: None,
            next: None,
            sampler: None,
            head_ranks: BTreeMap::new(),
            kv: kv.unwrap_or_default(),
            log,
            seeds: BTreeMap::new(),
            audited: BTreeSet::new(),
            adapters: Shelf::default(),
            orders: VecDeque::new(),
            arrived: VecDeque::new(),
            current: None,
            pace,
        });
    }

    fn leave_place(&mut self, actions: &mut Vec<Action>) {
        self.sessions.end_all(actions);
        if let Some(place) = self.place.take() {
            actions.extend(place.links().map(Action::Close));
            let Place { assignment, kv, log, .. } = place;
            self.former = Some(Former { assignment, kv, log });
        }
    }

    fn fail(&mut self, message: String, actions: &mut Vec<Action>) {
        if let Some(revision) = self.place.as_ref().map(|place| place.assignment.revision) {
            self.leave_place(actions);
            self.tell(FromNode::Failed { revision, message, weights: false }, actions);
        }
    }

    fn link_closed(&mut self, connection: Connection, actions: &mut Vec<Action>) {
        self.early.retain(|(early, _)| *early != connection);
        let concerned = |place: &Place| place.links().any(|link| link == connection);
        if self.place.as_ref().is_some_and(concerned) {
            self.fail("lost another rank".to_owned(), actions);
        }
    }

    /// Takes links of the present layout; reports ready once weights and links are there.
    fn take_links(&mut self, actions: &mut Vec<Action>) {
        let Some(place) = &mut self.place else { return };
        let (term, revision) = (place.assignment.term, place.assignment.revision);
        self.early.retain(|(connection, hello)| {
            if (hello.term, hello.revision) != (term, revision) {
                return hello.revision > revision;
            }
            match hello.purpose {
                LinkPurpose::Head { index } => drop(place.head_ranks.insert(index, *connection)),
                LinkPurpose::Training { .. } | LinkPurpose::Files => {}
                LinkPurpose::Activations | LinkPurpose::Group { .. } => place.previous = Some(*connection),
            }
            false
        });
        let first = place.assignment.stage.0 == 0;
        let linked = (first || place.previous.is_some())
            && (place.assignment.next.is_none() || place.next.is_some())
            && (place.assignment.sampler.is_none() || place.sampler.is_some())
            && place.head_ranks.len() == place.head_ranks_wanted();
        if place.loaded && linked && !place.announced {
            place.announced = true;
            let kept = self.sequencer.names().collect();
            let logged = place.log.as_ref().is_some_and(|(_, complete)| *complete);
            let ready = FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(1), kept, logged };
            self.tell(ready, actions);
        }
    }
}
