//! Several models: nodes come again and go to where they belong, and one gateway is served by all.

use crate::harness::{
    self, AbortOnDrop, Gateway, Running, executed, join, knock, live, prompt, ready, serves,
};
use crate::model::card_of;
use crate::rank::{Rank, oracle};
use ashlar_protocol::admin::{AdminFailureKind, AdminReply, AdminRequest};
use ashlar_protocol::frame::FrameError;
use ashlar_protocol::membership::{Assignment, FromNode, ToNode};
use ashlar_protocol::models::{DeployModel, ModelStatus, ModelsView};
use ashlar_protocol::serving::{FailureKind, RequestFailure};
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_vocabulary::{LeaseTerm, ModelDigest, TokenId};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const OWN: ModelDigest = ModelDigest([1; 32]);
const OTHER: ModelDigest = ModelDigest([2; 32]);

/// A scheduler at these addresses, whose opener knows one model.
async fn start(state: &Path, at: Option<(SocketAddr, SocketAddr)>) -> Running {
    let mut config = SchedulerConfig { stages: Some(2), drain_grace_ms: 1000, ..harness::config(state) };
    if let Some((nodes, gateways)) = at {
        (config.listen_nodes, config.listen_gateways) = (nodes.to_string(), gateways.to_string());
    }
    let opener = |wish: &DeployModel| match wish.model.as_str() {
        "other" => Ok(card_of("other", OTHER)),
        _ => Err("no config.json is there".to_owned()),
    };
    // The process before may not have let go of its ports yet.
    let deadline = Instant::now() + Duration::from_secs(10);
    let scheduler = loop {
        match Scheduler::bind(config.clone(), card_of("own", OWN)).await {
            Ok(scheduler) => break scheduler.opening(Arc::new(opener)),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    Running::start(scheduler)
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

async fn membership(name: &str, address: SocketAddr, assigned: &Assigned) -> Result<(), FrameError> {
    let socket = knock(name, address).await?;
    let mut place = None;
    let answer = |message| {
        let said = match message {
            ToNode::Assign(assignment) => {
                assigned.lock().unwrap().push((name.to_owned(), assignment.clone()));
                let said = ready(&assignment);
                place = Some((assignment, Rank::default()));
                said
            }
            ToNode::Prepare(Some(order)) => FromNode::Prepared { revision: order.revision, outcome: Ok(()) },
            ToNode::Step(plan) => {
                let (assignment, rank) = place.as_mut()?;
                executed(assignment, rank, &plan)
            }
            _ => return None,
        };
        Some((Duration::ZERO, said))
    };
    live(socket, join(name, 0), answer).await
}

/// Twenty tokens of this model.
async fn ask(
    gateway: &mut Gateway,
    number: u128,
    model: ModelDigest,
) -> Result<Vec<TokenId>, RequestFailure> {
    let id = gateway.submit(number, model, 20).await;
    gateway.collect(id).await
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
    gateway.until(|gateway| serves(&gateway.cluster) && gateway.cluster.nodes.len() == 3).await;

    let refused = gateway.call(other("nowhere", "nowhere")).await;
    assert!(matches!(refused, AdminReply::Refused(failure) if failure.kind == AdminFailureKind::Invalid));
    let unknown = ask(&mut gateway, 1, OTHER).await.unwrap_err();
    assert_eq!(unknown.kind, FailureKind::UnknownModel);

    let AdminReply::Model(view) = gateway.call(other("other", "other")).await else { panic!("deployed") };
    assert_eq!((view.request.name.as_str(), view.status), ("other", ModelStatus::Loading));
    gateway.until(|gateway| is_serving(&gateway.models) && gateway.cluster.nodes.len() == 2).await;
    assert_eq!(gateway.models.deployed[0].cluster.model_digest, OTHER);
    assert_eq!(ask(&mut gateway, 2, OTHER).await.unwrap(), oracle(&prompt(), 2, 20));
    assert_eq!(ask(&mut gateway, 3, OWN).await.unwrap(), oracle(&prompt(), 3, 20));
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
    gateway.until(|gateway| serves(&gateway.cluster) && is_serving(&gateway.models)).await;
    assert_eq!(ask(&mut gateway, 4, OTHER).await.unwrap(), oracle(&prompt(), 4, 20));

    // Removed, its node stands by again, and nobody knows it.
    let removed = gateway.call(AdminRequest::RemoveModel { name: "other".into() }).await;
    match removed {
        AdminReply::Model(view) => assert_eq!(view.status, ModelStatus::Removing),
        // It was gone at once.
        other => assert_eq!(other, AdminReply::Done),
    }
    let late = ask(&mut gateway, 5, OTHER).await.unwrap_err();
    assert_eq!(late.kind, FailureKind::UnknownModel);
    gateway.until(|gateway| gateway.models.deployed.is_empty() && gateway.cluster.nodes.len() == 3).await;
    assert_eq!(ask(&mut gateway, 6, OWN).await.unwrap(), oracle(&prompt(), 6, 20));
    running.stop().await;
}
