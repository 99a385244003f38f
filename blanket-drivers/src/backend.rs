//! What every back end must be able to do with a guest's virtual machine.
//!
//! The trait is object-safe: an agent holds `Arc<dyn Backend>`. Every future ends within the back end's own deadlines;
//! dropping one gives up waiting but does not undo what the hypervisor was already told.

use std::{future::Future, path::PathBuf, pin::Pin, time::Duration};

use serde::{Deserialize, Serialize};
use supercloud_api::CompatClass;
use supercloud_ids::{Epoch, GuestId};
use tokio::sync::broadcast;

use crate::{
    checkpoint::Checkpointing,
    device::SpecError,
    host::Launch,
    migrate::{LiveMigration, Transfer},
    mirror::Mirroring,
    post_copy::PostCopy,
    thaw::LazyThaw,
};

/// A boxed future, so that the traits here are object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What a back end's work ends in.
pub type BackendResult<T> = Result<T, BackendError>;

/// Why a back end did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The machine or the host's arguments are not valid.
    #[error("the machine cannot be built")]
    Spec(#[from] SpecError),
    /// The back end, as it is on this host, cannot do this; it names what.
    #[error("back end {back_end} lacks {option}")]
    Unsupported {
        /// The back end.
        back_end: &'static str,
        /// What it lacks.
        option: String,
    },
    /// No such guest is at this host.
    #[error("guest {guest} is not at this host")]
    NoSuchGuest {
        /// Which.
        guest: GuestId,
    },
    /// A guest of this id is already at this host.
    #[error("guest {guest} is already at this host")]
    AlreadyThere {
        /// Which.
        guest: GuestId,
    },
    /// The guest is in a state in which this cannot be done.
    #[error("guest {guest} is {is}: cannot {wants}")]
    WrongState {
        /// Which.
        guest: GuestId,
        /// What was asked.
        wants: &'static str,
        /// Its state, in words.
        is: String,
    },
    /// It took longer than allowed. The hypervisor may still do it: ask for the guest's status.
    #[error("{what} did not end within {budget_ms} ms")]
    Deadline {
        /// What.
        what: &'static str,
        /// The budget.
        budget_ms: u64,
    },
    /// It was cancelled by the caller.
    #[error("{what} was cancelled")]
    Cancelled {
        /// What.
        what: &'static str,
    },
    /// The hypervisor's daemon cannot be reached; guests may well run on. Worth trying again.
    #[error("{what}: the hypervisor's daemon is away: {detail}")]
    Away {
        /// What was tried.
        what: &'static str,
        /// The daemon's or library's own words.
        detail: String,
    },
    /// The hypervisor refused or failed.
    #[error("{what} failed: {detail}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// The hypervisor's own words, cut to 1,024 characters.
        detail: String,
    },
    /// The other host's data is not what this back end understands.
    #[error("{what} from the other host is not understood: {detail}")]
    Foreign {
        /// What.
        what: &'static str,
        /// Why.
        detail: String,
    },
    /// A file could not be handled.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl BackendError {
    /// Whether the same call can succeed later without anything else being changed.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Away { .. } | Self::Deadline { .. })
    }
}

/// How a guest is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Its power button is pressed; if it is not off after the budget, it is killed.
    Graceful {
        /// How long it may take.
        budget: Duration,
    },
    /// At once, as by a power cut.
    Kill,
}

/// Where a guest's machine is in its life at this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state", content = "reason")]
pub enum RunState {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still; memory and devices are held.
    Paused(PauseReason),
    /// It is being shut down by itself.
    ShuttingDown,
    /// It crashed and its machine is still there.
    Crashed,
}

/// Why a guest's vCPUs stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// It was asked for.
    Asked,
    /// This is the source of a move: all is at the destination, and this copy waits for the decision.
    Departed,
    /// This is the destination of a move that is still receiving (or whose source went silent).
    Incoming,
    /// This is the destination of a move and holds the complete state; waits for the grant.
    Arrived,
    /// A disk failed to answer; resume it when the disk is back.
    DiskError,
    /// It is being frozen, thawed or snapshotted.
    Saving,
    /// Anything else.
    Other,
}

