//! Transactions, conditions, limits.

use std::sync::Arc;

use super::{commit, delete, key, large, put, revision, value};
use crate::{
    Condition, Key, MAX_TXN_OPS, MAX_VALUE_BYTES, Prefix, Store, StoreError, Txn, TxnOutcome, Value, Versioned,
    WatchItem, list,
};

pub(super) async fn an_empty_store_answers(store: Arc<dyn Store>) {
    assert_eq!(store.get(key("a")).await.expect("get"), None);
    let page = store.range(Prefix::all(), None, 10).await.expect("range");
    assert!(page.items.is_empty() && !page.more);
    assert!(page.revision >= 1);
    let health = store.health().await.expect("health");
    assert!(health.revision >= page.revision);
}

pub(super) async fn puts_and_deletes_are_versioned(store: Arc<dyn Store>) {
    let first = put(&*store, "a/b", "1").await;
    let second = put(&*store, "a/b", "2").await;
    assert!(second > first);
    let found = store.get(key("a/b")).await.expect("get").expect("it is there");
    let expected = |value_text: &str, create_revision, mod_revision, version| Versioned {
        key: key("a/b"),
        value: value(value_text),
        create_revision,
        mod_revision,
        version,
    };
    assert_eq!(found, expected("2", first, second, 2));
    let gone = delete(&*store, "a/b").await;
    assert!(gone > second);
    assert_eq!(store.get(key("a/b")).await.expect("get"), None);
    let again = put(&*store, "a/b", "").await;
    let found = store.get(key("a/b")).await.expect("get").expect("it is there");
    assert_eq!(found, expected("", again, again, 1));
}

