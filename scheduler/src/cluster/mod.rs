//! Membership and layout as a pure function of events.
//!
//! Layout: [`events`] (what goes in and out), `place` (nodes and their places), `reconcile` (from intent to what is
//! observed), `change` (from a layout that serves to another one), `quarantine` (nodes that do harm), `costs` (stage times and KV blocks), `held` (what nodes hold already), `wishes` (what operators ask of the layout),
//! `snapshot` (what others may know).
//!
//! **Invariants:** no tokio, clock, randomness or I/O. Where a node belongs (intent) and how far it is (observed) are
//! separate; after each event the difference is closed as far as possible. Every assignment of a replica has a new
//! revision, unique over all terms. A replica serves only while all its ranks have reported ready at its revision.

mod change;
mod costs;
pub mod events;
mod held;
mod place;
mod quarantine;
mod reconcile;
mod salvage;
mod snapshot;
mod wishes;

pub use events::{ClusterConfig, Effect, Event, NodeConnection, Spent};
pub use snapshot::{Member, could_hold};

use crate::jobs::{RankRoom, TrainingRank, TrainingReplica};
use crate::time::Millis;
use ashlar_protocol::membership::{Join, KEPT_BLOCKS_MAX};
use ashlar_protocol::step::StepTiming;
use ashlar_protocol::training::TrainingTiming;
use ashlar_vocabulary::{Bytes, LeaseTerm, NodeId, ReplicaId, ReplicaRevision, StageIndex};
use change::Change;
use place::{Node, Observed, Phase, Replica};
use quarantine::Suspicions;
use std::collections::{BTreeMap, BTreeSet};

/// How often the shell ticks.
pub const TICK_MS: u64 = 50;
/// A gap between ticks that means that this process itself stood still; silence is then not held against anybody.
const STALLED_MS: u64 = 300;
/// A node that was heard this lately lives: another process of its name does not take its place.
const ALIVE_MS: u64 = 1_000;
/// Longest silence of a node without work.
const IDLE_SILENCE_MS: u64 = 10_000;
/// Longest silence of a node that fetches, verifies and loads weights; its death is seen as the end of its connection.
const LOADING_SILENCE_MS: u64 = 600_000;
/// A replica whose weights could not be loaded this often since it last served is not waited for.
const LASTING_FAILURES: u32 = 2;
/// Revisions of one term: `term × REVISIONS_PER_TERM + n`, so that they rise over all terms.
const REVISIONS_PER_TERM: u64 = 1_000_000;

/// Membership and layout of one model.
#[derive(Debug, Clone)]
pub struct Cluster {
    config: ClusterConfig,
    nodes: BTreeMap<NodeId, Node>,
    connections: BTreeMap<NodeConnection, NodeId>,
    replicas: BTreeMap<ReplicaId, Replica>,
    revisions: u64,
    /// Whether there has been a layout.
    begun: bool,
    /// When the set of nodes last changed.
    changed: Millis,
    /// Whether it has changed since the last attempt to plan.
    unplanned: bool,
    /// Why there is no layout.
    plan_problem: Option<String>,
    /// Whether the nodes that are there cannot hold the model.
    does_not_fit: bool,
    problem: Option<String>,
    lasting_problem: bool,
    last_tick: Option<Millis>,
    /// Another layout that is being prepared: one at a time.
    change: Option<Change>,
    /// Whether nodes that leave are to be looked at again.
    reconsider: bool,
    suspicions: Suspicions,
}

impl Cluster {
    /// A cluster that nobody has joined. It has a problem (no nodes), which the first event reports.
    pub fn new(config: ClusterConfig) -> Cluster {
        Cluster {
            config,
            nodes: BTreeMap::new(),
            connections: BTreeMap::new(),
            replicas: BTreeMap::new(),
            revisions: 0,
            begun: false,
            changed: Millis(0),
            unplanned: false,
            plan_problem: None,
            does_not_fit: false,
            problem: None,
            lasting_problem: false,
            last_tick: None,
            change: None,
            reconsider: false,
            suspicions: Suspicions::default(),
        }
    }

