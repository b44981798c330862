//! What must hold of jobs from event to event, over all lives of the scheduler: no step is committed without every vote, none
//! twice, and little is computed again.

use crate::process::Connection;
use crate::tuning::{Job, Tuning};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::training::{TrainingReport, TrainingWork};
use ashlar_scheduler::director::Director;
use ashlar_vocabulary::{JobId, SessionId};
use std::collections::{BTreeMap, BTreeSet};

/// What has been seen so far.
#[derive(Default)]
pub(crate) struct Watch {
    /// Times that a scheduler has died.
    deaths: u64,
    seen: BTreeMap<JobId, Seen>,
    /// Of this life of the scheduler: who is in each session, and who has voted for which step of it.
    sessions: BTreeMap<SessionId, (JobId, BTreeSet<Connection>)>,
    votes: BTreeMap<(SessionId, u64), BTreeSet<Connection>>,
}

/// What has been seen of one job.
#[derive(Default)]
struct Seen {
    /// Steps of its record when last looked at.
    steps: u64,
    events: u64,
    /// Whether that was under the present scheduler.
    present: bool,
    /// Sessions opened for it.
    sessions: BTreeSet<SessionId>,
    /// Which of them began each step.
    begun: BTreeMap<u64, BTreeSet<SessionId>>,
}

impl Watch {
    /// The scheduler has died. What it knew and nobody wrote is gone.
    pub(crate) fn died(&mut self) {
        self.deaths += 1;
        self.sessions.clear();
        self.votes.clear();
        self.seen.values_mut().for_each(|seen| seen.present = false);
    }

    /// The scheduler tells a rank something.
    pub(crate) fn told(&mut self, rank: Connection, message: &ToNode) {
        match message {
            ToNode::OpenSession(open) => {
                let members = self.sessions.entry(open.session);
                members.or_insert((open.job, BTreeSet::new())).1.insert(rank);
                self.seen.entry(open.job).or_default().sessions.insert(open.session);
            }
            ToNode::Training { session, work: TrainingWork::Step { step } } => {
                if let Some((job, _)) = self.sessions.get(session) {
                    let begun = &mut self.seen.entry(*job).or_default().begun;
                    begun.entry(*step).or_default().insert(*session);
                }
            }
            _ => {}
        }
    }

    /// A rank tells the scheduler something.
    pub(crate) fn heard(&mut self, rank: Connection, message: &FromNode) {
        if let FromNode::Training { session, report } = message
            && let TrainingReport::Prepared { step, .. } = **report
        {
            self.votes.entry((*session, step)).or_default().insert(rank);
        }
    }

    /// Looks at every job after an event. Whether one of them is seen for the first time under the present scheduler.
    ///
    /// # Errors
    /// What is not as it must be.
    pub(crate) fn look(&mut self, director: &Director, tuning: &Tuning) -> Result<bool, String> {
        let mut new = false;
        for job in &tuning.jobs {
            let Some(record) = director.jobs().job(job.id()) else { continue };
            let seen = self.seen.entry(job.id()).or_default();
            let (id, steps, before) = (job.id(), record.steps, seen.steps);
            let kept = match (job.durable_every(), seen.present) {
                (None, true) => before,
                (None, false) => before.saturating_sub(1),
                (Some(every), _) => before.saturating_sub(1) / every * every,
            };
            if steps < kept {
                return Err(format!("job {id} fell from step {before} to {steps}"));
            }
            if seen.present && steps > before {
                let all = |(session, (of, ranks)): (&SessionId, &(JobId, BTreeSet<Connection>))| {
                    *of == id && self.votes.get(&(*session, before)) == Some(ranks)
                };
                if steps > before + 1 || !self.sessions.iter().any(all) {
                    return Err(format!("step {before} of job {id} is committed without every vote"));
                }
            }
            if seen.present && record.events < seen.events {
                return Err(format!("job {id} has forgotten events"));
            }
            new |= !seen.present;
            (seen.steps, seen.events, seen.present) = (steps, record.events, true);
        }
        Ok(new)
    }

    /// Steps that were begun, and how many of them again.
    ///
    /// # Errors
    /// More was computed again than what had been in progress whenever a session was lost, and one step per death of a
    /// scheduler.
    pub(crate) fn verify(&self, tuning: &Tuning) -> Result<(u64, u64), String> {
        let (mut begun, mut again) = (0, 0);
        for job in &tuning.jobs {
            let Some(seen) = self.seen.get(&job.id()) else { continue };
            let times: u64 = seen.begun.values().map(|sessions| sessions.len() as u64).sum();
            let repeated = times - seen.begun.len() as u64;
            let lost = (seen.sessions.len() as u64).saturating_sub(1);
            let each = job.durable_every().unwrap_or(1);
            let most = (lost + self.deaths) * each;
            if repeated > most {
                return Err(format!(
                    "{repeated} steps of job {} were computed again, with {lost} lost sessions and {} dead schedulers",
                    job.id(),
                    self.deaths
                ));
            }
            (begun, again) = (begun + times, again + repeated);
        }
        Ok((begun, again))
    }

    /// Whether a scheduler has died.
    pub(crate) fn any_death(&self) -> bool {
        self.deaths > 0
    }
}

impl Job {
    /// Steps between two durable states, where not all are.
    fn durable_every(&self) -> Option<u64> {
        self.prepared.settings.full.map(|full| full.durable_every)
    }
}
