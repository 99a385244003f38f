//! The controller's decisions: begin, switch, abort, who owns it, a host is lost. Data in, data out.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, FreezeId, GuestId, HostId, OperationId};

use crate::{
    message::{
        AbortReason, Alarm, Grant, Holder, LocalCopy, MAX_VOLUMES, OperationKind, Owner, OwnerQuery, SourceOrder,
        Stamp, SwitchRefusal, SwitchRequest,
    },
    phase::Phase,
    record::{Operation, OwnerRecord, Verdict},
};

/// A new operation on a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BeginRequest {
    /// Its id: fresh.
    pub operation: OperationId,
    /// What it shall do.
    pub kind: OperationKind,
    /// The group's operation, if the guest moves with others: each member has an operation of its own.
    pub group: Option<OperationId>,
}

/// Why an operation cannot begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum BeginRefusal {
    /// Another operation is under way.
    #[error("operation {0} is under way on this guest")]
    Busy(OperationId),
    /// This very operation has ended.
    #[error("this operation has ended")]
    Over,
    /// The guest is not in a state in which this can be done.
    #[error("not possible for a guest in this state")]
    WrongState(Owner),
    /// The freeze was consumed, or is not the guest's newest state.
    #[error("this freeze is not the guest's state any more")]
    StaleFreeze,
    /// The destination is where the guest is.
    #[error("the guest is already there")]
    AlreadyThere,
    /// The owner still lacks blocks that others hold.
    #[error("the guest still lacks blocks that other hosts hold")]
    BlocksMissing,
}

/// Makes the operation the guest's current one, in [`Phase::Plan`]. Repeating the request gives the same record.
///
/// # Errors
/// Why it cannot begin; nothing has changed then.
pub fn begin(record: &OwnerRecord, request: &BeginRequest) -> Result<OwnerRecord, BeginRefusal> {
    if let Some(op) = &record.operation {
        return if op.id == request.operation && op.kind == request.kind {
            Ok(record.clone())
        } else {
            Err(BeginRefusal::Busy(op.id))
        };
    }
    if record.last.is_some_and(|last| last.operation == request.operation) {
        return Err(BeginRefusal::Over);
    }
    match (request.kind, record.owner) {
        (OperationKind::Migrate { to, .. } | OperationKind::Mirror { to }, Owner::Host(at)) if at == to => {
            return Err(BeginRefusal::AlreadyThere);
        }
        (kind, Owner::Host(_)) if kind.has_source() && !record.holders.is_empty() => {
            return Err(BeginRefusal::BlocksMissing);
        }
        (OperationKind::Thaw { freeze, .. }, Owner::Frozen(now)) if freeze != now => {
            return Err(BeginRefusal::StaleFreeze);
        }
        (OperationKind::Start { .. }, Owner::Unowned | Owner::Stopped)
        | (
            OperationKind::Migrate { .. }
            | OperationKind::Mirror { .. }
            | OperationKind::Freeze { .. }
            | OperationKind::Stop,
            Owner::Host(_),
        )
        | (OperationKind::Thaw { .. }, Owner::Frozen(_))
        | (OperationKind::RestartFromVolume { .. }, Owner::Lost(_)) => {}
        (OperationKind::Thaw { .. }, _) => return Err(BeginRefusal::StaleFreeze),
        (_, owner) => return Err(BeginRefusal::WrongState(owner)),
    }
    let mut next = record.clone();
    next.turn = next.turn.saturating_add(1);
    next.operation = Some(Operation {
        id: request.operation,
        turn: next.turn,
        kind: request.kind,
        phase: Phase::Plan,
        from: record.stamp(),
        verdict: Verdict::Open,
        group: request.group,
        source_open: request.kind.has_source(),
        destination_open: request.kind.destination().is_some(),
        source_lost: false,
    });
    Ok(next)
}

