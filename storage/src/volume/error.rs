//! Why an operation on a volume failed.

use super::{journal::JournalError, publish::POINT_RESERVE_BYTES, remote::FetchError, role::RoleError};
use crate::{manifest::ManifestError, source::ReadError};

/// Why an operation on a volume failed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// The size is none for a volume, or smaller than the base's.
    #[error("{size_bytes} bytes is no size for this volume")]
    Size {
        /// The size.
        size_bytes: u64,
    },
    /// The range reaches beyond the end.
    #[error("{len} bytes at {offset} reach beyond the volume's {size_bytes}")]
    Range {
        /// Where it starts.
        offset: u64,
        /// How long it is.
        len: u64,
        /// The volume's size.
        size_bytes: u64,
    },
    /// The local disk failed.
    #[error("cannot {what}")]
    Disk {
        /// What was done.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The data file does not fit the journal.
    #[error("the data file has {len} bytes, the journal says {expected}")]
    DataFile {
        /// Its length.
        len: u64,
        /// What it should be at least.
        expected: u64,
    },
    /// Something could not be made durable earlier: what was acknowledged since is not safe, so nothing is any more.
    #[error("the volume's disk failed earlier; nothing can be made durable")]
    Failed,
    /// The journal failed.
    #[error("the map journal failed")]
    Journal(#[from] JournalError),
    /// The role or epoch does not allow it.
    #[error("refused")]
    Role(#[from] RoleError),
    /// The base's manifest could not be read.
    #[error("the base cannot be read")]
    Base(#[from] ManifestError),
    /// The source's map is not what was announced.
    #[error("the source's map is not the announced one: {what}")]
    Map {
        /// What differs.
        what: String,
    },
    /// The source could not be asked.
    #[error("the source host's volume process failed")]
    Source(#[from] FetchError),
    /// A chunk of the base could not be read.
    #[error("block {block} of the base cannot be read")]
    BaseBlock {
        /// The block.
        block: u32,
        /// Which chunk and why.
        #[source]
        source: ReadError,
    },
    /// A chunk could not be stored.
    #[error("a chunk cannot be stored")]
    Store(#[from] crate::backend::StoreError),
    /// A cut of a mirror cannot be had.
    #[error("cut {number} {why}")]
    Cut {
        /// Its number.
        number: u64,
        /// What it lacks.
        why: &'static str,
    },
    /// The volume follows no source, or follows one where it must not.
    #[error("the volume {0}")]
    Following(&'static str),
    /// There is nobody to pull blocks from.
    #[error("the volume has no source host to pull blocks from")]
    NoSource,
    /// A point of the history might fill the disk that guests write to.
    #[error(
        "a point may need {needed_bytes} bytes and {POINT_RESERVE_BYTES} must stay free; {free_bytes} are free in the store"
    )]
    NoRoom {
        /// What it may take.
        needed_bytes: u64,
        /// What there is.
        free_bytes: u64,
    },
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[source] tokio::task::JoinError),
}

/// An error with all its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
