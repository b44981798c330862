//! The owner of all state while this process leads: select, let the director handle, perform what it wants done.

use super::access::Access;
use super::archive::{Answer, Archive};
use super::connection::{Arrival, Frame, GatewayArrival, NodeArrival, Peer};
use super::keeper::Keeper;
use super::models::{Models, Opened};
use super::records::{Records, Written};
use super::spans::Spans;
use crate::adapters::{AdapterRecord, AdaptersConfig};
use crate::cluster::{ClusterConfig, NodeConnection, TICK_MS};
use crate::director::{Director, Input, Output};
use crate::engine::{EngineConfig, GatewayId};
use crate::jobs::{self, JobsConfig};
use crate::responses::ResponsesConfig;
use crate::time::Millis;
use ashlar_protocol::frame;
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::models::ModelsView;
use ashlar_protocol::responses::ResponseRecord;
use ashlar_protocol::serving::{
    ClusterSnapshot, FromScheduler, REQUESTS_SHOWN, SCHEDULER_BEAT_MS, ToScheduler,
};
use ashlar_service_kit::{Clock, ShutdownRequest, SystemClock, Watchdog};
use ashlar_vocabulary::{LeaseTerm, RequestId};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Messages handled together before the next steps are planned.
const BATCH_MAX: usize = 256;
/// Least time between two snapshots that differ only in numbers.
const SNAPSHOT_INTERVAL_MS: u64 = 250;

/// Why leading ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The process was asked to end, and everything is done.
    Drained,
    /// The lease went to somebody else.
    LeaseLost,
    /// A node has accepted this higher term.
    Fenced(LeaseTerm),
}

/// What each core is told.
#[derive(Clone)]
pub(super) struct CoresConfig {
    pub(super) cluster: ClusterConfig,
    pub(super) engine: EngineConfig,
    pub(super) adapters: AdaptersConfig,
    pub(super) jobs: JobsConfig,
    pub(super) responses: ResponsesConfig,
}

/// Where messages come from.
pub(super) struct Sources {
    pub(super) nodes: mpsc::Receiver<NodeArrival>,
    pub(super) gateways: mpsc::Receiver<GatewayArrival>,
    pub(super) answers: mpsc::Receiver<Answer>,
    pub(super) adapters_written: mpsc::Receiver<Written>,
    pub(super) responses_written: mpsc::Receiver<Written>,
    pub(super) models_written: mpsc::Receiver<Written>,
    pub(super) models_opened: mpsc::Receiver<Opened>,
    pub(super) keys_written: mpsc::Receiver<Written>,
}

/// Who does what takes time.
pub(super) struct Performers {
    pub(super) archive: Archive,
    pub(super) keeper: Keeper,
    pub(super) adapters: Records<AdapterRecord>,
    pub(super) responses: Records<ResponseRecord>,
}

/// The director and its connections.
pub(super) struct Leader {
    clock: SystemClock,
    pub(super) director: Director,
    /// The models beside that one.
    pub(super) models: Models,
    pub(super) access: Access,
    nodes: BTreeMap<NodeConnection, Peer>,
    gateways: BTreeMap<GatewayId, Peer>,
    pub(super) outputs: Vec<Output>,
    spans: Spans,
    fenced: Option<LeaseTerm>,
    performers: Performers,
    /// Another scheduler has written what is ours, or the archive cannot follow.
    superseded: bool,
    pub(super) unix_s: u64,
    last_snapshot: Option<ClusterSnapshot>,
    last_snapshot_at: Millis,
    pub(super) snapshot_due: bool,
    last_beat_at: Millis,
}

impl Leader {
    /// A leader whom nobody has joined; what the store knew of adapters and responses is given.
    pub(super) fn new(
        config: CoresConfig,
        performers: Performers,
        (models, access): (Models, Access),
        stored_adapters: Vec<(String, AdapterRecord)>,
        stored_responses: Vec<ResponseRecord>,
    ) -> Leader {
        let CoresConfig { cluster, engine, adapters, jobs, responses } = config;
        let mut leader = Leader {
            clock: SystemClock::new(),
            director: Director::new(cluster, engine, adapters, jobs, responses),
            models,
            access,
            nodes: BTreeMap::new(),
            gateways: BTreeMap::new(),
            outputs: Vec::new(),
            spans: Spans::default(),
            fenced: None,
            performers,
            superseded: false,
            unix_s: 0,
            last_snapshot: None,
            last_snapshot_at: Millis(0),
            snapshot_due: false,
            last_beat_at: Millis(0),
        };
        // Before anything else: what happens before the first tick has a date, too.
        leader.tell_date();
        leader.apply(Input::StoredAdapters(stored_adapters));
        leader.apply(Input::StoredResponses(stored_responses));
        let shares = leader.access.kv_shares();
        leader.apply(shares);
        leader.begin_models();
        leader
    }

