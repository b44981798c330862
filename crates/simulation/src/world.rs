//! Virtual time, a network, processes, and what happens to them.

mod jobs;
mod planning;

use crate::durable::{Durable, Outage, Wish};
use crate::gateway::{Gateway, Outcome};
use crate::node::Node;
use crate::observed::{self, Observed, Observer};
use crate::owner::Owner;
use crate::plan;
use crate::process::{Action, Connection, Errand, Input, Message, Process, Purpose, Timer};
use crate::random::Random;
use crate::scenario::{END_US, FAULTS_END_US, Fault, Moment, PROBES_US, Scenario};
use crate::scheduler::Scheduler;
use crate::tuning::Tuning;
use crate::watch::Watch;
use crate::{Report, Violation};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::FromScheduler;
use ashlar_vocabulary::{JobId, LeaseTerm, ReplicaId};
use planning::Course;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Lines of the trace that a violation carries.
const TRACE_LINES: usize = 400;

pub(crate) struct World {
    seed: u64,
    now_us: u64,
    random: Random,
    scenario: Scenario,
    queue: BTreeMap<(u64, u64), Happening>,
    numbers: u64,
    connections: BTreeMap<Connection, Wire>,
    lives: BTreeMap<Process, Life>,
    scheduler: Scheduler,
    nodes: Vec<Node>,
    gateways: Vec<Gateway>,
    /// What the store remembers.
    term: LeaseTerm,
    /// When the run ends.
    end_us: u64,
    /// Fine-tuning jobs, if there are any.
    tuning: Option<Arc<Tuning>>,
    durable: Durable,
    watch: Watch,
    /// Who falls into it, before or after it acts, and for how long.
    trap: Option<(Moment, bool, u64)>,
    /// When to look next whether all jobs have ended, and whether what they made has been asked for then.
    look_us: u64,
    probed: bool,
    report: Report,
    trace: Option<VecDeque<String>>,
    observer: Option<Observer>,
    /// How far a world is that somebody has in mind.
    course: Course,
}

enum Happening {
    To {
        process: Process,
        incarnation: u64,
        over: Option<Connection>,
        input: Box<Input>,
    },
    /// The store does something, and answers this one.
    Done {
        wish: Box<Wish>,
        answer_to: Option<(Process, u64, Errand)>,
    },
    Fault(Fault),
    Start(Process),
    Mend(Connection),
}

/// A process as its supervisor sees it.
#[derive(Debug, Clone, Copy, Default)]
struct Life {
    incarnation: u64,
    alive: bool,
    paused_until_us: u64,
}

/// A connection between two processes.
struct Wire {
    ends: [(Process, u64); 2],
    /// When the last message towards each end arrives: TCP keeps the order.
    arrival_us: [u64; 2],
    open: bool,
    blackhole: bool,
    /// Whether a message of the data plane has been lost, repeated or reordered.
    tainted: bool,
}

impl World {
    /// The world of a seed, with jobs or without.
    pub(crate) fn new(seed: u64, with_jobs: bool, traced: bool) -> World {
        let mut random = Random::new(seed);
        let scenario = if with_jobs { Scenario::with_jobs(&mut random) } else { Scenario::new(&mut random) };
        World::of(seed, random, scenario, traced)
    }

    /// The world of a scenario.
    fn of(seed: u64, random: Random, mut scenario: Scenario, traced: bool) -> World {
        let times = scenario.step_us.iter().zip(&scenario.pass_us).enumerate();
        let nodes = times.map(|(number, (step_us, pass_us))| Node::new(number, *step_us, *pass_us)).collect();
        let clients = std::mem::take(&mut scenario.clients);
        let tuning = scenario.tuning.clone().map(Arc::new);
        let count = clients.len();
        let gateway = |(number, requests)| {
            let owner = tuning.clone().map(|tuning| Owner::new(tuning, number, count));
            Gateway::new(number, requests, owner)
        };
        let gateways = clients.into_iter().enumerate().map(gateway).collect();
        let mut durable = Durable::default();
        durable.files.extend(tuning.iter().map(|tuning| (tuning.file.id, tuning.file.clone())));
        let cluster = scenario.cluster(LeaseTerm(1), "1".into());
        let mut world = World {
            seed,
            now_us: 0,
            random,
            scheduler: Scheduler::new(cluster, scenario.engine(), None),
            scenario,
            queue: BTreeMap::new(),
            numbers: 0,
            connections: BTreeMap::new(),
            lives: BTreeMap::new(),
            nodes,
            gateways,
            term: LeaseTerm(1),
            end_us: if tuning.is_some() { jobs::JOBS_END_US } else { END_US },
            tuning,
            durable,
            watch: Watch::default(),
            trap: None,
            look_us: 0,
            probed: false,
            report: Report::default(),
            trace: traced.then(VecDeque::new),
            observer: None,
            course: Course::default(),
        };
        world.scheduler = world.new_scheduler("1".into());
        world
    }

