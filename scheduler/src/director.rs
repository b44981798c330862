//! The cores wired together: messages in, messages out. Pure, like the cores; the service and the simulation run exactly
//! this.

use crate::cluster::{self, Cluster, ClusterConfig, NodeConnection};
use crate::engine::{self, Engine, EngineConfig, GatewayId, ReplicaUp};
use crate::jobs::{self, Jobs, JobsConfig};
use crate::time::Millis;
use ashlar_protocol::admin::{AdminFailure, AdminFailureKind, AdminReply, AdminRequest};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{ClusterSnapshot, FromScheduler, ToScheduler};
use ashlar_vocabulary::{LeaseTerm, ReplicaId};

/// What reaches the scheduler.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A node says something.
    Node(NodeConnection, Box<FromNode>),
    /// A node's connection has ended.
    NodeClosed(NodeConnection, String),
    /// A gateway has connected.
    GatewayOpened(GatewayId),
    /// A gateway says something.
    Gateway(GatewayId, ToScheduler),
    /// A gateway's connection has ended.
    GatewayClosed(GatewayId),
    /// The store or the blobs answer a job's wish.
    Jobs(Box<jobs::Event>),
    /// The wall clock, in seconds since 1970. Only records of files and jobs show it.
    WallClock(u64),
    /// From now on no submission is accepted; what is accepted goes on.
    Drain,
    /// Ends every request as unavailable.
    Abort(String),
    /// Time passes. To be given at least every [`TICK_MS`](cluster::TICK_MS).
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// Send to these nodes; one that does not take it is lost.
    ToNodes(Vec<NodeConnection>, Box<ToNode>),
    /// Close a node's connection; the cores count it as lost already.
    CloseNode(NodeConnection, String),
    /// Send to a gateway; one that does not take it is lost.
    ToGateway(GatewayId, Box<FromScheduler>),
    /// What jobs want of the store, the blobs and the log; never [`Reply`](jobs::Effect::Reply),
    /// [`Prepare`](jobs::Effect::Prepare) or [`ToNodes`](jobs::Effect::ToNodes).
    Jobs(Box<jobs::Effect>),
    /// For the log: a replica serves.
    Up(ReplicaUp),
    /// For the log: a replica serves no longer.
    Down(ReplicaId, String),
    /// For the log: why nothing can be served, or that it can be again.
    Problem(Option<String>),
    /// A node has accepted a higher term: acquire one above it, or stop leading.
    Fenced(LeaseTerm),
}

/// Cluster, engine and jobs of one term.
#[derive(Debug, Clone)]
pub struct Director {
    cluster: Cluster,
    engine: Engine,
    jobs: Jobs,
    cluster_effects: Vec<cluster::Effect>,
    engine_effects: Vec<engine::Effect>,
    job_effects: Vec<jobs::Effect>,
}

impl Director {
    /// A director whom nobody has joined.
    pub fn new(cluster: ClusterConfig, engine: EngineConfig, jobs: JobsConfig) -> Director {
        Director {
            cluster: Cluster::new(cluster),
            engine: Engine::new(engine),
            jobs: Jobs::new(jobs),
            cluster_effects: Vec::new(),
            engine_effects: Vec::new(),
            job_effects: Vec::new(),
        }
    }

    /// Applies one input and sends what steps have become possible.
    pub fn handle(&mut self, now: Millis, input: Input, outputs: &mut Vec<Output>) {
        self.apply(now, input, outputs);
        self.plan(now, outputs);
    }

