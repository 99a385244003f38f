//! What the parties say to one another: plain data that daemons map to their wire.
//!
//! Every order that the controller sends ([`SourceOrder`], [`DestinationOrder`]) is a *stable fact* about one operation or one
//! epoch: once true it stays true, so an order that comes late, twice or out of order can be obeyed or ignored but
//! never misleads. `Undecided` and `Wait` are the exceptions; they change nothing at the receiver.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId, VolumeId};

/// The most volumes one guest may have; requests with more are refused.
pub const MAX_VOLUMES: usize = 64;

/// Who holds the right to run a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// Never started.
    Unowned,
    /// This host runs it, or is about to (just switched), or holds it paused for a switch that is not decided.
    Host(HostId),
    /// Suspended into the image store. Exactly one thaw consumes it.
    Frozen(FreezeId),
    /// Shut down; its volumes are where the record's holders say.
    Stopped,
    /// ALARM: this host owned it and the running copy is gone. To be restarted from its volumes.
    Lost(HostId),
}

/// An owner and the epoch at which it owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stamp {
    /// Who.
    pub owner: Owner,
    /// The epoch; the last one that was granted for every owner that is not a host.
    pub epoch: Epoch,
}

/// The identity of a volume's content at a switch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeStamp {
    /// The volume.
    pub volume: VolumeId,
    /// Root of its block map.
    pub root: [u8; 32],
    /// Version of its block map.
    pub version: u64,
}

/// What an operation does to the guest's ownership.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Unowned or stopped, at e, to `(to, e+1)`.
    Start {
        /// The host that will run it.
        to: HostId,
    },
    /// `(source, e)` to `(to, e+1)`, running.
    Migrate {
        /// The destination.
        to: HostId,
        /// The guest resumes before all its memory has come; the source serves the rest.
        post_copy: bool,
    },
    /// `(source, e)` to `(to, e+1)`, but only when the source is lost: until then the destination is kept up to date, cut by cut.
    Mirror {
        /// The host that stands by.
        to: HostId,
    },
    /// `(source, e)` to frozen at e. The source lets go only after the store has the freeze.
    Freeze {
        /// The freeze that is made.
        freeze: FreezeId,
    },
    /// Frozen at e to `(to, e+1)`; consumes the freeze.
    Thaw {
        /// The freeze that is consumed.
        freeze: FreezeId,
        /// The host that will run it.
        to: HostId,
    },
    /// `(source, e)` to stopped at e. Cannot be cancelled: a guest that has shut down cannot go on.
    Stop,
    /// Lost at e to `(to, e+1)`: a boot from the newest volumes that are to be had.
    RestartFromVolume {
        /// The host that will run it.
        to: HostId,
    },
}

impl OperationKind {
    /// The host that will run the guest, if any will.
    #[must_use]
    pub const fn destination(&self) -> Option<HostId> {
        match *self {
            Self::Start { to }
            | Self::Migrate { to, .. }
            | Self::Mirror { to }
            | Self::Thaw { to, .. }
            | Self::RestartFromVolume { to } => Some(to),
            Self::Freeze { .. } | Self::Stop => None,
        }
    }

    /// Whether a running owner takes part as the source.
    #[must_use]
    pub const fn has_source(&self) -> bool {
        matches!(self, Self::Migrate { .. } | Self::Mirror { .. } | Self::Freeze { .. } | Self::Stop)
    }

    /// The owner that the switch makes.
    #[must_use]
    pub const fn target(&self) -> Owner {
        match *self {
            Self::Start { to }
            | Self::Migrate { to, .. }
            | Self::Mirror { to }
            | Self::Thaw { to, .. }
            | Self::RestartFromVolume { to } => Owner::Host(to),
            Self::Freeze { freeze } => Owner::Frozen(freeze),
            Self::Stop => Owner::Stopped,
        }
    }

    /// The epoch that the switch makes, from the one before: a new writer gets a new epoch.
    #[must_use]
    pub const fn epoch_after(&self, from: Epoch) -> Epoch {
        match self.destination() {
            Some(_) => from.next(),
            None => from,
        }
    }
}

/// The proof that the switch was decided: who may run the guest now, at which epoch, by which operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grant {
    /// The guest.
    pub guest: GuestId,
    /// The operation that it was granted to.
    pub operation: OperationId,
    /// The operation's turn.
    pub turn: u64,
    /// The new owner.
    pub owner: Owner,
    /// The new epoch.
    pub epoch: Epoch,
}

/// A host that holds state of the guest without owning it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Holder {
    /// The host.
    pub host: HostId,
    /// The epoch at which its volumes are sealed.
    pub epoch: Epoch,
    /// Whether somebody may still need what it holds; else it is being released.
    pub needed: bool,
    /// Declared lost: nobody waits for it. Should it come back, what it holds is still respected.
    pub lost: bool,
}

/// The source's part of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourcePlan {
    /// The guest.
    pub guest: GuestId,
    /// The operation.
    pub operation: OperationId,
    /// Its turn: see [`OwnerRecord::turn`](crate::OwnerRecord::turn).
    pub turn: u64,
    /// A migration, a freeze or a stop.
    pub kind: OperationKind,
    /// The epoch at which the source must own the guest.
    pub epoch: Epoch,
}

