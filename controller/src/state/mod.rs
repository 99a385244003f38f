//! The controller's durable state: typed records over the [`Store`](supercloud_store::Store), changed by [`Change`]s only.
//!
//! # Keys
//!
//! | key | value |
//! |---|---|
//! | `format` | version of this layout |
//! | `clouds/<id>` | [`Cloud`](supercloud_api::Cloud) |
//! | `hosts/<id>` | [`HostRecord`] |
//! | `host-index/<4-digit n>` | id of the host that has this overlay index |
//! | `projects/<id>` | [`ProjectRecord`]: with its sealed key |
//! | `tokens/<id>` | [`TokenRecord`] |
//! | `token-secrets/<sha256 of the secret>` | id of the token |
//! | `images/<id>` | [`Image`](supercloud_api::Image) |
//! | `volumes/<id>` | [`Volume`](supercloud_api::Volume) |
//! | `groups/<id>` | [`Group`](supercloud_api::Group) |
//! | `networks/<id>` | [`Network`](supercloud_api::Network) |
//! | `vni/<8-digit n>` | id of the network that has this number |
//! | `ports/<id>` | [`Port`](supercloud_api::Port) |
//! | `addresses/<network>/<ip>` | id of the port that has this address |
//! | `macs/<mac>` | id of the port that has this hardware address |
//! | `guests/<id>` | [`GuestRecord`]: with its ownership record |
//! | `accepted-marks/<seq>-<hash>` | [`AcceptedMark`]: of another history; it does not stop sweeps |
//! | `deleted-guests/<id>` | [`DeletedGuest`]: what hosts still have of it may go |
//! | `guest-seeds/<id>` | [`GuestSeed`]: cloud-init user-data, kernel arguments |
//! | `freezes/<id>` | [`Freeze`](supercloud_api::Freeze) |
//! | `operations/<id>` | [`OperationRecord`] |
//! | `active-operations/<id>` | (empty) for each operation that has not ended |
//! | `plans/<id>` | [`PlanRecord`] |
//! | `active-plans/<id>` | (empty) for each plan of which something begins by itself |
//! | `names/<project or ->/<kind>/<name>` | id of the resource of this name |
//! | `guards/<what>/<id>` | (counter) touched by changes that must not happen at once, see [`Change::guard`] |
//! | `join/<sha256 of the secret>` | [`JoinRecord`] |
//! | `rentings/<id>` | [`RentingRecord`]: with its sealed join secret |
//! | `ledger-stays/<host>/<end>-...`, `ledger-tenancies/<host>`, `ledger-egress/<time>-<operation>` | facts of the [ledger](crate::ledger) |
//! | `ledger-markets/<market>`, `ledger-prices/<market>/<time>`, `ledger-clock/now` | prices and times that the ledger has seen |
//! | `idempotency/<token>/<hash of the key>` | [`AnswerRecord`], for 24 hours |
//! | `events/<20-digit seq>` | [`Event`](supercloud_api::Event) |
//! | `events-head` | seq and hash of the newest event |
//!
//! # Changing
//!
//! ```text
//!   read records (each with its revision) -> decide -> Change { compares, puts, deletes, events } -> State::commit
//! ```
//! [`State::commit`] makes ONE store transaction of it, which also appends the events to the hash chain. If a record has
//! changed since it was read the whole change is refused with [`StateError::Conflict`]: read again, decide again
//! ([`retry_conflicts`] does the loop). Every change carries a [`Context`]: who, by which request.
//!
//! WHEN ADDING A RECORD: a row above, a [`Record`] impl, and if its name is unique a [`Named`] impl.

mod change;
mod error;
mod event;
mod fleet;
mod follow;
pub mod keys;
mod live;
mod named;
mod record;

use std::sync::{Arc, atomic::AtomicU64};

use supercloud_api::Event;
use supercloud_store::{Key, Prefix, Store, Versioned};
use tokio::sync::Mutex;

use crate::ledger::Book;

pub use change::{Answer, AsConflict, Change, Committed, Context, IdempotencyClaim, retry_conflicts};
pub use error::StateError;
pub use event::{EventDraft, Head, verify_chain};
pub use fleet::{Fleet, Usage};
pub use follow::{Follower, Seen};
pub use live::{LiveHost, LiveHosts};
pub use named::Named;
pub use record::{
    AcceptedMark, AnswerRecord, DeletedGuest, GuestRecord, GuestSeed, HostRecord, JoinRecord, OperationRecord,
    PlanRecord, ProjectRecord, Record, RentingRecord, TokenRecord, Work,
};

/// About how many records one page of [`State::page_back`] looks at.
const LOOKED_AT_MOST: usize = 5000;
/// The version of the layout that this program writes.
const FORMAT: &str = "1";

