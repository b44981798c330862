//! From a layout that serves to another one: nodes that leave are replaced, nodes that have joined are made use of.
//!
//! A change is worked out, its slices are brought into memory beside those that serve, and then it takes place at once: its
//! sequences are computed again where they are then. One at a time. A loss meanwhile ends it: it is worked out anew from what
//! is left.

use super::events::{ClusterConfig, Effect, NodeConnection};
use super::place::{Node, Observed, Phase, Replica, Seat};
use super::reconcile::device_report;
use super::{Cluster, LOADING_SILENCE_MS, costs, held};
use crate::time::Millis;
use ashlar_shard_plan::{DeviceReport, Layout, PlanRequest, plan};
use ashlar_vocabulary::{NodeId, ReplicaId, ReplicaRevision};
use std::collections::{BTreeMap, BTreeSet};

/// Another layout takes place only if it is better by this factor: each change costs the sequences in progress a pause, and
/// measured speeds differ from hour to hour.
const BETTER_BY: f64 = 1.25;
/// And no worse by more than this in the other respect.
const WORSE_BY_MAX: f64 = 1.1;

/// A layout on its way.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// Replicas that end with it.
    pub(super) ends: Vec<ReplicaId>,
    /// Those that begin; each seat names its node.
    pub(super) begins: Vec<Replica>,
    /// Nodes that are not ready for it yet, with the revision of the order.
    preparing: BTreeMap<NodeConnection, ReplicaRevision>,
    /// When one of them last said something about it.
    heard: Millis,
    /// For clients and operators.
    reason: String,
}

/// How a replica goes on without some of its nodes.
pub(super) enum WayOut {
    /// Standbys take their places, or all is laid out anew on other nodes.
    Change(Change),
    /// Others serve: its sequences go there.
    OtherReplica,
    /// Not at all, because of this.
    None(String),
}

impl Cluster {
    /// Moves the layout towards what the nodes that stay can do best.
    pub(super) fn change_layout(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if let Some(change) = &self.change
            && now.since(change.heard) > LOADING_SILENCE_MS
        {
            let silent: Vec<NodeConnection> = change.preparing.keys().copied().collect();
            silent.into_iter().for_each(|connection| self.cannot_prepare(connection));
            self.abandon_change(effects);
        }
        if self.change.is_none() {
            let change = match std::mem::take(&mut self.reconsider) {
                true => self.replace_leaving(now, effects),
                false => None,
            };
            if let Some(change) = change.or_else(|| self.growth(now)) {
                self.prepare(now, change, effects);
            }
        }
        if self.change.as_ref().is_some_and(|change| change.preparing.is_empty()) {
            self.switch(now, effects);
        }
        self.dismiss(effects);
    }

