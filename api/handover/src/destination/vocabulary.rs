//! The destination's states, events and effects.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, OperationId};

#[cfg(doc)]
use super::DestinationHandover;
use crate::{
    Refusal,
    message::{Alarm, DestinationOrder, DestinationPlan, Found, Grant, Report, VolumeStamp},
};

/// What is left at a host whose part as a destination is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest runs here.
    Runs,
    /// It ran here, and then its process ended; nobody was told yet.
    Gone,
    /// It is not here any more, which the controller knows; its volumes are here, sealed.
    Volumes,
}

/// Where a destination is. Durable: see [`DestinationHandover::step`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationState {
    /// Nothing is received.
    Idle,
    /// Reserving memory, opening volumes, binding ports silently.
    Preparing {
        /// The operation's plan.
        plan: DestinationPlan,
    },
    /// Receiving.
    Receiving {
        /// The operation's plan.
        plan: DestinationPlan,
        /// Memory and device state are here (post-copy: device state).
        state_received: bool,
        /// The volume maps are here.
        volumes: Option<Vec<VolumeStamp>>,
    },
    /// All that the guest needs to go on is here: asks for the switch until it is answered.
    Complete {
        /// The operation's plan.
        plan: DestinationPlan,
        /// The volumes as the source sealed them.
        volumes: Vec<VolumeStamp>,
    },
    /// The switch is granted: roll forward.
    Granted {
        /// The operation's plan.
        plan: DestinationPlan,
        /// The proof.
        grant: Grant,
    },
    /// The guest runs; blocks and pages are still fetched.
    Running {
        /// The operation's plan.
        plan: DestinationPlan,
        /// The proof.
        grant: Grant,
    },
    /// Nothing is missing; reported until settled.
    Fetched {
        /// The proof.
        grant: Grant,
        /// The process has ended meanwhile.
        gone: bool,
    },
    /// What was received is being destroyed.
    Destroying {
        /// The operation.
        operation: OperationId,
        /// Its turn.
        turn: u64,
    },
    /// Was complete, and what it held is gone: asks whether that was before or after the switch.
    Orphaned {
        /// The operation's plan.
        plan: DestinationPlan,
    },
    /// ALARM: granted, and what it held is gone; reported until settled.
    Lost {
        /// The proof.
        grant: Grant,
    },
    /// Its part is over: [`DestinationHandover::into_source`].
    Finished {
        /// The proof.
        grant: Grant,
        /// What is left here.
        outcome: Outcome,
    },
}

/// What happens to a destination.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationEvent {
    /// The controller says.
    Order(DestinationOrder),
    /// Time passes: about every second, and at once when the link to the controller comes back.
    Tick,
    /// The agent was restarted with this machine's last persisted state, and found this of the process that this operation made.
    /// A mirror's standby counts only if it could go on: with a cut that is committed in its process and in all of its volumes.
    Restarted {
        /// What is there.
        found: Found,
    },
    /// Ready to receive.
    Prepared {
        /// The operation.
        operation: OperationId,
    },
    /// Preparing or receiving failed for good, or the source's stream broke.
    ReceiveFailed {
        /// The operation.
        operation: OperationId,
    },
    /// Memory and device state are here (start, restart: the guest is defined and could boot; thaw: could go on).
    StateReceived {
        /// The operation.
        operation: OperationId,
    },
    /// The volume maps are here, durable and checked against their roots (start: opened from their image).
    VolumeMapsReceived {
        /// The operation.
        operation: OperationId,
        /// The volumes.
        volumes: Vec<VolumeStamp>,
    },
    /// The guest runs and its volumes take writes.
    GuestRunning {
        /// At this epoch.
        epoch: Epoch,
    },
    /// Every block and page is here, as durable as the volumes promise.
    NothingMissing {
        /// At this epoch.
        epoch: Epoch,
    },
    /// The process that received, or ran, ended by itself.
    GuestGone,
    /// Nothing is left of what was received.
    Destroyed {
        /// The operation.
        operation: OperationId,
    },
}

/// What a destination does. Each means "see to it that": repeating one is harmless.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DestinationEffect {
    /// Tell the controller; may get lost.
    Send(Report),
    /// Make ready to receive (volumes refuse reads and writes, ports are silent); leads to `Prepared` or `ReceiveFailed`.
    Prepare(DestinationPlan),
    /// Receive no more of a mirror and make ready to go on from its last cut; leads to `StateReceived` and
    /// `VolumeMapsReceived`, or `ReceiveFailed`.
    TakeOver {
        /// The operation.
        operation: OperationId,
    },
    /// Post-copy: the source is lost. If memory is missing and cannot be had, the guest is no more: end its process; leads to `GuestGone`.
    GiveUpMemory {
        /// The operation.
        operation: OperationId,
    },
    /// Destroy all that was received; leads to `Destroyed`.
    DestroyReceived {
        /// The operation.
        operation: OperationId,
    },
    /// Let the volumes take writes at this epoch.
    ActivateVolumes {
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// Let the ports speak at this epoch.
    ActivatePorts {
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// Run the guest, once the volumes are active; leads to `GuestRunning`, or `GuestGone` if there is none.
    RunGuest {
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// Fetch what is missing from the source and the plan's holders; leads to `NothingMissing`.
    StartFetch {
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// Destroy the process, which has no right to run (any more).
    DestroyGuest {
        /// The operation that made it.
        operation: OperationId,
    },
    /// Seal the volumes: what they hold may be needed for a recovery.
    SealVolumes {
        /// The epoch that was granted.
        epoch: Epoch,
    },
    /// Tell people.
    Raise(Alarm),
    /// The event did not fit; nothing was done.
    Refuse(Refusal),
}