    /// Leads until the process shall end, the lease is lost, or a node obeys a higher term.
    pub(super) async fn lead(
        mut self,
        mut sources: Sources,
        watchdog: &Watchdog,
        lease_lost: impl Future<Output = ()>,
        shutdown: &mut ShutdownRequest,
        drain_grace: Duration,
    ) -> Ended {
        let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(lease_lost);
        let mut drain_until: Option<Millis> = None;
        let mut beat_due = self.now();
        loop {
            if beat_due <= self.now() {
                beat_due = self.now().plus(watchdog.interval().as_millis() as u64);
                watchdog.beat();
            }
            // In order of urgency; the tick first, so that a flood of messages cannot hold up deadlines.
            tokio::select! {
                biased;
                _ = ticks.tick() => self.tick(),
                Some(arrival) = sources.nodes.recv() => self.node(arrival),
                Some(arrival) = sources.gateways.recv() => self.gateway(arrival),
                Some(answer) = sources.answers.recv() => self.answer(answer),
                Some(written) = sources.adapters_written.recv() => self.adapter_written(written),
                Some(written) = sources.responses_written.recv() => self.response_written(&written),
                Some(written) = sources.models_written.recv() => self.model_written(written),
                Some(opened) = sources.models_opened.recv() => self.model_opened(opened),
                Some(written) = sources.keys_written.recv() => self.key_written(written),
                () = &mut lease_lost => {
                    // A shutdown that has begun is not begun again under another term.
                    let ended = if drain_until.is_some() { Ended::Drained } else { Ended::LeaseLost };
                    return self.end(ended, watchdog).await;
                }
                () = &mut *shutdown, if drain_until.is_none() => {
                    drain_until = Some(self.now().plus(drain_grace.as_millis() as u64));
                    self.apply_to_all(&Input::Drain);
                }
            }
            for _ in 0..BATCH_MAX {
                if let Ok(arrival) = sources.nodes.try_recv() {
                    self.node(arrival);
                } else if let Ok(arrival) = sources.gateways.try_recv() {
                    self.gateway(arrival);
                } else {
                    break;
                }
            }
            self.perform();
            if self.superseded {
                let ended = if drain_until.is_some() { Ended::Drained } else { Ended::LeaseLost };
                return self.end(ended, watchdog).await;
            }
            if let Some(term) = self.fenced.filter(|_| drain_until.is_none()) {
                return self.end(Ended::Fenced(term), watchdog).await;
            }
            if drain_until.is_some_and(|until| self.is_idle() || until <= self.now()) {
                return self.end(Ended::Drained, watchdog).await;
            }
        }
    }

    /// Ends what is in progress and closes every connection: gateways take their requests to the next leader.
    async fn end(mut self, ended: Ended, watchdog: &Watchdog) -> Ended {
        self.apply(Input::Abort);
        self.perform();
        let closing = async {
            self.performers.archive.finish().await;
            self.performers.keeper.finish().await;
            let peers = self.nodes.into_values().chain(self.gateways.into_values());
            for peer in peers {
                peer.close().await;
            }
        };
        tokio::select! {
            () = closing => ended,
            never = watchdog.keep_beating() => match never {},
        }
    }

    pub(super) fn now(&self) -> Millis {
        Millis(self.clock.now().0)
    }

    fn is_idle(&self) -> bool {
        self.director.is_idle() && self.models.are_idle()
    }

    fn answer(&mut self, answer: Answer) {
        match answer {
            Answer::Event(event) => self.apply(Input::Jobs(event)),
            Answer::Superseded => self.superseded = true,
        }
    }

    fn tell_date(&mut self) {
        let unix_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        if unix_s != self.unix_s {
            self.unix_s = unix_s;
            self.apply(Input::WallClock(unix_s));
        }
    }

    fn tick(&mut self) {
        self.tell_date();
        self.apply(Input::Tick);
        self.tick_models();
        self.tick_access();
        if self.now().since(self.last_snapshot_at) >= SNAPSHOT_INTERVAL_MS {
            self.snapshot_due = true;
        }
        if self.now().since(self.last_beat_at) >= SCHEDULER_BEAT_MS / 2 {
            self.last_beat_at = self.now();
            let beat = encode(&FromScheduler::Beat);
            self.tell_all_gateways(&beat);
            let beat = encode(&ToNode::Beat);
            let nodes: Vec<NodeConnection> = self.nodes.keys().copied().collect();
            nodes.into_iter().for_each(|node| self.tell_node(node, beat.clone()));
        }
    }

