//! What can go wrong in a store, and what the caller may do about it.

use std::path::PathBuf;

/// An error of a [`Store`](crate::Store).
///
/// `Display` does not repeat the source; print the chain.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A key or prefix that no store accepts.
    #[error("key '{key}' refused: {reason}")]
    InvalidKey {
        /// The text given, cut to 64 characters.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A value above [`MAX_VALUE_BYTES`](crate::MAX_VALUE_BYTES).
    #[error("value of {bytes} bytes refused: at most {limit} are allowed")]
    ValueTooLarge {
        /// The size given.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A transaction that is too large or contradicts itself.
    #[error("transaction refused: {reason}")]
    InvalidTxn {
        /// What is wrong with it.
        reason: String,
    },
    /// An argument out of range (a page limit of 0, a watch from revision 0, a compaction of the future).
    #[error("argument refused: {reason}")]
    InvalidArgument {
        /// What is wrong with it.
        reason: String,
    },
    /// The store cannot be reached or is too busy. The call changed nothing: it may be repeated as it is.
    #[error("store unavailable ({what})")]
    Unavailable {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Option<BoxError>,
    },
    /// The connection broke, or the deadline passed, after a transaction was sent: it may or may not have happened.
    /// Read before deciding anything (see the crate's docs).
    #[error("outcome of the transaction unknown")]
    UnknownOutcome {
        /// Why it is unknown.
        #[source]
        source: Option<BoxError>,
    },
    /// The store was closed by this process.
    #[error("store is closed")]
    Closed,
    /// Another process has the store open.
    #[error("store {path} is in use by another process")]
    InUse {
        /// The store's folder.
        path: PathBuf,
    },
    /// The store was written by a newer version of this program; nothing was touched.
    #[error("store {path} has format {found}, this program knows up to {known}: use the newer program")]
    NewerFormat {
        /// The store's folder.
        path: PathBuf,
        /// The format found.
        found: u32,
        /// The newest format that this program reads.
        known: u32,
    },
    /// The content of the store is not what was written. Restore a backup; nothing is repaired silently.
    #[error("store {path} is damaged: {reason}")]
    Damaged {
        /// The store's folder or its address.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// Access was refused (credentials, permissions).
    #[error("store refused access ({what})")]
    Denied {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Option<BoxError>,
    },
    /// A failure that a repetition does not cure (a full or broken disk). After a failed flush the store answers nothing
    /// but this until it is opened again, because what the disk holds is then unknown.
    #[error("store failed ({what})")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: Option<BoxError>,
    },
}

/// A boxed cause.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl StoreError {
    /// Whether the same call may simply be repeated after a pause. False for [`StoreError::UnknownOutcome`], where the
    /// caller has to read first.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// Whether the transaction may or may not have happened.
    pub fn is_unknown_outcome(&self) -> bool {
        matches!(self, Self::UnknownOutcome { .. })
    }
}