    /// Applies one event, then closes what difference between intent and observation can be closed.
    pub fn handle(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        let is_routine = matches!(event, Event::Heard { .. });
        match event {
            Event::Join { connection, join } => self.join(now, connection, *join, effects),
            Event::Lost { connection, reason } => {
                if let Some(node) = self.connections.get(&connection).cloned() {
                    self.lose(now, &node, &reason, effects);
                }
            }
            Event::Loading { connection, revision, loaded, total } => {
                self.is_preparing(now, connection, revision);
                self.observe(now, connection, revision, |node| {
                    let share = loaded.0 as f32 / total.0.max(1) as f32;
                    node.observed = Observed::Loading { revision, share: share.clamp(0.0, 1.0) };
                });
            }
            Event::Ready { connection, revision, reserved, resident, kept, logged } => {
                let replica = self.observe(now, connection, revision, |node| {
                    node.observed = Observed::Ready { revision };
                    (node.reserved, node.resident) = (reserved, resident);
                    node.kept = kept.into_iter().take(KEPT_BLOCKS_MAX).collect();
                    node.logged = logged;
                });
                self.holds_its_slice(connection, replica);
            }
            Event::Failed { connection, revision, message, weights } => {
                self.failed(now, connection, revision, (message, weights), effects);
            }
            Event::Refused { connection, term } => self.refused(now, connection, term, effects),
            Event::GatewayRefused { term } => self.gateway_refused(term, effects),
            Event::Leaving { connection, leaving } => self.leaves(now, connection, leaving),
            Event::Prepared { connection, revision, outcome } => {
                self.prepared(now, connection, revision, outcome, effects);
            }
            Event::Replan => self.replan(now, effects),
            Event::Drained { replica } => self.drained(now, replica, effects),
            Event::Differs { replica, revision, layers } => self.differs(replica, revision, layers, effects),
            Event::NotFinite { connection, revision, sequences } => {
                self.not_finite(connection, revision, sequences, effects);
            }
            Event::Heard { connection, spent } => self.heard(now, connection, spent, effects),
            Event::ReplicaFault { replica, revision, reason } => {
                self.fault(now, replica, revision, reason, effects);
            }
            Event::Tick { slowest_step_ms } => self.tick(now, slowest_step_ms, effects),
        }
        // Thousands of these per second change nothing but figures; what time brings comes with a tick.
        if !is_routine || self.reconsider {
            self.reconcile(now, effects);
        }
    }

    /// The connections of a replica's ranks, to which its step plans go.
    pub fn connections_of(&self, replica: ReplicaId) -> Vec<NodeConnection> {
        let seats = self.replicas.get(&replica).map(|replica| replica.seats.as_slice()).unwrap_or_default();
        let nodes = seats.iter().filter(|seat| seat.taken).filter_map(|seat| self.nodes.get(&seat.node));
        nodes.map(|node| node.connection).collect()
    }

    /// A replica as jobs train on it: its ranks with their addresses, layers and room.
    pub fn training_replica(&self, id: ReplicaId) -> Option<TrainingReplica> {
        let replica = self.replicas.get(&id)?;
        let rank = |seat: &place::Seat| {
            let node = self.nodes.get(&seat.node).filter(|_| seat.taken)?;
            Some(TrainingRank {
                connection: node.connection,
                address: node.join.data_address.clone(),
                stage: seat.place.stage,
                rank: seat.place.rank,
                layers: seat.place.layers,
                room: RankRoom {
                    node: seat.node.clone(),
                    capacity: node.join.memory,
                    serving: node.reserved,
                    threads: node.join.threads,
                    piece: costs::piece(seat, replica),
                },
            })
        };
        let ranks: Option<Vec<TrainingRank>> = replica.seats.iter().map(rank).collect();
        Some(TrainingReplica { replica: id, revision: replica.revision, ranks: ranks? })
    }

