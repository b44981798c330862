//! Who leads: two schedulers, one replica of several ranks, a gateway, and a store that may forget.
//!
//! Layout: `state`, `scheduler` (what the leader does), `rank` (what ranks do), `seen` (what is seen of that), this file (the store, faults, properties).
//!
//! A rank runs the node's fence and sequencer, the gateway its own [`Terms`]. Connections are queues in order; one that ends loses
//! what is on its way, in whole or not at all, and a copy of a step or its result may turn up at any time later. Time is absent: a lease may
//! run out whenever its holder is dead or stands still, and, as a fault, while it leads.

mod rank;
mod scheduler;
mod seen;
mod state;

pub use scheduler::{is_fenced_by_gateway, is_fenced_by_join, is_fenced_by_rank};
pub use seen::observe;
pub use state::{FromRank, Holder, Reign, State, ToRank};

use crate::checker::{Model, Step};
use ashlar_gateway::scheduler_client::Terms;
use ashlar_shard_node::sequencer::Sequencer;
use ashlar_vocabulary::LeaseTerm;
use state::{Gateway, Links, Rank, Replica, Scheduler, Store, Stray};
use std::collections::VecDeque;

/// Rules that can be switched off, to see the checker find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    /// Ranks refuse a second holder of the term that they obey.
    pub holder_counts: bool,
    /// Ranks refuse lower terms.
    pub term_counts: bool,
    /// What a rank has accepted survives its death.
    pub fence_is_durable: bool,
    /// A rank that refuses an assignment, or loses its scheduler, gives up the place it had.
    pub place_is_left: bool,
    /// A leader that is refused for an equal term gives way, too.
    pub equal_terms_fence: bool,
    /// Who has led asks for a higher term than that was.
    pub never_twice: bool,
}

impl Rules {
    /// As the protocol has them.
    pub const ALL: Rules = Rules {
        holder_counts: true,
        term_counts: true,
        fence_is_durable: true,
        place_is_left: true,
        equal_terms_fence: true,
        never_twice: true,
    };
}

/// Kinds of faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kinds {
    /// Schedulers die and stand still.
    pub schedulers: bool,
    /// Ranks die, and their connections end.
    pub ranks: bool,
    /// The store forgets, and cannot be reached.
    pub store: bool,
    /// Copies of step plans and results turn up later.
    pub copies: bool,
}

impl Kinds {
    /// Every kind.
    pub const ALL: Kinds = Kinds { schedulers: true, ranks: true, store: true, copies: true };
    /// None.
    pub const NONE: Kinds = Kinds { schedulers: false, ranks: false, store: false, copies: false };
}

/// The model and its bounds.
#[derive(Debug, Clone, Copy)]
pub struct Lease {
    /// Ranks of the replica, all of which take part in every step.
    pub ranks: usize,
    /// Faults, of whatever kinds.
    pub faults: u8,
    /// Steps in one layout.
    pub steps: u64,
    /// Layouts of one term. More are only needed by a leader that never gets on.
    pub layouts: u64,
    /// Whether there is a gateway.
    pub gateway: bool,
    /// Of which kinds the faults are.
    pub kinds: Kinds,
    /// Which rules are in force.
    pub rules: Rules,
}

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The lease is granted to this scheduler.
    Acquire(usize),
    /// The leader asks the store whether it still is.
    Renew(usize),
    /// The lease runs out under a leader that is there, but cannot renew it.
    RunsOut,
    /// The leader hears the next message of a rank.
    Hear(usize, usize, FromRank),
    /// The leader lays the replica out.
    LayOut(usize),
    /// The leader sends a step to all ranks.
    SendStep(usize),
    /// A stopped scheduler goes on.
    Resume(usize),
    /// A rank reaches this scheduler; whether what it has said without one is still in its queue.
    Join(usize, usize, bool),
    /// A rank does the next thing that it was told.
    Obey(usize, ToRank),
    /// The ranks of a layout are linked.
    Link,
    /// A rank notices that a link is broken.
    NoticeLink(usize),
    /// The gateway reaches this scheduler.
    GatewayJoins(usize),
    /// A copy of a message turns up.
    StrayArrives,
    /// A copy of a message is made of the next one to or from a rank.
    Copy(usize),
    /// A scheduler dies; whether its last words arrive.
    CrashScheduler(usize, bool),
    /// A scheduler stands still.
    Pause(usize),
    /// A rank dies.
    CrashRank(usize),
    /// A rank's connection ends; whether what was on its way to it arrives.
    CutRank(usize, bool),
    /// The gateway dies.
    CrashGateway,
    /// The store forgets the latest grant.
    Forget,
    /// The store forgets everything.
    Wipe,
}

