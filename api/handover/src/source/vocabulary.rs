//! The source's states, events and effects.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, FreezeId, HostId, OperationId};

#[cfg(doc)]
use super::SourceHandover;
use crate::{
    Refusal,
    message::{Alarm, Found, Report, SourceOrder, SourcePlan, VolumeStamp},
};

/// Where a source is. Durable: see [`SourceHandover::step`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceState {
    /// Nothing of the guest is here.
    Idle,
    /// It runs here; this host owns it.
    Running,
    /// It runs here and is copied (stop: it is shutting down).
    Copying {
        /// The operation's plan.
        plan: SourcePlan,
        /// The copy cannot succeed any more; an abort is asked for.
        broken: bool,
    },
    /// It is paused (stop: shut down); its volumes are being sealed.
    Sealing {
        /// The operation's plan.
        plan: SourcePlan,
    },
    /// It is paused, its volumes are sealed; the rest of the state goes to the destination or into the store.
    Sealed {
        /// The operation's plan.
        plan: SourcePlan,
        /// The volumes as sealed.
        volumes: Vec<VolumeStamp>,
    },
    /// Freeze or stop: all is safe, the change of owner is asked for.
    Vacating {
        /// The operation's plan.
        plan: SourcePlan,
        /// The volumes as sealed.
        volumes: Vec<VolumeStamp>,
    },
    /// The answer was that it is still ours: it is being resumed.
    Resuming {
        /// The operation that is over.
        operation: Option<OperationId>,
    },
    /// It belongs to another; what is here may still be needed.
    Serving {
        /// The paused process is kept because the new owner still fetches pages from it.
        guest_kept: bool,
    },
    /// All that is left is being deleted.
    Releasing,
    /// ALARM: the process is gone and nobody else has the guest; reported until the controller has recorded it.
    Lost {
        /// The operation in which it was noticed.
        operation: Option<OperationId>,
    },
}

/// What happens to a source.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceEvent {
    /// The controller says.
    Order(SourceOrder),
    /// Time passes: about every second, and at once when the link to the controller comes back.
    Tick,
    /// The agent was restarted with this machine's last persisted state, and found this of the process that belongs to [`SourceHandover::epoch`].
    Restarted {
        /// What is there.
        found: Found,
    },
    /// The copy (freeze: the storing) failed for good.
    CopyFailed {
        /// The operation.
        operation: OperationId,
    },
    /// The link to the destination is gone.
    PeerLost {
        /// The operation.
        operation: OperationId,
    },
    /// No vCPU runs any more and all memory and device state has been taken over by the destination (post-copy: all
    /// device state; freeze: all is in files here or in the store; stop: the guest has shut down).
    GuestPaused {
        /// The operation.
        operation: OperationId,
    },
    /// Every volume refuses writes at this epoch, durably.
    VolumesSealed {
        /// The operation.
        operation: OperationId,
        /// What they are now.
        volumes: Vec<VolumeStamp>,
    },
    /// Memory, device state and volumes are all in the store, as durable as the store is.
    FreezeStored {
        /// The operation.
        operation: OperationId,
    },
    /// The guest runs again and its volumes take writes.
    GuestResumed {
        /// At this epoch.
        epoch: Epoch,
    },
    /// Post-copy: the destination has every page.
    MemoryServed {
        /// The operation.
        operation: OperationId,
    },
    /// The guest's process ended by itself.
    GuestGone,
    /// Process, volumes' local data, exports are gone.
    VolumesDeleted {
        /// Of the copy at this epoch.
        epoch: Epoch,
    },
}

/// What a source does. Each means "see to it that": repeating one is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceEffect {
    /// Tell the controller; may get lost.
    Send(Report),
    /// Start copying the running guest; leads to `GuestPaused` or `CopyFailed`.
    StartCopy(SourcePlan),
    /// Stop copying; no `GuestPaused` comes after this is done.
    StopCopy {
        /// The operation.
        operation: OperationId,
    },
    /// Shut the guest down (by force at its deadline); leads to `GuestPaused`.
    ShutDownGuest {
        /// The operation.
        operation: OperationId,
    },
    /// Make the volumes refuse writes at this epoch for ever, unless unsealed; leads to `VolumesSealed` when an operation is given.
    SealVolumes {
        /// The operation that waits for it.
        operation: Option<OperationId>,
        /// The epoch.
        epoch: Epoch,
    },
    /// Give the volume maps to the destination: from now on it is complete and may be granted the guest.
    SendVolumeMaps {
        /// The operation.
        operation: OperationId,
        /// The destination.
        to: HostId,
    },
    /// Bring everything into the store; leads to `FreezeStored` or `CopyFailed`.
    StoreFreeze {
        /// The operation.
        operation: OperationId,
        /// The freeze.
        freeze: FreezeId,
    },
    /// Let the volumes take writes at this same epoch again.
    UnsealVolumes {
        /// The epoch.
        epoch: Epoch,
    },
    /// Run the paused guest; leads to `GuestResumed`, or `GuestGone` if there is none.
    ResumeGuest {
        /// The epoch.
        epoch: Epoch,
    },
    /// Destroy the guest's process, if there is one at this epoch.
    DestroyGuest {
        /// The epoch.
        epoch: Epoch,
    },
    /// Keep the paused process and serve its pages; leads to `MemoryServed`.
    ServeMemory {
        /// The epoch.
        epoch: Epoch,
    },
    /// Serve the sealed volumes' blocks to whoever shows a ticket.
    ServeVolumes {
        /// The epoch at which they are sealed.
        epoch: Epoch,
    },
    /// Delete local data and exports of the copy at this epoch; leads to `VolumesDeleted`.
    DeleteVolumes {
        /// The epoch.
        epoch: Epoch,
    },
    /// Tell people.
    Raise(Alarm),
    /// The event did not fit; nothing was done.
    Refuse(Refusal),
}
