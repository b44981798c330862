//! The shell around the fleet: cores for each deployed model, and which messages are theirs.
//!
//! All models share the lease, the connections and the one task that owns every core. Nodes are told apart by where the fleet
//! says that they belong, choices by the digest of the model that they are for.

use super::leader::{CoresConfig, Leader};
use super::records::{Record, Records, Written};
use crate::cluster::{ClusterConfig, NodeConnection};
use crate::director::{Director, Input, Output};
use crate::engine::{EngineConfig, GatewayId};
use crate::fleet::{Caller, Effect, Event, Facts, Fleet, FleetRecord, NodeFact};
use crate::jobs::JobsConfig;
use crate::service::ModelCard;
use crate::time::Millis;
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::membership::{FromNode, Join};
use ashlar_protocol::models::{DeployModel, ModelStatus, ModelView, ModelsView};
use ashlar_protocol::serving::{ChoiceId, FailureKind, FromScheduler, RequestFailure, Submit, ToScheduler};
use ashlar_vocabulary::{NodeId, Tenant};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Reads a model's files: what whoever asks for it says, and what a scheduler must know of it. Runs where it may take its time.
pub type ModelOpener = Arc<dyn Fn(&DeployModel) -> Result<ModelCard, String> + Send + Sync>;

/// Models whose files have been read, and of which the fleet has not heard.
pub(super) const OPENED_MAX: usize = 64;
/// A model that is to go waits for so long after a term has begun: gateways are still to say what is in progress.
const RESUBMITTING_MS: u64 = 5_000;

impl Record for FleetRecord {
    const PREFIX: &'static str = "deployed/";
    const WHAT: &'static str = "a deployed model";
    const HAS_DIGITS: bool = false;
}

/// A model whose files have been read.
#[derive(Debug)]
pub(super) struct Opened {
    name: String,
    outcome: Result<ModelCard, String>,
}

/// What opens and records models.
pub(super) struct ModelPerformers {
    pub(super) opener: Option<ModelOpener>,
    pub(super) opened: mpsc::Sender<Opened>,
    pub(super) records: Records<FleetRecord>,
}

/// The deployed models, and whose is what.
pub(super) struct Models {
    fleet: Fleet,
    performers: ModelPerformers,
    template: CoresConfig,
    served: BTreeMap<String, Served>,
    joined: BTreeMap<NodeConnection, Joined>,
    /// Choices in progress that are not for the scheduler's own model.
    choices: BTreeMap<ChoiceId, (GatewayId, String)>,
    /// Of layouts, over all models.
    revisions: u64,
    told: ModelsView,
    began: Option<Millis>,
    outputs: Vec<Output>,
}

struct Served {
    director: Director,
    /// Whether a replica has served in this term.
    has_served: bool,
}

/// A node that has joined.
struct Joined {
    node: NodeId,
    /// With which model.
    at: Option<String>,
    /// Whether it wants to leave, whatever the fleet wants.
    leaving: bool,
}

impl Models {
    /// What was stored.
    pub(super) fn new(
        template: CoresConfig,
        performers: ModelPerformers,
        stored: Vec<(String, FleetRecord)>,
    ) -> Models {
        Models {
            fleet: Fleet::new(template.cluster.clone(), stored),
            performers,
            template,
            served: BTreeMap::new(),
            joined: BTreeMap::new(),
            choices: BTreeMap::new(),
            revisions: 0,
            told: ModelsView::default(),
            began: None,
            outputs: Vec::new(),
        }
    }

    /// How many nodes are not the scheduler's own model's.
    pub(super) fn nodes_deployed(&self) -> usize {
        self.fleet.nodes_deployed()
    }

    /// Whether no choice is in progress.
    pub(super) fn are_idle(&self) -> bool {
        self.served.values().all(|served| served.director.is_idle())
    }

    fn connection_of(&self, node: &NodeId) -> Option<NodeConnection> {
        self.joined.iter().find(|(_, joined)| joined.node == *node).map(|(connection, _)| *connection)
    }