type Steps = Vec<Step<Action, State>>;

impl Model for Lease {
    type State = State;
    type Action = Action;

    fn start(&self) -> State {
        let nobody = (LeaseTerm(0), Holder::NOBODY);
        let scheduler = |number| Scheduler {
            holder: Holder::of(number, 0),
            lives: 0,
            min_term: LeaseTerm(0),
            led: LeaseTerm(0),
            paused: false,
            leads: None,
        };
        let rank = Rank {
            durable: nobody,
            accepted: nobody,
            joins_with: LeaseTerm(0),
            scheduler: None,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            place: None,
            sequencer: Sequencer::default(),
        };
        State {
            store: Store { last: nobody, held: false, before: nobody },
            schedulers: [scheduler(0), scheduler(1)],
            ranks: vec![rank; self.ranks],
            gateway: Gateway { terms: Terms::default(), scheduler: None },
            stray: None,
            faults: self.faults,
            remembers: true,
            completed: nobody,
            wrong: None,
        }
    }

    fn steps(&self, state: &State, steps: &mut Steps) {
        for scheduler in 0..2 {
            self.scheduler_steps(state, scheduler, steps);
        }
        for rank in 0..self.ranks {
            self.rank_steps(state, rank, steps);
        }
        self.link_step(state, steps);
        self.gateway_steps(state, steps);
        if let Some(stray) = state.stray {
            push(steps, state, Action::StrayArrives, |next| {
                next.stray = None;
                match stray {
                    Stray::ToRank(rank, message) => next.ranks[rank].inbox.push_back(message),
                    Stray::FromRank(rank, message) => next.ranks[rank].outbox.push_front(message),
                }
            });
        }
        if state.faults > 0 {
            self.faults(state, steps);
        }
    }

    fn check(&self, state: &State) -> Result<(), String> {
        state.wrong.map_or(Ok(()), |wrong| Err(wrong.to_owned()))
    }

    /// Somebody leads with the store's and everybody's consent, and the replica has completed a step under it.
    fn is_settled(&self, state: &State) -> bool {
        state.schedulers.iter().enumerate().any(|(number, scheduler)| {
            let Some(leader) = scheduler.leads.as_ref().filter(|_| !scheduler.paused) else { return false };
            let reign = (leader.term, scheduler.holder);
            let drives = |rank: &Rank| {
                let place = rank.place.as_ref();
                rank.scheduler == Some(number as u8)
                    && rank.accepted == reign
                    && place.is_some_and(|place| place.reign == reign && place.links == Links::Up)
            };
            matches!(leader.replica, Replica::Up(_, answered) if answered > 0)
                && state.store.last == reign
                && (!self.gateway || state.gateway.scheduler == Some(number as u8))
                && state.ranks.iter().all(drives)
        })
    }
}

/// Whether the lease's holder leads, and does not stand still.
fn is_renewed(state: &State) -> bool {
    state.schedulers.iter().any(|scheduler| {
        let leads = scheduler.leads.as_ref().map(|leader| (leader.term, scheduler.holder));
        leads == Some(state.store.last) && !scheduler.paused
    })
}

/// Adds what comes of `change`.
fn push(steps: &mut Steps, state: &State, action: Action, change: impl FnOnce(&mut State)) {
    let mut to = state.clone();
    change(&mut to);
    steps.push(Step { action, to, fault: false });
}

/// Adds a fault.
fn push_fault(steps: &mut Steps, state: &State, action: Action, change: impl FnOnce(&mut State)) {
    let mut to = state.clone();
    to.faults -= 1;
    change(&mut to);
    steps.push(Step { action, to, fault: true });
}

