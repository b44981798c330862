//! Who may speak to a scheduler that has an identity.

use crate::harness::{self, join};
use crate::model::card;
use ashlar_identity::{Authority, Identity, Role, Stream, Tls, TlsError, Transport};
use ashlar_protocol::frame::{self, FrameError};
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::serving::FromScheduler;
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(20);

fn transport(authority: &Authority, role: Role, name: &str) -> Transport {
    let identity = Identity::new(role, name).unwrap();
    Transport::Encrypted(Tls::new(&authority.credentials(&identity).unwrap()).unwrap())
}

/// A scheduler that lives as long as the test's runtime: where nodes and gateways connect.
async fn start(state: &Path, authority: &Authority) -> (SocketAddr, SocketAddr) {
    let identity = state.join("identity");
    let own = Identity::new(Role::Scheduler, "s").unwrap();
    authority.credentials(&own).unwrap().save(&identity).unwrap();
    let config = SchedulerConfig { identity: Some(identity), ..harness::config(state) };
    let scheduler = Scheduler::bind(config, card()).await.unwrap();
    let addresses = (scheduler.nodes_address().unwrap(), scheduler.gateways_address().unwrap());
    tokio::spawn(scheduler.run(std::future::pending()));
    addresses
}

/// Connects and greets. A scheduler that does not lead yet ends connections: then tries again.
async fn knock(address: SocketAddr, transport: &Transport) -> Result<Stream, FrameError> {
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        let attempt = async {
            let socket = TcpStream::connect(address).await?;
            let mut socket = transport.connect(socket, Role::Scheduler).await?;
            frame::greet(&mut socket, "test").await?;
            Ok::<_, FrameError>(socket)
        };
        match attempt.await {
            Err(FrameError::Closed | FrameError::Io(_) | FrameError::Tls(TlsError::Io(_)))
                if tokio::time::Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            other => return other,
        }
    }
}

/// The next thing that the scheduler says, but for that it lives.
async fn said(connection: &mut Stream) -> ToNode {
    loop {
        let answer = tokio::time::timeout(LIMIT, frame::read::<ToNode>(connection)).await.unwrap().unwrap();
        if answer != ToNode::Beat {
            return answer;
        }
    }
}

#[tokio::test]
async fn a_node_joins_under_the_name_in_its_certificate_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&folder.path().join("ca")).unwrap();
    let (nodes, _) = start(folder.path(), &authority).await;
    let a = transport(&authority, Role::Node, "a");
    let mut connection = knock(nodes, &a).await.unwrap();
    frame::write(&mut connection, &join("b", 0)).await.unwrap();
    let answer = said(&mut connection).await;
    let ToNode::Rejected(reason) = answer else { panic!("{answer:?}") };
    assert!(reason.contains("node a") && reason.contains("node b"), "{reason}");
    let mut connection = knock(nodes, &a).await.unwrap();
    frame::write(&mut connection, &join("a", 0)).await.unwrap();
    // The only node there is gets the model.
    let answer = said(&mut connection).await;
    assert!(matches!(answer, ToNode::Assign(_)), "{answer:?}");
}

#[tokio::test]
async fn each_port_is_for_its_role_and_for_certificates_of_the_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::open_or_create(&folder.path().join("ca")).unwrap();
    let (nodes, gateways) = start(folder.path(), &authority).await;
    let gateway = transport(&authority, Role::Gateway, "g");
    let mut connection = knock(gateways, &gateway).await.unwrap();
    let first = tokio::time::timeout(LIMIT, frame::read::<FromScheduler>(&mut connection)).await.unwrap();
    assert!(matches!(first, Ok(FromScheduler::Keys(_))), "{first:?}");
    // A node's certificate at the gateways' port, and the other way round: the connection just ends.
    for (address, transport) in [(gateways, transport(&authority, Role::Node, "a")), (nodes, gateway)] {
        let socket = TcpStream::connect(address).await.unwrap();
        let mut socket = transport.connect(socket, Role::Scheduler).await.unwrap();
        assert!(frame::greet(&mut socket, "test").await.is_err());
    }
    let others = Authority::open_or_create(&folder.path().join("others")).unwrap();
    let error = knock(nodes, &transport(&others, Role::Node, "a")).await.unwrap_err();
    assert!(matches!(error, FrameError::Tls(TlsError::Stranger)), "{error}");
    let error = knock(nodes, &Transport::Plain).await.unwrap_err();
    assert!(matches!(error, FrameError::PeerSpeaksTls), "{error}");
}

#[tokio::test]
async fn a_scheduler_without_an_identity_does_not_listen_beyond_its_machine() {
    let folder = tempfile::tempdir().unwrap();
    let config = |allow_plaintext| SchedulerConfig {
        listen_nodes: "0.0.0.0:0".into(),
        allow_plaintext,
        ..harness::config(folder.path())
    };
    let error = Scheduler::bind(config(false), card()).await.err().unwrap().to_string();
    assert!(error.contains("identity") && error.contains("allow_plaintext"), "{error}");
    assert!(Scheduler::bind(config(true), card()).await.is_ok());
}
