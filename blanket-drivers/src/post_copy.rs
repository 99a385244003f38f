//! Memory that a move has left behind, fetched while the guest runs at the destination.
//!
//! ```text
//!   source agent                                      destination agent
//!   ------------                                      -----------------
//!   LiveMigration::perform -> left_bytes > 0          LiveMigration::complete
//!        |                                                 |  <-- the caller's decision -->
//!   serve_memory(guest, stream) <==== both ways ====> fetch_memory(guest, stream), Backend::resume
//!        |  answers requests, sends the rest               |  missing_bytes falls
//!   Ok: all of it is acknowledged (may be lost)       Ok: nothing is missing: Release
//!   LiveMigration::confirm(guest, Release)
//! ```
//!
//! A page that the guest touches and that is missing is asked for before all others; who touched it waits. The rest is sent in the
//! meantime. Both sides outlive their agents: a connection that breaks ends both calls with an error, and what is missing waits
//! until both are made again, by whichever agent, as often as it takes. No page is lost by that, and none comes in an older version.
//!
//! The guest is lost when the source's process is, while something is missing: the destination's faults then wait for ever, and
//! only [`crate::Backend::stop`] is sure to end that. A guest of which memory is missing cannot be moved, frozen, mirrored or
//! paused, and is refused that by name. It can be stopped, reset and switched off: a reset needs nothing of the old memory, so that
//! nothing is missing after it; but it waits for who waits for a page, and so may never come to pass when the source is lost.
//!
//! That nothing is missing at the destination, as [`PostCopy::fetch_memory`] or [`PostCopy::missing_bytes`] says, is enough for
//! `Release`. The source's `Ok` need not come: when the connection breaks at its end, nobody is there to tell it, then or later.

use std::path::PathBuf;

use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{backend::BackendResult, migrate::Transfer};

/// Both halves of fetching memory after a move.
pub trait PostCopy: Send + Sync {
    /// Source, after [`crate::LiveMigration::perform`] has resolved with something left behind, also by another agent than the one
    /// that performed: connects to the unix socket `stream`, on which the caller listens and which it bridges, both ways, to the
    /// destination's. Answers requests for pages, and sends the others. A call while another one goes on takes its place.
    ///
    /// [`Transfer::done`] resolves with `Ok` when the destination says that it has all, and with an error when the connection breaks;
    /// then it can be called again, as long as something is missing. Until `confirm` the source stays paused and complete: after `Keep` it runs on, and serves
    /// nothing any more.
    ///
    /// # Errors
    /// At once when the guest is not here; that nothing of it was left behind comes from `done`.
    fn serve_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>>;

    /// Destination, after [`crate::LiveMigration::complete`], before or after [`crate::Backend::resume`]: listens on the unix socket
    /// `stream`, which the back end makes before this returns and to which the caller connects once, bridging it to the source's.
    ///
    /// [`Transfer::done`] resolves with `Ok` when nothing is missing any more (at once if nothing was), and with an error when the
    /// connection breaks; what the guest wants of what is missing then waits until it is called again. Dropping it is no end of
    /// fetching over a connection that was made.
    ///
    /// # Errors
    /// At once when the guest is not here or the socket cannot be made.
    fn fetch_memory(&self, guest: GuestId, stream: PathBuf) -> BackendResult<Transfer<()>>;

    /// Destination: how much of its memory is missing. It only falls.
    ///
    /// # Errors
    /// When the guest is not here.
    fn missing_bytes(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>>;
}
