//! What changes together with a guest's ownership record: its volumes, its ports, its operation, its freezes. Pure.
//!
//! The ownership protocol decides who owns; this says what that means for everything that hangs on the guest. The caller writes
//! all of it in the one transaction that also holds the new ownership record.

use supercloud_api::{
    Code, Freeze, Host, Operation, Phase, Port, Problem, Volume,
    handover::{self, AbortReason, OperationKind, Owner, OwnerRecord, Verdict, VolumeStamp},
    ids::{CloudId, Epoch, FreezeId, HostId},
    link::{FrozenContent, ReportDetails},
    unix_ms,
};

use crate::state::GuestRecord;

/// Everything that hangs on a guest, before and (after [`apply`]) as it shall be.
#[derive(Debug, Clone)]
pub struct Attached {
    /// The guest.
    pub guest: GuestRecord,
    /// Its volumes.
    pub volumes: Vec<Volume>,
    /// Its ports.
    pub ports: Vec<Port>,
    /// The operation under way, if its record is there.
    pub operation: Option<Operation>,
    /// The freeze that the operation makes or consumes, if its record is there.
    pub freeze: Option<Freeze>,
}

/// What [`apply`] needs to know besides.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a> {
    /// The host that owns the guest after the change.
    pub owner_host: Option<&'a Host>,
    /// The host that owned it before.
    pub source_host: Option<&'a Host>,
    /// The volumes as the switch request names them.
    pub stamps: &'a [VolumeStamp],
    /// What came with the report.
    pub details: &'a ReportDetails,
}

/// A switch happened in this step: what was granted, to which kind of operation.
fn newly_granted(before: &OwnerRecord, after: &OwnerRecord) -> Option<(handover::Grant, OperationKind)> {
    // A stop or freeze may be granted and over in one step: then the operation is already in `last`.
    let old = before.operation.as_ref()?;
    let verdict = match &after.operation {
        Some(op) if op.id == old.id => op.verdict,
        _ => after.last.filter(|last| last.operation == old.id)?.verdict,
    };
    match (old.verdict, verdict) {
        (Verdict::Open, Verdict::Granted(grant)) => Some((grant, old.kind)),
        _ => None,
    }
}

/// A thaw that was granted is over in this step: nothing of the guest's memory is missing any more, or the guest is no more. Until then
/// what was frozen is a needed copy; that it is not thawed twice, the owner says.
fn is_thaw_over(before: &OwnerRecord, after: &OwnerRecord) -> bool {
    let Some(op) = before.operation.as_ref().filter(|op| matches!(op.kind, OperationKind::Thaw { .. })) else {
        return false;
    };
    let last = after.last.filter(|last| last.operation == op.id && after.operation.is_none());
    last.is_some_and(|last| matches!(last.verdict, Verdict::Granted(_)))
}

/// Takes a new ownership record and brings everything that hangs on the guest in step with it. True when a port changed: the
/// overlay must be told.
pub fn apply(attached: &mut Attached, after: OwnerRecord, told: Told<'_>) -> bool {
    let before = attached.guest.owner.clone();
    let ports_before = attached.ports.clone();
    if let Some((grant, kind)) = newly_granted(&before, &after) {
        switch(attached, &before, grant, kind, told);
    } else {
        prepare_ports(attached, &after);
    }
    if is_thaw_over(&before, &after)
        && let Some(freeze) = &mut attached.freeze
    {
        freeze.is_consumed = true;
    }
    // When nobody holds anything any more that is needed, the sources are free.
    for volume in &mut attached.volumes {
        volume.needed_source = volume.needed_source.filter(|source| after.holders.iter().any(|h| h.host == *source));
    }
    for port in &mut attached.ports {
        port.moved_from = port.moved_from.filter(|source| after.holders.iter().any(|h| h.host == *source));
    }
    // A guest that runs nowhere is announced nowhere.
    for port in &mut attached.ports {
        port.host = port.host.filter(|host| after.owner == Owner::Host(*host));
    }
    let is_lost_or_found = before.alarm().is_some() || before.stamp() != after.stamp();
    if after.alarm().is_some() || is_lost_or_found {
        let guest = &mut attached.guest.guest;
        let is_disk_lost = |host| after.holders.iter().any(|holder| holder.host == host && holder.lost);
        guest.alarm = after.alarm().map(|alarm| match told.owner_host {
            Some(host) if is_disk_lost(host.id) => format!(
                "its running copy is gone with {}, and what it had written to the disk there; `supercloud guest start {}` starts \
                 it from its image",
                host.name, guest.name
            ),
            Some(host) => format!(
                "its running copy at {} is gone; `supercloud guest start {}` starts it again from its volumes",
                host.name, guest.name
            ),
            None => alarm.to_string(),
        });
    }
    fix_compat_class(&mut attached.guest, &after, told.details);
    if let Some(operation) = &mut attached.operation {
        advance(operation, &after, told.details);
        if operation.kind == supercloud_api::OperationKind::GuestThaw && operation.is_cancel_requested {
            // Who cancels a thaw does not want another one in its place.
            attached.guest.put_aside = None;
        }
    }
    let held_by = attached.guest.guest.operation;
    attached.guest.set_owner(after, told.owner_host);
    let owner = &attached.guest.owner;
    // An operation that was accepted and has not begun holds the guest, whatever happens meanwhile.
    let has_ended = |id| {
        owner.last.is_some_and(|last| last.operation == id) || before.operation.as_ref().is_some_and(|op| op.id == id)
    };
    if owner.operation.is_none() {
        attached.guest.guest.operation = held_by.filter(|id| !has_ended(*id));
    }
    attached.ports != ports_before
}