    /// Applies one input without planning, so that several that arrived together share a step. [`plan`](Self::plan) must
    /// follow.
    pub fn apply(&mut self, now: Millis, input: Input, outputs: &mut Vec<Output>) {
        match input {
            Input::Node(connection, message) => self.node(now, connection, *message),
            Input::NodeClosed(connection, reason) => {
                self.cluster_event(now, cluster::Event::Lost { connection, reason });
            }
            Input::Gateway(gateway, ToScheduler::Submit(submit)) => {
                self.engine_event(now, engine::Event::Submit { gateway, submit });
            }
            Input::Gateway(gateway, ToScheduler::Cancel(id)) => {
                self.engine_event(now, engine::Event::Cancel { gateway, id });
            }
            Input::Gateway(_, ToScheduler::Refused { term }) => {
                self.cluster_event(now, cluster::Event::GatewayRefused { term });
            }
            Input::GatewayOpened(gateway) => self.job_event(now, jobs::Event::GatewayUp(gateway)),
            Input::Gateway(gateway, ToScheduler::Admin { call, request }) => {
                self.admin(now, gateway, call, request);
            }
            Input::Gateway(gateway, ToScheduler::Prepared { job, outcome }) => {
                self.job_event(now, jobs::Event::Prepared { gateway, job, outcome });
            }
            Input::GatewayClosed(gateway) => {
                self.job_event(now, jobs::Event::GatewayGone(gateway));
                self.engine_event(now, engine::Event::GatewayGone { gateway });
            }
            Input::Drain => self.engine_event(now, engine::Event::Drain),
            Input::Jobs(event) => self.job_event(now, *event),
            Input::WallClock(unix_s) => self.job_event(now, jobs::Event::WallClock(unix_s)),
            Input::Abort(reason) => {
                self.engine_event(now, engine::Event::Abort { reason });
                self.job_event(now, jobs::Event::Abort);
            }
            Input::Tick => {
                self.job_event(now, jobs::Event::Tick);
                self.engine_event(now, engine::Event::Tick);
                let slowest_step_ms = self.engine.slowest_step_ms();
                self.cluster_event(now, cluster::Event::Tick { slowest_step_ms });
            }
        }
        self.settle(now, outputs);
    }

    /// Sends every step that may be sent now.
    pub fn plan(&mut self, now: Millis, outputs: &mut Vec<Output>) {
        self.engine.plan(now, &mut self.engine_effects);
        self.settle(now, outputs);
    }

    /// The cluster as gateways may know it.
    pub fn snapshot(&self) -> ClusterSnapshot {
        self.cluster.snapshot(&self.engine)
    }

    /// Whether no choice is in progress.
    pub fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Files and jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn admin(&mut self, now: Millis, gateway: GatewayId, call: u64, request: Box<AdminRequest>) {
        match *request {
            // Not served yet: this is where calls about adapters go to the core that serves them.
            AdminRequest::LoadAdapter(_)
            | AdminRequest::UnloadAdapter { .. }
            | AdminRequest::RollBackAdapter { .. } => {
                let reply = Box::new(AdminReply::Refused(adapters_are_not_served()));
                self.job_effects.push(jobs::Effect::Reply { gateway, call, reply });
            }
            _ => self.job_event(now, jobs::Event::Admin { gateway, call, request }),
        }
    }

    fn node(&mut self, now: Millis, connection: NodeConnection, message: FromNode) {
        use cluster::Event;
        let event = match message {
            FromNode::Join(join) => Event::Join { connection, join },
            FromNode::Refused { revision: _, term } => Event::Refused { connection, term },
            FromNode::Loading { revision, loaded, total } => {
                Event::Loading { connection, revision, loaded, total }
            }
            FromNode::Ready { revision, reserved, resident } => {
                Event::Ready { connection, revision, reserved, resident }
            }
            FromNode::Failed { revision, message } => Event::Failed { connection, revision, message },
            FromNode::AdapterLoaded { .. } => Event::Heard { connection, timing: None },
            FromNode::Training { session, report } => {
                self.job_event(now, jobs::Event::Report { connection, session, report });
                Event::Heard { connection, timing: None }
            }
            FromNode::Beat => Event::Heard { connection, timing: None },
            FromNode::StepResult(result) => {
                let timing = Some(result.timing);
                if let Some((replica, _)) = self.cluster.place_of(connection) {
                    self.engine_event(now, engine::Event::StepResult { replica, result });
                }
                Event::Heard { connection, timing }
            }
            FromNode::StepDone { revision, step, timing } => {
                if let Some((replica, stage)) = self.cluster.place_of(connection) {
                    let event = engine::Event::StepDone { replica, revision, stage, step, timing };
                    self.engine_event(now, event);
                }
                Event::Heard { connection, timing: Some(timing) }
            }
        };
        self.cluster_event(now, event);
    }

