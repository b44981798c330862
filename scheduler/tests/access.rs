//! Keys: which there are, and when.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use ashlar_protocol::access::{KeyCall, KeyLimits, KeyRecord, Scope};
use ashlar_protocol::admin::AdminFailureKind;
use ashlar_scheduler::access::{Effect, Event, Keys};
use ashlar_scheduler::engine::GatewayId;
use ashlar_vocabulary::{KeyId, Tenant};

const CALLER: (GatewayId, u64) = (GatewayId(1), 7);

fn record(id: u64) -> KeyRecord {
    KeyRecord {
        id: KeyId(id),
        hash: [id as u8; 32],
        name: format!("key {id}"),
        tenant: Tenant("blue".into()),
        scopes: vec![Scope::Inference],
        models: None,
        adapters: None,
        limits: KeyLimits::default(),
        shares_prefixes: false,
        created_at: id,
        expires_at: None,
        configured: false,
    }
}

fn send(keys: &mut Keys, event: Event) -> Vec<Effect> {
    let mut effects = Vec::new();
    keys.handle(event, &mut effects);
    effects
}

fn create(keys: &mut Keys, record: KeyRecord) -> Vec<Effect> {
    send(keys, Event::Call(CALLER, KeyCall::Create(Box::new(record))))
}

fn refusal(effects: &[Effect]) -> AdminFailureKind {
    match effects {
        [Effect::Reply(CALLER, Err(failure))] => failure.kind,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_key_is_let_in_once_it_is_stored_and_no_longer_once_its_end_is() {
    let mut keys = Keys::default();
    assert_eq!(create(&mut keys, record(1)), [Effect::Persist(KeyId(1), Some(Box::new(record(1))))]);
    assert_eq!(keys.get(KeyId(1)), None);
    let stored = send(&mut keys, Event::Persisted(KeyId(1), Ok(())));
    assert_eq!(stored, [Effect::Changed, Effect::Reply(CALLER, Ok(Box::new(record(1))))]);
    assert_eq!(keys.get(KeyId(1)), Some(&record(1)));
    assert_eq!(create(&mut keys, record(1)), [Effect::Reply(CALLER, Ok(Box::new(record(1))))], "said twice");

    let revoke = || Event::Call(CALLER, KeyCall::Revoke(KeyId(1)));
    assert_eq!(send(&mut keys, revoke()), [Effect::Persist(KeyId(1), None)]);
    assert_eq!(send(&mut keys, revoke()), [], "it is under way");
    let gone = send(&mut keys, Event::Persisted(KeyId(1), Ok(())));
    assert_eq!(gone.len(), 3);
    assert_eq!(keys.all().count(), 0);
    assert_eq!(refusal(&send(&mut keys, revoke())), AdminFailureKind::NotFound);
}

#[test]
fn what_cannot_be_stored_changes_nothing() {
    let mut keys = Keys::new([record(1)], None);
    create(&mut keys, record(2));
    let failed = send(&mut keys, Event::Persisted(KeyId(2), Err("the store is away".into())));
    assert_eq!(refusal(&failed), AdminFailureKind::Unavailable);
    send(&mut keys, Event::Call(CALLER, KeyCall::Revoke(KeyId(1))));
    let failed = send(&mut keys, Event::Persisted(KeyId(1), Err("the store is away".into())));
    assert_eq!(refusal(&failed), AdminFailureKind::Unavailable);
    assert_eq!(keys.all().collect::<Vec<_>>(), [&record(1)]);
}

#[test]
fn another_key_of_an_id_and_what_no_key_can_be_are_refused() {
    let mut keys = Keys::new([record(1)], Some(KeyRecord { configured: true, ..record(2) }));
    let other = KeyRecord { hash: [9; 32], ..record(1) };
    assert_eq!(refusal(&create(&mut keys, other)), AdminFailureKind::Conflict);
    let revoke = Event::Call(CALLER, KeyCall::Revoke(KeyId(2)));
    assert_eq!(refusal(&send(&mut keys, revoke)), AdminFailureKind::Conflict, "it is in a file");
    let share = KeyLimits { kv_share_percent: Some(0), ..KeyLimits::default() };
    let wrong = [
        KeyRecord { name: String::new(), ..record(3) },
        KeyRecord { name: "x".repeat(200), ..record(3) },
        KeyRecord { tenant: Tenant("a b".into()), ..record(3) },
        KeyRecord { scopes: Vec::new(), ..record(3) },
        KeyRecord { models: Some(vec![String::new(); 65]), ..record(3) },
        KeyRecord { limits: share, ..record(3) },
    ];
    for record in wrong {
        assert_eq!(refusal(&create(&mut keys, record)), AdminFailureKind::Invalid);
    }
}
