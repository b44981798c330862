//! The connection to the scheduler: whom a node stays with, and whom it leaves.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_protocol::frame;
use ashlar_protocol::membership::{FromNode, Join, ToNode};
use ashlar_shard_node::NodeConfig;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};

const LIMIT: Duration = Duration::from_secs(10);

/// Somebody who leads, as far as the node can tell.
async fn lead(listener: &TcpListener) -> (TcpStream, Box<Join>) {
    let accepted = async {
        let (mut socket, _) = listener.accept().await.unwrap();
        frame::greet(&mut socket, "scheduler").await.unwrap();
        match frame::read(&mut socket).await.unwrap() {
            FromNode::Join(join) => (socket, join),
            other => panic!("{other:?}"),
        }
    };
    tokio::time::timeout(LIMIT, accepted).await.expect("the node joins")
}

fn config(state: &std::path::Path, schedulers: &[&TcpListener]) -> NodeConfig {
    let addresses: Vec<String> =
        schedulers.iter().map(|listener| format!("\"{}\"", listener.local_addr().unwrap())).collect();
    let text = format!(
        "name = \"a\"\nscheduler = [{}]\nstate = {:?}\nmemory_bytes = 67108864\nthreads = 1\n",
        addresses.join(", "),
        state.to_str().unwrap()
    );
    toml::from_str(&text).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_leaves_a_scheduler_that_it_does_not_hear_any_more_for_another_one() {
    let state = tempfile::tempdir().unwrap();
    let (first, second) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let config = config(state.path(), &[&first, &second]);
    let node = tokio::spawn(ashlar_shard_node::serve(config, std::future::pending()));
    let (mut leader, join) = lead(&first).await;
    assert!(!join.leaving);
    // As long as it says that it lives, the node stays.
    for _ in 0..15 {
        frame::write(&mut leader, &ToNode::Beat).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let silent = Instant::now();
    let (_next, _) = lead(&second).await;
    let (least, most) = (Duration::from_millis(700), Duration::from_secs(4));
    assert!((least..most).contains(&silent.elapsed()), "left after {:?}", silent.elapsed());
    node.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_asked_to_end_says_so_and_ends_once_it_is_dismissed() {
    let state = tempfile::tempdir().unwrap();
    let only = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = config(state.path(), &[&only]);
    let (ask, asked) = tokio::sync::oneshot::channel::<()>();
    let node = tokio::spawn(ashlar_shard_node::serve(config, async move {
        let _ = asked.await;
    }));
    let (mut leader, _) = lead(&only).await;
    ask.send(()).unwrap();
    let leaving =
        async { while frame::read::<FromNode>(&mut leader).await.unwrap() != FromNode::Leaving(true) {} };
    tokio::time::timeout(LIMIT, leaving).await.expect("it says that it leaves");
    assert!(!node.is_finished(), "it waits until others have its place");
    frame::write(&mut leader, &ToNode::Dismissed).await.unwrap();
    tokio::time::timeout(LIMIT, node).await.expect("it ends").unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_an_operator_drains_says_so_to_whoever_leads_next() {
    let state = tempfile::tempdir().unwrap();
    let only = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = config(state.path(), &[&only]);
    let node = tokio::spawn(ashlar_shard_node::serve(config, std::future::pending()));
    let (mut leader, _) = lead(&only).await;
    frame::write(&mut leader, &ToNode::Drain(true)).await.unwrap();
    let leaving =
        async { while frame::read::<FromNode>(&mut leader).await.unwrap() != FromNode::Leaving(true) {} };
    tokio::time::timeout(LIMIT, leaving).await.expect("it says that it leaves");
    // Nothing to end for.
    frame::write(&mut leader, &ToNode::Dismissed).await.unwrap();
    drop(leader);
    let (mut next, join) = lead(&only).await;
    assert!(join.leaving);
    frame::write(&mut next, &ToNode::Drain(false)).await.unwrap();
    let back =
        async { while frame::read::<FromNode>(&mut next).await.unwrap() != FromNode::Leaving(false) {} };
    tokio::time::timeout(LIMIT, back).await.expect("it is of use again");
    assert!(!node.is_finished());
    node.abort();
}