/// A record as it was read: its value and the revision at which it was last changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<T> {
    /// The record.
    pub value: T,
    /// Revision of its last change: what a change compares, and its `ETag`.
    pub revision: u64,
}

impl<T> std::ops::Deref for Stored<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

/// The state. Cheap to clone.
#[derive(Clone)]
pub struct State {
    store: Arc<dyn Store>,
    /// The newest event as far as this process knows. The lock puts this process's changes in a row, so that they do
    /// not fight for the chain's head.
    head: Arc<Mutex<Option<event::KnownHead>>>,
    /// Stamps and prices what goes into the ledger.
    book: Book,
    /// Revision of the newest change that this process has made.
    committed: Arc<AtomicU64>,
    /// What placements look at.
    fleet: Arc<fleet::KeptFleet>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("State(..)")
    }
}

pub(crate) fn decode<T: serde::de::DeserializeOwned>(found: &Versioned) -> Result<T, StateError> {
    serde_json::from_slice(found.value.as_bytes())
        .map_err(|source| StateError::Damaged { key: found.key.to_string(), source })
}

fn stored<T: Record>(found: &Versioned) -> Result<Stored<T>, StateError> {
    Ok(Stored { value: decode(found)?, revision: found.mod_revision })
}

impl State {
    /// The state in a store; marks an empty store with the layout's version and refuses one of another version.
    ///
    /// # Errors
    /// When the store does not answer, or was written by a newer program.
    pub async fn open(store: Arc<dyn Store>) -> Result<Self, StateError> {
        let key = keys::format();
        let found = match store.get(key.clone()).await? {
            Some(found) => found.value,
            None => {
                let value = supercloud_store::Value::new(FORMAT)?;
                let txn = supercloud_store::Txn::new()
                    .require(key.clone(), supercloud_store::Condition::Absent)
                    .put(key, value.clone());
                store.txn(txn).await?;
                value
            }
        };
        if found.as_bytes() != FORMAT.as_bytes() {
            return Err(StateError::Format(String::from_utf8_lossy(found.as_bytes()).chars().take(16).collect()));
        }
        Ok(Self {
            store,
            head: Arc::default(),
            book: Book::default(),
            committed: Arc::default(),
            fleet: Arc::default(),
        })
    }

    /// The store below.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// What stamps and prices the ledger's entries.
    #[must_use]
    pub const fn book(&self) -> &Book {
        &self.book
    }

    /// Reads a record by its id.
    ///
    /// # Errors
    /// When the store does not answer or the record is damaged.
    pub async fn read<T: Record>(&self, id: &T::Id) -> Result<Option<Stored<T>>, StateError> {
        self.store.get(keys::record::<T>(id)).await?.as_ref().map(stored).transpose()
    }

    /// Reads a record that another record names, so that it must be there.
    ///
    /// # Errors
    /// As [`State::read`]; [`StateError::Missing`] when it is not there.
    pub async fn need<T: Record>(&self, id: &T::Id) -> Result<Stored<T>, StateError> {
        self.read(id).await?.ok_or_else(|| StateError::Missing(keys::record::<T>(id).to_string()))
    }

    /// The text kept at an index key (an id).
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn read_index(&self, key: Key) -> Result<Option<Stored<String>>, StateError> {
        Ok(self.store.get(key).await?.map(|found| Stored {
            value: String::from_utf8_lossy(found.value.as_bytes()).into_owned(),
            revision: found.mod_revision,
        }))
    }

