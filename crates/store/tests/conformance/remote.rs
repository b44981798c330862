//! The store in Redis.

use crate::redis_server::RedisServer;
use crate::suite::{self, TTL, grant};
use ashlar_store::{Expected, LeaseAnswer, RedisOptions, RedisStore, Store, StoreError, open};
use ashlar_vocabulary::LeaseTerm;
use std::time::{Duration, Instant};

fn quick() -> RedisOptions {
    RedisOptions { timeout: Duration::from_millis(500), ..RedisOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_redis_store_conforms() {
    let Some(server) = RedisServer::start() else { return };
    let a = open(&server.url()).await.expect("connected");
    let b = open(&server.url()).await.expect("connected");
    // The server's time is real.
    suite::run(a.as_ref(), b.as_ref(), async |time: Duration| tokio::time::sleep(time).await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clusters_with_different_prefixes_share_a_server() {
    let Some(server) = RedisServer::start() else { return };
    let options = |prefix: &str| RedisOptions { prefix: prefix.into(), ..quick() };
    let a = RedisStore::connect(&server.url(), options("one:")).await.expect("connected");
    let b = RedisStore::connect(&server.url(), options("two:")).await.expect("connected");
    a.put("key", Expected::Absent, vec![1]).await.expect("written");
    grant(&a, "leader", "a", 0).await;
    assert_eq!(b.list("").await.expect("list"), []);
    grant(&b, "leader", "b", 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_is_unavailable_in_time_and_comes_back() {
    let Some(mut server) = RedisServer::start() else { return };
    let store = RedisStore::connect(&server.url(), quick()).await.expect("connected");
    store.put("key", Expected::Any, vec![1]).await.expect("written");
    server.kill();
    for _ in 0..3 {
        let start = Instant::now();
        let error = store.get("key").await.expect_err("nobody is there");
        assert!(error.is_retryable(), "{error}");
        assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    }
    server.start_again();
    let start = Instant::now();
    while let Err(error) = store.put("key", Expected::Any, vec![2]).await {
        assert!(error.is_retryable(), "{error}");
        assert!(start.elapsed() < Duration::from_secs(10), "does not recover: {error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(store.get("key").await.expect("read").expect("there").bytes, [2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lost_its_data_reuses_neither_terms_nor_versions() {
    let Some(mut server) = RedisServer::start() else { return };
    let store = RedisStore::connect(&server.url(), quick()).await.expect("connected");
    let before = grant(&store, "leader", "a", 9).await;
    let version = store.put("key", Expected::Absent, vec![1]).await.expect("written");
    server.kill();
    server.start_again();
    let start = Instant::now();
    let lost = loop {
        match store.renew(&before).await {
            Err(StoreError::Unavailable(_)) if start.elapsed() < Duration::from_secs(10) => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => break other,
        }
    };
    assert!(matches!(lost, Err(StoreError::LeaseLost { .. })), "{lost:?}");
    // What ranks and gateways have seen lifts the term that the server forgot.
    let seen = before.term.0;
    let after = grant(&store, "leader", "b", seen + 1).await;
    assert_eq!(after.term, LeaseTerm(10));
    assert!(matches!(
        store.put("key", Expected::At(version), vec![2]).await,
        Err(StoreError::Conflict { current: None, .. })
    ));
    assert!(store.put("key", Expected::Absent, vec![3]).await.expect("written") > version);
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_hangs_is_unavailable_in_time() {
    let Some(server) = RedisServer::start() else { return };
    let store = RedisStore::connect(&server.url(), quick()).await.expect("connected");
    let lease = grant(&store, "leader", "a", 0).await;
    server.signal("-STOP");
    let start = Instant::now();
    let error = store.renew(&lease).await.expect_err("it hangs");
    assert!(error.is_retryable(), "{error}");
    assert!(start.elapsed() < Duration::from_millis(1500), "{:?}", start.elapsed());
    server.signal("-CONT");
    let start = Instant::now();
    while store.renew(&lease).await.is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "does not recover");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_the_clock_prolonged_ends_after_one_time_to_live() {
    let Some(server) = RedisServer::start() else { return };
    let store = RedisStore::connect(&server.url(), quick()).await.expect("connected");
    grant(&store, "leader", "a", 0).await;
    // As if the server's clock had been set back by an hour since the grant.
    let client = redis::Client::open(server.url()).expect("address");
    let mut raw = client.get_multiplexed_async_connection().await.expect("connected");
    let mut shift = redis::cmd("HINCRBY");
    shift.arg("ashlar:lease:leader").arg("until").arg(3_600_000);
    shift.query_async::<i64>(&mut raw).await.expect("shifted");
    let answer = store.acquire_lease("leader", "b", TTL, LeaseTerm(0)).await.expect("answer");
    assert!(matches!(answer, LeaseAnswer::Held { remaining, .. } if remaining <= TTL), "{answer:?}");
    tokio::time::sleep(TTL * 2).await;
    assert_eq!(grant(&store, "leader", "b", 0).await.term, LeaseTerm(2));
}

/// A full server, and one whose replicas are away.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_writes_says_why_and_is_read_from() {
    let Some(server) = RedisServer::start() else { return };
    let store = RedisStore::connect(&server.url(), quick()).await.expect("connected");
    let version = store.put("key", Expected::Absent, vec![1]).await.expect("written");
    let lease = grant(&store, "leader", "a", 0).await;
    let cases = [("maxmemory", "1", "0", "OOM"), ("min-replicas-to-write", "1", "0", "NOREPLICAS")];
    for (setting, refusing, usual, why) in cases {
        server.set(setting, refusing);
        let refused = store.put("key", Expected::At(version), vec![2]).await.expect_err("refused");
        assert!(refused.is_retryable() && refused.to_string().contains(why), "{refused}");
        let refused = store.renew(&lease).await.expect_err("refused");
        assert!(refused.is_retryable() && refused.to_string().contains(why), "{refused}");
        assert_eq!(store.get("key").await.expect("read").expect("there").bytes, [1]);
        server.set(setting, usual);
        store.renew(&lease).await.expect("it takes writes again");
    }
    store.put("key", Expected::At(version), vec![2]).await.expect("written");
}

#[tokio::test]
async fn nobody_there_is_unavailable_at_once() {
    let options = RedisOptions { timeout: Duration::from_millis(300), ..RedisOptions::default() };
    let error =
        RedisStore::connect("redis://:hidden-word@127.0.0.1:1/", options).await.err().expect("refused");
    assert!(error.is_retryable(), "{error}");
    assert!(!error.to_string().contains("hidden-word"), "{error}");
}