    /// Runs to the end and verifies that all is well there.
    pub(crate) fn run(mut self) -> Result<Report, Violation> {
        match self.run_to_the_end() {
            Ok(()) => Ok(self.report),
            Err(what) => Err(Violation {
                seed: self.seed,
                at_us: self.now_us,
                what,
                trace: self.trace.map(Vec::from).unwrap_or_default(),
            }),
        }
    }

    /// As [`run`](Self::run); what was seen instead of a report.
    pub(crate) fn observe(mut self) -> Result<Vec<Observed>, Violation> {
        self.observer = Some(Observer::default());
        match self.run_to_the_end() {
            Ok(()) => Ok(self.observer.map(Observer::into_seen).unwrap_or_default()),
            Err(what) => Err(Violation { seed: self.seed, at_us: self.now_us, what, trace: Vec::new() }),
        }
    }

    fn run_to_the_end(&mut self) -> Result<(), String> {
        self.start_all();
        for (at, fault) in std::mem::take(&mut self.scenario.faults) {
            self.push(at, Happening::Fault(fault));
        }
        while let Some(((at, _), happening)) = self.queue.pop_first() {
            if at > self.end_us {
                break;
            }
            self.now_us = at;
            self.happen(happening)?;
            self.end_with_probes();
        }
        self.verify_jobs()?;
        self.verify_end()
    }

    /// A scheduler whose term has just begun.
    fn new_scheduler(&self, holder: String) -> Scheduler {
        let cluster = self.scenario.cluster(self.term, holder);
        let scheduler = Scheduler::new(cluster, self.scenario.engine(), self.jobs_config());
        scheduler.at_ease(self.scenario.plan.as_ref().map(|plan| plan.check_every))
    }

    /// All processes start, at about the same time.
    fn start_all(&mut self) {
        let processes = std::iter::once(Process::Scheduler)
            .chain((0..self.nodes.len()).map(Process::Node))
            .chain((0..self.gateways.len()).map(Process::Gateway));
        for process in processes.collect::<Vec<_>>() {
            let at = self.random.between(0, 100_000);
            self.push(at, Happening::Start(process));
        }
    }

    fn verify_end(&mut self) -> Result<(), String> {
        for gateway in &self.gateways {
            gateway.verify_all()?;
            for request in &gateway.requests {
                match request.outcome {
                    Some(Outcome::Finished(_)) => self.report.finished += 1,
                    Some(Outcome::Failed(_)) => self.report.failed += 1,
                    Some(Outcome::ClientLeft | Outcome::GatewayDied) => self.report.left += 1,
                    None => {}
                }
                self.report.tokens += request.received.len() as u64;
                let adapted = request.promise.is_some() && !request.received.is_empty();
                self.report.adapted += u64::from(adapted);
                let probe = request.arrival_us >= PROBES_US;
                if probe && !matches!(request.outcome, Some(Outcome::Finished(_))) {
                    return Err(format!("after all faults a request ended as {:?}", request.outcome));
                }
            }
        }
        let engine = self.scheduler.director.engine();
        if !engine.is_idle() {
            return Err("the engine still has sequences although every request has ended".to_owned());
        }
        for replica in (0..self.scenario.replicas_max() as u32).map(ReplicaId) {
            let Some(replica) = engine.replica(replica) else {
                return Err(format!("replica {replica} does not serve although all faults are over"));
            };
            if replica.pool.held() > 0 {
                return Err(format!("{} blocks are held by nobody", replica.pool.held()));
            }
        }
        match self.nodes.iter().map(Node::tracked).max() {
            Some(tracked) if tracked > 0 => Err(format!("a rank still tracks {tracked} ended sequences")),
            _ => {
                self.count_life();
                self.report.head_slices = self.nodes.iter().map(Node::head_slices).sum();
                Ok(())
            }
        }
    }