impl Lease {
    /// Whether the store would grant the lease to this scheduler: it is free, or has run out because nobody is there to renew it.
    fn is_free_for(&self, state: &State, number: usize) -> bool {
        !(state.store.held && is_renewed(state)) || state.store.last.1 == state.schedulers[number].holder
    }

    fn gateway_steps(&self, state: &State, steps: &mut Steps) {
        // It looks for another one after a second of silence.
        let hears = |scheduler: u8| !state.schedulers[usize::from(scheduler)].paused;
        if !self.gateway || state.gateway.scheduler.is_some_and(hears) {
            return;
        }
        for number in 0..2 {
            let scheduler = &state.schedulers[number];
            let Some(term) = scheduler.leads.as_ref().filter(|_| !scheduler.paused).map(|leader| leader.term)
            else {
                continue;
            };
            push(steps, state, Action::GatewayJoins(number), |next| match next.gateway.terms.hear(term) {
                Ok(()) => next.gateway.scheduler = Some(number as u8),
                Err(higher) => {
                    next.gateway.scheduler = None;
                    self.fence(next, number, higher);
                }
            });
        }
    }

    fn faults(&self, state: &State, steps: &mut Steps) {
        for number in (0..2).filter(|_| self.kinds.schedulers) {
            let scheduler = &state.schedulers[number];
            for heard in [true, false] {
                // A second life, with a name of its own.
                if scheduler.lives < 2 && (scheduler.leads.is_some() || (heard && scheduler.min_term.0 > 0)) {
                    push_fault(steps, state, Action::CrashScheduler(number, heard), |next| {
                        self.leave(next, number, heard);
                        let scheduler = &mut next.schedulers[number];
                        scheduler.lives += 1;
                        scheduler.holder = Holder::of(number, scheduler.lives);
                        scheduler.paused = false;
                        (scheduler.min_term, scheduler.led) = Default::default();
                    });
                }
            }
            if scheduler.leads.is_some() && !scheduler.paused {
                push_fault(steps, state, Action::Pause(number), |next| next.schedulers[number].paused = true);
            }
        }
        for number in 0..self.ranks {
            let rank = &state.ranks[number];
            if self.kinds.ranks {
                push_fault(steps, state, Action::CrashRank(number), |next| self.crash_rank(next, number));
            }
            for heard in [true, false] {
                if self.kinds.ranks && rank.scheduler.is_some() && !(heard && rank.inbox.is_empty()) {
                    push_fault(steps, state, Action::CutRank(number, heard), |next| {
                        self.cut(next, number, heard)
                    });
                }
            }
            if self.kinds.copies && state.stray.is_none() {
                // Of what a step is, as in the simulation: assignments and what answers them come once, over one connection.
                let copies = rank.inbox.front().filter(|message| matches!(message, ToRank::Step(..)));
                let copies = copies.map(|message| Stray::ToRank(number, *message));
                let others = rank.outbox.front().filter(|message| matches!(message, FromRank::Result(..)));
                let others = others.map(|message| Stray::FromRank(number, *message));
                for stray in copies.into_iter().chain(others) {
                    push_fault(steps, state, Action::Copy(number), |next| next.stray = Some(stray));
                }
            }
        }
        if state.gateway.terms.highest().0 > 0 {
            push_fault(steps, state, Action::CrashGateway, |next| {
                next.gateway = Gateway { terms: Terms::default(), scheduler: None };
            });
        }
        if !self.kinds.store {
            return;
        }
        if state.store.held && is_renewed(state) {
            push_fault(steps, state, Action::RunsOut, |next| next.store.held = false);
        }
        if state.remembers && state.store.last.0.0 > 0 {
            push_fault(steps, state, Action::Forget, |next| {
                let before = next.store.before;
                (next.store, next.remembers) = (Store { last: before, held: false, before }, false);
            });
            if state.store.before.0.0 > 0 {
                push_fault(steps, state, Action::Wipe, |next| {
                    let nobody = (LeaseTerm(0), Holder::NOBODY);
                    (next.store, next.remembers) =
                        (Store { last: nobody, held: false, before: nobody }, false);
                });
            }
        }
    }
}
