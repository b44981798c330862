//! The shell over real sockets: nodes and gateways of our own, everything else as it runs.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod model;
#[allow(dead_code, reason = "shared with the engine's tests")]
#[path = "engine/rank.rs"]
mod rank;

use ashlar_protocol::frame;
use ashlar_protocol::membership::{Assignment, FromNode, Join, ToNode};
use ashlar_protocol::serving::{
    ChoiceId, ClusterSnapshot, FailureKind, FromScheduler, RequestFailure, Submit, ToScheduler,
};
use ashlar_protocol::step::StepTiming;
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_vocabulary::{Bytes, LeaseTerm, NodeId, RequestId, SamplingParams, TokenId};
use model::{DIGEST, card};
use rank::{Rank, oracle};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Running {
    nodes: SocketAddr,
    gateways: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: JoinHandle<()>,
}

async fn start(state: &Path) -> Running {
    let config = SchedulerConfig {
        listen_nodes: "127.0.0.1:0".into(),
        listen_gateways: "127.0.0.1:0".into(),
        store: format!("redb:{}", state.join("new/scheduler.redb").display()),
        stages: Some(2),
        replicas: Some(1),
        drain_grace_ms: 3000,
        repair_patience_ms: 3000,
        ..SchedulerConfig::new("demo")
    };
    let scheduler = Scheduler::bind(config, card()).await.unwrap();
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
    async fn stop(mut self) {
        drop(self.stop.take());
        self.ended.await.unwrap();
    }
}

