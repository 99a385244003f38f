//! The controller's durable record of who owns a guest, and what can be read off it.
//!
//! A record is a value: decisions ([`crate::decide`], [`crate::accept`]) take one and give the next. The controller writes
//! the next one in ONE store transaction that compares the revision of the one it decided on, together with all that
//! changes with it, and sends orders only after that write is durable.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, HostId, OperationId};

use crate::{
    message::{
        AbortReason, Alarm, DestinationOrder, DestinationPlan, Grant, Holder, OperationKind, Order, OrderBody, Owner,
        SourceOrder, SourcePlan, Stamp,
    },
    phase::{Phase, is_ahead},
};

/// What was decided about an operation. Leaves [`Verdict::Open`] once, and then never changes: this is the one bit
/// on which "never two, never none" rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Either may still happen.
    Open,
    /// It can never be granted any more.
    Aborted(AbortReason),
    /// It can never be aborted any more.
    Granted(Grant),
}

/// The operation that is under way on a guest; at most one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Operation {
    /// Its id. Never reused.
    pub id: OperationId,
    /// Its turn.
    pub turn: u64,
    /// What it does.
    pub kind: OperationKind,
    /// Where it is.
    pub phase: Phase,
    /// Who owned the guest when it began.
    pub from: Stamp,
    /// What was decided.
    pub verdict: Verdict,
    /// The group's operation, of which this is a member's: it is granted and aborted only together with the others.
    #[serde(with = "group_tag")]
    pub group: Option<OperationId>,
    /// The source has yet to confirm that it is as before (matters after an abort).
    pub source_open: bool,
    /// The destination has yet to confirm that its part is over.
    pub destination_open: bool,
    /// The source was declared lost while this was open: only the destination can save the running copy.
    pub source_lost: bool,
}

/// Records of earlier versions have `false` where a guest moves alone, and so have those of this one.
mod group_tag {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use supercloud_ids::OperationId;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Tag {
        Alone(bool),
        With(OperationId),
    }

    #[expect(clippy::ref_option, reason = "as serde calls it")]
    pub(super) fn serialize<S: Serializer>(group: &Option<OperationId>, to: S) -> Result<S::Ok, S::Error> {
        group.map_or(Tag::Alone(false), Tag::With).serialize(to)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Option<OperationId>, D::Error> {
        match Tag::deserialize(from)? {
            Tag::Alone(false) => Ok(None),
            Tag::With(operation) => Ok(Some(operation)),
            Tag::Alone(true) => Err(D::Error::custom("a member of a group that is not named")),
        }
    }
}

impl Operation {
    /// The host that owns the guest and takes part as its source.
    #[must_use]
    pub const fn source(&self) -> Option<HostId> {
        match self.from.owner {
            Owner::Host(host) if self.kind.has_source() => Some(host),
            _ => None,
        }
    }

    /// Whether the destination stands by with a copy that is kept up to date; only while nothing is decided.
    #[must_use]
    pub const fn is_mirrored(&self) -> bool {
        matches!(self.kind, OperationKind::Mirror { .. })
            && matches!(self.verdict, Verdict::Open)
            && matches!(self.phase, Phase::Copy)
    }

    /// The grant, once there is one.
    #[must_use]
    pub const fn grant(&self) -> Option<Grant> {
        match self.verdict {
            Verdict::Granted(grant) => Some(grant),
            Verdict::Open | Verdict::Aborted(_) => None,
        }
    }

    /// Goes forward to `phase` if it lies ahead, else stays.
    pub(crate) fn forward(&mut self, phase: Phase) {
        if is_ahead(self.phase, phase) {
            self.phase = phase;
        }
    }
}

/// How the last operation on a guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ended {
    /// Its id.
    pub operation: OperationId,
    /// [`Phase::Done`], [`Phase::RolledBack`] or [`Phase::Failed`].
    pub phase: Phase,
    /// What was decided about it.
    pub verdict: Verdict,
}

