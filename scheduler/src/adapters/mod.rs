//! Which adapters are served under which names, and which are in the ranks' memory, as a pure function of events.
//!
//! Layout: [`events`] (what goes in and out), `residents` (what is in memory where).
//!
//! A name is published in two phases: it is shown to gateways once every rank of every replica that serves has loaded its
//! share and the store has the record. A replica that comes up meanwhile has to load it, too. If one cannot, the caller hears
//! why, and the others give theirs up. A generation that is held back is stored alone: no rank loads it before somebody asks for
//! it.
//!
//! **Invariants:** no tokio, clock, randomness or I/O. A published generation's adapter never changes. An adapter is taken
//! from ranks only while no sequence that they know has it, and the engine hears of it first. At most one change of a name
//! is under way.

pub mod events;
mod residents;

pub use events::{AdapterRecord, AdaptersConfig, Caller, Effect, Event, Usage, Users};

use crate::time::Millis;
use ashlar_protocol::admin::{AdapterView, AdminFailure, AdminFailureKind, AdminReply, LoadAdapter};
use ashlar_vocabulary::{AdapterId, Bytes, ReplicaId};
use residents::{Begun, Loaded, Residents};
use std::collections::{BTreeMap, BTreeSet};

/// Most names: every gateway is told all of them, again and again.
pub const NAMES_MAX: usize = 256;
/// Longest name, in bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest description of where an adapter came from, in bytes.
const ROOT_BYTES_MAX: usize = 4096;
/// Generations of a name that are kept: they can be served again, or for the first time.
pub const GENERATIONS_KEPT: usize = 8;
/// How long ranks may take to load an adapter that a caller waits for, in milliseconds.
pub const LOAD_MS_MAX: u64 = 300_000;

/// Names and what is in memory.
#[derive(Debug, Clone)]
pub struct Adapters {
    names: BTreeMap<String, AdapterRecord>,
    changes: BTreeMap<String, Change>,
    residents: Residents,
}

/// A change of a name under way.
#[derive(Debug, Clone)]
struct Change {
    caller: Caller,
    since: Millis,
    /// What is to be stored; `None` to delete.
    record: Option<AdapterRecord>,
    /// The generation that the caller hears of.
    view: Option<AdapterView>,
    phase: Phase,
    /// The job that asked for it does not want it any more: the name goes when the store is done.
    taken_back: Option<Caller>,
}

impl Change {
    fn new(caller: Caller, since: Millis, record: Option<AdapterRecord>, phase: Phase) -> Change {
        Change { caller, since, record, view: None, phase, taken_back: None }
    }
}

#[derive(Debug, Clone)]
enum Phase {
    /// These replicas have not loaded it yet.
    Loading { adapter: AdapterId, missing: BTreeSet<ReplicaId> },
    /// The store is at it.
    Storing,
}

fn refused(kind: AdminFailureKind, message: impl Into<String>) -> AdminFailure {
    AdminFailure { kind, message: message.into() }
}

impl AdapterRecord {
    fn served(&self) -> Option<&AdapterView> {
        self.generations.iter().rfind(|view| !self.held_back.contains(&view.generation))
    }

    /// Adds a generation; of the others the oldest go, but never what is served.
    fn push(&mut self, view: AdapterView, hold_back: bool) {
        if hold_back {
            self.held_back.insert(view.generation);
        }
        self.generations.push(view);
        let served = self.served().map(|view| view.generation);
        while self.generations.len() > GENERATIONS_KEPT {
            let oldest = self.generations.iter().position(|view| Some(view.generation) != served);
            let Some(oldest) = oldest else { return };
            let gone = self.generations.remove(oldest);
            self.held_back.remove(&gone.generation);
        }
    }
}

impl Adapters {
    /// Without names.
    pub fn new(config: AdaptersConfig) -> Adapters {
        Adapters { names: BTreeMap::new(), changes: BTreeMap::new(), residents: Residents::new(config) }
    }

    /// What is served, by name.
    pub fn views(&self) -> Vec<AdapterView> {
        self.names.values().filter_map(AdapterRecord::served).cloned().collect()
    }

