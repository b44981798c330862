//! Responses that outlive the connection over which they were asked for, as a pure function of events.
//!
//! Layout: [`events`] (what goes in and out), `stream` (the tokens of one in progress).
//!
//! The engine computes a kept choice for this core, which remembers what it has said and tells all gateways that follow. A gateway
//! that comes later hears everything from the beginning. Where nobody follows, a response goes on for a while; one in the background is
//! offered to a gateway until one takes it up, and may begin anew after a long loss: its tokens will be the same.
//!
//! **Invariants:** no tokio, clock, randomness or I/O. What has ended stays as it is. Of every response the store is asked for one change at
//! a time, and in the end it has the latest. No answer about a response waits for a store that does not answer.

pub mod events;
mod stream;

pub use events::{Effect, Event, ResponsesConfig};

use crate::engine::GatewayId;
use crate::shelf::Shelf;
use crate::time::Millis;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind, AdminReply};
use ashlar_protocol::responses::{ResponseCall, ResponseOutcome, ResponseRecord, ResponseStatus};
use ashlar_protocol::serving::{ChoiceId, FailureKind, FromScheduler, RequestFailure, Submit};
use ashlar_vocabulary::{BlobId, RequestId, Tenant};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use stream::Stream;

/// Writes of records under way.
const WRITES_MAX: usize = 32;
/// Pause after a write that has failed, in milliseconds.
const RETRY_MS: u64 = 1_000;
/// How long a response in the background has no follower before it is offered to a gateway: after a loss of the scheduler they all
/// come back by themselves.
const OFFER_AFTER_MS: u64 = 1_000;
/// How long a gateway has to take up what it was offered.
const OFFER_MS: u64 = 5_000;
/// Choices that are kept at once; gateways admit fewer each.
const STREAMS_MAX: usize = 4_096;
/// Names of responses that were deleted while in progress, which a late word about their end must not bring back.
const DELETED_MAX: usize = 4_096;
/// Responses that are forgotten per second for their age.
const FORGOTTEN_MAX: usize = 256;

/// Records and streams.
#[derive(Debug, Clone)]
pub struct Responses {
    config: ResponsesConfig,
    records: Shelf<RequestId, ResponseRecord>,
    /// Those that have not ended.
    open: BTreeMap<RequestId, Open>,
    streams: BTreeMap<ChoiceId, Stream>,
    gateways: BTreeSet<GatewayId>,
    /// Which gateway got the last offer.
    offered_last: Option<GatewayId>,
    deleted: VecDeque<RequestId>,
    writes: Writes,
}

/// A response in progress.
#[derive(Debug, Clone)]
struct Open {
    idle_since: Millis,
    offer: Option<(GatewayId, Millis)>,
}

/// What the store does not know yet.
#[derive(Debug, Default, Clone)]
struct Writes {
    changed: BTreeSet<RequestId>,
    under_way: BTreeSet<RequestId>,
    /// Calls that are answered after the next write.
    waiting: BTreeMap<RequestId, Vec<(GatewayId, u64)>>,
    /// Not before then: the store did not answer.
    pause_until: Millis,
}

impl Responses {
    /// Without responses.
    pub fn new(config: ResponsesConfig) -> Responses {
        Responses {
            config,
            records: Shelf::new(|record| record.created_at),
            open: BTreeMap::new(),
            streams: BTreeMap::new(),
            gateways: BTreeSet::new(),
            offered_last: None,
            deleted: VecDeque::new(),
            writes: Writes::default(),
        }
    }

    /// Whether this choice is kept.
    pub fn keeps(&self, id: ChoiceId) -> bool {
        self.streams.contains_key(&id)
    }

    /// A response's record.
    pub fn record(&self, id: RequestId) -> Option<&ResponseRecord> {
        self.records.get(id)
    }

    /// Blobs that records refer to.
    pub fn referenced(&self) -> impl Iterator<Item = BlobId> {
        let answer = |record: &ResponseRecord| record.outcome.and_then(|outcome| outcome.answer);
        self.records.values().flat_map(move |record| [Some(record.request), answer(record)]).flatten()
    }

