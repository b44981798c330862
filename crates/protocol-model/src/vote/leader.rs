//! What a scheduler does with a job: claims its record, opens sessions, counts votes, commits, saves, deletes.

use super::{
    Action, Blobs, Leader, Outcome, Record, Report, Session, SessionId, State, Steps, ToRank, Vote, push,
};

impl Vote {
    pub(super) fn leader_steps(&self, state: &State, number: usize, steps: &mut Steps) {
        let scheduler = &state.schedulers[number];
        if let Some(leader) = &scheduler.leads {
            // What is on its way to the store or to the blobs gets there, whether or not its sender stands still.
            if matches!(leader.writing, Some((_, Outcome::Open))) {
                push(steps, state, Action::Write(number), |next| self.write(next, number));
            }
            if !leader.deleting.is_empty() {
                push(steps, state, Action::Delete(number), |next| {
                    let Some(leader) = &mut next.schedulers[number].leads else { return };
                    let gone = std::mem::take(&mut leader.deleting);
                    leader.superseded = leader.superseded.without(gone);
                    next.blobs = next.blobs.without(gone);
                });
            }
        }
        if scheduler.paused {
            push(steps, state, Action::Resume(number), |next| next.schedulers[number].paused = false);
            return;
        }
        let Some(leader) = &scheduler.leads else {
            // The lease is free where nobody renews it.
            let other = &state.schedulers[1 - number];
            if other.leads.is_none() || other.paused {
                push(steps, state, Action::Acquire(number), |next| {
                    next.term += 1;
                    next.schedulers[number].leads = Some(Leader { term: next.term, ..Leader::default() });
                });
            }
            return;
        };
        if leader.term < state.term {
            push(steps, state, Action::LoseLease(number), |next| self.step_down(next, number));
        }
        if leader.version.is_none() {
            push(steps, state, Action::Claim(number), |next| self.claim(next, number));
            return;
        }
        if matches!(leader.writing, Some((_, outcome)) if outcome != Outcome::Open) {
            push(steps, state, Action::Written(number), |next| self.written(next, number));
        }
        let all = leader.joined.count_ones() as usize == self.ranks;
        if all && leader.session.is_none() && !leader.held && leader.steps < self.steps {
            push(steps, state, Action::OpenSession(number), |next| {
                let Some(leader) = &mut next.schedulers[number].leads else { return };
                leader.sessions += 1;
                let (id, steps) = ((leader.term, leader.sessions), leader.steps);
                leader.session = Some(Session { id, opened: 0, votes: None });
                self.tell(next, number, ToRank::Open(id, steps));
            });
        }
        // In order: what came over a rank's former connection before what comes over its present one.
        let from_mail = leader.mail.front().map(|(rank, _)| *rank);
        if let Some(rank) = from_mail {
            push(steps, state, Action::Hear(number, rank), |next| {
                let Some(leader) = &mut next.schedulers[number].leads else { return };
                match leader.mail.pop_front() {
                    Some((rank, Some((id, report)))) => self.hear(next, number, rank, id, report),
                    Some((rank, None)) => {
                        leader.joined &= !(1 << rank);
                        self.interrupt(next, number);
                    }
                    None => {}
                }
            });
        }
        for rank in 0..self.ranks {
            let of = &state.ranks[rank];
            let mail = leader.mail.iter().any(|(sender, _)| *sender == rank);
            if of.scheduler == Some(number as u8) && !mail && !of.outbox.is_empty() {
                push(steps, state, Action::Hear(number, rank), |next| {
                    let Some((id, report)) = next.ranks[rank].outbox.pop_front() else { return };
                    self.hear(next, number, rank, id, report);
                });
            }
        }
    }

    /// Gives the store what has changed, one write at a time: after every event.
    fn save(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        if leader.dirty && leader.writing.is_none() {
            let Leader { term, steps, superseded, .. } = *leader;
            let version = leader.version.unwrap_or_default();
            leader.writing = Some((Record { version, term, steps, superseded }, Outcome::Open));
            leader.dirty = false;
        }
    }

    fn claim(&self, state: &mut State, number: usize) {
        let record = state.record;
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        if record.term > leader.term {
            return self.step_down(state, number);
        }
        // At most one committed step is computed again, or two where the store has forgotten one.
        if record.steps + 1 + u8::from(state.forgot) < state.committed {
            state.wrong = Some("a scheduler that takes over repeats more than one committed step");
        }
        if self.rules.claims {
            state.versions += 1;
        }
        let version = if self.rules.claims { state.versions } else { record.version };
        (leader.version, leader.steps, leader.durable) = (Some(version), record.steps, record.steps);
        leader.superseded = record.superseded;
        state.committed = record.steps;
        if self.rules.claims {
            state.before = record;
            state.record = Record { version, term: leader.term, ..record };
        }
        self.delete_superseded(state, number);
    }

