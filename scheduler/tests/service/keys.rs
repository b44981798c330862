//! Keys over real sockets and a real store: told to every gateway at once, kept over terms, limited over all gateways together.

use crate::harness::{self, AbortOnDrop, Gateway, Running, executed, join, knock, live, prompt, ready};
use crate::model::{DIGEST, card};
use crate::rank::Rank;
use ashlar_identity::ApiKey;
use ashlar_protocol::access::{Charge, KeyCall, KeyLimits, KeyRecord, Quota, Scope};
use ashlar_protocol::admin::{AdminReply, AdminRequest};
use ashlar_protocol::membership::ToNode;
use ashlar_protocol::serving::{ChoiceId, FailureKind, FromScheduler, Submit, ToScheduler};
use ashlar_scheduler::{Scheduler, SchedulerConfig};
use ashlar_service_kit::config::Secret;
use ashlar_vocabulary::{KeyId, RequestId, SamplingParams, Tenant};
use std::path::Path;
use std::time::Duration;

async fn start(state: &Path, admin_key: Option<&ApiKey>) -> Running {
    let admin_key = admin_key.map(|key| Secret(key.reveal().to_owned()));
    let config = SchedulerConfig { stages: Some(1), admin_key, ..harness::config(state) };
    Running::start(Scheduler::bind(config, card()).await.unwrap())
}

fn node(running: &Running) -> AbortOnDrop {
    let address = running.nodes;
    AbortOnDrop(tokio::spawn(async move {
        let Ok(socket) = knock("a", address).await else { return };
        let mut place = None;
        let answer = |message| match message {
            ToNode::Assign(assignment) => {
                let said = ready(&assignment);
                place = Some((assignment, Rank::default()));
                Some((Duration::ZERO, said))
            }
            ToNode::Step(plan) => {
                let (assignment, rank) = place.as_mut()?;
                Some((Duration::ZERO, executed(assignment, rank, &plan)))
            }
            _ => None,
        };
        let _ = live(socket, join("a", 0), answer).await;
    }))
}

fn record(limits: KeyLimits) -> KeyRecord {
    KeyRecord {
        id: KeyId(5),
        hash: [5; 32],
        name: "five".into(),
        tenant: Tenant("blue".into()),
        scopes: vec![Scope::Inference],
        models: None,
        adapters: Some(vec!["poet".into()]),
        limits,
        shares_prefixes: false,
        created_at: 1_700_000_000,
        expires_at: Some(1_800_000_000),
        configured: false,
    }
}

fn create(record: &KeyRecord) -> AdminRequest {
    AdminRequest::Key(KeyCall::Create(Box::new(record.clone())))
}

/// Submits a choice on the account of a key; what is said of its limits, and how it ends.
async fn ask(
    gateway: &mut Gateway,
    number: u128,
    key: u64,
    resumed: bool,
) -> (Option<Quota>, Option<FailureKind>) {
    let id = ChoiceId { request: RequestId(number), choice: 0 };
    let prompt = prompt();
    let charge = Charge { key: KeyId(key), requests: 1, prompt_tokens: prompt.len() as u32, resumed };
    let submit = Submit {
        adapter: None,
        id,
        model_digest: DIGEST,
        prompt,
        forced: vec![],
        forced_logprobs: vec![],
        kept: false,
        max_new_tokens: 3,
        stop_tokens: vec![],
        sampling: SamplingParams::default(),
        tenant_salt: 1,
        charge: Some(charge),
        priority: 0,
        deadline_ms: 0,
        traceparent: None,
    };
    gateway.say(ToScheduler::Submit(Box::new(submit))).await;
    let mut told = None;
    loop {
        match gateway.next().await {
            FromScheduler::Quota { id: of, quota } if of == id => told = Some(quota),
            FromScheduler::Finished { id: of, .. } if of == id => return (told, None),
            FromScheduler::Failed { id: of, error } if of == id => return (told, Some(error.kind)),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_key_is_told_to_all_gateways_outlives_the_scheduler_and_ends_everywhere_at_once() {
    let state = tempfile::tempdir().unwrap();
    let admin = ApiKey::generate().unwrap();
    let running = start(state.path(), Some(&admin)).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let mut other = Gateway::connect(running.gateways).await;
    assert_eq!(gateway.keys.iter().map(|key| key.id).collect::<Vec<_>>(), [admin.id()]);
    assert!(gateway.keys[0].configured && admin.is(&gateway.keys[0].hash));

    let record = record(KeyLimits::default());
    let reply = gateway.call(create(&record)).await;
    assert_eq!(reply, AdminReply::Key(Box::new(record.clone())));
    other.until(|gateway| gateway.keys.contains(&record)).await;
    running.stop().await;

    let running = start(state.path(), None).await;
    let mut gateway = Gateway::connect(running.gateways).await;
    let mut other = Gateway::connect(running.gateways).await;
    assert_eq!(gateway.keys, std::slice::from_ref(&record), "the configured one is the configuration's");
    gateway.call(AdminRequest::Key(KeyCall::Revoke(record.id))).await;
    other.until(|gateway| gateway.keys.is_empty()).await;
    running.stop().await;
    let running = start(state.path(), None).await;
    assert_eq!(Gateway::connect(running.gateways).await.keys, []);
    running.stop().await;
}

#[tokio::test]
async fn limits_hold_over_all_gateways_together() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), None).await;
    let _node = node(&running);
    let mut gateway = Gateway::connect(running.gateways).await;
    let mut other = Gateway::connect(running.gateways).await;
    gateway.until_ready().await;
    other.until_ready().await;
    let limits = KeyLimits { requests_per_minute: Some(2), ..KeyLimits::default() };
    gateway.call(create(&record(limits))).await;

    let remaining = |quota: Option<Quota>| quota.unwrap().requests.unwrap().remaining;
    let (quota, failure) = ask(&mut gateway, 1, 5, false).await;
    assert_eq!((remaining(quota), failure), (1, None));
    let (quota, failure) = ask(&mut other, 2, 5, false).await;
    assert_eq!((remaining(quota), failure), (0, None));
    for gateway in [&mut gateway, &mut other] {
        let (quota, failure) = ask(gateway, 3, 5, false).await;
        assert_eq!((remaining(quota), failure), (0, Some(FailureKind::RateLimited)));
    }
    let (_, failure) = ask(&mut gateway, 4, 5, true).await;
    assert_eq!(failure, None, "what was let in before goes on");
    let (quota, failure) = ask(&mut gateway, 5, 77, false).await;
    assert_eq!((quota, failure), (None, Some(FailureKind::UnknownKey)));
    running.stop().await;
}
