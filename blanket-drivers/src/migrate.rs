//! A live move in halves, with the caller's decision in the middle.
//!
//! ```text
//!   source agent                                    destination agent
//!   ------------                                    -----------------
//!   begin(guest) ----------- cookie 1 ------------> prepare(launch, cookie 1, listen)
//!        |  <--------------- cookie 2 ------------------ |
//!   perform(guest, cookie 2, stream socket) ==== memory, device state ====> (incoming)
//!        |  source is PAUSED when it resolves            |
//!        |  ---------------- cookie 3 -----------> complete(guest, cookie 3)
//!        |                                               |  holds everything, PAUSED; outlives its agent
//!        |                                          asks the store for the switch     <-- COMMIT POINT
//!        |                                               |
//!        |        granted:                          Backend::resume(guest, e+1)
//!   confirm(guest, Release)                              |
//!        |        refused:                          discard(guest)
//!   confirm(guest, Keep)
//! ```
//!
//! Until `confirm` the source keeps its paused, complete copy, whatever happens to agents and daemons; until the store
//! has decided neither side runs. `complete` comes before the decision on purpose: what was only *prepared* dies with
//! the destination's agent, what is *complete* does not, so a granted switch can always be rolled forward.

use std::{fmt, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use supercloud_ids::GuestId;
use tokio::sync::watch;

use crate::{
    backend::{BackendError, BackendResult, BoxFuture, GuestInfo},
    host::Launch,
};

/// The largest cookie that is taken from another host.
pub const MAX_COOKIE_BYTES: usize = 256 << 10;

/// What one half of a back end tells its other half; opaque to everybody between.
#[derive(Clone, PartialEq, Eq)]
pub struct Cookie(Vec<u8>);

impl Cookie {
    /// Takes what came from the other host.
    ///
    /// # Errors
    /// [`BackendError::Foreign`] when it is larger than [`MAX_COOKIE_BYTES`].
    pub fn new(bytes: Vec<u8>) -> BackendResult<Self> {
        if bytes.len() > MAX_COOKIE_BYTES {
            let detail = format!("it has {} bytes, at most {MAX_COOKIE_BYTES} are taken", bytes.len());
            return Err(BackendError::Foreign { what: "the cookie", detail });
        }
        Ok(Self(bytes))
    }

    /// What travels.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Cookie {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Cookie({} bytes)", self.0.len())
    }
}

/// Which of a guest's memory is copied before it is paused, and which after it runs at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryMode {
    /// All of it before the guest runs at the destination.
    #[default]
    PreCopy,
    /// Rounds while the guest runs, as in [`MemoryMode::PreCopy`]; where these do not converge, it is paused, and what is still
    /// dirty is left behind, to be fetched by [`crate::PostCopy`] (Hines et al., "Post-Copy Live Migration of Virtual
    /// Machines", SIGOPS Operating Systems Review 43(3), 2009, there with one round).
    Hybrid,
    /// Nothing before the pause: all of it is left behind.
    PostCopy,
}

/// How memory is to be copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOptions {
    /// At most so many bytes a second; absent: as fast as it goes.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The pause that is aimed at.
    pub max_downtime_ms: Option<u64>,
    /// Slow the guest down, if else it would not converge.
    pub auto_converge: bool,
    /// The whole copy is given up (and the guest runs on at the source) after this long.
    pub budget: Duration,
    /// What may be left behind. Refused by name where the back end, at either host, has no [`crate::PostCopy`].
    pub memory: MemoryMode,
    /// The guest shall not be paused before [`CopyLimits::holds`] says so, although it could be: it waits for others. Only where
    /// [`LiveMigration::takes_holds`]; elsewhere, and in a process that is older than that, it is paused as soon as it can be.
    pub holds: bool,
}

impl Default for CopyOptions {
    fn default() -> Self {
        Self {
            bandwidth_bytes_per_s: None,
            max_downtime_ms: None,
            auto_converge: false,
            budget: Duration::from_secs(3600),
            memory: MemoryMode::PreCopy,
            holds: false,
        }
    }
}

/// Limits that can be changed while memory is being copied; absent: left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CopyLimits {
    /// At most so many bytes a second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The pause that is aimed at.
    pub max_downtime_ms: Option<u64>,
    /// Whether the guest still waits with its pause.
    pub holds: Option<bool>,
}

/// Where a transfer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferPhase {
    /// Nothing has gone yet.
    #[default]
    Setup,
    /// Memory goes while the guest runs.
    Copy,
    /// The guest is paused; the last pages and the device state go.
    Drain,
    /// Everything is across.
    Done,
}