    fn node(&mut self, arrival: NodeArrival) {
        match arrival {
            Arrival::Opened(connection, peer) => {
                self.nodes.insert(connection, peer);
            }
            Arrival::Closed(connection, reason) => {
                self.nodes.remove(&connection);
                self.node_closed(connection, reason);
            }
            Arrival::Message(connection, message) => match message {
                FromNode::Join(join) => {
                    tracing::info!(node = %join.node, address = %join.data_address, memory = %join.memory, "joined");
                    self.joins(connection, join);
                }
                message => self.node_says(connection, message),
            },
        }
    }

    fn gateway(&mut self, arrival: GatewayArrival) {
        match arrival {
            Arrival::Opened(gateway, peer) => {
                peer.send(encode(&self.access.told()));
                let models = self.models_view();
                if models != ModelsView::default() {
                    peer.send(encode(&FromScheduler::Models(Box::new(models))));
                }
                let snapshot = self.watched(&self.director);
                peer.send(encode(&FromScheduler::Cluster(Box::new(snapshot))));
                self.gateways.insert(gateway, peer);
                self.apply(Input::GatewayOpened(gateway));
                tracing::info!(%gateway, "gateway connected");
            }
            Arrival::Closed(gateway, reason) => {
                tracing::info!(%gateway, %reason, "gateway disconnected");
                self.drop_gateway(gateway);
            }
            Arrival::Message(gateway, mut message) => {
                match &mut message {
                    ToScheduler::Submit(submit) if !self.lets_in(gateway, submit) => return,
                    ToScheduler::Submit(submit) => self.spans.open(gateway, submit),
                    ToScheduler::Cancel(id) => self.spans.cancelled(*id),
                    ToScheduler::Admin { .. }
                    | ToScheduler::Prepared { .. }
                    | ToScheduler::Compared { .. }
                    | ToScheduler::Refused { .. } => {}
                }
                self.gateway_says(gateway, message);
            }
        }
    }

    fn adapter_written(&mut self, written: Written) {
        self.performers.adapters.note(&written);
        self.apply(Input::AdapterPersisted(written.name, written.outcome));
    }

    fn response_written(&mut self, written: &Written) {
        self.performers.responses.note(written);
        if let Ok(id) = u128::from_str_radix(&written.name, 16) {
            self.apply(Input::ResponsePersisted(RequestId(id), written.outcome.clone()));
        }
    }

    fn drop_gateway(&mut self, gateway: GatewayId) {
        self.gateways.remove(&gateway);
        self.spans.gateway_gone(gateway);
        self.gateway_gone(gateway);
    }

    /// Performs until the director wants nothing more.
    fn perform(&mut self) {
        loop {
            self.plan();
            if self.outputs.is_empty() {
                break;
            }
            for output in std::mem::take(&mut self.outputs) {
                self.perform_one(output);
            }
        }
        if self.snapshot_due {
            self.send_snapshot();
        }
    }

    fn perform_one(&mut self, output: Output) {
        match output {
            Output::ToNodes(connections, message) => {
                log_assignment(&message);
                let frame = encode(&message);
                connections.into_iter().for_each(|connection| self.tell_node(connection, frame.clone()));
            }
            Output::CloseNode(connection, reason) => {
                tracing::warn!(%reason, "closing a node's connection");
                self.forget_node(connection);
                if let Some(peer) = self.nodes.remove(&connection) {
                    // Where it does not read any more, it learns nothing.
                    let _ = peer.send(encode(&ToNode::Closing(reason)));
                }
            }
            Output::ToGateway(gateway, message) => self.tell_gateway(gateway, &message),
            Output::Jobs(effect) => self.perform_for_jobs(*effect),
            Output::Up(up) => {
                tracing::info!(replica = %up.replica, revision = %up.revision, "replica is up");
                self.snapshot_due = true;
            }
            Output::Down(replica, reason) => {
                tracing::warn!(%replica, %reason, "replica is down");
                self.snapshot_due = true;
            }
            Output::Problem(problem) => {
                if let Some(problem) = problem {
                    tracing::warn!(%problem, "nothing can be served");
                }
                self.snapshot_due = true;
            }
            Output::Quarantined(node, reason) => {
                tracing::warn!(%node, %reason, "others are to take its place");
                self.snapshot_due = true;
            }
            Output::Differ(finding) => {
                tracing::error!("an audit has found other bits: {finding}");
                self.snapshot_due = true;
            }
            Output::PersistAdapter(name, record) => {
                match record.as_ref().and_then(|record| record.generations.last()) {
                    Some(view) => {
                        tracing::info!(%name, generation = view.generation, adapter = %view.adapter, "serving an adapter");
                    }
                    None => tracing::info!(%name, "unloading an adapter"),
                }
                self.performers.adapters.write(name, record);
            }
            Output::PersistResponse(id, record) => self.performers.responses.write(id.to_string(), record),
            Output::Snapshot => self.send_snapshot(),
            Output::Fenced(by) => self.fenced = Some(by),
        }
    }

