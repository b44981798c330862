//! What every store must do.

use ashlar_store::{ApiKeyRecord, Collection, Entry, Expected, Lease, LeaseAnswer, Store, StoreError};
use ashlar_store::{api_keys, layouts, limits};
use ashlar_vocabulary::LeaseTerm;
use std::time::Duration;

pub(crate) const TTL: Duration = Duration::from_millis(400);

pub(crate) async fn grant(store: &dyn Store, name: &str, holder: &str, min_term: u64) -> Lease {
    match store.acquire_lease(name, holder, TTL, LeaseTerm(min_term)).await.expect("acquire") {
        LeaseAnswer::Granted(lease) => lease,
        held => panic!("{holder} was not granted {name}: {held:?}"),
    }
}

/// Runs everything over two views of one store; `pass` lets the store's time pass.
pub(crate) async fn run(a: &dyn Store, b: &dyn Store, pass: impl AsyncFn(Duration)) {
    leases_exclude_and_expire(a, b, &pass).await;
    terms_rise_over_every_kind_of_end(a, b, &pass).await;
    two_contenders_never_share_a_term(a, b).await;
    writes_compare_and_set(a, b).await;
    racing_writers_lose_no_update(a, b).await;
    lists_are_by_prefix_and_in_order(a, b).await;
    limits_are_kept(a).await;
    typed_collections_round_trip(a, b).await;
}

async fn leases_exclude_and_expire(a: &dyn Store, b: &dyn Store, pass: &impl AsyncFn(Duration)) {
    let first = grant(a, "leader", "a", 0).await;
    assert_eq!(first.term, LeaseTerm(1));
    match b.acquire_lease("leader", "b", TTL, LeaseTerm(0)).await.expect("answer") {
        LeaseAnswer::Held { by, term, remaining } => {
            assert_eq!((by.as_str(), term), ("a", LeaseTerm(1)));
            assert!(remaining <= TTL);
        }
        granted => panic!("two holders: {granted:?}"),
    }
    grant(b, "another-name", "b", 0).await;
    // Renewal holds it beyond its first time-to-live.
    for _ in 0..3 {
        pass(TTL / 2).await;
        a.renew(&first).await.expect("renewed in time");
    }
    assert!(matches!(
        b.acquire_lease("leader", "b", TTL, LeaseTerm(0)).await.expect("answer"),
        LeaseAnswer::Held { .. }
    ));
    pass(TTL * 2).await;
    // Late, but nobody came in between.
    a.renew(&first).await.expect("renewed late");
    pass(TTL * 2).await;
    let second = grant(b, "leader", "b", 0).await;
    assert_eq!(second.term, LeaseTerm(2));
    let lost = a.renew(&first).await.expect_err("fenced");
    assert!(matches!(lost, StoreError::LeaseLost { .. }), "{lost}");
    // Giving back a lost lease takes nothing from its new holder.
    a.release(&first).await.expect("no error");
    b.renew(&second).await.expect("still held");
}

async fn terms_rise_over_every_kind_of_end(a: &dyn Store, b: &dyn Store, pass: &impl AsyncFn(Duration)) {
    assert_eq!(a.last_term("rising").await.expect("term"), LeaseTerm(0));
    let first = grant(a, "rising", "a", 0).await;
    a.release(&first).await.expect("released");
    let after_release = grant(b, "rising", "b", 0).await;
    assert!(after_release.term > first.term);
    pass(TTL * 2).await;
    let after_expiry = grant(a, "rising", "a", 0).await;
    assert!(after_expiry.term > after_release.term);
    // The same holder, restarted, need not wait; its earlier life is fenced.
    let reborn = grant(a, "rising", "a", 0).await;
    assert!(reborn.term > after_expiry.term);
    assert!(matches!(a.renew(&after_expiry).await, Err(StoreError::LeaseLost { .. })));
    // Somebody has seen term 40.
    let lifted = grant(a, "rising", "a", 41).await;
    assert_eq!(lifted.term, LeaseTerm(41));
    let next = grant(a, "rising", "a", 7).await;
    assert_eq!(next.term, LeaseTerm(42));
    assert_eq!(b.last_term("rising").await.expect("term"), LeaseTerm(42));
    a.release(&next).await.expect("released");
}

async fn two_contenders_never_share_a_term(a: &dyn Store, b: &dyn Store) {
    let contend = async |store: &dyn Store, holder: &str| {
        let mut terms = Vec::new();
        for _ in 0..40 {
            let answer = store.acquire_lease("contended", holder, TTL, LeaseTerm(0)).await.expect("answer");
            if let LeaseAnswer::Granted(lease) = answer {
                terms.push(lease.term);
                store.release(&lease).await.expect("released");
            }
            tokio::task::yield_now().await;
        }
        terms
    };
    let (mut all, theirs) = tokio::join!(contend(a, "a"), contend(b, "b"));
    all.extend(theirs);
    let count = all.len();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all.len(), count, "a term was granted twice");
    assert!(count > 0);
}