    fn director_for(&self, config: ClusterConfig) -> Director {
        let CoresConfig { engine, adapters, jobs, responses, .. } = &self.template;
        let engine = EngineConfig {
            model_digest: config.model_digest,
            vocab_size: config.shape.vocab_size as u32,
            max_context_tokens: config.max_context_tokens,
            ..engine.clone()
        };
        // Files, jobs and stored responses are the scheduler's own model's.
        let jobs = JobsConfig {
            model_digest: config.model_digest,
            shape: config.shape.clone(),
            blobs: false,
            ..jobs.clone()
        };
        Director::new(config, engine, adapters.clone(), jobs, responses.clone())
    }
}

impl Leader {
    /// What the fleet wants at first.
    pub(super) fn begin_models(&mut self) {
        self.models.began = Some(self.now());
        self.fleet_event(Event::Tick);
    }

    /// Has the scheduler's own model handle an input.
    pub(super) fn apply(&mut self, input: Input) {
        let now = self.now();
        self.director.share_revisions(&mut self.models.revisions);
        self.director.apply(now, input, &mut self.outputs);
        self.director.share_revisions(&mut self.models.revisions);
    }

    /// Has a model handle an input.
    fn apply_to(&mut self, model: Option<&str>, input: Input) {
        let Some(name) = model else { return self.apply(input) };
        let now = self.now();
        let Some(served) = self.models.served.get_mut(name) else { return };
        served.director.share_revisions(&mut self.models.revisions);
        served.director.apply(now, input, &mut self.models.outputs);
        served.director.share_revisions(&mut self.models.revisions);
        self.take_outputs(name);
    }

    /// The cores of every model.
    pub(super) fn directors(&self) -> impl Iterator<Item = &Director> {
        let served = self.models.served.values().map(|served| &served.director);
        [&self.director].into_iter().chain(served)
    }

    /// As [`directors`](Self::directors).
    pub(super) fn directors_mut(&mut self) -> impl Iterator<Item = &mut Director> {
        let served = self.models.served.values_mut().map(|served| &mut served.director);
        [&mut self.director].into_iter().chain(served)
    }

    /// Has every model handle an input.
    pub(super) fn apply_to_all(&mut self, input: &Input) {
        let names: Vec<String> = self.models.served.keys().cloned().collect();
        self.apply(input.clone());
        names.iter().for_each(|name| self.apply_to(Some(name), input.clone()));
    }

    /// Sends what steps have become possible.
    pub(super) fn plan(&mut self) {
        let now = self.now();
        self.director.share_revisions(&mut self.models.revisions);
        self.director.plan(now, &mut self.outputs);
        self.director.share_revisions(&mut self.models.revisions);
        if self.models.served.is_empty() {
            return;
        }
        let names: Vec<String> = self.models.served.keys().cloned().collect();
        for name in names {
            let Some(served) = self.models.served.get_mut(&name) else { continue };
            served.director.share_revisions(&mut self.models.revisions);
            served.director.plan(now, &mut self.models.outputs);
            served.director.share_revisions(&mut self.models.revisions);
            self.take_outputs(&name);
        }
    }

    /// What a deployed model's cores want done, as far as it is theirs to want.
    fn take_outputs(&mut self, name: &str) {
        for output in std::mem::take(&mut self.models.outputs) {
            match output {
                Output::Jobs(_) | Output::PersistAdapter(..) | Output::PersistResponse(..) => {}
                Output::Up(up) => {
                    tracing::info!(model = name, replica = %up.replica, revision = %up.revision, "replica is up");
                    self.snapshot_due = true;
                }
                Output::Down(replica, reason) => {
                    tracing::warn!(model = name, %replica, %reason, "replica is down");
                    self.snapshot_due = true;
                }
                Output::Problem(problem) => {
                    if let Some(problem) = problem {
                        tracing::warn!(model = name, %problem, "nothing can be served");
                    }
                    self.snapshot_due = true;
                }
                Output::ToGateway(gateway, message) => {
                    if let FromScheduler::Finished { id, .. } | FromScheduler::Failed { id, .. } = &*message {
                        self.models.choices.remove(id);
                    }
                    self.outputs.push(Output::ToGateway(gateway, message));
                }
                output => self.outputs.push(output),
            }
        }
    }

