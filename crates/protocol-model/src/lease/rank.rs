//! What a rank does: joins, obeys or refuses, is linked to the others, computes.

use super::state::{FromRank, Links, Place, Rank, Reign, Replica, State, ToRank};
use super::{Action, Lease, Steps, push};
use ashlar_protocol::step::StepPlan;
use ashlar_shard_node::fence::{Verdict, verdict};
use ashlar_shard_node::sequencer::{Effect, Event, Sequencer};
use ashlar_vocabulary::{LeaseTerm, ReplicaRevision, StepId};
use std::collections::VecDeque;

impl Lease {
    pub(super) fn rank_steps(&self, state: &State, number: usize, steps: &mut Steps) {
        let rank = &state.ranks[number];
        if let Some(message) = rank.inbox.front().copied()
            && !self.waits_for_rows(rank, number, message)
        {
            push(steps, state, Action::Obey(number, message), |next| {
                next.ranks[number].inbox.pop_front();
                self.obey(next, number, message);
            });
        }
        if rank.place.as_ref().is_some_and(|place| place.links == Links::Broken) {
            push(steps, state, Action::NoticeLink(number), |next| self.fail(next, number));
        }
        if rank.scheduler.is_some() {
            return;
        }
        for (scheduler, of) in state.schedulers.iter().enumerate() {
            if of.leads.is_none() || of.paused {
                continue;
            }
            // What its compute thread has said since it lost the last one follows, unless it was dropped.
            for kept in [false, true].into_iter().take(if rank.outbox.is_empty() { 1 } else { 2 }) {
                push(steps, state, Action::Join(number, scheduler, kept), |next| {
                    let rank = &mut next.ranks[number];
                    rank.scheduler = Some(scheduler as u8);
                    if !kept {
                        rank.outbox.clear();
                    }
                    // It is the first message, and waits for nothing: heard at once.
                    let join = FromRank::Join(rank.joins_with);
                    self.hear(next, scheduler, number, join);
                });
            }
        }
    }

    /// All ranks of a layout find each other by its term and revision. They do not know for whom the others work.
    pub(super) fn link_step(&self, state: &State, steps: &mut Steps) {
        let pending = |rank: &Rank| {
            let place = rank.place.as_ref().filter(|place| place.links == Links::Pending)?;
            Some((place.reign.0, place.revision))
        };
        let first = state.ranks.first().and_then(pending);
        if first.is_some() && state.ranks.iter().all(|rank| pending(rank) == first) {
            push(steps, state, Action::Link, |next| {
                for rank in &mut next.ranks {
                    let Some(place) = &mut rank.place else { continue };
                    place.links = Links::Up;
                    rank.outbox.push_back(FromRank::Ready(place.revision));
                }
            });
        }
    }

    /// Whether the compute thread is at a step whose rows have not come. It waits; nothing behind is looked at.
    fn waits_for_rows(&self, rank: &Rank, number: usize, message: ToRank) -> bool {
        let ToRank::Step(term, revision, step) = message else { return false };
        let Some(place) = &rank.place else { return false };
        let takes = (term, revision) == (rank.sequencer.term(), rank.sequencer.revision())
            && is_next(&rank.sequencer, message);
        number > 0 && takes && place.links == Links::Up && !place.has_rows_of(step)
    }

    fn obey(&self, state: &mut State, number: usize, message: ToRank) {
        match message {
            ToRank::Assign(term, holder, revision) => {
                let accepted = state.ranks[number].accepted;
                let verdict = self.verdict(accepted, (term, holder));
                if verdict != Verdict::Refuse || self.rules.place_is_left {
                    self.leave_place(state, number);
                }
                let rank = &mut state.ranks[number];
                if verdict == Verdict::Refuse {
                    rank.outbox.push_back(FromRank::Refused(accepted.0));
                    return;
                }
                rank.accepted = (term, holder);
                if self.rules.fence_is_durable {
                    rank.durable = rank.accepted;
                }
                let assigned =
                    Event::Assigned { term, revision, kv_blocks: 1, max_rows: 1, cache_kept: false };
                rank.sequencer.handle(assigned, &mut Vec::new());
                let rows = VecDeque::new();
                rank.place = Some(Place { reign: (term, holder), revision, links: Links::Pending, rows });
            }
            ToRank::Release if self.rules.place_is_left => self.leave_place(state, number),
            ToRank::Release => {}
            ToRank::Step(term, revision, step) => {
                let mut effects = Vec::new();
                let plan = plan(term, revision, step);
                state.ranks[number].sequencer.handle(Event::Plan(plan), &mut effects);
                match effects.first() {
                    Some(Effect::Compute(_)) => self.compute(state, number, step),
                    Some(_) => self.fail(state, number),
                    None => {}
                }
            }
        }
    }