    pub(super) fn leaves(&mut self, now: Millis, connection: NodeConnection, leaving: bool) {
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name));
        let Some(node) = node.filter(|node| node.leaving != leaving) else { return };
        (node.leaving, node.dismissed, node.heard) = (leaving, false, now);
        let name = node.join.node.clone();
        if !leaving {
            self.suspicions.lift(&name);
        }
        self.nodes_changed(now);
    }

    pub(super) fn prepared(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        revision: ReplicaRevision,
        outcome: Result<(), String>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(change) = &mut self.change else { return };
        if change.preparing.get(&connection) != Some(&revision) {
            return;
        }
        match outcome {
            Ok(()) => {
                change.preparing.remove(&connection);
                change.heard = now;
            }
            Err(_) => {
                self.cannot_prepare(connection);
                self.abandon_change(effects);
            }
        }
    }

    /// A node is not asked again, as long as it is connected: others are.
    fn cannot_prepare(&mut self, connection: NodeConnection) {
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get_mut(name));
        node.into_iter().for_each(|node| node.unfit = true);
    }

    /// A node has got further with what it prepares.
    pub(super) fn is_preparing(
        &mut self,
        now: Millis,
        connection: NodeConnection,
        revision: ReplicaRevision,
    ) {
        if let Some(change) = &mut self.change
            && change.preparing.get(&connection) == Some(&revision)
        {
            change.heard = now;
        }
    }

    /// A replica that takes nothing in any more has nothing left to do.
    pub(super) fn drained(&mut self, now: Millis, id: ReplicaId, effects: &mut Vec<Effect>) {
        let leaving = self.leaving();
        if self.replicas.get(&id).is_some_and(|replica| replica.draining && leaves_with(replica, &leaving)) {
            self.unseat(now, id, &leaving, "left", effects);
        }
    }

    /// What was to come does not come; it is worked out anew.
    pub(super) fn abandon_change(&mut self, effects: &mut Vec<Effect>) {
        let Some(change) = self.change.take() else { return };
        (self.unplanned, self.reconsider) = (true, true);
        for name in change.begins.iter().flat_map(|replica| &replica.seats).map(|seat| &seat.node) {
            if let Some(node) = self.nodes.get(name) {
                effects.push(Effect::Prepare { connection: node.connection, order: None });
            }
        }
    }

    /// Nodes that leave, or that do harm.
    pub(super) fn out(&self) -> BTreeSet<NodeId> {
        let is_out = |name: &&NodeId| self.suspicions.is_quarantined(name);
        let harmful = self.nodes.keys().filter(is_out).cloned();
        self.leaving().into_iter().chain(harmful).collect()
    }

    fn leaving(&self) -> BTreeSet<NodeId> {
        self.nodes.iter().filter(|(_, node)| node.leaving).map(|(name, _)| name.clone()).collect()
    }

    /// Takes nodes that leave out of replicas that can do without them, lets drain those that cannot, and says what is to be
    /// changed for the others.
    fn replace_leaving(&mut self, now: Millis, effects: &mut Vec<Effect>) -> Option<Change> {
        let (leaving, out) = (self.leaving(), self.out());
        let ids: Vec<ReplicaId> = self.replicas.keys().copied().collect();
        for id in ids {
            let Some(replica) = self.replicas.get_mut(&id) else { continue };
            let leaves = leaves_with(replica, &leaving);
            if replica.draining && !leaves {
                replica.draining = false;
                effects.push(Effect::ReplicaDrains { replica: id, drains: false });
            }
            let up = replica.phase == Phase::Up;
            if !leaves {
                // One that does harm serves on until somebody can take its place, unless its answers are wrong and others' are not.
                if up && leaves_with(replica, &out) {
                    if let WayOut::Change(change) = self.way_out(id, &out) {
                        return Some(change);
                    }
                    if self.another_is_right(id) {
                        let wrong =
                            out.iter().filter(|node| self.suspicions.is_wrong(node)).cloned().collect();
                        self.unseat(now, id, &wrong, "computed other bits", effects);
                    }
                }
                continue;
            }
            if replica.phase == Phase::Loading {
                // It is about to serve: then it can be changed without ceasing to.
                continue;
            }
            match up.then(|| self.way_out(id, &out)) {
                // It does not serve, or others do.
                None | Some(WayOut::OtherReplica) => self.unseat(now, id, &leaving, "left", effects),
                Some(WayOut::Change(change)) => return Some(change),
                Some(WayOut::None(_)) => {
                    if let Some(replica) = self.replicas.get_mut(&id).filter(|replica| !replica.draining) {
                        replica.draining = true;
                        effects.push(Effect::ReplicaDrains { replica: id, drains: true });
                    }
                }
            }
        }
        None
    }

    /// Whether a replica other than this one serves, on nodes none of which is known to be wrong.
    pub(super) fn another_is_right(&self, id: ReplicaId) -> bool {
        let is_right = |replica: &Replica| {
            let wrong = |seat: &Seat| self.suspicions.is_wrong(&seat.node);
            replica.id != id && replica.phase == Phase::Up && !replica.seats.iter().any(wrong)
        };
        self.replicas.values().any(is_right)
    }

    /// Ends a replica for the sake of these nodes, if it has any of them, and takes them out of it.
    fn unseat(
        &mut self,
        now: Millis,
        id: ReplicaId,
        leaving: &BTreeSet<NodeId>,
        did: &str,
        effects: &mut Vec<Effect>,
    ) {
        let Some(replica) = self.replicas.get_mut(&id).filter(|replica| leaves_with(replica, leaving)) else {
            return;
        };
        let mut gone = Vec::new();
        for seat in replica.seats.iter_mut().filter(|seat| seat.taken && leaving.contains(&seat.node)) {
            seat.taken = false;
            gone.push(seat.node.clone());
        }
        let trouble = format!("node {} {did}", join_names(&gone));
        let revision = self.new_revision();
        self.stop(Some(id), Phase::Vacant { since: now }, trouble, effects);
        self.abandon_change(effects);
        self.release(&gone, revision, effects);
    }

    /// Takes their places from nodes, whatever they are doing there.
    fn release(&mut self, nodes: &[NodeId], revision: ReplicaRevision, effects: &mut Vec<Effect>) {
        for name in nodes {
            let Some(node) = self.nodes.get_mut(name) else { continue };
            node.place = None;
            node.observed = Observed::Standby;
            effects.push(Effect::Release { connection: node.connection, revision });
        }
    }

    /// Tells nodes that leave and hold nothing that they may go.
    fn dismiss(&mut self, effects: &mut Vec<Effect>) {
        let gone = |node: &&mut Node| node.leaving && node.place.is_none() && !node.dismissed;
        for node in self.nodes.values_mut().filter(gone) {
            node.dismissed = true;
            effects.push(Effect::Dismiss { connection: node.connection });
        }
    }

    /// What nodes that have joined are good for, once nobody joins any more and everything serves.
    fn growth(&mut self, now: Millis) -> Option<Change> {
        let settled = now.since(self.changed) >= self.config.settle_ms;
        let up = |replica: &Replica| replica.phase == Phase::Up && !replica.draining;
        let whole = !self.replicas.is_empty() && self.replicas.values().all(up);
        if !self.unplanned || !settled || !whole {
            return None;
        }
        self.unplanned = false;
        let leaving = self.out();
        self.another_replica(&leaving).or_else(|| self.better_cut(&leaving))
    }

    /// How a replica that serves goes on without the nodes that leave.
    pub(super) fn way_out(&self, id: ReplicaId, leaving: &BTreeSet<NodeId>) -> WayOut {
        let Some(replica) = self.replicas.get(&id) else { return WayOut::OtherReplica };
        if let Some(replaced) = self.with_standbys(replica, leaving) {
            let reason = format!("node {} leaves", join_names(&gone_from(replica, leaving)));
            return WayOut::Change(Change::new(vec![id], vec![replaced], reason));
        }
        // One with a node that does harm serves nevertheless.
        let really = self.leaving();
        let serves =
            |other: &Replica| other.id != id && other.phase == Phase::Up && !leaves_with(other, &really);
        if self.replicas.values().any(serves) {
            return WayOut::OtherReplica;
        }
        if !self.is_free_to_choose() {
            let gone = join_names(&gone_from(replica, leaving));
            return WayOut::None(format!(
                "no standby has the memory for the place of node {gone}, no other replica serves, and the configuration fixes the \
                 layout: let another node join first"
            ));
        }
        let devices = self.devices(|node| !leaving.contains(&node.join.node));
        match self.layout(&devices, &costs::plan_request(&self.config)) {
            Ok(layout) => {
                let gone = join_names(&gone_from(replica, leaving));
                WayOut::Change(self.instead_of_all(&layout, format!("node {gone} leaves")))
            }
            Err(problem) => WayOut::None(format!("without it the model cannot be laid out: {problem}")),
        }
    }

    /// The replica with standbys in the places of those who leave.
    fn with_standbys(&self, replica: &Replica, leaving: &BTreeSet<NodeId>) -> Option<Replica> {
        let mut replaced = replica.clone();
        let mut taken = BTreeSet::new();
        for seat in replaced.seats.iter_mut().filter(|seat| leaving.contains(&seat.node)) {
            let slice = held::slice_of(&self.config, replica, seat);
            let free = |node: &&Node| {
                let insists = node.join.layers.is_some_and(|layers| layers != seat.place.layers);
                node.place.is_none()
                    && !node.unfit
                    && !insists
                    && !leaving.contains(&node.join.node)
                    && !taken.contains(&node.join.node)
                    && node.join.memory >= seat.ledger.total
            };
            // Whoever has the slice in memory need not load it.
            let holds = |node: &&Node| node.holds.as_ref() != Some(&slice);
            let standby = self.nodes.values().filter(free).min_by_key(holds)?;
            seat.node = standby.join.node.clone();
            taken.insert(seat.node.clone());
        }
        Some(replaced)
    }

    /// What nodes that have no place could serve beside the others.
    fn another_replica(&self, leaving: &BTreeSet<NodeId>) -> Option<Change> {
        if self.config.replicas.is_some() {
            return None;
        }
        let devices = self.devices(|node| node.place.is_none() && !leaving.contains(&node.join.node));
        if devices.is_empty() {
            return None;
        }
        let layout = self.layout(&devices, &costs::plan_request(&self.config)).ok()?;
        let free = (0..).map(ReplicaId).filter(|id| !self.replicas.contains_key(id));
        let begins = self.replicas_of(self.changed, &layout, free);
        Some(Change::new(Vec::new(), begins, "nodes have joined".to_owned()))
    }

    /// Another cut over all nodes that stay, if it is much better.
    fn better_cut(&self, leaving: &BTreeSet<NodeId>) -> Option<Change> {
        let ranges = |node: &Node| node.join.layers.is_some();
        if !self.is_free_to_choose() || self.nodes.values().any(ranges) {
            return None;
        }
        let request = costs::plan_request(&self.config);
        let all = self.layout(&self.devices(|node| !leaving.contains(&node.join.node)), &request).ok()?;
        let stages = self.replicas.values().next().map(|replica| replica.num_stages);
        let present = PlanRequest { stages, replicas: Some(self.replicas.len()), ..request };
        let seated: Vec<DeviceReport> =
            self.nodes.values().filter(|node| node.place.is_some()).map(device_report).collect();
        let seated = self.layout(&seated, &present).ok()?;
        is_better(&all, &seated).then(|| self.instead_of_all(&all, "nodes have joined".to_owned()))
    }

    pub(super) fn instead_of_all(&self, layout: &Layout, reason: String) -> Change {
        let begins = self.replicas_of(self.changed, layout, (0..).map(ReplicaId));
        Change::new(self.replicas.keys().copied().collect(), begins, reason)
    }

    /// The operator has left something of the layout to us.
    fn is_free_to_choose(&self) -> bool {
        self.config.stages.is_none() || self.config.replicas.is_none()
    }

    /// Nodes of this kind on which something could be prepared.
    fn devices(&self, which: impl Fn(&Node) -> bool) -> Vec<DeviceReport> {
        self.nodes.values().filter(|node| which(node) && !node.unfit).map(device_report).collect()
    }

    pub(super) fn layout(&self, devices: &[DeviceReport], request: &PlanRequest) -> Result<Layout, String> {
        let ClusterConfig { shape, links, .. } = &self.config;
        let layout = plan(shape, devices, links, request).map_err(|error| error.to_string())?;
        Ok(held::prefer(&self.config, layout, &self.nodes, devices, request))
    }

    /// Orders what has to be in memory before the change.
    pub(super) fn prepare(&mut self, now: Millis, mut change: Change, effects: &mut Vec<Effect>) {
        change.heard = now;
        if !change.ends.is_empty() {
            let revision = self.new_revision();
            for replica in &mut change.begins {
                replica.revision = revision;
            }
            for replica in &change.begins {
                for seat in &replica.seats {
                    let Some(node) = self.nodes.get(&seat.node) else { continue };
                    if node.holds.as_ref() == Some(&held::slice_of(&self.config, replica, seat)) {
                        continue;
                    }
                    change.preparing.insert(node.connection, revision);
                    let weights = seat.ledger.weights + seat.ledger.embedding + seat.ledger.head;
                    let order = Some((Box::new(self.assignment(replica, seat)), weights));
                    effects.push(Effect::Prepare { connection: node.connection, order });
                }
            }
        }
        self.change = Some(change);
    }

    /// The change takes place.
    fn switch(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let Some(change) = self.change.take() else { return };
        // Other replicas may have to change, too.
        self.reconsider = true;
        let mut former: Vec<NodeId> = Vec::new();
        for id in change.ends {
            self.stop(Some(id), Phase::Vacant { since: now }, change.reason.clone(), effects);
            let seats = self.replicas.remove(&id).map(|replica| replica.seats).unwrap_or_default();
            former.extend(seats.into_iter().filter(|seat| seat.taken).map(|seat| seat.node));
        }
        for name in &former {
            if let Some(node) = self.nodes.get_mut(name) {
                node.place = None;
            }
        }
        for mut replica in change.begins {
            replica.phase = Phase::Vacant { since: now };
            replica.draining = false;
            replica.trouble = Some(change.reason.clone());
            for seat in &mut replica.seats {
                let node = self.nodes.get_mut(&seat.node).filter(|node| node.place.is_none());
                seat.taken = node.is_some();
                if let Some(node) = node {
                    node.place = Some(seat.place);
                }
            }
            self.replicas.insert(replica.id, replica);
        }
        let without = |name: &NodeId| self.nodes.get(name).is_some_and(|node| node.place.is_none());
        let out: Vec<NodeId> = former.into_iter().filter(without).collect();
        let revision = self.new_revision();
        self.release(&out, revision, effects);
    }
}

