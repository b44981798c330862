//! What a rank, a gateway and a job may be seen doing. The models' own transitions and the simulation's runs are read by these same
//! rules, so that neither can do what the other does not know.

use ashlar_gateway::scheduler_client::Terms;
use ashlar_shard_node::fence::{Verdict, verdict};
use ashlar_simulation::Observed;
use ashlar_vocabulary::{JobId, LeaseTerm, ReplicaRevision, SessionId, StepId};
use std::collections::{BTreeMap, BTreeSet};

/// What was seen so far, as far as it decides what may be seen next.
#[derive(Debug, Default, Clone)]
pub struct Rules {
    nodes: BTreeMap<usize, Node>,
    gateways: BTreeMap<usize, Terms>,
    jobs: BTreeMap<JobId, Job>,
    sessions: BTreeMap<SessionId, Session>,
    /// A node that has to refuse now, and for which term.
    owes: Option<(usize, LeaseTerm)>,
    /// Who completes steps of a layout.
    drivers: BTreeMap<ReplicaRevision, (LeaseTerm, String)>,
    counts: Counts,
}

/// How much was seen, so that a comparison of nothing is noticed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Places taken.
    pub assigned: u64,
    /// Places refused.
    pub refused: u64,
    /// Steps computed.
    pub answered: u64,
    /// Terms that gateways refused.
    pub gateways_refused: u64,
    /// Votes.
    pub prepared: u64,
    /// Training steps committed.
    pub committed: u64,
    /// Training steps that a scheduler which took over did not know of.
    pub repeated: u64,
}

impl Counts {
    /// The sum of both.
    pub fn and(self, other: Counts) -> Counts {
        Counts {
            assigned: self.assigned + other.assigned,
            refused: self.refused + other.refused,
            answered: self.answered + other.answered,
            gateways_refused: self.gateways_refused + other.gateways_refused,
            prepared: self.prepared + other.prepared,
            committed: self.committed + other.committed,
            repeated: self.repeated + other.repeated,
        }
    }
}

#[derive(Debug, Default, Clone)]
struct Node {
    term: LeaseTerm,
    holder: String,
    place: Option<Place>,
}

#[derive(Debug, Clone)]
struct Place {
    revision: ReplicaRevision,
    told: BTreeSet<StepId>,
    answered: StepId,
}

#[derive(Debug, Default, Clone)]
struct Job {
    steps: u64,
    durable_every: u64,
    /// Whether a scheduler has died since it was last looked at.
    taken_over: bool,
}

#[derive(Debug, Clone)]
struct Session {
    job: JobId,
    start: u64,
    /// What each rank was told to compute, and what it has voted for.
    ranks: BTreeMap<u64, (BTreeSet<u64>, BTreeSet<u64>)>,
}

impl Session {
    fn all_prepared(&self, step: u64) -> bool {
        self.ranks.values().all(|(_, prepared)| prepared.contains(&step))
    }
}

impl Rules {
    /// How much was seen.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Takes the next thing that was seen.
    ///
    /// # Errors
    /// Why it may not be.
    pub fn see(&mut self, seen: &Observed) -> Result<(), String> {
        if let Some((node, term)) = self.owes.take() {
            let expected = Observed::Refused { node, term };
            return if *seen == expected {
                self.counts.refused += 1;
                Ok(())
            } else {
                Err(format!("{expected:?} was due, but {seen:?} came"))
            };
        }
        self.see_next(seen).map_err(|why| format!("{why}: {seen:?}"))
    }

    fn see_next(&mut self, seen: &Observed) -> Result<(), String> {
        match seen {
            Observed::Assigned { node, term, holder, revision } => {
                self.assigned(*node, (*term, holder), *revision)
            }
            Observed::Refused { .. } => Err("a rank refuses what it has to accept".into()),
            Observed::Told { node, term, revision, step } => {
                let node = self.nodes.entry(*node).or_default();
                let place = node.place.as_mut().filter(|place| place.revision == *revision);
                if let Some(place) = place.filter(|_| node.term == *term) {
                    place.told.insert(*step);
                }
                Ok(())
            }
            Observed::Answered { node, term, revision, step } => {
                self.answered(*node, *term, *revision, *step)
            }
            Observed::Left { node } => {
                self.nodes.entry(*node).or_default().place = None;
                Ok(())
            }
            Observed::NodeDied { node } => {
                // The fence is on its disk.
                self.nodes.entry(*node).or_default().place = None;
                Ok(())
            }
            Observed::Heard { gateway, term, refused } => {
                self.counts.gateways_refused += u64::from(refused.is_some());
                let expected = self.gateways.entry(*gateway).or_default().hear(*term).err();
                if *refused == expected {
                    Ok(())
                } else {
                    Err(format!("it should refuse it for {expected:?}"))
                }
            }
            Observed::GatewayDied { gateway } => {
                self.gateways.remove(gateway);
                Ok(())
            }
            Observed::Opened { rank, session, job, steps, durable_every } => {
                self.opened(*rank, *session, *job, *steps, *durable_every)
            }
            Observed::Trains { rank, session, step } => self.trains(*rank, *session, *step),
            Observed::Prepared { rank, session, step } => self.prepared(*rank, *session, *step),
            Observed::Committed { job, steps } => self.committed(*job, *steps),
            Observed::SchedulerDied => {
                self.jobs.values_mut().for_each(|job| job.taken_over = true);
                Ok(())
            }
        }
    }