async fn writes_compare_and_set(a: &dyn Store, b: &dyn Store) {
    assert_eq!(a.get("cas").await.expect("read"), None);
    let bytes = vec![0, 255, 10, 13, 0];
    let first = a.put("cas", Expected::Absent, bytes.clone()).await.expect("created");
    assert_eq!(b.get("cas").await.expect("read"), Some(Entry { version: first, bytes }));
    let conflict = b.put("cas", Expected::Absent, vec![1]).await.expect_err("exists");
    assert!(matches!(conflict, StoreError::Conflict { current, .. } if current == Some(first)));
    let second = b.put("cas", Expected::At(first), Vec::new()).await.expect("updated");
    assert!(second > first);
    assert!(matches!(
        a.put("cas", Expected::At(first), vec![2]).await,
        Err(StoreError::Conflict { current, .. }) if current == Some(second)
    ));
    assert!(matches!(a.delete("cas", Expected::At(first)).await, Err(StoreError::Conflict { .. })));
    assert!(a.delete("cas", Expected::At(second)).await.expect("deleted"));
    assert!(!a.delete("cas", Expected::Any).await.expect("nothing there"));
    assert!(matches!(
        a.put("cas", Expected::At(second), vec![3]).await,
        Err(StoreError::Conflict { current: None, .. })
    ));
    let third = a.put("cas", Expected::Any, vec![4]).await.expect("written again");
    assert!(third > second, "a version names one write for ever");
}

async fn racing_writers_lose_no_update(a: &dyn Store, b: &dyn Store) {
    a.put("counter", Expected::Any, b"0".to_vec()).await.expect("start");
    let add = async |store: &dyn Store| {
        for _ in 0..20 {
            loop {
                let entry = store.get("counter").await.expect("read").expect("there");
                let value: u32 = std::str::from_utf8(&entry.bytes).expect("text").parse().expect("number");
                let next = (value + 1).to_string().into_bytes();
                match store.put("counter", Expected::At(entry.version), next).await {
                    Ok(_) => break,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    };
    tokio::join!(add(a), add(b));
    assert_eq!(a.get("counter").await.expect("read").expect("there").bytes, b"40");
}

async fn lists_are_by_prefix_and_in_order(a: &dyn Store, b: &dyn Store) {
    for key in ["list/b", "list/a", "list/a/1", "lisu", "list", "list/~"] {
        a.put(key, Expected::Any, key.as_bytes().to_vec()).await.expect("written");
    }
    let keys = async |prefix: &str| -> Vec<String> {
        b.list(prefix).await.expect("list").into_iter().map(|(key, _)| key).collect()
    };
    assert_eq!(keys("list/").await, ["list/a", "list/a/1", "list/b", "list/~"]);
    assert_eq!(keys("nothing/").await, Vec::<String>::new());
    assert!(keys("").await.len() >= 6);
    let (key, entry) = b.list("list/b").await.expect("list").remove(0);
    assert_eq!(
        (key.as_bytes(), Some(&entry)),
        (entry.bytes.as_slice(), a.get("list/b").await.expect("read").as_ref())
    );
    a.delete("list/a", Expected::Any).await.expect("deleted");
    assert_eq!(keys("list/a").await, ["list/a/1"]);
}

async fn limits_are_kept(a: &dyn Store) {
    for key in ["", "with space", "línea", &"x".repeat(limits::KEY_BYTES_MAX + 1)] {
        assert!(a.put(key, Expected::Any, Vec::new()).await.is_err(), "{key:?}");
        assert!(a.get(key).await.is_err(), "{key:?}");
    }
    let most = vec![7; limits::VALUE_BYTES_MAX];
    a.put("large", Expected::Any, most.clone()).await.expect("the largest value");
    assert_eq!(a.get("large").await.expect("read").expect("there").bytes, most);
    let more = vec![7; limits::VALUE_BYTES_MAX + 1];
    assert!(matches!(a.put("large", Expected::Any, more).await, Err(StoreError::TooLarge { .. })));
    let long = a.acquire_lease("x", "a", Duration::from_secs(1 << 40), LeaseTerm(0)).await;
    assert!(matches!(long, Err(StoreError::Invalid(_))));
    let high = a.acquire_lease("x", "a", TTL, LeaseTerm(u64::MAX)).await;
    assert!(matches!(high, Err(StoreError::Invalid(_))));
}

async fn typed_collections_round_trip(a: &dyn Store, b: &dyn Store) {
    let record = ApiKeyRecord {
        name: "laptop".into(),
        tenant: "t".into(),
        admin: true,
        created_unix_ms: 1,
        expires_unix_ms: None,
    };
    let version = api_keys(a).put("aabb", Expected::Absent, &record).await.expect("written");
    assert_eq!(api_keys(b).get("aabb").await.expect("read"), Some((version, record.clone())));
    assert_eq!(api_keys(b).list().await.expect("list"), [("aabb".to_owned(), version, record)]);
    layouts::<Vec<u32>>(a).put("model", Expected::Any, &vec![1, 2]).await.expect("written");
    assert_eq!(layouts::<Vec<u32>>(b).list().await.expect("list").len(), 1);
    // A value of another kind is reported by key, without the value.
    a.put("api-key/ccdd", Expected::Any, br#"{"name":"secret-word"}"#.to_vec()).await.expect("written");
    let error = api_keys(b).get("ccdd").await.expect_err("not a record").to_string();
    assert!(error.contains("api-key/ccdd") && !error.contains("secret-word"), "{error}");
    let collection: Collection<'_, u32> = Collection::new(a, "numbers/");
    assert!(collection.list().await.expect("list").is_empty());
}