    pub(super) fn tick_models(&mut self) {
        let names: Vec<String> = self.models.served.keys().cloned().collect();
        for name in &names {
            self.apply_to(Some(name), Input::Tick);
            if let Some(served) = self.models.served.get_mut(name) {
                served.has_served |= served.director.cluster().serves();
            }
        }
        if !self.models.fleet.is_plain() {
            self.fleet_event(Event::Tick);
        }
    }

    /// A node introduces itself.
    pub(super) fn joins(&mut self, connection: NodeConnection, mut join: Box<Join>) {
        let at = self.models.fleet.route(&join.node).map(str::to_owned);
        let former = self.models.connection_of(&join.node);
        if let Some(former) = former.filter(|former| {
            self.models.joined.get(former).is_some_and(|joined| *former != connection && joined.at != at)
        }) {
            // It went from one model to another before its old connection was seen to end.
            self.node_closed(former, "it connected anew".to_owned());
            let reason = format!("node {} connected anew", join.node);
            self.outputs.push(Output::CloseNode(former, reason));
        }
        let joined = Joined { node: join.node.clone(), at: at.clone(), leaving: join.leaving };
        join.leaving |= self.models.fleet.is_withheld(&join.node);
        self.models.joined.insert(connection, joined);
        self.apply_to(at.as_deref(), Input::Node(connection, Box::new(FromNode::Join(join))));
        if !self.models.fleet.is_plain() {
            self.fleet_event(Event::Tick);
        }
    }

    /// A node says something.
    pub(super) fn node_says(&mut self, connection: NodeConnection, mut message: FromNode) {
        let mut at = None;
        if let Some(joined) = self.models.joined.get_mut(&connection) {
            at = joined.at.clone();
            if let FromNode::Leaving(leaving) = &mut message {
                joined.leaving = *leaving;
                *leaving |= self.models.fleet.is_withheld(&joined.node);
            }
        }
        self.apply_to(at.as_deref(), Input::Node(connection, Box::new(message)));
    }

    /// A node's connection has ended, or is about to.
    pub(super) fn node_closed(&mut self, connection: NodeConnection, reason: String) {
        let at = self.models.joined.remove(&connection).and_then(|joined| joined.at);
        self.apply_to(at.as_deref(), Input::NodeClosed(connection, reason));
    }

    /// The cores have given a node up themselves.
    pub(super) fn forget_node(&mut self, connection: NodeConnection) {
        self.models.joined.remove(&connection);
    }

    /// A gateway says something.
    pub(super) fn gateway_says(&mut self, gateway: GatewayId, message: ToScheduler) {
        match message {
            ToScheduler::Submit(submit) => self.submit(gateway, submit),
            ToScheduler::Cancel(id) => {
                let model = self.models.choices.remove(&id).map(|(_, model)| model);
                self.apply_to(model.as_deref(), Input::Gateway(gateway, ToScheduler::Cancel(id)));
            }
            ToScheduler::Admin { call, tenant, request } => self.admin((gateway, call), tenant, *request),
            message => self.apply(Input::Gateway(gateway, message)),
        }
    }

    fn submit(&mut self, gateway: GatewayId, submit: Box<Submit>) {
        let id = submit.id;
        let model = self.models.fleet.of_digest(&submit.model_digest);
        let Some((name, removing)) = model.map(|(name, removing)| (name.to_owned(), removing)) else {
            return self.apply(Input::Gateway(gateway, ToScheduler::Submit(submit)));
        };
        // What is in progress ends, also under another scheduler than the one with which it began.
        let begun = self.models.choices.contains_key(&id) || !submit.forced.is_empty();
        if removing && !begun {
            let error = RequestFailure {
                kind: FailureKind::UnknownModel,
                message: format!("the model `{name}` is being removed"),
                retry_after_ms: None,
            };
            return self.tell_gateway(gateway, &FromScheduler::Failed { id, error });
        }
        self.models.choices.insert(id, (gateway, name.clone()));
        self.apply_to(Some(&name), Input::Gateway(gateway, ToScheduler::Submit(submit)));
    }

