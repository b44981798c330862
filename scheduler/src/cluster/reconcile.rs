//! From intent to what is observed: plan, seat, assign, and declare up.

use super::place::{Node, Observed, Phase, Replica, Seat};
use super::quarantine::LinkWatch;
use super::{Cluster, Effect, LASTING_FAILURES, REVISIONS_PER_TERM, costs, held, salvage};
use crate::engine::ReplicaUp;
use crate::time::Millis;
use ashlar_protocol::membership::{Assignment, SOURCES_MAX};
use ashlar_shard_plan::{DeviceReport, Layout, plan};
use ashlar_vocabulary::{HeadSlice, ModelDigest, NodeId, ReplicaId, ReplicaRevision};
use std::collections::BTreeMap;

impl Cluster {
    /// Closes the difference between what is intended and what is observed, as far as that is possible now.
    pub(super) fn reconcile(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        self.abandon_hopeless_layout(now, effects);
        if self.replicas.is_empty() {
            self.plan_layout(now);
        }
        self.change_layout(now, effects);
        let replicas: Vec<ReplicaId> = self.replicas.keys().copied().collect();
        for id in replicas {
            self.seat(id);
            self.assign_if_due(now, id, effects);
            self.declare_up(id, effects);
        }
        self.update_problem(effects);
    }

    /// A layout none of whose replicas serves, with a place vacant for long, is given up where the operator has left the
    /// layout to us: what is left may carry another one.
    fn abandon_hopeless_layout(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let free_choice = self.config.stages.is_none() || self.config.replicas.is_none();
        let hopeless = |replica: &Replica| match replica.phase {
            Phase::Vacant { since } => now.since(since) > self.config.replan_after_ms,
            Phase::Retry { .. } | Phase::Loading | Phase::Up => false,
        };
        if !free_choice || self.replicas.is_empty() || !self.replicas.values().all(hopeless) {
            return;
        }
        self.replicas.clear();
        self.unplanned = true;
        let revision = self.new_revision();
        for node in self.nodes.values_mut().filter(|node| node.place.is_some()) {
            node.place = None;
            node.observed = Observed::Standby;
            effects.push(Effect::Release { connection: node.connection, revision });
        }
    }

    /// Plans once enough nodes are there, and again only when others are.
    fn plan_layout(&mut self, now: Millis) {
        let config = &self.config;
        let fixed = config.stages.is_some() && config.replicas.is_some();
        let sizes = [config.stages, config.tensor_parallel_size, config.replicas];
        let needed: usize = sizes.iter().map(|size| size.unwrap_or(1)).product();
        // Those who are about to leave have come, and only the first layout waits for all.
        let expected = config.expected_nodes.filter(|_| !self.begun).unwrap_or(1);
        let mut staying: Vec<&Node> = self.nodes.values().filter(|node| !node.leaving).collect();
        let harmless = |node: &&Node| !self.suspicions.is_quarantined(&node.join.node);
        // One that does harm is better than nobody.
        if staying.iter().copied().filter(|node| harmless(node)).count() >= needed {
            staying.retain(harmless);
        }
        let (joined, present) = (self.nodes.len(), staying.len());
        if joined < expected || present < needed {
            let (present, wanted) =
                if present < needed { (present, needed.max(expected)) } else { (joined, expected) };
            self.plan_problem = Some(format!("waiting for nodes: {present} of {wanted} have joined"));
            return;
        }
        let settled = now.since(self.changed) >= config.settle_ms;
        if !self.unplanned || !(fixed || config.expected_nodes.is_some() || settled) {
            return;
        }
        (self.unplanned, self.does_not_fit) = (false, false);
        let devices: Vec<DeviceReport> = staying.into_iter().map(device_report).collect();
        let request = costs::plan_request(config);
        match plan(&config.shape, &devices, &config.links, &request) {
            Ok(layout) => {
                let layout = held::prefer(config, layout, &self.nodes, &devices, &request);
                self.plan_problem = None;
                for replica in self.replicas_of(now, &layout, (0..).map(ReplicaId)) {
                    self.replicas.insert(replica.id, replica);
                }
            }
            Err(error) => (self.plan_problem, self.does_not_fit) = (Some(error.to_string()), true),
        }
    }

