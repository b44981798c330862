//! Several models over real sockets: nodes come again and go to where they belong, and one gateway is served by all.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[allow(dead_code, reason = "shared with the engine's tests")]
#[path = "engine/rank.rs"]
mod rank;

use ashlar_protocol::admin::{AdminFailureKind, AdminReply, AdminRequest};
use ashlar_protocol::frame;
use ashlar_protocol::membership::{Assignment, FromNode, Join, ToNode};
use ashlar_protocol::models::{DeployModel, ModelStatus, ModelsView};
use ashlar_protocol::serving::{
    ChoiceId, ClusterSnapshot, FailureKind, FromScheduler, RequestFailure, Submit, ToScheduler,
};
use ashlar_protocol::step::StepTiming;
use ashlar_scheduler::{ModelCard, Scheduler, SchedulerConfig};
use ashlar_vocabulary::{
    Bytes, FloatType, LayerVectors, LeaseTerm, ModelDigest, ModelShape, NodeId, Precision, RequestId,
    SamplingParams, TokenId, WeightType, WeightTypes,
};
use rank::{Rank, oracle};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const OWN: ModelDigest = ModelDigest([1; 32]);
const OTHER: ModelDigest = ModelDigest([2; 32]);

fn card(source: &str, digest: ModelDigest) -> ModelCard {
    let shape = ModelShape {
        hidden_size: 64,
        intermediate_size: 256,
        num_layers: 8,
        num_heads: 8,
        num_kv_heads: 8,
        head_dim: 8,
        vocab_size: 1024,
        max_position_embeddings: 512,
        tied_head: true,
        weights: WeightTypes::uniform(WeightType::F32, 8),
        kv_cache: FloatType::F32,
        activations: FloatType::F32,
        vectors: LayerVectors::default(),
    };
    let precision = Precision::default();
    ModelCard { source: source.into(), precision, digest, shape, max_context_tokens: 512 }
}

struct Running {
    nodes: SocketAddr,
    gateways: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
}

