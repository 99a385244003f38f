//! The trait, and what its calls answer.

use std::{future::Future, pin::Pin};

use futures::Stream;

use crate::{Key, Prefix, StoreError, Txn, TxnOutcome, Value};

/// Most items in one page of [`Store::range`].
pub const MAX_PAGE_ITEMS: usize = 1000;
/// A page ends early when its values reach about this size, in bytes; it always holds one item if there is one.
pub const MAX_PAGE_BYTES: usize = 8 << 20;

/// A boxed future, which keeps [`Store`] usable as `dyn Store`.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A watch: items in revision order. After an `Err` or [`WatchItem::Compacted`] it ends.
pub type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchItem, StoreError>> + Send>>;

/// A value with its place and its history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    /// Where it is kept.
    pub key: Key,
    /// What is kept.
    pub value: Value,
    /// The revision at which the key came to be (a delete ends that life).
    pub create_revision: u64,
    /// The revision of the last put.
    pub mod_revision: u64,
    /// Number of puts in this life, from 1.
    pub version: u64,
}

/// One page of [`Store::range`], in key order, or of [`Store::range_back`], in the opposite one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The entries.
    pub items: Vec<Versioned>,
    /// The store's revision of which this page is the picture.
    pub revision: u64,
    /// Whether entries follow: ask again with `after` (`before`) = the last item's key.
    pub more: bool,
}

/// One key's change, as a watch tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The key was set.
    Put(Versioned),
    /// The key was removed.
    Delete {
        /// The key.
        key: Key,
    },
}

impl Change {
    /// The key that changed.
    pub fn key(&self) -> &Key {
        match self {
            Self::Put(versioned) => &versioned.key,
            Self::Delete { key } => key,
        }
    }
}

/// What a watch delivers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchItem {
    /// Everything that one revision changed under the prefix, in key order. Go on later from `revision + 1`.
    Changes {
        /// The revision.
        revision: u64,
        /// The changes, at least one.
        changes: Vec<Change>,
    },
    /// History before `oldest` is gone, and the watch needed it: list again. The stream ends after this.
    Compacted {
        /// The first revision from which a watch is complete.
        oldest: u64,
    },
}

/// What [`Store::health`] tells of a store that works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Which implementation: `sled` or `etcd`.
    pub backend: &'static str,
    /// The current revision.
    pub revision: u64,
    /// Bytes on disk, where known.
    pub size_bytes: Option<u64>,
}

/// A transactional, versioned, watchable map. See the crate's docs for the model.
///
/// Every call has a deadline of its own inside the implementation. Dropping the future of a `txn` does not undo it.
pub trait Store: Send + Sync + 'static {
    /// Runs a transaction. Linearizable: it sees everything that was answered before it began.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, Result<TxnOutcome, StoreError>>;

    /// Reads one key, at the newest revision.
    fn get(&self, key: Key) -> BoxFuture<'_, Result<Option<Versioned>, StoreError>>;

    /// Reads one page of the keys that start with `prefix` and come after `after`, at the newest revision. `limit` is 1 or
    /// more and counts for at most [`MAX_PAGE_ITEMS`]; a page can end earlier ([`MAX_PAGE_BYTES`]): only `more` tells
    /// whether the end is reached.
    fn range(&self, prefix: Prefix, after: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>>;

    /// The same backwards: one page of the keys that start with `prefix` and come before `before`, the last one first.
    fn range_back(&self, prefix: Prefix, before: Option<Key>, limit: usize) -> BoxFuture<'_, Result<Page, StoreError>>;

    /// Follows the changes under `prefix` from `from_revision` (1 or more, may lie in the future) on, that revision
    /// included. Heals broken connections by itself, without a gap or a repetition. The watcher never holds the store
    /// up: one that lags beyond the kept history gets [`WatchItem::Compacted`].
    fn watch(&self, prefix: Prefix, from_revision: u64) -> WatchStream;

    /// Drops the history of `revision` and all before it; a watch from `revision + 1` stays complete. Below what is
    /// already dropped nothing happens; a revision of the future is refused.
    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Checks that the store can answer.
    fn health(&self) -> BoxFuture<'_, Result<Health, StoreError>>;
}

/// All entries under `prefix`, by as many pages as it takes, and the revision after which to watch for what is newer.
///
/// Each page is a consistent picture, the whole is not if it takes several: see "How to follow a prefix" in the
/// crate's docs.
pub async fn list(store: &dyn Store, prefix: &Prefix) -> Result<(Vec<Versioned>, u64), StoreError> {
    let mut page = store.range(prefix.clone(), None, MAX_PAGE_ITEMS).await?;
    let (mut items, revision) = (std::mem::take(&mut page.items), page.revision);
    while page.more {
        let after = items.last().map(|item| item.key.clone());
        page = store.range(prefix.clone(), after, MAX_PAGE_ITEMS).await?;
        items.append(&mut page.items);
    }
    Ok((items, revision))
}
