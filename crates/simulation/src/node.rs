//! A node: the real sequencer, around it ranks whose KV cache remembers what was written where.

use crate::oracle;
use crate::process::{Action, Activations, Connection, Input, Logits, Message, Process, Purpose, Timer};
use crate::random::Random;
use ashlar_protocol::data::{LinkHello, LinkPurpose};
use ashlar_protocol::membership::{Assignment, BEAT_INTERVAL_MS, FromNode, Join, ToNode};
use ashlar_protocol::step::{SampledToken, StepPlan, StepResult, StepTiming};
use ashlar_shard_node::sequencer::{BLOCK_TOKENS, Effect, Event, Sequencer, StepWork};
use ashlar_vocabulary::{Bytes, LeaseTerm, NodeId, SequenceId};
use std::collections::{BTreeMap, VecDeque};

/// A node process, and what survives its death on disk.
pub(crate) struct Node {
    number: usize,
    /// Time of one step, in microseconds.
    step_us: u64,
    /// On disk: the highest term accepted, and its holder.
    fence: (LeaseTerm, String),
    control: Option<Connection>,
    place: Option<Place>,
    /// Slices of logits computed for the rank that samples.
    head_slices: u64,
    /// Links of layouts that this node has not been told of yet.
    early: Vec<(Connection, LinkHello)>,
    sequencer: Sequencer,
}

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
    kv: BTreeMap<(u32, usize), u64>,
    seeds: BTreeMap<SequenceId, u64>,
    plans: VecDeque<StepPlan>,
    arrived: VecDeque<Activations>,
    current: Option<Current>,
}

/// The step at hand.
struct Current {
    work: StepWork,
    /// States of its rows, once they have been computed.
    rows: Option<Vec<u64>>,
    /// Slices of the logits that have come, once their rows have been handed out.
    logits: Option<BTreeMap<u32, Vec<u64>>>,
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

fn number_of(address: &str) -> Option<usize> {
    address.strip_prefix("node-")?.strip_suffix(":1")?.parse().ok()
}

impl Node {
    pub(crate) fn new(number: usize, step_us: u64) -> Node {
        Node {
            number,
            step_us,
            fence: (LeaseTerm(0), String::new()),
            control: None,
            place: None,
            head_slices: 0,
            early: Vec::new(),
            sequencer: Sequencer::default(),
        }
    }

    /// What a kill leaves.
    pub(crate) fn killed(&self) -> Node {
        let (fence, head_slices) = (self.fence.clone(), self.head_slices);
        Node { fence, head_slices, ..Node::new(self.number, self.step_us) }
    }