    fn admin(&mut self, caller: Caller, tenant: Option<Tenant>, request: AdminRequest) {
        let (gateway, call) = caller;
        let event = match request {
            AdminRequest::DeployModel(wish) => Event::Deploy(caller, wish),
            AdminRequest::ScaleModel(wish) => Event::Scale(caller, wish),
            AdminRequest::RemoveModel { name } => Event::Remove(caller, name),
            AdminRequest::Key(wish) => return self.key_call(caller, wish),
            AdminRequest::DrainNode(wish) => {
                let at = self.models.joined.values().find(|joined| joined.node == wish.node);
                let at = at.and_then(|joined| joined.at.clone());
                let request = Box::new(AdminRequest::DrainNode(wish));
                let input = Input::Gateway(gateway, ToScheduler::Admin { call, tenant, request });
                return self.apply_to(at.as_deref(), input);
            }
            request => {
                let request = Box::new(request);
                return self.apply(Input::Gateway(gateway, ToScheduler::Admin { call, tenant, request }));
            }
        };
        self.fleet_event(event);
    }

    /// A gateway is gone.
    pub(super) fn gateway_gone(&mut self, gateway: GatewayId) {
        self.models.choices.retain(|_, (owner, _)| *owner != gateway);
        self.apply_to_all(&Input::GatewayClosed(gateway));
        if !self.models.fleet.is_plain() {
            self.fleet_event(Event::GatewayGone(gateway));
        }
    }

    pub(super) fn model_written(&mut self, written: Written) {
        self.models.performers.records.note(&written);
        self.fleet_event(Event::Persisted { name: written.name, outcome: written.outcome });
    }

    pub(super) fn model_opened(&mut self, opened: Opened) {
        self.fleet_event(Event::Opened { name: opened.name, outcome: opened.outcome });
    }

    fn fleet_event(&mut self, event: Event) {
        let (now, facts) = (self.now(), self.facts());
        let mut effects = Vec::new();
        self.models.fleet.handle(now, event, &facts, &mut effects);
        for effect in effects {
            self.perform_for_fleet(effect, &facts);
        }
    }

    fn facts(&self) -> Facts {
        let mut nodes = BTreeMap::new();
        let directors = self.models.served.iter().map(|(name, served)| (Some(name), &served.director));
        for (at, director) in [(None, &self.director)].into_iter().chain(directors) {
            for member in director.cluster().members() {
                let leaving = self.models.joined.get(&member.connection).is_some_and(|joined| joined.leaving);
                let fact = NodeFact {
                    at: at.cloned(),
                    replica: member.replica,
                    leaving,
                    sound: member.sound,
                    holds: member.holds,
                    device: member.device,
                };
                nodes.insert(fact.device.node.clone(), fact);
            }
        }
        let settled = self.models.began.is_some_and(|began| self.now().since(began) >= RESUBMITTING_MS);
        let over = |served: &Served| served.director.is_idle() || !served.director.cluster().serves();
        let idle = self.models.served.iter().filter(|(_, served)| settled && over(served));
        Facts {
            nodes,
            own_serves: self.director.cluster().serves(),
            idle: idle.map(|(name, _)| name.clone()).collect(),
            unix_s: self.unix_s,
        }
    }