    /// The revision at which a key was last changed; 0: it is absent.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn revision_of(&self, key: Key) -> Result<u64, StateError> {
        Ok(self.store.get(key).await?.map_or(0, |found| found.mod_revision))
    }

    /// All records of a type, in the order of their ids (oldest first).
    ///
    /// # Errors
    /// When the store does not answer or a record is damaged.
    pub async fn list<T: Record>(&self) -> Result<Vec<Stored<T>>, StateError> {
        let (items, _) = supercloud_store::list(&*self.store, &keys::folder(T::FOLDER)).await?;
        items.iter().map(stored).collect()
    }

    /// One page of the records that `keep` keeps, after the one with this id. The second value tells where the next
    /// page starts, if there is one.
    ///
    /// # Errors
    /// When the store does not answer or a record is damaged.
    pub async fn page<T: Record>(
        &self,
        after: Option<&T::Id>,
        limit: usize,
        keep: impl Fn(&T) -> bool,
    ) -> Result<(Vec<Stored<T>>, Option<String>), StateError> {
        let prefix = keys::folder(T::FOLDER);
        let mut after = after.map(keys::record::<T>);
        let mut kept: Vec<Stored<T>> = Vec::new();
        loop {
            let page = self.store.range(prefix.clone(), after, limit.saturating_add(1)).await?;
            for item in &page.items {
                let record = stored::<T>(item)?;
                if !keep(&record.value) {
                    continue;
                }
                if kept.len() == limit {
                    let next = kept.last().map(|last| last.value.id().to_string());
                    return Ok((kept, next));
                }
                kept.push(record);
            }
            if !page.more {
                return Ok((kept, None));
            }
            after = page.items.last().map(|item| item.key.clone());
        }
    }

    /// One page backwards: the newest of the records that `keep` keeps and that are older than the one with this id, the newest
    /// first, until one is `over`. Looks at a bounded number of them: a page can hold fewer than `limit`, or none, and another one
    /// follow all the same. The second value tells where, as with [`State::page`].
    ///
    /// # Errors
    /// When the store does not answer or a record is damaged.
    pub async fn page_back<T: Record>(
        &self,
        before: Option<&T::Id>,
        limit: usize,
        over: impl Fn(&T) -> bool,
        keep: impl Fn(&T) -> bool,
    ) -> Result<(Vec<Stored<T>>, Option<String>), StateError> {
        let prefix = keys::folder(T::FOLDER);
        let mut before = before.map(keys::record::<T>);
        let mut kept: Vec<Stored<T>> = Vec::new();
        let mut looked_at = 0;
        loop {
            let page = self.store.range_back(prefix.clone(), before, supercloud_store::MAX_PAGE_ITEMS).await?;
            let last = page.items.len().saturating_sub(1);
            for (at, item) in page.items.iter().enumerate() {
                let record = stored::<T>(item)?;
                if over(&record.value) {
                    return Ok((kept, None));
                }
                let id = record.value.id().to_string();
                if keep(&record.value) {
                    kept.push(record);
                }
                if kept.len() == limit {
                    return Ok((kept, (page.more || at < last).then_some(id)));
                }
            }
            looked_at += page.items.len();
            before = page.items.last().map(|item| item.key.clone());
            match (page.more, &before) {
                (true, Some(key)) if looked_at >= LOOKED_AT_MOST => {
                    return Ok((kept, key.strip_prefix(&prefix).map(str::to_owned)));
                }
                (true, Some(_)) => {}
                _ => return Ok((kept, None)),
            }
        }
    }

    /// The ids kept below an index prefix, with the rest of each key.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn index(&self, prefix: &Prefix) -> Result<Vec<(String, String)>, StateError> {
        let (items, _) = supercloud_store::list(&*self.store, prefix).await?;
        Ok(items
            .iter()
            .map(|item| {
                let rest = item.key.strip_prefix(prefix).unwrap_or_default().to_owned();
                (rest, String::from_utf8_lossy(item.value.as_bytes()).into_owned())
            })
            .collect())
    }

    /// Ids of the operations that have not ended.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn active_operations(&self) -> Result<Vec<supercloud_api::ids::OperationId>, StateError> {
        let found = self.index(&keys::folder("active-operations")).await?;
        Ok(found.iter().filter_map(|(id, _)| id.parse().ok()).collect())
    }

    /// Up to `limit` events after the number `after`, and whether there are more.
    ///
    /// # Errors
    /// When the store does not answer or an event is damaged.
    pub async fn events(&self, after: u64, limit: usize) -> Result<(Vec<Event>, bool), StateError> {
        let page = self.store.range(keys::folder("events"), Some(keys::event(after)), limit).await?;
        let events = page.items.iter().map(decode).collect::<Result<Vec<Event>, _>>()?;
        Ok((events, page.more))
    }

    /// Number and hash of the newest event.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn head(&self) -> Result<Head, StateError> {
        Ok(event::read_head(&*self.store).await?.head)
    }

    /// The store's revision and implementation; an error when it cannot answer.
    ///
    /// # Errors
    /// When it cannot answer.
    pub async fn health(&self) -> Result<supercloud_store::Health, StateError> {
        Ok(self.store.health().await?)
    }

    /// The project's key, opened with the root key.
    ///
    /// # Errors
    /// When there is no such project, or its key was sealed with another root key.
    pub async fn project_key(
        &self,
        keys: &crate::keys::RootKey,
        project: supercloud_api::ids::ProjectId,
    ) -> Result<[u8; 32], StateError> {
        let record = self.need::<ProjectRecord>(&project).await?;
        let sealed = hex::decode(&record.sealed_key).unwrap_or_default();
        keys.open(&format!("project-key/{project}"), &sealed)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(StateError::Sealed(project))
    }
}

#[cfg(test)]
mod tests;