impl Change {
    fn new(ends: Vec<ReplicaId>, begins: Vec<Replica>, reason: String) -> Change {
        Change { ends, begins, preparing: BTreeMap::new(), heard: Millis(0), reason }
    }
}

/// Whether one of its nodes leaves.
fn leaves_with(replica: &Replica, leaving: &BTreeSet<NodeId>) -> bool {
    replica.seats.iter().any(|seat| seat.taken && leaving.contains(&seat.node))
}

fn gone_from(replica: &Replica, leaving: &BTreeSet<NodeId>) -> Vec<NodeId> {
    replica.seats.iter().map(|seat| &seat.node).filter(|node| leaving.contains(node)).cloned().collect()
}

fn join_names(names: &[NodeId]) -> String {
    let names: Vec<&str> = names.iter().map(|name| name.0.as_str()).collect();
    names.join(", ")
}

/// Whether a layout serves so much more, or so much faster, that a change is worth its pause.
fn is_better(other: &Layout, present: &Layout) -> bool {
    let throughput = |layout: &Layout| {
        layout.replicas.iter().map(|replica| replica.prediction.tokens_per_s_batch_16).sum::<f64>()
    };
    let latency = |layout: &Layout| {
        layout.replicas.iter().map(|replica| replica.prediction.seconds_per_token).fold(0.0, f64::max)
    };
    let more = throughput(other) / throughput(present);
    let faster = latency(present) / latency(other);
    (more >= BETTER_BY && faster >= 1.0 / WORSE_BY_MAX) || (faster >= BETTER_BY && more >= 1.0 / WORSE_BY_MAX)
}
