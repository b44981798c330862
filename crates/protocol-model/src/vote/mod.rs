//! When a training step counts: one job, two schedulers, the ranks of a session, the store's record of the job, and blobs.
//!
//! Layout: `leader` (what a scheduler does with votes and records), `rank` (what ranks do), this file (state, faults, properties).
//!
//! Who may lead is [`lease`](crate::lease)'s matter; here a rank obeys the highest term it has seen, and leaders may be two for as
//! long as one of them does not know. A blob's name is its content, and a state's content is a function of its steps and its rank,
//! so a blob is a pair of these. What an ended connection has still delivered, its leader reads later.

mod leader;
mod rank;

use crate::checker::{Model, Step};
use std::collections::VecDeque;

/// Rules that can be switched off, to see the checker find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// A step is committed with every rank's vote, not with the first.
    pub needs_all_votes: bool,
    /// A step is committed once the record of the one before is durable.
    pub one_ahead: bool,
    /// Blobs of a former state are deleted after a later record is durable.
    pub deletes_after: bool,
    /// Whoever takes over claims the record, and nobody writes over what is not his.
    pub claims: bool,
    /// A rank computes the step that follows its state and no other.
    pub in_step: bool,
    /// Blobs of one more former state are kept than the protocol keeps.
    pub keeps_one_more: bool,
}

impl Rules {
    /// As the protocol has them.
    pub const ALL: Rules = Rules {
        needs_all_votes: true,
        one_ahead: true,
        deletes_after: true,
        claims: true,
        in_step: true,
        keeps_one_more: false,
    };
}

/// The model and its bounds.
#[derive(Debug, Clone, Copy)]
pub struct Vote {
    /// Ranks of the session.
    pub ranks: usize,
    /// Steps of the job.
    pub steps: u8,
    /// Faults, of whatever kinds.
    pub faults: u8,
    /// Whether one of them may be a copy of a message that turns up later.
    pub copies: bool,
    /// Whether one of them may be that the store forgets the latest write of the record.
    pub forgets: bool,
    /// Which rules are in force.
    pub rules: Rules,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A scheduler gets the lease.
    Acquire(usize),
    /// A leader learns that the lease is another one's.
    LoseLease(usize),
    /// It reads the record and writes its term into it.
    Claim(usize),
    /// It opens a session.
    OpenSession(usize),
    /// It hears the next message of a rank, or that the connection has ended.
    Hear(usize, usize),
    /// The store writes the record that it was given, or refuses to.
    Write(usize),
    /// The leader hears what became of it.
    Written(usize),
    /// Blobs that nobody needs are deleted.
    Delete(usize),
    /// A stopped scheduler goes on.
    Resume(usize),
    /// A rank reaches this scheduler.
    Join(usize, usize),
    /// A rank does the next thing that it was told.
    Obey(usize, ToRank),
    /// A rank notices that another one has left the session.
    NoticeLink(usize),
    /// A copy of a message turns up.
    StrayArrives,
    /// A copy of a message is made of the next one to or from a rank.
    Copy(usize),
    /// A scheduler dies.
    CrashLeader(usize),
    /// A scheduler stands still, or loses the lease without knowing.
    Pause(usize),
    /// A rank dies; whether its last words arrive.
    CrashRank(usize, bool),
    /// A rank's connection ends; whether what was on its way arrives.
    CutRank(usize, bool),
    /// The store forgets the latest write.
    Forget,
}

/// A session: its term, and its number in that.
pub type SessionId = (u8, u8);

/// Scheduler to rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToRank {
    /// Take part, from the state after so many steps.
    Open(SessionId, u8),
    /// Compute this step.
    Step(SessionId, u8),
    /// The session is over.
    Close(SessionId),
}

/// Rank to scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Report {
    Opened,
    /// The state after this step is durable.
    Prepared(u8),
    Failed,
}

/// A set of blobs: one per number of steps and rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Blobs(u32);

const RANKS_MAX: usize = 4;