    /// Bytes of its memory that the node of a connection has not reserved for serving.
    pub fn room_of(&self, connection: NodeConnection) -> Bytes {
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get(name));
        node.map_or(Bytes(0), |node| Bytes(node.join.memory.0.saturating_sub(node.reserved.0)))
    }

    /// Replicas that take nothing in any more and wait until they have nothing left to do.
    pub fn draining(&self) -> Vec<ReplicaId> {
        let draining = self.replicas.values().filter(|replica| replica.draining);
        draining.map(|replica| replica.id).collect()
    }

    /// The connection of a node that has joined.
    pub fn connection_of(&self, node: &NodeId) -> Option<NodeConnection> {
        self.nodes.get(node).map(|node| node.connection)
    }

    /// Where the node of a connection stands: its replica and stage.
    pub fn place_of(&self, connection: NodeConnection) -> Option<(ReplicaId, StageIndex)> {
        let place = self.nodes.get(self.connections.get(&connection)?)?.place?;
        Some((place.replica, place.stage))
    }

    /// Why nothing can be served, if so.
    pub fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    fn join(&mut self, now: Millis, connection: NodeConnection, join: Join, effects: &mut Vec<Effect>) {
        if join.term > self.config.term {
            effects.push(Effect::Fenced { by: join.term });
            let reason = format!(
                "node {} has accepted term {}, this scheduler leads at term {}",
                join.node, join.term, self.config.term
            );
            effects.push(Effect::Disconnect { connection, reason });
            return;
        }
        if let Some(former) = self.connections.get(&connection).cloned() {
            self.lose(now, &former, "it joined twice", effects);
            effects.push(Effect::Disconnect { connection, reason: format!("node {former} joined twice") });
            return;
        }
        let name = join.node.clone();
        if let Some(former) = self.nodes.get(&name)
            && former.join.data_address != join.data_address
            && now.since(former.heard) < ALIVE_MS
        {
            // It comes back by itself, should the other one be gone and its end not be seen yet.
            let reason = format!(
                "another process is node {name} already, at {}, and lives: stop one of the two, or let the machine at {} join under a \
                 name of its own",
                former.join.data_address, join.data_address
            );
            effects.push(Effect::Disconnect { connection, reason });
            return;
        }
        if let Some(former) = self.nodes.get(&name).map(|node| node.connection) {
            // A node that came back before its old connection was seen to end.
            self.lose(now, &name, "it connected anew", effects);
            let reason = format!("node {name} connected anew");
            effects.push(Effect::Disconnect { connection: former, reason });
        }
        if let Some(signal) = join.crashed {
            // Who was with it when it crashed waits to be computed again.
            let seat = |replica: &&Replica| replica.seats.iter().any(|seat| seat.node == name);
            if let Some(replica) = self.replicas.values().find(seat).map(|replica| replica.id) {
                let reason = format!("node {name} had crashed by signal {signal}");
                effects.push(Effect::ReplicaCrashed { replica, reason });
            }
        }
        self.connections.insert(connection, name.clone());
        let node = Node {
            connection,
            holds: join.holds.clone(),
            leaving: join.leaving,
            unfit: false,
            dismissed: false,
            join,
            heard: now,
            place: None,
            observed: Observed::Standby,
            reserved: Bytes(0),
            kept: BTreeSet::new(),
            logged: false,
            resident: Bytes(0),
            busy: StepTiming::default(),
            trained: TrainingTiming::default(),
        };
        self.nodes.insert(name, node);
        self.nodes_changed(now);
    }

    fn nodes_changed(&mut self, now: Millis) {
        (self.changed, self.unplanned, self.reconsider) = (now, true, true);
    }

    /// Removes a node; a replica that it took part in serves no longer.
    fn lose(&mut self, now: Millis, name: &NodeId, reason: &str, effects: &mut Vec<Effect>) {
        let Some(node) = self.nodes.remove(name) else { return };
        self.connections.remove(&node.connection);
        // What was to come may rest on it.
        self.abandon_change(effects);
        self.nodes_changed(now);
        let Some(replica) = node.place.and_then(|place| self.replicas.get_mut(&place.replica)) else {
            return;
        };
        for seat in replica.seats.iter_mut().filter(|seat| &seat.node == name) {
            seat.taken = false;
        }
        let trouble = format!("node {name} was lost: {reason}");
        self.stop(node.place.map(|place| place.replica), Phase::Vacant { since: now }, trouble, effects);
    }

    /// A replica does not serve any more, or not yet.
    fn stop(&mut self, id: Option<ReplicaId>, phase: Phase, trouble: String, effects: &mut Vec<Effect>) {
        let Some(replica) = id.and_then(|id| self.replicas.get_mut(&id)) else { return };
        // Whoever had to drain has done so: what comes up again is another layout.
        replica.draining = false;
        if replica.phase == Phase::Up {
            effects.push(Effect::ReplicaDown { replica: replica.id, reason: trouble.clone() });
        }
        // A vacancy lasts from when it first arose.
        if !matches!((replica.phase, phase), (Phase::Vacant { .. }, Phase::Vacant { .. })) {
            replica.phase = phase;
        }
        replica.trouble = Some(trouble);
    }

    /// Records what a node reports about its present assignment; about a former one it says nothing of use.
    fn observe(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        revision: ReplicaRevision,
        record: impl FnOnce(&mut Node),
    ) -> Option<ReplicaId> {
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name))?;
        node.heard = now;
        let replica = self.replicas.get(&node.place?.replica)?;
        if replica.revision != revision || !matches!(replica.phase, Phase::Loading | Phase::Up) {
            return None;
        }
        record(node);
        Some(replica.id)
    }

    /// A node that is ready has its seat's slice in memory.
    fn holds_its_slice(&mut self, connection: NodeConnection, replica: Option<ReplicaId>) {
        let Some(replica) = replica.and_then(|id| self.replicas.get(&id)) else { return };
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name));
        let Some(node) = node else { return };
        let seat = replica.seats.iter().find(|seat| seat.node == node.join.node);
        node.holds = seat.map(|seat| held::slice_of(&self.config, replica, seat));
    }

    fn failed(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        revision: ReplicaRevision,
        (message, weights): (String, bool),
        effects: &mut Vec<Effect>,
    ) {
        let observed = Observed::Failed { message: message.clone() };
        let replica = self.observe(now, connection, revision, |node| node.observed = observed);
        if let (Some(replica), Some(name)) = (replica, self.connections.get(&connection).cloned()) {
            if let Some(replica) = self.replicas.get_mut(&replica) {
                replica.unloadable += u32::from(weights);
            }
            self.retry(now, replica, format!("node {name} failed: {message}"), effects);
        }
    }

    fn fault(
        &mut self,
        now: Millis,
        replica: ReplicaId,
        revision: ReplicaRevision,
        reason: String,
        effects: &mut Vec<Effect>,
    ) {
        if self.replicas.get(&replica).is_some_and(|replica| replica.revision == revision) {
            self.retry(now, replica, reason, effects);
        }
    }

    /// Lays a replica out again after a pause that grows with each failure.
    fn retry(&mut self, now: Millis, id: ReplicaId, trouble: String, effects: &mut Vec<Effect>) {
        self.abandon_change(effects);
        self.reconsider = true;
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        let pause_ms = (250u64 << replica.failures.min(7)).min(30_000);
        replica.failures += 1;
        self.stop(Some(id), Phase::Retry { due: now.plus(pause_ms) }, trouble, effects);
    }

    fn refused(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        term: LeaseTerm,
        effects: &mut Vec<Effect>,
    ) {
        // An equal term was granted to another holder, by a store that has forgotten it since: only a higher one helps.
        if term >= self.config.term {
            effects.push(Effect::Fenced { by: term });
        }
        if let Some(name) = self.connections.get(&connection).cloned() {
            self.lose(now, &name, &format!("it obeys the scheduler of term {term}"), effects);
            effects.push(Effect::Disconnect { connection, reason: format!("obeys term {term}") });
        }
    }

    fn gateway_refused(&mut self, term: LeaseTerm, effects: &mut Vec<Effect>) {
        if term > self.config.term {
            effects.push(Effect::Fenced { by: term });
        }
    }

    fn heard(&mut self, now: Millis, connection: NodeConnection, spent: Spent, effects: &mut Vec<Effect>) {
        let Some(node) = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name)) else {
            return;
        };
        node.heard = now;
        match spent {
            Spent::Nothing => {}
            Spent::Serving(step, timing) => {
                node.busy.add(&timing);
                self.spent(connection, step, timing, effects);
            }
            Spent::Training(timing) => node.trained.add(&timing),
        }
    }

    fn tick(&mut self, now: Millis, slowest_step_ms: u64, effects: &mut Vec<Effect>) {
        let gap = self.last_tick.map_or(0, |last| now.since(last));
        self.last_tick = Some(now);
        if gap > STALLED_MS {
            // This process was stopped or starved: what nodes said meanwhile is still unread.
            self.nodes.values_mut().for_each(|node| node.heard = node.heard.plus(gap).min(now));
        }
        let ready_limit = self.config.silence_ms_max.max(4 * slowest_step_ms);
        let silent = |node: &&Node| {
            let limit = match node.observed {
                Observed::Ready { .. } => ready_limit,
                Observed::Standby | Observed::Failed { .. } => ready_limit.max(IDLE_SILENCE_MS),
                Observed::Loading { .. } => LOADING_SILENCE_MS,
            };
            now.since(node.heard) > limit
        };
        let silent: Vec<(NodeId, NodeConnection, u64)> = self
            .nodes
            .values()
            .filter(silent)
            .map(|node| (node.join.node.clone(), node.connection, now.since(node.heard)))
            .collect();
        for (name, connection, silence_ms) in silent {
            let reason = format!("nothing heard from it for {silence_ms} ms");
            self.lose(now, &name, &reason, effects);
            effects.push(Effect::Disconnect { connection, reason });
        }
    }
}