/// A guest as a back end finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestInfo {
    /// Which.
    pub guest: GuestId,
    /// The epoch under which it was brought up here (see [`Launch::epoch`]).
    pub epoch: Epoch,
    /// Its state.
    pub state: RunState,
    /// The hypervisor's process, where there is one and it is known.
    pub pid: Option<u32>,
}

/// Memory of a guest, in bytes. What the guest or hypervisor does not tell is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MemoryStats {
    /// What the guest has, after ballooning.
    pub actual_bytes: Option<u64>,
    /// What the hypervisor's process holds resident.
    pub resident_bytes: Option<u64>,
    /// What the guest leaves unused.
    pub unused_bytes: Option<u64>,
    /// What the guest could give without swapping.
    pub usable_bytes: Option<u64>,
    /// What the guest counts as its total.
    pub available_bytes: Option<u64>,
}

/// What a back end can do on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// The back end's name, as in [`CompatClass::back_end`].
    pub back_end: String,
    /// Its versions, for people.
    pub version: String,
    /// The classes it can run, the preferred one first.
    pub classes: Vec<CompatClass>,
    /// Why guests cannot be moved live with it; absent when they can.
    pub no_live_migration: Option<String>,
}

/// What a back end tells without being asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendEvent {
    /// Something happened to a guest.
    Guest {
        /// Which.
        guest: GuestId,
        /// What.
        what: GuestEvent,
    },
    /// The daemon was away and is back, or events were lost: list the guests again.
    Resynchronise,
}

/// What can happen to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// Its machine was made here.
    Started,
    /// Its vCPUs stopped.
    Paused(PauseReason),
    /// Its vCPUs go on.
    Resumed,
    /// It restarted itself (its machine stays).
    Rebooted,
    /// Its machine is gone.
    Stopped(StopReason),
    /// A disk failed to answer. The guest's pause follows as an event of its own, which comes even where this one, which
    /// tells which disk it was, does not.
    DiskError {
        /// The disk, by its name in the spec when known.
        disk: String,
    },
}

/// Why a machine is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The guest powered itself off.
    PoweredOff,
    /// It was killed on request.
    Killed,
    /// The hypervisor's process died, or the guest crashed.
    Crashed,
    /// It went to another host.
    Departed,
    /// It was frozen into a file.
    Frozen,
    /// Anything else.
    Failed,
}

/// A guest frozen into a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Who wrote the file and in which format; only the same class reads it back.
    pub format: String,
    /// The file's size.
    pub bytes: u64,
}

/// One kind of virtual machine monitor, as this host has it.
pub trait Backend: Send + Sync {
    /// Its name, as in [`CompatClass::back_end`].
    fn name(&self) -> &'static str;

    /// Whether the streams of guests that come here are taken by the agent's own process; else by one of the guests' user.
    fn takes_streams_itself(&self) -> bool {
        false
    }

    /// Whether its guests of this class have a memory balloon.
    fn has_balloon(&self, class: &CompatClass) -> bool;

    /// Whether its guests have a virtio entropy source.
    fn has_rng(&self) -> bool {
        true
    }

    /// What it can do on this host; asked of the hypervisor, not assumed.
    fn capabilities(&self) -> BoxFuture<'_, BackendResult<Capabilities>>;

    /// Makes the machine and runs it. Refuses by name what it lacks.
    fn start(&self, launch: Launch) -> BoxFuture<'_, BackendResult<GuestInfo>>;

    /// Stops a guest; its machine is gone afterwards. `Ok` when it was not there.
    fn stop(&self, guest: GuestId, mode: StopMode) -> BoxFuture<'_, BackendResult<()>>;