    /// The replicas of a layout, nobody seated yet.
    pub(super) fn replicas_of(
        &self,
        now: Millis,
        layout: &Layout,
        ids: impl Iterator<Item = ReplicaId>,
    ) -> Vec<Replica> {
        let memory = |node: &NodeId| self.nodes.get(node).map_or(0, |node| node.join.memory.0);
        let of =
            |(id, replica)| Replica::new(id, replica, costs::kv_blocks(&self.config, replica, memory), now);
        ids.zip(&layout.replicas).map(of).collect()
    }

    /// Fills a replica's vacant places: with who was there before, else with a standby that has the memory.
    fn seat(&mut self, id: ReplicaId) {
        let another_is_right = self.another_is_right(id);
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        // One that does harm is the last resort, and one that is wrong not even that as long as another replica is right.
        let ways = [(true, true), (false, true), (true, false), (false, false)];
        for (former, harmless) in ways {
            let unwanted = |name: &NodeId| {
                harmless && self.suspicions.is_quarantined(name)
                    || another_is_right && self.suspicions.is_wrong(name)
            };
            for seat in replica.seats.iter_mut().filter(|seat| !seat.taken) {
                let fits = |node: &&mut Node| {
                    let insists = node.join.layers.is_some_and(|layers| layers != seat.place.layers);
                    node.place.is_none()
                        && !node.leaving
                        && !unwanted(&node.join.node)
                        && if former {
                            node.join.node == seat.node
                        } else {
                            node.join.memory >= seat.ledger.without_log() && !insists
                        }
                };
                if let Some(node) = self.nodes.values_mut().find(fits) {
                    node.place = Some(seat.place);
                    seat.node = node.join.node.clone();
                    seat.taken = true;
                }
            }
        }
    }

