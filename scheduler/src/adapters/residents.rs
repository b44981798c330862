//! Which adapters are in the memory of which replica's ranks: bounded in number and in bytes, the least recently used one
//! without sequences goes first. Of the bytes never more are taken than running fine-tuning jobs leave: what a session has
//! reserved is promised.

use super::events::{AdaptersConfig, Effect, Users};
use crate::cluster::NodeConnection;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind};
use ashlar_protocol::membership::AdapterRefusal;
use ashlar_vocabulary::{AdapterId, Bytes, ReplicaId, ReplicaRevision};
use std::collections::{BTreeMap, BTreeSet};

/// A replica that serves.
#[derive(Debug, Clone)]
struct Place {
    revision: ReplicaRevision,
    ranks: Vec<NodeConnection>,
    adapters: BTreeMap<AdapterId, Residency>,
    /// Waited for by sequences, without room so far.
    wanted: BTreeSet<AdapterId>,
}

/// How far an adapter is on a replica.
#[derive(Debug, Clone)]
enum Residency {
    /// Under the number of its load.
    Loading {
        load: u64,
        missing: BTreeSet<NodeConnection>,
        failure: Option<AdapterRefusal>,
    },
    Loaded,
}

/// What became of a load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Loaded {
    /// Every rank has it.
    Ready,
    /// It is not there; no rank keeps its share. Why, and of which kind that is.
    Failed(AdminFailure),
}

/// Whether a load has been begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begun {
    /// It is there already.
    Ready,
    /// Ranks are at it.
    Loading,
    /// Everything that is there is used.
    NoRoom,
}

/// The adapters of all replicas.
#[derive(Debug, Clone)]
pub(super) struct Residents {
    config: AdaptersConfig,
    places: BTreeMap<ReplicaId, Place>,
    /// What adapters take on the rank with the largest share, as far as they have been loaded in this term.
    sizes: BTreeMap<AdapterId, Bytes>,
    loads: u64,
}

impl Residents {
    pub(super) fn new(config: AdaptersConfig) -> Residents {
        Residents { config, places: BTreeMap::new(), sizes: BTreeMap::new(), loads: 0 }
    }

    pub(super) fn config(&self) -> &AdaptersConfig {
        &self.config
    }

    /// The replicas that serve.
    pub(super) fn replicas(&self) -> BTreeSet<ReplicaId> {
        self.places.keys().copied().collect()
    }

    pub(super) fn up(&mut self, replica: ReplicaId, revision: ReplicaRevision, ranks: Vec<NodeConnection>) {
        let place = Place { revision, ranks, adapters: BTreeMap::new(), wanted: BTreeSet::new() };
        self.places.insert(replica, place);
    }

    pub(super) fn down(&mut self, replica: ReplicaId) {
        self.places.remove(&replica);
    }

    /// A sequence waits there; what has no room now is tried again.
    pub(super) fn want(&mut self, replica: ReplicaId, adapter: AdapterId) {
        if let Some(place) = self.places.get_mut(&replica) {
            place.wanted.insert(adapter);
        }
    }

    /// Loads what sequences wait for, as far as there is room. What nobody waits for any more is forgotten.
    pub(super) fn load_wanted(&mut self, users: &dyn Users, effects: &mut Vec<Effect>) {
        let wanted = |(replica, place): (&ReplicaId, &Place)| {
            place.wanted.iter().map(|adapter| (*replica, *adapter)).collect::<Vec<_>>()
        };
        let wanted: Vec<(ReplicaId, AdapterId)> = self.places.iter().flat_map(wanted).collect();
        for (replica, adapter) in wanted {
            let done = !users.usage(replica, adapter).wanted
                || self.load(replica, adapter, users, effects) != Begun::NoRoom;
            if let Some(place) = self.places.get_mut(&replica).filter(|_| done) {
                place.wanted.remove(&adapter);
            }
        }
    }