/// The class in which the guest first ran stays its own; one in which it was only to be started does not.
fn fix_compat_class(guest: &mut GuestRecord, after: &OwnerRecord, details: &ReportDetails) {
    let class = &mut guest.guest.compat_class;
    if after.owner == Owner::Unowned && after.operation.is_none() {
        *class = None;
    } else if class.is_none() {
        class.clone_from(&details.compat_class);
    }
}

/// The destination binds ports silently while a move is open.
fn prepare_ports(attached: &mut Attached, after: &OwnerRecord) {
    let prepared = after
        .operation
        .as_ref()
        .filter(|op| op.verdict == Verdict::Open && op.phase != handover::Phase::Plan)
        .and_then(|op| op.kind.destination());
    for port in &mut attached.ports {
        port.prepared_at = prepared;
    }
}

/// COMMIT POINT: what the switch transaction holds besides the owner and the epoch.
fn switch(attached: &mut Attached, before: &OwnerRecord, grant: handover::Grant, kind: OperationKind, told: Told<'_>) {
    let source = match before.owner {
        Owner::Host(host) => Some(host),
        _ => None,
    };
    let stamp_of = |volume: &Volume| told.stamps.iter().find(|stamp| stamp.volume == volume.id);
    for volume in &mut attached.volumes {
        volume.epoch = grant.epoch;
        if let Some(stamp) = stamp_of(volume) {
            volume.map_root = Some(hex::encode(stamp.root));
            volume.map_version = stamp.version;
        }
        match grant.owner {
            Owner::Host(to) => {
                // A mirror has all of it.
                let is_whole = matches!(kind, OperationKind::Mirror { .. });
                volume.needed_source = volume.host.filter(|host| *host != to && !is_whole);
                volume.host = Some(to);
            }
            Owner::Frozen(_) => {}
            Owner::Stopped | Owner::Unowned | Owner::Lost(_) => {}
        }
    }
    for port in &mut attached.ports {
        port.epoch = grant.epoch;
        port.prepared_at = None;
        let to = match grant.owner {
            Owner::Host(to) => Some(to),
            _ => None,
        };
        port.moved_from = source.filter(|source| to.is_some_and(|to| to != *source));
        port.host = to;
    }
    match kind {
        OperationKind::Start { .. } | OperationKind::RestartFromVolume { .. } => attached.guest.guest.starts += 1,
        OperationKind::Freeze { freeze } => {
            if let (Some(content), Some(host)) = (&told.details.frozen, told.source_host) {
                frozen(attached, freeze, grant.epoch, host.cloud, content);
            }
        }
        OperationKind::Thaw { .. }
        | OperationKind::Migrate { .. }
        | OperationKind::Mirror { .. }
        | OperationKind::Stop => {}
    }
}

