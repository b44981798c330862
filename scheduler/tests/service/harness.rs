//! A scheduler, and what nodes and gateways say to it.

use crate::rank::Rank;
use ashlar_protocol::access::KeyRecord;
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::{Assignment, FromNode, Join, ToNode};
use ashlar_protocol::models::ModelsView;
use ashlar_protocol::serving::{
    ChoiceId, ClusterSnapshot, FromScheduler, RequestFailure, Submit, ToScheduler,
};
use ashlar_protocol::step::{StepPlan, StepTiming};
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_vocabulary::{Bytes, LeaseTerm, ModelDigest, NodeId, RequestId, SamplingParams, TokenId};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

const LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// On ports that are free, with its state there.
pub(crate) fn config(state: &Path) -> SchedulerConfig {
    SchedulerConfig {
        listen_nodes: "127.0.0.1:0".into(),
        listen_gateways: "127.0.0.1:0".into(),
        store: format!("redb:{}", state.join("scheduler.redb").display()),
        replicas: Some(1),
        ..SchedulerConfig::new("demo")
    }
}

/// A scheduler that runs.
pub(crate) struct Running {
    pub(crate) nodes: SocketAddr,
    pub(crate) gateways: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
}

impl Running {
    pub(crate) fn start(scheduler: Scheduler) -> Running {
        let (nodes, gateways) = (scheduler.nodes_address().unwrap(), scheduler.gateways_address().unwrap());
        let (stop, stopped) = oneshot::channel();
        let ended = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            scheduler.run(shutdown).await.unwrap();
        });
        Running { nodes, gateways, stop: Some(stop), ended }
    }

    /// Asks it to end.
    pub(crate) fn ask_to_end(&mut self) {
        drop(self.stop.take());
    }

    /// Asks it to end, and waits for that; where it was.
    pub(crate) async fn stop(mut self) -> (SocketAddr, SocketAddr) {
        self.ask_to_end();
        self.ended.await.unwrap();
        (self.nodes, self.gateways)
    }
}