/// Sets a guest that nobody runs back to what a store holds of it, its memory included: from then on it is frozen as of that, at its
/// epoch, and what others hold of it is not needed any more. What it wrote after that is given up: whoever asks for this knows.
///
/// # Errors
/// When an operation is under way, or a host may run it.
pub fn set_back(record: &OwnerRecord, freeze: FreezeId) -> Result<OwnerRecord, BeginRefusal> {
    if let Some(op) = &record.operation {
        return Err(BeginRefusal::Busy(op.id));
    }
    match record.owner {
        Owner::Lost(_) | Owner::Stopped => {}
        owner => return Err(BeginRefusal::WrongState(owner)),
    }
    let mut next = record.clone();
    next.owner = Owner::Frozen(freeze);
    next.holders.retain(|holder| !holder.lost);
    for holder in &mut next.holders {
        holder.needed = false;
    }
    Ok(next)
}

/// The pre-checks passed: out of [`Phase::Plan`] into the first phase that touches a host. `None`: not in that phase.
#[must_use]
pub fn leave_plan(record: &OwnerRecord, operation: OperationId) -> Option<OwnerRecord> {
    let mut next = record.clone();
    let op = next.operation.as_mut().filter(|op| op.id == operation)?;
    if op.phase != Phase::Plan || op.verdict != Verdict::Open {
        return None;
    }
    op.phase = if op.kind.destination().is_some() { Phase::Prepare } else { Phase::Copy };
    Some(next)
}

/// The answer to a request for the switch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SwitchDecision {
    /// Yes: valid when `record` is durable, and not before.
    Granted {
        /// To be written, with the volumes, ports, events that change with it.
        record: Box<OwnerRecord>,
        /// To be sent when that is durable.
        grant: Grant,
    },
    /// It was granted before: the same answer again, nothing to write.
    AlreadyGranted(Grant),
    /// No, for good.
    Refused(SwitchRefusal),
}

/// What a request for the switch comes to, before anything changes.
enum Admission {
    Open,
    Already(Grant),
}

/// Whether this host may have this switch now. The one place where that is decided.
fn admit(record: &OwnerRecord, asker: HostId, request: &SwitchRequest) -> Result<Admission, SwitchRefusal> {
    if request.guest != record.guest {
        return Err(SwitchRefusal::WrongGuest);
    }
    if request.volumes.len() > MAX_VOLUMES {
        return Err(SwitchRefusal::TooManyVolumes);
    }
    let Some(op) = record.current(request.operation) else {
        // It ended: who was granted and still owns hears so again.
        return match record.last {
            Some(last) if last.operation == request.operation => match last.verdict {
                Verdict::Granted(grant) if record.stamp() == (Stamp { owner: grant.owner, epoch: grant.epoch }) => {
                    if may_ask(grant.owner, request.from.owner, asker) && request.to == grant.owner {
                        Ok(Admission::Already(grant))
                    } else {
                        Err(SwitchRefusal::NotAuthorised)
                    }
                }
                Verdict::Aborted(reason) => Err(SwitchRefusal::Aborted(reason)),
                Verdict::Granted(_) | Verdict::Open => Err(SwitchRefusal::UnknownOperation),
            },
            _ => Err(SwitchRefusal::UnknownOperation),
        };
    };
    if !may_ask(op.kind.target(), op.from.owner, asker) {
        return Err(SwitchRefusal::NotAuthorised);
    }
    if request.to != op.kind.target() {
        return Err(SwitchRefusal::WrongTarget);
    }
    if request.from != op.from {
        return Err(SwitchRefusal::WrongOrigin(record.stamp()));
    }
    match op.verdict {
        Verdict::Granted(grant) => Ok(Admission::Already(grant)),
        Verdict::Aborted(reason) => Err(SwitchRefusal::Aborted(reason)),
        Verdict::Open if record.stamp() != op.from => Err(SwitchRefusal::WrongOrigin(record.stamp())),
        Verdict::Open if matches!(op.kind, OperationKind::Mirror { .. }) && !op.source_lost => {
            Err(SwitchRefusal::SourceNotLost)
        }
        Verdict::Open => Ok(Admission::Open),
    }
}