/// Who owns a guest, and what is under way with it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OwnerRecord {
    /// The guest.
    pub guest: GuestId,
    /// Who owns it.
    pub owner: Owner,
    /// The last epoch that was granted. Never goes down.
    pub epoch: Epoch,
    /// How many operations have begun. An operation's number among them is its turn: by it an agent tells an order of the
    /// past from one of now, as it tells owners apart by the epoch.
    pub turn: u64,
    /// The operation under way.
    pub operation: Option<Operation>,
    /// The operation before.
    pub last: Option<Ended>,
    /// Hosts that hold state of the guest without owning it, newest first. At most one per host.
    pub holders: Vec<Holder>,
}

/// A stored record that no sequence of decisions can have made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// An operation in the record has ended.
    #[error("the record of {guest} keeps operation {operation} in its end phase {phase}")]
    EndedOperation {
        /// The guest.
        guest: GuestId,
        /// The operation.
        operation: OperationId,
        /// Its phase.
        phase: Phase,
    },
    /// Phase and verdict contradict one another.
    #[error("the record of {guest} has operation {operation} in phase {phase} with a verdict that does not fit")]
    PhaseAndVerdict {
        /// The guest.
        guest: GuestId,
        /// The operation.
        operation: OperationId,
        /// Its phase.
        phase: Phase,
    },
    /// An epoch that is newer than the record's.
    #[error("the record of {guest} is at epoch {epoch} and mentions the later epoch {later}")]
    LaterEpoch {
        /// The guest.
        guest: GuestId,
        /// The record's epoch.
        epoch: Epoch,
        /// The later one.
        later: Epoch,
    },
    /// A host is listed twice, or the owner is listed as a holder.
    #[error("the record of {guest} lists {host} as a holder twice, or as owner and holder at one epoch")]
    Holder {
        /// The guest.
        guest: GuestId,
        /// The host.
        host: HostId,
    },
}

impl OwnerRecord {
    /// The record of a guest that was never started.
    #[must_use]
    pub const fn new(guest: GuestId) -> Self {
        Self {
            guest,
            owner: Owner::Unowned,
            epoch: Epoch::ZERO,
            turn: 0,
            operation: None,
            last: None,
            holders: Vec::new(),
        }
    }

