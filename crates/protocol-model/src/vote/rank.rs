//! What a rank does: joins, opens sessions from blobs, computes steps together with the others, makes states durable, votes.

use super::{Action, Blobs, Rank, Report, SessionId, State, Steps, ToRank, Vote, push};

impl Vote {
    pub(super) fn rank_steps(&self, state: &State, number: usize, steps: &mut Steps) {
        let rank = &state.ranks[number];
        if let Some(message) = rank.inbox.front().copied() {
            let (waits, broken) = self.others(state, number, message);
            if !waits {
                push(steps, state, Action::Obey(number, message), |next| {
                    next.ranks[number].inbox.pop_front();
                    self.obey(next, number, message);
                });
            } else if broken {
                push(steps, state, Action::NoticeLink(number), |next| {
                    next.ranks[number].inbox.pop_front();
                    fail(&mut next.ranks[number]);
                });
            }
        }
        if rank.scheduler.is_some() {
            return;
        }
        for (scheduler, of) in state.schedulers.iter().enumerate() {
            let Some(leader) = of.leads.as_ref().filter(|leader| !of.paused && leader.version.is_some())
            else {
                continue;
            };
            let term = leader.term;
            push(steps, state, Action::Join(number, scheduler), |next| {
                if term < next.ranks[number].accepted {
                    return self.step_down(next, scheduler);
                }
                let rank = &mut next.ranks[number];
                (rank.accepted, rank.scheduler) = (term, Some(scheduler as u8));
                let Some(leader) = &mut next.schedulers[scheduler].leads else { return };
                // Should the end of its former connection be unread, it is read first.
                leader.mail.retain(|(sender, _)| *sender != number);
                if leader.joined & 1 << number != 0 {
                    leader.joined &= !(1 << number);
                    self.interrupt(next, scheduler);
                }
                let Some(leader) = &mut next.schedulers[scheduler].leads else { return };
                leader.joined |= 1 << number;
            });
        }
    }

    /// Whether a rank that is told to compute waits for the others, and whether one of them has left the session.
    fn others(&self, state: &State, number: usize, message: ToRank) -> (bool, bool) {
        let ToRank::Step(id, step) = message else { return (false, false) };
        let takes = |rank: &Rank| rank.session.as_ref().is_some_and(|(session, _)| *session == id);
        let seen = |rank: &Rank| rank.session.as_ref().map_or(0, |(_, seen)| seen.len());
        if !takes(&state.ranks[number]) || seen(&state.ranks[number]) != usize::from(step) {
            return (false, false);
        }
        let others = || state.ranks.iter().enumerate().filter(|(other, _)| *other != number);
        let comes = |rank: &Rank| rank.inbox.contains(&message) && seen(rank) == usize::from(step);
        let there = |rank: &Rank| takes(rank) && (seen(rank) > usize::from(step) || comes(rank));
        let waits = !others().all(|(_, rank)| there(rank));
        (waits, others().any(|(_, rank)| !takes(rank)))
    }

    fn obey(&self, state: &mut State, number: usize, message: ToRank) {
        let rank = &mut state.ranks[number];
        match message {
            ToRank::Open(id, steps) => {
                let known = rank.session.as_ref().is_some_and(|(session, _)| *session == id);
                let elsewhere = rank.scheduler.is_none() || rank.accepted != id.0;
                if known || elsewhere {
                    return;
                }
                if !state.blobs.has(Blobs::state(steps, self.ranks)) {
                    state.wrong = Some("a session is to go on from a state that is not there");
                    return;
                }
                rank.session = Some((id, (0..steps).collect()));
                rank.outbox.push_back((id, Report::Opened));
            }
            ToRank::Step(id, step) => {
                let Some((_, seen)) = rank.session.as_mut().filter(|(session, _)| *session == id) else {
                    return;
                };
                if self.rules.in_step && usize::from(step) != seen.len() {
                    return fail(rank);
                }
                // Whoever is told to go on from a state goes on from one that all have made durable.
                if !state.ever.has(Blobs::state(step, self.ranks)) {
                    state.wrong = Some("a rank goes on from a step that not every rank has prepared");
                }
                seen.push(step);
                if !seen.iter().copied().eq(0..=step) {
                    state.wrong = Some("a rank has computed a step twice, or not at all");
                }
                let blob = Blobs::one(step + 1, number);
                (state.blobs, state.ever) = (state.blobs.and(blob), state.ever.and(blob));
                rank.outbox.push_back((id, Report::Prepared(step)));
            }
            ToRank::Close(id) => {
                rank.session.take_if(|(session, _)| *session == id);
            }
        }
    }

    /// A rank's connection ends, and its session with it. What it has said and is heard, the leader reads in its own time.
    pub(super) fn cut(&self, state: &mut State, number: usize, heard: bool) {
        let rank = &mut state.ranks[number];
        let Some(scheduler) = rank.scheduler.take() else { return };
        rank.session = None;
        rank.inbox.clear();
        let said: Vec<(SessionId, Report)> = rank.outbox.drain(..).filter(|_| heard).collect();
        if let Some(leader) = &mut state.schedulers[usize::from(scheduler)].leads {
            leader.mail.extend(said.into_iter().map(|report| (number, Some(report))));
            leader.mail.push_back((number, None));
        }
    }
}

/// The session ends on this rank, which says so.
fn fail(rank: &mut Rank) {
    if let Some((id, _)) = rank.session.take() {
        rank.outbox.push_back((id, Report::Failed));
    }
}
