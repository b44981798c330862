//! What a scheduler does: asks for the lease, lays the replica out, sends steps, gives way.

use super::state::{FromRank, Leader, Replica, State, ToRank};
use super::{Action, Lease, Steps, push};
use ashlar_vocabulary::{LeaseTerm, ReplicaRevision, StepId};

/// As in the scheduler's cluster: revisions rise over all terms.
const REVISIONS_PER_TERM: u64 = 1_000_000;

fn revision(leader: &Leader) -> ReplicaRevision {
    ReplicaRevision(leader.term.0 * REVISIONS_PER_TERM + leader.revisions)
}

/// Whether a leader of `term` gives way to a rank that joins with `joined`.
pub fn is_fenced_by_join(term: LeaseTerm, joined: LeaseTerm) -> bool {
    joined > term
}

/// Whether a leader of `term` gives way to a rank that refuses it for `obeyed`. An equal term is somebody else's.
pub fn is_fenced_by_rank(term: LeaseTerm, obeyed: LeaseTerm) -> bool {
    obeyed >= term
}

/// Whether a leader of `term` gives way to a gateway that has heard of `highest`.
pub fn is_fenced_by_gateway(term: LeaseTerm, highest: LeaseTerm) -> bool {
    highest > term
}

impl Lease {
    pub(super) fn scheduler_steps(&self, state: &State, number: usize, steps: &mut Steps) {
        let scheduler = &state.schedulers[number];
        if scheduler.paused {
            push(steps, state, Action::Resume(number), |next| next.schedulers[number].paused = false);
            return;
        }
        let Some(leader) = &scheduler.leads else {
            if self.is_free_for(state, number) {
                push(steps, state, Action::Acquire(number), |next| self.acquire(next, number));
            }
            return;
        };
        let ours = state.store.last == (leader.term, scheduler.holder);
        if !ours || !state.store.held {
            push(steps, state, Action::Renew(number), |next| match ours {
                true => next.store.held = true,
                false => self.leave(next, number, true),
            });
        }
        for (rank, of) in state.ranks.iter().enumerate() {
            if of.scheduler == Some(number as u8)
                && let Some(message) = of.outbox.front().copied()
            {
                push(steps, state, Action::Hear(number, rank, message), |next| {
                    next.ranks[rank].outbox.pop_front();
                    self.hear(next, number, rank, message);
                });
            }
        }
        let all = leader.joined.count_ones() as usize == self.ranks;
        match leader.replica {
            Replica::Vacant if all && leader.revisions < self.layouts => {
                push(steps, state, Action::LayOut(number), |next| {
                    let holder = next.schedulers[number].holder;
                    let Some(leader) = &mut next.schedulers[number].leads else { return };
                    leader.revisions += 1;
                    leader.replica = Replica::Loading(0);
                    let message = ToRank::Assign(leader.term, holder, revision(leader));
                    tell(next, number, message);
                });
            }
            Replica::Up(sent, answered) if sent == answered && sent < self.steps => {
                push(steps, state, Action::SendStep(number), |next| {
                    let Some(leader) = &mut next.schedulers[number].leads else { return };
                    leader.replica = Replica::Up(sent + 1, answered);
                    let message = ToRank::Step(leader.term, revision(leader), StepId(sent + 1));
                    tell(next, number, message);
                });
            }
            _ => {}
        }
    }

    /// What the store does when it grants: a term above the last one, and above what is asked for.
    fn acquire(&self, state: &mut State, number: usize) {
        let scheduler = &mut state.schedulers[number];
        let term = LeaseTerm((state.store.last.0.0 + 1).max(scheduler.min_term.0));
        if term <= scheduler.led {
            state.wrong = Some("a process leads twice under one term");
        }
        scheduler.led = term;
        if self.rules.never_twice {
            scheduler.min_term = scheduler.min_term.max(LeaseTerm(term.0 + 1));
        }
        state.store.before = state.store.last;
        (state.store.last, state.store.held) = ((term, scheduler.holder), true);
        scheduler.leads = Some(Leader { term, revisions: 0, joined: 0, replica: Replica::Vacant });
    }

    pub(super) fn hear(&self, state: &mut State, number: usize, rank: usize, message: FromRank) {
        let holder = state.schedulers[number].holder;
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let (term, current) = (leader.term, revision(leader));
        match message {
            FromRank::Join(joined) if is_fenced_by_join(term, joined) => self.fence(state, number, joined),
            FromRank::Join(_) => leader.joined |= 1 << rank,
            FromRank::Ready(ready) => {
                if let Replica::Loading(bits) = &mut leader.replica
                    && ready == current
                {
                    *bits |= 1 << rank;
                    if bits.count_ones() as usize == self.ranks {
                        leader.replica = Replica::Up(0, 0);
                    }
                }
            }
            FromRank::Refused(obeyed) => {
                let gives_way = match self.rules.equal_terms_fence {
                    true => is_fenced_by_rank(term, obeyed),
                    false => obeyed > term,
                };
                if gives_way {
                    self.fence(state, number, obeyed);
                } else {
                    self.cut(state, rank, true);
                }
            }
            FromRank::Failed(failed) => {
                if failed == current {
                    leader.replica = Replica::Vacant;
                }
            }
            FromRank::Result(of, revision, step, by) => {
                let Replica::Up(sent, answered) = leader.replica else { return };
                let expected = StepId(answered + 1);
                if (of, revision) != (term, current) || step < expected || answered == sent {
                    return;
                }
                if step > expected {
                    leader.replica = Replica::Vacant;
                    return;
                }
                leader.replica = Replica::Up(sent, answered + 1);
                if by != holder {
                    state.wrong = Some("a leader takes the result of another one's step for its own");
                }
            }
        }
    }

    /// Somebody has heard of a higher term, or obeys another holder: lead no more, and ask for a term above.
    pub(super) fn fence(&self, state: &mut State, number: usize, by: LeaseTerm) {
        self.leave(state, number, true);
        let scheduler = &mut state.schedulers[number];
        scheduler.min_term = scheduler.min_term.max(LeaseTerm(by.0 + 1));
    }

    /// A term ends, and its connections with it.
    pub(super) fn leave(&self, state: &mut State, number: usize, heard: bool) {
        state.schedulers[number].leads = None;
        for rank in 0..self.ranks {
            if state.ranks[rank].scheduler == Some(number as u8) {
                self.cut(state, rank, heard);
            }
        }
        if state.gateway.scheduler == Some(number as u8) {
            state.gateway.scheduler = None;
        }
    }
}

/// To every rank of the replica.
fn tell(state: &mut State, number: usize, message: ToRank) {
    for rank in state.ranks.iter_mut().filter(|rank| rank.scheduler == Some(number as u8)) {
        rank.inbox.push_back(message);
    }
}
