//! Nodes that are there but do harm: they compute numbers that are none, or others than the contract says, or a link to them is slow.
//!
//! Another node takes the place of such a one where that is possible, and it stands by as the last resort; otherwise it serves
//! on, for a slow answer is better than none. One that computes wrong bits does so only where no other replica serves. A restart of the scheduler, or an operator, lifts it.

use super::events::{Effect, NodeConnection};
use super::place::{Replica, Seat};
use super::{Cluster, change};
use ashlar_protocol::step::StepTiming;
use ashlar_vocabulary::{LayerRange, NodeId, ReplicaId, ReplicaRevision, SequenceId, StageIndex, StepId};
use std::collections::{BTreeMap, BTreeSet};

/// So many sequences whose numbers are none are no accident.
const NOT_FINITE_MAX: usize = 3;
/// A link is slow if it takes longer than this for rows on their way to the next stage, …
const SLOW_LINK_US: u64 = 20_000;
/// … and so many times as long as computing them, …
const SLOW_LINK_FACTOR: u64 = 2;
/// … in so many steps without one in between that was not slow.
const SLOW_STEPS: u32 = 32;
/// What the latest step counts in the smoothed time that rows travel.
const TRAVEL_WEIGHT: f64 = 0.1;
/// Steps whose times have not come from all stages.
const STEPS_MAX: usize = 64;

/// What speaks against nodes.
#[derive(Debug, Clone, Default)]
pub(super) struct Suspicions {
    /// Nodes whose place is to be taken by others, and why.
    quarantined: BTreeMap<NodeId, Charge>,
    /// Sequences that came to nothing on a node, without an adapter.
    not_finite: BTreeMap<NodeId, BTreeSet<SequenceId>>,
}

#[derive(Debug, Clone)]
enum Charge {
    /// Its numbers were none, of these layers.
    NotFinite(LayerRange),
    /// What it computed of these layers, or in the head, has other bits than what others did.
    Differs(LayerRange),
    /// The link between it and this node is slow.
    SlowLink(NodeId),
}

/// Times of steps from stage to stage.
#[derive(Debug, Clone, Default)]
pub(super) struct LinkWatch {
    steps: BTreeMap<StepId, BTreeMap<usize, StepTiming>>,
    /// By the later stage: slow steps in a row.
    slow: BTreeMap<usize, u32>,
    /// By the later stage: how long rows took on their way there lately (µs), smoothed.
    travel_us: BTreeMap<usize, f64>,
}

impl Suspicions {
    pub(super) fn is_quarantined(&self, node: &NodeId) -> bool {
        self.quarantined.contains_key(node)
    }

    /// Whether a node computes other bits than it should: worse than slowly, or nothing.
    pub(super) fn is_wrong(&self, node: &NodeId) -> bool {
        matches!(self.quarantined.get(node), Some(Charge::Differs(_)))
    }

    /// Why a node is to have no place, for operators.
    pub(super) fn reason(&self, node: &NodeId) -> Option<String> {
        Some(match self.quarantined.get(node)? {
            Charge::NotFinite(layers) => {
                format!("what it computed of layers {layers} was repeatedly not finite")
            }
            Charge::Differs(layers) if layers.is_empty() => {
                "what it computed in the head has other bits than what others computed".to_owned()
            }
            Charge::Differs(layers) => {
                format!("what it computed of layers {layers} has other bits than what others computed")
            }
            Charge::SlowLink(other) => format!("the link between it and node {other} is slow"),
        })
    }

    pub(super) fn lift(&mut self, node: &NodeId) {
        self.quarantined.remove(node);
        self.not_finite.remove(node);
    }
}

impl LinkWatch {
    /// How long rows lately took from each stage to the next, in microseconds.
    pub(super) fn hops_us(&self, num_stages: usize) -> Vec<Option<u64>> {
        (1..num_stages).map(|later| self.travel_us.get(&later).map(|travel| travel.round() as u64)).collect()
    }

    /// Takes a stage's time for a step; the later stage of a link that turns out to be slow.
    fn take(&mut self, stage: usize, step: StepId, timing: StepTiming) -> Option<usize> {
        let times = self.steps.entry(step).or_default();
        times.insert(stage, timing);
        let mut found = None;
        for later in [stage, stage + 1] {
            let Some(earlier) = later.checked_sub(1) else { continue };
            let (Some(sent), Some(received)) = (times.get(&earlier), times.get(&later)) else { continue };
            // A stage that was busy meanwhile has waited for less than its link took: only many steps tell.
            let computing = sent.compute_us + sent.collective_us;
            let link = received.wait_us.saturating_sub(sent.wait_us + computing);
            let travel = self.travel_us.entry(later).or_insert(link as f64);
            *travel += (link as f64 - *travel) * TRAVEL_WEIGHT;
            let count = self.slow.entry(later).or_default();
            *count = if link > SLOW_LINK_US && link > SLOW_LINK_FACTOR * computing { *count + 1 } else { 0 };
            if *count >= SLOW_STEPS {
                *count = 0;
                found = Some(later);
            }
        }
        while self.steps.len() > STEPS_MAX {
            self.steps.pop_first();
        }
        found
    }
}

