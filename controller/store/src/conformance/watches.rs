//! Watches and compaction.

use std::sync::Arc;

use super::{brief_changes, changes, commit, delete, key, large, list_keys, next, prefix, put, value};
use crate::{Change, Prefix, Store, StoreError, Txn, WatchItem, list};

pub(super) async fn a_watch_replays_and_follows(store: Arc<dyn Store>) {
    let first = put(&*store, "a", "1").await;
    let second = put(&*store, "b", "2").await;
    let mut watch = store.watch(Prefix::all(), first);
    assert_eq!(brief_changes(&mut watch).await, (first, "+a=1".to_owned()));
    assert_eq!(brief_changes(&mut watch).await, (second, "+b=2".to_owned()));
    // Now it waits; what comes later reaches it.
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        let third = put(&*writer, "a", "3").await;
        (third, delete(&*writer, "b").await)
    });
    let (at_third, third_change) = brief_changes(&mut watch).await;
    let (at_fourth, fourth_change) = brief_changes(&mut watch).await;
    assert_eq!((at_third, at_fourth), writing.await.expect("writer"));
    assert_eq!((third_change.as_str(), fourth_change.as_str()), ("+a=3", "-b"));
    let (_, replayed) = changes(&mut store.watch(Prefix::all(), at_third)).await;
    let found = store.get(key("a")).await.expect("get").expect("there");
    assert_eq!(replayed, [Change::Put(found)]);
}

pub(super) async fn a_watch_resumes_without_gap_or_repetition(store: Arc<dyn Store>) {
    let mut written = Vec::new();
    for i in 0..60 {
        written.push((put(&*store, &format!("k/{}", i % 7), &i.to_string()).await, format!("+k/{}={i}", i % 7)));
    }
    let mut seen = Vec::new();
    let mut from = written[0].0;
    while seen.len() < written.len() {
        // A new watch for every few items, as after a broken connection.
        let mut watch = store.watch(prefix("k/"), from);
        for _ in 0..(1 + seen.len() % 5).min(written.len() - seen.len()) {
            seen.push(brief_changes(&mut watch).await);
        }
        from = seen.last().map_or(from, |(revision, _)| revision + 1);
    }
    assert_eq!(seen, written);
}

pub(super) async fn a_watch_sees_its_prefix_only(store: Arc<dyn Store>) {
    let start = put(&*store, "x", "0").await;
    let mut watch = store.watch(prefix("a/"), start);
    put(&*store, "a", "no").await;
    put(&*store, "a0", "no").await;
    put(&*store, "b/a/1", "no").await;
    let both = commit(&*store, Txn::new().put(key("a/1"), value("yes")).put(key("b/1"), value("no"))).await;
    put(&*store, "b/2", "no").await;
    let last = put(&*store, "a/\u{10ffff}", "yes").await;
    assert_eq!(brief_changes(&mut watch).await, (both, "+a/1=yes".to_owned()));
    assert_eq!(brief_changes(&mut watch).await, (last, "+a/\u{10ffff}=yes".to_owned()));
}

pub(super) async fn a_watch_may_start_in_the_future(store: Arc<dyn Store>) {
    let now = put(&*store, "a", "0").await;
    let mut watch = store.watch(Prefix::all(), now + 3);
    let writer = Arc::clone(&store);
    let writing = tokio::spawn(async move {
        let mut written = Vec::new();
        while written.last().is_none_or(|revision| *revision < now + 5) {
            written.push(put(&*writer, "a", "x").await);
        }
        written
    });
    let (first, _) = changes(&mut watch).await;
    let written = writing.await.expect("writer");
    assert_eq!(Some(&first), written.iter().find(|revision| **revision >= now + 3));
}