impl Blobs {
    pub(super) fn one(steps: u8, rank: usize) -> Blobs {
        Blobs(1 << (usize::from(steps) * RANKS_MAX + rank))
    }

    /// Every rank's of a state. The first state is nobody's: it is made anew.
    pub(super) fn state(steps: u8, ranks: usize) -> Blobs {
        if steps == 0 { Blobs(0) } else { Blobs(((1 << ranks) - 1) << (usize::from(steps) * RANKS_MAX)) }
    }

    /// Those of states before this one.
    pub(super) fn before(self, steps: u8) -> Blobs {
        Blobs(self.0 & ((1 << (usize::from(steps) * RANKS_MAX)) - 1))
    }

    pub(super) fn and(self, others: Blobs) -> Blobs {
        Blobs(self.0 | others.0)
    }

    pub(super) fn without(self, others: Blobs) -> Blobs {
        Blobs(self.0 & !others.0)
    }

    pub(super) fn has(self, others: Blobs) -> bool {
        others.without(self).0 == 0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The job's record in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Record {
    pub(super) version: u8,
    pub(super) term: u8,
    pub(super) steps: u8,
    pub(super) superseded: Blobs,
}

/// A scheduler's process.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Scheduler {
    pub(super) paused: bool,
    pub(super) leads: Option<Leader>,
}

/// A term of leading.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Leader {
    pub(super) term: u8,
    /// Of the record, once it has been claimed.
    pub(super) version: Option<u8>,
    pub(super) steps: u8,
    /// Steps of the durable record.
    pub(super) durable: u8,
    pub(super) superseded: Blobs,
    pub(super) deleting: Blobs,
    pub(super) dirty: bool,
    /// What the store was given, with the version that it is to find.
    pub(super) writing: Option<(Record, Outcome)>,
    pub(super) joined: u8,
    pub(super) sessions: u8,
    pub(super) session: Option<Session>,
    /// All have voted for the next step; it waits for the record of the one before.
    pub(super) held: bool,
    /// What came over connections that have ended: the rank, and what it said; nothing for the end.
    pub(super) mail: VecDeque<(usize, Option<(SessionId, Report)>)>,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Outcome {
    Open,
    Done(u8),
    Refused,
}

#[derive(Debug, Clone, Hash)]
pub(super) struct Session {
    pub(super) id: SessionId,
    /// Ranks that have opened it, as bits.
    pub(super) opened: u8,
    /// Who has voted for the step at hand.
    pub(super) votes: Option<u8>,
}

