//! What the controller does with an agent's report: the next record, and what to answer.
//!
//! Every report is checked against what its sender's host owns, holds or was assigned at that epoch; one that does not
//! fit changes nothing. Reports may come late, twice and in any order.

use supercloud_ids::{Epoch, HostId, OperationId};

use crate::{
    decide::{
        AbortDecision, SwitchDecision, WhenOpen, aborted, ask_owner, elsewhere, grant_switch, lose, request_abort,
    },
    message::{
        AbortReason, Alarm, DestinationOrder, LocalCopy, Order, OrderBody, Owner, OwnerQuery, Report, SourceOrder,
        SwitchRefusal, SwitchRequest,
    },
    phase::Phase,
    record::{Operation, OwnerRecord, Verdict},
};

/// What the caller has to do about the guest's group before the report can be answered in full; the agent repeats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupNeed {
    /// Nothing.
    None,
    /// This member is ready. When all are: [`crate::grant_switch_all`] with every member's newest request.
    Ready(SwitchRequest),
    /// [`crate::request_abort_all`].
    Abort(AbortReason),
}

/// The outcome of a report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// To be written in one transaction; if the record has changed meanwhile, decide again. `None`: nothing changes.
    pub record: Option<OwnerRecord>,
    /// To be sent, only after `record` is durable.
    pub orders: Vec<Order>,
    /// To be raised.
    pub alarms: Vec<Alarm>,
    /// What the group needs.
    pub group: GroupNeed,
}

impl Accepted {
    const fn nothing() -> Self {
        Self { record: None, orders: Vec::new(), alarms: Vec::new(), group: GroupNeed::None }
    }

    fn answer(to: HostId, body: OrderBody) -> Self {
        Self { orders: vec![Order { to, body }], ..Self::nothing() }
    }

    /// The new record and all that it lets the controller say.
    fn changed(record: OwnerRecord) -> Self {
        Self { orders: record.orders(), record: Some(record), ..Self::nothing() }
    }

    fn also(mut self, to: HostId, body: OrderBody) -> Self {
        let order = Order { to, body };
        if !self.orders.contains(&order) {
            self.orders.push(order);
        }
        self
    }

    fn alarm(mut self, alarm: Alarm) -> Self {
        self.alarms.push(alarm);
        self
    }
}

/// Decides what a report from `from` (known from its link) changes and how it is answered.
#[must_use]
pub fn accept(record: &OwnerRecord, from: HostId, report: &Report, when_open: WhenOpen) -> Accepted {
    match report {
        Report::Prepared { operation } => prepared(record, from, *operation),
        Report::Paused { operation } => paused(record, from, *operation),
        Report::RequestSwitch(request) => switch(record, from, request),
        Report::RequestAbort { operation, reason, owned } => abort(record, from, *operation, *reason, *owned),
        Report::AskOwner(query) => ask(record, from, query, when_open),
        Report::Running { operation, epoch } => running(record, from, *operation, *epoch),
        Report::FetchesMemory { operation, epoch } => fetches_memory(record, from, *operation, *epoch),
        Report::NothingMissing { operation, epoch } => nothing_missing(record, from, *operation, *epoch),
        Report::Resumed { operation, epoch } => resumed(record, from, *operation, *epoch),
        Report::Released { epoch } => released(record, from, *epoch),
        Report::Cleaned { operation } => cleaned(record, from, *operation),
        Report::GuestLost { operation, epoch } => guest_lost(record, from, *operation, *epoch),
        Report::LostAfterSwitch { operation, epoch } => lost_after_switch(record, from, *operation, *epoch),
    }
}

fn to_source(order: SourceOrder) -> OrderBody {
    OrderBody::Source(order)
}

fn to_destination(order: DestinationOrder) -> OrderBody {
    OrderBody::Destination(order)
}

/// The truth about an operation for a host that believes it is its destination and has not begun to run.
fn truth(record: &OwnerRecord, from: HostId, operation: OperationId) -> Option<DestinationOrder> {
    let over = DestinationOrder::Refused { operation, reason: SwitchRefusal::UnknownOperation };
    match record.current(operation) {
        Some(op) if op.kind.destination() == Some(from) => match op.verdict {
            Verdict::Open => None,
            Verdict::Aborted(_) => Some(DestinationOrder::Cancel { operation, turn: op.turn }),
            Verdict::Granted(grant) => Some(DestinationOrder::Granted(grant)),
        },
        Some(_) => Some(over),
        None => match record.last.filter(|last| last.operation == operation).map(|last| last.verdict) {
            Some(Verdict::Granted(grant))
                if grant.owner == Owner::Host(from) && record.is_owned_by(from, grant.epoch) =>
            {
                Some(DestinationOrder::Granted(grant))
            }
            _ => Some(over),
        },
    }
}

