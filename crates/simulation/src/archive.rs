//! The scheduler's shell towards the store, in one life: records in order and again until they are written, blobs beside
//! that. It does what the service does, call by call.

use crate::durable::{Answer, Refusal, Wish};
use crate::process::{Action, Errand, Timer};
use crate::weights::Content;
use ashlar_protocol::admin::JobEventKind;
use ashlar_scheduler::adapters::AdapterRecord;
use ashlar_scheduler::jobs::{Effect, Event, SaveId};
use ashlar_vocabulary::LeaseTerm;
use std::collections::{BTreeMap, VecDeque};

/// Pause before the store is asked again.
const RETRY_US: u64 = 150_000;
/// Attempts to delete blobs or to write a table, with pauses that grow.
const ATTEMPTS_MAX: u64 = 5;
const KEEPER_RETRY_US: u64 = 2_000_000;

/// Another scheduler has taken over.
pub(crate) struct Superseded;

/// Writes records, one after the other.
pub(crate) struct Archive {
    term: LeaseTerm,
    wishes: VecDeque<Effect>,
    /// Of the first wish, chunks that are written.
    chunks: usize,
    claimed: bool,
    /// A call is under way, or will be tried again.
    busy: bool,
    away: bool,
}

impl Archive {
    pub(crate) fn new(term: LeaseTerm) -> Archive {
        Archive { term, wishes: VecDeque::new(), chunks: 0, claimed: false, busy: false, away: false }
    }

    pub(crate) fn give(&mut self, wish: Effect, actions: &mut Vec<Action>) {
        self.wishes.push_back(wish);
        self.go_on(actions);
    }

    /// Makes the next call, if none is under way.
    pub(crate) fn go_on(&mut self, actions: &mut Vec<Action>) {
        if self.busy {
            return;
        }
        let wish = match self.wishes.front() {
            _ if !self.claimed => Wish::Claim(self.term),
            None => return,
            Some(Effect::SaveFile(file)) => Wish::SaveFile(file.clone()),
            Some(Effect::ForgetFile(id)) => Wish::ForgetFile(*id),
            Some(Effect::SaveJob { job, chunks }) => match chunks.get(self.chunks) {
                Some((chunk, events)) => {
                    let (job, events) = (job.record.request.id, events.clone());
                    Wish::SaveChunk { term: self.term, job, chunk: *chunk, events }
                }
                None => Wish::SaveJob(job.clone()),
            },
            Some(Effect::ReadEvents { job, from, to, .. }) => {
                Wish::ReadEvents { job: *job, from: *from, to: *to }
            }
            Some(_) => {
                self.wishes.pop_front();
                return self.go_on(actions);
            }
        };
        self.busy = true;
        actions.push(Action::Call(Errand::Archive, wish));
    }

    pub(crate) fn retry(&mut self, actions: &mut Vec<Action>) {
        self.busy = false;
        self.go_on(actions);
    }

    /// Takes the answer to the call under way.
    pub(crate) fn answered(
        &mut self,
        answer: Result<Answer, Refusal>,
        events: &mut Vec<Event>,
        actions: &mut Vec<Action>,
    ) -> Result<(), Superseded> {
        let answer = match answer {
            Ok(Answer::Done) if !self.claimed => return Err(Superseded),
            Err(Refusal::Superseded) => return Err(Superseded),
            Ok(answer) => answer,
            Err(_) => {
                if !std::mem::replace(&mut self.away, true) {
                    events.push(Event::StoreDown("the store does not answer".into()));
                }
                if let (true, Some(Effect::ReadEvents { read, .. })) = (self.claimed, self.wishes.front()) {
                    events.push(Event::EventsRead { read: *read, events: None });
                    self.wishes.pop_front();
                }
                actions.push(Action::Wake { after_us: RETRY_US, timer: Timer::Archive });
                return Ok(());
            }
        };
        if std::mem::take(&mut self.away) {
            events.push(Event::StoreUp);
        }
        self.busy = false;
        match answer {
            Answer::Loaded(loaded) => {
                self.claimed = true;
                events.push(Event::Loaded(loaded));
            }
            answer => self.done(answer, events),
        }
        self.go_on(actions);
        Ok(())
    }

    fn done(&mut self, answer: Answer, events: &mut Vec<Event>) {
        if let Some(Effect::SaveJob { chunks, .. }) = self.wishes.front()
            && self.chunks < chunks.len()
        {
            self.chunks += 1;
            return;
        }
        self.chunks = 0;
        match (self.wishes.pop_front(), answer) {
            (Some(Effect::SaveFile(file)), _) => events.push(Event::Saved(SaveId::File(file.id))),
            (Some(Effect::ForgetFile(id)), _) => events.push(Event::Saved(SaveId::File(id))),
            (Some(Effect::SaveJob { job, .. }), _) => {
                events.push(Event::Saved(SaveId::Job(job.record.request.id)));
            }
            (Some(Effect::ReadEvents { read, .. }), Answer::Events(read_events)) => {
                events.push(Event::EventsRead { read, events: Some(read_events) });
            }
            _ => {}
        }
    }
}