    /// Owner and epoch.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        Stamp { owner: self.owner, epoch: self.epoch }
    }

    /// Whether this host owns the guest at this epoch. What a host writes, serves or announces for the guest is refused when it does not.
    #[must_use]
    pub fn is_owned_by(&self, host: HostId, epoch: Epoch) -> bool {
        self.owner == Owner::Host(host) && self.epoch == epoch
    }

    /// The operation under way if it has this id.
    #[must_use]
    pub fn current(&self, operation: OperationId) -> Option<&Operation> {
        self.operation.as_ref().filter(|op| op.id == operation)
    }

    /// The last turn whose operation can never be granted any more.
    #[must_use]
    pub fn last_closed_turn(&self) -> u64 {
        match &self.operation {
            Some(op) if !matches!(op.verdict, Verdict::Aborted(_)) => op.turn.saturating_sub(1),
            _ => self.turn,
        }
    }

    /// What this host holds without owning, sealed at this epoch.
    #[must_use]
    pub fn holder(&self, host: HostId, epoch: Epoch) -> Option<&Holder> {
        self.holders.iter().find(|holder| holder.host == host && holder.epoch == epoch)
    }

    /// The alarm that stands while nobody runs a guest that should run.
    #[must_use]
    pub const fn alarm(&self) -> Option<Alarm> {
        match self.owner {
            Owner::Lost(host) => Some(Alarm::GuestLost { host, epoch: self.epoch }),
            _ => None,
        }
    }

    /// The destination's part of an operation.
    #[must_use]
    pub fn destination_plan(&self, op: &Operation) -> Option<DestinationPlan> {
        let to = op.kind.destination()?;
        Some(DestinationPlan {
            guest: self.guest,
            operation: op.id,
            turn: op.turn,
            kind: op.kind,
            from: op.from,
            to,
            holders: self.holders.clone(),
        })
    }

    /// What the controller has to tell whom, read off the record alone: sent after every change, after a restart of the
    /// controller, when an agent's link comes back, and every few seconds while the list is not empty. Repeating it is harmless.
    #[must_use]
    pub fn orders(&self) -> Vec<Order> {
        let mut orders = Vec::new();
        let mut source = |to, order| orders.push(Order { to, body: OrderBody::Source(order) });
        for holder in &self.holders {
            let (now, yours, needed) = (self.stamp(), holder.epoch, holder.needed);
            source(holder.host, SourceOrder::Elsewhere { now, yours, needed });
        }
        let Some(op) = &self.operation else { return orders };
        if let Some(host) = op.source().filter(|_| !op.source_lost) {
            match op.verdict {
                Verdict::Open if matches!(op.phase, Phase::Copy | Phase::Switch) => source(
                    host,
                    SourceOrder::Begin(SourcePlan {
                        guest: self.guest,
                        operation: op.id,
                        turn: op.turn,
                        kind: op.kind,
                        epoch: op.from.epoch,
                    }),
                ),
                Verdict::Aborted(_) if op.source_open => {
                    let (operation, turn, epoch) = (Some(op.id), op.turn, op.from.epoch);
                    source(host, SourceOrder::StillYours { operation, turn, epoch });
                }
                Verdict::Open | Verdict::Aborted(_) | Verdict::Granted(_) => {}
            }
        }
        if let Some(to) = op.kind.destination().filter(|_| op.destination_open) {
            let order = match op.verdict {
                Verdict::Open if op.phase == Phase::Plan => None,
                Verdict::Open if op.source_lost && op.is_mirrored() => {
                    Some(DestinationOrder::TakeOver { operation: op.id })
                }
                Verdict::Open => self.destination_plan(op).map(DestinationOrder::Prepare),
                Verdict::Aborted(_) => Some(DestinationOrder::Cancel { operation: op.id, turn: op.turn }),
                Verdict::Granted(grant) => Some(DestinationOrder::Granted(grant)),
            };
            orders.extend(order.map(|order| Order { to, body: OrderBody::Destination(order) }));
        }
        orders
    }

    /// Whether the record can have come from decisions; for what is read from a store or a wire.
    ///
    /// # Errors
    /// The first contradiction that is found.
    pub fn check(&self) -> Result<(), RecordError> {
        let guest = self.guest;
        let later = |later| RecordError::LaterEpoch { guest, epoch: self.epoch, later };
        for (at, holder) in self.holders.iter().enumerate() {
            let host = holder.host;
            if self.is_owned_by(host, holder.epoch) || self.holders[..at].iter().any(|other| other.host == host) {
                return Err(RecordError::Holder { guest, host });
            }
            if holder.epoch > self.epoch {
                return Err(later(holder.epoch));
            }
        }
        let Some(op) = &self.operation else { return Ok(()) };
        let (operation, phase) = (op.id, op.phase);
        if phase.is_terminal() {
            return Err(RecordError::EndedOperation { guest, operation, phase });
        }
        if phase.is_committed() != op.grant().is_some() {
            return Err(RecordError::PhaseAndVerdict { guest, operation, phase });
        }
        if op.from.epoch > self.epoch {
            return Err(later(op.from.epoch));
        }
        match op.grant() {
            Some(grant) if grant.epoch > self.epoch => Err(later(grant.epoch)),
            _ => Ok(()),
        }
    }

    /// Ends the operation.
    pub(crate) fn end(&mut self, phase: Phase) {
        if let Some(op) = self.operation.take() {
            self.last = Some(Ended { operation: op.id, phase, verdict: op.verdict });
        }
    }

    /// Ends the operation if nothing is open any more.
    pub(crate) fn settle(&mut self) {
        let Some(op) = &self.operation else { return };
        match op.verdict {
            Verdict::Aborted(_) if !op.source_open && !op.destination_open => self.end(Phase::RolledBack),
            Verdict::Granted(_) if !op.destination_open && self.holders.iter().all(|holder| holder.needed) => {
                self.end(Phase::Done);
            }
            Verdict::Open | Verdict::Aborted(_) | Verdict::Granted(_) => {}
        }
    }

    /// Notes that `host` holds state of the guest at `epoch`; replaces what was noted of it before.
    pub(crate) fn hold(&mut self, holder: Holder) {
        self.holders.retain(|other| other.host != holder.host);
        self.holders.insert(0, holder);
    }
}
