//! A second copy of a running guest at another host, kept by cuts.
//!
//! Cut n (n = 1, 2, ...) is memory, device state and disks at one instant (after Remus: Cully et al., "Remus: High Availability
//! via Asynchronous Virtual Machine Replication", NSDI 2008).
//!
//! ```text
//!   source agent                                      standby agent
//!   ------------                                      -------------
//!   LiveMigration::begin ------- cookie 1 ------->  LiveMigration::prepare(launch, cookie 1, listen)
//!        |  <------------------- cookie 2 ---------------- |
//!   mirror(guest, cookie 2, stream socket) <=== both ways ===> (standby)
//!        |  first copy, then cut after cut                 |  staged(guest): n
//!        |                                                 |  ... every volume has staged n, too:
//!        |  committed: n  <----------- ack --------------  commit(guest, n)
//!        |                                                 |
//!   end_mirror(guest)                               promote(guest), then Backend::resume or LiveMigration::discard
//! ```
//!
//! The stream is carried **both ways**: acknowledgements come back on it. A standby never runs by itself. One that has committed a cut
//! outlives its agent, though not its stream: nothing more comes to it, and the next agent finds it ([`Mirroring::standing`]). One
//! that has none dies with its agent, as what is only prepared does. What was promoted is as what has come by a move.
//!
//! At a strict mirror no frame leaves the guest's network cards before a cut that has it is acknowledged, and when that does not
//! happen any more (the standby is silent, this agent is another one by now) none leaves until [`Mirroring::end_mirror`]: say so
//! only when the standby can never be promoted. Consoles are not held back.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{
    backend::{BackendError, BackendResult, BoxFuture, GuestInfo},
    migrate::Cookie,
};

/// How a mirror is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorOptions {
    /// From the instant of a cut to that of the next, if that one is through by then.
    pub interval: Duration,
    /// What the guest's network cards send waits until a cut that has it is acknowledged.
    pub is_strict: bool,
    /// At most so many bytes a second; absent: as fast as it goes.
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// How far a mirror is. Numbers of cuts never go back.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MirrorProgress {
    /// The newest cut that was begun; 0 during the first copy.
    pub cut: u64,
    /// The newest one that the standby has committed; 0: none, there is nothing to promote yet.
    pub committed: u64,
    /// How long ago the guest was as the standby has it; 0 as long as it has none.
    pub committed_age_ms: u64,
    /// How long the guest stood still for the last cut.
    pub pause_ms: u64,
    /// Bytes on the stream so far.
    pub sent_bytes: u64,
    /// Guest memory that was written between the last two cuts.
    pub dirty_bytes_last_cut: u64,
    /// Memory in all.
    pub memory_total_bytes: u64,
    /// Memory still to be sent of the first copy's round.
    pub memory_remaining_bytes: u64,
    /// Why it will not go on by itself: the stream is lost, or the standby is silent.
    pub is_broken: Option<String>,
}

/// A mirror that is kept up: watch it, await its end.
///
/// `progress` only moves while `done` is being polled. Dropping `done` does not end the mirror; see [`Mirroring::end_mirror`].
pub struct MirrorRun {
    /// How far it is; the last value stays.
    pub progress: watch::Receiver<MirrorProgress>,
    /// Resolves when it was ended, or with why it is broken. Of a broken one, what a strict one held back is still held back.
    pub done: BoxFuture<'static, BackendResult<()>>,
}

/// What a standby could go on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    /// Nothing.
    Nothing,
    /// This cut, which was committed.
    Committed(u64),
    /// It was promoted.
    Promoted,
}

/// Both halves of a mirror.
pub trait Mirroring: Send + Sync {
    /// Source, after [`crate::LiveMigration::begin`]: copies the guest while it runs and then cut after cut, into the unix socket
    /// `stream`, on which the caller listens and which it bridges, both ways, to the standby's `listen` socket. One connection is
    /// made. The guest runs on whatever comes of it.
    ///
    /// # Errors
    /// At once when the guest is not here or the cookie is not understood; later errors come from [`MirrorRun::done`].
    fn mirror(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: MirrorOptions,
    ) -> BackendResult<MirrorRun>;

    /// Source: ends the mirror, and lets go what was held back. **The caller knows that the standby can never be promoted.**
    /// `Ok` when there is none, and also right for a guest whose agent is another one by now.
    fn end_mirror(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>>;

    /// Whether [`Mirroring::lease`] does something.
    fn takes_leases(&self) -> bool {
        false
    }

    /// Source: the guest runs until this time of the host's boot clock (milliseconds) and then stands still by itself, silent, whoever
    /// is there then, until another call puts the time off; an earlier time than before counts for nothing. `None`: it runs for as long as
    /// it wants, and **the caller knows that the standby can never be promoted**; `Ok` also where there is no such guest.
    fn lease(&self, guest: GuestId, until_ms: Option<u64>) -> BoxFuture<'_, BackendResult<()>> {
        Box::pin(async move {
            match until_ms {
                None => Ok(()),
                Some(_) => {
                    let option = format!("leases (asked for guest {guest})");
                    Err(BackendError::Unsupported { back_end: "this", option })
                }
            }
        })
    }

    /// Standby, after [`crate::LiveMigration::prepare`]: the newest cut that is whole here and was not committed yet, or was; 0:
    /// none.
    ///
    /// # Errors
    /// When the guest is not here.
    fn staged(&self, guest: GuestId) -> BackendResult<watch::Receiver<u64>>;

    /// Standby, also of an agent before: what it could go on from.
    fn standing(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Standing>>;

    /// Standby: takes a staged cut for good, and acknowledges it to the source. `Ok` when it was committed already.
    fn commit(&self, guest: GuestId, cut: u64) -> BoxFuture<'_, BackendResult<()>>;

    /// Standby: makes of the newest committed cut a guest that has come ([`crate::backend::PauseReason::Arrived`]). What was staged
    /// beyond it is dropped, and nothing more is taken from the stream. `Ok` when it was promoted already.
    fn promote(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<GuestInfo>>;
}