    fn engine_event(&mut self, now: Millis, event: engine::Event) {
        self.engine.apply(now, event, &mut self.engine_effects);
    }

    fn job_event(&mut self, now: Millis, event: jobs::Event) {
        self.jobs.handle(now, event, &mut self.job_effects);
    }

    fn cluster_event(&mut self, now: Millis, event: cluster::Event) {
        self.cluster.handle(now, event, &mut self.cluster_effects);
    }

    /// Turns effects into outputs and into events of the other cores, until no core wants anything more.
    fn settle(&mut self, now: Millis, outputs: &mut Vec<Output>) {
        while !(self.engine_effects.is_empty()
            && self.cluster_effects.is_empty()
            && self.job_effects.is_empty())
        {
            for effect in std::mem::take(&mut self.job_effects) {
                self.job_effect(now, effect, outputs);
            }
            for effect in std::mem::take(&mut self.engine_effects) {
                match effect {
                    engine::Effect::SendStep { replica, plan } => {
                        let connections = self.cluster.connections_of(replica);
                        outputs.push(Output::ToNodes(connections, Box::new(ToNode::Step(plan))));
                    }
                    engine::Effect::ToGateway { gateway, message } => {
                        outputs.push(Output::ToGateway(gateway, Box::new(message)));
                    }
                    engine::Effect::ReplicaFault { replica, revision, reason } => {
                        self.cluster_event(now, cluster::Event::ReplicaFault { replica, revision, reason });
                    }
                }
            }
            for effect in std::mem::take(&mut self.cluster_effects) {
                match effect {
                    cluster::Effect::Assign { connection, assignment } => {
                        outputs.push(Output::ToNodes(vec![connection], Box::new(ToNode::Assign(assignment))));
                    }
                    cluster::Effect::Release { connection, revision } => {
                        let release = ToNode::Release { revision };
                        outputs.push(Output::ToNodes(vec![connection], Box::new(release)));
                    }
                    cluster::Effect::Disconnect { connection, reason } => {
                        outputs.push(Output::CloseNode(connection, reason));
                    }
                    cluster::Effect::ReplicaUp(up) => {
                        outputs.push(Output::Up(up.clone()));
                        if let Some(replica) = self.cluster.training_replica(up.replica) {
                            self.job_event(now, jobs::Event::ReplicaUp(replica));
                        }
                        self.engine_event(now, engine::Event::ReplicaUp(up));
                    }
                    cluster::Effect::ReplicaDown { replica, reason } => {
                        outputs.push(Output::Down(replica, reason.clone()));
                        let down = jobs::Event::ReplicaDown { replica, reason: reason.clone() };
                        self.job_event(now, down);
                        self.engine_event(now, engine::Event::ReplicaDown { replica, reason });
                    }
                    cluster::Effect::Problem(problem) => {
                        outputs.push(Output::Problem(problem.clone()));
                        self.engine_event(now, engine::Event::Problem(problem));
                    }
                    cluster::Effect::Fenced { by } => outputs.push(Output::Fenced(by)),
                }
            }
        }
    }

    fn job_effect(&mut self, now: Millis, effect: jobs::Effect, outputs: &mut Vec<Output>) {
        match effect {
            jobs::Effect::ToNodes(connections, message) => {
                outputs.push(Output::ToNodes(connections, message));
            }
            jobs::Effect::Reply { gateway, call, reply } => {
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Admin { call, reply })));
            }
            jobs::Effect::Prepare { gateway, job } => {
                outputs.push(Output::ToGateway(gateway, Box::new(FromScheduler::Prepare(job))));
            }
            // Not served yet: this is where finished adapters go to the core that serves them, which answers with
            // `Published` or `NotPublished`; and what it serves belongs to the references of a sweep.
            jobs::Effect::Publish(load) => {
                let refused =
                    jobs::Event::NotPublished { name: load.name, failure: adapters_are_not_served() };
                self.job_event(now, refused);
            }
            jobs::Effect::Withdraw(_) => {}
            other => outputs.push(Output::Jobs(Box::new(other))),
        }
    }
}

fn adapters_are_not_served() -> AdminFailure {
    let message = "this scheduler does not serve adapters".to_owned();
    AdminFailure { kind: AdminFailureKind::Invalid, message }
}