    fn verdict(&self, accepted: Reign, asked: Reign) -> Verdict {
        let name = |holder: super::Holder| if self.rules.holder_counts { holder.name() } else { "" };
        let asked_term = if self.rules.term_counts { asked.0 } else { asked.0.max(accepted.0) };
        let holder = if self.rules.term_counts { name(asked.1) } else { name(accepted.1) };
        verdict((accepted.0, name(accepted.1)), (asked_term, holder))
    }

    /// A step's rows go from rank to rank; with the last one it is complete.
    fn compute(&self, state: &mut State, number: usize, step: StepId) {
        let Some(place) = &mut state.ranks[number].place else { return };
        let (reign, revision) = (place.reign, place.revision);
        match place.links {
            Links::Pending => return self.fail(state, number),
            // The rows had come, and nothing is to be sent on: it notices nothing.
            Links::Broken if number + 1 == self.ranks && place.has_rows_of(step) => {}
            Links::Broken => return self.fail(state, number),
            Links::Up => {}
        }
        // Whatever else is on its way: nobody computes with rows of a rank that works for somebody else.
        if place.rows.iter().any(|(rows, of)| *rows == step && *of != reign) {
            state.wrong = Some("ranks compute a step together for two leaders");
        }
        place.rows.retain(|(rows, _)| *rows != step);
        if number + 1 < self.ranks {
            if let Some(next) = &mut state.ranks[number + 1].place {
                next.rows.push_back((step, reign));
            }
            return;
        }
        if reign.0 < state.completed.0 {
            state.wrong = Some("a term completes a step after a higher one has");
        } else if reign.0 == state.completed.0 && reign.1 != state.completed.1 {
            state.wrong = Some("two holders of one term complete steps");
        }
        state.completed = reign;
        let result = FromRank::Result(reign.0, revision, step, reign.1);
        state.ranks[number].outbox.push_back(result);
    }

    /// The rank says that its layout is of no use.
    fn fail(&self, state: &mut State, number: usize) {
        let Some(revision) = state.ranks[number].place.as_ref().map(|place| place.revision) else { return };
        self.leave_place(state, number);
        state.ranks[number].outbox.push_back(FromRank::Failed(revision));
    }

    /// Gives a place up. The others' links break.
    fn leave_place(&self, state: &mut State, number: usize) {
        let Some(place) = state.ranks[number].place.take() else { return };
        if place.links != Links::Up {
            return;
        }
        let others = state.ranks.iter_mut().filter_map(|rank| rank.place.as_mut());
        others.filter(|other| other.links == Links::Up).for_each(|other| other.links = Links::Broken);
    }

    /// A rank's connection ends. The leader sees it at once, the rank's compute thread when it comes to it.
    pub(super) fn cut(&self, state: &mut State, number: usize, heard: bool) {
        let rank = &mut state.ranks[number];
        let Some(scheduler) = rank.scheduler.take() else { return };
        if !heard {
            rank.inbox.clear();
        }
        if rank.place.is_some() || !rank.inbox.is_empty() {
            rank.inbox.push_back(ToRank::Release);
        }
        if let Some(leader) = &mut state.schedulers[usize::from(scheduler)].leads {
            leader.joined &= !(1 << number);
            leader.replica = Replica::Vacant;
        }
    }

    /// What is on the disk stays.
    pub(super) fn crash_rank(&self, state: &mut State, number: usize) {
        self.cut(state, number, false);
        self.leave_place(state, number);
        let rank = &mut state.ranks[number];
        let durable = rank.durable;
        *rank = Rank {
            durable,
            accepted: durable,
            joins_with: durable.0,
            scheduler: None,
            inbox: VecDeque::new(),
            outbox: VecDeque::new(),
            place: None,
            sequencer: Sequencer::default(),
        };
    }
}

/// Whether the sequencer would compute it, found out on a copy.
fn is_next(sequencer: &Sequencer, message: ToRank) -> bool {
    let ToRank::Step(term, revision, step) = message else { return false };
    let mut effects = Vec::new();
    sequencer.clone().handle(Event::Plan(plan(term, revision, step)), &mut effects);
    matches!(effects.first(), Some(Effect::Compute(_)))
}

/// A plan without rows: who may have it computed is what is modelled.
fn plan(term: LeaseTerm, revision: ReplicaRevision, step: StepId) -> StepPlan {
    StepPlan {
        refill: None,
        term,
        revision,
        step,
        new_sequences: Vec::new(),
        slices: Vec::new(),
        ended_sequences: Vec::new(),
    }
}
