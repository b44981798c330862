//! What worlds with fine-tuning jobs have beside the others: a store and blobs, traps, and what is looked at.

use super::{Happening, World};
use crate::aftermath;
use crate::durable::{Outage, PATIENCE_US, Refusal, Wish};
use crate::process::{Action, Errand, Input, Message, Process, Timer};
use crate::scenario::{self, END_US, FAULTS_END_US, Moment};
use crate::scheduler::Jobs;
use crate::tuning::ADAPTERS_ENOUGH;
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::ToScheduler;
use ashlar_protocol::training::{TrainingReport, TrainingWork};
use ashlar_scheduler::adapters::AdapterRecord;
use ashlar_vocabulary::{AdapterId, ReplicaId};
use std::collections::BTreeSet;

/// By this moment every job must have come to an end.
pub(super) const JOBS_END_US: u64 = 900_000_000;
/// How often it is looked whether they have.
const LOOK_US: u64 = 200_000;
/// Time between the requests that end a world, and how long the last one may take.
const PROBE_EVERY_US: u64 = 1_000_000;
const PROBE_TAKES_US: u64 = 12_000_000;

impl World {
    /// What is set for jobs.
    pub(super) fn jobs_config(&self) -> Option<Jobs> {
        self.tuning.as_ref().map(|tuning| Jobs {
            max_jobs_running: tuning.max_jobs_running,
            max_adapters: tuning.max_adapters,
        })
    }

    /// A process wants something of the store or the blobs.
    pub(super) fn call(&mut self, process: Process, errand: Errand, wish: Wish) {
        let incarnation = self.life(process).incarnation;
        let reach = self.durable.reach(self.now_us, process, &wish, &mut self.random);
        if !reach.answered {
            let input = Input::Answered(errand.clone(), Err(Refusal::Unavailable)).into();
            let given_up = Happening::To { process, incarnation, over: None, input };
            self.push(self.now_us + PATIENCE_US, given_up);
        }
        if let Some(after_us) = reach.done_after_us {
            let answer_to = reach.answered.then_some((process, incarnation, errand));
            self.push(self.now_us + after_us, Happening::Done { wish: Box::new(wish), answer_to });
        }
    }

    /// The store does what somebody wants, whether or not that one still lives.
    pub(super) fn done(
        &mut self,
        wish: Wish,
        answer_to: Option<(Process, u64, Errand)>,
    ) -> Result<(), String> {
        let answer = self.durable.perform(wish)?;
        if let Some((process, incarnation, errand)) = answer_to {
            let input = Input::Answered(errand, answer).into();
            let at = self.now_us + self.random.between(50, 600);
            self.push(at, Happening::To { process, incarnation, over: None, input });
        }
        Ok(())
    }

    pub(super) fn begin_outage(&mut self, outage: Outage) {
        self.durable.begin_outage(outage);
    }

    /// Whether somebody falls into the trap with this input: before or after it has acted, and for how long.
    pub(super) fn sprung(&mut self, input: &Input) -> Option<(bool, u64)> {
        let (moment, before, for_us) = self.trap.filter(|_| self.now_us < FAULTS_END_US)?;
        if moment_of(input) != Some(moment) {
            return None;
        }
        self.trap = None;
        Some((before, for_us))
    }

    /// The scheduler hears something.
    pub(super) fn watch_heard(&mut self, input: &Input) {
        if let Input::Message(rank, Message::FromNode(message)) = input {
            self.watch.heard(*rank, message);
        }
    }

    /// The scheduler has acted.
    pub(super) fn watch_acted(&mut self, actions: &[Action]) -> Result<(), String> {
        let Some(tuning) = self.tuning.clone() else { return Ok(()) };
        for action in actions {
            match action {
                Action::Send(rank, Message::ToNode(message)) => self.watch.told(*rank, message),
                Action::Call(_, Wish::PutAdapter { record: Some(record), .. }) => {
                    self.check_publication(record)?;
                }
                _ => {}
            }
        }
        if self.watch.look(&self.scheduler.director, &tuning)? {
            // It has taken over: a sweep would spare what is recorded.
            self.durable.check_references(&self.scheduler.director.jobs().references())?;
        }
        Ok(())
    }

    /// A name is stored, and shown then, once every rank of every replica that serves has loaded its adapter.
    fn check_publication(&self, record: &AdapterRecord) -> Result<(), String> {
        let Some(view) = record.generations.last() else { return Ok(()) };
        for up in self.serving() {
            let ranks = self.nodes.iter().filter_map(|node| node.shelf());
            let mut lacking =
                ranks.filter(|(revision, shelf)| *revision == up && !shelf.has_had(view.adapter));
            if lacking.next().is_some() {
                return Err(format!("{} is published, but a rank that serves has never had it", view.name));
            }
        }
        Ok(())
    }

    /// The layouts of the replicas that serve.
    fn serving(&self) -> impl Iterator<Item = ashlar_vocabulary::ReplicaRevision> {
        let engine = self.scheduler.director.engine();
        let replicas = (0..self.scenario.replicas_max() as u32).map(ReplicaId);
        replicas.filter_map(|replica| engine.replica(replica)).map(|replica| replica.revision)
    }

