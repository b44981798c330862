//! What operators ask of the layout: whether a node can be spared, what would become without some, and to have it laid out anew.

use super::change::{Change, WayOut};
use super::events::Effect;
use super::place::{Node, Phase, Replica};
use super::reconcile::device_report;
use super::{Cluster, costs};
use crate::time::Millis;
use ashlar_protocol::admin::{PlanView, PlannedChange, PlannedRank, PlannedReplica, PlannedStage};
use ashlar_shard_plan::DeviceReport;
use ashlar_vocabulary::{LayerRange, NodeId, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};

impl Cluster {
    /// Whether the cluster could go on serving without this node.
    ///
    /// # Errors
    /// Why not, for the operator.
    pub fn could_spare(&self, node: &NodeId) -> Result<(), String> {
        let Some(place) = self.nodes.get(node).and_then(|node| node.place) else { return Ok(()) };
        let mut out = self.out();
        out.insert(node.clone());
        match self.way_out(place.replica, &out) {
            WayOut::Change(_) | WayOut::OtherReplica => Ok(()),
            WayOut::None(reason) => Err(reason),
        }
    }

    /// What would become of the layout without these nodes, as it is now.
    pub fn plan_without(&self, nodes: &BTreeSet<NodeId>) -> PlanView {
        let mut out = self.out();
        out.extend(nodes.iter().cloned());
        let mut replicas: BTreeMap<ReplicaId, Replica> = self.replicas.clone();
        let mut change = PlannedChange::Nothing;
        let mut problem = None;
        let affected = |replica: &&Replica| replica.seats.iter().any(|seat| nodes.contains(&seat.node));
        for replica in self.replicas.values().filter(affected) {
            match self.way_out(replica.id, &out) {
                WayOut::OtherReplica => {
                    change = change.max(PlannedChange::OtherReplica);
                    replicas.remove(&replica.id);
                }
                WayOut::Change(way) => {
                    let standbys = way.begins.iter().all(|begun| way.ends.contains(&begun.id));
                    change = change.max(match standbys {
                        true => PlannedChange::Standbys,
                        false => PlannedChange::NewLayout,
                    });
                    way.ends.iter().for_each(|ended| _ = replicas.remove(ended));
                    for begun in way.begins {
                        // They are needed there: the next replica has others step in.
                        out.extend(begun.seats.iter().map(|seat| seat.node.clone()));
                        replicas.insert(begun.id, begun);
                    }
                    if !standbys {
                        break;
                    }
                }
                WayOut::None(reason) => {
                    change = PlannedChange::Impossible;
                    problem = Some(reason);
                    replicas.remove(&replica.id);
                }
            }
        }
        PlanView { change, problem, replicas: replicas.values().map(planned).collect() }
    }

    /// The layout that would be planned from nothing for the nodes that stay, as they are now: with what is served now, if that
    /// is the same.
    pub fn plan_anew(&self) -> PlanView {
        match self.laid_out_anew() {
            Ok(Some(change)) => PlanView {
                change: PlannedChange::NewLayout,
                problem: None,
                replicas: change.begins.iter().map(planned).collect(),
            },
            Ok(None) => PlanView {
                change: PlannedChange::Nothing,
                problem: None,
                replicas: self.replicas.values().map(planned).collect(),
            },
            Err(problem) => PlanView {
                change: PlannedChange::Impossible,
                problem: Some(problem),
                replicas: self.replicas.values().map(planned).collect(),
            },
        }
    }

    /// Why the layout cannot be laid out anew just now, if so: for the operator.
    pub fn is_in_motion(&self) -> Option<String> {
        if self.change.is_some() {
            return Some("another layout is being prepared: wait until it serves".to_owned());
        }
        let loads = |replica: &&Replica| replica.phase == Phase::Loading;
        let loading = self.replicas.values().find(loads)?;
        Some(format!("replica {} is being loaded: wait until it serves", loading.id))
    }

    /// Begins what [`plan_anew`](Self::plan_anew) has shown: what serves goes on until the slices of the new layout are in memory.
    pub(super) fn replan(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        if self.is_in_motion().is_some() {
            return;
        }
        // Who could not prepare something once is asked again.
        self.nodes.values_mut().for_each(|node| node.unfit = false);
        if let Ok(Some(change)) = self.laid_out_anew() {
            self.unplanned = false;
            self.prepare(now, change, effects);
        }
    }

    /// `None` where it would be what there is.
    fn laid_out_anew(&self) -> Result<Option<Change>, String> {
        let out = self.out();
        let stays = |node: &&Node| !out.contains(&node.join.node);
        let devices: Vec<DeviceReport> = self.nodes.values().filter(stays).map(device_report).collect();
        let layout = self.layout(&devices, &costs::plan_request(&self.config))?;
        let change = self.instead_of_all(&layout, "the operator had it laid out anew".to_owned());
        let present: BTreeSet<Cut> = self.replicas.values().map(cut).collect();
        let other: BTreeSet<Cut> = change.begins.iter().map(cut).collect();
        Ok((present != other).then_some(change))
    }
}

/// What makes one replica another than the next: how many blocks it has, and who holds which layers, rank by rank.
type Cut = (u32, bool, Vec<(LayerRange, NodeId)>);

fn cut(replica: &Replica) -> Cut {
    let seats = replica.seats.iter().map(|seat| (seat.place.layers, seat.node.clone()));
    (replica.kv_blocks, replica.spread_head, seats.collect())
}

fn planned(replica: &Replica) -> PlannedReplica {
    let mut stages: Vec<PlannedStage> = Vec::new();
    for seat in &replica.seats {
        let rank = PlannedRank { node: seat.node.clone(), memory: seat.ledger.total };
        match stages.get_mut(seat.place.stage.0 as usize) {
            Some(stage) => stage.ranks.push(rank),
            None => stages.push(PlannedStage { layers: seat.place.layers, ranks: vec![rank] }),
        }
    }
    PlannedReplica { replica: replica.id, kv_blocks: replica.kv_blocks, stages }
}