    /// What is served under a name.
    pub fn served(&self, name: &str) -> Option<&AdapterView> {
        self.names.get(name).and_then(AdapterRecord::served)
    }

    /// Every adapter that is served, or is kept and can be.
    pub fn referenced(&self) -> impl Iterator<Item = AdapterId> {
        self.names.values().flat_map(|record| &record.generations).map(|view| view.adapter)
    }

    /// What adapters take on a replica's fullest rank, as far as they are loaded.
    pub fn held(&self, replica: ReplicaId) -> Bytes {
        self.residents.bytes(replica)
    }

    /// Applies one event.
    pub fn handle(&mut self, now: Millis, event: Event, users: &dyn Users, effects: &mut Vec<Effect>) {
        match event {
            Event::Stored(records) => {
                let kept = |record: &AdapterRecord| !record.generations.is_empty();
                self.names = records.into_iter().filter(|(_, record)| kept(record)).collect();
                self.tell_known(effects);
                effects.push(Effect::Published);
            }
            Event::Load(caller, load) => {
                let begun = self.load(now, caller, load, users, effects);
                answer_refusal(caller, begun, effects);
            }
            Event::Unload { caller, name, expected_generation } => {
                let begun = self.unload(now, caller, name, expected_generation, effects);
                answer_refusal(caller, begun, effects);
            }
            Event::RollBack { caller, name, to_generation, expected_generation } => {
                let to = (name, to_generation, expected_generation);
                let begun = self.roll_back(now, caller, to, users, effects);
                answer_refusal(caller, begun, effects);
            }
            Event::ReplicaUp { replica, revision, ranks } => {
                self.residents.up(replica, revision, ranks);
                self.replica_up(replica, users, effects);
            }
            Event::ReplicaDown { replica } => {
                self.residents.down(replica);
                self.loaded(replica, None, &Loaded::Ready, effects);
            }
            Event::Answer { connection, revision, adapter, load, outcome } => {
                let load = (adapter, load);
                let loaded = self.residents.answer(connection, revision, load, outcome, users, effects);
                if let Some((replica, loaded)) = loaded {
                    self.loaded(replica, Some(adapter), &loaded, effects);
                }
            }
            Event::Wanted { replica, adapter } => {
                self.residents.want(replica, adapter);
                self.residents.load_wanted(users, effects);
            }
            Event::Persisted { name, outcome } => self.persisted(now, &name, outcome, effects),
            Event::Tick => {
                self.expire(now, effects);
                self.load_missing(users, effects);
                self.residents.load_wanted(users, effects);
                self.sweep(users, effects);
            }
        }
    }

    /// Begins to serve an adapter, or to store one: as the first generation of its name, or the next one.
    fn load(
        &mut self,
        now: Millis,
        caller: Caller,
        load: LoadAdapter,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Result<(), AdminFailure> {
        let LoadAdapter { name, adapter, root, created_at, replace, expected_generation, hold_back, owner } =
            load;
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic());
        if name.is_empty() || name.len() > NAME_BYTES_MAX || !printable {
            let message = format!(
                "an adapter's name has 1 to {NAME_BYTES_MAX} printable ASCII characters and no space: choose another"
            );
            return Err(refused(AdminFailureKind::Invalid, message));
        }
        if root.len() > ROOT_BYTES_MAX {
            return Err(refused(AdminFailureKind::Invalid, "the adapter's path is too long: shorten it"));
        }
        self.check_change(&name, expected_generation)?;
        let mut record = self.names.get(&name).cloned().unwrap_or_default();
        if record.generations.last().is_some_and(|view| view.owner != owner) {
            let message = format!("another one's adapter is called `{name}`: choose another name");
            return Err(refused(AdminFailureKind::Conflict, message));
        }
        let known = record.generations.iter().rfind(|view| view.adapter == adapter);
        if let Some(known) = known.filter(|_| hold_back) {
            effects.push(Effect::Reply(caller, AdminReply::Adapter(known.clone())));
            return Ok(());
        }
        let last = record.generations.last().map(|view| view.generation);
        if record.served().is_some() && !replace {
            let message = format!(
                "an adapter `{name}` is loaded already: unload it first, or replace it with load_inplace"
            );
            return Err(refused(AdminFailureKind::Invalid, message));
        }
        if last.is_none() && self.names.len() + self.changes.len() >= NAMES_MAX {
            let message = format!("{NAMES_MAX} adapters are registered already: unload one");
            return Err(refused(AdminFailureKind::Full, message));
        }
        let generation = last.unwrap_or(0) + 1;
        let view = AdapterView { name: name.clone(), generation, adapter, root, created_at, owner };
        record.push(view.clone(), hold_back);
        if hold_back {
            let phase = Phase::Storing;
            let change = Change { view: Some(view), ..Change::new(caller, now, Some(record.clone()), phase) };
            self.changes.insert(name.clone(), change);
            effects.push(Effect::Persist { name, record: Some(record) });
            return Ok(());
        }
        self.publish(now, caller, record, view, users, effects)
    }