/// The destination's part of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DestinationPlan {
    /// The guest.
    pub guest: GuestId,
    /// The operation.
    pub operation: OperationId,
    /// Its turn: see [`OwnerRecord::turn`](crate::OwnerRecord::turn).
    pub turn: u64,
    /// A start, a migration, a thaw or a restart from the volumes.
    pub kind: OperationKind,
    /// Who owns it before the switch.
    pub from: Stamp,
    /// The host that will run it: the receiver of this plan.
    pub to: HostId,
    /// Who holds blocks that may have to be fetched, newest epoch first; a migration's source is not among them.
    pub holders: Vec<Holder>,
}

impl DestinationPlan {
    /// The epoch at which the destination would own the guest.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.kind.epoch_after(self.from.epoch)
    }
}

/// The request for the switch, made by whoever holds the complete state: the destination of a move, or the source of a
/// freeze or a stop.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SwitchRequest {
    /// The guest.
    pub guest: GuestId,
    /// The operation.
    pub operation: OperationId,
    /// The owner that the requester believes in.
    pub from: Stamp,
    /// The owner that is to be.
    pub to: Owner,
    /// The volumes as they were sealed; written in the same transaction. At most [`MAX_VOLUMES`].
    pub volumes: Vec<VolumeStamp>,
}

/// Whether an agent still has the guest's process (running or paused).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalCopy {
    /// It could go on.
    Intact,
    /// It is gone: the process died or the host was restarted.
    Gone,
}

/// What a restarted agent finds of a guest's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Found {
    /// No process.
    Nothing,
    /// A process that is paused, or is receiving.
    Paused,
    /// A process whose vCPUs run.
    Running,
}

/// A source's question: do I still own it?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OwnerQuery {
    /// The operation in which the question came up.
    pub operation: Option<OperationId>,
    /// The epoch at which the asker owned the guest.
    pub epoch: Epoch,
    /// Whether it could run it on.
    pub copy: LocalCopy,
    /// It is paused and has lost contact: it would rather have the operation aborted than wait.
    pub wants_back: bool,
}

/// Why an operation is given up before the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum AbortReason {
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// Its deadline has passed.
    #[error("the deadline has passed")]
    Deadline,
    /// The destination could not prepare or receive.
    #[error("the destination failed")]
    DestinationFailed,
    /// The source could not copy.
    #[error("the source failed")]
    SourceFailed,
    /// A paused source lost contact and asked for its guest back.
    #[error("the source lost contact")]
    ContactLost,
    /// A host that takes part was declared lost.
    #[error("a host was lost")]
    HostLost,
    /// The running copy is gone.
    #[error("the guest was lost")]
    GuestLost,
}

/// Why a switch is refused. Every reason is final for the operation that asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum SwitchRefusal {
    /// The guest has no such operation: it is over, or never was.
    #[error("the guest has no such operation now")]
    UnknownOperation,
    /// The request is about another guest than the record.
    #[error("the request is for another guest")]
    WrongGuest,
    /// The operation was aborted.
    #[error("the operation was aborted: {0}")]
    Aborted(AbortReason),
    /// The guest is not owned by whom the request says, at the epoch that it says.
    #[error("the guest is at epoch {} and its owner is not the one that the request names", .0.epoch)]
    WrongOrigin(Stamp),
    /// The operation has another target.
    #[error("the operation has another target")]
    WrongTarget,
    /// The host that asks has no part in this operation that may ask.
    #[error("the host may not ask for this switch")]
    NotAuthorised,
    /// More than [`MAX_VOLUMES`] volumes.
    #[error("too many volumes")]
    TooManyVolumes,
    /// The guest moves with its group: only all together.
    #[error("the guest moves with its group")]
    GroupMember,
    /// A mirror's source was not declared lost.
    #[error("the mirror's source was not declared lost")]
    SourceNotLost,
    /// The groups' requests do not fit the records: another number, another order, or a guest twice.
    #[error("the group's requests do not match its records")]
    GroupMismatch,
}