pub(crate) struct AbortOnDrop(pub(crate) JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How a node introduces itself.
pub(crate) fn join(name: &str, term: u64) -> FromNode {
    FromNode::Join(Box::new(Join {
        node: NodeId(name.to_owned()),
        data_address: format!("{name}:1"),
        memory: Bytes(1 << 30),
        bandwidth_bytes_per_s: 1e10,
        flops_per_s: 1e11,
        quantized_flops_per_s: 1e11,
        threads: 1,
        isa: "portable".into(),
        layers: None,
        holds: None,
        term: LeaseTerm(term),
        crashed: None,
        leaving: false,
    }))
}

/// A node's connection, greeted: a scheduler that does not lead yet closes it, and is tried again.
pub(crate) async fn knock(name: &str, address: SocketAddr) -> Result<TcpStream, FrameError> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let mut socket = TcpStream::connect(address).await?;
        match frame::greet(&mut socket, &format!("node {name}")).await {
            Ok(_) => return Ok(socket),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// A node's life until its connection ends: it joins, beats, and says what `answer` makes of each message, after so long.
pub(crate) async fn live(
    mut socket: TcpStream,
    join: FromNode,
    mut answer: impl FnMut(ToNode) -> Option<(Duration, FromNode)>,
) -> Result<(), FrameError> {
    frame::write(&mut socket, &join).await?;
    let (mut read, mut write) = socket.into_split();
    let (deliver, mut messages) = mpsc::channel::<ToNode>(64);
    // Reading must not be interrupted in the middle of a message.
    let _reader = AbortOnDrop(tokio::spawn(async move {
        while let Ok(message) = frame::read(&mut read).await {
            if deliver.send(message).await.is_err() {
                return;
            }
        }
    }));
    let mut beats = tokio::time::interval(Duration::from_millis(200));
    loop {
        let said = tokio::select! {
            _ = beats.tick() => Some((Duration::ZERO, FromNode::Beat)),
            message = messages.recv() => match message {
                None | Some(ToNode::Closing(_)) => return Ok(()),
                Some(message) => answer(message),
            },
        };
        if let Some((after, message)) = said {
            tokio::time::sleep(after).await;
            frame::write(&mut write, &message).await?;
        }
    }
}

pub(crate) fn ready(assignment: &Assignment) -> FromNode {
    let revision = assignment.revision;
    FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(2), kept: Vec::new(), logged: false }
}

/// What a rank says of a step.
pub(crate) fn executed(assignment: &Assignment, rank: &mut Rank, plan: &StepPlan) -> FromNode {
    let result = rank.execute(plan);
    if assignment.stage.0 + 1 == assignment.num_stages {
        return FromNode::StepResult(result);
    }
    let timing = StepTiming { compute_us: 100, ..StepTiming::default() };
    FromNode::StepDone { revision: plan.revision, step: plan.step, timing }
}

/// A gateway's connection, and what it has been told last.
pub(crate) struct Gateway {
    pub(crate) socket: TcpStream,
    pub(crate) cluster: ClusterSnapshot,
    pub(crate) models: ModelsView,
    pub(crate) keys: Vec<KeyRecord>,
    calls: u64,
}

impl Gateway {
    pub(crate) async fn connect(address: SocketAddr) -> Gateway {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Ok(gateway) = Gateway::try_connect(address).await {
                return gateway;
            }
            assert!(Instant::now() < deadline, "the scheduler accepts no gateway");
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn try_connect(address: SocketAddr) -> Result<Gateway, FrameError> {
        let mut socket = TcpStream::connect(address).await?;
        frame::greet(&mut socket, "gateway").await?;
        let (mut models, mut keys) = (ModelsView::default(), Vec::new());
        loop {
            match frame::read(&mut socket).await? {
                FromScheduler::Cluster(cluster) => {
                    return Ok(Gateway { socket, cluster: *cluster, models, keys, calls: 0 });
                }
                FromScheduler::Models(told) => models = *told,
                FromScheduler::Keys(told) => keys = told,
                other => panic!("the cluster comes first, not {other:?}"),
            }
        }
    }

    pub(crate) async fn say(&mut self, message: ToScheduler) {
        frame::write(&mut self.socket, &message).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> FromScheduler {
        let read = tokio::time::timeout(2 * LIMIT, frame::read(&mut self.socket));
        let message: FromScheduler = read.await.expect("the scheduler says something").unwrap();
        match &message {
            FromScheduler::Cluster(cluster) => self.cluster = (**cluster).clone(),
            FromScheduler::Models(models) => self.models = (**models).clone(),
            FromScheduler::Keys(keys) => self.keys.clone_from(keys),
            _ => {}
        }
        message
    }

    pub(crate) async fn until(&mut self, reached: impl Fn(&Gateway) -> bool) {
        while !reached(self) {
            self.next().await;
        }
    }

    pub(crate) async fn until_ready(&mut self) {
        self.until(|gateway| serves(&gateway.cluster)).await;
    }

    /// Sends a choice of so many tokens after the [`prompt`], with its number as its seed.
    pub(crate) async fn submit(&mut self, number: u128, model_digest: ModelDigest, tokens: u32) -> ChoiceId {
        let id = ChoiceId { request: RequestId(number), choice: 0 };
        let submit = Submit {
            adapter: None,
            id,
            model_digest,
            prompt: prompt(),
            forced: vec![],
            max_new_tokens: tokens,
            stop_tokens: vec![],
            sampling: SamplingParams { seed: number as u64, ..SamplingParams::default() },
            tenant_salt: 0,
            charge: None,
            priority: 0,
            deadline_ms: 0,
            forced_logprobs: Vec::new(),
            kept: false,
            traceparent: None,
        };
        self.say(ToScheduler::Submit(Box::new(submit))).await;
        id
    }

    /// The tokens of a choice until its end.
    pub(crate) async fn collect(&mut self, id: ChoiceId) -> Result<Vec<TokenId>, RequestFailure> {
        let mut tokens = Vec::new();
        loop {
            match self.next().await {
                FromScheduler::Token(event) if event.id == id => {
                    assert_eq!(event.index as usize, tokens.len());
                    tokens.push(event.token);
                }
                FromScheduler::Finished { id: ended, .. } if ended == id => return Ok(tokens),
                FromScheduler::Failed { id: ended, error } if ended == id => return Err(error),
                _ => {}
            }
        }
    }

    /// The answer to an administrator's call; what else is said meanwhile goes to `hear`, whose answer is sent.
    pub(crate) async fn call_hearing(
        &mut self,
        request: AdminRequest,
        hear: impl Fn(FromScheduler) -> Option<ToScheduler>,
    ) -> AdminReply {
        self.calls += 1;
        let call = self.calls;
        self.say(ToScheduler::Admin { call, tenant: None, request: Box::new(request) }).await;
        loop {
            match self.next().await {
                FromScheduler::Admin { call: answered, reply } if answered == call => return *reply,
                other => {
                    if let Some(answer) = hear(other) {
                        self.say(answer).await;
                    }
                }
            }
        }
    }

    pub(crate) async fn call(&mut self, request: AdminRequest) -> AdminReply {
        self.call_hearing(request, |_| None).await
    }
}

pub(crate) fn serves(cluster: &ClusterSnapshot) -> bool {
    cluster.replicas.iter().any(|replica| replica.ready)
}

pub(crate) fn prompt() -> Vec<TokenId> {
    (0..40).collect()
}
