//! Nodes and the places that they take: what is intended, and what has been observed.

use super::events::NodeConnection;
use super::quarantine::LinkWatch;
use crate::time::Millis;
use ashlar_protocol::membership::{HeldSlice, Join};
use ashlar_protocol::prefix::BlockHash;
use ashlar_protocol::step::StepTiming;
use ashlar_protocol::training::TrainingTiming;
use ashlar_shard_plan::{MemoryLedger, Position, ReplicaLayout};
use ashlar_vocabulary::{
    BlockId, Bytes, LayerRange, NodeId, ReplicaId, ReplicaRevision, StageIndex, TensorRank,
};
use std::collections::BTreeSet;

/// A joined node.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) connection: NodeConnection,
    pub(super) join: Join,
    /// The slice that it has in memory, as far as is known.
    pub(super) holds: Option<HeldSlice>,
    pub(super) heard: Millis,
    /// Whether it is to hold nothing any more.
    pub(super) leaving: bool,
    /// Whether it could not prepare what it was told to.
    pub(super) unfit: bool,
    /// Whether it has been told that it holds nothing.
    pub(super) dismissed: bool,
    /// Intent: where it belongs.
    pub(super) place: Option<Place>,
    /// Observation: how far it is.
    pub(super) observed: Observed,
    pub(super) reserved: Bytes,
    /// Blocks of KV cache that it has kept, until its replica is up.
    pub(super) kept: BTreeSet<(BlockId, BlockHash)>,
    /// Whether it has kept what it handed on of them, too.
    pub(super) logged: bool,
    pub(super) resident: Bytes,
    pub(super) busy: StepTiming,
    /// Cumulated over its training sessions.
    pub(super) trained: TrainingTiming,
}

/// A node's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) replica: ReplicaId,
    pub(super) stage: StageIndex,
    pub(super) rank: TensorRank,
    pub(super) layers: LayerRange,
}

/// What a node has reported about its assignment.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Observed {
    Standby,
    Loading { revision: ReplicaRevision, share: f32 },
    Ready { revision: ReplicaRevision },
    Failed { message: String },
}

/// A replica's layout, and who is meant to hold which part of it.
#[derive(Debug, Clone)]
pub(super) struct Replica {
    pub(super) id: ReplicaId,
    pub(super) revision: ReplicaRevision,
    pub(super) num_stages: usize,
    pub(super) tensor_parallel_size: usize,
    /// Whether all stages share the head.
    pub(super) spread_head: bool,
    pub(super) kv_blocks: u32,
    /// Whether its stages are to keep what they hand on, as far as those who are seated have room for that.
    pub(super) boundary_log: bool,
    /// Stage by stage, rank by rank.
    pub(super) seats: Vec<Seat>,
    pub(super) phase: Phase,
    /// Whether it takes nothing in any more, because nobody can take the place of a node that leaves.
    pub(super) draining: bool,
    /// How long rows are on their way from stage to stage, in this layout.
    pub(super) links: LinkWatch,
    /// Failures since it last served.
    pub(super) failures: u32,
    /// How many of them were of its weights.
    pub(super) unloadable: u32,
    /// Why it does not serve, for clients and operators.
    pub(super) trouble: Option<String>,
}

/// One rank's part of a replica.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    pub(super) place: Place,
    pub(super) ledger: MemoryLedger,
    /// Who holds it, or held it last: preferred when it is vacant, because the weights may still be there.
    pub(super) node: NodeId,
    /// Whether `node` is joined and holds it.
    pub(super) taken: bool,
}

/// How far a replica is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Not assigned, since then: a place is vacant.
    Vacant { since: Millis },
    /// An assignment failed; the next attempt is due then.
    Retry { due: Millis },
    /// Assigned, and its ranks are getting ready.
    Loading,
    /// It serves.
    Up,
}

impl Replica {
    /// From a plan; nobody is seated yet.
    pub(super) fn new(id: ReplicaId, layout: &ReplicaLayout, kv_blocks: u32, now: Millis) -> Replica {
        let seats = layout.stages.iter().enumerate().flat_map(|(stage, cut)| {
            cut.ranks.iter().zip(&cut.ledgers).enumerate().map(move |(rank, (node, ledger))| Seat {
                place: Place {
                    replica: id,
                    stage: StageIndex(stage as u32),
                    rank: TensorRank(rank as u32),
                    layers: cut.layers,
                },
                ledger: *ledger,
                node: node.clone(),
                taken: false,
            })
        });
        Replica {
            id,
            revision: ReplicaRevision(0),
            num_stages: layout.stages.len(),
            tensor_parallel_size: layout.stages.first().map_or(1, |stage| stage.ranks.len()),
            spread_head: layout.spread_head,
            kv_blocks,
            boundary_log: layout.boundary_log,
            seats: seats.collect(),
            phase: Phase::Vacant { since: now },
            draining: false,
            links: LinkWatch::default(),
            failures: 0,
            unloadable: 0,
            trouble: None,
        }
    }

    /// Whether every place is taken.
    pub(super) fn complete(&self) -> bool {
        self.seats.iter().all(|seat| seat.taken)
    }

    /// The ranks of a stage.
    pub(super) fn stage(&self, stage: usize) -> impl Iterator<Item = &Seat> {
        self.seats.iter().filter(move |seat| seat.place.stage.0 as usize == stage)
    }

    /// A stage's place in it.
    pub(super) fn position(&self, stage: usize) -> Position {
        Position { stage, stages: self.num_stages, spread_head: self.spread_head }
    }

    /// Who takes a place.
    pub(super) fn seat(&self, stage: usize, rank: usize) -> Option<&Seat> {
        self.seats.get(stage * self.tensor_parallel_size + rank)
    }
}
