//! Requests over two stages.

use crate::harness::{
    self, AbortOnDrop, Gateway, Running, executed, join, knock, live, prompt, ready, serves,
};
use crate::model::{DIGEST, card};
use crate::rank::{Rank, oracle};
use ashlar_protocol::frame;
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::serving::{FailureKind, FromScheduler};
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_vocabulary::LeaseTerm;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

async fn start(state: &Path) -> Running {
    let config = SchedulerConfig {
        stages: Some(2),
        drain_grace_ms: 3000,
        repair_patience_ms: 3000,
        // A folder that is not there yet.
        ..harness::config(&state.join("new"))
    };
    Running::start(Scheduler::bind(config, card()).await.unwrap())
}

/// A node that computes with a model rank. Dropping it is its death.
fn node(name: &str, address: SocketAddr, term: u64, step_time: Duration) -> AbortOnDrop {
    let name = name.to_owned();
    AbortOnDrop(tokio::spawn(async move {
        let Ok(socket) = knock(&name, address).await else { return };
        let mut place = None;
        let answer = |message| match message {
            ToNode::Assign(assignment) => {
                let said = ready(&assignment);
                place = Some((assignment, Rank::default()));
                Some((Duration::ZERO, said))
            }
            ToNode::Step(plan) => {
                let (assignment, rank) = place.as_mut()?;
                let time = if plan.slices.is_empty() { Duration::ZERO } else { step_time };
                Some((time, executed(assignment, rank, &plan)))
            }
            _ => None,
        };
        let _ = live(socket, join(&name, term), answer).await;
    }))
}

#[tokio::test]
async fn a_request_is_served_over_two_stages() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    assert!(gateway.cluster.problem.is_none() || gateway.cluster.replicas.is_empty());
    let _nodes = ["a", "b"].map(|name| node(name, running.nodes, 0, Duration::ZERO));
    gateway.until_ready().await;
    assert_eq!((gateway.cluster.term, gateway.cluster.nodes.len()), (LeaseTerm(1), 2));
    let id = gateway.submit(7, DIGEST, 30).await;
    assert_eq!(gateway.collect(id).await.unwrap(), oracle(&prompt(), 7, 30));
    gateway.until(|gateway| gateway.cluster.counters.generated_tokens == 30).await;
    assert!(gateway.cluster.nodes.iter().any(|node| node.busy.compute_us > 0));
    running.stop().await;
}

#[tokio::test]
async fn without_nodes_a_request_waits_for_a_while_and_is_refused_with_the_reason() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    gateway.until(|gateway| gateway.cluster.problem.is_some()).await;
    let id = gateway.submit(1, DIGEST, 5).await;
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
    let _a = node("a", running.nodes, 0, Duration::from_millis(5));
    let b = node("b", running.nodes, 0, Duration::from_millis(5));
    gateway.until_ready().await;
    let first_revision = gateway.cluster.replicas[0].revision;
    let id = gateway.submit(1, DIGEST, 200).await;
    while !matches!(gateway.next().await, FromScheduler::Token(_)) {}
    let killed = Instant::now();
    drop(b);
    gateway.until(|gateway| !serves(&gateway.cluster)).await;
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    let problem = gateway.cluster.problem.clone().unwrap_or_default();
    assert!(problem.starts_with("node b was lost"), "{problem}");
    let _b = node("b", running.nodes, 0, Duration::ZERO);
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
    let other = gateway.submit(2, DIGEST, 5).await;
    assert_eq!(gateway.collect(other).await.unwrap(), oracle(&prompt(), 2, 5));
    running.stop().await;
}

#[tokio::test]
async fn a_node_that_falls_silent_is_given_up() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _a = node("a", running.nodes, 0, Duration::ZERO);
    let mut hung = knock("b", running.nodes).await.unwrap();
    frame::write(&mut hung, &join("b", 0)).await.unwrap();
    let said = loop {
        if let ToNode::Assign(assignment) = frame::read(&mut hung).await.unwrap() {
            break ready(&assignment);
        }
    };
    frame::write(&mut hung, &said).await.unwrap();
    gateway.until_ready().await;
    let started = Instant::now();
    gateway.submit(1, DIGEST, 5).await;
    gateway.until(|gateway| !serves(&gateway.cluster)).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    let problem = gateway.cluster.problem.clone().unwrap_or_default();
    assert!(problem.contains("node b was lost: nothing heard"), "{problem}");
    running.stop().await;
}

#[tokio::test]
async fn a_node_from_a_later_term_makes_the_scheduler_lead_above_it() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let _early = node("a", running.nodes, 41, Duration::ZERO);
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
    let _nodes = ["a", "b"].map(|name| node(name, running.nodes, 0, Duration::from_millis(10)));
    gateway.until_ready().await;
    let id = gateway.submit(1, DIGEST, 40).await;
    while !matches!(gateway.next().await, FromScheduler::Token(_)) {}
    running.ask_to_end();
    let mut late = Gateway::connect(running.gateways).await;
    let refused = late.submit(2, DIGEST, 5).await;
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
    running.stop().await;
}

#[tokio::test]
async fn strangers_and_garbage_concern_only_their_own_connection() {
    use tokio::io::AsyncWriteExt;
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path()).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let _nodes = ["a", "b"].map(|name| node(name, running.nodes, 0, Duration::ZERO));
    gateway.until_ready().await;
    for address in [running.nodes, running.gateways] {
        let mut stranger = TcpStream::connect(address).await.unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut rude = TcpStream::connect(address).await.unwrap();
        frame::greet(&mut rude, "rude").await.unwrap();
        rude.write_all(&[0xff; 64]).await.unwrap();
    }
    let id = gateway.submit(1, DIGEST, 5).await;
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
