//! A job's stay on a set of ranks: what they do now, and who has voted.

use super::replicas::TrainingReplica;
use super::room::Allotment;
use super::stragglers::Stragglers;
use crate::cluster::NodeConnection;
use crate::time::Millis;
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::training::{StepMetrics, TrainingWork};
use ashlar_vocabulary::{BlobId, ReplicaId, SessionId};
use std::collections::{BTreeMap, BTreeSet};

/// A session that is open, or being opened.
#[derive(Debug, Clone)]
pub(super) struct Session {
    pub(super) id: SessionId,
    /// Its ranks; the first one is the root.
    ranks: Vec<NodeConnection>,
    replicas: Vec<ReplicaId>,
    /// What it has reserved.
    pub(super) allotment: Allotment,
    pub(super) doing: Doing,
    /// Who makes it slow.
    pub(super) stragglers: Stragglers,
    /// When it began to do so, or a rank last said something.
    pub(super) heard: Millis,
}

/// What a session's ranks do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Doing {
    /// Those have opened it.
    Opening(BTreeSet<NodeConnection>),
    /// Nothing: the next piece of work has not been sent.
    Idle,
    /// They compute a step.
    Step(Votes),
    /// They measure the validation data.
    Evaluating,
    /// They put an adapter together.
    Exporting,
}

/// Who has prepared a step.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Votes {
    pub(super) step: u64,
    pub(super) since: Millis,
    shards: BTreeMap<NodeConnection, Option<BlobId>>,
    pub(super) metrics: Option<StepMetrics>,
}

impl Session {
    pub(super) fn new(
        id: SessionId,
        ranks: Vec<NodeConnection>,
        replicas: &[&TrainingReplica],
        allotment: Allotment,
        now: Millis,
    ) -> Session {
        let nodes = replicas.iter().flat_map(|replica| &replica.ranks);
        let nodes = nodes.map(|rank| (rank.connection, rank.room.node.clone())).collect();
        Session {
            id,
            ranks,
            replicas: replicas.iter().map(|replica| replica.replica).collect(),
            allotment,
            doing: Doing::Opening(BTreeSet::new()),
            stragglers: Stragglers::new(nodes),
            heard: now,
        }
    }

    pub(super) fn has(&self, connection: NodeConnection) -> bool {
        self.ranks.contains(&connection)
    }

    pub(super) fn is_root(&self, connection: NodeConnection) -> bool {
        self.ranks.first() == Some(&connection)
    }

    pub(super) fn uses(&self, replica: ReplicaId) -> bool {
        self.replicas.contains(&replica)
    }

    /// What to send so that every rank does `work`.
    pub(super) fn tell(&self, work: TrainingWork) -> (Vec<NodeConnection>, Box<ToNode>) {
        (self.ranks.clone(), Box::new(ToNode::Training { session: self.id, work }))
    }

    /// Notes that a rank has opened it; whether that makes it open.
    pub(super) fn opened(&mut self, connection: NodeConnection) -> bool {
        let Doing::Opening(opened) = &mut self.doing else { return false };
        opened.insert(connection);
        opened.len() == self.ranks.len()
    }

    /// Begins a step.
    pub(super) fn begin_step(&mut self, step: u64, now: Millis) {
        self.doing = Doing::Step(Votes { step, since: now, shards: BTreeMap::new(), metrics: None });
    }

    /// Notes a vote. Once all have voted: their shares, in the order of ranks, each once.
    pub(super) fn vote(
        &mut self,
        connection: NodeConnection,
        shard: Option<BlobId>,
        metrics: Option<StepMetrics>,
    ) -> Option<(Votes, Vec<BlobId>)> {
        let root = self.is_root(connection);
        let Doing::Step(votes) = &mut self.doing else { return None };
        votes.shards.insert(connection, shard);
        if root {
            votes.metrics = metrics;
        }
        if votes.shards.len() < self.ranks.len() {
            return None;
        }
        let mut shards: Vec<BlobId> = Vec::new();
        for shard in self.ranks.iter().filter_map(|rank| votes.shards.get(rank).copied().flatten()) {
            if !shards.contains(&shard) {
                shards.push(shard);
            }
        }
        Some((votes.clone(), shards))
    }

    /// Blobs that a commit of the present step would refer to.
    pub(super) fn prepared(&self) -> impl Iterator<Item = BlobId> {
        let votes = match &self.doing {
            Doing::Step(votes) => Some(votes),
            _ => None,
        };
        votes.into_iter().flat_map(|votes| votes.shards.values().copied().flatten())
    }
}
