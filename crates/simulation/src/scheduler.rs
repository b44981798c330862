//! The scheduler process: the real director, with the invariants of its cores checked after every input, and what its shell
//! does towards the store.

use crate::archive::{Archive, Keeper, Names, Superseded};
use crate::durable::{Answer, Refusal, Wish};
use crate::process::{Action, Connection, Errand, Input, Message, Purpose, Timer};
use ashlar_protocol::serving::{FromScheduler, SCHEDULER_BEAT_MS};
use ashlar_scheduler::adapters::AdaptersConfig;
use ashlar_scheduler::cluster::{ClusterConfig, NodeConnection, TICK_MS};
use ashlar_scheduler::director::{Director, Input as DirectorInput, Output};
use ashlar_scheduler::engine::{EngineConfig, GatewayId};
use ashlar_scheduler::jobs::{Effect, Event, JobsConfig};
use ashlar_scheduler::responses::ResponsesConfig;
use ashlar_scheduler::time::Millis;
use ashlar_vocabulary::{Bytes, LeaseTerm};
use std::collections::BTreeMap;

/// What is set for jobs, in worlds that have some.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Jobs {
    pub(crate) max_jobs_running: usize,
    pub(crate) max_adapters: usize,
}

/// One life of the scheduler: one term.
pub(crate) struct Scheduler {
    pub(crate) director: Director,
    purposes: BTreeMap<Connection, Purpose>,
    beat_due_us: u64,
    /// A node has accepted this term.
    pub(crate) fenced_by: Option<LeaseTerm>,
    /// Times that a replica came up or went down in this life.
    pub(crate) ups: u64,
    pub(crate) downs: u64,
    shell: Option<Shell>,
    /// Where somebody has a world in mind: everything is looked at with every so many inputs.
    check_every: Option<u64>,
    inputs: u64,
    /// Whether something has reached it since it last sent steps.
    pub(crate) unplanned: bool,
}

/// What is between the director and the store.
struct Shell {
    archive: Archive,
    keeper: Keeper,
    names: Names,
    /// What reached the process before it knew what was served.
    waiting: Option<Vec<Input>>,
    unix_s: u64,
}

impl Scheduler {
    /// A scheduler whose term has just begun. Without `jobs` nobody asks for any, and there is no store.
    pub(crate) fn new(cluster: ClusterConfig, engine: EngineConfig, jobs: Option<Jobs>) -> Scheduler {
        let memory = Bytes(1 << 24);
        let config = JobsConfig {
            term: cluster.term,
            model_digest: cluster.model_digest,
            shape: cluster.shape.clone(),
            adapter_memory: memory,
            max_jobs_running: jobs.map_or(1, |jobs| jobs.max_jobs_running),
            blobs: jobs.is_some(),
        };
        let adapters = AdaptersConfig { max_adapters: jobs.map_or(4, |jobs| jobs.max_adapters), memory };
        let shell = jobs.map(|_| Shell {
            archive: Archive::new(cluster.term),
            keeper: Keeper::default(),
            names: Names::default(),
            waiting: Some(Vec::new()),
            unix_s: 0,
        });
        let responses = ResponsesConfig { resume_grace_ms: 2_000, kept_s: 3600, max: 1_000 };
        let director = Director::new(cluster, engine, adapters, config, responses);
        let purposes = BTreeMap::new();
        Scheduler {
            director,
            purposes,
            beat_due_us: 0,
            fenced_by: None,
            ups: 0,
            downs: 0,
            shell,
            check_every: None,
            inputs: 0,
            unplanned: false,
        }
    }

    /// The same for a world that somebody has in mind: what reaches it together shares a step, as in the service, and it is
    /// looked at everything only with every so many inputs.
    pub(crate) fn at_ease(self, check_every: Option<u64>) -> Scheduler {
        Scheduler { check_every, ..self }
    }