    /// The store compares and sets.
    fn write(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let Some((record, outcome)) = &mut leader.writing else { return };
        *outcome = Outcome::Refused;
        if !self.rules.claims || record.version == state.record.version {
            state.versions += 1;
            *outcome = Outcome::Done(state.versions);
            state.before = state.record;
            state.record = Record { version: state.versions, ..*record };
            if state.record.steps < state.before.steps {
                state.wrong = Some("a former leader has written over what its successor wrote");
            }
        }
    }

    fn written(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let Some((record, outcome)) = leader.writing.take() else { return };
        let Outcome::Done(version) = outcome else {
            // Another scheduler has written, or the store has forgotten: this term is over.
            return self.step_down(state, number);
        };
        leader.version = Some(version);
        leader.durable = record.steps;
        self.delete_superseded(state, number);
        self.commit_held(state, number);
        self.save(state, number);
    }

    /// Blobs of former states go once the record of a later one is durable, unless the present state or the next has them.
    fn delete_superseded(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let mut needed = Blobs::state(leader.steps, self.ranks);
        let voters = match &leader.session {
            Some(Session { votes: Some(votes), .. }) => *votes,
            _ => 0,
        };
        for rank in 0..self.ranks {
            if leader.held || voters & 1 << rank != 0 {
                needed = needed.and(Blobs::one(leader.steps + 1, rank));
            }
        }
        let until = match (self.rules.deletes_after, self.rules.keeps_one_more) {
            (false, _) => leader.steps,
            (true, false) => leader.durable,
            (true, true) => leader.durable.saturating_sub(1),
        };
        leader.deleting = leader.deleting.and(leader.superseded.before(until).without(needed));
    }

    fn hear(&self, state: &mut State, number: usize, rank: usize, id: SessionId, report: Report) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let next = leader.steps;
        let Some(session) = leader.session.as_mut().filter(|session| session.id == id) else {
            // One that nobody wants any more still takes memory there.
            if report != Report::Failed && state.ranks[rank].scheduler == Some(number as u8) {
                state.ranks[rank].inbox.push_back(ToRank::Close(id));
            }
            return;
        };
        match report {
            Report::Opened => {
                session.opened |= 1 << rank;
                if session.opened.count_ones() as usize == self.ranks && session.votes.is_none() {
                    self.advance(state, number);
                }
            }
            Report::Prepared(step) => match &mut session.votes {
                Some(votes) if step == next => {
                    *votes |= 1 << rank;
                    if votes.count_ones() as usize == self.ranks || !self.rules.needs_all_votes {
                        (session.votes, leader.held) = (None, true);
                        self.commit_held(state, number);
                    }
                }
                _ => self.interrupt(state, number),
            },
            Report::Failed => self.interrupt(state, number),
        }
    }

    fn commit_held(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        if !leader.held || (self.rules.one_ahead && leader.steps > leader.durable) {
            return;
        }
        leader.held = false;
        leader.superseded = leader.superseded.and(Blobs::state(leader.steps, self.ranks));
        leader.steps += 1;
        leader.dirty = true;
        let (steps, rightly) = (leader.steps, state.record.term == leader.term);
        if rightly {
            state.committed = state.committed.max(steps);
        }
        if !state.ever.has(Blobs::state(steps, self.ranks)) {
            state.wrong = Some("a step is committed that not every rank has prepared");
        }
        if !self.rules.deletes_after {
            self.delete_superseded(state, number);
        }
        self.advance(state, number);
        self.save(state, number);
    }

    /// Gives an idle session its next step.
    fn advance(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let step = leader.steps;
        let Some(session) = leader.session.as_mut().filter(|session| session.votes.is_none()) else { return };
        if step < self.steps && !leader.held && session.opened.count_ones() as usize == self.ranks {
            session.votes = Some(0);
            let id = session.id;
            self.tell(state, number, ToRank::Step(id, step));
        }
    }

    /// Gives the session up. What ranks have prepared for the next step is remembered, to be deleted in time.
    pub(super) fn interrupt(&self, state: &mut State, number: usize) {
        let Some(leader) = &mut state.schedulers[number].leads else { return };
        let Some(session) = leader.session.take() else { return };
        let voters = session.votes.unwrap_or_default();
        for rank in (0..self.ranks).filter(|rank| voters & 1 << rank != 0) {
            leader.superseded = leader.superseded.and(Blobs::one(leader.steps + 1, rank));
        }
        self.tell(state, number, ToRank::Close(session.id));
    }

    fn tell(&self, state: &mut State, number: usize, message: ToRank) {
        let joined = state.schedulers[number].leads.as_ref().map_or(0, |leader| leader.joined);
        for (rank, of) in state.ranks.iter_mut().enumerate() {
            if of.scheduler == Some(number as u8) && joined & 1 << rank != 0 {
                of.inbox.push_back(message);
            }
        }
    }

    /// A term ends, and its connections with it. What it has given to the store or has begun to delete may still be done: the
    /// ways in which that goes before are among the states explored.
    pub(super) fn step_down(&self, state: &mut State, number: usize) {
        for rank in 0..self.ranks {
            if state.ranks[rank].scheduler == Some(number as u8) {
                self.cut(state, rank, false);
            }
        }
        state.schedulers[number].leads = None;
    }
}