    fn assigned(
        &mut self,
        number: usize,
        asked: (LeaseTerm, &str),
        revision: ReplicaRevision,
    ) -> Result<(), String> {
        let node = self.nodes.entry(number).or_default();
        node.place = None;
        if verdict((node.term, &node.holder), asked) == Verdict::Refuse {
            self.owes = Some((number, node.term));
            return Ok(());
        }
        (node.term, node.holder) = (asked.0, asked.1.to_owned());
        node.place = Some(Place { revision, told: BTreeSet::new(), answered: StepId(0) });
        self.counts.assigned += 1;
        Ok(())
    }

    fn answered(
        &mut self,
        number: usize,
        term: Option<LeaseTerm>,
        revision: ReplicaRevision,
        step: StepId,
    ) -> Result<(), String> {
        let node = self.nodes.entry(number).or_default();
        let reign = (node.term, node.holder.clone());
        let place = node.place.as_mut().filter(|place| place.revision == revision);
        let Some(place) = place.filter(|_| term.is_none_or(|term| term == reign.0)) else {
            return Err("a rank computes a step of a layout in which it has no place".into());
        };
        if !place.told.contains(&step) || step.0 != place.answered.0 + 1 {
            return Err(format!("step {} was computed before it, of {:?}", place.answered, place.told));
        }
        place.answered = step;
        self.counts.answered += 1;
        if *self.drivers.entry(revision).or_insert_with(|| reign.clone()) != reign {
            return Err("two leaders drive the ranks of one layout".into());
        }
        Ok(())
    }

    fn opened(
        &mut self,
        rank: u64,
        id: SessionId,
        job: JobId,
        steps: u64,
        durable_every: u64,
    ) -> Result<(), String> {
        let known = self.jobs.entry(job).or_default();
        known.durable_every = durable_every;
        if known.steps != steps {
            return Err(format!("a session goes on from another step than {}", known.steps));
        }
        let new = || Session { job, start: steps, ranks: BTreeMap::new() };
        let session = self.sessions.entry(id).or_insert_with(new);
        if (session.job, session.start) != (job, steps) {
            return Err("ranks of one session go on from different states".into());
        }
        session.ranks.insert(rank, Default::default());
        Ok(())
    }

    fn trains(&mut self, rank: u64, id: SessionId, step: u64) -> Result<(), String> {
        let Some(session) = self.sessions.get_mut(&id) else { return Err("nobody has opened it".into()) };
        if step < session.start || (step > session.start && !session.all_prepared(step - 1)) {
            return Err("a rank goes on from a step that not every rank has prepared".into());
        }
        match session.ranks.get_mut(&rank).is_some_and(|(told, _)| told.insert(step)) {
            true => Ok(()),
            false => Err("a rank is told twice to compute a step, or takes no part".into()),
        }
    }

    fn prepared(&mut self, rank: u64, id: SessionId, step: u64) -> Result<(), String> {
        let Some(session) = self.sessions.get_mut(&id) else { return Err("nobody has opened it".into()) };
        let start = session.start;
        let Some((told, prepared)) = session.ranks.get_mut(&rank) else {
            return Err("it takes no part".into());
        };
        if !told.contains(&step) || step != start + prepared.len() as u64 {
            return Err(format!("a rank prepares a step out of turn, after {prepared:?} of {told:?}"));
        }
        prepared.insert(step);
        self.counts.prepared += 1;
        Ok(())
    }

    fn committed(&mut self, id: JobId, steps: u64) -> Result<(), String> {
        let job = self.jobs.entry(id).or_default();
        let (before, taken_over) = (job.steps, std::mem::take(&mut job.taken_over));
        job.steps = steps;
        if steps > before {
            let mut sessions = self.sessions.values().filter(|session| session.job == id);
            self.counts.committed += 1;
            return match steps == before + 1 && sessions.any(|session| session.all_prepared(before)) {
                true => Ok(()),
                false => Err(format!("step {before} is committed without every vote")),
            };
        }
        if steps == before {
            return Ok(());
        }
        self.counts.repeated += before - steps;
        let every = job.durable_every.max(1);
        let back_to = before.saturating_sub(1) / every * every;
        // Where every step is durable, only another scheduler knows less, and one step at most.
        match steps >= back_to && (taken_over || every > 1) {
            true => Ok(()),
            false => Err(format!("a job falls back from {before} steps")),
        }
    }
}