    /// Applies one event.
    pub fn handle(&mut self, now: Millis, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Stored(records) => {
                for record in records {
                    self.keep(now, record);
                }
            }
            Event::GatewayUp(gateway) => {
                self.gateways.insert(gateway);
            }
            Event::GatewayGone(gateway) => {
                self.gateways.remove(&gateway);
                self.streams.values_mut().for_each(|stream| stream.unfollow(now, gateway));
            }
            Event::Call { gateway, call, tenant, wish } => {
                self.call(now, (gateway, call), tenant.as_ref(), wish, effects);
            }
            Event::Submit { gateway, submit } => self.submit(gateway, submit, effects),
            Event::Unfollow { gateway, id } => {
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.unfollow(now, gateway);
                }
            }
            Event::Said(message) => self.said(now, message, effects),
            Event::Persisted { id, outcome } => self.persisted(now, id, outcome, effects),
            Event::WallClock(unix_s) => self.forget_old(unix_s),
            Event::Tick => self.look_after_the_idle(now, effects),
        }
        self.write(now, effects);
    }

    fn call(
        &mut self,
        now: Millis,
        caller: (GatewayId, u64),
        tenant: Option<&Tenant>,
        wish: ResponseCall,
        effects: &mut Vec<Effect>,
    ) {
        // Of what belongs to others nothing is said, not even that it is there.
        let named = match &wish {
            ResponseCall::Put(record) => record.id,
            ResponseCall::Get(id) | ResponseCall::Cancel(id) | ResponseCall::Delete(id) => *id,
        };
        let is_foreign = |record: &ResponseRecord| tenant.is_some() && record.owner.as_ref() != tenant;
        let reply = match wish {
            _ if self.records.get(named).is_some_and(is_foreign) => Err(no_such_response(named)),
            ResponseCall::Get(id) => self.found(id),
            ResponseCall::Put(record) => match self.put(now, record, caller, effects) {
                Ok(true) => return,
                Ok(false) => Ok(AdminReply::Done),
                Err(failure) => Err(failure),
            },
            ResponseCall::Cancel(id) => {
                self.end(id, ResponseStatus::Cancelled, effects);
                self.found(id)
            }
            ResponseCall::Delete(id) => self.found(id).map(|_| {
                self.end(id, ResponseStatus::Cancelled, effects);
                self.forget(id);
                AdminReply::Done
            }),
        };
        let (gateway, call) = caller;
        effects.push(Effect::Reply { gateway, call, reply });
    }

    fn found(&self, id: RequestId) -> Result<AdminReply, AdminFailure> {
        self.records.get(id).cloned().map(AdminReply::Response).ok_or_else(|| no_such_response(id))
    }

    /// Takes note of a record; whether the caller is answered once it is stored.
    fn put(
        &mut self,
        now: Millis,
        record: ResponseRecord,
        caller: (GatewayId, u64),
        effects: &mut Vec<Effect>,
    ) -> Result<bool, AdminFailure> {
        let id = record.id;
        if self.deleted.contains(&id) {
            return Ok(false);
        }
        match self.records.get_mut(id) {
            None => {
                self.make_room()?;
                let waits = record.background && record.outcome.is_none();
                if record.outcome.is_some() {
                    self.let_go(choice(id), effects);
                }
                self.keep(now, record);
                self.writes.changed.insert(id);
                if waits {
                    self.writes.waiting.entry(id).or_default().push(caller);
                }
                Ok(waits)
            }
            Some(known) => {
                let Some(outcome) = record.outcome else { return Ok(false) };
                // Where it was ended here, the gateway has the last word: it knows what had been said until then.
                if known.outcome.is_none_or(|ended| ended.answer.is_none()) {
                    known.outcome = Some(outcome);
                }
                self.open.remove(&id);
                self.writes.changed.insert(id);
                // Whoever else follows has heard as much as this one and needs no more to come to the same end.
                self.let_go(choice(id), effects);
                Ok(false)
            }
        }
    }

    fn keep(&mut self, now: Millis, record: ResponseRecord) {
        if record.outcome.is_none() {
            self.open.insert(record.id, Open { idle_since: now, offer: None });
        }
        self.records.insert(record.id, record);
    }

    /// Forgets the oldest that has ended, where there are as many as may be.
    fn make_room(&mut self) -> Result<(), AdminFailure> {
        if self.records.len() < self.config.max {
            return Ok(());
        }
        let oldest = self.records.oldest_first().find(|(_, record)| record.outcome.is_some());
        let Some((oldest, _)) = oldest else {
            let message = format!("{} responses are in progress: retry in a moment", self.records.len());
            return Err(refused(AdminFailureKind::Full, message));
        };
        self.forget(oldest);
        Ok(())
    }

    fn forget(&mut self, id: RequestId) {
        let Some(record) = self.records.remove(id) else { return };
        self.open.remove(&id);
        self.writes.changed.insert(id);
        // One whose end a gateway is about to tell.
        if record.outcome.is_none_or(|outcome| outcome.answer.is_none()) {
            self.deleted.push_back(id);
            if self.deleted.len() > DELETED_MAX {
                self.deleted.pop_front();
            }
        }
    }

    fn forget_old(&mut self, unix_s: u64) {
        let is_old = |record: &ResponseRecord| {
            record.outcome.is_some() && record.created_at.saturating_add(self.config.kept_s) < unix_s
        };
        let oldest = self.records.oldest_first().take(FORGOTTEN_MAX);
        let old: Vec<RequestId> = oldest.filter(|(_, record)| is_old(record)).map(|(id, _)| id).collect();
        old.into_iter().for_each(|id| self.forget(id));
    }

    /// Ends a response that is in progress without an answer; its followers hear so, and whoever follows writes what there is.
    fn end(&mut self, id: RequestId, status: ResponseStatus, effects: &mut Vec<Effect>) {
        let Some(record) = self.records.get_mut(id).filter(|record| record.outcome.is_none()) else { return };
        record.outcome = Some(ResponseOutcome { status, answer: None });
        self.open.remove(&id);
        self.writes.changed.insert(id);
        let choice = choice(id);
        let error = RequestFailure {
            kind: FailureKind::Cancelled,
            message: "the response was cancelled".to_owned(),
            retry_after_ms: None,
        };
        self.tell_followers(choice, &FromScheduler::Failed { id: choice, error }, effects);
        self.let_go(choice, effects);
    }

    /// Computes a choice no longer and forgets what it has said.
    fn let_go(&mut self, id: ChoiceId, effects: &mut Vec<Effect>) {
        if let Some(stream) = self.streams.remove(&id)
            && !stream.has_ended()
        {
            effects.push(Effect::Cancel(id));
        }
    }

    fn submit(&mut self, gateway: GatewayId, submit: Box<Submit>, effects: &mut Vec<Effect>) {
        let (id, known) = (submit.id, submit.forced.len());
        let is_full = self.streams.len() >= STREAMS_MAX;
        if is_full && !self.keeps(id) {
            let error = RequestFailure {
                kind: FailureKind::Overloaded,
                message: format!("{STREAMS_MAX} responses are in progress: try again later"),
                retry_after_ms: Some(RETRY_MS),
            };
            effects.push(Effect::ToGateway(gateway, FromScheduler::Failed { id, error }));
            return;
        }
        let mut begins = false;
        let stream = self.streams.entry(id).or_insert_with(|| {
            begins = true;
            Stream::new(&submit)
        });
        stream.follow(gateway, known, &mut |message| effects.push(Effect::ToGateway(gateway, message)));
        if begins {
            effects.push(Effect::Submit(Box::new(Submit { forced_logprobs: Vec::new(), ..*submit })));
        }
    }

    fn said(&mut self, now: Millis, message: FromScheduler, effects: &mut Vec<Effect>) {
        let (id, leaves) = match &message {
            FromScheduler::Token(token) => (token.id, false),
            FromScheduler::PromptLogprobs { id, .. } | FromScheduler::Finished { id, .. } => (*id, false),
            FromScheduler::Failed { id, error } => (*id, error.kind == FailureKind::Leaving),
            _ => return,
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.note(&message);
        }
        self.tell_followers(id, &message, effects);
        if leaves {
            // The next scheduler takes it.
            self.streams.remove(&id);
        } else if let Some(stream) = self.streams.get_mut(&id) {
            stream.settle(now);
        }
    }

    fn tell_followers(&self, id: ChoiceId, message: &FromScheduler, effects: &mut Vec<Effect>) {
        let followers = self.streams.get(&id).into_iter().flat_map(|stream| &stream.followers);
        effects.extend(followers.map(|gateway| Effect::ToGateway(*gateway, message.clone())));
    }

    fn look_after_the_idle(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let grace_ms = self.config.resume_grace_ms;
        let mut over = Vec::new();
        for (id, open) in &mut self.open {
            let stream = self.streams.get(&choice(*id));
            if stream.is_some_and(|stream| !stream.followers.is_empty()) {
                *open = Open { idle_since: now, offer: None };
                continue;
            }
            let Some(record) = self.records.get(*id) else { continue };
            let idle_ms = now.since(open.idle_since);
            if !record.background {
                if idle_ms >= grace_ms {
                    over.push(*id);
                }
                continue;
            }
            let stands = |(gateway, since): (GatewayId, Millis)| {
                self.gateways.contains(&gateway) && now.since(since) < OFFER_MS
            };
            if idle_ms < OFFER_AFTER_MS || open.offer.is_some_and(stands) {
                continue;
            }
            // In turn, so that no gateway gets all.
            let after = self.gateways.iter().find(|gateway| Some(**gateway) > self.offered_last);
            let Some(gateway) = after.or_else(|| self.gateways.first()).copied() else { continue };
            (open.offer, self.offered_last) = (Some((gateway, now)), Some(gateway));
            effects.push(Effect::ToGateway(gateway, FromScheduler::Adopt(Box::new(record.clone()))));
        }
        over.into_iter().for_each(|id| self.end(id, ResponseStatus::Cancelled, effects));
        let is_lost = |stream: &Stream| stream.idle_since.is_some_and(|since| now.since(since) >= grace_ms);
        let lost: Vec<ChoiceId> =
            self.streams.iter().filter(|(_, stream)| is_lost(stream)).map(|(id, _)| *id).collect();
        lost.into_iter().for_each(|id| self.let_go(id, effects));
    }

    fn persisted(
        &mut self,
        now: Millis,
        id: RequestId,
        outcome: Result<(), String>,
        effects: &mut Vec<Effect>,
    ) {
        self.writes.under_way.remove(&id);
        if outcome.is_err() {
            self.writes.changed.insert(id);
            self.writes.pause_until = now.plus(RETRY_MS);
        }
        // Also where the store does not answer: serving does not wait for it.
        let callers = self.writes.waiting.remove(&id).unwrap_or_default();
        let done = |(gateway, call)| Effect::Reply { gateway, call, reply: Ok(AdminReply::Done) };
        effects.extend(callers.into_iter().map(done));
    }

    /// Asks the store for as many changes as may be under way.
    fn write(&mut self, now: Millis, effects: &mut Vec<Effect>) {
        let writes = &mut self.writes;
        if now < writes.pause_until {
            return;
        }
        while writes.under_way.len() < WRITES_MAX {
            let next = writes.changed.iter().find(|id| !writes.under_way.contains(id)).copied();
            let Some(id) = next else { return };
            writes.changed.remove(&id);
            writes.under_way.insert(id);
            effects.push(Effect::Persist { id, record: self.records.get(id).cloned() });
        }
    }

    /// What must hold whatever happens; for tests and the simulation.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        for record in self.records.values() {
            if record.outcome.is_none() != self.open.contains_key(&record.id) {
                return Err(format!("response {} is listed against its state", record.id));
            }
        }
        let listed = self.open.keys().find(|id| !self.records.contains(**id));
        if let Some(id) = listed {
            return Err(format!("response {id} is in progress without a record"));
        }
        for stream in self.streams.values() {
            if stream.followers.is_empty() != stream.idle_since.is_some() {
                return Err("a stream is idle against its followers".to_owned());
            }
        }
        Ok(())
    }
}

/// The one choice of a response.
fn choice(id: RequestId) -> ChoiceId {
    ChoiceId { request: id, choice: 0 }
}

fn no_such_response(id: RequestId) -> AdminFailure {
    refused(AdminFailureKind::NotFound, format!("no response with the id resp_{id}"))
}

fn refused(kind: AdminFailureKind, message: String) -> AdminFailure {
    AdminFailure { kind, message }
}
