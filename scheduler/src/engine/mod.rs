//! Continuous batching as a pure function of events.
//!
//! Layout: [`events`] (what goes in and out), [`block_pool`] and [`prefix_cache`] (KV blocks and what is in them),
//! `admission` (who is let in), `pace` (how long what waits will take), [`sequence`] (one continuation and its state), [`queue`] (who waits), [`budget`] (how long a step takes), [`replica`]
//! (blocks and steps of one replica), `planner` (what the next step computes), `results` (what comes back).
//!
//! **Invariants:** no tokio, clock, randomness, I/O or randomly seeded map: equal events give equal effects. A sequence
//! is sampled by at most one step in flight. Every submitted choice ends by exactly one `Finished` or `Failed`, unless it
//! is cancelled; the loss of a replica ends none. Ranks execute steps strictly in order; therefore a block that an ended or preempted sequence gave back
//! may be written by the very next step, and a block may be hit by the steps after the one that fills it.

mod admission;
pub mod block_pool;
pub mod budget;
pub mod events;
mod pace;
mod planner;
pub mod prefix_cache;
pub mod queue;
pub mod replica;
mod results;
pub mod sequence;

pub use budget::StageCost;
pub use events::{Effect, EngineConfig, Event, GatewayId, LostBlocks, ReplicaUp};
pub use prefix_cache::BLOCK_TOKENS;

use crate::adapters::{Usage, Users};
use crate::audit::{self, AuditId};
use crate::time::Millis;
use ashlar_protocol::serving::{ChoiceId, FailureKind, RequestView, SchedulerCounters};
use ashlar_vocabulary::{AdapterId, KeyId, ReplicaId, SequenceId};
use pace::Pace;
use planner::Planner;
use queue::Queue;
use replica::Replica;
use sequence::{Audited, CRASHES_MAX, Sequence, State};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// How many ended choices are remembered, so that a repeated submission does not start them anew.
const REMEMBERED: usize = 1024;
/// A step unanswered for longer than this, in milliseconds, or than [`STUCK_STEP_FACTOR`] times what was predicted for all
/// stages, will not be answered any more: a link between two ranks is broken without either having noticed.
const STUCK_STEP_MS: u64 = 5_000;
/// See [`STUCK_STEP_MS`].
const STUCK_STEP_FACTOR: f64 = 16.0;

/// The engine: sequences, replicas, and the queue between them.
#[derive(Debug, Clone)]
pub struct Engine {
    config: EngineConfig,
    replicas: BTreeMap<ReplicaId, Replica>,
    sequences: BTreeMap<SequenceId, Sequence>,
    by_choice: BTreeMap<ChoiceId, SequenceId>,
    deadlines: BTreeSet<(Millis, SequenceId)>,
    queue: Queue,
    /// Choices that ended lately, by the connection that submitted them.
    ended: VecDeque<(GatewayId, ChoiceId)>,
    last_sequence: u64,
    /// Adapters that may be asked for.
    adapters: BTreeSet<AdapterId>,
    problem: Option<String>,
    /// Whether that will not pass by itself.
    lasting_problem: bool,
    /// Since when no replica is up.
    down_since: Option<Millis>,
    draining: bool,
    counters: SchedulerCounters,
    /// When somebody was last refused because there was too much, within [`SHEDDING_MS`].
    shed_at: Option<Millis>,
    /// How fast replicas work while somebody waits.
    pace: Pace,
    /// Percent of the KV blocks that keys may hold, where not all.
    kv_shares: BTreeMap<KeyId, u8>,
    /// Tokens generated on the account of keys, which nobody has asked for yet.
    generated: BTreeMap<KeyId, u64>,
    /// Replicas to which something has happened since they were planned.
    touched: Touched,
    /// Audited sequences that were taken out before they were complete; to be told.
    audits_ended: Vec<SequenceId>,
}

/// How long after it refused somebody for having too much to do the engine is said to shed.
const SHEDDING_MS: u64 = 5_000;

/// Which replicas may have a step to send: all that were planned before and have heard nothing since have none, as long as
/// nobody waits.
#[derive(Debug, Clone)]
enum Touched {
    All,
    These(BTreeSet<ReplicaId>),
}