impl Cluster {
    /// A rank has made numbers that are none of numbers that were.
    pub(super) fn not_finite(
        &mut self,
        connection: NodeConnection,
        revision: ReplicaRevision,
        sequences: Vec<SequenceId>,
        effects: &mut Vec<Effect>,
    ) {
        let Some(name) = self.connections.get(&connection).cloned() else { return };
        let place = self.nodes.get(&name).and_then(|node| node.place);
        let Some(place) = place else { return };
        let current = |replica: &&Replica| {
            // Within a group all ranks see the same sums: none of them can be told from the others.
            replica.revision == revision && replica.tensor_parallel_size == 1
        };
        if self.replicas.get(&place.replica).filter(current).is_none() {
            return;
        }
        let known = self.suspicions.not_finite.entry(name.clone()).or_default();
        known.extend(sequences.into_iter().take(NOT_FINITE_MAX));
        if known.len() < NOT_FINITE_MAX {
            return;
        }
        known.clear();
        let same = |charge: &Charge| matches!(charge, Charge::NotFinite(layers) if *layers == place.layers);
        if self.suspicions.quarantined.values().any(same) {
            // Another node has computed the same: it is the weights, or the requests.
            return;
        }
        self.quarantine(name, Charge::NotFinite(place.layers), effects);
    }

    /// A replica has computed other bits than others, of these layers or in the head. The ranks of a stage cannot be told from one
    /// another, and those of several stages are not accused together.
    pub(super) fn differs(
        &mut self,
        id: ReplicaId,
        revision: ReplicaRevision,
        layers: LayerRange,
        effects: &mut Vec<Effect>,
    ) {
        let current = |replica: &&Replica| replica.revision == revision;
        let Some(replica) = self.replicas.get(&id).filter(current) else { return };
        let did = |seat: &&Seat| {
            let held = seat.place.layers;
            match layers.is_empty() {
                true => seat.place.stage.0 as usize + 1 == replica.num_stages || replica.spread_head,
                false => held.start < layers.end && layers.start < held.end,
            }
        };
        let seats: Vec<&Seat> = replica.seats.iter().filter(did).collect();
        let stages: BTreeSet<StageIndex> = seats.iter().map(|seat| seat.place.stage).collect();
        if stages.len() != 1 {
            return;
        }
        let nodes: Vec<NodeId> =
            seats.iter().filter(|seat| seat.taken).map(|seat| seat.node.clone()).collect();
        for node in nodes {
            self.quarantine(node, Charge::Differs(layers), effects);
        }
    }

    /// A rank has spent this on a step.
    pub(super) fn spent(
        &mut self,
        connection: NodeConnection,
        step: StepId,
        timing: StepTiming,
        effects: &mut Vec<Effect>,
    ) {
        let node = self.connections.get(&connection).and_then(|name| self.nodes.get(name));
        let Some(place) = node.and_then(|node| node.place).filter(|place| place.rank.0 == 0) else { return };
        let Some(replica) = self.replicas.get_mut(&place.replica) else { return };
        let Some(later) = replica.links.take(place.stage.0 as usize, step, timing) else { return };
        let seat = |stage: usize| replica.seat(stage, 0).map(|seat| seat.node.clone());
        let (Some(after), Some(before)) = (seat(later), later.checked_sub(1).and_then(seat)) else { return };
        // Which end of the link is at fault is seen once one of them has been replaced.
        let tried = |charge: &Charge| matches!(charge, Charge::SlowLink(other) if *other == before);
        let former = self.suspicions.quarantined.iter().find(|(_, charge)| tried(charge));
        let (blamed, other) = match former.map(|(node, _)| node.clone()) {
            Some(former) => {
                self.suspicions.lift(&former);
                (before, after)
            }
            None => (after, before),
        };
        if self.can_be_replaced(&blamed) {
            self.quarantine(blamed, Charge::SlowLink(other), effects);
        }
    }

    fn quarantine(&mut self, node: NodeId, charge: Charge, effects: &mut Vec<Effect>) {
        self.suspicions.quarantined.insert(node.clone(), charge);
        let reason = self.suspicions.reason(&node).unwrap_or_default();
        effects.push(Effect::Quarantined { node, reason });
        self.reconsider = true;
    }

    fn can_be_replaced(&self, node: &NodeId) -> bool {
        let Some(place) = self.nodes.get(node).and_then(|node| node.place) else { return false };
        let mut out = self.out();
        out.insert(node.clone());
        matches!(self.way_out(place.replica, &out), change::WayOut::Change(_))
    }
}