/// A scheduler at these addresses, whose opener knows one model.
async fn start(state: &Path, at: Option<(SocketAddr, SocketAddr)>) -> Running {
    let address = |known: Option<SocketAddr>| known.map_or("127.0.0.1:0".to_owned(), |at| at.to_string());
    let config = SchedulerConfig {
        listen_nodes: address(at.map(|at| at.0)),
        listen_gateways: address(at.map(|at| at.1)),
        store: format!("redb:{}", state.join("scheduler.redb").display()),
        stages: Some(2),
        replicas: Some(1),
        drain_grace_ms: 1000,
        ..SchedulerConfig::new("own")
    };
    let opener = |wish: &DeployModel| match wish.model.as_str() {
        "other" => Ok(card("other", OTHER)),
        _ => Err("no config.json is there".to_owned()),
    };
    // The process before may not have let go of its ports yet.
    let deadline = Instant::now() + Duration::from_secs(10);
    let scheduler = loop {
        match Scheduler::bind(config.clone(), card("own", OWN)).await {
            Ok(scheduler) => break scheduler.opening(Arc::new(opener)),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
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

impl Running {
    async fn stop(mut self) -> (SocketAddr, SocketAddr) {
        drop(self.stop.take());
        self.ended.await.unwrap();
        (self.nodes, self.gateways)
    }
}

/// What nodes have been assigned, in order.
type Assigned = Arc<Mutex<Vec<(String, Box<Assignment>)>>>;

/// A node that comes again whenever its connection is closed.
fn node(name: &str, address: SocketAddr, assigned: &Assigned) -> AbortOnDrop {
    let (name, assigned) = (name.to_owned(), assigned.clone());
    AbortOnDrop(tokio::spawn(async move {
        loop {
            let _ = membership(&name, address, &assigned).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }))
}

async fn membership(name: &str, address: SocketAddr, assigned: &Assigned) -> Result<(), frame::FrameError> {
    let mut socket = TcpStream::connect(address).await?;
    frame::greet(&mut socket, &format!("node {name}")).await?;
    let join = Join {
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
        term: LeaseTerm(0),
        crashed: None,
        leaving: false,
    };
    frame::write(&mut socket, &FromNode::Join(Box::new(join))).await?;
    let (mut read, mut write) = socket.into_split();
    let (deliver, mut messages) = tokio::sync::mpsc::channel::<ToNode>(64);
    let _reader = AbortOnDrop(tokio::spawn(async move {
        while let Ok(message) = frame::read(&mut read).await {
            if deliver.send(message).await.is_err() {
                return;
            }
        }
    }));
    let mut place: Option<(Box<Assignment>, Rank)> = None;
    let mut beats = tokio::time::interval(Duration::from_millis(200));
    loop {
        let message = tokio::select! {
            _ = beats.tick() => FromNode::Beat,
            message = messages.recv() => match message {
                None | Some(ToNode::Closing(_)) => return Ok(()),
                Some(ToNode::Assign(assignment)) => {
                    let revision = assignment.revision;
                    assigned.lock().unwrap().push((name.to_owned(), assignment.clone()));
                    place = Some((assignment, Rank::default()));
                    FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(2), kept: Vec::new() }
                }
                Some(ToNode::Prepare(Some(order))) => {
                    FromNode::Prepared { revision: order.revision, outcome: Ok(()) }
                }
                Some(ToNode::Step(plan)) => {
                    let Some((assignment, rank)) = &mut place else { continue };
                    let result = rank.execute(&plan);
                    match assignment.stage.0 + 1 == assignment.num_stages {
                        true => FromNode::StepResult(result),
                        false => FromNode::StepDone {
                            revision: plan.revision,
                            step: plan.step,
                            timing: StepTiming { compute_us: 100, ..StepTiming::default() },
                        },
                    }
                }
                Some(_) => continue,
            },
        };
        frame::write(&mut write, &message).await?;
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Gateway {
    socket: TcpStream,
    cluster: Option<ClusterSnapshot>,
    models: ModelsView,
}

impl Gateway {
    async fn connect(address: SocketAddr) -> Gateway {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Ok(gateway) = Gateway::try_connect(address).await {
                return gateway;
            }
            assert!(Instant::now() < deadline, "the scheduler accepts no gateway");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn try_connect(address: SocketAddr) -> Result<Gateway, frame::FrameError> {
        let mut socket = TcpStream::connect(address).await?;
        frame::greet(&mut socket, "gateway").await?;
        let mut gateway = Gateway { socket, cluster: None, models: ModelsView::default() };
        while gateway.cluster.is_none() {
            match frame::read(&mut gateway.socket).await? {
                FromScheduler::Cluster(cluster) => gateway.cluster = Some(*cluster),
                FromScheduler::Models(models) => gateway.models = *models,
                other => panic!("the cluster comes first, not {other:?}"),
            }
        }
        Ok(gateway)
    }

    async fn next(&mut self) -> FromScheduler {
        let read = tokio::time::timeout(Duration::from_secs(20), frame::read(&mut self.socket));
        let message: FromScheduler = read.await.expect("the scheduler says something").unwrap();
        match &message {
            FromScheduler::Cluster(cluster) => self.cluster = Some((**cluster).clone()),
            FromScheduler::Models(models) => self.models = (**models).clone(),
            _ => {}
        }
        message
    }

    async fn until(&mut self, reached: impl Fn(&ClusterSnapshot, &ModelsView) -> bool) {
        while !self.cluster.as_ref().is_some_and(|cluster| reached(cluster, &self.models)) {
            self.next().await;
        }
    }

    async fn call(&mut self, call: u64, request: AdminRequest) -> AdminReply {
        let request = Box::new(request);
        frame::write(&mut self.socket, &ToScheduler::Admin { call, request }).await.unwrap();
        loop {
            if let FromScheduler::Admin { call: answered, reply } = self.next().await
                && answered == call
            {
                return *reply;
            }
        }
    }

    async fn ask(&mut self, number: u128, model_digest: ModelDigest) -> Result<Vec<TokenId>, RequestFailure> {
        let id = ChoiceId { request: RequestId(number), choice: 0 };
        let submit = Submit {
            adapter: None,
            id,
            model_digest,
            prompt: (0..40).collect(),
            forced: vec![],
            max_new_tokens: 20,
            stop_tokens: vec![],
            sampling: SamplingParams { seed: number as u64, ..SamplingParams::default() },
            tenant_salt: 0,
            priority: 0,
            deadline_ms: 0,
            forced_logprobs: Vec::new(),
            kept: false,
            traceparent: None,
        };
        frame::write(&mut self.socket, &ToScheduler::Submit(Box::new(submit))).await.unwrap();
        let mut tokens = Vec::new();
        loop {
            match self.next().await {
                FromScheduler::Token(event) if event.id == id => tokens.push(event.token),
                FromScheduler::Finished { id: ended, .. } if ended == id => return Ok(tokens),
                FromScheduler::Failed { id: ended, error } if ended == id => return Err(error),
                _ => {}
            }
        }
    }
}

fn other(name: &str, model: &str) -> AdminRequest {
    AdminRequest::DeployModel(Box::new(DeployModel {
        name: name.into(),
        model: model.into(),
        nodes: 1,
        stages: None,
        tensor_parallel_size: None,
        replicas: None,
        quantize: None,
        max_context_tokens: None,
    }))
}

fn serves(cluster: &ClusterSnapshot) -> bool {
    cluster.replicas.iter().any(|replica| replica.ready)
}

fn is_serving(models: &ModelsView) -> bool {
    models
        .deployed
        .first()
        .is_some_and(|model| model.status == ModelStatus::Serving && serves(&model.cluster))
}

#[tokio::test]
async fn a_deployed_model_has_its_own_node_and_answers_over_the_same_connection() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), None).await;
    let assigned = Assigned::default();
    let _nodes = ["a", "b", "c"].map(|name| node(name, running.nodes, &assigned));
    let mut gateway = Gateway::connect(running.gateways).await;
    assert_eq!(gateway.models, ModelsView::default());
    gateway.until(|cluster, _| serves(cluster) && cluster.nodes.len() == 3).await;

    let refused = gateway.call(1, other("nowhere", "nowhere")).await;
    assert!(matches!(refused, AdminReply::Refused(failure) if failure.kind == AdminFailureKind::Invalid));
    let unknown = gateway.ask(1, OTHER).await.unwrap_err();
    assert_eq!(unknown.kind, FailureKind::UnknownModel);

    let AdminReply::Model(view) = gateway.call(2, other("other", "other")).await else { panic!("deployed") };
    assert_eq!((view.request.name.as_str(), view.status), ("other", ModelStatus::Loading));
    gateway.until(|cluster, models| is_serving(models) && cluster.nodes.len() == 2).await;
    assert_eq!(gateway.models.deployed[0].cluster.model_digest, OTHER);
    assert_eq!(gateway.ask(2, OTHER).await.unwrap(), oracle(&(0..40).collect::<Vec<_>>(), 2, 20));
    assert_eq!(gateway.ask(3, OWN).await.unwrap(), oracle(&(0..40).collect::<Vec<_>>(), 3, 20));
    {
        let assigned = assigned.lock().unwrap();
        let (last, earlier) = assigned.split_last().unwrap();
        assert_eq!((last.1.model_digest, last.1.term), (OTHER, LeaseTerm(1)));
        assert!(earlier.iter().all(|(name, earlier)| {
            *name != last.0 && earlier.model_digest == OWN && earlier.revision < last.1.revision
        }));
    }

    // Another term finds it, and its node.
    let member = gateway.models.deployed[0].members.clone();
    let at = running.stop().await;
    let running = start(state.path(), Some(at)).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    assert_eq!(gateway.models.deployed[0].members, member);
    gateway.until(|cluster, models| serves(cluster) && is_serving(models)).await;
    assert_eq!(gateway.ask(4, OTHER).await.unwrap(), oracle(&(0..40).collect::<Vec<_>>(), 4, 20));

    // Removed, its node stands by again, and nobody knows it.
    let removed = gateway.call(3, AdminRequest::RemoveModel { name: "other".into() }).await;
    match removed {
        AdminReply::Model(view) => assert_eq!(view.status, ModelStatus::Removing),
        // It was gone at once.
        other => assert_eq!(other, AdminReply::Done),
    }
    let late = gateway.ask(5, OTHER).await.unwrap_err();
    assert_eq!(late.kind, FailureKind::UnknownModel);
    gateway.until(|cluster, models| models.deployed.is_empty() && cluster.nodes.len() == 3).await;
    assert_eq!(gateway.ask(6, OWN).await.unwrap(), oracle(&(0..40).collect::<Vec<_>>(), 6, 20));
    running.stop().await;
}
