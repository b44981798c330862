//! The owner of all state while this process leads: select, let the cores handle, perform what they want done.

use super::connection::{Arrival, Frame, GatewayArrival, NodeArrival, Peer};
use super::spans::Spans;
use crate::cluster::{self, Cluster, ClusterConfig, NodeConnection, TICK_MS};
use crate::engine::{self, Engine, EngineConfig, GatewayId};
use crate::time::Millis;
use ashlar_protocol::frame;
use ashlar_protocol::membership::{FromNode, ToNode};
use ashlar_protocol::serving::{ClusterSnapshot, FromScheduler, ToScheduler};
use ashlar_service_kit::{Clock, SystemClock};
use ashlar_vocabulary::{LeaseTerm, ReplicaId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;

/// Events handled together before the next steps are planned.
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

/// Where events come from.
pub(super) struct Sources {
    pub(super) nodes: mpsc::Receiver<NodeArrival>,
    pub(super) gateways: mpsc::Receiver<GatewayArrival>,
}

/// The cores and their connections.
pub(super) struct Leader {
    clock: SystemClock,
    cluster: Cluster,
    engine: Engine,
    nodes: BTreeMap<NodeConnection, Peer>,
    gateways: BTreeMap<GatewayId, Peer>,
    cluster_effects: Vec<cluster::Effect>,
    engine_effects: Vec<engine::Effect>,
    spans: Spans,
    fenced: Option<LeaseTerm>,
    last_snapshot: Option<ClusterSnapshot>,
    last_snapshot_at: Millis,
    snapshot_due: bool,
}

impl Leader {
    pub(super) fn new(cluster: ClusterConfig, engine: EngineConfig) -> Leader {
        Leader {
            clock: SystemClock::new(),
            cluster: Cluster::new(cluster),
            engine: Engine::new(engine),
            nodes: BTreeMap::new(),
            gateways: BTreeMap::new(),
            cluster_effects: Vec::new(),
            engine_effects: Vec::new(),
            spans: Spans::default(),
            fenced: None,
            last_snapshot: None,
            last_snapshot_at: Millis(0),
            snapshot_due: false,
        }
    }

    /// Leads until the process shall end, the lease is lost, or a node obeys a higher term.
    pub(super) async fn lead(
        mut self,
        mut sources: Sources,
        lease_lost: impl Future<Output = ()>,
        shutdown: impl Future<Output = ()>,
        drain_grace: Duration,
    ) -> Ended {
        let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tokio::pin!(lease_lost, shutdown);
        let mut drain_until: Option<Millis> = None;
        loop {
            // In order of urgency; the tick first, so that a flood of messages cannot hold up deadlines.
            tokio::select! {
                biased;
                _ = ticks.tick() => self.tick(),
                Some(arrival) = sources.nodes.recv() => self.node(arrival),
                Some(arrival) = sources.gateways.recv() => self.gateway(arrival),
                () = &mut lease_lost => {
                    // A shutdown that has begun is not begun again under another term.
                    let ended = if drain_until.is_some() { Ended::Drained } else { Ended::LeaseLost };
                    return self.end(ended).await;
                }
                () = &mut shutdown, if drain_until.is_none() => {
                    drain_until = Some(self.now().plus(drain_grace.as_millis() as u64));
                    self.engine_event(engine::Event::Drain);
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
            self.engine.plan(self.now(), &mut self.engine_effects);
            self.perform();
            if let Some(term) = self.fenced.filter(|_| drain_until.is_none()) {
                return self.end(Ended::Fenced(term)).await;
            }
            if drain_until.is_some_and(|until| self.engine.is_idle() || until <= self.now()) {
                return self.end(Ended::Drained).await;
            }
        }
    }

    /// Ends what is in progress, says so, and closes every connection.
    async fn end(mut self, ended: Ended) -> Ended {
        let reason = match ended {
            Ended::Drained => "the scheduler is shutting down",
            Ended::LeaseLost | Ended::Fenced(_) => "another scheduler leads",
        };
        self.engine_event(engine::Event::Abort { reason: format!("{reason}: try again shortly") });
        self.perform();
        let peers = self.nodes.into_values().chain(self.gateways.into_values());
        for peer in peers {
            peer.close().await;
        }
        ended
    }

    fn now(&self) -> Millis {
        Millis(self.clock.now().0)
    }

    fn engine_event(&mut self, event: engine::Event) {
        self.engine.apply(self.now(), event, &mut self.engine_effects);
    }

    fn cluster_event(&mut self, event: cluster::Event) {
        self.cluster.handle(self.now(), event, &mut self.cluster_effects);
        self.perform_cluster();
    }

    fn tick(&mut self) {
        self.engine_event(engine::Event::Tick);
        let slowest_step_ms = self.engine.slowest_step_ms();
        self.cluster_event(cluster::Event::Tick { slowest_step_ms });
        if self.now().since(self.last_snapshot_at) >= SNAPSHOT_INTERVAL_MS {
            self.snapshot_due = true;
        }
    }

    fn node(&mut self, arrival: NodeArrival) {
        use cluster::Event;
        let (connection, message) = match arrival {
            Arrival::Opened(connection, peer) => {
                self.nodes.insert(connection, peer);
                return;
            }
            Arrival::Closed(connection, reason) => {
                self.nodes.remove(&connection);
                return self.cluster_event(Event::Lost { connection, reason });
            }
            Arrival::Message(connection, message) => (connection, message),
        };
        let event = match message {
            FromNode::Join(join) => {
                tracing::info!(node = %join.node, address = %join.data_address, memory = %join.memory, "joined");
                Event::Join { connection, join: Box::new(join) }
            }
            FromNode::Refused { revision: _, term } => Event::Refused { connection, term },
            FromNode::Loading { revision, loaded, total } => {
                Event::Loading { connection, revision, loaded, total }
            }
            FromNode::Ready { revision, reserved, resident } => {
                Event::Ready { connection, revision, reserved, resident }
            }
            FromNode::Failed { revision, message } => Event::Failed { connection, revision, message },
            FromNode::Beat => Event::Heard { connection, timing: None },
            FromNode::Leaving => Event::Lost { connection, reason: "it is shutting down".to_owned() },
            FromNode::StepResult(result) => {
                let timing = Some(result.timing);
                if let Some((replica, _)) = self.cluster.place_of(connection) {
                    self.engine_event(engine::Event::StepResult { replica, result });
                }
                Event::Heard { connection, timing }
            }
            FromNode::StepDone { revision, step, timing } => {
                if let Some((replica, stage)) = self.cluster.place_of(connection) {
                    self.engine_event(engine::Event::StepDone { replica, revision, stage, step, timing });
                }
                Event::Heard { connection, timing: Some(timing) }
            }
        };
        self.cluster_event(event);
    }

    fn gateway(&mut self, arrival: GatewayArrival) {
        match arrival {
            Arrival::Opened(gateway, peer) => {
                let snapshot = self.cluster.snapshot(&self.engine);
                peer.send(encode(&FromScheduler::Cluster(Box::new(snapshot))));
                self.gateways.insert(gateway, peer);
                tracing::info!(%gateway, "gateway connected");
            }
            Arrival::Closed(gateway, reason) => {
                tracing::info!(%gateway, %reason, "gateway disconnected");
                self.drop_gateway(gateway);
            }
            Arrival::Message(gateway, ToScheduler::Submit(mut submit)) => {
                self.spans.open(gateway, &mut submit);
                self.engine_event(engine::Event::Submit { gateway, submit });
            }
            Arrival::Message(gateway, ToScheduler::Cancel(id)) => {
                self.spans.cancelled(id);
                self.engine_event(engine::Event::Cancel { gateway, id });
            }
        }
    }

    fn drop_gateway(&mut self, gateway: GatewayId) {
        self.gateways.remove(&gateway);
        self.spans.gateway_gone(gateway);
        self.engine_event(engine::Event::GatewayGone { gateway });
    }

    /// Performs until neither core wants anything more.
    fn perform(&mut self) {
        while !self.engine_effects.is_empty() {
            for effect in std::mem::take(&mut self.engine_effects) {
                match effect {
                    engine::Effect::SendStep { replica, plan } => {
                        self.broadcast(replica, &encode(&ToNode::Step(plan)));
                    }
                    engine::Effect::ToGateway { gateway, message } => self.tell_gateway(gateway, &message),
                    engine::Effect::ReplicaFault { replica, revision, reason } => {
                        self.cluster_event(cluster::Event::ReplicaFault { replica, revision, reason });
                    }
                }
            }
            self.engine.plan(self.now(), &mut self.engine_effects);
        }
        if self.snapshot_due {
            self.send_snapshot();
        }
    }

    fn perform_cluster(&mut self) {
        while !self.cluster_effects.is_empty() {
            for effect in std::mem::take(&mut self.cluster_effects) {
                match effect {
                    cluster::Effect::Assign { connection, assignment } => {
                        tracing::info!(
                            replica = %assignment.replica, revision = %assignment.revision,
                            stage = %assignment.stage, rank = %assignment.tensor_rank,
                            layers = %assignment.layers, kv_blocks = assignment.kv_blocks, "assigning"
                        );
                        self.tell_node(connection, encode(&ToNode::Assign(assignment)));
                    }
                    cluster::Effect::Release { connection, revision } => {
                        self.tell_node(connection, encode(&ToNode::Release { revision }));
                    }
                    cluster::Effect::Disconnect { connection, reason } => {
                        tracing::warn!(%reason, "closing a node's connection");
                        self.nodes.remove(&connection);
                    }
                    cluster::Effect::ReplicaUp(up) => {
                        tracing::info!(replica = %up.replica, revision = %up.revision, "replica is up");
                        self.snapshot_due = true;
                        self.engine_event(engine::Event::ReplicaUp(up));
                    }
                    cluster::Effect::ReplicaDown { replica, reason } => {
                        tracing::warn!(%replica, %reason, "replica is down");
                        self.snapshot_due = true;
                        self.engine_event(engine::Event::ReplicaDown { replica, reason });
                    }
                    cluster::Effect::Problem(problem) => {
                        if let Some(problem) = &problem {
                            tracing::warn!(%problem, "nothing can be served");
                        }
                        self.snapshot_due = true;
                        self.engine_event(engine::Event::Problem(problem));
                    }
                    cluster::Effect::Fenced { by } => self.fenced = Some(by),
                }
            }
        }
    }

    /// Sends to every rank; one that does not take it is lost.
    fn broadcast(&mut self, replica: ReplicaId, frame: &Frame) {
        for connection in self.cluster.connections_of(replica) {
            self.tell_node(connection, frame.clone());
        }
    }

    fn tell_node(&mut self, connection: NodeConnection, frame: Frame) {
        let sent = self.nodes.get(&connection).is_some_and(|peer| peer.send(frame));
        if !sent && self.nodes.remove(&connection).is_some() {
            let reason = "it does not read what it is sent".to_owned();
            self.cluster.handle(
                self.now(),
                cluster::Event::Lost { connection, reason },
                &mut self.cluster_effects,
            );
            self.perform_cluster();
        }
    }

    fn tell_gateway(&mut self, gateway: GatewayId, message: &FromScheduler) {
        self.spans.observe(message);
        let Some(peer) = self.gateways.get(&gateway) else { return };
        if !peer.send(encode(message)) {
            tracing::warn!(%gateway, "the gateway does not read what it is sent: closing its connection");
            self.drop_gateway(gateway);
        }
    }

    fn send_snapshot(&mut self) {
        self.snapshot_due = false;
        self.last_snapshot_at = self.now();
        let snapshot = self.cluster.snapshot(&self.engine);
        if self.last_snapshot.as_ref() == Some(&snapshot) {
            return;
        }
        let frame = encode(&FromScheduler::Cluster(Box::new(snapshot.clone())));
        self.last_snapshot = Some(snapshot);
        let slow: Vec<GatewayId> = self
            .gateways
            .iter()
            .filter(|(_, peer)| !peer.send(frame.clone()))
            .map(|(gateway, _)| *gateway)
            .collect();
        for gateway in slow {
            self.drop_gateway(gateway);
        }
    }
}

fn encode<M: serde::Serialize>(message: &M) -> Frame {
    frame::encode(message).into()
}
