//! Random transactions, checked against a map in memory.

use std::{collections::BTreeMap, sync::Arc};

use super::{Rng, changes, key, list_all, prefix, value};
use crate::{Change, Condition, Key, Op, Prefix, Store, Txn, TxnOutcome, Value, Versioned, WatchItem};

/// The trait's promises in the plainest form.
#[derive(Default)]
struct Model {
    entries: BTreeMap<Key, Versioned>,
    history: Vec<(u64, Vec<Change>)>,
}

impl Model {
    /// What the transaction must answer: `None` if it must commit, else the conflict.
    fn conflict(&self, txn: &Txn) -> Option<Vec<Option<Versioned>>> {
        let current: Vec<_> = txn.compares.iter().map(|compare| self.entries.get(&compare.key).cloned()).collect();
        let holds = txn.compares.iter().zip(&current).all(|(compare, has)| compare.condition.holds(has.as_ref()));
        if holds { None } else { Some(current) }
    }

    fn apply(&mut self, revision: u64, txn: &Txn) {
        let mut changes = Vec::new();
        for op in &txn.ops {
            match op {
                Op::Put { key, value } => {
                    let before = self.entries.get(key);
                    let versioned = Versioned {
                        key: key.clone(),
                        value: value.clone(),
                        create_revision: before.map_or(revision, |b| b.create_revision),
                        mod_revision: revision,
                        version: before.map_or(1, |b| b.version + 1),
                    };
                    self.entries.insert(key.clone(), versioned.clone());
                    changes.push(Change::Put(versioned));
                }
                Op::Delete { key } => {
                    if self.entries.remove(key).is_some() {
                        changes.push(Change::Delete { key: key.clone() });
                    }
                }
            }
        }
        changes.sort_by(|a, b| a.key().cmp(b.key()));
        if !changes.is_empty() {
            self.history.push((revision, changes));
        }
    }
}

fn any_key(rng: &mut Rng) -> Key {
    let paths = ["a", "a/1", "a/2", "a/2/x", "a0", "b/1", "b/2", "ü/\u{10ffff}"];
    key(paths[rng.below(paths.len())])
}

fn any_value(rng: &mut Rng) -> Value {
    let sizes = [0, 1, 3, 100, 8191, 8192, 8193, 40_000];
    let byte = rng.bits().to_le_bytes()[0] % 4;
    value(vec![byte; sizes[rng.below(sizes.len())]])
}

fn any_txn(rng: &mut Rng, model: &Model) -> Txn {
    let mut txn = Txn::new();
    for _ in 0..rng.below(4) {
        let at = any_key(rng);
        let current = model.entries.get(&at);
        // Mostly conditions that hold.
        let condition = match (rng.below(6), current) {
            (0, _) => Condition::Exists,
            (1, _) => Condition::Absent,
            (2, _) => Condition::ModRevisionIs(rng.bits() % 40),
            (3, Some(current)) => Condition::ValueIs(current.value.clone()),
            (_, Some(current)) => Condition::ModRevisionIs(current.mod_revision),
            (_, None) => Condition::ModRevisionIs(0),
        };
        txn = txn.require(at, condition);
    }
    for _ in 0..rng.below(5) {
        let at = any_key(rng);
        if txn.ops.iter().any(|op| *op.key() == at) {
            continue;
        }
        txn = if rng.below(3) == 0 { txn.delete(at) } else { txn.put(at, any_value(rng)) };
    }
    txn
}

pub(super) async fn random_transactions_match_the_model(store: Arc<dyn Store>) {
    let mut rng = Rng::from_env("random_transactions_match_the_model", 0x5c10);
    let mut model = Model::default();
    let start = super::revision(&*store).await;
    let (mut last, mut oldest) = (start, start + 1);
    let mut follower = store.watch(Prefix::all(), start + 1);
    let mut followed = 0;
    for step in 0..600 {
        let txn = any_txn(&mut rng, &model);
        match (store.txn(txn.clone()).await.expect("txn"), model.conflict(&txn)) {
            (TxnOutcome::Committed { revision }, None) => {
                let before = model.history.len();
                model.apply(revision, &txn);
                let changed = model.history.len() > before;
                assert!(if changed { revision > last } else { revision == last }, "step {step}: {last}, {revision}");
                last = revision;
            }
            (TxnOutcome::Conflict { current }, Some(expected)) => assert_eq!(current, expected, "step {step}"),
            (outcome, expected) => panic!("step {step}: {outcome:?}, expected conflict: {expected:?}"),
        }
        let at = any_key(&mut rng);
        assert_eq!(store.get(at.clone()).await.expect("get"), model.entries.get(&at).cloned(), "step {step}");
        match rng.below(40) {
            0 => {
                let under = prefix(["", "a", "a/", "b/", "ü/"][rng.below(5)]);
                let expected: Vec<_> = model.entries.values().filter(|e| under.matches(&e.key)).cloned().collect();
                assert_eq!(list_all(&*store, &under, 1 + rng.below(4)).await, expected, "step {step}: {under}");
            }
            1 if last >= oldest => {
                let upto = oldest + rng.bits() % (last - oldest + 1);
                // The follower must have read what goes.
                follow(&mut follower, &model, &mut followed, upto).await;
                store.compact(upto).await.expect("compact");
                oldest = upto + 1;
            }
            2 => replay(&*store, &model, &mut rng, oldest, last).await,
            _ => {}
        }
    }
    follow(&mut follower, &model, &mut followed, last).await;
    assert_eq!(followed, model.history.len());
}

/// Reads the follower up to a revision and compares.
async fn follow(watch: &mut crate::WatchStream, model: &Model, followed: &mut usize, upto: u64) {
    while model.history.get(*followed).is_some_and(|(revision, _)| *revision <= upto) {
        assert_eq!(changes(watch).await, model.history[*followed]);
        *followed += 1;
    }
}

/// A new watch from anywhere shows the rest of the history, or that it is gone.
async fn replay(store: &dyn Store, model: &Model, rng: &mut Rng, oldest: u64, last: u64) {
    let from = 1 + rng.bits() % last;
    let mut watch = store.watch(Prefix::all(), from);
    let expected: Vec<_> = model.history.iter().filter(|(revision, _)| *revision >= from).collect();
    // Nothing was compacted yet, or `from` is after it: complete. Before the model's first revision lies nothing of ours.
    if from >= oldest || model.history.first().is_some_and(|(first, _)| *first >= oldest) {
        for item in expected {
            assert_eq!(&changes(&mut watch).await, item, "from {from}");
        }
    } else {
        let item = super::next(&mut watch).await.expect("an item");
        assert_eq!(item, WatchItem::Compacted { oldest }, "from {from}");
    }
}