impl Engine {
    /// An engine without replicas.
    pub fn new(config: EngineConfig) -> Engine {
        Engine {
            queue: Queue::new(config.queue_max),
            config,
            replicas: BTreeMap::new(),
            sequences: BTreeMap::new(),
            by_choice: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            ended: VecDeque::new(),
            last_sequence: 0,
            adapters: BTreeSet::new(),
            problem: None,
            lasting_problem: false,
            down_since: None,
            draining: false,
            counters: SchedulerCounters::default(),
            shed_at: None,
            pace: Pace::new(),
            kv_shares: BTreeMap::new(),
            generated: BTreeMap::new(),
            touched: Touched::All,
            audits_ended: Vec::new(),
        }
    }

    /// Applies one event and sends what has become possible.
    pub fn handle(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        self.apply(now, event, effects);
        self.plan(now, effects);
    }

    /// Applies one event without planning, so that several that arrived together share a step. [`plan`](Self::plan) must
    /// follow.
    pub fn apply(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        match (&event, &mut self.touched) {
            (
                Event::StepResult { replica, .. } | Event::StepDone { replica, .. },
                Touched::These(touched),
            ) => {
                touched.insert(*replica);
            }
            (Event::StepResult { .. } | Event::StepDone { .. }, Touched::All) => {}
            (_, touched) => *touched = Touched::All,
        }
        match event {
            Event::Submit { gateway, submit } => {
                let logits_from = submit.prompt.len().saturating_sub(1) as u32;
                let audited = is_sampled(submit.id, self.config.audit_per_million)
                    .then_some(Audited { logits_from, only_on: None });
                if let Some(id) = self.submit(now, gateway, submit, audited, effects) {
                    self.begin_audit(id, None, effects);
                }
            }
            Event::KvShares(shares) => self.kv_shares = shares,
            Event::Repeat { audit, replica, mut submit, logits_from } => {
                // On nobody's account.
                submit.charge = None;
                let audited = Audited { logits_from, only_on: Some(replica) };
                let up = self.replicas.contains_key(&replica);
                let id = up.then(|| self.submit(now, GatewayId::AUDITOR, submit, Some(audited), effects));
                match id.flatten() {
                    Some(id) => self.begin_audit(id, Some(audit), effects),
                    None => effects.push(Effect::Audit(audit::Event::Refused { audit })),
                }
            }
            Event::Cancel { gateway, id } => self.cancel(gateway, id),
            Event::GatewayGone { gateway } => self.gateway_gone(gateway),
            Event::ReplicaUp(up) => {
                self.replica_down(now, up.replica, effects);
                self.replicas.insert(up.replica, Replica::new(&up));
                self.refuse_too_long(now, FailureKind::Invalid, effects);
            }
            Event::ReplicaDown { replica, reason: _ } => self.replica_down(now, replica, effects),
            Event::ReplicaCrashed { replica, reason } => {
                self.replica_down(now, replica, effects);
                self.suspect(now, replica, &reason, effects);
            }
            Event::StepResult { replica, result } => self.step_result(now, replica, result, effects),
            Event::StepDone { replica, revision, stage, step, timing } => {
                self.step_done(replica, revision, stage, step, &timing);
            }
            Event::AdaptersKnown(adapters) => self.adapters = adapters,
            Event::AdapterResident { replica, adapter } => {
                if let Some(replica) = self.replicas.get_mut(&replica) {
                    replica.wanted.remove(&adapter);
                    replica.adapters.insert(adapter, now);
                }
            }
            Event::AdapterGone { replica, adapter } => {
                if let Some(replica) = self.replicas.get_mut(&replica) {
                    replica.adapters.remove(&adapter);
                }
            }
            Event::AdapterFailed { replica, adapter, reason } => {
                self.adapter_failed(now, replica, adapter, &reason, effects);
            }
            Event::Problem { problem, lasting } => (self.problem, self.lasting_problem) = (problem, lasting),
            Event::ReplicaDrains { replica, drains } => {
                if let Some(replica) = self.replicas.get_mut(&replica) {
                    replica.draining = drains;
                }
            }
            Event::Drain => self.draining = true,
            Event::Tick => {
                self.give_up_stuck_replicas(now, effects);
                self.lose_patience(now, effects);
                self.shed_at.take_if(|at| now.since(*at) > SHEDDING_MS);
            }
        }
        if self.replicas.is_empty() {
            self.down_since.get_or_insert(now);
        } else {
            self.down_since = None;
        }
        self.expire(now, effects);
        let ended = self.audits_ended.drain(..);
        effects
            .extend(ended.map(|sequence| Effect::Audit(audit::Event::Ended { sequence, transcript: None })));
    }