/// The freeze stands: its record, and the volumes' contents, which lie in the store of that cloud now.
fn frozen(attached: &mut Attached, freeze: FreezeId, epoch: Epoch, cloud: CloudId, content: &FrozenContent) {
    for volume in &mut attached.volumes {
        if let Some(stored) = content.volumes.iter().find(|stored| stored.volume == volume.id) {
            volume.base = Some(stored.root.clone());
            volume.base_cloud = Some(cloud);
            volume.host = None;
            volume.needed_source = None;
            volume.map_root = None;
        }
    }
    attached.freeze = Some(Freeze {
        id: freeze,
        guest: attached.guest.guest.id,
        project: attached.guest.guest.project,
        epoch,
        cloud,
        memory_root: content.memory.root.clone(),
        memory_bytes: content.memory.bytes,
        memory_format: content.memory.format.clone(),
        volumes: content.volumes.clone(),
        is_consumed: false,
        created_at_ms: unix_ms(),
        point: None,
    });
}

/// The phase of REST for a phase of the protocol.
#[must_use]
pub const fn phase(phase: handover::Phase) -> Phase {
    match phase {
        handover::Phase::Plan => Phase::Plan,
        handover::Phase::Prepare => Phase::Prepare,
        handover::Phase::Copy => Phase::Copy,
        handover::Phase::Switch => Phase::Switch,
        handover::Phase::Resume => Phase::Resume,
        handover::Phase::Finish => Phase::Finish,
        handover::Phase::Done => Phase::Done,
        handover::Phase::RolledBack => Phase::RolledBack,
        handover::Phase::Failed => Phase::Failed,
    }
}

/// Brings the operation's phase and error in step.
fn advance(operation: &mut Operation, after: &OwnerRecord, details: &ReportDetails) {
    let (now, verdict) = match (&after.operation, after.last) {
        (Some(op), _) if op.id == operation.id => (phase(op.phase), op.verdict),
        (_, Some(last)) if last.operation == operation.id => (phase(last.phase), last.verdict),
        _ => return,
    };
    if now > operation.phase {
        operation.phase = now;
    }
    if let Some(source) =
        after.operation.as_ref().filter(|op| op.id == operation.id).and_then(handover::Operation::source)
    {
        operation.source = Some(source);
    }
    if now == Phase::Failed && operation.error.is_none() {
        let why = match after.alarm() {
            Some(alarm) => format!("{alarm}; the guest's alarm says from what it can start again"),
            None => "a host that held blocks which are still needed was lost after the switch".to_owned(),
        };
        operation.error = Some(Problem::new(Code::Internal, why));
    }
    if let Verdict::Aborted(reason) = verdict
        && operation.error.is_none()
    {
        operation.error = Some(details.problem.clone().unwrap_or_else(|| abort_problem(reason)));
    }
}

/// What people read when an operation was aborted and nobody told more.
#[must_use]
pub fn abort_problem(reason: AbortReason) -> Problem {
    let (code, advice) = match reason {
        AbortReason::Cancelled => (Code::WrongState, "the operation was cancelled; everything is as before"),
        AbortReason::Deadline => {
            (Code::HostUnavailable, "the deadline passed before the switch; everything is as before")
        }
        AbortReason::DestinationFailed => {
            (Code::HostUnavailable, "the destination could not take the guest; see its agent's log")
        }
        AbortReason::SourceFailed => {
            (Code::HostUnavailable, "the source could not hand the guest over; see its agent's log")
        }
        AbortReason::ContactLost => {
            (Code::HostUnavailable, "source and destination lost contact; the guest runs on at the source")
        }
        AbortReason::HostLost => (Code::HostUnavailable, "a host that took part was removed"),
        AbortReason::GuestLost => (Code::Internal, "the guest's running copy was lost before the switch"),
    };
    Problem::new(code, advice)
}

/// The hosts on which something of the guest may lie.
#[must_use]
pub fn holding_hosts(guest: &GuestRecord, volumes: &[Volume]) -> Vec<HostId> {
    let mut hosts: Vec<HostId> = guest.owner.holders.iter().map(|holder| holder.host).collect();
    hosts.extend(volumes.iter().flat_map(|volume| [volume.host, volume.needed_source]).flatten());
    if let Owner::Host(host) | Owner::Lost(host) = guest.owner.owner {
        hosts.push(host);
    }
    hosts.sort();
    hosts.dedup();
    hosts
}
