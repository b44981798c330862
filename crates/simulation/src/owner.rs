//! The owners of fine-tuning jobs behind one gateway: they ask until they are answered, one thing after the other, and the
//! gateway validates their files.

use crate::process::{Action, Connection, Message, Timer};
use crate::random::Random;
use crate::tuning::Tuning;
use ashlar_protocol::admin::{AdapterView, AdminFailureKind, AdminReply, AdminRequest};
use ashlar_protocol::serving::ToScheduler;
use ashlar_vocabulary::{AdapterId, JobId};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pause before a call is repeated.
const RETRY_US: u64 = 300_000;

/// What a client asks to be served with.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Want {
    /// One of the names that are shown then, if there are any.
    Some(u64),
    /// This name.
    Name(String),
}

/// The owners, and what their gateway knows of names.
pub(crate) struct Owner {
    tuning: Arc<Tuning>,
    digests: Arc<BTreeMap<AdapterId, u64>>,
    /// What they will ask, in turn for each job.
    plans: Vec<Plan>,
    /// Calls that are not answered.
    calls: BTreeMap<u64, usize>,
    made: u64,
    /// What is served, as the scheduler said last.
    pub(crate) views: Vec<AdapterView>,
}

#[derive(Debug, Clone)]
struct Plan {
    at_us: u64,
    job: JobId,
    request: AdminRequest,
    done: bool,
}

impl Owner {
    /// The owners of every `of`th job, from the `number`th.
    pub(crate) fn new(tuning: Arc<Tuning>, number: usize, of: usize) -> Owner {
        let mut plans = Vec::new();
        for job in tuning.jobs.iter().skip(number).step_by(of) {
            let id = job.id();
            let request = AdminRequest::CreateJob(Box::new(job.request.clone()));
            plans.push(Plan { at_us: job.created_us, job: id, request, done: false });
            plans.extend(job.controls.iter().map(|(at_us, action)| {
                let request = AdminRequest::ControlJob(id, *action);
                Plan { at_us: *at_us, job: id, request, done: false }
            }));
        }
        let digests = Arc::new(tuning.digests());
        Owner { tuning, digests, plans, calls: BTreeMap::new(), made: 0, views: Vec::new() }
    }

    /// The owners outlive their gateway.
    pub(crate) fn killed(&self) -> Owner {
        let (tuning, digests, plans) = (self.tuning.clone(), self.digests.clone(), self.plans.clone());
        Owner { tuning, digests, plans, calls: BTreeMap::new(), made: self.made, views: Vec::new() }
    }

    /// The gateway starts.
    pub(crate) fn start(&self, now_us: u64, actions: &mut Vec<Action>) {
        for (index, plan) in self.plans.iter().enumerate().filter(|(_, plan)| !plan.done) {
            let after_us = plan.at_us.saturating_sub(now_us);
            actions.push(Action::Wake { after_us, timer: Timer::Plan(index) });
        }
    }

    /// Whether everything has been asked and answered.
    pub(crate) fn is_content(&self) -> bool {
        self.plans.iter().all(|plan| plan.done)
    }

    /// It is time to ask something.
    pub(crate) fn due(&mut self, index: usize, serving: Option<Connection>, actions: &mut Vec<Action>) {
        let Some(plan) = self.plans.get(index).filter(|plan| !plan.done) else { return };
        let before = self.plans.iter().take(index).filter(|before| before.job == plan.job);
        let ready = before.into_iter().all(|before| before.done);
        match serving.filter(|_| ready) {
            Some(serving) => {
                self.made += 1;
                self.calls.insert(self.made, index);
                let request = Box::new(plan.request.clone());
                let call = ToScheduler::Admin { call: self.made, tenant: None, request };
                actions.push(Action::Send(serving, Message::ToScheduler(call)));
            }
            None => actions.push(Action::Wake { after_us: RETRY_US, timer: Timer::Plan(index) }),
        }
    }

    /// A call is answered.
    pub(crate) fn replied(
        &mut self,
        call: u64,
        reply: &AdminReply,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        // Answers to calls of a former life of the gateway, or of a former connection, and ones that came twice.
        let Some(index) = self.calls.remove(&call) else { return Ok(()) };
        let Some(plan) = self.plans.get_mut(index) else { return Ok(()) };
        match reply {
            AdminReply::Refused(failure) => match failure.kind {
                AdminFailureKind::Unavailable | AdminFailureKind::Full => {
                    actions.push(Action::Wake { after_us: RETRY_US, timer: Timer::Plan(index) });
                }
                AdminFailureKind::Conflict if matches!(plan.request, AdminRequest::ControlJob(..)) => {
                    plan.done = true;
                }
                _ => return Err(format!("{:?} was refused: {}", plan.request, failure.message)),
            },
            AdminReply::Job(record) if record.request.id == plan.job => plan.done = true,
            other => return Err(format!("{:?} was answered with {other:?}", plan.request)),
        }
        Ok(())
    }

    /// What was not answered is asked again.
    pub(crate) fn disconnected(&mut self, actions: &mut Vec<Action>) {
        for index in std::mem::take(&mut self.calls).into_values() {
            actions.push(Action::Wake { after_us: RETRY_US, timer: Timer::Plan(index) });
        }
    }

    /// A job's files are to be validated.
    pub(crate) fn prepare(&self, job: JobId, random: &mut Random, actions: &mut Vec<Action>) {
        let after_us = random.between(5_000, 400_000);
        actions.push(Action::Wake { after_us, timer: Timer::Prepared(job) });
    }

    /// They are.
    pub(crate) fn prepared(&self, id: JobId, serving: Option<Connection>, actions: &mut Vec<Action>) {
        let (Some(serving), Some(job)) = (serving, self.tuning.job(id)) else { return };
        let outcome = Box::new(Ok(job.prepared.clone()));
        let prepared = ToScheduler::Prepared { job: id, outcome };
        actions.push(Action::Send(serving, Message::ToScheduler(prepared)));
    }

    /// The adapter that a request gets, and what it comes to.
    ///
    /// # Errors
    /// A name that is not served although it has to be, or that stands for something else.
    pub(crate) fn promise(&self, want: &Want) -> Result<Option<(AdapterId, u64)>, String> {
        let view = match want {
            Want::Some(_) if self.views.is_empty() => return Ok(None),
            Want::Some(pick) => self.views.get(*pick as usize % self.views.len()),
            Want::Name(name) => self.views.iter().find(|view| view.name == *name),
        };
        let view = view.ok_or_else(|| format!("{want:?} is not served"))?;
        let digest = self.digests.get(&view.adapter).filter(|_| {
            // Of the step that its name tells.
            self.tuning.named(&view.name) == Some(view.adapter)
        });
        match digest {
            Some(digest) => Ok(Some((view.adapter, *digest))),
            None => Err(format!("{} is not what an undisturbed run has", view.name)),
        }
    }
}
