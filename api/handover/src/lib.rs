//! The ownership protocol: how a guest changes owner, as pure state machines.
//!
//! The very functions here run in the controller and in the agents, and go through the checkers in `tests/`. No clock, no
//! network, no disk: events come in, effects go out, and every state is data that a daemon persists.
//!
//! ```text
//!   source agent                    controller                     destination agent
//!   [SourceHandover]              [OwnerRecord, a value]           [DestinationHandover]
//!        |                             |---- Prepare ------------------->|
//!        |                             |<--- Prepared -------------------|
//!        |<--- Begin ------------------|                                 |
//!        |==== memory, device state, volume maps =======================>|   the guest is paused, volumes sealed at e
//!        |                             |<--- RequestSwitch (from e) -----|   it holds the complete state
//!        |                  COMMIT POINT: one store transaction          |
//!        |                  owner := destination, epoch := e+1           |
//!        |<--- Elsewhere --------------|---- Granted ------------------->|   the only thing that lets it run
//!        |   (serves blocks)           |<--- Running --------------------|
//!        |==== blocks, pages ===========================================>|
//!        |                             |<--- NothingMissing -------------|
//!        |<--- Elsewhere(not needed) --|---- Settled ------------------->|
//!        |---- Released -------------->|   done                          |
//! ```
//!
//! A freeze and a stop are the same with the store, or nobody, as the destination: there the source itself asks for the
//! switch, when all is safe. A start, a thaw and a restart from the volumes are the same without a source.
//!
//! A mirror stays in its copying, cut by cut, until somebody ends it (an abort: the guest runs on where it is) or its source
//! is declared lost, or says that its copy is gone: then, and only then, the destination hears
//! [`DestinationOrder::TakeOver`], makes its last cut whole, and asks for the switch like any other. A standby whose agent was
//! restarted receives no more, and waits for the one or the other all the same: it may be the last copy.
//!
//! # Why it holds
//! - An operation's [`Verdict`] leaves `Open` once, in one durable write: to `Granted` or to `Aborted`. A destination runs only
//!   on `Granted`, a paused source resumes only on [`SourceOrder::StillYours`], which is only said when the operation is
//!   `Aborted` (or over) and the source still owns. So never two.
//! - Whoever waits asks again ([`SourceEvent::Tick`], [`DestinationEvent::Tick`]), and the controller repeats
//!   [`OwnerRecord::orders`]; every order is a fact that stays true. So, messages lost or not, never none for ever.
//! - Machines are persisted before their effects are carried out, records before their orders are sent. So a crash
//!   forgets nothing that anybody has acted on.
//! - What only a dead host held is lost; then somebody says so: [`Owner::Lost`], [`Alarm`].
//!
//! # Phases
//! | phase | may be followed by |
//! |---|---|
//! | plan | prepare, copy, rolled_back |
//! | prepare | copy, rolled_back |
//! | copy | switch, rolled_back |
//! | switch | resume, finish, rolled_back |
//! | resume | finish, failed |
//! | finish | done, failed |
//! | done | (end) |
//! | rolled_back | (end) |
//! | failed | (end) |
//!
//! The table is [`TRANSITIONS`]; a test compares the two.
//!
//! # For the controller
//! [`begin`], [`leave_plan`], then [`accept`] for every report; [`request_abort`] for a cancel or a deadline; [`note_host_lost`]
//! with proof. Each takes the stored [`OwnerRecord`] and gives the next one: write it in one transaction that compares the
//! revision, together with all that changes with it, and only then send. Send [`OwnerRecord::orders`] again after a
//! restart, when a host's link comes back, and every few seconds while an operation is under way or a holder waits.
//!
//! # For an agent
//! One [`LocalHandover`] per guest. For each event: `step`, persist, carry out the effects in order. After a restart: load;
//! destroy every process of the guest that carries neither the epoch of the source's machine nor the operation of the
//! destination's; then [`SourceEvent::Restarted`] and [`DestinationEvent::Restarted`] with what is found.
//!
//! The machines have no clock, so the agent has the deadlines: a copy that makes no progress is
//! [`SourceEvent::CopyFailed`], a source that stays sealed without an answer is [`SourceEvent::PeerLost`] (it then asks
//! for its guest back), a destination that waits in vain is [`DestinationEvent::ReceiveFailed`]. How soon an undecided
//! operation is aborted for a source that asks is the controller's choice: [`WhenOpen`].
//!
//! The last line is the volumes' own: each refuses what carries an epoch below its newest.
//!
//! # What is checked
//! `tests/checker` explores every interleaving of small scenarios (three hosts, two operations, messages lost, late,
//! twice and out of order; agents and hosts that die between any two effects) and runs larger ones at random; it finds
//! each of a list of deliberate defects. `tests/hostile.rs` feeds the machines and the decisions with nonsense.

mod accept;
mod decide;
mod destination;
mod local;
mod message;
mod phase;
mod record;
mod source;

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, OperationId};

pub use accept::{Accepted, GroupNeed, accept};
pub use decide::{
    AbortDecision, AskDecision, BeginRefusal, BeginRequest, GroupDecision, LossDecision, SwitchDecision, WhenOpen,
    ask_owner, begin, grant_switch, grant_switch_all, leave_plan, note_host_lost, request_abort, request_abort_all,
    set_back,
};
pub use destination::{DestinationEffect, DestinationEvent, DestinationHandover, DestinationState, Outcome};
pub use local::{LocalEffect, LocalEvent, LocalHandover};
pub use message::{
    AbortReason, Alarm, DestinationOrder, DestinationPlan, Found, Grant, Holder, LocalCopy, MAX_VOLUMES, OperationKind,
    Order, OrderBody, Owner, OwnerQuery, Report, SourceOrder, SourcePlan, Stamp, SwitchRefusal, SwitchRequest,
    VolumeStamp,
};
pub use phase::{Phase, TRANSITIONS, is_ahead, is_transition_valid};
pub use record::{Ended, Operation, OwnerRecord, RecordError, Verdict};
pub use source::{SourceEffect, SourceEvent, SourceHandover, SourceState};

/// Why a machine does nothing with an event. Mostly an order that comes late: for the log, not for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It means nothing where the machine is now.
    #[error("not in this state")]
    NotInThisState,
    /// For another guest.
    #[error("for another guest")]
    OtherGuest,
    /// For another host.
    #[error("for another host")]
    OtherHost,
    /// A source has no part in an operation of this kind.
    #[error("no part in an operation of this kind")]
    OtherKind,
    /// Another operation is under way here.
    #[error("operation {0} is under way here")]
    OtherOperation(OperationId),
    /// No such operation here.
    #[error("no such operation here")]
    NoOperation,
    /// About another epoch.
    #[error("at epoch {mine}, not at {theirs}")]
    OtherEpoch {
        /// The machine's.
        mine: Epoch,
        /// The event's.
        theirs: Epoch,
    },
    /// The switch was granted: there is no way back.
    #[error("the switch was granted")]
    AlreadyGranted,
}