    /// Adds what one life of the scheduler has seen.
    fn count_life(&mut self) {
        let counters = self.scheduler.director.engine().counters();
        self.report.steps += counters.steps;
        self.report.audits += self.scheduler.director.audits().passed;
        self.report.preemptions += counters.preemptions;
        self.report.cached_tokens += counters.prefix_cache_hits;
        self.report.replica_losses += self.scheduler.downs;
        self.report.replica_starts += self.scheduler.ups;
    }

    fn push(&mut self, at: u64, happening: Happening) {
        self.numbers += 1;
        self.queue.insert((at, self.numbers), happening);
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            if trace.len() == TRACE_LINES {
                trace.pop_front();
            }
            trace.push_back(format!("{:>10.3} ms  {}", self.now_us as f64 / 1000.0, line()));
        }
    }

    fn happen(&mut self, happening: Happening) -> Result<(), String> {
        match happening {
            Happening::Start(process) => {
                let life = self.lives.entry(process).or_default();
                if life.alive {
                    return Ok(());
                }
                *life = Life { incarnation: life.incarnation + 1, alive: true, paused_until_us: 0 };
                self.note(|| format!("{process:?} starts"));
                self.deliver(process, Input::Timer(Timer::Start))
            }
            Happening::To { process, incarnation, over, input } => {
                let life = self.life(process);
                if !life.alive || life.incarnation != incarnation {
                    return Ok(());
                }
                let lost = over.is_some_and(|wire| self.connections.get(&wire).is_none_or(|wire| !wire.open));
                let (over, input) = match *input {
                    // It broke before it stood.
                    Input::Opened { purpose, initiator: true, .. } if lost => (None, Input::Refused(purpose)),
                    _ if lost => return Ok(()),
                    input => (over, input),
                };
                if life.paused_until_us > self.now_us {
                    self.push(
                        life.paused_until_us,
                        Happening::To { process, incarnation, over, input: input.into() },
                    );
                    return Ok(());
                }
                let sprung = self.sprung(&input);
                if sprung.is_none_or(|(before, _)| !before) {
                    self.deliver(process, input)?;
                }
                if let Some((_, for_us)) = sprung {
                    self.note(|| format!("{process:?} falls into the trap"));
                    self.kill(process, for_us);
                }
                Ok(())
            }
            Happening::Done { wish, answer_to } => {
                self.note(|| format!("the store ← {}", clipped(format!("{wish:?}"))));
                self.done(*wish, answer_to)
            }
            Happening::Mend(connection) => {
                self.break_wire(connection);
                Ok(())
            }
            Happening::Fault(fault) => {
                self.note(|| format!("fault: {fault:?}"));
                self.report.faults += 1;
                self.strike(fault);
                Ok(())
            }
        }
    }

    fn life(&self, process: Process) -> Life {
        self.lives.get(&process).copied().unwrap_or_default()
    }

    fn deliver(&mut self, process: Process, input: Input) -> Result<(), String> {
        self.note(|| format!("{process:?} ← {}", short(&input)));
        let mut actions = Vec::new();
        match process {
            Process::Scheduler => {
                self.watch_heard(&input);
                self.scheduler.handle(self.now_us, input, &mut actions)?;
                self.watch_acted(&actions)?;
                if let Some(observer) = &mut self.observer {
                    let jobs = self.tuning.iter().flat_map(|tuning| tuning.jobs.iter().map(|job| job.id()));
                    let jobs: Vec<JobId> = jobs.collect();
                    observer.scheduler_acts(&actions, &self.scheduler.director, &jobs);
                }
                if let Some(plan) = self.scenario.plan.as_ref().filter(|_| self.scheduler.unplanned) {
                    self.course.due_us.get_or_insert(self.now_us + plan.times.scheduler_us);
                }
            }
            Process::Node(number) => {
                let Some(node) = self.nodes.get_mut(number) else { return Ok(()) };
                let observer = self.observer.iter_mut();
                observer.for_each(|observer| observer.node_hears(number, node.control(), &input));
                node.handle(input, &mut self.random, &mut actions)?;
                self.observer.iter_mut().for_each(|observer| observer.node_acts(number, &actions));
            }
            Process::Gateway(number) => {
                let Some(gateway) = self.gateways.get_mut(number) else { return Ok(()) };
                let term = observed::term_of(&input);
                gateway.handle(self.now_us, input, &mut self.random, &mut actions)?;
                let observer = self.observer.iter_mut();
                observer.for_each(|observer| observer.gateway_acts(number, term, &actions));
            }
        }
        for action in actions {
            self.act(process, action);
        }
        Ok(())
    }

    fn act(&mut self, process: Process, action: Action) {
        let incarnation = self.life(process).incarnation;
        match action {
            Action::Wake { after_us, timer } => {
                let to =
                    Happening::To { process, incarnation, over: None, input: Input::Timer(timer).into() };
                self.push(self.now_us + after_us, to);
            }
            Action::Send(connection, message) => self.send(process, connection, message),
            Action::Close(connection) => self.break_wire(connection),
            Action::Connect { to, purpose } => self.connect(process, to, purpose),
            Action::Restart => self.kill(process, 10_000),
            Action::Exit { for_us } => self.kill(process, for_us),
            Action::Call(errand, wish) => self.call(process, errand, wish),
            Action::Note(what) => self.note(|| what),
        }
    }

    fn connect(&mut self, from: Process, to: Process, purpose: Purpose) {
        let delay = self.random.between(50, 1_000);
        let (own, other) = (self.life(from), self.life(to));
        if !other.alive {
            let to = Happening::To {
                process: from,
                incarnation: own.incarnation,
                over: None,
                input: Input::Refused(purpose).into(),
            };
            return self.push(self.now_us + delay, to);
        }
        self.numbers += 1;
        let connection = Connection(self.numbers);
        let ends = [(from, own.incarnation), (to, other.incarnation)];
        let at = self.now_us + delay;
        let wire = Wire { ends, arrival_us: [at, at], open: true, blackhole: false, tainted: false };
        self.connections.insert(connection, wire);
        for (side, (process, incarnation)) in ends.into_iter().enumerate() {
            let input = Input::Opened { connection, purpose, initiator: side == 0 };
            self.push(
                at,
                Happening::To { process, incarnation, over: Some(connection), input: input.into() },
            );
        }
    }

    fn send(&mut self, from: Process, connection: Connection, message: Message) {
        let hostility = self.scenario.hostility;
        let hostile = self.now_us < FAULTS_END_US;
        let delay = match &self.scenario.plan {
            Some(plan) => plan::delay_us(plan, &message),
            None if self.random.chance(5_000) => self.random.between(1_000, 60_000),
            None => self.random.between(50, 600),
        };
        let Some(wire) = self.connections.get_mut(&connection) else { return };
        if !wire.open || wire.blackhole {
            return;
        }
        let side = usize::from(wire.ends[0].0 == from);
        let (process, incarnation) = wire.ends[side];
        let data = is_data(&message);
        let lost = hostile && data && self.random.chance(hostility.lose);
        let reordered = hostile && data && self.random.chance(hostility.reorder);
        let repeated = hostile && may_repeat(&message) && self.random.chance(hostility.duplicate);
        if data && (lost || reordered || repeated) && !std::mem::replace(&mut wire.tainted, true) {
            // What is missing or left over shows at the next message only: a faithful network says so, at the latest
            // when the faults end.
            self.numbers += 1;
            self.queue.insert((FAULTS_END_US, self.numbers), Happening::Mend(connection));
        }
        if lost {
            self.report.lost += 1;
            return;
        }
        let at = match reordered {
            true => wire.arrival_us[side].max(self.now_us) + self.random.between(1_000, 30_000),
            false => {
                wire.arrival_us[side] = (wire.arrival_us[side] + 1).max(self.now_us + delay);
                wire.arrival_us[side]
            }
        };
        self.report.reordered += u64::from(reordered);
        let input = Input::Message(connection, message);
        if repeated {
            self.report.duplicated += 1;
            let again = at + self.random.between(0, 50_000);
            let input = input.clone();
            self.push(
                again,
                Happening::To { process, incarnation, over: Some(connection), input: input.into() },
            );
        }
        self.push(at, Happening::To { process, incarnation, over: Some(connection), input: input.into() });
    }

    /// Ends a connection; both sides that still live hear of it.
    fn break_wire(&mut self, connection: Connection) {
        let Some(wire) = self.connections.get_mut(&connection).filter(|wire| wire.open) else { return };
        wire.open = false;
        let ends = wire.ends;
        self.connections.remove(&connection);
        for (process, incarnation) in ends {
            let at = self.now_us + self.random.between(20, 500);
            let input = Input::Closed(connection);
            self.push(at, Happening::To { process, incarnation, over: None, input: input.into() });
        }
    }

    fn kill(&mut self, process: Process, for_us: u64) {
        let life = self.lives.entry(process).or_default();
        if !life.alive {
            return;
        }
        life.alive = false;
        let theirs = |(connection, wire): (&Connection, &Wire)| {
            wire.ends.iter().any(|(end, _)| *end == process).then_some(*connection)
        };
        let theirs: Vec<Connection> = self.connections.iter().filter_map(theirs).collect();
        for connection in theirs {
            self.break_wire(connection);
        }
        if let Some(observer) = &mut self.observer {
            observer.note(match process {
                Process::Scheduler => Observed::SchedulerDied,
                Process::Node(node) => Observed::NodeDied { node },
                Process::Gateway(gateway) => Observed::GatewayDied { gateway },
            });
        }
        match process {
            Process::Scheduler => {
                self.count_life();
                let fenced = self.scheduler.fenced_by.unwrap_or_default();
                self.term = LeaseTerm(self.term.max(fenced).0 + 1);
                let holder = format!("{}", life_number(self.lives.get(&process)));
                self.scheduler = self.new_scheduler(holder);
                self.course.due_us = None;
                self.watch.died();
            }
            Process::Node(number) => {
                if let Some(node) = self.nodes.get_mut(number) {
                    *node = node.killed();
                }
            }
            Process::Gateway(number) => {
                if let Some(gateway) = self.gateways.get_mut(number) {
                    *gateway = gateway.killed(self.now_us);
                }
            }
        }
        self.push(self.now_us + for_us, Happening::Start(process));
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { process, for_us } => self.kill(process, for_us),
            Fault::Pause { process, for_us } => {
                self.lives.entry(process).or_default().paused_until_us = self.now_us + for_us;
            }
            Fault::Leave { node, for_us } => {
                let process = Process::Node(node);
                let incarnation = self.life(process).incarnation;
                let input = Input::Timer(Timer::Asked(for_us)).into();
                self.push(self.now_us, Happening::To { process, incarnation, over: None, input });
            }
            Fault::Break => {
                if let Some(connection) = self.some_connection() {
                    self.break_wire(connection);
                }
            }
            Fault::Blackhole { for_us } => {
                if let Some(connection) = self.some_connection() {
                    if let Some(wire) = self.connections.get_mut(&connection) {
                        wire.blackhole = true;
                    }
                    self.push(self.now_us + for_us, Happening::Mend(connection));
                }
            }
            Fault::ForgetTerm => {
                self.term = LeaseTerm(0);
                self.kill(Process::Scheduler, 100_000);
            }
            Fault::Trap { moment, before, for_us } => self.trap = Some((moment, before, for_us)),
            Fault::Outage { half, whom, slow, for_us } => {
                let until_us = self.now_us + for_us;
                self.begin_outage(Outage { until_us, whom, what: half, slow });
            }
        }
    }

    fn some_connection(&mut self) -> Option<Connection> {
        let index = self.random.between(0, self.connections.len() as u64) as usize;
        self.connections.keys().nth(index).copied()
    }
}

fn life_number(life: Option<&Life>) -> u64 {
    life.map_or(0, |life| life.incarnation + 1)
}

/// Steps and what answers them: what a hostile network may lose or reorder, and the world must still heal. (Losing a
/// single message of the control plane within a connection is beyond what any of the processes claims to survive.)
fn is_data(message: &Message) -> bool {
    matches!(
        message,
        Message::ToNode(ToNode::Step(_))
            | Message::FromNode(FromNode::StepResult(_) | FromNode::StepDone { .. } | FromNode::Beat)
            | Message::Activations(_)
            | Message::HeadRows(_)
            | Message::Logits(_)
    )
}

/// Messages that may come twice.
fn may_repeat(message: &Message) -> bool {
    match message {
        Message::FromScheduler(message) => !matches!(message, FromScheduler::Cluster(_)),
        Message::ToScheduler(_) => true,
        message => is_data(message),
    }
}

fn short(input: &Input) -> String {
    clipped(format!("{input:?}"))
}

fn clipped(text: String) -> String {
    match text.char_indices().nth(300) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
