//! The cores wired together: messages in, messages out. Pure, like the cores; the service and the simulation run exactly
//! this.
//!
//! Layout: here inputs become events of the cores, in `effects` what these want becomes outputs.

mod effects;

use crate::adapters::{self, AdapterRecord, Adapters, AdaptersConfig, Caller};
use crate::audit::{self, Audits, Finding};
use crate::cluster::{self, Cluster, ClusterConfig, NodeConnection};
use crate::engine::{self, Engine, EngineConfig, GatewayId, ReplicaUp};
use crate::jobs::{self, Jobs, JobsConfig};
use crate::responses::{self, Responses, ResponsesConfig};
use crate::time::Millis;
use ashlar_protocol::admin::{
    AdminFailure, AdminFailureKind, AdminReply, AdminRequest, DrainNode, PlannedChange,
};
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::responses::ResponseRecord;
use ashlar_protocol::serving::{AuditCounters, ClusterSnapshot, FromScheduler, ToScheduler};
use ashlar_protocol::training::TrainingReport;
use ashlar_vocabulary::{AdapterId, Bytes, JobId, KeyId, LeaseTerm, NodeId, ReplicaId, RequestId, Tenant};
use std::collections::{BTreeMap, BTreeSet};

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
    /// The adapters that were served when the last term ended.
    StoredAdapters(Vec<(String, AdapterRecord)>),
    /// An [`Output::PersistAdapter`] has been done, or could not be.
    AdapterPersisted(String, Result<(), String>),
    /// The responses that were known when the last term ended.
    StoredResponses(Vec<ResponseRecord>),
    /// An [`Output::PersistResponse`] has been done, or could not be.
    ResponsePersisted(RequestId, Result<(), String>),
    /// Percent of a replica's KV blocks that each of these keys may hold.
    KvShares(BTreeMap<KeyId, u8>),
    /// From now on no submission is accepted; what is accepted goes on.
    Drain,
    /// The connections are about to end: jobs let go of what they hold. Gateways take their requests elsewhere.
    Abort,
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
    /// What jobs want of the store, the blobs and the log; never what is for gateways, nodes or the adapters' core.
    Jobs(Box<jobs::Effect>),
    /// For the log: a replica serves.
    Up(ReplicaUp),
    /// For the log: a replica serves no longer.
    Down(ReplicaId, String),
    /// For the log: why nothing can be served, or that it can be again.
    Problem(Option<String>),
    /// For the log: others are to take this node's place, and why.
    Quarantined(NodeId, String),
    /// For the log: two computations of one sequence have other bits.
    Differ(Finding),
    /// Store what has been served under a name, or forget it; answered by [`Input::AdapterPersisted`].
    PersistAdapter(String, Option<AdapterRecord>),
    /// Store a response's record, or forget it; answered by [`Input::ResponsePersisted`].
    PersistResponse(RequestId, Option<ResponseRecord>),
    /// Gateways are to have a new snapshot now: what is said to them next rests on it.
    Snapshot,
    /// A node has accepted a higher term: acquire one above it, or stop leading.
    Fenced(LeaseTerm),
}

/// What a job wants of the adapters' core.
#[derive(Debug, Clone)]
enum Wish {
    /// To be served under this name.
    Publish(String),
    /// To be stored beside what is served.
    Store(JobId),
    /// To be served instead of it.
    Promote(JobId),
}

/// The cores of one term.
#[derive(Debug, Clone)]
pub struct Director {
    cluster: Cluster,
    engine: Engine,
    jobs: Jobs,
    adapters: Adapters,
    responses: Responses,
    audits: Audits,
    audit_effects: Vec<audit::Effect>,
    response_effects: Vec<responses::Effect>,
    adapter_effects: Vec<adapters::Effect>,
    /// What jobs want of adapters, by number.
    wishes: BTreeMap<u64, Wish>,
    wishes_made: u64,
    cluster_effects: Vec<cluster::Effect>,
    engine_effects: Vec<engine::Effect>,
    job_effects: Vec<jobs::Effect>,
}

/// What the adapters' core is told of the others.
struct AdapterUsers<'a> {
    engine: &'a Engine,
    jobs: &'a Jobs,
}

impl adapters::Users for AdapterUsers<'_> {
    fn usage(&self, replica: ReplicaId, adapter: AdapterId) -> adapters::Usage {
        adapters::Users::usage(self.engine, replica, adapter)
    }

    fn beside_jobs(&self, replica: ReplicaId) -> Option<Bytes> {
        self.jobs.left_for_adapters(replica)
    }
}

