//! Whether a session has room: what it takes on every rank by the ledger's formula, and what is left there.
//!
//! A session has what suits it best of what fits: blocks that keep their activations, else that compute them again, else
//! smaller micro-batches as well, down to the longest sample. None of these changes a bit.

use super::Jobs;
use super::job::Job;
use super::replicas::{self, RankRoom, TrainingRank, TrainingReplica};
use crate::cluster::NodeConnection;
use ashlar_protocol::training::{TrainingMethod, TrainingSettings};
use ashlar_shard_plan::{Piece, SessionMemory, SessionRequest, SessionWeights, Shares};
use ashlar_vocabulary::{Bytes, JobId, LayerRange, ReplicaId};
use std::collections::BTreeMap;

/// How a session computes, and what it has reserved for that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Allotment {
    pub(super) keep_activations: bool,
    pub(super) micro_batch_rows: u32,
    pub(super) reserved: BTreeMap<NodeConnection, Bytes>,
}

/// Whether a job can have a session now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It can.
    Fits(Allotment),
    /// Others hold the room that it needs.
    Waits(String),
    /// It would not have room even alone; why, and what would help.
    Never(String),
}

impl RankRoom {
    /// What is left beside what serves.
    fn beside_serving(&self) -> Bytes {
        self.capacity.saturating_sub(self.serving)
    }

    /// What is set aside for adapters, of which `resident` are in memory: all that they may take, but of what is left at most
    /// half, unless they have it already.
    fn for_adapters(&self, most: Bytes, resident: Bytes) -> Bytes {
        resident.max(most.min(Bytes(self.beside_serving().0 / 2)))
    }
}

/// A rank of a session in the making, and what there is for it.
struct Place<'a> {
    rank: &'a TrainingRank,
    stages_behind: usize,
    /// What it may take now, and if nobody else took anything.
    now: Bytes,
    alone: Bytes,
}

/// What decides a session's memory.
struct Ask<'a> {
    settings: &'a TrainingSettings,
    shares: Shares<'a>,
    replicas: usize,
}

impl Ask<'_> {
    fn memory(&self, place: &Place<'_>, keep: bool, rows: u32, lora_rank: u32) -> SessionMemory {
        self.memory_of(&place.rank.room.piece, place, keep, rows, lora_rank)
    }

    fn memory_of(
        &self,
        piece: &Piece,
        place: &Place<'_>,
        keep_activations: bool,
        rows: u32,
        lora_rank: u32,
    ) -> SessionMemory {
        let weights = match self.settings.full {
            Some(_) => SessionWeights::Model,
            None => {
                SessionWeights::Adapter { rank: lora_rank as usize, modules: &self.settings.lora.targets }
            }
        };
        let request = SessionRequest {
            weights,
            micro_batch_rows: rows as usize,
            keep_activations,
            replicas: self.replicas,
            dropout: self.settings.lora.dropout > 0.0,
        };
        piece.session(&self.shares, place.stages_behind, place.rank.room.threads, &request)
    }

    fn total(&self, place: &Place<'_>, keep: bool, rows: u32) -> Bytes {
        self.memory(place, keep, rows, self.settings.lora.rank).total()
    }
}

impl Jobs {
    /// Whether a job can have a session on the replicas that would train it.
    pub(super) fn room_for(&self, id: JobId) -> Option<Verdict> {
        let job = self.jobs.get(id)?;
        let settings = job.record.settings.as_ref()?;
        let replicas = replicas::choose(self.replicas.values());
        if replicas.is_empty() {
            return None;
        }
        let ranks = replicas.first().map_or(1, |replica| replica.tensor_parallel_size());
        let copy = settings.full.map(|_| self.config.shape.in_f32());
        let shape = copy.as_ref().unwrap_or(&self.config.shape);
        let ask = Ask { settings, shares: Shares::new(shape, ranks), replicas: replicas.len() };
        let places: Vec<Place<'_>> = replicas.iter().flat_map(|replica| self.places(replica)).collect();
        Some(verdict(&ask, &places, longest_sample(job), self.config.adapter_memory))
    }

    fn places<'a>(&'a self, replica: &'a TrainingReplica) -> impl Iterator<Item = Place<'a>> {
        let stages = replica.stages();
        let resident = self.adapters_held.get(&replica.replica).copied().unwrap_or_default();
        let most = self.config.adapter_memory;
        replica.ranks.iter().map(move |rank| {
            let room = &rank.room;
            let taken = room.for_adapters(most, resident) + self.reserved_on(rank.connection);
            Place {
                rank,
                stages_behind: stages.saturating_sub(rank.stage.0 as usize + 1),
                now: room.beside_serving().saturating_sub(taken),
                alone: room.beside_serving().saturating_sub(room.for_adapters(most, Bytes(0))),
            }
        })
    }

    /// What sessions have reserved on the rank of a connection.
    pub fn reserved_on(&self, connection: NodeConnection) -> Bytes {
        let sessions = self.sessions.values().filter_map(|id| self.jobs.get(*id).and_then(Job::session));
        sessions.filter_map(|session| session.allotment.reserved.get(&connection)).copied().sum()
    }

    /// What sessions leave to adapters on the fullest rank of a replica; `None` where no session has reserved anything. Never
    /// less than the adapters had when the last session was begun, nor than what was set aside for them.
    pub fn left_for_adapters(&self, replica: ReplicaId) -> Option<Bytes> {
        let ranks = self.replicas.get(&replica)?.ranks.iter();
        let left = ranks.filter_map(|rank| match self.reserved_on(rank.connection) {
            Bytes(0) => None,
            reserved => Some(rank.room.beside_serving().saturating_sub(reserved)),
        });
        left.min()
    }