pub(super) async fn a_transaction_is_one_revision(store: Arc<dyn Store>) {
    put(&*store, "old", "x").await;
    let txn = Txn::new().put(key("b"), value("2")).put(key("a"), value("1")).delete(key("old"));
    let revision = commit(&*store, txn).await;
    let (items, at) = list(&*store, &Prefix::all()).await.expect("list");
    assert!(at >= revision);
    assert_eq!(items.iter().map(|item| item.key.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert!(items.iter().all(|item| item.mod_revision == revision && item.create_revision == revision));
    let mut watch = store.watch(Prefix::all(), revision);
    assert_eq!(super::brief_changes(&mut watch).await, (revision, "+a=1 +b=2 -old".to_owned()));
}

pub(super) async fn conditions_decide(store: Arc<dyn Store>) {
    put(&*store, "there", "v").await;
    let changed = put(&*store, "there", "w").await;
    let cases = [
        ("there", Condition::Exists, true),
        ("there", Condition::Absent, false),
        ("there", Condition::ModRevisionIs(changed), true),
        ("there", Condition::ModRevisionIs(changed - 1), false),
        ("there", Condition::ModRevisionIs(changed + 1), false),
        ("there", Condition::ModRevisionIs(0), false),
        ("there", Condition::ModRevisionIs(u64::MAX), false),
        ("there", Condition::ValueIs(value("w")), true),
        ("there", Condition::ValueIs(value("v")), false),
        ("there", Condition::ValueIs(value("")), false),
        ("nowhere", Condition::Exists, false),
        ("nowhere", Condition::Absent, true),
        ("nowhere", Condition::ModRevisionIs(0), true),
        ("nowhere", Condition::ModRevisionIs(changed), false),
        ("nowhere", Condition::ValueIs(value("")), false),
    ];
    for (at, condition, holds) in cases {
        let txn = Txn::new().require(key(at), condition.clone()).put(key("mark"), value("m"));
        let outcome = store.txn(txn).await.expect("txn");
        assert_eq!(outcome.committed().is_some(), holds, "{at}: {condition:?}");
    }
    // All must hold, in every place of the list.
    for failing in 0..3 {
        let txn = (0..3).fold(Txn::new(), |txn, i| {
            txn.require(key("there"), if i == failing { Condition::Absent } else { Condition::Exists })
        });
        assert_eq!(store.txn(txn).await.expect("txn").committed(), None, "compare {failing} fails");
    }
}

pub(super) async fn a_conflict_tells_what_is_there_and_changes_nothing(store: Arc<dyn Store>) {
    put(&*store, "a", "1").await;
    put(&*store, "b", "2").await;
    let before = list(&*store, &Prefix::all()).await.expect("list");
    let txn = Txn::new()
        .require(key("b"), Condition::Exists)
        .require(key("none"), Condition::Absent)
        .require(key("a"), Condition::ModRevisionIs(0))
        .require(key("b"), Condition::ValueIs(value("2")))
        .put(key("a"), value("9"))
        .put(key("new"), value("9"))
        .delete(key("b"));
    match store.txn(txn).await.expect("txn") {
        TxnOutcome::Conflict { current } => {
            let a = store.get(key("a")).await.expect("get");
            let b = store.get(key("b")).await.expect("get");
            assert_eq!(current, [b.clone(), None, a, b]);
        }
        committed @ TxnOutcome::Committed { .. } => panic!("should conflict: {committed:?}"),
    }
    assert_eq!(list(&*store, &Prefix::all()).await.expect("list"), before);
}

pub(super) async fn what_changes_nothing_keeps_the_revision(store: Arc<dyn Store>) {
    let before = put(&*store, "a", "1").await;
    assert_eq!(commit(&*store, Txn::new()).await, before);
    assert_eq!(delete(&*store, "none").await, before);
    assert_eq!(commit(&*store, Txn::new().require(key("a"), Condition::Exists)).await, before);
    assert_eq!(revision(&*store).await, before);
    // The same value again is a change.
    let again = put(&*store, "a", "1").await;
    assert!(again > before);
    // A delete of nothing beside a put tells of the put only.
    let both = commit(&*store, Txn::new().delete(key("none")).put(key("b"), value("2"))).await;
    let mut watch = store.watch(Prefix::all(), before + 1);
    assert_eq!(super::brief_changes(&mut watch).await, (again, "+a=1".to_owned()));
    assert_eq!(super::brief_changes(&mut watch).await, (both, "+b=2".to_owned()));
}

pub(super) async fn a_hundred_operations_fit_and_no_more(store: Arc<dyn Store>) {
    let path = |i: usize| {
        let name = format!("{i:04}/");
        Key::new(format!("{name}{}", "k".repeat(crate::MAX_KEY_BYTES - name.len()))).expect("valid")
    };
    let puts = |n| (0..n).fold(Txn::new(), |txn, i| txn.put(path(i), value([b'v'; 100])));
    let full = (0..MAX_TXN_OPS).fold(puts(MAX_TXN_OPS), |txn, i| txn.require(path(i), Condition::Absent));
    let revision = commit(&*store, full.clone()).await;
    let (items, _) = list(&*store, &Prefix::all()).await.expect("list");
    assert_eq!(items.len(), MAX_TXN_OPS);
    match store.txn(full).await.expect("txn") {
        TxnOutcome::Conflict { current } => {
            assert_eq!(current.into_iter().flatten().collect::<Vec<_>>(), items);
        }
        committed @ TxnOutcome::Committed { .. } => panic!("should conflict: {committed:?}"),
    }
    match super::next(&mut store.watch(Prefix::all(), revision)).await.expect("an item") {
        WatchItem::Changes { changes, .. } => assert_eq!(changes.len(), MAX_TXN_OPS),
        other @ WatchItem::Compacted { .. } => panic!("nothing was compacted: {other:?}"),
    }
    for refused in [
        puts(MAX_TXN_OPS + 1),
        (0..=MAX_TXN_OPS).fold(Txn::new(), |txn, i| txn.require(path(i), Condition::Exists)),
        Txn::new().put(path(1), value("x")).delete(path(1)),
        Txn::new().put(path(1), value("x")).put(path(1), value("x")),
    ] {
        assert!(matches!(store.txn(refused).await, Err(StoreError::InvalidTxn { .. })));
    }
    assert_eq!(super::revision(&*store).await, revision);
}

pub(super) async fn values_of_a_mebibyte_fit_and_no_more(store: Arc<dyn Store>) {
    let big = large(MAX_VALUE_BYTES, 7);
    let revision = commit(&*store, Txn::new().put(key("big"), big.clone()).put(key("small"), value("s"))).await;
    assert_eq!(store.get(key("big")).await.expect("get").expect("there").value, big);
    let (_, changes) = super::changes(&mut store.watch(Prefix::all(), revision)).await;
    assert!(matches!(&changes[0], crate::Change::Put(put) if put.value == big));
    let txn = Txn::new().require(key("big"), Condition::ValueIs(big.clone())).delete(key("small"));
    commit(&*store, txn).await;
    match store.txn(Txn::new().require(key("big"), Condition::Absent)).await.expect("txn") {
        TxnOutcome::Conflict { current } => assert!(current[0].as_ref().is_some_and(|c| c.value == big)),
        committed @ TxnOutcome::Committed { .. } => panic!("should conflict: {committed:?}"),
    }
    assert!(matches!(Value::new(vec![0; MAX_VALUE_BYTES + 1]), Err(StoreError::ValueTooLarge { .. })));
    let too_much = Txn::new().put(key("x"), big.clone()).put(key("y"), big);
    assert!(matches!(store.txn(too_much).await, Err(StoreError::InvalidTxn { .. })));
    assert_eq!(store.get(key("x")).await.expect("get"), None);
}

pub(super) async fn bad_arguments_are_refused(store: Arc<dyn Store>) {
    assert!(matches!(store.range(Prefix::all(), None, 0).await, Err(StoreError::InvalidArgument { .. })));
    let mut watch = store.watch(Prefix::all(), 0);
    assert!(matches!(super::next(&mut watch).await, Err(StoreError::InvalidArgument { .. })));
    let now = revision(&*store).await;
    for future in [now + 1000, u64::MAX] {
        assert!(matches!(store.compact(future).await, Err(StoreError::InvalidArgument { .. })), "compact {future}");
    }
}
