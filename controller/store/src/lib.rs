//! The controller's state, behind one trait: [`Store`], in etcd's model.
//!
//! # The model
//!
//! A store maps [`Key`]s to [`Value`]s and has **one global revision**. A transaction that changes anything
//! moves the revision forward; everything it puts and deletes carries that one new revision. A transaction that
//! changes nothing (no operations, or only deletes of absent keys) leaves it. Revisions are strictly
//! increasing, but need not be dense: another tenant of the same etcd uses numbers too. The empty store is at
//! revision 1.
//!
//! * [`Store::txn`]: all compares hold and all operations happen, or nothing happens and the answer is
//!   [`TxnOutcome::Conflict`] with what the compared keys hold. At most [`MAX_TXN_OPS`] operations and as many compares.
//! * [`Store::range`]: one page in key order, a consistent picture at one revision. [`list`] gathers all pages.
//! * [`Store::watch`]: every change under a prefix from a revision on, in order, whole revisions at a time, none
//!   left out: or [`WatchItem::Compacted`] where history was already dropped.
//! * [`Store::compact`]: drops history up to a revision. Current values are never dropped.
//!
//! **No answer before the flush**: what `txn`, `range`, `get` and `watch` report is durable, so nobody can act on a
//! state that a power cut takes back.
//!
//! # How to follow a prefix
//!
//! ```text
//! let (items, revision) = list(store, prefix);  apply(items);
//! loop {
//!     for item in store.watch(prefix, revision + 1) {
//!         Changes { revision: r, changes } => { apply(changes); revision = r }
//!         Compacted { .. }                 => start again at the list
//!     }
//! }
//! ```
//! A list of several pages can show entries that are newer than its revision; the watch then repeats those changes.
//! Apply an entry only if its `mod_revision` is above what is already known.
//!
//! # After a broken connection
//!
//! [`StoreError::UnknownOutcome`] means that a transaction may or may not have happened. Do not send it again
//! blindly: read the keys first. Transactions whose compares exclude a second success (`ModRevisionIs`, `Absent`) are
//! safe to send again: if the first did happen the second answers `Conflict` with what the first wrote.
//!
//! # Keys
//!
//! Keys are paths, `kind/id` or `kind/parent/id`, without a leading or trailing slash: `guests/gst-0192…`,
//! `events/00000000000000001234`. A [`Prefix`] is compared byte by byte, so end it with a slash to mean "children of":
//! `guests` also matches `guests-old/x`. Numbers in keys are zero-padded so that key order is number order.
//! Order is byte order.
//!
//! # Implementations
//!
//! [`SledStore`] here, embedded; `EtcdStore` in `supercloud-store-etcd`. Both pass the same `conformance` suite (feature
//! `conformance`).
#![deny(unsafe_code)]

#[cfg(feature = "conformance")]
pub mod conformance;
mod embedded;
mod error;
mod key;
mod store;
mod txn;

pub use embedded::{SledOptions, SledStore};
pub use error::{BoxError, StoreError};
pub use key::{Key, MAX_KEY_BYTES, MAX_VALUE_BYTES, Prefix, Value};
pub use store::{
    BoxFuture, Change, Health, MAX_PAGE_BYTES, MAX_PAGE_ITEMS, Page, Store, Versioned, WatchItem, WatchStream, list,
};
pub use txn::{Compare, Condition, MAX_TXN_BYTES, MAX_TXN_OPS, Op, Txn, TxnOutcome};
