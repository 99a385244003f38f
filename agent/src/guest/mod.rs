//! One guest on this host: what is remembered of it, and the one task that owns it.
//!
//! ```text
//!   orders, connections, hypervisor's events          facts of jobs
//!                     \                                 /
//!                      v                               v
//!                    Actor: LocalHandover::step ──> persist ──> effects, in order
//!                      |                                          |
//!                      +── GuestView (watch): heartbeats,         +── reports to the controller
//!                          metadata service                       +── hypervisor, volumes, ports
//!                                                                 +── jobs (long work)
//! ```
//!
//! The machine is persisted before its effects are carried out. An effect that fails ends its batch; the next tick asks for it
//! again. Nothing else changes the guest's state.

mod actor;
mod dials;
mod effects;
mod lease;
pub mod machine;
mod process;
mod reboots;
pub mod record;
pub mod report;
mod restore;
mod watcher;

use std::{fmt, sync::Arc};

use supercloud_api::link::{Assignment, GuestReport, GuestSpec};
use supercloud_blanket::backend::GuestEvent;
use supercloud_handover::OrderBody;
use supercloud_ids::{Epoch, GuestId, OperationId, PortId};
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use self::record::GuestRecord;
use crate::{host::Host, plane::Incoming};

/// Messages that may wait for a guest's task.
const MAILBOX: usize = 128;

/// What a guest's task is told.
pub enum GuestMessage {
    /// The controller orders.
    Order {
        /// What.
        order: OrderBody,
        /// What is needed to carry it out.
        assignment: Option<Box<Assignment>>,
    },
    /// The controller is there again.
    LinkUp {
        /// The epoch at which this host owns the guest, as the controller has it.
        owned: Option<Epoch>,
    },
    /// A guest that waits with its pause for the others of its group need wait no more.
    SwitchOver {
        /// The move.
        operation: OperationId,
    },
    /// The hypervisor tells.
    Event(GuestEvent),
    /// Events may have been missed: look at the hypervisor.
    Look,
    /// Another agent opened a connection.
    Incoming(Box<Incoming>),
    /// The guest was deleted.
    Discard,
}

/// What goes into logs: an assignment has the guest's user-data and tickets in it.
impl fmt::Debug for GuestMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Order { order, assignment } => {
                let operation = assignment.as_ref().map(|assignment| assignment.operation);
                f.debug_struct("Order").field("order", order).field("assigned_for", &operation).finish_non_exhaustive()
            }
            Self::LinkUp { owned } => f.debug_struct("LinkUp").field("owned", owned).finish(),
            Self::Event(event) => f.debug_tuple("Event").field(event).finish(),
            Self::SwitchOver { operation } => f.debug_struct("SwitchOver").field("operation", operation).finish(),
            Self::Look => f.write_str("Look"),
            Self::Incoming(_) => f.write_str("Incoming"),
            Self::Discard => f.write_str("Discard"),
        }
    }
}

/// A guest as the rest of the agent sees it.
#[derive(Debug, Clone, Default)]
pub struct GuestView {
    /// Its row in hellos and heartbeats; `None` when nothing of it is here.
    pub report: Option<GuestReport>,
    /// What it is, where it runs here (also for the metadata service).
    pub spec: Option<Arc<GuestSpec>>,
    /// The epoch at which it is here.
    pub epoch: Epoch,
    /// Its ports.
    pub ports: Vec<PortId>,
}

/// A guest's task, as the rest of the agent reaches it.
pub struct GuestHandle {
    /// Where it is told things.
    pub mailbox: mpsc::Sender<GuestMessage>,
    /// How it is.
    pub view: watch::Receiver<GuestView>,
    _task: AbortOnDropHandle<()>,
}

impl GuestHandle {
    /// Tells something; lost when the task is overrun (everything that matters is repeated).
    pub fn tell(&self, message: GuestMessage) {
        if let Err(error) = self.mailbox.try_send(message) {
            tracing::debug!(%error, "a guest's task does not take a message");
        }
    }
}

/// Begins a guest's task. With a record it goes on where an earlier agent was. When nothing of the guest is left, its id is
/// sent to `ended`, once its files are gone.
#[must_use]
pub fn begin(
    host: Arc<Host>,
    guest: GuestId,
    record: Option<GuestRecord>,
    ended: mpsc::Sender<GuestId>,
) -> GuestHandle {
    let (mailbox, messages) = mpsc::channel(MAILBOX);
    let (view_tx, view) = watch::channel(GuestView::default());
    let actor = actor::Actor::new(host, guest, record, view_tx);
    let task = AbortOnDropHandle::new(tokio::spawn(actor.run(messages, ended)));
    GuestHandle { mailbox, view, _task: task }
}