    /// Sends every step that may be sent now.
    pub fn plan(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let touched = std::mem::replace(&mut self.touched, Touched::These(BTreeSet::new()));
        let replicas: Vec<ReplicaId> = match touched {
            Touched::These(touched) if self.queue.is_empty() => touched.into_iter().collect(),
            // Whoever waits may be admitted by any of them.
            Touched::These(_) | Touched::All => self.replicas.keys().copied().collect(),
        };
        for id in replicas {
            // Out of the map while it is planned, so that the others can be compared with it.
            let Some(mut replica) = self.replicas.remove(&id) else { continue };
            let mut planner = Planner {
                now,
                config: &self.config,
                replica: &mut replica,
                others: &self.replicas,
                sequences: &mut self.sequences,
                queue: &mut self.queue,
                counters: &mut self.counters,
                kv_shares: &self.kv_shares,
                wants: Vec::new(),
            };
            while let Some(plan) = planner.next_step() {
                effects.push(Effect::SendStep { replica: id, plan: Box::new(plan) });
            }
            let wants = planner.wants.into_iter();
            effects.extend(wants.map(|adapter| Effect::WantAdapter { replica: id, adapter }));
            self.replicas.insert(id, replica);
        }
    }

    fn begin_audit(&self, id: SequenceId, repeats: Option<AuditId>, effects: &mut Vec<Effect>) {
        if self.sequences.get(&id).is_some_and(|sequence| sequence.audit.is_some()) {
            effects.push(Effect::Audit(audit::Event::Begun { sequence: id, repeats }));
        }
    }

    /// Choices in progress on a key's account.
    pub fn in_progress(&self, key: KeyId) -> usize {
        self.sequences.values().filter(|sequence| sequence.key() == Some(key)).count()
    }

    /// Tokens that have been generated on the account of keys since this was asked last.
    pub fn take_generated(&mut self) -> BTreeMap<KeyId, u64> {
        std::mem::take(&mut self.generated)
    }

    fn cancel(&mut self, gateway: GatewayId, id: ChoiceId) {
        let sequence = self.by_choice.get(&id).copied();
        let own =
            |id: &SequenceId| self.sequences.get(id).is_some_and(|sequence| sequence.gateway == gateway);
        if let Some(sequence) = sequence.filter(own) {
            self.remove(sequence);
            self.remember(gateway, id);
        }
    }

    fn gateway_gone(&mut self, gateway: GatewayId) {
        let theirs = |sequence: &&Sequence| sequence.gateway == gateway;
        let gone: Vec<SequenceId> =
            self.sequences.values().filter(theirs).map(|sequence| sequence.id).collect();
        for id in gone {
            self.remove(id);
        }
        self.ended.retain(|(owner, _)| *owner != gateway);
    }

    /// What a replica had computed is gone. Its sequences wait for another one, or for its return, with all their tokens.
    fn replica_down(&mut self, now: Millis, id: ReplicaId, effects: &mut Vec<Effect>) {
        let Some(replica) = self.replicas.remove(&id) else { return };
        let oldest = replica.in_flight.front().map(|flight| flight.step);
        for sequence in self.sequences.values_mut().filter(|sequence| sequence.replica() == Some(id)) {
            let last_step = sequence.running().map(|running| running.last_step);
            sequence.lose_replica(oldest.is_some() && last_step >= oldest);
            self.queue.put_back(sequence.order, sequence.id);
            self.counters.replays += 1;
        }
        // What was to be computed there alone is of no use elsewhere.
        let only_there = |sequence: &&Sequence| sequence.only_on() == Some(id);
        let repeats: Vec<SequenceId> =
            self.sequences.values().filter(only_there).map(|sequence| sequence.id).collect();
        for sequence in repeats {
            self.remove(sequence);
        }
        // The one with room may come back.
        self.refuse_too_long(now, FailureKind::Unavailable, effects);
    }