fn tell_truth(record: &OwnerRecord, from: HostId, operation: OperationId) -> Accepted {
    match truth(record, from, operation) {
        Some(order) => Accepted::answer(from, to_destination(order)),
        None => Accepted::nothing(),
    }
}

fn prepared(record: &OwnerRecord, from: HostId, operation: OperationId) -> Accepted {
    let mut next = record.clone();
    match &mut next.operation {
        Some(op)
            if op.id == operation
                && op.kind.destination() == Some(from)
                && op.verdict == Verdict::Open
                && op.phase == Phase::Prepare =>
        {
            op.phase = Phase::Copy;
            Accepted::changed(next)
        }
        _ => tell_truth(record, from, operation),
    }
}

fn paused(record: &OwnerRecord, from: HostId, operation: OperationId) -> Accepted {
    let mut next = record.clone();
    match &mut next.operation {
        Some(op) if op.id == operation && op.source() == Some(from) && op.phase == Phase::Copy => {
            op.phase = Phase::Switch;
            Accepted { record: Some(next), ..Accepted::nothing() }
        }
        _ => Accepted::nothing(),
    }
}

fn switch(record: &OwnerRecord, from: HostId, request: &SwitchRequest) -> Accepted {
    let operation = request.operation;
    let by_destination = matches!(request.to, Owner::Host(_));
    match grant_switch(record, from, request) {
        SwitchDecision::Granted { record, .. } => {
            // Orders of the new record tell both sides; a freeze or stop that ended at once has only its holder to tell.
            let answer = (!by_destination).then(|| elsewhere(&record, from, request.from.epoch));
            let accepted = Accepted::changed(*record);
            match answer {
                Some(answer) => accepted.also(from, to_source(answer)),
                None => accepted,
            }
        }
        SwitchDecision::AlreadyGranted(grant) if by_destination => {
            Accepted::answer(from, to_destination(DestinationOrder::Granted(grant)))
        }
        SwitchDecision::Refused(SwitchRefusal::GroupMember) => {
            let ready = GroupNeed::Ready(request.clone());
            let waiting = if by_destination {
                to_destination(DestinationOrder::Wait { operation })
            } else {
                to_source(SourceOrder::Undecided { operation: Some(operation) })
            };
            Accepted { group: ready, ..Accepted::answer(from, waiting) }
        }
        SwitchDecision::Refused(reason) if by_destination => {
            Accepted::answer(from, to_destination(DestinationOrder::Refused { operation, reason }))
        }
        // The source of a freeze or a stop: it hears who owns the guest, which is all that it needs to know.
        SwitchDecision::AlreadyGranted(_) | SwitchDecision::Refused(_) => {
            let query = OwnerQuery {
                operation: Some(operation),
                epoch: request.from.epoch,
                copy: LocalCopy::Intact,
                wants_back: false,
            };
            ask(record, from, &query, WhenOpen::Wait)
        }
    }
}

fn abort(
    record: &OwnerRecord,
    from: HostId,
    operation: OperationId,
    reason: AbortReason,
    owned: Option<Epoch>,
) -> Accepted {
    let takes_part = |op: &Operation| op.source() == Some(from) || op.kind.destination() == Some(from);
    let has_nothing = |op: &&Operation| op.is_mirrored() && op.source_lost && op.kind.destination() == Some(from);
    if record.current(operation).filter(has_nothing).is_some() {
        return Accepted::changed(aborted(record, reason, |_| {}));
    }
    if record.current(operation).is_some_and(takes_part) {
        match request_abort(record, operation, reason) {
            AbortDecision::Aborted { record } => return Accepted::changed(*record),
            AbortDecision::GroupMember => {
                return Accepted { group: GroupNeed::Abort(reason), ..Accepted::nothing() };
            }
            AbortDecision::AlreadyAborted(_)
            | AbortDecision::TooLate(_)
            | AbortDecision::NotCancellable
            | AbortDecision::UnknownOperation => {}
        }
    }
    match owned {
        None => tell_truth(record, from, operation),
        Some(epoch) => {
            let operation = Some(operation);
            let query = OwnerQuery { operation, epoch, copy: LocalCopy::Intact, wants_back: false };
            ask(record, from, &query, WhenOpen::Wait)
        }
    }
}