    fn perform_for_jobs(&mut self, effect: jobs::Effect) {
        use jobs::Effect as E;
        match effect {
            E::Warn(what) => tracing::warn!("{what}"),
            E::Note(what) => tracing::info!("{what}"),
            E::Sweep(_) => {
                // Another one follows.
                let _ = self.performers.keeper.give(effect);
            }
            E::DeleteBlobs { job, ref blobs } => {
                let blobs = blobs.clone();
                if !self.performers.keeper.give(effect) {
                    // They are swept later.
                    self.apply(Input::Jobs(Box::new(jobs::Event::BlobsDeleted { job, blobs })));
                }
            }
            E::WriteResults { job, .. } => {
                if !self.performers.keeper.give(effect) {
                    let outcome = Err("too much else is being written".to_owned());
                    self.apply(Input::Jobs(Box::new(jobs::Event::ResultsWritten { job, outcome })));
                }
            }
            E::SaveFile(_)
            | E::ForgetFile(_)
            | E::SaveJob { .. }
            | E::ForgetJob { .. }
            | E::ReadEvents { .. } => {
                if !self.performers.archive.give(effect) {
                    tracing::error!("the archive does not follow: leading anew from what is stored");
                    self.superseded = true;
                }
            }
            // The director has dealt with these.
            E::Reply { .. } | E::Prepare { .. } | E::ToNodes(..) | E::Publish(_) | E::Withdraw(_) => {}
            E::StoreCandidate { .. } | E::Compare { .. } | E::Promote { .. } => {}
        }
    }

    fn tell_node(&mut self, connection: NodeConnection, frame: Frame) {
        let sent = self.nodes.get(&connection).is_some_and(|peer| peer.send(frame));
        if !sent && self.nodes.remove(&connection).is_some() {
            let reason = "it does not read what it is sent".to_owned();
            self.node_closed(connection, reason);
        }
    }

    pub(super) fn tell_gateway(&mut self, gateway: GatewayId, message: &FromScheduler) {
        self.spans.observe(message);
        let Some(peer) = self.gateways.get(&gateway) else { return };
        if !peer.send(encode(message)) {
            tracing::warn!(%gateway, "the gateway does not read what it is sent: closing its connection");
            self.drop_gateway(gateway);
        }
    }

    /// A model's cluster as gateways watch it.
    pub(super) fn watched(&self, director: &Director) -> ClusterSnapshot {
        ClusterSnapshot {
            gateways: self.gateways.len() as u32,
            requests: director.engine().requests(self.now(), REQUESTS_SHOWN),
            ..director.snapshot()
        }
    }

    fn send_snapshot(&mut self) {
        self.snapshot_due = false;
        self.last_snapshot_at = self.now();
        self.send_models();
        let snapshot = self.watched(&self.director);
        if self.last_snapshot.as_ref() == Some(&snapshot) {
            return;
        }
        let frame = encode(&FromScheduler::Cluster(Box::new(snapshot.clone())));
        self.last_snapshot = Some(snapshot);
        self.tell_all_gateways(&frame);
    }

    pub(super) fn tell_all_gateways(&mut self, frame: &Frame) {
        let slow: Vec<GatewayId> = self
            .gateways
            .iter()
            .filter(|(_, peer)| !peer.send(frame.clone()))
            .map(|(gateway, _)| *gateway)
            .collect();
        slow.into_iter().for_each(|gateway| self.drop_gateway(gateway));
    }
}

fn log_assignment(message: &ToNode) {
    if let ToNode::Assign(assignment) = message {
        tracing::info!(
            replica = %assignment.replica, revision = %assignment.revision, stage = %assignment.stage,
            rank = %assignment.tensor_rank, layers = %assignment.layers, kv_blocks = assignment.kv_blocks,
            "assigning"
        );
    }
}

pub(super) fn encode<M: serde::Serialize>(message: &M) -> Frame {
    frame::encode(message).into()
}
