//! Facts into the very transactions that make them true: owners that change, hosts that are rented and given back, moves that end.

use supercloud_api::{
    Cloud, Host, Operation, OperationKind, Phase, Renting, RentingState,
    handover::{self, Owner, OwnerRecord},
    ids::HostId,
};

use super::{EgressRecord, MarketName, OpenStay, Role, Size, SizeFrom, Stamp, StayRecord, TenancyRecord, TenancySpan};
use crate::state::{Change, GuestRecord, HostRecord, State, StateError};

/// The sizes of a host that are kept; a host that says something new all the time overwrites the last one.
const SIZES_AT_MOST: usize = 200;

/// Where a guest takes room: where it runs, and where it is on its way to.
fn places(owner: &OwnerRecord) -> Vec<(HostId, Role)> {
    let runs = match owner.owner {
        Owner::Host(host) => Some(host),
        Owner::Unowned | Owner::Frozen(_) | Owner::Stopped | Owner::Lost(_) => None,
    };
    let under_way = owner.operation.as_ref().filter(|operation| operation.phase != handover::Phase::Plan);
    let incoming = under_way.and_then(|operation| operation.kind.destination()).filter(|host| Some(*host) != runs);
    let runs = runs.map(|host| (host, Role::Runs));
    runs.into_iter().chain(incoming.map(|host| (host, Role::Incoming))).collect()
}

/// Ends a stay. One that took no time, or began by another clock, leaves nothing.
fn close(record: &GuestRecord, stay: OpenStay, now: Stamp, change: &mut Change) {
    if stay.since.clock == now.clock && stay.since.at_ms < now.at_ms {
        change.create(&StayRecord {
            guest: record.guest.id,
            guest_name: record.guest.name.clone(),
            project: record.guest.project,
            stay,
            to_ms: now.at_ms,
        });
    }
}

/// Brings a guest's stays in step with its owner. True when something changed.
pub fn keep_stays(record: &mut GuestRecord, now: Stamp, change: &mut Change) -> bool {
    let wanted = places(&record.owner);
    let (stays, over): (Vec<_>, Vec<_>) =
        std::mem::take(&mut record.stays).into_iter().partition(|stay| wanted.contains(&(stay.host, stay.role)));
    record.stays = stays;
    let mut is_changed = !over.is_empty();
    for stay in over {
        close(record, stay, now, change);
    }
    let shape = record.guest.shape;
    for (host, role) in wanted {
        if !record.stays.iter().any(|stay| (stay.host, stay.role) == (host, role)) {
            let size = Size::new(shape.vcpus, shape.memory_bytes);
            record.stays.push(OpenStay { host, role, size, since: now });
            is_changed = true;
        }
    }
    is_changed
}

/// Ends all stays, and begins the same ones by the clock of `now`.
pub(super) fn cut_stays(record: &mut GuestRecord, end: Stamp, now: Stamp, change: &mut Change) {
    for stay in record.stays.clone() {
        close(record, stay, end, change);
    }
    for stay in &mut record.stays {
        stay.since = now;
    }
}

/// A guest's record goes: what it took is over.
pub fn end_stays(record: &GuestRecord, now: Stamp, change: &mut Change) {
    for stay in record.stays.clone() {
        close(record, stay, now, change);
    }
}

fn open(since: Stamp) -> Vec<TenancySpan> {
    vec![TenancySpan { since, to_ms: None }]
}

fn market_of(renting: &Renting) -> MarketName {
    MarketName {
        cloud: renting.cloud_name.clone(),
        instance_type: renting.instance_type.clone(),
        tenure: renting.tenure,
    }
}

/// A host begins to cost something: there is a machine for a renting. Its agent may have joined before this was known (the launch's
/// answer was lost): then it costs since it joined, also when it was removed meanwhile.
async fn rented(state: &State, renting: &Renting, change: &mut Change) -> Result<(), StateError> {
    let now = state.book().now();
    let Some(before) = state.read::<TenancyRecord>(&renting.host).await? else {
        change.create(&TenancyRecord {
            host: renting.host,
            host_name: renting.host_name.clone(),
            cloud: renting.cloud,
            cloud_name: renting.cloud_name.clone(),
            renting: Some(renting.id),
            market: Some(market_of(renting)),
            spans: open(now),
            sizes: Vec::new(),
        });
        return Ok(());
    };
    let mut after =
        TenancyRecord { renting: Some(renting.id), market: Some(market_of(renting)), ..before.value.clone() };
    if after.spans.iter().all(|span| span.to_ms.is_some()) {
        match after.spans.last_mut() {
            Some(last) if last.since.clock == now.clock => last.to_ms = None,
            _ => after.spans.extend(open(now)),
        }
    }
    if after != before.value {
        change.update(&before, &after);
    }
    Ok(())
}