    pub(crate) fn handle(
        &mut self,
        now_us: u64,
        input: Input,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let Some(shell) = &mut self.shell else { return self.lead(now_us, input, actions) };
        // A term is led once it is known what the last one served.
        let Some(waiting) = &mut shell.waiting else { return self.lead(now_us, input, actions) };
        match input {
            Input::Timer(Timer::Start | Timer::Names) => {
                actions.push(Action::Call(Errand::Names, Wish::ReadAdapters));
                Ok(())
            }
            Input::Answered(Errand::Names, Ok(Answer::Adapters(stored))) => {
                let waiting = std::mem::take(waiting);
                shell.waiting = None;
                let stored = shell.names.read(stored);
                shell.archive.go_on(actions);
                self.direct(now_us, DirectorInput::WallClock(now_us / 1_000_000), actions)?;
                self.direct(now_us, DirectorInput::StoredAdapters(stored), actions)?;
                self.lead(now_us, Input::Timer(Timer::Tick), actions)?;
                waiting.into_iter().try_for_each(|input| self.lead(now_us, input, actions))
            }
            Input::Answered(Errand::Names, _) => {
                actions.push(Action::Wake { after_us: 300_000, timer: Timer::Names });
                Ok(())
            }
            input => {
                waiting.push(input);
                Ok(())
            }
        }
    }

    fn lead(&mut self, now_us: u64, input: Input, actions: &mut Vec<Action>) -> Result<(), String> {
        let input = match input {
            Input::Timer(Timer::Start | Timer::Tick) => {
                actions.push(Action::Wake { after_us: TICK_MS * 1000, timer: Timer::Tick });
                self.beat(now_us, actions);
                self.tell_date(now_us, actions)?;
                DirectorInput::Tick
            }
            Input::Timer(Timer::Archive) => {
                self.shell.iter_mut().for_each(|shell| shell.archive.retry(actions));
                return Ok(());
            }
            Input::Timer(Timer::Keeper) => {
                self.shell.iter_mut().for_each(|shell| shell.keeper.retry(actions));
                return Ok(());
            }
            Input::Answered(errand, answer) => return self.answered(now_us, errand, answer, actions),
            Input::Opened { connection, purpose, .. } => {
                self.purposes.insert(connection, purpose);
                if purpose != Purpose::Serving {
                    return Ok(());
                }
                self.send_snapshot(connection, actions);
                DirectorInput::GatewayOpened(GatewayId(connection.0))
            }
            Input::Message(connection, Message::FromNode(message)) => {
                DirectorInput::Node(NodeConnection(connection.0), Box::new(message))
            }
            Input::Message(connection, Message::ToScheduler(message)) => {
                DirectorInput::Gateway(GatewayId(connection.0), message)
            }
            Input::Closed(connection) => match self.purposes.remove(&connection) {
                Some(Purpose::Control) => {
                    DirectorInput::NodeClosed(NodeConnection(connection.0), "its connection ended".into())
                }
                Some(Purpose::Serving) => DirectorInput::GatewayClosed(GatewayId(connection.0)),
                Some(Purpose::Link(..)) | None => return Ok(()),
            },
            Input::Message(..) | Input::Refused(_) | Input::Timer(_) => {
                return Err("the scheduler received what is not for it".to_owned());
            }
        };
        self.direct(now_us, input, actions)
    }

    /// Gives the director an input, and performs what it wants.
    fn direct(&mut self, now_us: u64, input: DirectorInput, actions: &mut Vec<Action>) -> Result<(), String> {
        let mut outputs = Vec::new();
        self.inputs += 1;
        match self.check_every {
            None => {
                self.director.handle(Millis(now_us / 1000), input, &mut outputs);
                self.check()?;
            }
            Some(every) => {
                self.director.apply(Millis(now_us / 1000), input, &mut outputs);
                self.unplanned = true;
                if self.inputs.is_multiple_of(every) {
                    self.check()?;
                }
            }
        }
        outputs.into_iter().for_each(|output| self.perform(output, actions));
        Ok(())
    }

    /// Sends every step that may be sent, after inputs that were only taken note of.
    pub(crate) fn send_steps(&mut self, now_us: u64, actions: &mut Vec<Action>) -> Result<(), String> {
        let mut outputs = Vec::new();
        self.unplanned = false;
        self.director.plan(Millis(now_us / 1000), &mut outputs);
        if self.check_every == Some(1) {
            self.check()?;
        }
        outputs.into_iter().for_each(|output| self.perform(output, actions));
        Ok(())
    }