fn unknown_node(node: &NodeId) -> AdminFailure {
    let message = format!("no node {node} has joined: GET /admin/cluster lists those that have");
    AdminFailure { kind: AdminFailureKind::NotFound, message }
}

impl Director {
    /// A director whom nobody has joined.
    pub fn new(
        cluster: ClusterConfig,
        engine: EngineConfig,
        adapters: AdaptersConfig,
        jobs: JobsConfig,
        responses: ResponsesConfig,
    ) -> Director {
        Director {
            cluster: Cluster::new(cluster),
            engine: Engine::new(engine),
            jobs: Jobs::new(jobs),
            adapters: Adapters::new(adapters),
            responses: Responses::new(responses),
            audits: Audits::default(),
            audit_effects: Vec::new(),
            response_effects: Vec::new(),
            adapter_effects: Vec::new(),
            wishes: BTreeMap::new(),
            wishes_made: 0,
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
            Input::Gateway(gateway, ToScheduler::Submit(submit)) if submit.kept => {
                self.response_event(now, responses::Event::Submit { gateway, submit });
            }
            Input::Gateway(gateway, ToScheduler::Cancel(id)) if self.responses.keeps(id) => {
                self.response_event(now, responses::Event::Unfollow { gateway, id });
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
            Input::GatewayOpened(gateway) => {
                self.job_event(now, jobs::Event::GatewayUp(gateway));
                self.response_event(now, responses::Event::GatewayUp(gateway));
            }
            Input::Gateway(gateway, ToScheduler::Admin { call, tenant, request }) => {
                self.admin(now, (gateway, call), tenant, request, outputs);
            }
            Input::Gateway(gateway, ToScheduler::Prepared { job, outcome }) => {
                self.job_event(now, jobs::Event::Prepared { gateway, job, outcome });
            }
            Input::Gateway(gateway, ToScheduler::Compared { job, outcome }) => {
                self.job_event(now, jobs::Event::Compared { gateway, job, outcome });
            }
            Input::StoredAdapters(records) => self.adapter_event(now, adapters::Event::Stored(records)),
            Input::AdapterPersisted(name, outcome) => {
                self.adapter_event(now, adapters::Event::Persisted { name, outcome });
            }
            Input::StoredResponses(records) => {
                self.response_event(now, responses::Event::Stored(records));
            }
            Input::ResponsePersisted(id, outcome) => {
                self.response_event(now, responses::Event::Persisted { id, outcome });
            }
            Input::GatewayClosed(gateway) => {
                self.response_event(now, responses::Event::GatewayGone(gateway));
                self.job_event(now, jobs::Event::GatewayGone(gateway));
                self.engine_event(now, engine::Event::GatewayGone { gateway });
            }
            Input::KvShares(shares) => self.engine_event(now, engine::Event::KvShares(shares)),
            Input::Drain => self.engine_event(now, engine::Event::Drain),
            Input::Jobs(event) => self.job_event(now, *event),
            Input::WallClock(unix_s) => {
                self.job_event(now, jobs::Event::WallClock(unix_s));
                self.response_event(now, responses::Event::WallClock(unix_s));
            }
            Input::Abort => self.job_event(now, jobs::Event::Abort),
            Input::Tick => {
                self.job_event(now, jobs::Event::Tick);
                self.engine_event(now, engine::Event::Tick);
                let slowest_step_ms = self.engine.slowest_step_ms();
                self.cluster_event(now, cluster::Event::Tick { slowest_step_ms });
                for replica in self.cluster.draining() {
                    if !self.engine.has_work(replica) {
                        self.cluster_event(now, cluster::Event::Drained { replica });
                    }
                }
                self.adapter_event(now, adapters::Event::Tick);
                self.response_event(now, responses::Event::Tick);
            }
        }
        self.settle(now, outputs);
    }

    /// Sends every step that may be sent now.
    pub fn plan(&mut self, now: Millis, outputs: &mut Vec<Output>) {
        self.engine.plan(now, &mut self.engine_effects);
        self.settle(now, outputs);
    }

    /// The cluster as gateways may know it, but for [choices in progress](Engine::requests).
    pub fn snapshot(&self) -> ClusterSnapshot {
        let mut snapshot =
            ClusterSnapshot { adapters: self.adapters.views(), ..self.cluster.snapshot(&self.engine) };
        snapshot.counters.audits = self.audits();
        (snapshot.counters.training_steps, snapshot.counters.trained_tokens) = self.jobs.trained();
        snapshot.counters.training_loss = self.jobs.training_loss();
        for node in &mut snapshot.nodes {
            if let Some((replica, ..)) = node.place {
                node.adapters = self.adapters.held(replica);
            }
            if let Some(connection) = self.cluster.connection_of(&node.node) {
                node.jobs = self.jobs.reserved_on(connection);
            }
        }
        snapshot
    }

    /// See [`Engine::take_generated`].
    pub fn take_generated(&mut self) -> BTreeMap<KeyId, u64> {
        self.engine.take_generated()
    }

    /// Whether no choice is in progress.
    pub fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    /// The nodes and their layout, to look at.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// See [`Cluster::share_revisions`].
    pub fn share_revisions(&mut self, used: &mut u64) {
        self.cluster.share_revisions(used);
    }

    /// The engine, to look at.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// How audits went.
    pub fn audits(&self) -> AuditCounters {
        self.audits.counters()
    }

    /// Responses that are kept.
    pub fn responses(&self) -> &Responses {
        &self.responses
    }

    /// Files and jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn admin(
        &mut self,
        now: Millis,
        (gateway, call): (GatewayId, u64),
        tenant: Option<Tenant>,
        request: Box<AdminRequest>,
        outputs: &mut Vec<Output>,
    ) {
        match *request {
            AdminRequest::DrainNode(wish) => {
                let reply = self.drain_node(wish, outputs).unwrap_or_else(AdminReply::Refused);
                let reply = FromScheduler::Admin { call, reply: Box::new(reply) };
                outputs.push(Output::ToGateway(gateway, Box::new(reply)));
            }
            AdminRequest::PlanWithout(nodes) => {
                let reply = self.plan_without(nodes).unwrap_or_else(AdminReply::Refused);
                let reply = FromScheduler::Admin { call, reply: Box::new(reply) };
                outputs.push(Output::ToGateway(gateway, Box::new(reply)));
            }
            AdminRequest::Replan { dry_run } => {
                let reply = self.replan(now, dry_run).unwrap_or_else(AdminReply::Refused);
                let reply = FromScheduler::Admin { call, reply: Box::new(reply) };
                outputs.push(Output::ToGateway(gateway, Box::new(reply)));
            }
            AdminRequest::Response(wish) => {
                self.response_event(now, responses::Event::Call { gateway, call, tenant, wish });
            }
            _ => self.admin_of_training(now, (gateway, call), tenant, request),
        }
    }