    fn perform_for_fleet(&mut self, effect: Effect, facts: &Facts) {
        match effect {
            Effect::Open(request) => self.open(request),
            Effect::Persist(name, record) => self.models.performers.records.write(name, record),
            Effect::Start { name, config } => {
                tracing::info!(model = %name, source = %config.model, "deploying a model");
                let director = self.models.director_for(*config);
                self.models.served.insert(name.clone(), Served { director, has_served: false });
                let shares = self.access.kv_shares();
                self.apply_to(Some(&name), shares);
                self.snapshot_due = true;
            }
            Effect::Stop(name) => self.stop(&name),
            Effect::Move { node, reason } => {
                if let Some(connection) = self.models.connection_of(&node) {
                    tracing::info!(%node, "{reason}");
                    self.node_closed(connection, reason.clone());
                    self.outputs.push(Output::CloseNode(connection, reason));
                    self.snapshot_due = true;
                }
            }
            Effect::Withhold { node, withheld } => {
                let Some(connection) = self.models.connection_of(&node) else { return };
                let Some(joined) = self.models.joined.get(&connection) else { return };
                let (at, leaving) = (joined.at.clone(), FromNode::Leaving(withheld || joined.leaving));
                self.apply_to(at.as_deref(), Input::Node(connection, Box::new(leaving)));
            }
            Effect::Reply((gateway, call), outcome) => {
                let reply = match outcome {
                    Err(refusal) => AdminReply::Refused(refusal),
                    Ok(None) => AdminReply::Done,
                    Ok(Some(name)) => {
                        let view = self.view_of(&name, facts).map(Box::new);
                        view.map_or(AdminReply::Done, AdminReply::Model)
                    }
                };
                // Whoever asks after that is told of it.
                self.send_models();
                self.tell_gateway(gateway, &FromScheduler::Admin { call, reply: Box::new(reply) });
            }
        }
    }

    fn open(&mut self, request: Box<DeployModel>) {
        let (name, opened) = (request.name.clone(), self.models.performers.opened.clone());
        let opener = self.models.performers.opener.clone();
        tokio::spawn(async move {
            let reading = tokio::task::spawn_blocking(move || match opener {
                Some(opener) => opener(&request),
                None => Err("this scheduler reads no models".to_owned()),
            });
            let outcome = reading.await.unwrap_or_else(|_| Err("reading its files has failed".to_owned()));
            // Nobody listens once the term is over.
            let _ = opened.send(Opened { name, outcome }).await;
        });
    }

    fn stop(&mut self, name: &str) {
        tracing::info!(model = name, "a model is removed");
        self.models.served.remove(name);
        let mut left = Vec::new();
        self.models.choices.retain(|id, (gateway, model)| {
            if model == name {
                left.push((*gateway, *id));
            }
            model != name
        });
        for (gateway, id) in left {
            let error = RequestFailure {
                kind: FailureKind::UnknownModel,
                message: format!("the model `{name}` was removed"),
                retry_after_ms: None,
            };
            self.tell_gateway(gateway, &FromScheduler::Failed { id, error });
        }
        self.snapshot_due = true;
    }

    fn view_of(&self, name: &str, facts: &Facts) -> Option<ModelView> {
        let (_, record) = self.models.fleet.deployed().find(|(deployed, _)| *deployed == name)?;
        let served = self.models.served.get(name)?;
        let cluster = self.watched(&served.director);
        let shortage = self.models.fleet.shortage(name, facts);
        let status = match (record.removing, served.has_served || served.director.cluster().serves()) {
            (true, _) => ModelStatus::Removing,
            (false, false) => ModelStatus::Loading,
            (false, true) => ModelStatus::Serving,
        };
        Some(ModelView {
            request: record.request.clone(),
            created_at: record.created_at,
            status,
            members: record.members.iter().cloned().collect(),
            problem: shortage.or_else(|| cluster.problem.clone()).filter(|_| !record.removing),
            cluster,
        })
    }

    /// The other models, if there is anything to say about them.
    pub(super) fn models_view(&self) -> ModelsView {
        if self.models.fleet.is_plain() {
            return ModelsView::default();
        }
        let facts = self.facts();
        let deployed = self.models.fleet.deployed();
        ModelsView {
            own_nodes: self.models.fleet.own_nodes(),
            deployed: deployed.filter_map(|(name, _)| self.view_of(name, &facts)).collect(),
        }
    }

    /// Tells gateways of the other models, if something about them has changed.
    pub(super) fn send_models(&mut self) {
        let view = self.models_view();
        if self.models.told == view {
            return;
        }
        let frame = super::leader::encode(&FromScheduler::Models(Box::new(view.clone())));
        self.models.told = view;
        self.tell_all_gateways(&frame);
    }
}
