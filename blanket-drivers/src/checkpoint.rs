//! A running guest in a file, as it was at one instant, while it runs on.
//!
//! Memory is copied in rounds while the guest runs; then it stands still for a moment, in which all of its disks are cut
//! ([`Checkpointed::cut`]): what a volume has by that number is of the same instant as memory and devices in the file. Memory that did
//! not change lies as the same blocks of 64 KiB in the next file.
//!
//! Nothing waits for a checkpoint: a move, a freeze or a mirror that is begun meanwhile ends it at once, and so does the guest's end. The
//! file is thawed as a frozen guest's ([`crate::Backend::thaw`]), as often as one likes.

use std::{path::PathBuf, time::Duration};

use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::backend::{BackendResult, BoxFuture};

/// How far a checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckpointProgress {
    /// Guest memory in all, in bytes.
    pub memory_total_bytes: u64,
    /// Of the round that goes on, what is left, in bytes.
    pub memory_remaining_bytes: u64,
}

/// A checkpoint that is whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpointed {
    /// What reads the file: for [`crate::Backend::thaw`].
    pub format: String,
    /// The file's length.
    pub bytes: u64,
    /// The number by which the disks were cut.
    pub cut: u64,
    /// For how long the guest stood still.
    pub stood_still: Duration,
}

/// A checkpoint that is being taken: watch it, await its end. Dropping `done` gives it up, soon if not at once; the file is then whoever
/// asked for it's to remove.
pub struct CheckpointRun {
    /// How far it is; moves only while `done` is polled.
    pub progress: watch::Receiver<CheckpointProgress>,
    /// Resolves when it is whole, or with why it is none.
    pub done: BoxFuture<'static, BackendResult<Checkpointed>>,
}

/// Checkpoints of running guests.
pub trait Checkpointing: Send + Sync {
    /// Takes one into a new file. Whatever becomes of it, the guest runs on. Its volumes must not have been cut before under the numbers
    /// that come (1 and above).
    ///
    /// # Errors
    /// At once when the guest is not here; later errors come from [`CheckpointRun::done`]: it does not run, is mirrored or on its way,
    /// or another checkpoint of it is being taken.
    fn checkpoint(&self, guest: GuestId, file: PathBuf) -> BackendResult<CheckpointRun>;
}