    /// Passes an operator's wish on to a node, which then [says](FromNode::Leaving) that it leaves.
    fn drain_node(&self, wish: DrainNode, outputs: &mut Vec<Output>) -> Result<AdminReply, AdminFailure> {
        let refused = |kind, message| AdminFailure { kind, message };
        let DrainNode { node, drain, force } = wish;
        let connection = self.cluster.connection_of(&node).ok_or_else(|| unknown_node(&node))?;
        if drain && !force {
            let needed = |why| refused(AdminFailureKind::Conflict, format!("node {node} is needed: {why}"));
            self.cluster.could_spare(&node).map_err(needed)?;
        }
        let order = Box::new(ToNode::Drain(drain));
        outputs.push(Output::ToNodes(vec![connection], order));
        Ok(AdminReply::Done)
    }

    /// What would become of the layout without some nodes.
    fn plan_without(&self, nodes: Vec<NodeId>) -> Result<AdminReply, AdminFailure> {
        let nodes: BTreeSet<NodeId> = nodes.into_iter().collect();
        if let Some(unknown) = nodes.iter().find(|node| self.cluster.connection_of(node).is_none()) {
            return Err(unknown_node(unknown));
        }
        Ok(AdminReply::Plan(Box::new(self.cluster.plan_without(&nodes))))
    }

    /// Has the first model laid out as it would be planned from nothing, or says what that would be.
    fn replan(&mut self, now: Millis, dry_run: bool) -> Result<AdminReply, AdminFailure> {
        let conflict = |message| AdminFailure { kind: AdminFailureKind::Conflict, message };
        let plan = self.cluster.plan_anew();
        if !dry_run {
            if let Some(reason) = self.cluster.is_in_motion() {
                return Err(conflict(reason));
            }
            if plan.change == PlannedChange::Impossible {
                let problem = plan.problem.unwrap_or_default();
                return Err(conflict(format!("the model cannot be laid out: {problem}")));
            }
            self.cluster_event(now, cluster::Event::Replan);
        }
        Ok(AdminReply::Plan(Box::new(plan)))
    }

