//! A frozen guest that runs before its memory is here: it lies in blocks, wherever the caller has them, and follows while the guest runs.
//!
//! Device state comes first; then the guest stands still ([`crate::backend::PauseReason::Arrived`]) as after [`crate::Backend::thaw`], with all
//! of its memory missing, as after a move that has left it behind ([`crate::PostCopy`]). Until nothing is missing, what the blocks are made
//! of is a needed copy, and nobody may remove it.

use std::{fmt, io, sync::Arc};

use supercloud_ids::GuestId;

use crate::{
    Launch,
    backend::{BackendResult, BoxFuture, GuestInfo},
    migrate::Transfer,
};

/// What a block of a frozen guest has, in bytes.
pub const FROZEN_BLOCK_BYTES: u64 = 64 << 10;

/// A frozen guest, block by block: what [`crate::Backend::freeze`] or a checkpoint has written, and somebody has stored.
pub trait FrozenBlocks: Send + Sync + fmt::Debug {
    /// The length of what was written, in bytes.
    fn bytes(&self) -> u64;

    /// Whether a block, from 0, is known to be zeros without its being read.
    fn is_hole(&self, block: u64) -> bool;

    /// Reads a block, whole; the last one may be filled up with zeros. It is what was written, or an error: an answer that was changed is
    /// never given. As long as it takes; who does not want it any more drops it.
    fn read(&self, block: u64) -> BoxFuture<'_, io::Result<Vec<u8>>>;
}

/// Thaws that fetch memory while the guest runs.
pub trait LazyThaw: Send + Sync {
    /// Whether guests can be thawed so at this host.
    ///
    /// # Errors
    /// [`crate::BackendError::Unsupported`], by name: what the host lacks.
    fn offers(&self) -> BackendResult<()>;

    /// Whether what was frozen in this format can be, too.
    ///
    /// # Errors
    /// [`crate::BackendError::Unsupported`], by name.
    fn takes(&self, format: &str) -> BackendResult<()>;

    /// Brings a frozen guest back without its memory. It stands still until [`crate::Backend::resume`].
    fn thaw_lazily(
        &self,
        launch: Launch,
        image: Arc<dyn FrozenBlocks>,
        format: String,
    ) -> BoxFuture<'_, BackendResult<GuestInfo>>;

    /// Whether the guest came by [`LazyThaw::thaw_lazily`] and nobody has heard yet that nothing is missing; also by another agent's.
    ///
    /// # Errors
    /// When the guest is not here.
    fn is_lazy(&self, guest: GuestId) -> BackendResult<bool>;

    /// Fetches its memory out of the same image, before or after it runs, also by another agent than the one that thawed. What somebody
    /// waits for comes first. A call while another one goes on takes its place.
    ///
    /// [`Transfer::done`] resolves with `Ok` when nothing is missing any more, and with an error when it cannot go on; then it can be
    /// called again. A block that cannot be had is tried again and again, and is no error.
    ///
    /// # Errors
    /// At once when the guest is not here.
    fn fetch(&self, guest: GuestId, image: Arc<dyn FrozenBlocks>) -> BackendResult<Transfer<()>>;
}
