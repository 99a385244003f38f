//! The controller's state in etcd 3.4 or newer: [`EtcdStore`], a [`Store`](supercloud_store::Store).
//!
//! The mapping is almost one to one, because the trait follows etcd's model:
//!
//! * A key `k` is kept at `namespace/k`. Other programs may use the same etcd beside the namespace; they move the revision too.
//! * A transaction is one etcd `Txn`: compares, puts and deletes on success, linearizable reads of the compared keys
//!   otherwise.
//! * etcd accepts a watch from the compacted revision itself, though deletes at that revision are gone. So each watch
//!   starts one revision early and drops what it did not ask for: then etcd refuses exactly when something is missing.
//! * A transaction's request that breaks after it may have left this machine is reported as an unknown outcome.
//!
//! etcd answers a write after its quorum has synced it, so the trait's promise of durability is etcd's. History is
//! bounded by [`compact`](supercloud_store::Store::compact) or by etcd's own `--auto-compaction-retention`. Keep etcd's
//! default limits (`--max-txn-ops` 128, `--max-request-bytes` 1.5 MiB) or raise them.
#![forbid(unsafe_code)]

mod connect;
mod fault;
mod store;
mod translate;
mod watch;

pub use connect::{EtcdOptions, EtcdTls, MIN_CALL_BUDGET};
pub use store::EtcdStore;
