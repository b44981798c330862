//! The embedded store.

use crate::suite::{self, TTL, grant};
use ashlar_store::{EmbeddedStore, Expected, LeaseAnswer, Store, StoreError, open};
use ashlar_vocabulary::LeaseTerm;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_store_conforms() {
    let folder = tempfile::tempdir().expect("folder");
    let now = Arc::new(AtomicU64::new(0));
    let reading = Arc::clone(&now);
    let clock = Arc::new(move || Duration::from_millis(reading.load(Ordering::SeqCst)));
    let path = folder.path().join("state.redb");
    let store = EmbeddedStore::open_with_clock(&path, clock).await.expect("opened");
    suite::run(&store, &store.clone(), async |time: Duration| {
        now.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    })
    .await;
}

#[tokio::test]
async fn a_second_opener_is_told_which_file_is_in_use() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("deep/state.redb");
    let url = format!("redb:{}", path.display());
    let first = open(&url).await.expect("opened");
    let Err(error) = open(&url).await else { panic!("opened twice") };
    assert!(matches!(&error, StoreError::Locked { .. }));
    assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    drop(first);
    open(&url).await.expect("free again");
}

#[tokio::test]
async fn a_restart_keeps_entries_and_grants_the_next_term_at_once() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("state.redb");
    let store = EmbeddedStore::open(&path).await.expect("opened");
    let first = grant(&store, "leader", "process-1", 5).await;
    let version = store.put("key", Expected::Absent, vec![1]).await.expect("written");
    drop(store);
    let store = EmbeddedStore::open(&path).await.expect("reopened");
    assert_eq!(store.get("key").await.expect("read").expect("kept").version, version);
    assert!(matches!(store.renew(&first).await, Err(StoreError::LeaseLost { .. })));
    let answer = store.acquire_lease("leader", "process-2", TTL, LeaseTerm(0)).await.expect("answer");
    assert!(matches!(answer, LeaseAnswer::Granted(lease) if lease.term == LeaseTerm(6)));
    assert!(store.put("key", Expected::Any, vec![2]).await.expect("written") > version);
}

#[tokio::test]
async fn a_file_that_is_no_state_is_refused_by_name_and_left_alone() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("notes.txt");
    let text = "not a database\n".repeat(1000);
    std::fs::write(&path, &text).expect("written");
    let Err(error) = EmbeddedStore::open(&path).await else { panic!("opened a text file") };
    assert!(error.to_string().contains("notes.txt"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).expect("still there"), text);
}

#[tokio::test]
async fn a_damaged_file_is_an_error_and_never_a_panic() {
    let folder = tempfile::tempdir().expect("folder");
    let whole = folder.path().join("whole.redb");
    let store = EmbeddedStore::open(&whole).await.expect("opened");
    for index in 0..50 {
        store.put(&format!("key/{index}"), Expected::Any, vec![index; 3000]).await.expect("written");
    }
    drop(store);
    let bytes = std::fs::read(&whole).expect("read");
    for share in [1, 3, 7, 9] {
        let path = folder.path().join(format!("cut-{share}.redb"));
        std::fs::write(&path, &bytes[..bytes.len() * share / 10]).expect("written");
        if let Ok(store) = EmbeddedStore::open(&path).await {
            // What opens must read, or say that it cannot.
            let _ = store.list("key/").await;
        }
    }
}

#[cfg(unix)]
#[tokio::test]
async fn the_file_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("state.redb");
    let _store = EmbeddedStore::open(&path).await.expect("opened");
    assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn addresses_that_name_no_store_are_refused_without_being_repeated() {
    for url in ["", "redb:", "postgres://u:secret@h/", "rediss://:secret@h/", "redis://:secret@[bad"] {
        let Err(error) = open(url).await else { panic!("{url} opened") };
        assert!(matches!(error, StoreError::Address(_)), "{url}: {error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