pub(super) async fn a_long_history_with_large_values_arrives(store: Arc<dyn Store>) {
    let mut written = Vec::new();
    for i in 0..1200_u32 {
        let bytes = if i % 60 == 0 { large(1 << 20, 1) } else { value(i.to_string()) };
        written.push(commit(&*store, Txn::new().put(key("k"), bytes)).await);
    }
    let mut watch = store.watch(Prefix::all(), written[0]);
    for (i, revision) in (0..).zip(&written) {
        let (at, changes) = changes(&mut watch).await;
        assert_eq!(at, *revision);
        let expected = if i % 60 == 0 { large(1 << 20, 1) } else { value(i.to_string()) };
        assert!(matches!(&changes[..], [Change::Put(put)] if put.value == expected && put.version == i + 1), "{i}");
    }
}

pub(super) async fn compaction_is_told(store: Arc<dyn Store>) {
    let mut written = Vec::new();
    for i in 0..10 {
        written.push(put(&*store, &format!("k/{}", i % 3), &i.to_string()).await);
    }
    let gone = delete(&*store, "k/0").await;
    let after = put(&*store, "k/9", "end").await;
    store.compact(gone).await.expect("compact");
    for from in [1, written[0], written[9], gone] {
        let mut watch = store.watch(prefix("k/"), from);
        match next(&mut watch).await {
            Ok(WatchItem::Compacted { oldest }) => assert_eq!(oldest, gone + 1, "from {from}"),
            other => panic!("from {from}: should be compacted, but {other:?}"),
        }
        assert!(futures::StreamExt::next(&mut watch).await.is_none(), "the stream ends");
    }
    let mut watch = store.watch(prefix("k/"), gone + 1);
    assert_eq!(brief_changes(&mut watch).await, (after, "+k/9=end".to_owned()));
    // Again, or further back: nothing happens.
    store.compact(gone).await.expect("compact again");
    store.compact(written[0]).await.expect("compact what is compacted");
    store.compact(after).await.expect("compact all");
    let refused = store.compact(after + 1000).await;
    assert!(matches!(refused, Err(StoreError::InvalidArgument { .. })), "{refused:?}");
    // A watch from the next revision on works when nothing is left to replay.
    let mut watch = store.watch(prefix("k/"), after + 1);
    let next_change = put(&*store, "k/1", "new").await;
    assert_eq!(brief_changes(&mut watch).await, (next_change, "+k/1=new".to_owned()));
}

pub(super) async fn compaction_keeps_current_values(store: Arc<dyn Store>) {
    let big = large(300 << 10, 3);
    commit(&*store, Txn::new().put(key("big"), big.clone()).put(key("small"), value("s"))).await;
    for i in 0..20 {
        put(&*store, "often", &i.to_string()).await;
    }
    let before = list(&*store, &Prefix::all()).await.expect("list");
    store.compact(before.1).await.expect("compact");
    assert_eq!(list(&*store, &Prefix::all()).await.expect("list"), before);
    // Compacted values can still be replaced and removed, and compacted again.
    let end = commit(&*store, Txn::new().delete(key("big")).put(key("often"), big.clone())).await;
    store.compact(end).await.expect("compact");
    assert_eq!(list_keys(&*store).await, ["often", "small"]);
    assert_eq!(store.get(key("often")).await.expect("get").expect("there").value, big);
}

pub(super) async fn a_lagging_watch_has_no_silent_gap(store: Arc<dyn Store>) {
    let mut written = vec![put(&*store, "k", "0").await];
    let mut watch = store.watch(Prefix::all(), written[0]);
    assert_eq!(changes(&mut watch).await.0, written[0]);
    for i in 1..400 {
        written.push(put(&*store, "k", &i.to_string()).await);
    }
    let newest = written[written.len() - 1];
    store.compact(newest).await.expect("compact");
    // What was already on its way may still arrive; the rest is told as compacted.
    for expected in &written[1..] {
        match next(&mut watch).await.expect("an item") {
            WatchItem::Changes { revision, .. } => assert_eq!(revision, *expected, "no gap"),
            WatchItem::Compacted { oldest } => {
                assert_eq!(oldest, newest + 1);
                return;
            }
        }
    }
}