/// Who holds the complete state, and so may ask: the destination if there is one, else the source.
fn may_ask(target: Owner, from: Owner, asker: HostId) -> bool {
    match target {
        Owner::Host(to) => to == asker,
        Owner::Frozen(_) | Owner::Stopped | Owner::Unowned | Owner::Lost(_) => from == Owner::Host(asker),
    }
}

/// COMMIT POINT: the record after the switch. Nothing fallible follows once it is durable.
fn commit(record: &OwnerRecord, op: &Operation) -> (OwnerRecord, Grant) {
    let grant = Grant {
        guest: record.guest,
        operation: op.id,
        turn: op.turn,
        owner: op.kind.target(),
        epoch: op.kind.epoch_after(op.from.epoch),
    };
    let mut next = record.clone();
    next.owner = grant.owner;
    next.epoch = grant.epoch;
    if let Owner::Host(to) = grant.owner {
        // What the new owner held itself is its own again.
        next.holders.retain(|holder| holder.host != to);
    }
    if let Some(host) = op.source() {
        // The store holds all of a frozen guest, a mirror all of its own; else the source's blocks are needed until they are fetched.
        let needed = !matches!(op.kind, OperationKind::Freeze { .. } | OperationKind::Mirror { .. });
        next.hold(Holder { host, epoch: op.from.epoch, needed, lost: op.source_lost });
    }
    let mut op = op.clone();
    op.verdict = Verdict::Granted(grant);
    op.source_open = false;
    op.phase = if op.destination_open { Phase::Resume } else { Phase::Finish };
    next.operation = Some(op);
    next.settle();
    (next, grant)
}

/// Decides a request for the switch, made by the host `asker` (known from its link).
///
/// One switch per operation; an aborted operation is never granted; a repeated request gets the same answer; a request
/// from another owner or epoch than the record's is refused.
#[must_use]
pub fn grant_switch(record: &OwnerRecord, asker: HostId, request: &SwitchRequest) -> SwitchDecision {
    match (admit(record, asker, request), &record.operation) {
        (Ok(Admission::Already(grant)), _) => SwitchDecision::AlreadyGranted(grant),
        (Ok(Admission::Open), Some(op)) if op.group.is_some() => SwitchDecision::Refused(SwitchRefusal::GroupMember),
        (Ok(Admission::Open), Some(op)) => {
            let (record, grant) = commit(record, op);
            SwitchDecision::Granted { record: Box::new(record), grant }
        }
        (Ok(Admission::Open), None) => SwitchDecision::Refused(SwitchRefusal::UnknownOperation),
        (Err(reason), _) => SwitchDecision::Refused(reason),
    }
}

/// The answer to a group's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupDecision {
    /// All of them: to be written in one transaction.
    Granted(Vec<(OwnerRecord, Grant)>),
    /// They were granted before.
    AlreadyGranted(Vec<Grant>),
    /// None of them.
    Refused {
        /// The member that stands in the way.
        guest: GuestId,
        /// Why.
        reason: SwitchRefusal,
    },
}