/// What an agent tells or asks the controller. The sender's host is known from its link, never from the message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Report {
    /// Destination: ready to receive.
    Prepared {
        /// The operation.
        operation: OperationId,
    },
    /// Source: the guest is paused (stop: shut down), the last state is on its way.
    Paused {
        /// The operation.
        operation: OperationId,
    },
    /// Destination of a move, source of a freeze or stop: all is held, let the switch be decided.
    RequestSwitch(SwitchRequest),
    /// Either: it cannot succeed, please abort.
    RequestAbort {
        /// The operation.
        operation: OperationId,
        /// Why.
        reason: AbortReason,
        /// The epoch at which the sender owns the guest, if it is the source.
        owned: Option<Epoch>,
    },
    /// Source: do I still own it?
    AskOwner(OwnerQuery),
    /// Destination: the guest runs at this epoch.
    Running {
        /// The operation.
        operation: OperationId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Destination of a post-copy: the guest runs at this epoch, and memory may be missing.
    FetchesMemory {
        /// The operation.
        operation: OperationId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// Destination: every block and page is here, no other copy is needed.
    NothingMissing {
        /// The operation.
        operation: OperationId,
        /// The epoch at which it runs.
        epoch: Epoch,
    },
    /// Source: after an abort the guest runs again as before.
    Resumed {
        /// The operation that was aborted.
        operation: OperationId,
        /// The epoch at which it runs.
        epoch: Epoch,
    },
    /// Source: nothing is left of what was held at this epoch.
    Released {
        /// The epoch of the copy that was deleted.
        epoch: Epoch,
    },
    /// Destination: nothing is left of what was received.
    Cleaned {
        /// The operation.
        operation: OperationId,
    },
    /// ALARM, source: the process of the guest that I own is gone; the volumes are here, sealed.
    GuestLost {
        /// The operation in which it was noticed.
        operation: Option<OperationId>,
        /// The epoch at which it was owned.
        epoch: Epoch,
    },
    /// ALARM, destination: the switch was granted to me and what I had received is gone.
    LostAfterSwitch {
        /// The operation.
        operation: OperationId,
        /// The epoch that was granted.
        epoch: Epoch,
    },
}

/// What the controller tells a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceOrder {
    /// Copy the guest to the destination (freeze: to the store; stop: shut it down).
    Begin(SourcePlan),
    /// You own the guest at this epoch, and no operation up to this turn can be granted any more: run it.
    StillYours {
        /// The operation that this is an answer about.
        operation: Option<OperationId>,
        /// The last turn that is out of the question.
        turn: u64,
        /// The epoch at which you own it.
        epoch: Epoch,
    },
    /// Not decided yet: stay as you are and ask again.
    Undecided {
        /// The operation.
        operation: Option<OperationId>,
    },
    /// You do not own it any more.
    Elsewhere {
        /// Who does, at which epoch.
        now: Stamp,
        /// The epoch of your copy that this answer is about.
        yours: Epoch,
        /// Keep serving what you hold, or release it.
        needed: bool,
    },
}

/// What the controller tells a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationOrder {
    /// Make ready to receive the guest.
    Prepare(DestinationPlan),
    /// You own it. The only thing in the world that lets a destination run a guest.
    Granted(Grant),
    /// The mirror's source is lost: make ready to go on from the last cut, and ask for the switch.
    TakeOver {
        /// The operation.
        operation: OperationId,
    },
    /// The source of a post-copy was declared lost. Said only to who says that it fetches memory.
    SourceLost {
        /// The operation.
        operation: OperationId,
    },
    /// The switch is refused for good: destroy what was received.
    Refused {
        /// The operation.
        operation: OperationId,
        /// Why.
        reason: SwitchRefusal,
    },
    /// The operation was aborted for good: destroy what was received.
    Cancel {
        /// The operation.
        operation: OperationId,
        /// Its turn.
        turn: u64,
    },
    /// Not all members of the group are ready: stay and ask again.
    Wait {
        /// The operation.
        operation: OperationId,
    },
    /// Your part in this operation is over and recorded.
    Settled {
        /// The operation.
        operation: OperationId,
    },
}

/// An order and who gets it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Order {
    /// The host.
    pub to: HostId,
    /// What it is told.
    pub body: OrderBody,
}

/// An order to one of a host's two machines for the guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderBody {
    /// For its [`SourceHandover`](crate::SourceHandover).
    Source(SourceOrder),
    /// For its [`DestinationHandover`](crate::DestinationHandover).
    Destination(DestinationOrder),
}

/// What a person or a policy must hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Alarm {
    /// The running copy is gone; restart from the volumes.
    #[error("the guest's running copy at {host} (epoch {epoch}) is gone")]
    GuestLost {
        /// Where it was.
        host: HostId,
        /// The epoch at which it was owned.
        epoch: Epoch,
    },
    /// The switch was granted and then the received state was lost.
    #[error("{host} lost the guest after the switch to epoch {epoch}")]
    LostAfterSwitch {
        /// The destination.
        host: HostId,
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// A host that holds blocks or pages that are still needed was declared lost.
    #[error("{host} held a needed copy (epoch {epoch}) and is lost")]
    NeededCopyLost {
        /// The host.
        host: HostId,
        /// The epoch of its copy.
        epoch: Epoch,
    },
    /// A copy that somebody else has replaced was still there and was destroyed.
    #[error("a copy at epoch {had} was replaced by epoch {now} and is destroyed")]
    Superseded {
        /// The epoch of the copy.
        had: Epoch,
        /// The epoch that replaced it.
        now: Epoch,
    },
    /// A copy ran that had no right to; it was halted.
    #[error("a copy ran without a grant and was halted")]
    RanWithoutGrant,
    /// An agent claims an epoch that was never granted: a bug, a lie, or a store that lost writes.
    #[error("{host} claims epoch {epoch}, which was never granted")]
    EpochFromTheFuture {
        /// The host.
        host: HostId,
        /// The epoch.
        epoch: Epoch,
    },
}