    /// Looks at everything that must hold of the cores.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.director.engine().check().map_err(|why| format!("the engine is inconsistent: {why}"))?;
        if self.director.audits().differed > 0 {
            return Err("an audit has found other bits although every rank computes the same".to_owned());
        }
        self.director.jobs().check().map_err(|why| format!("the jobs are inconsistent: {why}"))?;
        let responses = self.director.responses();
        responses.check().map_err(|why| format!("the responses are inconsistent: {why}"))
    }

    fn tell_date(&mut self, now_us: u64, actions: &mut Vec<Action>) -> Result<(), String> {
        let unix_s = now_us / 1_000_000;
        let Some(shell) = self.shell.as_mut().filter(|shell| shell.unix_s != unix_s) else { return Ok(()) };
        shell.unix_s = unix_s;
        self.direct(now_us, DirectorInput::WallClock(unix_s), actions)
    }

    fn answered(
        &mut self,
        now_us: u64,
        errand: Errand,
        answer: Result<Answer, Refusal>,
        actions: &mut Vec<Action>,
    ) -> Result<(), String> {
        let Some(shell) = &mut self.shell else { return Ok(()) };
        let mut events: Vec<Event> = Vec::new();
        match errand {
            Errand::Archive => {
                if let Err(Superseded) = shell.archive.answered(answer, &mut events, actions) {
                    actions.push(Action::Restart);
                }
            }
            Errand::Keeper => shell.keeper.answered(answer, &mut events, actions),
            Errand::Name(name) => {
                let outcome = shell.names.written(&name, answer);
                return self.direct(now_us, DirectorInput::AdapterPersisted(name, outcome), actions);
            }
            _ => {}
        }
        let mut inputs = events.into_iter().map(|event| DirectorInput::Jobs(Box::new(event)));
        inputs.try_for_each(|input| self.direct(now_us, input, actions))
    }

    /// Tells gateways that it lives.
    fn beat(&mut self, now_us: u64, actions: &mut Vec<Action>) {
        if now_us < self.beat_due_us {
            return;
        }
        self.beat_due_us = now_us + SCHEDULER_BEAT_MS * 1_000;
        let beat = |gateway| Action::Send(gateway, Message::FromScheduler(FromScheduler::Beat));
        actions.extend(self.gateways().map(beat));
    }

    fn gateways(&self) -> impl Iterator<Item = Connection> {
        let serving = self.purposes.iter().filter(|(_, purpose)| **purpose == Purpose::Serving);
        serving.map(|(connection, _)| *connection)
    }

    fn send_snapshot(&self, gateway: Connection, actions: &mut Vec<Action>) {
        let snapshot = FromScheduler::Cluster(Box::new(self.director.snapshot()));
        actions.push(Action::Send(gateway, Message::FromScheduler(snapshot)));
    }

    fn perform(&mut self, output: Output, actions: &mut Vec<Action>) {
        match output {
            Output::ToNodes(nodes, message) => {
                let send = |node: NodeConnection| {
                    Action::Send(Connection(node.0), Message::ToNode((*message).clone()))
                };
                actions.extend(nodes.into_iter().map(send));
            }
            Output::CloseNode(node, _) => {
                self.purposes.remove(&Connection(node.0));
                actions.push(Action::Close(Connection(node.0)));
            }
            Output::ToGateway(gateway, message) => {
                actions.push(Action::Send(Connection(gateway.0), Message::FromScheduler(*message)));
            }
            Output::Up(_) => self.ups += 1,
            Output::Down(..) => self.downs += 1,
            // Clients here keep no records.
            Output::Problem(_)
            | Output::Quarantined(..)
            | Output::Differ(_)
            | Output::PersistResponse(..) => {}
            Output::Snapshot => {
                self.gateways().for_each(|gateway| self.send_snapshot(gateway, actions));
            }
            Output::Jobs(effect) => self.perform_for_jobs(*effect, actions),
            Output::PersistAdapter(name, record) => {
                if let Some(shell) = &mut self.shell {
                    shell.names.write(name, record, actions);
                }
            }
            Output::Fenced(by) => {
                self.fenced_by = self.fenced_by.max(Some(by));
                actions.push(Action::Restart);
            }
        }
    }

    fn perform_for_jobs(&mut self, effect: Effect, actions: &mut Vec<Action>) {
        let Some(shell) = &mut self.shell else { return };
        match effect {
            Effect::Warn(what) | Effect::Note(what) => actions.push(Action::Note(what)),
            wish @ (Effect::DeleteBlobs { .. } | Effect::Sweep(_) | Effect::WriteResults { .. }) => {
                shell.keeper.give(wish, actions);
            }
            wish => shell.archive.give(wish, actions),
        }
    }
}
