//! Where jobs can train: replicas that serve, and which of them make a session.

use crate::cluster::NodeConnection;
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::training::{OpenSession, SessionStart, TrainingSettings};
use ashlar_shard_plan::Piece;
use ashlar_vocabulary::{
    Bytes, JobId, LayerRange, NodeId, ReplicaId, ReplicaRevision, SessionId, StageIndex, TensorRank,
};

/// A replica that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingReplica {
    /// Which.
    pub replica: ReplicaId,
    /// Its layout.
    pub revision: ReplicaRevision,
    /// Its ranks, stage by stage, rank by rank.
    pub ranks: Vec<TrainingRank>,
}

/// A rank of a replica that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingRank {
    /// Its connection.
    pub connection: NodeConnection,
    /// Where its peers reach it.
    pub address: String,
    /// Its stage.
    pub stage: StageIndex,
    /// Its rank in the stage.
    pub rank: TensorRank,
    /// The stage's layers.
    pub layers: LayerRange,
    /// What it has for sessions.
    pub room: RankRoom,
}

/// What decides what a session takes on a rank, and what the rank has for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankRoom {
    /// Its node.
    pub node: NodeId,
    /// Memory that the node offers.
    pub capacity: Bytes,
    /// Of it, reserved for what serves: weights, KV cache, workspaces.
    pub serving: Bytes,
    /// Threads of the node.
    pub threads: u32,
    /// The rank's piece of the model.
    pub piece: Piece,
}

/// Most replicas that train one job together.
const REPLICAS_MAX: usize = 8;

impl TrainingReplica {
    /// What must be equal where ranks of several replicas exchange gradients: the same cut of the model.
    fn cut(&self) -> Vec<(StageIndex, TensorRank, LayerRange)> {
        self.ranks.iter().map(|rank| (rank.stage, rank.rank, rank.layers)).collect()
    }

    /// Stages of the replica.
    pub(super) fn stages(&self) -> usize {
        self.ranks.iter().map(|rank| rank.stage.0 as usize + 1).max().unwrap_or(0)
    }

    /// Ranks of each stage.
    pub(super) fn tensor_parallel_size(&self) -> usize {
        self.ranks.iter().map(|rank| rank.rank.0 as usize + 1).max().unwrap_or(1)
    }

    fn at(&self, stage: StageIndex, rank: TensorRank) -> Option<&TrainingRank> {
        self.ranks.iter().find(|one| (one.stage, one.rank) == (stage, rank))
    }
}

/// The replicas of a session: of those that are cut alike 1, 2, 4 or 8, as many as there are.
pub(super) fn choose<'r>(up: impl Iterator<Item = &'r TrainingReplica>) -> Vec<&'r TrainingReplica> {
    let mut groups: Vec<Vec<&TrainingReplica>> = Vec::new();
    for replica in up.filter(|replica| !replica.ranks.is_empty()) {
        match groups.iter_mut().find(|group| group.first().is_some_and(|one| one.cut() == replica.cut())) {
            Some(group) => group.push(replica),
            None => groups.push(vec![replica]),
        }
    }
    // Of equally large groups the first, so that the choice is the same each time.
    let mut best: Vec<&TrainingReplica> = Vec::new();
    for group in groups {
        if group.len() > best.len() {
            best = group;
        }
    }
    let most = best.len().min(REPLICAS_MAX);
    best.truncate(if most == 0 { 0 } else { 1 << most.ilog2() });
    best
}

/// What each rank of a session is told to begin it, replica by replica; the first one is the root.
pub(super) fn open(
    replicas: &[&TrainingReplica],
    (session, job): (SessionId, JobId),
    settings: &TrainingSettings,
    start: &SessionStart,
) -> Vec<(NodeConnection, ToNode)> {
    let mut messages = Vec::new();
    for (number, replica) in (0..).zip(replicas) {
        for one in &replica.ranks {
            let stage = replica.ranks.iter().filter(|other| other.stage == one.stage);
            let next = replica.at(StageIndex(one.stage.0 + 1), one.rank);
            let peers = replicas.iter().filter_map(|replica| replica.at(one.stage, one.rank));
            let open = OpenSession {
                session,
                job,
                revision: replica.revision,
                settings: settings.clone(),
                start: start.clone(),
                replica: number,
                replicas: replicas.len() as u32,
                group: stage.map(|other| other.address.clone()).collect(),
                next: next.map(|next| next.address.clone()),
                peers: peers.map(|peer| peer.address.clone()).collect(),
            };
            messages.push((one.connection, ToNode::OpenSession(Box::new(open))));
        }
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(number: u32, cuts: &[(usize, usize)]) -> TrainingReplica {
        let ranks = (0..).zip(cuts).map(|(stage, &(start, end))| TrainingRank {
            connection: NodeConnection(u64::from(number * 10 + stage)),
            address: format!("{number}-{stage}"),
            stage: StageIndex(stage),
            rank: TensorRank(0),
            layers: LayerRange { start, end },
            room: RankRoom {
                node: NodeId(format!("{number}-{stage}")),
                capacity: Bytes(0),
                serving: Bytes(0),
                threads: 1,
                piece: Piece {
                    layers: LayerRange { start, end },
                    first: stage == 0,
                    last: end == 8,
                    rank: 0,
                    tensor_parallel_size: 1,
                    head: None,
                },
            },
        });
        let ranks = ranks.collect();
        TrainingReplica {
            replica: ReplicaId(number),
            revision: ReplicaRevision(u64::from(number) + 1),
            ranks,
        }
    }

    #[test]
    fn only_replicas_that_are_cut_alike_train_together_and_a_power_of_two_of_them() {
        let (even, odd) = ([(0, 4), (4, 8)], [(0, 5), (5, 8)]);
        let all: Vec<TrainingReplica> =
            (0..6).map(|n| replica(n, if n == 1 { &odd } else { &even })).collect();
        let names = |some: Vec<&TrainingReplica>| some.iter().map(|one| one.replica.0).collect::<Vec<_>>();
        assert_eq!(names(choose(all.iter())), [0, 2, 3, 4]);
        assert_eq!(names(choose(all.iter().take(3))), [0, 2]);
        assert_eq!(names(choose(all.iter().take(2))), [0]);
        assert_eq!(names(choose(all.iter().take(0))), [0; 0]);
    }
}
