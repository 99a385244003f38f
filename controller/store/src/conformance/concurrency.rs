//! Many callers at once.

use std::{collections::BTreeSet, sync::Arc};

use tokio::task::JoinSet;

use super::{changes, commit, key, prefix, put, value};
use crate::{Change, Condition, Prefix, Store, Txn, TxnOutcome, list};

const WRITERS: u32 = 8;
const INCREMENTS: u32 = 40;

fn number(change: &Change) -> u32 {
    let Change::Put(put) = change else { panic!("the counter is never removed") };
    std::str::from_utf8(put.value.as_bytes()).ok().and_then(|text| text.parse().ok()).expect("a number")
}

pub(super) async fn concurrent_increments_all_count(store: Arc<dyn Store>) {
    let start = put(&*store, "counter", "0").await;
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            let mut revisions = Vec::new();
            let mut current = store.get(key("counter")).await.expect("get").expect("there");
            while revisions.len() < INCREMENTS as usize {
                let count = number(&Change::Put(current.clone())) + 1;
                let own = key(&format!("own/{writer}/{:03}", revisions.len()));
                let txn = Txn::new()
                    .require(key("counter"), Condition::ModRevisionIs(current.mod_revision))
                    .put(key("counter"), value(count.to_string()))
                    .put(own, value(count.to_string()));
                current = match store.txn(txn).await.expect("txn") {
                    TxnOutcome::Committed { revision } => {
                        revisions.push(revision);
                        store.get(key("counter")).await.expect("get").expect("there")
                    }
                    TxnOutcome::Conflict { mut current } => {
                        let newer = current.remove(0).expect("there");
                        assert!(newer.mod_revision > 0);
                        newer
                    }
                };
                // Reads after an answer see at least what was answered.
                assert!(revisions.last().is_none_or(|mine| current.mod_revision >= *mine));
            }
            revisions
        });
    }
    let mut all = BTreeSet::new();
    while let Some(revisions) = writers.join_next().await {
        for revision in revisions.expect("writer") {
            assert!(all.insert(revision), "revision {revision} was given twice");
        }
    }
    let mut watch = store.watch(prefix("counter"), start + 1);
    for (count, revision) in (1..).zip(all) {
        let (at, changes) = changes(&mut watch).await;
        assert_eq!((at, number(&changes[0])), (revision, count));
    }
    let (own, _) = list(&*store, &prefix("own/")).await.expect("list");
    assert_eq!(own.len(), (WRITERS * INCREMENTS) as usize);
}

/// Transactions that a store takes together see each other's changes, deletes too.
pub(super) async fn concurrent_creates_and_deletes_alternate(store: Arc<dyn Store>) {
    let start = put(&*store, "before", "x").await;
    let mut callers = JoinSet::new();
    for caller in 0..2 * WRITERS {
        let store = Arc::clone(&store);
        callers.spawn(async move {
            let mut committed = 0_u32;
            for turn in 0..INCREMENTS {
                let txn = if (caller + turn) % 2 == 0 {
                    Txn::new().require(key("flip"), Condition::Absent).put(key("flip"), value("up"))
                } else {
                    Txn::new().require(key("flip"), Condition::Exists).delete(key("flip"))
                };
                committed += u32::from(store.txn(txn).await.expect("txn").committed().is_some());
            }
            committed
        });
    }
    let mut committed = 0;
    while let Some(count) = callers.join_next().await {
        committed += count.expect("caller");
    }
    assert!(committed > 0);
    let mut watch = store.watch(Prefix::all(), start + 1);
    for i in 0..committed {
        let (revision, changes) = changes(&mut watch).await;
        match &changes[..] {
            [Change::Put(put)] => assert!(i % 2 == 0 && put.version == 1 && put.create_revision == revision, "{i}"),
            [Change::Delete { .. }] => assert!(i % 2 == 1, "{i}"),
            other => panic!("one change each: {other:?}"),
        }
    }
    assert_eq!(store.get(key("flip")).await.expect("get").is_some(), committed % 2 == 1);
}

pub(super) async fn readers_see_whole_transactions(store: Arc<dyn Store>) {
    // One token is handed around; a picture with none or two of them is a torn one.
    commit(&*store, Txn::new().put(key("hold/0"), value("token")).put(key("turn"), value("0"))).await;
    let mover = Arc::clone(&store);
    let moving = tokio::spawn(async move {
        for turn in 0..150 {
            let (from, to) = (turn % 5, (turn + 1) % 5);
            let txn = Txn::new()
                .require(key(&format!("hold/{from}")), Condition::Exists)
                .delete(key(&format!("hold/{from}")))
                .put(key(&format!("hold/{to}")), value("token"));
            commit(&*mover, txn).await;
        }
    });
    let (mut last, mut pictures) = (0, 0_u32);
    while !moving.is_finished() || pictures == 0 {
        let page = store.range(prefix("hold/"), None, 10).await.expect("page");
        assert_eq!(page.items.len(), 1, "at revision {}", page.revision);
        assert!(page.items[0].mod_revision <= page.revision);
        assert!(page.revision >= last, "time does not go back");
        last = page.revision;
        pictures += 1;
    }
    moving.await.expect("mover");
}

pub(super) async fn a_dropped_call_is_all_or_nothing(store: Arc<dyn Store>) {
    for i in 0..40_u64 {
        let txn = Txn::new().put(key(&format!("l/{i}")), value("x")).put(key(&format!("r/{i}")), value("x"));
        let call = store.txn(txn);
        // Polled a little, then dropped.
        tokio::select! {
            biased;
            outcome = call => { outcome.expect("txn"); }
            () = async { for _ in 0..(i % 4) { tokio::task::yield_now().await; } } => {}
        }
    }
    // A later transaction comes after whatever those sent.
    put(&*store, "end", "x").await;
    let (left, _) = list(&*store, &prefix("l/")).await.expect("list");
    let (right, _) = list(&*store, &prefix("r/")).await.expect("list");
    let numbers = |items: &[crate::Versioned]| items.iter().map(|i| i.key.as_str()[2..].to_owned()).collect::<Vec<_>>();
    assert_eq!(numbers(&left), numbers(&right));
    assert!(store.range(Prefix::all(), None, 1).await.is_ok());
}