/// Decides the switch of a whole group: every member or none. `requests[i]` is the request for `records[i]`, with the
/// host that made it. All must be of the same group's operation.
#[must_use]
pub fn grant_switch_all(records: &[OwnerRecord], requests: &[(HostId, SwitchRequest)]) -> GroupDecision {
    let refused = |guest, reason| GroupDecision::Refused { guest, reason };
    let Some(first) = records.first() else { return GroupDecision::Granted(Vec::new()) };
    let tag = |record: &OwnerRecord| record.operation.as_ref().and_then(|op| op.group);
    let group = records.iter().find_map(tag);
    if records.len() != requests.len() {
        return refused(first.guest, SwitchRefusal::GroupMismatch);
    }
    let mut granted = Vec::new();
    let mut already = Vec::new();
    for (at, (record, (asker, request))) in records.iter().zip(requests).enumerate() {
        let twice = records[..at].iter().any(|other| other.guest == record.guest);
        // One that is over (a freeze ends when it is granted) says no more of what it was a part.
        if twice || (record.operation.is_some() && tag(record) != group) {
            return refused(record.guest, SwitchRefusal::GroupMismatch);
        }
        match (admit(record, *asker, request), &record.operation) {
            (Ok(Admission::Already(grant)), _) => already.push(grant),
            (Ok(Admission::Open), Some(op)) => granted.push(commit(record, op)),
            (Ok(Admission::Open), None) => return refused(record.guest, SwitchRefusal::UnknownOperation),
            (Err(reason), _) => return refused(record.guest, reason),
        }
    }
    match (granted.is_empty(), already.is_empty()) {
        (_, true) => GroupDecision::Granted(granted),
        (true, false) => GroupDecision::AlreadyGranted(already),
        // Cannot come of decisions made here: some were switched without the others.
        (false, false) => refused(first.guest, SwitchRefusal::GroupMismatch),
    }
}

/// The answer to a wish to abort.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AbortDecision {
    /// Yes: valid when `record` is durable. From then on it can never be granted.
    Aborted {
        /// To be written.
        record: Box<OwnerRecord>,
    },
    /// It is aborted already.
    AlreadyAborted(AbortReason),
    /// Too late: the switch is made.
    TooLate(Grant),
    /// A stop that has begun cannot be taken back.
    NotCancellable,
    /// Only the whole group can be aborted: [`request_abort_all`].
    GroupMember,
    /// The guest has no such operation under way.
    UnknownOperation,
}

/// Decides a wish to abort an operation, whoever has it.
#[must_use]
pub fn request_abort(record: &OwnerRecord, operation: OperationId, reason: AbortReason) -> AbortDecision {
    match record.current(operation) {
        Some(op) if op.group.is_some() && op.verdict == Verdict::Open => AbortDecision::GroupMember,
        _ => abort_member(record, operation, reason),
    }
}

fn abort_member(record: &OwnerRecord, operation: OperationId, reason: AbortReason) -> AbortDecision {
    let Some(op) = record.current(operation) else { return AbortDecision::UnknownOperation };
    match op.verdict {
        Verdict::Granted(grant) => AbortDecision::TooLate(grant),
        Verdict::Aborted(reason) => AbortDecision::AlreadyAborted(reason),
        Verdict::Open if op.kind == OperationKind::Stop && op.phase != Phase::Plan => AbortDecision::NotCancellable,
        // Its standby is all there is; only that can say that there is nothing.
        Verdict::Open if op.is_mirrored() && op.source_lost => AbortDecision::NotCancellable,
        Verdict::Open => AbortDecision::Aborted { record: Box::new(aborted(record, reason, |_| {})) },
    }
}

/// Aborts the operation of every member of a group (`group` is the group's operation), or of none. `Err`: the member that stands in
/// the way and its answer. One whose source is lost meanwhile is not aborted, which could only lose it, but leaves the group.
///
/// # Errors
/// The first member that cannot be aborted any more (members already aborted are no hindrance).
pub fn request_abort_all(
    records: &[OwnerRecord],
    group: OperationId,
    reason: AbortReason,
) -> Result<Vec<OwnerRecord>, (GuestId, AbortDecision)> {
    let member = |record: &OwnerRecord| match abort_of(record, group, reason) {
        // Its source is lost: what its destination has may be all there is of it. It goes on alone, and is saved or lost by that.
        AbortDecision::Aborted { .. } if is_left_to_its_destination(record) => Ok(alone(record)),
        AbortDecision::Aborted { record } => Ok(*record),
        AbortDecision::AlreadyAborted(_) => Ok(record.clone()),
        other => Err((record.guest, other)),
    };
    records.iter().map(member).collect()
}

fn is_left_to_its_destination(record: &OwnerRecord) -> bool {
    record.operation.as_ref().is_some_and(|op| op.source_lost && op.destination_open)
}