    /// Once all jobs have come to an end, every name that is shown is asked for once more.
    pub(super) fn end_with_probes(&mut self) {
        let Some(tuning) = self.tuning.clone().filter(|_| !self.probed) else { return };
        if self.now_us < END_US.max(self.look_us) {
            return;
        }
        self.look_us = self.now_us + LOOK_US;
        let content = self.gateways.iter().all(|gateway| gateway.is_content());
        if !content || !aftermath::is_over(&tuning, &self.durable, &self.scheduler.director) {
            return;
        }
        self.probed = true;
        let names = self.scheduler.director.snapshot().adapters;
        self.end_us = self.now_us + names.len() as u64 * PROBE_EVERY_US + PROBE_TAKES_US;
        let mut arrival_us = self.now_us;
        for view in names {
            arrival_us += PROBE_EVERY_US;
            let context = self.scenario.max_context_tokens();
            let probe = scenario::probe(&mut self.random, context, &view.name, arrival_us);
            let Some(gateway) = self.gateways.first_mut() else { return };
            let index = gateway.requests.len();
            gateway.requests.push(probe);
            let process = Process::Gateway(0);
            let incarnation = self.life(process).incarnation;
            let input = Input::Timer(Timer::Arrival(index)).into();
            self.push(arrival_us, Happening::To { process, incarnation, over: None, input });
        }
    }

    /// Verifies what has become of the jobs.
    pub(super) fn verify_jobs(&mut self) -> Result<(), String> {
        let Some(tuning) = self.tuning.clone() else { return Ok(()) };
        if !self.probed {
            return Err(aftermath::describe(&tuning, &self.durable, &self.scheduler.director));
        }
        let ends = aftermath::verify(&tuning, &self.durable)?;
        self.report.jobs_succeeded = ends.succeeded;
        self.report.jobs_failed = ends.failed;
        self.report.jobs_cancelled = ends.cancelled;
        (self.report.train_steps, self.report.repeated_steps) = self.watch.verify(&tuning)?;
        self.report.blobs_deleted = self.durable.deleted;
        self.report.blobs_left = self.durable.verify_blobs()?;
        if self.nodes.iter().any(|node| node.sessions() > 0) {
            return Err("a rank still has a session although every job has ended".to_owned());
        }
        let undisturbed = self.report.faults == 0 && self.scheduler.downs == 0;
        let repeats = tuning.jobs.iter().any(|job| job.is_full());
        if undisturbed && self.report.repeated_steps > 0 && !repeats {
            return Err(format!("{} steps were computed again for nothing", self.report.repeated_steps));
        }
        self.verify_names()
    }

    /// What is served is of jobs that want it to be, and in the memory of every rank if there is room for all.
    fn verify_names(&self) -> Result<(), String> {
        let Some(tuning) = &self.tuning else { return Ok(()) };
        let director = &self.scheduler.director;
        let views = director.snapshot().adapters;
        for view in &views {
            let job = tuning.jobs.iter().find(|job| job.name() == view.name);
            let record = job.and_then(|job| director.jobs().job(job.id()));
            // Of one that ended under another scheduler the name may be left.
            if record.is_some_and(|record| record.fine_tuned_model.is_none()) && !self.watch.any_death() {
                return Err(format!("{} is served although its job did not succeed", view.name));
            }
        }
        // Where one went for another, or could not be read, it comes back when somebody asks for it.
        if tuning.max_adapters < ADAPTERS_ENOUGH || self.durable.any_outage {
            return Ok(());
        }
        let adapters: BTreeSet<AdapterId> = views.iter().map(|view| view.adapter).collect();
        for up in self.serving() {
            for (_, shelf) in self.nodes.iter().filter_map(|node| node.shelf()).filter(|(at, _)| *at == up) {
                if let Some(lacking) = adapters.iter().find(|adapter| !shelf.has(**adapter)) {
                    return Err(format!("a rank that serves does not have {lacking}, which is published"));
                }
            }
        }
        Ok(())
    }
}

/// Which moment an input is.
fn moment_of(input: &Input) -> Option<Moment> {
    Some(match input {
        Input::Message(_, Message::ToNode(message)) => match message {
            ToNode::OpenSession(_) => Moment::Open,
            ToNode::LoadAdapter { .. } => Moment::Load,
            ToNode::Training { work, .. } => match work {
                TrainingWork::Step { .. } => Moment::Step,
                TrainingWork::Evaluate => Moment::Evaluate,
                TrainingWork::Export { .. } => Moment::Export,
                TrainingWork::Close => Moment::Close,
            },
            _ => return None,
        },
        Input::Message(_, Message::Training(_)) => Moment::Exchange,
        Input::Message(_, Message::FromNode(message)) => match message {
            FromNode::AdapterLoaded { .. } => Moment::Loaded,
            FromNode::Training { report, .. } => match **report {
                TrainingReport::Opened { .. } => Moment::Opened,
                TrainingReport::Prepared { .. } => Moment::Vote,
                TrainingReport::Exported { .. } | TrainingReport::ModelExported { .. } => Moment::Exported,
                TrainingReport::Evaluated { .. }
                | TrainingReport::Failed { .. }
                | TrainingReport::NoRoom { .. } => {
                    return None;
                }
            },
            _ => return None,
        },
        Input::Message(_, Message::ToScheduler(ToScheduler::Admin { .. } | ToScheduler::Prepared { .. })) => {
            Moment::Asked
        }
        Input::Answered(errand, _) => match errand {
            Errand::Archive => Moment::Written,
            Errand::Keeper => Moment::Kept,
            Errand::Name(_) => Moment::Named,
            Errand::Names => return None,
            _ => Moment::Blob,
        },
        _ => return None,
    })
}