    /// Stops its vCPUs. `Ok` when they stand still already.
    fn pause(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>>;

    /// Lets its vCPUs run under `epoch`. `Ok` when they run already. **The caller holds the grant for `epoch`.**
    ///
    /// It is what runs an arrived guest after the switch. It refuses a guest that is still incoming, and it does not
    /// resume the source of a move: that is [`LiveMigration::confirm`].
    fn resume(&self, guest: GuestId, epoch: Epoch) -> BoxFuture<'_, BackendResult<()>>;

    /// Resets the machine, as by its reset button.
    fn reset(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<()>>;

    /// One guest; `None` when it is not here.
    fn status(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<GuestInfo>>>;

    /// Why a guest that is not here any more ended, as far as it is known: for who was not there to hear
    /// [`GuestEvent::Stopped`].
    fn how_it_ended(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<Option<StopReason>>>;

    /// All of our guests at this host, also those that an earlier agent started. Machines of others are left alone and
    /// not listed.
    fn list(&self) -> BoxFuture<'_, BackendResult<Vec<GuestInfo>>>;

    /// The unix socket on which its console is served.
    fn console(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<PathBuf>>;

    /// What is known of its memory.
    fn memory_stats(&self, guest: GuestId) -> BoxFuture<'_, BackendResult<MemoryStats>>;

    /// Events from now on. A receiver that lags sees `Lagged` and should list again.
    fn events(&self) -> broadcast::Receiver<BackendEvent>;

    /// Freezes a guest into a new file, durably; afterwards its machine is gone and the file is the guest. To roll
    /// back, thaw it here. A guest that could not be frozen runs on. [`LiveMigration::cancel`] gives a freeze up, too.
    ///
    /// # Errors
    /// At once when the path cannot be used; later errors come from `done`.
    fn freeze(&self, guest: GuestId, file: PathBuf) -> BackendResult<Transfer<Frozen>>;

    /// The frozen guest in `file`, if [`Backend::freeze`] came to its end there, whoever waited for it; durable when this
    /// returns. `None` when there is no file, or one that is not whole: a freeze that goes on, or was broken off. A
    /// guest that is not at this host is in its file, or it is lost.
    fn frozen_in(&self, file: PathBuf) -> BoxFuture<'_, BackendResult<Option<Frozen>>>;

    /// Brings a frozen guest back, with this host's arguments. It stands still ([`PauseReason::Arrived`]) until
    /// [`Backend::resume`], so that the caller can ask for the switch first. The file stays.
    fn thaw(&self, launch: Launch, file: PathBuf, format: String) -> BoxFuture<'_, BackendResult<GuestInfo>>;

    /// Live migration, or a refusal that names why this back end has none here.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`].
    fn live_migration(&self) -> BackendResult<&dyn LiveMigration>;

    /// Mirrors, or a refusal that names them.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`].
    fn mirroring(&self) -> BackendResult<&dyn Mirroring> {
        Err(BackendError::Unsupported { back_end: self.name(), option: "mirrors".to_owned() })
    }

    /// Checkpoints of running guests, or a refusal that names them. What takes them thaws them.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`].
    fn checkpointing(&self) -> BackendResult<&dyn Checkpointing> {
        Err(BackendError::Unsupported { back_end: self.name(), option: "checkpoints of running guests".to_owned() })
    }

    /// Moves that leave memory behind ([`crate::migrate::MemoryMode`]), or a refusal that names them, and why this host has none.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`].
    fn post_copy(&self) -> BackendResult<&dyn PostCopy> {
        Err(BackendError::Unsupported { back_end: self.name(), option: "moves that leave memory behind".to_owned() })
    }

    /// Thaws that fetch memory while the guest runs, or a refusal that names them; whether this host has what they take is
    /// [`LazyThaw::offers`]'s to say.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`].
    fn lazy_thaw(&self) -> BackendResult<&dyn LazyThaw> {
        let option = "thaws that fetch memory while the guest runs".to_owned();
        Err(BackendError::Unsupported { back_end: self.name(), option })
    }
}