/// How far a transfer is, as the hypervisor counts. Phases and totals never go back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TransferProgress {
    /// Where it is.
    pub phase: TransferPhase,
    /// The round over the memory, from 1; 0 before the first.
    pub iteration: u64,
    /// Memory in all.
    pub memory_total_bytes: u64,
    /// Memory sent, repeats included.
    pub memory_processed_bytes: u64,
    /// Memory still to be sent in this round.
    pub memory_remaining_bytes: u64,
    /// How fast the guest dirties memory; 0 in the first round, which cannot know.
    pub dirty_bytes_per_s: u64,
    /// How fast memory travels.
    pub bandwidth_bytes_per_s: u64,
    /// The pause that a switch now would need, as the hypervisor thinks.
    pub expected_downtime_ms: Option<u64>,
    /// The guest could be paused now, and waits for the word ([`CopyOptions::holds`]).
    #[serde(default)]
    pub is_holding: bool,
    /// How much the guest is slowed down, percent.
    pub throttle_percent: u64,
    /// Since the start.
    pub elapsed_ms: u64,
}

/// Work that takes a while: watch it, await it.
///
/// `progress` only moves while `done` is being polled. Dropping `done` does not cancel; see [`LiveMigration::cancel`].
pub struct Transfer<T> {
    /// How far it is; the last value stays.
    pub progress: watch::Receiver<TransferProgress>,
    /// Resolves when it has ended.
    pub done: BoxFuture<'static, BackendResult<T>>,
}

/// The source after its part: paused, nothing held back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Performed {
    /// For [`LiveMigration::complete`].
    pub cookie: Cookie,
    /// How long the guest has been paused by now; the pause began when its last vCPU stopped.
    pub paused_for: Duration,
    /// The last figures.
    pub progress: TransferProgress,
    /// Memory that the destination has still to fetch with [`crate::PostCopy`]; 0 after [`MemoryMode::PreCopy`].
    pub left_bytes: u64,
}

/// What becomes of the source's paused copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The switch was refused for good: it runs again here.
    Keep,
    /// The destination owns the guest: this copy is destroyed.
    Release,
}

/// Both halves of a live move.
pub trait LiveMigration: Send + Sync {
    /// Source: describes the running guest for the destination, and protects it against changes. End it with
    /// [`LiveMigration::confirm`] in every case.
    fn begin(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Cookie>>;

    /// Source: copies memory and device state into the unix socket `stream`, on which the caller listens and which it
    /// bridges to the destination's `listen` socket. One connection is made. On `Ok` the guest is paused here and
    /// nothing is missing there but [`Performed::left_bytes`]; on an error it runs on here.
    ///
    /// The caller closes its end when its link to the other host is silent: the hypervisor itself has no timeout there.
    ///
    /// # Errors
    /// At once when the path or the options cannot be used; later errors come from `done`.
    fn perform(
        &self,
        guest: GuestId,
        cookie: Cookie,
        stream: PathBuf,
        options: CopyOptions,
    ) -> BackendResult<Transfer<Performed>>;

    /// Source: changes limits while [`LiveMigration::perform`] runs.
    fn set_limits(&self, guest: GuestId, limits: CopyLimits) -> BoxFuture<'_, BackendResult<()>>;

    /// Whether a copy can wait with the guest's pause until it is told ([`CopyOptions::holds`]).
    fn takes_holds(&self) -> bool {
        false
    }

    /// Source: gives the copy up; `done` resolves with [`BackendError::Cancelled`] and the guest runs on. `Ok` when
    /// nothing is being copied (any more): then only [`LiveMigration::confirm`] decides.
    fn cancel(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>>;

    /// Source: ends the move. Idempotent, and right after any crash of the agent or the daemon between.
    fn confirm(&self, guest: GuestId, verdict: Verdict) -> BoxFuture<'_, BackendResult<()>>;

    /// Destination: makes the machine, waiting for a stream on the unix socket `listen` (which the back end makes).
    /// What is only prepared is destroyed when this agent dies.
    fn prepare(&self, launch: Launch, cookie: Cookie, listen: PathBuf) -> BoxFuture<'_, BackendResult<Cookie>>;

    /// Destination: takes what came. On `Ok` the guest is complete and stands still ([`super::backend::PauseReason::Arrived`]),
    /// and stays so whatever happens to agent or daemon. On an error nothing is left here.
    fn complete(&self, guest: GuestId, cookie: Cookie) -> BoxFuture<'_, BackendResult<GuestInfo>>;

    /// Destination: drops what was prepared or arrived. `Ok` when nothing is there. Refuses a guest that runs.
    fn discard(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>>;
}