/// A node that computes with a model rank. Dropping or aborting the task is its death.
fn node(name: &str, address: SocketAddr, term: u64, step_time: Duration) -> JoinHandle<()> {
    let name = name.to_owned();
    tokio::spawn(async move {
        let Ok(socket) = join(&name, address, term).await else { return };
        let (mut read, mut write) = socket.into_split();
        let (deliver, mut messages) = tokio::sync::mpsc::channel::<ToNode>(64);
        let reader = tokio::spawn(async move {
            while let Ok(message) = frame::read(&mut read).await {
                if deliver.send(message).await.is_err() {
                    return;
                }
            }
        });
        let _reader = AbortOnDrop(reader);
        let mut place: Option<(Box<Assignment>, Rank)> = None;
        let mut beats = tokio::time::interval(Duration::from_millis(200));
        loop {
            let message = tokio::select! {
                _ = beats.tick() => FromNode::Beat,
                message = messages.recv() => match message {
                    None => return,
                    Some(ToNode::Assign(assignment)) => {
                        let revision = assignment.revision;
                        place = Some((assignment, Rank::default()));
                        FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(2), kept: Vec::new() }
                    }
                    Some(ToNode::Step(plan)) => {
                        let Some((assignment, rank)) = &mut place else { continue };
                        if !plan.slices.is_empty() {
                            tokio::time::sleep(step_time).await;
                        }
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
            if frame::write(&mut write, &message).await.is_err() {
                return;
            }
        }
    })
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn join(name: &str, address: SocketAddr, term: u64) -> Result<TcpStream, frame::FrameError> {
    // A scheduler that does not lead yet closes the connection.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut socket = loop {
        let mut socket = TcpStream::connect(address).await?;
        match frame::greet(&mut socket, &format!("node {name}")).await {
            Ok(_) => break socket,
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    };
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
        term: LeaseTerm(term),
        crashed: None,
        leaving: false,
    };
    frame::write(&mut socket, &FromNode::Join(Box::new(join))).await?;
    Ok(socket)
}

struct Gateway {
    socket: TcpStream,
    cluster: ClusterSnapshot,
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
        match frame::read(&mut socket).await? {
            FromScheduler::Cluster(cluster) => Ok(Gateway { socket, cluster: *cluster }),
            other => panic!("the first message is the cluster, not {other:?}"),
        }
    }

    async fn next(&mut self) -> FromScheduler {
        let read = tokio::time::timeout(Duration::from_secs(20), frame::read(&mut self.socket));
        let message: FromScheduler = read.await.expect("the scheduler says something").unwrap();
        if let FromScheduler::Cluster(cluster) = &message {
            self.cluster = (**cluster).clone();
        }
        message
    }

    async fn until(&mut self, reached: impl Fn(&ClusterSnapshot) -> bool) {
        while !reached(&self.cluster) {
            self.next().await;
        }
    }

    async fn until_ready(&mut self) {
        self.until(|cluster| cluster.replicas.iter().any(|replica| replica.ready)).await;
    }

    async fn submit(&mut self, number: u128, tokens: u32) -> ChoiceId {
        let id = ChoiceId { request: RequestId(number), choice: 0 };
        let submit = Submit {
            adapter: None,
            id,
            model_digest: DIGEST,
            prompt: prompt(),
            forced: vec![],
            max_new_tokens: tokens,
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
        id
    }

    /// The tokens of a choice until its end.
    async fn collect(&mut self, id: ChoiceId) -> Result<Vec<TokenId>, RequestFailure> {
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
}

fn prompt() -> Vec<TokenId> {
    (0..40).collect()
}

#[tokio::test]
async fn a_request_is_served_over_two_stages() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    assert!(gateway.cluster.problem.is_none() || gateway.cluster.replicas.is_empty());
    let nodes = ["a", "b"].map(|name| node(name, running.nodes, 0, Duration::ZERO));
    gateway.until_ready().await;
    assert_eq!((gateway.cluster.term, gateway.cluster.nodes.len()), (LeaseTerm(1), 2));
    let id = gateway.submit(7, 30).await;
    assert_eq!(gateway.collect(id).await.unwrap(), oracle(&prompt(), 7, 30));
    gateway.until(|cluster| cluster.counters.generated_tokens == 30).await;
    assert!(gateway.cluster.nodes.iter().any(|node| node.busy.compute_us > 0));
    running.stop().await;
    nodes.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn without_nodes_a_request_waits_for_a_while_and_is_refused_with_the_reason() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    gateway.until(|cluster| cluster.problem.is_some()).await;
    let id = gateway.submit(1, 5).await;
    let asked = Instant::now();
    let failure = gateway.collect(id).await.unwrap_err();
    assert!(asked.elapsed() > Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(
        (failure.kind, failure.message.as_str()),
        (FailureKind::Unavailable, "waiting for nodes: 0 of 2 have joined")
    );
    running.stop().await;
}

#[tokio::test]
async fn a_request_outlives_a_killed_node_and_goes_on_when_it_is_back() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _a = AbortOnDrop(node("a", running.nodes, 0, Duration::from_millis(5)));
    let b = node("b", running.nodes, 0, Duration::from_millis(5));
    gateway.until_ready().await;
    let first_revision = gateway.cluster.replicas[0].revision;
    let id = gateway.submit(1, 200).await;
    while !matches!(gateway.next().await, FromScheduler::Token(_)) {}
    let killed = Instant::now();
    b.abort();
    gateway.until(|cluster| cluster.replicas.iter().all(|replica| !replica.ready)).await;
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    let problem = gateway.cluster.problem.clone().unwrap_or_default();
    assert!(problem.starts_with("node b was lost"), "{problem}");
    let _b = AbortOnDrop(node("b", running.nodes, 0, Duration::ZERO));
    gateway.until_ready().await;
    assert!(gateway.cluster.replicas[0].revision > first_revision);
    // What came while the cluster was watched is not looked at; from now on nothing may be missing.
    let mut next_index = None;
    loop {
        match gateway.next().await {
            FromScheduler::Token(event) if event.id == id => {
                let expected = *next_index.get_or_insert(event.index);
                assert_eq!(event.index, expected, "none twice, none left out");
                assert_eq!(event.token, oracle(&prompt(), 1, 200)[event.index as usize]);
                next_index = Some(expected + 1);
            }
            FromScheduler::Finished { id: ended, receipt, .. } if ended == id => {
                assert_eq!((receipt.generated_tokens, receipt.replays), (200, 1));
                break;
            }
            FromScheduler::Failed { error, .. } => panic!("{error:?}"),
            _ => {}
        }
    }
    assert_eq!(next_index, Some(200));
    let other = gateway.submit(2, 5).await;
    assert_eq!(gateway.collect(other).await.unwrap(), oracle(&prompt(), 2, 5));
    running.stop().await;
}

#[tokio::test]
async fn a_node_that_falls_silent_is_given_up() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _a = AbortOnDrop(node("a", running.nodes, 0, Duration::ZERO));
    let mut hung = join("b", running.nodes, 0).await.unwrap();
    let revision = loop {
        if let ToNode::Assign(assignment) = frame::read(&mut hung).await.unwrap() {
            break assignment.revision;
        }
    };
    let ready = FromNode::Ready { revision, reserved: Bytes(1), resident: Bytes(1), kept: Vec::new() };
    frame::write(&mut hung, &ready).await.unwrap();
    gateway.until_ready().await;
    let started = Instant::now();
    gateway.submit(1, 5).await;
    gateway.until(|cluster| cluster.replicas.iter().all(|replica| !replica.ready)).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let problem = gateway.cluster.problem.clone().unwrap_or_default();
    assert!(problem.contains("node b was lost: nothing heard"), "{problem}");
    running.stop().await;
}

#[tokio::test]
async fn a_node_from_a_later_term_makes_the_scheduler_lead_above_it() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let _early = AbortOnDrop(node("a", running.nodes, 41, Duration::ZERO));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let gateway = Gateway::connect(running.gateways).await;
        if gateway.cluster.term == LeaseTerm(42) {
            break;
        }
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    running.stop().await;
    let again = start(state.path()).await;
    let gateway = Gateway::connect(again.gateways).await;
    assert_eq!(gateway.cluster.term, LeaseTerm(43), "every start leads under a new term");
    again.stop().await;
}