/// A rank: of its disk, only the term matters here; its state is in blobs.
#[derive(Debug, Clone, Default, Hash)]
pub(super) struct Rank {
    pub(super) accepted: u8,
    pub(super) scheduler: Option<u8>,
    pub(super) inbox: VecDeque<ToRank>,
    pub(super) outbox: VecDeque<(SessionId, Report)>,
    /// Its session, and the steps that its state has seen.
    pub(super) session: Option<(SessionId, Vec<u8>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Stray {
    ToRank(usize, ToRank),
    Report(usize, (SessionId, Report)),
}

/// Everything.
#[derive(Debug, Clone, Hash)]
pub struct State {
    /// The highest term granted.
    term: u8,
    record: Record,
    /// Before the latest write.
    before: Record,
    /// Versions given out. They follow the store's clock, so one that is forgotten is never given out again.
    versions: u8,
    blobs: Blobs,
    /// Blobs that have ever been durable.
    ever: Blobs,
    schedulers: [Scheduler; 2],
    ranks: Vec<Rank>,
    stray: Option<Stray>,
    /// The most steps that were committed by whoever led rightly.
    committed: u8,
    forgot: bool,
    faults: u8,
    wrong: Option<&'static str>,
}

type Steps = Vec<Step<Action, State>>;

fn push(steps: &mut Steps, state: &State, action: Action, change: impl FnOnce(&mut State)) {
    let mut to = state.clone();
    change(&mut to);
    steps.push(Step { action, to, fault: false });
}

fn push_fault(steps: &mut Steps, state: &State, action: Action, change: impl FnOnce(&mut State)) {
    let mut to = state.clone();
    to.faults -= 1;
    change(&mut to);
    steps.push(Step { action, to, fault: true });
}

impl Model for Vote {
    type State = State;
    type Action = Action;

    fn start(&self) -> State {
        let record = Record { version: 1, term: 0, steps: 0, superseded: Blobs(0) };
        State {
            term: 0,
            record,
            before: record,
            versions: 1,
            blobs: Blobs(0),
            ever: Blobs(0),
            schedulers: Default::default(),
            ranks: vec![Rank::default(); self.ranks],
            stray: None,
            committed: 0,
            forgot: false,
            faults: self.faults,
            wrong: None,
        }
    }

    fn steps(&self, state: &State, steps: &mut Steps) {
        // The job is done: what remains to be deleted is of no consequence here.
        if self.is_settled(state) {
            return;
        }
        for number in 0..2 {
            self.leader_steps(state, number, steps);
        }
        for number in 0..self.ranks {
            self.rank_steps(state, number, steps);
        }
        if let Some(stray) = state.stray {
            push(steps, state, Action::StrayArrives, |next| {
                next.stray = None;
                match stray {
                    Stray::ToRank(rank, message) => next.ranks[rank].inbox.push_back(message),
                    Stray::Report(rank, report) => next.ranks[rank].outbox.push_back(report),
                }
            });
        }
        if state.faults > 0 {
            self.faults(state, steps);
        }
    }

    fn check(&self, state: &State) -> Result<(), String> {
        if let Some(wrong) = state.wrong {
            return Err(wrong.to_owned());
        }
        if !state.blobs.has(Blobs::state(state.record.steps, self.ranks)) {
            return Err("the durable record names a state that is not there".to_owned());
        }
        let ahead = |leader: &Leader| leader.steps > leader.durable + 1;
        if state.schedulers.iter().filter_map(|scheduler| scheduler.leads.as_ref()).any(ahead) {
            return Err("a leader is more than a step ahead of its record".to_owned());
        }
        Ok(())
    }

    fn is_settled(&self, state: &State) -> bool {
        state.record.steps == self.steps
    }
}

impl Vote {
    fn faults(&self, state: &State, steps: &mut Steps) {
        for number in 0..2 {
            let scheduler = &state.schedulers[number];
            if scheduler.leads.is_none() {
                continue;
            }
            push_fault(steps, state, Action::CrashLeader(number), |next| {
                self.step_down(next, number);
                next.schedulers[number] = Scheduler::default();
            });
            if !scheduler.paused {
                push_fault(steps, state, Action::Pause(number), |next| next.schedulers[number].paused = true);
            }
        }
        for number in 0..self.ranks {
            let rank = &state.ranks[number];
            for heard in [true, false] {
                if rank.scheduler.is_none() || (heard && rank.outbox.is_empty()) {
                    continue;
                }
                push_fault(steps, state, Action::CrashRank(number, heard), |next| {
                    self.cut(next, number, heard);
                    let accepted = next.ranks[number].accepted;
                    next.ranks[number] = Rank { accepted, ..Rank::default() };
                });
                push_fault(steps, state, Action::CutRank(number, heard), |next| {
                    self.cut(next, number, heard)
                });
            }
            if self.copies && state.stray.is_none() {
                let one = rank.inbox.front().map(|message| Stray::ToRank(number, *message));
                let other = rank.outbox.front().map(|report| Stray::Report(number, *report));
                for stray in one.into_iter().chain(other) {
                    push_fault(steps, state, Action::Copy(number), |next| next.stray = Some(stray));
                }
            }
        }
        if self.forgets && !state.forgot && state.record != state.before {
            push_fault(steps, state, Action::Forget, |next| {
                (next.record, next.forgot) = (next.before, true);
            });
        }
    }
}