    /// Files, jobs and adapters.
    fn admin_of_training(
        &mut self,
        now: Millis,
        (gateway, call): (GatewayId, u64),
        tenant: Option<Tenant>,
        request: Box<AdminRequest>,
    ) {
        use adapters::Event;
        let caller = Caller::Gateway { gateway, call };
        let event = match *request {
            AdminRequest::LoadAdapter(load) => Event::Load(caller, load),
            AdminRequest::UnloadAdapter { name, expected_generation } => {
                Event::Unload { caller, name, expected_generation }
            }
            AdminRequest::RollBackAdapter { name, to_generation, expected_generation } => {
                Event::RollBack { caller, name, to_generation, expected_generation }
            }
            _ => return self.job_event(now, jobs::Event::Admin { gateway, call, tenant, request }),
        };
        self.adapter_event(now, event);
    }

    fn node(&mut self, now: Millis, connection: NodeConnection, message: FromNode) {
        use cluster::{Event, Spent};
        let event = match message {
            FromNode::Join(join) => Event::Join { connection, join },
            FromNode::Refused { revision: _, term } => Event::Refused { connection, term },
            FromNode::Loading { revision, loaded, total } => {
                Event::Loading { connection, revision, loaded, total }
            }
            FromNode::Ready { revision, reserved, resident, kept, logged } => {
                Event::Ready { connection, revision, reserved, resident, kept, logged }
            }
            FromNode::Crashed => {
                let reason = "a rank has crashed".to_owned();
                if let Some((replica, _)) = self.cluster.place_of(connection) {
                    self.engine_event(now, engine::Event::ReplicaCrashed { replica, reason: reason.clone() });
                }
                Event::Lost { connection, reason: "it has crashed".to_owned() }
            }
            FromNode::Failed { revision, message, weights } => {
                Event::Failed { connection, revision, message, weights }
            }
            FromNode::AdapterLoaded { revision, adapter, load, outcome } => {
                let answer = adapters::Event::Answer { connection, revision, adapter, load, outcome };
                self.adapter_event(now, answer);
                Event::Heard { connection, spent: Spent::Nothing }
            }
            FromNode::Training { session, report } => {
                let spent = match &*report {
                    TrainingReport::Prepared { timing, .. } => Spent::Training(*timing),
                    _ => Spent::Nothing,
                };
                self.job_event(now, jobs::Event::Report { connection, session, report });
                Event::Heard { connection, spent }
            }
            FromNode::NotFinite { revision, sequences } => {
                Event::NotFinite { connection, revision, sequences }
            }
            FromNode::Digests { revision, digests } => {
                if let Some((replica, _)) = self.cluster.place_of(connection) {
                    self.audit_event(audit::Event::Digests { replica, revision, digests });
                }
                Event::Heard { connection, spent: Spent::Nothing }
            }
            FromNode::Leaving(leaving) => Event::Leaving { connection, leaving },
            FromNode::Prepared { revision, outcome } => Event::Prepared { connection, revision, outcome },
            FromNode::Beat => Event::Heard { connection, spent: Spent::Nothing },
            FromNode::StepResult(result) => {
                let spent = Spent::Serving(result.step, result.timing);
                if let Some((replica, _)) = self.cluster.place_of(connection) {
                    self.engine_event(now, engine::Event::StepResult { replica, result });
                }
                Event::Heard { connection, spent }
            }
            FromNode::StepDone { revision, step, timing } => {
                if let Some((replica, stage)) = self.cluster.place_of(connection) {
                    let event = engine::Event::StepDone { replica, revision, stage, step, timing };
                    self.engine_event(now, event);
                }
                Event::Heard { connection, spent: Spent::Serving(step, timing) }
            }
        };
        self.cluster_event(now, event);
    }

    fn adapter_event(&mut self, now: Millis, event: adapters::Event) {
        let users = AdapterUsers { engine: &self.engine, jobs: &self.jobs };
        self.adapters.handle(now, event, &users, &mut self.adapter_effects);
    }

    fn tell_adapters_held(&mut self, now: Millis, replica: ReplicaId) {
        let bytes = self.adapters.held(replica);
        self.job_event(now, jobs::Event::AdaptersHeld { replica, bytes });
    }

    fn engine_event(&mut self, now: Millis, event: engine::Event) {
        self.engine.apply(now, event, &mut self.engine_effects);
    }

    fn job_event(&mut self, now: Millis, event: jobs::Event) {
        self.jobs.handle(now, event, &mut self.job_effects);
    }

    fn audit_event(&mut self, event: audit::Event) {
        self.audits.handle(event, &mut self.audit_effects);
    }

    fn response_event(&mut self, now: Millis, event: responses::Event) {
        self.responses.handle(now, event, &mut self.response_effects);
    }

    fn cluster_event(&mut self, now: Millis, event: cluster::Event) {
        self.cluster.handle(now, event, &mut self.cluster_effects);
    }
}