/// The record with its operation as one of a guest that moves alone.
fn alone(record: &OwnerRecord) -> OwnerRecord {
    let mut next = record.clone();
    if let Some(op) = &mut next.operation {
        op.group = None;
    }
    next
}

fn abort_of(record: &OwnerRecord, group: OperationId, reason: AbortReason) -> AbortDecision {
    match &record.operation {
        Some(op) if op.group == Some(group) => abort_member(record, op.id, reason),
        _ => AbortDecision::UnknownOperation,
    }
}

/// The record after an abort, with what else is known of the participants.
pub(crate) fn aborted(record: &OwnerRecord, reason: AbortReason, also: impl FnOnce(&mut OwnerRecord)) -> OwnerRecord {
    let mut next = record.clone();
    if let Some(op) = &mut next.operation {
        if op.verdict == Verdict::Open {
            op.verdict = Verdict::Aborted(reason);
        }
        if let (true, Some(host)) = (op.source_lost, op.source()) {
            op.source_open = false;
            lose(&mut next, host, true);
        }
    }
    also(&mut next);
    next.settle();
    next
}

/// The owner's running copy is gone: an alarm that stands until the guest is started again.
pub(crate) fn lose(record: &mut OwnerRecord, host: HostId, lost: bool) {
    let epoch = record.epoch;
    record.owner = Owner::Lost(host);
    record.hold(Holder { host, epoch, needed: true, lost });
}

/// What the controller does with a paused source that wants its guest back while nothing is decided: policy, and so an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenOpen {
    /// Let it wait: the destination is known to be near its end.
    Wait,
    /// Abort the operation and let it go on.
    Abort,
}

/// The answer to a source's question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskDecision {
    /// To be sent, when `record` (if any) is durable.
    pub answer: SourceOrder,
    /// To be written first.
    pub record: Option<OwnerRecord>,
    /// To be raised.
    pub alarm: Option<Alarm>,
    /// The asker's group should be aborted as a whole.
    pub abort_group: bool,
}

/// Decides who owns the guest, for a host that did at `query.epoch`.
#[must_use]
pub fn ask_owner(record: &OwnerRecord, asker: HostId, query: &OwnerQuery, when_open: WhenOpen) -> AskDecision {
    let plain = |answer| AskDecision { answer, record: None, alarm: None, abort_group: false };
    let operation = query.operation;
    let yours = |record: &OwnerRecord| SourceOrder::StillYours {
        operation,
        turn: record.last_closed_turn(),
        epoch: query.epoch,
    };
    if query.epoch > record.epoch {
        let alarm = Some(Alarm::EpochFromTheFuture { host: asker, epoch: query.epoch });
        return AskDecision { alarm, ..plain(SourceOrder::Undecided { operation }) };
    }
    if !record.is_owned_by(asker, query.epoch) {
        return plain(elsewhere(record, asker, query.epoch));
    }
    match record.operation.as_ref().filter(|op| Some(op.id) == operation && op.verdict == Verdict::Open) {
        // Whatever it asks about is over or aborted: it owns, and nothing can take that from it by that operation.
        None => plain(yours(record)),
        Some(op) => {
            // A source without its copy gains nothing by an abort: the destination may be all there is.
            let abort = query.wants_back && query.copy == LocalCopy::Intact && when_open == WhenOpen::Abort;
            let undecided = plain(SourceOrder::Undecided { operation });
            match request_abort(record, op.id, AbortReason::ContactLost) {
                AbortDecision::Aborted { record } if abort => {
                    AskDecision { answer: yours(&record), record: Some(*record), ..undecided }
                }
                AbortDecision::GroupMember => AskDecision { abort_group: abort, ..undecided },
                _ => undecided,
            }
        }
    }
}

/// What a host that does not own the guest at `epoch` is told of its copy.
pub(crate) fn elsewhere(record: &OwnerRecord, host: HostId, epoch: Epoch) -> SourceOrder {
    let needed = record.holder(host, epoch).is_some_and(|holder| holder.needed);
    SourceOrder::Elsewhere { now: record.stamp(), yours: epoch, needed }
}