    /// A replica was lost by a crash: whatever it computed may be why. A mere loss (a host that is gone, a process that was killed)
    /// accuses nobody.
    fn suspect(&mut self, now: Millis, id: ReplicaId, reason: &str, effects: &mut Vec<Effect>) {
        let mut given_up = Vec::new();
        for sequence in self.sequences.values_mut().filter(|sequence| sequence.lost_with == Some(id)) {
            sequence.lost_with = None;
            sequence.crashes += 1;
            if sequence.crashes >= CRASHES_MAX {
                given_up.push(sequence.id);
            }
        }
        for id in given_up {
            let message = format!(
                "whatever computed this request has crashed, {CRASHES_MAX} times in a row ({reason}): it is not tried again"
            );
            self.fail(now, id, FailureKind::Suspect, message, effects);
        }
    }

    /// Ends the sequences that wait for an adapter which cannot be loaded, unless another replica has it.
    fn adapter_failed(
        &mut self,
        now: Millis,
        id: ReplicaId,
        adapter: AdapterId,
        reason: &str,
        effects: &mut Vec<Effect>,
    ) {
        if let Some(replica) = self.replicas.get_mut(&id) {
            replica.wanted.remove(&adapter);
        }
        if self.replicas.values().any(|replica| replica.has(Some(adapter))) {
            return;
        }
        let waits = |sequence: &&Sequence| {
            matches!(sequence.state, State::Waiting) && sequence.submit.adapter == Some(adapter)
        };
        let waiting: Vec<SequenceId> =
            self.sequences.values().filter(waits).map(|sequence| sequence.id).collect();
        for id in waiting {
            let message = format!("the adapter could not be loaded: {reason}");
            self.fail(now, id, FailureKind::Unavailable, message, effects);
        }
    }

    fn expire(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        while let Some(&(deadline, id)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= now) {
            let waited =
                self.sequences.get(&id).map_or(0, |sequence| deadline.since(sequence.history.arrival));
            let message = format!("not complete within its deadline of {waited} ms");
            self.fail(now, id, FailureKind::DeadlineExceeded, message, effects);
            self.deadlines.remove(&(deadline, id));
        }
    }

    /// Gives up replicas whose oldest step has been in flight for far longer than it can take.
    fn give_up_stuck_replicas(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let stuck = |replica: &&Replica| {
            replica.in_flight.front().is_some_and(|oldest| {
                let stages = (replica.num_stages + replica.in_flight.len()) as f64;
                let predicted_ms = STUCK_STEP_FACTOR * stages * oldest.predicted_us / 1000.0;
                now.since(oldest.sent) > STUCK_STEP_MS.max(predicted_ms as u64)
            })
        };
        let stuck: Vec<_> =
            self.replicas.values().filter(stuck).map(|replica| (replica.id, replica.revision)).collect();
        for (replica, revision) in stuck {
            let reason = "a step was never answered".to_owned();
            self.replica_down(now, replica, effects);
            effects.push(Effect::ReplicaFault { replica, revision, reason });
        }
    }

    fn note_end(&mut self, now: Millis, sequence: &Sequence) {
        self.pace.ended(sequence.generated.len());
        if let Some(replica) = sequence.replica().and_then(|replica| self.replicas.get_mut(&replica)) {
            replica.used(sequence.submit.adapter, now);
        }
        self.remember(sequence.gateway, sequence.submit.id);
    }

    fn remember(&mut self, gateway: GatewayId, id: ChoiceId) {
        self.ended.push_back((gateway, id));
        if self.ended.len() > REMEMBERED {
            self.ended.pop_front();
        }
    }

    /// Numbers for metrics.
    pub fn counters(&self) -> SchedulerCounters {
        let running = self.replicas.values().map(|replica| replica.running.len() as u64).sum();
        SchedulerCounters {
            running,
            waiting: self.queue.len() as u64,
            shedding: self.shed_at.is_some(),
            predicted_wait_ms: self.predicted_wait_ms(),
            ..self.counters
        }
    }

