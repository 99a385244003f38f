//! What every [`Store`] must do, as one suite: `run_all(factory)` in the tests of each implementation.
//!
//! The cases assume only what the trait promises; in particular revisions may skip numbers. Each gets a new, empty store and has
//! a generous deadline, so that a hang is a failure. Random cases print their seed; `SUPERCLOUD_SEED` sets it.

mod basics;
mod concurrency;
mod model;
mod ranges;
mod watches;

use std::{sync::Arc, time::Duration};

use futures::StreamExt;

use crate::{BoxFuture, Change, Key, Prefix, Store, StoreError, Txn, TxnOutcome, Value, WatchItem, WatchStream};

/// Longest run of one case.
const CASE_BUDGET: Duration = Duration::from_secs(180);
/// Longest wait for one item of a watch.
const ITEM_BUDGET: Duration = Duration::from_secs(30);

/// A case of the suite.
pub struct Case {
    /// Its name, a sentence.
    pub name: &'static str,
    /// Runs it on an empty store; panics if the store fails it.
    pub run: fn(Arc<dyn Store>) -> BoxFuture<'static, ()>,
}

macro_rules! cases {
    ($($module:ident :: $name:ident),* $(,)?) => {
        /// All cases.
        pub const CASES: &[Case] = &[$(Case { name: stringify!($name), run: |store| Box::pin($module::$name(store)) }),*];
    };
}

cases! {
    basics::an_empty_store_answers,
    basics::puts_and_deletes_are_versioned,
    basics::a_transaction_is_one_revision,
    basics::conditions_decide,
    basics::a_conflict_tells_what_is_there_and_changes_nothing,
    basics::what_changes_nothing_keeps_the_revision,
    basics::a_hundred_operations_fit_and_no_more,
    basics::values_of_a_mebibyte_fit_and_no_more,
    basics::bad_arguments_are_refused,
    ranges::pages_cover_everything_once,
    ranges::after_need_not_exist,
    ranges::pages_go_back_as_they_go_on,
    ranges::large_values_are_paged,
    ranges::prefixes_are_bytes,
    watches::a_watch_replays_and_follows,
    watches::a_watch_resumes_without_gap_or_repetition,
    watches::a_watch_sees_its_prefix_only,
    watches::a_watch_may_start_in_the_future,
    watches::a_long_history_with_large_values_arrives,
    watches::compaction_is_told,
    watches::compaction_keeps_current_values,
    watches::a_lagging_watch_has_no_silent_gap,
    concurrency::concurrent_increments_all_count,
    concurrency::concurrent_creates_and_deletes_alternate,
    concurrency::readers_see_whole_transactions,
    concurrency::a_dropped_call_is_all_or_nothing,
    model::random_transactions_match_the_model,
}

/// Runs every case on a store of its own.
///
/// # Panics
/// If a case fails; the case is printed before it starts.
pub async fn run_all<F>(make: F)
where
    F: Fn() -> BoxFuture<'static, Arc<dyn Store>>,
{
    for case in CASES {
        println!("conformance: {}", case.name);
        let store = make().await;
        let run = tokio::time::timeout(CASE_BUDGET, (case.run)(store));
        assert!(run.await.is_ok(), "{} takes more than {CASE_BUDGET:?}", case.name);
    }
}

/// A small deterministic generator (SplitMix64, Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator from `SUPERCLOUD_SEED`, or from `default`; prints the seed.
    ///
    /// # Panics
    /// If `SUPERCLOUD_SEED` is set to no number.
    pub fn from_env(what: &str, default: u64) -> Self {
        let seed = match std::env::var("SUPERCLOUD_SEED") {
            Ok(text) => text.parse().expect("SUPERCLOUD_SEED is a number"),
            Err(_) => default,
        };
        println!("{what}: SUPERCLOUD_SEED={seed}");
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.bits() % n as u64).unwrap_or(0)
    }
}

fn key(path: &str) -> Key {
    Key::new(path).expect("the suite's keys are valid")
}

fn prefix(text: &str) -> Prefix {
    Prefix::new(text).expect("the suite's prefixes are valid")
}

fn value(bytes: impl Into<Vec<u8>>) -> Value {
    Value::new(bytes.into()).expect("the suite's values fit")
}

/// A value of `len` bytes that are not all alike.
fn large(len: usize, salt: u8) -> Value {
    let bytes: Vec<u8> = (0..len).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1] ^ salt).collect();
    value(bytes)
}

async fn commit(store: &dyn Store, txn: Txn) -> u64 {
    match store.txn(txn).await {
        Ok(TxnOutcome::Committed { revision }) => revision,
        other => panic!("the transaction should commit, but: {other:?}"),
    }
}

async fn put(store: &dyn Store, path: &str, bytes: &str) -> u64 {
    commit(store, Txn::new().put(key(path), value(bytes))).await
}

async fn delete(store: &dyn Store, path: &str) -> u64 {
    commit(store, Txn::new().delete(key(path))).await
}

async fn revision(store: &dyn Store) -> u64 {
    store.range(Prefix::all(), None, 1).await.expect("a page").revision
}

async fn next(watch: &mut WatchStream) -> Result<WatchItem, StoreError> {
    let item = tokio::time::timeout(ITEM_BUDGET, watch.next()).await;
    item.expect("the watch should deliver").expect("the watch should not end")
}

async fn changes(watch: &mut WatchStream) -> (u64, Vec<Change>) {
    match next(watch).await {
        Ok(WatchItem::Changes { revision, changes }) => (revision, changes),
        other => panic!("the watch should tell changes, but: {other:?}"),
    }
}

/// A change in few words: `+path=value` or `-path`.
fn brief(change: &Change) -> String {
    match change {
        Change::Put(put) => format!("+{}={}", put.key, String::from_utf8_lossy(put.value.as_bytes())),
        Change::Delete { key } => format!("-{key}"),
    }
}

async fn brief_changes(watch: &mut WatchStream) -> (u64, String) {
    let (revision, changes) = changes(watch).await;
    (revision, changes.iter().map(brief).collect::<Vec<_>>().join(" "))
}

async fn list_keys(store: &dyn Store) -> Vec<String> {
    let (items, _) = crate::list(store, &Prefix::all()).await.expect("list");
    items.into_iter().map(|item| item.key.as_str().to_owned()).collect()
}

/// Everything under a prefix by pages of `limit`.
async fn list_all(store: &dyn Store, under: &Prefix, limit: usize) -> Vec<crate::Versioned> {
    let mut items: Vec<crate::Versioned> = Vec::new();
    loop {
        let after = items.last().map(|item| item.key.clone());
        let page = store.range(under.clone(), after, limit).await.expect("page");
        items.extend(page.items);
        if !page.more {
            return items;
        }
    }
}