    /// No rank has promised more than it has; for tests and the simulation.
    pub(super) fn check_room(&self) -> Result<(), String> {
        for rank in self.replicas.values().flat_map(|replica| &replica.ranks) {
            let (reserved, left) = (self.reserved_on(rank.connection), rank.room.beside_serving());
            if reserved > left {
                return Err(format!("{} of {left} are reserved on node {}", reserved, rank.room.node));
            }
        }
        Ok(())
    }
}

/// Rows of the longest sample, below which no micro-batch can be. Where a gateway did not tell, they are left as they are.
fn longest_sample(job: &Job) -> u32 {
    let settled = job.record.settings.as_ref().map_or(1, |settings| settings.micro_batch_rows);
    let longest = job.record.data.as_ref().map_or(0, |data| data.longest_sample_rows);
    if longest == 0 { settled } else { longest.min(settled) }
}

fn verdict(ask: &Ask<'_>, places: &[Place<'_>], longest: u32, adapters: Bytes) -> Verdict {
    for (keep_activations, rows) in ways(ask.settings, longest) {
        if places.iter().all(|place| ask.total(place, keep_activations, rows) <= place.now) {
            let of = |place: &Place<'_>| (place.rank.connection, ask.total(place, keep_activations, rows));
            let reserved = places.iter().map(of).collect();
            return Verdict::Fits(Allotment { keep_activations, micro_batch_rows: rows, reserved });
        }
    }
    let least = |place: &Place<'_>| ask.total(place, false, longest);
    let missing = |place: &&Place<'_>| least(place).saturating_sub(place.alone);
    match places.iter().max_by_key(missing) {
        Some(tightest) if missing(&tightest) > Bytes(0) => {
            Verdict::Never(why_never(ask, places, tightest, longest, adapters))
        }
        _ => Verdict::Waits(why_it_waits(places, least)),
    }
}

/// The ways in which a job can be computed, the fastest first.
fn ways(settings: &TrainingSettings, longest: u32) -> Vec<(bool, u32)> {
    let mut rows = settings.micro_batch_rows.max(1);
    let mut ways = vec![(settings.keep_activations, rows), (false, rows)];
    while rows > longest.max(1) {
        rows = (rows / 2).max(longest).max(1);
        ways.push((false, rows));
    }
    ways
}

fn why_it_waits(places: &[Place<'_>], least: impl Fn(&Place<'_>) -> Bytes) -> String {
    let Some(tightest) = places.iter().max_by_key(|place| least(place).saturating_sub(place.now)) else {
        return "no rank serves".to_owned();
    };
    format!(
        "on node {} it takes at least {}, and other jobs and adapters leave {} of {} there",
        tightest.rank.room.node,
        least(tightest),
        tightest.now,
        tightest.rank.room.beside_serving()
    )
}

/// What is missing on the tightest rank, in numbers, and what would make the job fit.
fn why_never(
    ask: &Ask<'_>,
    places: &[Place<'_>],
    tightest: &Place<'_>,
    longest: u32,
    adapters: Bytes,
) -> String {
    let (room, rank) = (&tightest.rank.room, ask.settings.lora.rank);
    let memory = ask.memory(tightest, false, longest, rank);
    let lines: Vec<String> = memory
        .rows()
        .into_iter()
        .filter(|row| row.bytes > Bytes(0))
        .map(|row| format!("{} {}", row.name, row.bytes))
        .collect();
    let mut helps = Vec::new();
    let fits = |rows: u32, rank: u32| {
        places.iter().all(|place| ask.memory(place, false, rows, rank).total() <= place.alone)
    };
    if let Some(rows) = most(longest, |rows| fits(rows, rank)) {
        // Both answers of a preference are one sample.
        let tokens = match ask.settings.method {
            TrainingMethod::Supervised => rows,
            TrainingMethod::Dpo { .. } => rows / 2,
        };
        helps.push(format!("a max_seq_len of at most {tokens}"));
    }
    match ask.settings.full {
        Some(_) => helps.push("an adapter instead of all weights".to_owned()),
        None => helps
            .extend(most(rank, |rank| fits(longest, rank)).map(|rank| format!("lora.r of at most {rank}"))),
    }
    let piece = room.piece;
    let with = |layers: u32| {
        let end = piece.layers.start + layers as usize;
        let fewer = Piece { layers: LayerRange { end, ..piece.layers }, ..piece };
        ask.memory_of(&fewer, tightest, false, longest, rank).total() <= tightest.alone
    };
    let layers = piece.layers.len() as u32;
    helps.push(match most(layers, with) {
        Some(fewer) => {
            format!(
                "more nodes or stages, so that this one holds {fewer} layers or fewer instead of {layers}"
            )
        }
        None => "a node with more memory".to_owned(),
    });
    let aside = room.for_adapters(adapters, Bytes(0));
    if aside > Bytes(0) && memory.total() <= room.beside_serving() {
        helps.push(format!("a smaller adapter_memory_bytes, for which {aside} are set aside"));
    }
    format!(
        "the job does not fit: on node {} (stage {}, rank {}) it takes at least {} ({}) in micro-batches of {longest} rows, \
         its longest sample, but of {} {} serve and {} are left for jobs, so {} are missing; what would help: {}",
        room.node,
        tightest.rank.stage,
        tightest.rank.rank,
        memory.total(),
        lines.join(", "),
        room.capacity,
        room.serving,
        tightest.alone,
        memory.total().saturating_sub(tightest.alone),
        helps.join("; or ")
    )
}

/// The largest number from 1 to below `bound` for which `fits` holds; what fits for a number fits for every smaller one.
fn most(bound: u32, fits: impl Fn(u32) -> bool) -> Option<u32> {
    let (mut low, mut high) = (0, bound.max(1));
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    (low > 0).then_some(low)
}