    /// Slices of logits that it has computed for another rank, over all its lives.
    pub(crate) fn head_slices(&self) -> u64 {
        self.head_slices
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
                }
            }
            Input::Timer(Timer::Computed(revision, step)) => {
                let current = self.place.as_ref().filter(|place| place.assignment.revision == revision);
                let current = current.and_then(|place| place.current.as_ref());
                if current.is_some_and(|current| current.work.step == step) {
                    self.hand_out(actions);
                }
            }
            Input::Timer(_) => {}
            Input::Opened { connection, purpose: Purpose::Control, .. } => {
                self.control = Some(connection);
                self.tell(FromNode::Join(Box::new(self.join())), actions);
            }
            Input::Opened { connection, purpose: Purpose::Link(revision, purpose), initiator: true } => {
                match self.place.as_mut().filter(|place| place.assignment.revision == revision) {
                    Some(place) => {
                        match purpose {
                            LinkPurpose::Head { .. } => place.sampler = Some(connection),
                            LinkPurpose::Training { .. } => {}
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
            Input::Refused(Purpose::Link(revision, _)) => {
                if self.place.as_ref().is_some_and(|place| place.assignment.revision == revision) {
                    self.fail("cannot reach another rank".to_owned(), actions);
                }
            }
            Input::Refused(Purpose::Serving) => {}
            Input::Message(_, Message::ToNode(message)) => self.obey(message, random, actions),
            Input::Message(connection, Message::Hello(hello)) => self.early.push((connection, hello)),
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
                self.try_again(random, actions);
            }
            Input::Closed(connection) => self.link_closed(connection, actions),
        }
        self.take_links(actions);
        match self.work(actions) {
            Err(trouble) => self.give_in(trouble, actions),
            Ok(()) => Ok(()),
        }
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

    /// Computes this rank's slice of the head: between whatever else it does, from the rows alone.
    fn answer(&mut self, connection: Connection, asked: Activations, actions: &mut Vec<Action>) {
        let Some(place) = self.place.as_ref().filter(|place| place.sampler == Some(connection)) else {
            return;
        };
        let Some(head) = place.assignment.head.filter(|_| asked.revision == place.assignment.revision) else {
            return self.fail("rows of another layout".to_owned(), actions);
        };
        let slice = asked.rows.iter().map(|row| oracle::slice(*row, head.index as u64)).collect();
        let logits = Logits { revision: asked.revision, step: asked.step, slice };
        self.head_slices += 1;
        actions.push(Action::Send(connection, Message::Logits(logits)));
    }

    /// Takes a slice of the logits that this rank, which samples, waits for; with the last one the step is complete.
    fn take_slice(
        &mut self,
        connection: Connection,
        logits: Logits,
        actions: &mut Vec<Action>,
    ) -> Result<(), Trouble> {
        let Some(place) = &mut self.place else { return Ok(()) };
        let index = place.head_ranks.iter().find(|(_, link)| **link == connection).map(|(index, _)| *index);
        let (Some(index), revision) = (index, place.assignment.revision) else { return Ok(()) };
        let wanted = place.head_ranks_wanted();
        let unasked = || Trouble::Layout(format!("logits of step {} that nobody waits for", logits.step));
        let current = place.current.as_mut().filter(|current| current.work.step == logits.step);
        let Some(Current { work, rows: Some(rows), logits: Some(slices) }) = current else {
            return Err(unasked());
        };
        if logits.revision != revision || slices.contains_key(&index) {
            return Err(unasked());
        }
        let expected = sampled_rows(work, rows).map(|row| oracle::slice(row, u64::from(index)));
        if !expected.eq(logits.slice.iter().copied()) {
            let step = logits.step;
            return Err(Trouble::Violation(format!(
                "step {step}: slice {index} of the logits is of other rows"
            )));
        }
        slices.insert(index, logits.slice);
        if slices.len() == wanted {
            self.complete(actions);
        }
        Ok(())
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
        }
    }

    fn obey(&mut self, message: ToNode, random: &mut Random, actions: &mut Vec<Action>) {
        match message {
            ToNode::Assign(assignment) => self.assign(*assignment, random, actions),
            ToNode::Release { .. } => self.leave_place(actions),
            ToNode::Step(plan) => {
                if let Some(place) = &mut self.place {
                    place.plans.push_back(*plan);
                }
            }
            ToNode::LoadAdapter { revision, adapter, load } => {
                let outcome = Ok(Bytes(1));
                self.tell(FromNode::AdapterLoaded { revision, adapter, load, outcome }, actions);
            }
            ToNode::UnloadAdapter { .. }
            | ToNode::OpenSession(_)
            | ToNode::Training { .. }
            | ToNode::Rejected(_) => {}
        }
    }

    fn assign(&mut self, assignment: Assignment, random: &mut Random, actions: &mut Vec<Action>) {
        self.leave_place(actions);
        let asked = (assignment.term, assignment.holder.clone());
        let stale = asked.0 < self.fence.0 || (asked.0 == self.fence.0 && asked.1 != self.fence.1);
        if stale && self.fence.0 > LeaseTerm(0) {
            let refusal = FromNode::Refused { revision: assignment.revision, term: self.fence.0 };
            return self.tell(refusal, actions);
        }
        self.fence = asked;
        let assigned = Event::Assigned {
            term: assignment.term,
            revision: assignment.revision,
            kv_blocks: assignment.kv_blocks,
            max_rows: assignment.max_num_batched_tokens,
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
        actions.push(Action::Wake { after_us: random.between(5_000, 150_000), timer: loaded });
        self.place = Some(Place {
            assignment,
            loaded: false,
            announced: false,
            previous: None,
            next: None,
            sampler: None,
            head_ranks: BTreeMap::new(),
            kv: BTreeMap::new(),
            seeds: BTreeMap::new(),
            plans: VecDeque::new(),
            arrived: VecDeque::new(),
            current: None,
        });
    }

    fn leave_place(&mut self, actions: &mut Vec<Action>) {
        if let Some(place) = self.place.take() {
            actions.extend(place.links().map(Action::Close));
        }
    }

    fn fail(&mut self, message: String, actions: &mut Vec<Action>) {
        if let Some(revision) = self.place.as_ref().map(|place| place.assignment.revision) {
            self.leave_place(actions);
            self.tell(FromNode::Failed { revision, message }, actions);
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
                LinkPurpose::Training { .. } => {}
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
            let ready = FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(1) };
            self.tell(ready, actions);
        }
    }

    /// Begins the next step, and computes it once its activations are there.
    fn work(&mut self, actions: &mut Vec<Action>) -> Result<(), Trouble> {
        loop {
            let Some(place) = &mut self.place else { return Ok(()) };
            if place.current.is_some() {
                return self.compute(actions);
            }
            let Some(plan) = place.plans.pop_front() else { return Ok(()) };
            let mut effects = Vec::new();
            self.sequencer.handle(Event::Plan(plan), &mut effects);
            for effect in effects {
                match effect {
                    Effect::Begin(new) => {
                        place.seeds.insert(new.id, new.sampling.seed);
                    }
                    Effect::End(id) => {
                        place.seeds.remove(&id);
                    }
                    Effect::Observe(..) => {}
                    Effect::Compute(work) => place.current = Some(Current { work, rows: None, logits: None }),
                    Effect::Diverged(reason) => return Err(Trouble::Layout(reason)),
                }
            }
        }
    }

    fn compute(&mut self, actions: &mut Vec<Action>) -> Result<(), Trouble> {
        let Some(place) = &mut self.place else { return Ok(()) };
        let Some(current) = &mut place.current else { return Ok(()) };
        if current.rows.is_some() {
            return Ok(());
        }
        let (revision, step) = (place.assignment.revision, current.work.step);
        let expects = place.assignment.stage.0 > 0 && !current.work.rows.is_empty();
        let mut input = None;
        if expects {
            let Some(arrived) = place.arrived.pop_front() else { return Ok(()) };
            if arrived.revision != revision || arrived.step != step {
                return Err(Trouble::Layout(format!("activations of step {} in step {step}", arrived.step)));
            }
            input = Some(arrived.rows);
        }
        let mut rows = Vec::with_capacity(current.work.rows.len());
        let mut known: Option<(SequenceId, Vec<u64>)> = None;
        for row in &current.work.rows {
            let sequence = self.sequencer.sequence(row.sequence);
            let sequence =
                sequence.ok_or_else(|| Trouble::Violation("computes an unknown sequence".into()))?;
            let position = row.position as usize;
            let place_of = |position: usize| {
                let block = sequence.block_table.get(position / BLOCK_TOKENS);
                block.map(|block| (block.0, position % BLOCK_TOKENS))
            };
            let fresh = known.as_ref().is_none_or(|(id, _)| *id != row.sequence);
            if fresh {
                let states = oracle::states(&sequence.tokens);
                for (before, state) in states.iter().enumerate().take(position) {
                    let found = place_of(before).and_then(|place_of| place.kv.get(&place_of));
                    if found != Some(state) {
                        let id = row.sequence;
                        return Err(Trouble::Violation(format!(
                            "step {step}: sequence {id} reads KV of position {before} that is not its own"
                        )));
                    }
                }
                known = Some((row.sequence, states));
            }
            let state = known.as_ref().and_then(|(_, states)| states.get(position)).copied();
            let (Some(state), Some(at)) = (state, place_of(position)) else {
                return Err(Trouble::Violation(format!("step {step}: position {position} has no place")));
            };
            place.kv.insert(at, state);
            rows.push(state);
        }
        if input.is_some_and(|input| input != rows) {
            return Err(Trouble::Violation(format!("step {step}: the stages disagree about its rows")));
        }
        let after_us = if rows.is_empty() { 10 } else { self.step_us + 20 * rows.len() as u64 };
        current.rows = Some(rows);
        actions.push(Action::Wake { after_us, timer: Timer::Computed(revision, step) });
        Ok(())
    }

    /// A step's layers have been computed: the rank that samples asks for the slices of the logits that others hold.
    fn hand_out(&mut self, actions: &mut Vec<Action>) {
        let Some(place) = &mut self.place else { return };
        let revision = place.assignment.revision;
        let wanted = place.head_ranks_wanted();
        if let Some(Current { work, rows: Some(rows), logits: logits @ None }) = &mut place.current {
            let asked: Vec<u64> = sampled_rows(work, rows).collect();
            if wanted > 0 && !asked.is_empty() {
                *logits = Some(BTreeMap::new());
                for link in place.head_ranks.values() {
                    let asked = Activations { revision, step: work.step, rows: asked.clone() };
                    actions.push(Action::Send(*link, Message::HeadRows(asked)));
                }
                return;
            }
        }
        self.complete(actions);
    }

    /// Passes a computed step on: to the next stage, and to the scheduler.
    fn complete(&mut self, actions: &mut Vec<Action>) {
        let Some(place) = &mut self.place else { return };
        let Some(Current { work, rows: Some(rows), .. }) = place.current.take() else { return };
        let (assignment, revision, step) = (&place.assignment, place.assignment.revision, work.step);
        let timing = StepTiming { compute_us: self.step_us, ..StepTiming::default() };
        let sampled = work.samples.iter().filter_map(|&(id, row)| {
            Some(SampledToken {
                id,
                position: work.rows.get(row)?.position + 1,
                token: oracle::sample(*rows.get(row)?, *place.seeds.get(&id)?),
                logprobs: None,
                grammar_complete: false,
            })
        });
        let last = assignment.stage.0 + 1 == assignment.num_stages;
        let message = if last && assignment.tensor_rank.0 == 0 {
            FromNode::StepResult(StepResult {
                term: assignment.term,
                revision,
                step,
                sampled: sampled.collect(),
                prompt_logprobs: Vec::new(),
                failed: Vec::new(),
                timing,
            })
        } else {
            FromNode::StepDone { revision, step, timing }
        };
        if let Some(next) = place.next.filter(|_| !rows.is_empty()) {
            actions.push(Action::Send(next, Message::Activations(Activations { revision, step, rows })));
        }
        self.tell(message, actions);
    }
}

/// States of the rows whose logits are wanted.
fn sampled_rows<'w>(work: &'w StepWork, rows: &'w [u64]) -> impl Iterator<Item = u64> + 'w {
    work.samples.iter().filter_map(|&(_, row)| rows.get(row).copied())
}
