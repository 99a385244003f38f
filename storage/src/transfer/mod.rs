//! Disk images in and out of the store: raw (holes stay holes) and qcow2.

mod export;
mod import;
pub mod qcow2;

use std::io;

pub use self::{
    export::{Exported, export_raw},
    import::{ImportOptions, Imported, import_image},
};
use crate::{backend::StoreError, chunk::ChunkError, manifest::ManifestError, source::ReadError};

/// The format of a disk image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

/// How far an import or export is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: TransferPhase,
    /// Bytes of the disk done in this phase, holes included.
    pub done_bytes: u64,
    /// Bytes of the disk.
    pub total_bytes: u64,
}

/// The phases of an import or export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransferPhase {
    /// qcow2 is being converted to raw (no byte counts).
    Converting,
    /// Blocks are read, sealed and stored.
    Storing,
    /// Blocks are read from the store and written.
    Writing,
}

/// Why an image could not be imported or exported.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// A file could not be read or written.
    #[error("{what} {path}")]
    File {
        /// What was done.
        what: &'static str,
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is of no known format, or not of the one that was announced.
    #[error("{path} is not a {expected} image")]
    Format {
        /// The file.
        path: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The image's size is zero or above the cap.
    #[error("{path} holds a disk of {size_bytes} bytes; between 1 byte and 2 TiB are possible")]
    Size {
        /// The file.
        path: String,
        /// The disk's size.
        size_bytes: u64,
    },
    /// The qcow2 image uses something that is refused.
    #[error("the image is refused")]
    Qcow2(#[from] qcow2::Qcow2Error),
    /// The converter failed.
    #[error("qemu-img could not convert the image: {message}")]
    Convert {
        /// What it said, or how it ended.
        message: String,
    },
    /// A block could not be sealed.
    #[error("a block cannot be sealed")]
    Seal(#[from] ChunkError),
    /// The store refused a chunk.
    #[error("a block cannot be stored")]
    Store(#[from] StoreError),
    /// The manifest could not be stored or read.
    #[error("the image's manifest failed")]
    Manifest(#[from] ManifestError),
    /// A block could not be read from the store.
    #[error("block {block} cannot be read")]
    Read {
        /// The block.
        block: u32,
        /// Which chunk and why.
        #[source]
        source: ReadError,
    },
    /// The caller cancelled.
    #[error("it was cancelled")]
    Cancelled,
    /// A worker thread died.
    #[error("a worker died")]
    Worker(#[source] tokio::task::JoinError),
}