    /// Sends a complete replica's assignments, under a new revision.
    fn assign_if_due(&mut self, now: Millis, id: ReplicaId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&id) else { return };
        let due = match replica.phase {
            Phase::Vacant { .. } => replica.complete(),
            Phase::Retry { due } => replica.complete() && due <= now,
            Phase::Loading | Phase::Up => false,
        };
        if !due {
            return;
        }
        let revision = self.new_revision();
        let Some(replica) = self.replicas.get_mut(&id) else { return };
        replica.revision = revision;
        replica.phase = Phase::Loading;
        replica.links = LinkWatch::default();
        let Some(replica) = self.replicas.get(&id) else { return };
        for seat in &replica.seats {
            let Some(node) = self.nodes.get(&seat.node) else { continue };
            let assignment = Box::new(self.assignment(replica, seat));
            effects.push(Effect::Assign { connection: node.connection, assignment });
        }
        for seat in &replica.seats {
            if let Some(node) = self.nodes.get_mut(&seat.node) {
                // For another slice it gives up what it has.
                let slice = held::slice_of(&self.config, replica, seat);
                node.holds.take_if(|holds| *holds != slice);
                node.observed = Observed::Loading { revision, share: 0.0 };
                node.heard = now;
                (node.reserved, node.busy) = Default::default();
                node.kept.clear();
                node.logged = false;
            }
        }
    }

    /// What the rank of a seat is told, under the replica's revision.
    pub(super) fn assignment(&self, replica: &Replica, seat: &Seat) -> Assignment {
        let address = |stage: usize, rank: usize| {
            let node = replica.seat(stage, rank).and_then(|seat| self.nodes.get(&seat.node));
            node.map(|node| node.join.data_address.clone())
        };
        let config = &self.config;
        let (stage, rank) = (seat.place.stage.0 as usize, seat.place.rank.0 as usize);
        let (stages, ranks) = (replica.num_stages, replica.tensor_parallel_size);
        let head = HeadSlice::of_rank(replica.spread_head, (stage, stages), (rank, ranks));
        let earlier = stage + 1 < stages;
        Assignment {
            term: config.term,
            holder: config.holder.clone(),
            revision: replica.revision,
            replica: replica.id,
            model: config.model.clone(),
            precision: config.precision,
            model_digest: config.model_digest,
            stage: seat.place.stage,
            num_stages: stages as u32,
            layers: seat.place.layers,
            tensor_rank: seat.place.rank,
            tensor_parallel_size: ranks as u32,
            kv_blocks: replica.kv_blocks,
            boundary_log: replica.boundary_log && earlier && self.has_room(seat),
            max_num_batched_tokens: config.max_num_batched_tokens,
            group: (0..ranks).filter_map(|rank| address(stage, rank)).collect(),
            next: if earlier { address(stage + 1, rank) } else { None },
            head,
            sampler: if earlier && head.is_some() { address(stages - 1, 0) } else { None },
            sources: sources(config.model_digest, replica, &self.nodes, &seat.node),
        }
    }

    /// Whether who takes this place has the memory for all that the plan has in it.
    fn has_room(&self, seat: &Seat) -> bool {
        self.nodes.get(&seat.node).is_some_and(|node| node.join.memory >= seat.ledger.total)
    }

    /// A replica all of whose ranks are ready serves.
    fn declare_up(&mut self, id: ReplicaId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.get(&id).filter(|replica| replica.phase == Phase::Loading) else {
            return;
        };
        let ready = Observed::Ready { revision: replica.revision };
        let all = replica
            .seats
            .iter()
            .all(|seat| seat.taken && self.nodes.get(&seat.node).is_some_and(|node| node.observed == ready));
        if !all {
            return;
        }
        let (kept, lost) = salvage::of(replica, &self.nodes);
        effects.push(Effect::ReplicaUp(ReplicaUp {
            replica: id,
            term: self.config.term,
            revision: replica.revision,
            kv_blocks: replica.kv_blocks,
            kept,
            lost,
            stages: costs::stage_costs(&self.config, replica, &self.nodes),
        }));
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.phase = Phase::Up;
            self.reconsider = true;
            (replica.failures, replica.unloadable) = (0, 0);
            replica.trouble = None;
        }
    }

    fn update_problem(&mut self, effects: &mut Vec<Effect>) {
        let (problem, lasting) = (self.describe_problem(), self.is_lasting());
        if (&problem, lasting) != (&self.problem, self.lasting_problem) {
            (self.problem, self.lasting_problem) = (problem.clone(), lasting);
            effects.push(Effect::Problem { problem, lasting });
        }
    }

    /// Whether it takes more than time until something can be served: the model does not fit, or cannot be loaded.
    fn is_lasting(&self) -> bool {
        let fails = |replica: &Replica| replica.unloadable >= LASTING_FAILURES;
        match self.replicas.is_empty() {
            true => self.does_not_fit,
            false => self.replicas.values().all(fails),
        }
    }

    /// Why nothing can be served; the most specific reason known.
    fn describe_problem(&self) -> Option<String> {
        if self.replicas.values().any(|replica| replica.phase == Phase::Up) {
            return None;
        }
        let Some(replica) = self.replicas.values().next() else {
            let waiting = || "waiting for nodes to settle before the model is laid out".to_owned();
            return Some(self.plan_problem.clone().unwrap_or_else(waiting));
        };
        let vacant: Vec<&str> =
            replica.seats.iter().filter(|seat| !seat.taken).map(|seat| seat.node.0.as_str()).collect();
        let trouble = replica.trouble.as_deref();
        Some(match replica.phase {
            Phase::Vacant { .. } => format!(
                "{}; waiting for node {} or a standby to join",
                trouble.unwrap_or("a place is vacant"),
                vacant.join(", ")
            ),
            Phase::Retry { .. } => format!("{}; trying again", trouble.unwrap_or("an assignment failed")),
            Phase::Loading | Phase::Up => "the model is being loaded: try again shortly".to_owned(),
        })
    }

    pub(super) fn new_revision(&mut self) -> ReplicaRevision {
        self.revisions += 1;
        self.begun = true;
        ReplicaRevision(self.config.term.0 * REVISIONS_PER_TERM + self.revisions)
    }
}

/// Where `node` may find files of the model that it does not have: at nodes that have weights in memory, of its replica first, then
/// at any.
fn sources(
    model: ModelDigest,
    replica: &Replica,
    nodes: &BTreeMap<NodeId, Node>,
    node: &NodeId,
) -> Vec<String> {
    let mut others: Vec<&Node> = nodes.values().filter(|other| other.join.node != *node).collect();
    let likely = |other: &&Node| {
        let holds = other.holds.as_ref().is_some_and(|holds| holds.model_digest == model);
        (!holds, !replica.seats.iter().any(|seat| seat.node == other.join.node))
    };
    others.sort_by_key(likely);
    others.into_iter().take(SOURCES_MAX).map(|other| other.join.data_address.clone()).collect()
}

pub(super) fn device_report(node: &Node) -> DeviceReport {
    DeviceReport {
        node: node.join.node.clone(),
        memory: node.join.memory,
        bandwidth_bytes_per_s: node.join.bandwidth_bytes_per_s,
        flops_per_s: node.join.flops_per_s,
        quantized_flops_per_s: node.join.quantized_flops_per_s,
        threads: node.join.threads,
        layers: node.join.layers,
    }
}