/// Deletes blobs and writes tables, one after the other.
#[derive(Default)]
pub(crate) struct Keeper {
    wishes: VecDeque<Effect>,
    /// Of the first wish, blobs that are done with.
    blobs: usize,
    /// The table that is to be written, once its events are read.
    rows: Option<u64>,
    attempts: u64,
    busy: bool,
}

impl Keeper {
    pub(crate) fn give(&mut self, wish: Effect, actions: &mut Vec<Action>) {
        self.wishes.push_back(wish);
        self.go_on(actions);
    }

    pub(crate) fn retry(&mut self, actions: &mut Vec<Action>) {
        self.busy = false;
        self.go_on(actions);
    }

    fn go_on(&mut self, actions: &mut Vec<Action>) {
        if self.busy {
            return;
        }
        let wish = match (self.wishes.front(), self.rows) {
            (None, _) => return,
            (Some(Effect::DeleteBlobs { blobs, .. }), _) if self.blobs < blobs.len() => {
                Wish::Delete(blobs[self.blobs])
            }
            (Some(Effect::WriteResults { job, .. }), Some(rows)) => {
                Wish::Put(Content::Table { job: *job, rows })
            }
            (Some(Effect::WriteResults { job, chunks }), None) => {
                Wish::ReadEvents { job: *job, from: 0, to: *chunks }
            }
            // All is young here: a sweep would find nothing.
            (Some(_), _) => {
                self.wishes.pop_front();
                return self.go_on(actions);
            }
        };
        self.busy = true;
        actions.push(Action::Call(Errand::Keeper, wish));
    }

    pub(crate) fn answered(
        &mut self,
        answer: Result<Answer, Refusal>,
        events: &mut Vec<Event>,
        actions: &mut Vec<Action>,
    ) {
        if answer.is_err() && self.attempts + 1 < ATTEMPTS_MAX {
            self.attempts += 1;
            let after_us = KEEPER_RETRY_US * self.attempts;
            return actions.push(Action::Wake { after_us, timer: Timer::Keeper });
        }
        self.busy = false;
        match (self.wishes.front(), answer) {
            (Some(Effect::DeleteBlobs { job, blobs }), _) => {
                // One that could not be deleted is left to the sweep.
                self.blobs += 1;
                if self.blobs == blobs.len() {
                    let (job, blobs) = (*job, blobs.clone());
                    self.finish(Some(Event::BlobsDeleted { job, blobs }), events);
                }
            }
            (Some(Effect::WriteResults { .. }), Ok(Answer::Events(stored))) => {
                let is_step = |what: &JobEventKind| matches!(what, JobEventKind::Step { .. });
                self.rows = Some(stored.iter().filter(|event| is_step(&event.what)).count() as u64);
            }
            (Some(Effect::WriteResults { job, .. }), answer) => {
                let outcome = match answer {
                    Ok(Answer::Stored(blob)) => Ok((blob, 10)),
                    _ => Err("the blob store does not answer".to_owned()),
                };
                let job = *job;
                self.finish(Some(Event::ResultsWritten { job, outcome }), events);
            }
            _ => self.finish(None, events),
        }
        self.go_on(actions);
    }

    fn finish(&mut self, event: Option<Event>, events: &mut Vec<Event>) {
        events.extend(event);
        (self.blobs, self.rows, self.attempts) = (0, None, 0);
        self.wishes.pop_front();
    }
}

/// Records of what is served: written beside the work, each expecting what this life has read or written.
#[derive(Default)]
pub(crate) struct Names {
    versions: BTreeMap<String, u64>,
    /// What is being written.
    writes: BTreeMap<String, Option<AdapterRecord>>,
}

impl Names {
    /// Takes note of what was read.
    pub(crate) fn read(&mut self, stored: Vec<(String, u64, AdapterRecord)>) -> Vec<(String, AdapterRecord)> {
        self.versions.extend(stored.iter().map(|(name, version, _)| (name.clone(), *version)));
        stored.into_iter().map(|(name, _, record)| (name, record)).collect()
    }

    pub(crate) fn write(&mut self, name: String, record: Option<AdapterRecord>, actions: &mut Vec<Action>) {
        let expected = self.versions.get(&name).copied();
        self.writes.insert(name.clone(), record.clone());
        actions.push(Action::Call(Errand::Name(name.clone()), Wish::PutAdapter { name, expected, record }));
    }

    /// What became of a write.
    pub(crate) fn written(&mut self, name: &str, answer: Result<Answer, Refusal>) -> Result<(), String> {
        let wanted = self.writes.remove(name).flatten();
        let (version, outcome) = match answer {
            Ok(Answer::Written(version)) => (version, Ok(())),
            // A write of ours that was not confirmed, or somebody else's.
            Err(Refusal::Conflict(found)) => {
                let same = found.as_ref().map(|(_, record)| record) == wanted.as_ref();
                let outcome = if same { Ok(()) } else { Err("another version is there".to_owned()) };
                (found.map(|(version, _)| version), outcome)
            }
            _ => return Err("the store does not answer".to_owned()),
        };
        match version {
            Some(version) => self.versions.insert(name.to_owned(), version),
            None => self.versions.remove(name),
        };
        outcome
    }
}