#[tokio::test]
async fn a_shutdown_lets_running_requests_finish_and_refuses_new_ones() {
    let state = tempfile::tempdir().unwrap();
    let mut running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _nodes = ["a", "b"].map(|name| AbortOnDrop(node(name, running.nodes, 0, Duration::from_millis(10))));
    gateway.until_ready().await;
    let id = gateway.submit(1, 40).await;
    while !matches!(gateway.next().await, FromScheduler::Token(_)) {}
    drop(running.stop.take());
    let mut late = Gateway::connect(running.gateways).await;
    let refused = late.submit(2, 5).await;
    assert_eq!(late.collect(refused).await.unwrap_err().kind, FailureKind::Leaving);
    let mut tokens = 1;
    loop {
        match gateway.next().await {
            FromScheduler::Token(_) => tokens += 1,
            FromScheduler::Finished { id: ended, .. } if ended == id => break,
            FromScheduler::Failed { error, .. } => panic!("{error:?}"),
            _ => {}
        }
    }
    assert_eq!(tokens, 40);
    running.ended.await.unwrap();
}

#[tokio::test]
async fn strangers_and_garbage_concern_only_their_own_connection() {
    use tokio::io::AsyncWriteExt;
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _nodes = ["a", "b"].map(|name| AbortOnDrop(node(name, running.nodes, 0, Duration::ZERO)));
    gateway.until_ready().await;
    for address in [running.nodes, running.gateways] {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rude = TcpStream::connect(address).await.unwrap();
        frame::greet(&mut rude, "rude").await.unwrap();
        rude.write_all(&[0xff; 64]).await.unwrap();
    }
    let id = gateway.submit(1, 5).await;
    assert_eq!(gateway.collect(id).await.unwrap(), oracle(&prompt(), 1, 5));
    running.stop().await;
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused_with_the_key() {
    let bad = SchedulerConfig { max_num_seqs: 1000, ..SchedulerConfig::new("demo") };
    let error = bad.validate(&card()).unwrap_err().to_string();
    assert!(error.contains("max_num_batched_tokens"), "{error}");
    assert!(SchedulerConfig::new("demo").validate(&card()).is_ok());
}