    /// Clients' choices in progress: those that have been computed something of first, each in the order of their names; at most
    /// `limit`.
    pub fn requests(&self, now: Millis, limit: usize) -> Vec<RequestView> {
        let is_clients = |sequence: &&Sequence| sequence.gateway != GatewayId::AUDITOR;
        let placed = |sequence: &&Sequence| sequence.replica().is_some();
        let all = || self.sequences.values().filter(is_clients);
        let ordered = all().filter(placed).chain(all().filter(|sequence| !placed(sequence)));
        ordered.take(limit).map(|sequence| sequence.view(now)).collect()
    }

    /// A replica that is up.
    pub fn replica(&self, id: ReplicaId) -> Option<&Replica> {
        self.replicas.get(&id)
    }

    /// Whether no choice is in progress.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Whether sequences are bound to a replica, or steps in flight there.
    pub fn has_work(&self, id: ReplicaId) -> bool {
        let in_flight = self.replicas.get(&id).is_some_and(|replica| !replica.in_flight.is_empty());
        in_flight || self.sequences.values().any(|sequence| sequence.replica() == Some(id))
    }

    /// Longest predicted time of a stage among the steps in flight, in milliseconds.
    pub fn slowest_step_ms(&self) -> u64 {
        let flights = self.replicas.values().flat_map(|replica| &replica.in_flight);
        flights.map(|flight| flight.predicted_us / 1000.0).fold(0.0, f64::max).ceil() as u64
    }

    /// Verifies what must always hold: no block lost or doubled, every sequence in exactly the lists that its state
    /// says. For tests and the simulation.
    pub fn check(&self) -> Result<(), String> {
        for replica in self.replicas.values() {
            let mut holds = Vec::new();
            for (order, id) in &replica.running {
                let sequence = self.sequences.get(id).ok_or(format!("running sequence {id} has ended"))?;
                let running =
                    sequence.running().ok_or(format!("sequence {id} is listed, but does not run"))?;
                if running.replica != replica.id || sequence.order != *order {
                    return Err(format!("sequence {id} is listed at the wrong replica or rank"));
                }
                if running.computed > running.blocks.len() * BLOCK_TOKENS || running.computed > sequence.len()
                {
                    return Err(format!(
                        "sequence {id} has computed {} positions without room",
                        running.computed
                    ));
                }
                holds.extend(running.blocks.iter().copied());
            }
            replica.pool.check(holds.into_iter()).map_err(|why| format!("replica {}: {why}", replica.id))?;
        }
        for sequence in self.sequences.values() {
            let queued = self.queue.iter().any(|id| id == sequence.id);
            let (should_queue, replica) = match &sequence.state {
                State::Waiting => (true, None),
                State::Running(running) => (false, Some(running.replica)),
                State::Preempted(preempted) => (true, Some(preempted.replica)),
            };
            if queued != should_queue || replica.is_some_and(|replica| !self.replicas.contains_key(&replica))
            {
                return Err(format!("sequence {} is queued or placed against its state", sequence.id));
            }
        }
        let listed = (self.by_choice.len(), self.deadlines.len());
        if listed != (self.sequences.len(), self.sequences.len()) {
            return Err(format!("{listed:?} choices and deadlines for {} sequences", self.sequences.len()));
        }
        Ok(())
    }
}

/// Whether a choice is among those that are audited: by its name, so that it is again when it is submitted again.
fn is_sampled(choice: ChoiceId, per_million: u32) -> bool {
    let request = choice.request.0;
    let folded = (request ^ (request >> 64)) as u64 ^ u64::from(choice.choice);
    // The finaliser of SplitMix64: names need not be evenly distributed.
    let mixed = (folded ^ (folded >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) % 1_000_000 < u64::from(per_million)
}

impl Users for Engine {
    fn usage(&self, replica: ReplicaId, adapter: AdapterId) -> Usage {
        let with = || self.sequences.values().filter(|sequence| sequence.submit.adapter == Some(adapter));
        let last = self.replicas.get(&replica).and_then(|replica| replica.adapters.get(&adapter));
        Usage {
            bound: with().any(|sequence| sequence.replica() == Some(replica)),
            wanted: with().next().is_some(),
            last: last.copied().unwrap_or_default(),
        }
    }
}
