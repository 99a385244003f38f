//! The embedded store: the conformance suite, and what only it promises.

use std::{path::Path, sync::Arc};

use futures::StreamExt;
use supercloud_store::{
    Key, Prefix, SledOptions, SledStore, Store, StoreError, Txn, Value, WatchItem, conformance, list,
};

async fn open(path: &Path) -> SledStore {
    SledStore::open(path, SledOptions::default()).await.expect("the store opens")
}

fn put(path: &str, value: &str) -> Txn {
    Txn::new().put(Key::new(path).expect("a key"), Value::new(value.to_owned()).expect("a value"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sled_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let mut number = 0;
    let number = std::sync::Mutex::new(&mut number);
    conformance::run_all(|| {
        let path = {
            let mut number = number.lock().unwrap();
            **number += 1;
            dir.path().join(number.to_string())
        };
        Box::pin(async move { Arc::new(open(&path).await) as Arc<dyn Store> })
    })
    .await;
}

#[tokio::test]
async fn what_was_written_is_there_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut written = Vec::new();
    for round in 0..4 {
        let store = open(&path).await;
        let before = store.health().await.unwrap().revision;
        assert_eq!(before, written.last().copied().unwrap_or(1));
        for i in 0..30 {
            let txn = put(&format!("k/{}", i % 7), &"v".repeat(i * 2000)).delete(Key::new("gone").unwrap());
            written.push(store.txn(txn).await.unwrap().committed().unwrap());
        }
        if round == 2 {
            store.compact(written[20]).await.unwrap();
        }
        let mut history = store.watch(Prefix::all(), if round < 2 { 1 } else { written[21] });
        for revision in written.iter().skip(if round < 2 { 0 } else { 21 }) {
            let Some(Ok(WatchItem::Changes { revision: seen, .. })) = history.next().await else { panic!("changes") };
            assert_eq!(seen, *revision);
        }
        store.close().await;
    }
    assert_eq!(list(&open(&path).await, &Prefix::all()).await.unwrap().0.len(), 7);
}

#[tokio::test]
async fn a_second_opening_is_refused_and_the_first_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).await;
    let second = SledStore::open(dir.path(), SledOptions::default()).await;
    assert!(matches!(second, Err(StoreError::InUse { .. })), "{second:?}");
    first.txn(put("a", "1")).await.unwrap();
    first.close().await;
    assert!(matches!(first.txn(put("a", "2")).await, Err(StoreError::Closed)));
    assert!(matches!(first.get(Key::new("a").unwrap()).await, Err(StoreError::Closed)));
    let second = open(dir.path()).await;
    assert!(second.get(Key::new("a").unwrap()).await.unwrap().is_some());
}

#[tokio::test]
async fn closing_ends_watches() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let mut watch = store.watch(Prefix::all(), 2);
    store.close().await;
    assert!(matches!(watch.next().await, Some(Err(StoreError::Closed))));
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn a_newer_format_is_refused_untouched() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).await.close().await;
    std::fs::write(dir.path().join("FORMAT"), "supercloud-store 2\n").unwrap();
    let opened = SledStore::open(dir.path(), SledOptions::default()).await;
    assert!(matches!(opened, Err(StoreError::NewerFormat { found: 2, known: 1, .. })), "{opened:?}");
    for other in ["", "something else", "supercloud-store x"] {
        std::fs::write(dir.path().join("FORMAT"), other).unwrap();
        let opened = SledStore::open(dir.path(), SledOptions::default()).await;
        assert!(matches!(opened, Err(StoreError::Damaged { .. })), "{opened:?}");
    }
    std::fs::write(dir.path().join("FORMAT"), "supercloud-store 1\n").unwrap();
    open(dir.path()).await;
}

#[tokio::test]
async fn a_folder_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    let opened = SledStore::open(dir.path(), SledOptions::default()).await;
    assert!(matches!(opened, Err(StoreError::Damaged { .. })), "{opened:?}");
}

#[tokio::test]
async fn history_is_kept_by_count() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = SledOptions::default();
    options.history_revisions = 50;
    let store = SledStore::open(dir.path(), options.clone()).await.unwrap();
    let mut last = 0;
    for i in 0..300 {
        last = store.txn(put(&format!("k/{}", i % 90), "v")).await.unwrap().committed().unwrap();
    }
    for reopened in [false, true] {
        let store = if reopened {
            store.close().await;
            &SledStore::open(dir.path(), options.clone()).await.unwrap()
        } else {
            &store
        };
        let mut watch = store.watch(Prefix::all(), last - 49);
        for revision in last - 49..=last {
            let Some(Ok(WatchItem::Changes { revision: seen, .. })) = watch.next().await else { panic!("changes") };
            assert_eq!(seen, revision);
        }
        let item = store.watch(Prefix::all(), last - 50).next().await.unwrap().unwrap();
        assert_eq!(item, WatchItem::Compacted { oldest: last - 49 });
        assert_eq!(list(store, &Prefix::all()).await.unwrap().0.len(), 90);
    }
}

#[tokio::test]
async fn a_nearly_full_disk_refuses_writes_and_reads_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    store.txn(put("a", "1")).await.unwrap();
    store.close().await;
    let mut options = SledOptions::default();
    options.min_free_bytes = u64::MAX;
    let store = SledStore::open(dir.path(), options).await.unwrap();
    let refused = store.txn(put("a", "2")).await;
    assert!(matches!(&refused, Err(e) if e.is_retryable()), "{refused:?}");
    assert!(store.health().await.is_err());
    assert_eq!(store.get(Key::new("a").unwrap()).await.unwrap().unwrap().version, 1);
}