fn ask(record: &OwnerRecord, from: HostId, query: &OwnerQuery, when_open: WhenOpen) -> Accepted {
    let decision = ask_owner(record, from, query, when_open);
    let accepted = match decision.record {
        Some(next) => Accepted::changed(next),
        None => match returned(record, from, query.epoch) {
            Some(next) => Accepted { record: Some(next), ..Accepted::nothing() },
            None => Accepted::nothing(),
        },
    };
    Accepted {
        alarms: decision.alarm.into_iter().collect(),
        group: if decision.abort_group { GroupNeed::Abort(AbortReason::ContactLost) } else { GroupNeed::None },
        ..accepted.also(from, to_source(decision.answer))
    }
}

/// A holder that had been declared lost speaks again: what it holds can be had after all.
fn returned(record: &OwnerRecord, from: HostId, epoch: Epoch) -> Option<OwnerRecord> {
    record.holder(from, epoch).filter(|holder| holder.lost)?;
    let mut next = record.clone();
    for holder in next.holders.iter_mut().filter(|holder| holder.host == from) {
        holder.lost = false;
    }
    Some(next)
}

/// A host says that it runs the guest and the record says otherwise: it must learn so.
fn superseded(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    if epoch >= record.epoch {
        return match epoch > record.epoch {
            true => Accepted::nothing().alarm(Alarm::EpochFromTheFuture { host: from, epoch }),
            false => Accepted::nothing(),
        };
    }
    let reason = SwitchRefusal::WrongOrigin(record.stamp());
    Accepted::answer(from, to_destination(DestinationOrder::Refused { operation, reason }))
}

fn running(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    if !record.is_owned_by(from, epoch) {
        return superseded(record, from, operation, epoch);
    }
    let mut next = record.clone();
    match &mut next.operation {
        Some(op) if op.id == operation && op.grant().is_some() && op.phase == Phase::Resume => {
            op.forward(Phase::Finish);
            Accepted::changed(next)
        }
        _ => Accepted::nothing(),
    }
}

/// A destination whose source was declared lost waits in vain for the memory that it lacks, if it lacks any.
fn fetches_memory(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    let is_mine = record.is_owned_by(from, epoch)
        && record.operation.is_none()
        && record.last.is_some_and(|last| last.operation == operation && last.phase == Phase::Failed);
    if is_mine && record.holders.iter().any(|holder| holder.needed && holder.lost) {
        return Accepted::answer(from, to_destination(DestinationOrder::SourceLost { operation }));
    }
    Accepted::nothing()
}

fn nothing_missing(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    if !record.is_owned_by(from, epoch) {
        return superseded(record, from, operation, epoch);
    }
    let mut next = record.clone();
    let is_owner_by = |verdict: Verdict| matches!(verdict, Verdict::Granted(grant) if grant.epoch == epoch);
    let mine = next.operation.as_ref().is_some_and(|op| op.id == operation && is_owner_by(op.verdict))
        || next.last.is_some_and(|last| last.operation == operation && is_owner_by(last.verdict));
    if !mine {
        return Accepted::nothing();
    }
    if let Some(op) = next.operation.as_mut().filter(|op| op.id == operation) {
        op.forward(Phase::Finish);
        op.destination_open = false;
    }
    next.holders.retain(|holder| !holder.lost);
    for holder in &mut next.holders {
        holder.needed = false;
    }
    next.settle();
    let settled = to_destination(DestinationOrder::Settled { operation });
    if next == *record { Accepted::answer(from, settled) } else { Accepted::changed(next).also(from, settled) }
}

fn resumed(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    let mut next = record.clone();
    match &mut next.operation {
        Some(op)
            if op.id == operation
                && op.source() == Some(from)
                && op.from.epoch == epoch
                && op.source_open
                && matches!(op.verdict, Verdict::Aborted(_)) =>
        {
            op.source_open = false;
            next.settle();
            Accepted::changed(next)
        }
        _ => Accepted::nothing(),
    }
}