    /// Begins to serve a generation: ranks load it first.
    fn publish(
        &mut self,
        now: Millis,
        caller: Caller,
        record: AdapterRecord,
        view: AdapterView,
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Result<(), AdminFailure> {
        let missing = self.residents.replicas();
        if missing.is_empty() {
            let message = "no replica is ready to load the adapter: try again shortly";
            return Err(refused(AdminFailureKind::Unavailable, message));
        }
        let (name, phase) = (view.name.clone(), Phase::Loading { adapter: view.adapter, missing });
        let change = Change { view: Some(view), ..Change::new(caller, now, Some(record), phase) };
        self.changes.insert(name, change);
        self.load_missing(users, effects);
        Ok(())
    }

    /// Begins to serve a generation that is kept: one that was never served under its own number, any other as a new one.
    fn roll_back(
        &mut self,
        now: Millis,
        caller: Caller,
        (name, to_generation, expected_generation): (String, u64, Option<u64>),
        users: &dyn Users,
        effects: &mut Vec<Effect>,
    ) -> Result<(), AdminFailure> {
        let (record, view) = self.kept(&name, to_generation)?;
        let served = record.served().map(|view| view.generation);
        // A job asks again where it does not know whether it has been heard.
        if matches!(caller, Caller::Job(_)) && served == Some(to_generation) {
            effects.push(Effect::Reply(caller, AdminReply::Adapter(view.clone())));
            return Ok(());
        }
        if record.held_back.contains(&to_generation) && served.is_none_or(|served| served < to_generation) {
            let (mut record, view) = (record.clone(), view.clone());
            self.check_change(&name, expected_generation)?;
            record.held_back.remove(&to_generation);
            return self.publish(now, caller, record, view, users, effects);
        }
        let AdapterView { name, generation: _, adapter, root, created_at, owner } = view.clone();
        let load = LoadAdapter {
            name,
            adapter,
            root,
            created_at,
            replace: true,
            expected_generation,
            hold_back: false,
            owner,
        };
        self.load(now, caller, load, users, effects)
    }

    /// A name's record, and one of its generations.
    fn kept(&self, name: &str, generation: u64) -> Result<(&AdapterRecord, &AdapterView), AdminFailure> {
        let unknown = || refused(AdminFailureKind::NotFound, format!("no adapter `{name}` is loaded"));
        let record = self.names.get(name).ok_or_else(unknown)?;
        let view = record.generations.iter().find(|view| view.generation == generation);
        let view = view.ok_or_else(|| {
            let kept: Vec<String> =
                record.generations.iter().map(|view| view.generation.to_string()).collect();
            let message =
                format!("generation {generation} of `{name}` is not kept: choose one of {}", kept.join(", "));
            refused(AdminFailureKind::NotFound, message)
        })?;
        Ok((record, view))
    }

    fn unload(
        &mut self,
        now: Millis,
        caller: Caller,
        name: String,
        expected_generation: Option<u64>,
        effects: &mut Vec<Effect>,
    ) -> Result<(), AdminFailure> {
        if matches!(caller, Caller::Job(_)) && self.take_back(&name, caller, effects) {
            return Ok(());
        }
        if !self.names.contains_key(&name) && !self.changes.contains_key(&name) {
            return Err(refused(AdminFailureKind::NotFound, format!("no adapter `{name}` is loaded")));
        }
        self.check_change(&name, expected_generation)?;
        self.delete(now, caller, name, effects);
        Ok(())
    }

    fn delete(&mut self, now: Millis, caller: Caller, name: String, effects: &mut Vec<Effect>) {
        self.changes.insert(name.clone(), Change::new(caller, now, None, Phase::Storing));
        effects.push(Effect::Persist { name, record: None });
    }

    /// A job does not want a name any more, perhaps while it is being published. Whether that is all: an attempt that only
    /// loads ends here; what the store is writing goes once it is written.
    fn take_back(&mut self, name: &str, caller: Caller, effects: &mut Vec<Effect>) -> bool {
        let Some(change) = self.changes.get_mut(name) else { return false };
        if let Phase::Storing = change.phase {
            change.taken_back = Some(caller);
            return true;
        }
        let message = "it is not wanted any more".to_owned();
        self.give_up(name, refused(AdminFailureKind::Conflict, message), effects);
        !self.names.contains_key(name)
    }

    /// A replica serves: it gets what is being published, for which whoever asked waits, and what is served already.
    fn replica_up(&mut self, replica: ReplicaId, users: &dyn Users, effects: &mut Vec<Effect>) {
        for change in self.changes.values_mut() {
            if let Phase::Loading { missing, .. } = &mut change.phase {
                missing.insert(replica);
            }
        }
        // What the store is writing is served in a moment.
        let changed = self.changes.values().filter_map(|change| change.record.as_ref());
        let served = changed.chain(self.names.values()).filter_map(AdapterRecord::served);
        let mut wanted: Vec<AdapterId> = Vec::new();
        for view in served {
            if !wanted.contains(&view.adapter) {
                wanted.push(view.adapter);
            }
        }
        for adapter in wanted.into_iter().take(self.residents.config().max_adapters) {
            self.residents.load(replica, adapter, users, effects);
        }
    }

    /// Whether a name may be changed now by someone who expects `expected` to be served.
    fn check_change(&self, name: &str, expected: Option<u64>) -> Result<(), AdminFailure> {
        if self.changes.contains_key(name) {
            let message = format!("the adapter `{name}` is being changed: try again when that is done");
            return Err(refused(AdminFailureKind::Conflict, message));
        }
        let served = self.names.get(name).and_then(AdapterRecord::served).map(|view| view.generation);
        match expected {
            Some(expected) if expected != served.unwrap_or(0) => {
                let message = format!(
                    "generation {} of `{name}` is served, not {expected}: look at what it is and decide anew",
                    served.unwrap_or(0)
                );
                Err(refused(AdminFailureKind::Conflict, message))
            }
            _ => Ok(()),
        }
    }

    /// Begins what changes wait for and could not be begun for want of room; finds what is there meanwhile.
    fn load_missing(&mut self, users: &dyn Users, effects: &mut Vec<Effect>) {
        let mut ready = Vec::new();
        for change in self.changes.values() {
            let Phase::Loading { adapter, missing } = &change.phase else { continue };
            for &replica in missing {
                if self.residents.load(replica, *adapter, users, effects) == Begun::Ready {
                    ready.push((replica, *adapter));
                }
            }
        }
        for (replica, adapter) in ready {
            self.loaded(replica, Some(adapter), &Loaded::Ready, effects);
        }
    }

    /// A replica has an adapter, or cannot have it; or (`None`) has gone, and need not have any.
    fn loaded(
        &mut self,
        replica: ReplicaId,
        adapter: Option<AdapterId>,
        loaded: &Loaded,
        effects: &mut Vec<Effect>,
    ) {
        let mut ended: Vec<(String, AdminFailure)> = Vec::new();
        let none_left = self.residents.replicas().is_empty();
        for (name, change) in &mut self.changes {
            let Phase::Loading { adapter: waited, missing } = &mut change.phase else { continue };
            if adapter.is_some_and(|adapter| adapter != *waited) || !missing.remove(&replica) {
                continue;
            }
            match loaded {
                Loaded::Failed(failure) => {
                    let message = format!("the adapter `{name}` cannot be loaded: {}", failure.message);
                    ended.push((name.clone(), refused(failure.kind, message)));
                }
                Loaded::Ready if adapter.is_none() && none_left => {
                    let message = "the last replica was lost while it loaded the adapter: try again shortly";
                    ended.push((name.clone(), refused(AdminFailureKind::Unavailable, message)));
                }
                Loaded::Ready if missing.is_empty() => {
                    change.phase = Phase::Storing;
                    let record = change.record.clone();
                    effects.push(Effect::Persist { name: name.clone(), record });
                }
                Loaded::Ready => {}
            }
        }
        for (name, failure) in ended {
            self.give_up(&name, failure, effects);
        }
    }

    /// Ends a change without effect; what ranks have loaded for it goes with the next tick.
    fn give_up(&mut self, name: &str, failure: AdminFailure, effects: &mut Vec<Effect>) {
        if let Some(change) = self.changes.remove(name) {
            effects.push(Effect::Reply(change.caller, AdminReply::Refused(failure)));
        }
    }

    fn persisted(&mut self, now: Millis, name: &str, outcome: Result<(), String>, effects: &mut Vec<Effect>) {
        let taken_back = self.changes.get(name).and_then(|change| change.taken_back);
        match outcome {
            Ok(()) => self.recorded(name, effects),
            Err(reason) => {
                let message = format!("the adapter `{name}` could not be recorded: {reason}");
                self.give_up(name, refused(AdminFailureKind::Unavailable, message), effects);
            }
        }
        if let Some(caller) = taken_back.filter(|_| self.names.contains_key(name)) {
            self.delete(now, caller, name.to_owned(), effects);
        }
    }

    /// The store has a name's change.
    fn recorded(&mut self, name: &str, effects: &mut Vec<Effect>) {
        let Some(change) = self.changes.remove(name) else { return };
        match change.record {
            Some(record) => self.names.insert(name.to_owned(), record),
            None => self.names.remove(name),
        };
        let reply = change.view.map_or(AdminReply::Done, AdminReply::Adapter);
        self.tell_known(effects);
        effects.push(Effect::Published);
        effects.push(Effect::Reply(change.caller, reply));
    }

    fn expire(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let late = |change: &Change| {
            matches!(change.phase, Phase::Loading { .. }) && now.since(change.since) > LOAD_MS_MAX
        };
        let late: Vec<String> =
            self.changes.iter().filter(|(_, change)| late(change)).map(|(name, _)| name.clone()).collect();
        for name in late {
            let message = format!(
                "the adapter `{name}` was not loaded within {} s: its store does not answer, or other adapters and \
                 fine-tuning jobs take all the room",
                LOAD_MS_MAX / 1000
            );
            self.give_up(&name, refused(AdminFailureKind::Unavailable, message), effects);
        }
    }

    /// Takes from memory what no name serves and no sequence has.
    fn sweep(&mut self, users: &dyn Users, effects: &mut Vec<Effect>) {
        let mut keep: BTreeSet<AdapterId> =
            self.names.values().filter_map(AdapterRecord::served).map(|view| view.adapter).collect();
        keep.extend(self.changes.values().filter_map(|change| match &change.record {
            Some(record) => record.served().map(|view| view.adapter),
            None => None,
        }));
        self.residents.sweep(&|adapter| keep.contains(&adapter), users, effects);
    }

    /// Every kept generation may be asked for: a gateway may have pinned one just before it was replaced.
    fn tell_known(&self, effects: &mut Vec<Effect>) {
        let generations = self.names.values().flat_map(|record| &record.generations);
        effects.push(Effect::Known(generations.map(|view| view.adapter).collect()));
    }
}

fn answer_refusal(caller: Caller, begun: Result<(), AdminFailure>, effects: &mut Vec<Effect>) {
    if let Err(failure) = begun {
        effects.push(Effect::Reply(caller, AdminReply::Refused(failure)));
    }
}