/// What is known when a host is declared lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossDecision {
    /// To be written; `None`: the record does not change.
    pub record: Option<OwnerRecord>,
    /// To be raised.
    pub alarms: Vec<Alarm>,
    /// The guest's group must be aborted as a whole first.
    pub abort_group: bool,
}

/// The host is gone and cannot come back with a running guest: the provider says terminated, an operator confirms, or
/// its lease has run out. That proof is the caller's; without it two copies could run.
#[must_use]
pub fn note_host_lost(record: &OwnerRecord, host: HostId) -> LossDecision {
    let mut next = record.clone();
    let mut alarms = Vec::new();
    let epoch = record.epoch;
    let mut lost_a_needed_copy = false;
    next.holders.retain(|holder| holder.host != host || holder.needed);
    // A restart begins without the copy of the host that its guest was lost with: hearing again that it is gone is no news.
    let began_without = record.operation.as_ref().is_some_and(|op| op.from.owner == Owner::Lost(host));
    for holder in next.holders.iter_mut().filter(|holder| holder.host == host) {
        lost_a_needed_copy |= !(holder.lost && began_without);
        if !holder.lost {
            holder.lost = true;
            alarms.push(Alarm::NeededCopyLost { host, epoch: holder.epoch });
        }
    }
    let owns = record.owner == Owner::Host(host);
    // Where a stopped guest was stopped are its newest blocks.
    let had_a_stopped_guest = record.owner == Owner::Stopped && record.holder(host, epoch).is_some();
    match next.operation.as_mut().map(|op| (op.verdict, op)) {
        None if owns || had_a_stopped_guest => lose(&mut next, host, true),
        None => {}
        Some((Verdict::Open, op)) => {
            if had_a_stopped_guest {
                if op.group.is_some() {
                    return LossDecision { record: None, alarms: Vec::new(), abort_group: true };
                }
                op.destination_open &= op.kind.destination() != Some(host);
                next = aborted(&next, AbortReason::HostLost, |next| lose(next, host, true));
            } else if op.kind.destination() == Some(host) {
                if op.group.is_some() {
                    return LossDecision { record: None, alarms: Vec::new(), abort_group: true };
                }
                op.destination_open = false;
                next = aborted(&next, AbortReason::HostLost, |_| {});
            } else if op.source() == Some(host) {
                if op.group.is_some()
                    && !(op.kind.destination().is_some() && matches!(op.phase, Phase::Copy | Phase::Switch))
                {
                    return LossDecision { record: None, alarms: Vec::new(), abort_group: true };
                }
                op.source_lost = true;
                op.source_open = false;
                let is_copied = matches!(op.phase, Phase::Copy | Phase::Switch);
                if op.kind.destination().is_none() || !is_copied {
                    // Nobody else can complete a freeze or a stop, or a move that the source was not told to begin.
                    next = aborted(&next, AbortReason::HostLost, |_| {});
                }
            }
        }
        Some((Verdict::Aborted(_), op)) => {
            if op.kind.destination() == Some(host) {
                op.destination_open = false;
            } else if op.source() == Some(host) && !op.source_lost {
                op.source_lost = true;
                op.source_open = false;
                if owns {
                    lose(&mut next, host, true);
                }
            }
            if had_a_stopped_guest {
                lose(&mut next, host, true);
            }
            next.settle();
        }
        Some((Verdict::Granted(_), op)) => {
            if owns && op.destination_open {
                lose(&mut next, host, true);
                next.end(Phase::Failed);
            } else if owns {
                lose(&mut next, host, true);
                next.settle();
            } else if lost_a_needed_copy && op.destination_open {
                next.end(Phase::Failed);
            } else {
                next.settle();
            }
        }
    }
    if matches!(next.owner, Owner::Lost(_)) && next.owner != record.owner {
        alarms.push(Alarm::GuestLost { host, epoch });
    }
    LossDecision { record: (next != *record).then_some(next), alarms, abort_group: false }
}