fn released(record: &OwnerRecord, from: HostId, epoch: Epoch) -> Accepted {
    let Some(holder) = record.holder(from, epoch) else { return Accepted::nothing() };
    let needed = holder.needed;
    let mut next = record.clone();
    next.holders.retain(|holder| holder.host != from);
    next.settle();
    let accepted = Accepted::changed(next);
    // Nobody told it to: what was still needed is gone.
    if needed { accepted.alarm(Alarm::NeededCopyLost { host: from, epoch }) } else { accepted }
}

fn cleaned(record: &OwnerRecord, from: HostId, operation: OperationId) -> Accepted {
    let Some(op) = record.current(operation).filter(|op| op.kind.destination() == Some(from) && op.destination_open)
    else {
        return Accepted::nothing();
    };
    let close = |next: &mut OwnerRecord| {
        if let Some(op) = &mut next.operation {
            op.destination_open = false;
        }
    };
    match op.verdict {
        // A late report of an earlier clean-up; a destination that really has nothing says so when it hears of the grant.
        Verdict::Granted(_) => Accepted::nothing(),
        Verdict::Aborted(reason) => Accepted::changed(aborted(record, reason, close)),
        Verdict::Open if op.group.is_some() => {
            Accepted { group: GroupNeed::Abort(AbortReason::DestinationFailed), ..Accepted::nothing() }
        }
        Verdict::Open => Accepted::changed(aborted(record, AbortReason::DestinationFailed, close)),
    }
}

fn guest_lost(record: &OwnerRecord, from: HostId, operation: Option<OperationId>, epoch: Epoch) -> Accepted {
    if !record.is_owned_by(from, epoch) {
        let query = OwnerQuery { operation, epoch, copy: LocalCopy::Gone, wants_back: false };
        return ask(record, from, &query, WhenOpen::Wait);
    }
    let mut next = match &record.operation {
        Some(op) if op.verdict == Verdict::Open && op.group.is_some() => {
            return Accepted { group: GroupNeed::Abort(AbortReason::GuestLost), ..Accepted::nothing() };
        }
        // Its mirror can go on without it.
        Some(op) if op.is_mirrored() => {
            if op.source_lost {
                return Accepted::nothing();
            }
            let mut next = record.clone();
            if let Some(op) = &mut next.operation {
                op.source_lost = true;
                op.source_open = false;
            }
            return Accepted::changed(next);
        }
        Some(op) if op.verdict == Verdict::Open => aborted(record, AbortReason::GuestLost, |_| {}),
        // The destination of a move that is not over reports by its other machine; nothing else can own here.
        Some(op) if op.grant().is_some() && op.destination_open => return Accepted::nothing(),
        _ => record.clone(),
    };
    lose(&mut next, from, false);
    if let Some(op) = &mut next.operation {
        op.source_open = false;
    }
    next.settle();
    let answer = to_source(elsewhere(&next, from, epoch));
    Accepted::changed(next).also(from, answer).alarm(Alarm::GuestLost { host: from, epoch })
}

fn lost_after_switch(record: &OwnerRecord, from: HostId, operation: OperationId, epoch: Epoch) -> Accepted {
    let settled = to_destination(DestinationOrder::Settled { operation });
    if !record.is_owned_by(from, epoch) {
        // Repeated, or long replaced: it holds sealed volumes at most, and hears of them as a holder.
        return match epoch <= record.epoch && record.holder(from, epoch).is_some() {
            true => Accepted::answer(from, settled),
            false => superseded(record, from, operation, epoch),
        };
    }
    let open = record.current(operation).is_some_and(|op| op.grant().is_some() && op.destination_open);
    // A move that failed for want of another's blocks may still have had its destination fetching.
    let fetching = record.holders.iter().any(|holder| holder.needed);
    let failed = record.last.is_some_and(|last| last.operation == operation && last.phase == Phase::Failed)
        && record.operation.is_none()
        && fetching;
    if !open && !failed {
        return Accepted::nothing();
    }
    let mut next = record.clone();
    lose(&mut next, from, false);
    if open {
        next.end(Phase::Failed);
    }
    Accepted::changed(next).also(from, settled).alarm(Alarm::LostAfterSwitch { host: from, epoch })
}