    /// Has a replica's ranks load an adapter, in the place of one that is not used if need be.
    pub(super) fn load(
        &mut self,
        replica: ReplicaId,
        adapter: AdapterId,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Begun {
        match self.places.get(&replica).map(|place| place.adapters.get(&adapter)) {
            Some(Some(Residency::Loaded)) => return Begun::Ready,
            Some(Some(Residency::Loading { .. })) => return Begun::Loading,
            None => return Begun::NoRoom,
            Some(None) => {}
        }
        let size = self.sizes.get(&adapter).copied().unwrap_or_default();
        let limit = self.limit(replica, users);
        let room = |residents: &Residents| {
            let count = residents.places.get(&replica).map_or(0, |place| place.adapters.len());
            count < residents.config.max_adapters && residents.bytes(replica) + size <= limit
        };
        while !room(self) {
            if !self.evict(replica, None, users, effects) {
                return Begun::NoRoom;
            }
        }
        let Some(place) = self.places.get_mut(&replica) else { return Begun::NoRoom };
        self.loads += 1;
        let (load, missing) = (self.loads, place.ranks.iter().copied().collect());
        place.adapters.insert(adapter, Residency::Loading { load, missing, failure: None });
        effects.push(Effect::Load {
            replica,
            ranks: place.ranks.clone(),
            revision: place.revision,
            adapter,
            load,
        });
        Begun::Loading
    }

    /// Most that adapters may take on a rank of the replica now.
    fn limit(&self, replica: ReplicaId, users: &dyn Users) -> Bytes {
        users.beside_jobs(replica).map_or(self.config.memory, |left| left.min(self.config.memory))
    }

    /// What adapters take on the replica's fullest rank, as far as is known.
    pub(super) fn bytes(&self, replica: ReplicaId) -> Bytes {
        let adapters = self.places.get(&replica).into_iter().flat_map(|place| place.adapters.keys());
        adapters.map(|adapter| self.sizes.get(adapter).copied().unwrap_or_default()).sum()
    }

    /// Gives up the least recently used adapter of a replica that no sequence there has; `keep` is not touched.
    fn evict(
        &mut self,
        replica: ReplicaId,
        keep: Option<AdapterId>,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> bool {
        let Some(place) = self.places.get(&replica) else { return false };
        let idle = place.adapters.iter().filter_map(|(adapter, residency)| {
            let usage = users.usage(replica, *adapter);
            let may = matches!(residency, Residency::Loaded) && !usage.bound && keep != Some(*adapter);
            may.then_some((usage.last, *adapter))
        });
        match idle.min() {
            Some((_, adapter)) => {
                self.unload(replica, adapter, effects);
                true
            }
            None => false,
        }
    }

    fn unload(&mut self, replica: ReplicaId, adapter: AdapterId, effects: &mut Vec<Effect>) {
        let Some(place) = self.places.get_mut(&replica) else { return };
        if place.adapters.remove(&adapter).is_some() {
            effects.push(Effect::Gone { replica, adapter });
            effects.push(Effect::Unload { ranks: place.ranks.clone(), adapter });
        }
    }

    /// Gives up every adapter that `keep` does not name and no sequence has.
    pub(super) fn sweep(
        &mut self,
        keep: &dyn Fn(AdapterId) -> bool,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) {
        let over = |(replica, place): (&ReplicaId, &Place)| {
            let loaded =
                place.adapters.iter().filter(|(_, residency)| matches!(residency, Residency::Loaded));
            let over = loaded.filter(|(adapter, _)| {
                let usage = users.usage(*replica, **adapter);
                !keep(**adapter) && !usage.bound && !usage.wanted
            });
            over.map(|(adapter, _)| (*replica, *adapter)).collect::<Vec<_>>()
        };
        let over: Vec<(ReplicaId, AdapterId)> = self.places.iter().flat_map(over).collect();
        for (replica, adapter) in over {
            self.unload(replica, adapter, effects);
        }
        let places = &self.places;
        let held = |adapter: &AdapterId| places.values().any(|place| place.adapters.contains_key(adapter));
        self.sizes.retain(|adapter, _| keep(*adapter) || held(adapter));
    }

    /// A rank's answer; what it means once it is the last one. Answers of a former layout, or to a former load, say nothing.
    pub(super) fn answer(
        &mut self,
        connection: NodeConnection,
        revision: ReplicaRevision,
        (adapter, number): (AdapterId, u64),
        outcome: Result<Bytes, AdapterRefusal>,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Option<(ReplicaId, Loaded)> {
        let (&replica, place) = self.places.iter_mut().find(|(_, place)| place.revision == revision)?;
        let Residency::Loading { load, missing, failure } = place.adapters.get_mut(&adapter)? else {
            return None;
        };
        if *load != number || !missing.remove(&connection) {
            return None;
        }
        match outcome {
            Ok(bytes) => {
                let size = self.sizes.entry(adapter).or_default();
                // A rank that lies is not to overflow a sum.
                *size = bytes.min(Bytes(1 << 48)).max(*size);
            }
            // What lasts says more than what may be over the next time.
            Err(refusal) if failure.as_ref().is_none_or(|former| former.retry && !refusal.retry) => {
                *failure = Some(refusal);
            }
            Err(_) => {}
        }
        if !missing.is_empty() {
            return None;
        }
        let Some(refusal) = failure.take() else {
            place.adapters.insert(adapter, Residency::Loaded);
            return Some((replica, self.make_room_for(replica, adapter, users, effects)));
        };
        place.adapters.remove(&adapter);
        let kind = if refusal.retry { AdminFailureKind::Unavailable } else { AdminFailureKind::Invalid };
        Some((
            replica,
            self.failed(replica, adapter, AdminFailure { kind, message: refusal.message }, effects),
        ))
    }

    /// An adapter has been loaded and its size is known: others go for it, or it goes itself.
    fn make_room_for(
        &mut self,
        replica: ReplicaId,
        adapter: AdapterId,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Loaded {
        let (limit, most) = (self.limit(replica, users), self.config.memory);
        let fits = self.sizes.get(&adapter).is_none_or(|size| *size <= limit);
        while fits && self.bytes(replica) > limit && self.evict(replica, Some(adapter), users, effects) {}
        if self.bytes(replica) <= limit {
            effects.push(Effect::Resident { replica, adapter });
            return Loaded::Ready;
        }
        if let Some(place) = self.places.get_mut(&replica) {
            place.adapters.remove(&adapter);
        }
        // Asked for again it is loaded again: those in use may have gone.
        let size = self.sizes.remove(&adapter).unwrap_or_default();
        let (kind, message) = if size <= most && limit < most {
            let message = format!(
                "its {size} on a rank do not fit into the {limit} that running fine-tuning jobs leave to adapters there, \
                 beside those in use: try again when a job has ended, pause one, or unload others"
            );
            (AdminFailureKind::Unavailable, message)
        } else {
            let message = format!(
                "its {size} on a rank do not fit into the {most} that adapters may take, beside those in use: raise \
                 adapter_memory_bytes, or unload others"
            );
            (if fits { AdminFailureKind::Full } else { AdminFailureKind::Invalid }, message)
        };
        self.failed(replica, adapter, AdminFailure { kind, message }, effects)
    }

    /// A load has come to nothing: no rank keeps its share.
    fn failed(
        &self,
        replica: ReplicaId,
        adapter: AdapterId,
        failure: AdminFailure,
        effects: &mut Vec<Effect>,
    ) -> Loaded {
        let ranks = self.places.get(&replica).map(|place| place.ranks.clone()).unwrap_or_default();
        effects.push(Effect::Unload { ranks, adapter });
        effects.push(Effect::Failed { replica, adapter, reason: failure.message.clone() });
        Loaded::Failed(failure)
    }
}