/// What a renting's next state means.
///
/// # Errors
/// When the store does not answer.
pub async fn keep_renting(
    state: &State,
    before: &Renting,
    now: &Renting,
    change: &mut Change,
) -> Result<(), StateError> {
    if now.state == RentingState::Ended {
        return ended(state, now.host, Some(now), change).await;
    }
    match (before.launched_at_ms, now.launched_at_ms) {
        (None, Some(_)) => rented(state, now, change).await,
        _ => Ok(()),
    }
}

/// A host has joined, or told what it has. One that was not rented costs what its cloud's market says, from when it joins.
///
/// # Errors
/// When the store does not answer.
pub async fn keep_host(state: &State, host: &Host, change: &mut Change) -> Result<(), StateError> {
    let now = state.book().now();
    let size = Size::new(host.capacity.vcpus, host.capacity.memory_bytes);
    let size = SizeFrom { since: now, size };
    let Some(before) = state.read::<TenancyRecord>(&host.id).await? else {
        change.create(&TenancyRecord {
            host: host.id,
            host_name: host.name.clone(),
            cloud: host.cloud,
            cloud_name: host.cloud_name.clone(),
            renting: None,
            market: None,
            spans: open(now),
            sizes: vec![size],
        });
        return Ok(());
    };
    if before.sizes.last().is_none_or(|last| last.size != size.size) {
        let mut after = before.value.clone();
        after.sizes.truncate(SIZES_AT_MOST - 1);
        after.sizes.push(size);
        change.update(&before, &after);
    }
    Ok(())
}

/// A host was removed. One that was rented costs something until the provider says otherwise.
///
/// # Errors
/// When the store does not answer.
pub async fn host_removed(state: &State, host: HostId, change: &mut Change) -> Result<(), StateError> {
    match state.read::<TenancyRecord>(&host).await? {
        Some(found) if found.renting.is_none() => ended(state, host, None, change).await,
        _ => Ok(()),
    }
}

async fn ended(state: &State, host: HostId, renting: Option<&Renting>, change: &mut Change) -> Result<(), StateError> {
    let Some(before) = state.read::<TenancyRecord>(&host).await? else { return Ok(()) };
    let mut after = before.value.clone();
    if let (None, Some(renting)) = (after.renting, renting) {
        // It joined, and was gone before its launch was known.
        (after.renting, after.market) = (Some(renting.id), Some(market_of(renting)));
    }
    end_spans(&mut after, state.book().now());
    if after != before.value {
        change.update(&before, &after);
    }
    Ok(())
}

/// Ends the open spans. Those of another clock end where they began: what they cost is not known.
pub(super) fn end_spans(tenancy: &mut TenancyRecord, end: Stamp) {
    for span in tenancy.spans.iter_mut().filter(|span| span.to_ms.is_none()) {
        let to_ms = if span.since.clock == end.clock { end.at_ms } else { 0 };
        span.to_ms = Some(to_ms.max(span.since.at_ms));
    }
}

/// A move is over: what left a cloud for it, also when it came to nothing.
///
/// # Errors
/// When the store does not answer.
pub async fn keep_egress(
    state: &State,
    before: &Operation,
    now: &Operation,
    guest: &GuestRecord,
    change: &mut Change,
) -> Result<(), StateError> {
    let is_end = now.phase.is_terminal() && !before.phase.is_terminal();
    let progress = &now.progress;
    let disk = [progress.disk_bytes_before_resume, progress.disk_bytes_after_resume];
    let bytes = disk.into_iter().flatten().fold(progress.memory_sent_bytes, u64::saturating_add);
    let (OperationKind::GuestMigrate, true, Some(from), Some(to)) = (now.kind, is_end, now.source, now.destination)
    else {
        return Ok(());
    };
    let (from, to) = (state.read::<HostRecord>(&from).await?, state.read::<HostRecord>(&to).await?);
    let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
    // A move that never left the plan has sent nothing.
    if from.host.cloud == to.host.cloud || bytes == 0 || now.phase == Phase::Plan {
        return Ok(());
    }
    let cloud = state.read::<Cloud>(&from.host.cloud).await?;
    let price = |cloud: &Cloud| state.book().egress_per_gib(&cloud.provider, to.host.cloud_name.as_str());
    change.create(&EgressRecord {
        operation: now.id,
        guest: guest.guest.id,
        guest_name: guest.guest.name.clone(),
        project: guest.guest.project,
        host: from.host.id,
        host_name: from.host.name.clone(),
        cloud: from.host.cloud,
        cloud_name: from.host.cloud_name.clone(),
        to_cloud_name: to.host.cloud_name.clone(),
        bytes,
        per_gib: cloud.as_deref().and_then(price),
        at: state.book().now(),
    });
    Ok(())
}
