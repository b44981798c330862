//! What processes were seen doing that the protocol has rules for: for whoever wants to compare runs with the rules.

use crate::process::{Action, Connection, Input, Message};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{FromScheduler, ToScheduler};
use ashlar_protocol::training::{SessionStart, TrainingReport, TrainingWork};
use ashlar_scheduler::director::Director;
use ashlar_vocabulary::{JobId, LeaseTerm, ReplicaRevision, SessionId, StepId};
use std::collections::BTreeMap;

/// Something that was seen. Ranks of sessions are named by their connection to the scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// A node is told to take a place.
    Assigned {
        /// Which node.
        node: usize,
        /// The lease.
        term: LeaseTerm,
        /// Whose it is.
        holder: String,
        /// The layout.
        revision: ReplicaRevision,
    },
    /// A node refuses a place, as it obeys this term.
    Refused {
        /// Which node.
        node: usize,
        /// What it obeys.
        term: LeaseTerm,
    },
    /// A node is told to compute a step.
    Told {
        /// Which node.
        node: usize,
        /// The lease.
        term: LeaseTerm,
        /// The layout.
        revision: ReplicaRevision,
        /// The step.
        step: StepId,
    },
    /// A node says that it has computed a step.
    Answered {
        /// Which node.
        node: usize,
        /// The lease, which only a rank that samples names.
        term: Option<LeaseTerm>,
        /// The layout.
        revision: ReplicaRevision,
        /// The step.
        step: StepId,
    },
    /// A node has lost the scheduler, or was told to give its place up.
    Left {
        /// Which node.
        node: usize,
    },
    /// A node has died.
    NodeDied {
        /// Which node.
        node: usize,
    },
    /// A gateway hears of the scheduler's term.
    Heard {
        /// Which gateway.
        gateway: usize,
        /// The scheduler's.
        term: LeaseTerm,
        /// The higher term for which it refuses this one, if it does.
        refused: Option<LeaseTerm>,
    },
    /// A gateway has died.
    GatewayDied {
        /// Which gateway.
        gateway: usize,
    },
    /// The scheduler opens a session on a rank.
    Opened {
        /// The rank's connection.
        rank: u64,
        /// The session.
        session: SessionId,
        /// The job.
        job: JobId,
        /// Steps of the state that it goes on from.
        steps: u64,
        /// How many steps there are from one durable state to the next.
        durable_every: u64,
    },
    /// The scheduler tells a rank to compute a training step.
    Trains {
        /// The rank's connection.
        rank: u64,
        /// The session.
        session: SessionId,
        /// The step.
        step: u64,
    },
    /// A rank votes for a training step.
    Prepared {
        /// The rank's connection.
        rank: u64,
        /// The session.
        session: SessionId,
        /// The step.
        step: u64,
    },
    /// The scheduler's record of a job has come to another number of steps.
    Committed {
        /// The job.
        job: JobId,
        /// The steps.
        steps: u64,
    },
    /// The scheduler has died.
    SchedulerDied,
}

/// Takes notes.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    seen: Vec<Observed>,
    steps: BTreeMap<JobId, u64>,
}

impl Observer {
    pub(crate) fn into_seen(self) -> Vec<Observed> {
        self.seen
    }

    /// A node is about to take an input; `control` is its connection to the scheduler.
    pub(crate) fn node_hears(&mut self, node: usize, control: Option<Connection>, input: &Input) {
        let seen = match input {
            Input::Closed(connection) if control == Some(*connection) => Observed::Left { node },
            Input::Message(_, Message::ToNode(message)) => match message {
                ToNode::Assign(assignment) => Observed::Assigned {
                    node,
                    term: assignment.term,
                    holder: assignment.holder.clone(),
                    revision: assignment.revision,
                },
                ToNode::Release { .. } => Observed::Left { node },
                ToNode::Step(plan) => {
                    Observed::Told { node, term: plan.term, revision: plan.revision, step: plan.step }
                }
                _ => return,
            },
            _ => return,
        };
        self.seen.push(seen);
    }

    /// A node wants these things done.
    pub(crate) fn node_acts(&mut self, node: usize, actions: &[Action]) {
        for action in actions {
            let Action::Send(connection, Message::FromNode(message)) = action else { continue };
            let seen = match message {
                FromNode::Refused { term, .. } => Observed::Refused { node, term: *term },
                FromNode::StepResult(result) => {
                    let (term, revision, step) = (Some(result.term), result.revision, result.step);
                    Observed::Answered { node, term, revision, step }
                }
                FromNode::StepDone { revision, step, .. } => {
                    Observed::Answered { node, term: None, revision: *revision, step: *step }
                }
                FromNode::Training { session, report } => match **report {
                    TrainingReport::Prepared { step, .. } => {
                        Observed::Prepared { rank: connection.0, session: *session, step }
                    }
                    _ => continue,
                },
                _ => continue,
            };
            self.seen.push(seen);
        }
    }

    /// The scheduler wants these things done, and knows this of its jobs.
    pub(crate) fn scheduler_acts(&mut self, actions: &[Action], director: &Director, jobs: &[JobId]) {
        for job in jobs {
            let Some(steps) = director.jobs().job(*job).map(|record| record.steps) else { continue };
            if self.steps.insert(*job, steps) != Some(steps) {
                self.seen.push(Observed::Committed { job: *job, steps });
            }
        }
        for action in actions {
            let Action::Send(Connection(rank), Message::ToNode(message)) = action else { continue };
            let rank = *rank;
            match message {
                ToNode::OpenSession(open) => {
                    let steps = match open.start {
                        SessionStart::New => 0,
                        SessionStart::Resume { steps, .. } => steps,
                    };
                    let durable_every = open.settings.full.map_or(1, |full| full.durable_every);
                    let (session, job) = (open.session, open.job);
                    self.seen.push(Observed::Opened { rank, session, job, steps, durable_every });
                }
                ToNode::Training { session, work: TrainingWork::Step { step } } => {
                    self.seen.push(Observed::Trains { rank, session: *session, step: *step });
                }
                _ => {}
            }
        }
    }

    /// A gateway has taken an input, and wants these things done.
    pub(crate) fn gateway_acts(&mut self, gateway: usize, term: Option<LeaseTerm>, actions: &[Action]) {
        let Some(term) = term else { return };
        let refused = actions.iter().find_map(|action| match action {
            Action::Send(_, Message::ToScheduler(ToScheduler::Refused { term })) => Some(*term),
            _ => None,
        });
        self.seen.push(Observed::Heard { gateway, term, refused });
    }

    pub(crate) fn note(&mut self, seen: Observed) {
        self.seen.push(seen);
    }
}

/// The term of a snapshot, if that is what a gateway hears.
pub(crate) fn term_of(input: &Input) -> Option<LeaseTerm> {
    match input {
        Input::Message(_, Message::FromScheduler(FromScheduler::Cluster(snapshot))) => Some(snapshot.term),
        _ => None,
    }
}
