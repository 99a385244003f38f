//! Second copies of running guests: begun, looked at, and told to take over. Ending one is cancelling its operation.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Fencing, Guest, GuestFailover, GuestMirror, Host, KeptMirror, Mirror, MirrorMode, MirrorStanding, Operation,
    OperationKind, Page, Phase, Plan, PlanCheck, Problem, Ref, handover, ids::HostId, lease, link::MirrorOptions,
};

use super::{
    Api, Asker, Failure, Reply, body,
    guest_operations::{MIN_BANDWIDTH_BPS, Wanted, refuse, submit_with, way_out},
    guest_plan::{self, Picture, Route},
};
use crate::{
    admission::Request,
    placement::Place,
    state::{Change, EventDraft, GuestRecord, HostRecord, LiveHosts, OperationRecord, Stored, Work, retry_conflicts},
};

const DEFAULT_INTERVAL_MS: u64 = 1000;
/// Shorter ones would leave a guest little time to run in.
const MIN_INTERVAL_MS: u64 = 50;
const MAX_INTERVAL_MS: u64 = 600_000;

fn options(wanted: &GuestMirror) -> Result<MirrorOptions, Failure> {
    let interval_ms = wanted.interval_ms.unwrap_or(DEFAULT_INTERVAL_MS);
    if !(MIN_INTERVAL_MS..=MAX_INTERVAL_MS).contains(&interval_ms) {
        let detail = format!("interval_ms is {interval_ms}; it must be {MIN_INTERVAL_MS} to {MAX_INTERVAL_MS}");
        return Err(Failure::bad(detail));
    }
    if let Some(bps) = wanted.bandwidth_bps.filter(|bps| *bps < MIN_BANDWIDTH_BPS) {
        return Err(Failure::bad(format!("bandwidth_bps is {bps}; at least {MIN_BANDWIDTH_BPS}")));
    }
    let lease_ms = match (wanted.fencing, wanted.lease_ms) {
        (Fencing::Manual, None) => None,
        (Fencing::Manual, Some(_)) => return Err(Failure::bad("lease_ms is for fencing: lease")),
        (Fencing::Lease, wanted) => Some(wanted.unwrap_or(lease::DEFAULT_LEASE_MS)),
    };
    if let Some(lease_ms) = lease_ms.filter(|lease_ms| !lease::LEASE_MS.contains(lease_ms)) {
        let (least, most) = (lease::LEASE_MS.start(), lease::LEASE_MS.end());
        return Err(Failure::bad(format!("lease_ms is {lease_ms}; it must be {least} to {most}")));
    }
    guest_plan::check_reason(wanted.reason.as_ref())?;
    Ok(MirrorOptions {
        interval_ms,
        is_strict: wanted.mode == MirrorMode::Strict,
        lease_ms,
        bandwidth_bps: wanted.bandwidth_bps,
    })
}

/// Whether both agents know how to mirror a guest.
fn capability(live: &LiveHosts, source: Option<HostId>, to: HostId) -> Result<PlanCheck, Problem> {
    let lacks = |host: &HostId| !live.takes_mirrors(*host);
    match source.into_iter().chain([to]).find(lacks) {
        Some(host) => {
            let detail =
                format!("guests cannot be mirrored from or to {host}: its back end lacks it, or its agent is older");
            Err(Problem::new(Code::Unsupported, detail))
        }
        None => {
            Ok(PlanCheck { name: "mirroring".to_owned(), is_ok: true, detail: "both back ends have it".to_owned() })
        }
    }
}

/// Whether the guest's host can fence it by a lease.
fn fence(live: &LiveHosts, source: Option<HostId>) -> Result<PlanCheck, Problem> {
    match source.filter(|host| !live.takes_leases(*host)) {
        Some(host) => {
            let detail =
                format!("guests at {host} cannot be fenced by a lease: its back end lacks it, or its agent is older");
            Err(Problem::new(Code::Unsupported, detail))
        }
        None => Ok(PlanCheck {
            name: "fencing".to_owned(),
            is_ok: true,
            detail: "the guest stands still when its lease runs out".to_owned(),
        }),
    }
}

/// Where a guest's standby would be, as the place that was asked for allows, and what that would take.
///
/// # Errors
/// Why it cannot be there.
pub(crate) fn standby<'a>(
    live: &LiveHosts,
    picture: &'a Picture,
    found: &GuestRecord,
    place: &Place,
    options: MirrorOptions,
) -> Result<(&'a Host, Plan), Problem> {
    let from = found.guest.host;
    let (host, mut plan) = way_out(picture, found, from, place, options.bandwidth_bps)?;
    plan.checks.push(capability(live, from, host.id)?);
    if options.lease_ms.is_some() {
        plan.checks.push(fence(live, from)?);
    }
    Ok((host, plan))
}

/// Keeps a second copy of a running guest at another host, until the operation is cancelled or that copy takes over.
#[utoipa::path(post, path = "/v1/guests/{guest}/mirrors", tag = "guests", request_body = GuestMirror, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn begin(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestMirror = body(&headers, &bytes)?;
    let options = options(&wanted)?;
    let kept = wanted.keep.then(|| KeptMirror {
        to: wanted.to.clone(),
        interval_ms: options.interval_ms,
        mode: wanted.mode,
        bandwidth_bps: options.bandwidth_bps,
        lease_ms: options.lease_ms,
    });
    let reference = Ref::from(guest);
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let picture = Picture::take(&api.parts).await?;
        let found = asker.find_guest(&api.parts, &reference).await?;
        guest_plan::admit(Request::Mirror, &found)?;
        let place = guest_plan::resolve_place(&api.parts, Some(&wanted.to)).await?;
        let (host, plan) = match standby(&api.parts.hosts, &picture, &found, &place, options) {
            Ok(way) => way,
            Err(problem) => return refuse(&asker, &found, OperationKind::GuestMirror, problem),
        };
        let route = Route {
            source: found.guest.host,
            destination: Some(host.id),
            plan: Some(plan),
            reason: wanted.reason.clone(),
        };
        let wanted = Wanted {
            kind: OperationKind::GuestMirror,
            handover: handover::OperationKind::Mirror { to: host.id },
            work: Work::GuestMirror { options, is_failing_over: false },
            route,
        };
        let mut now = found.value.clone();
        if let Some(kept) = &kept {
            now.guest.kept_mirror = Some(kept.clone());
        }
        submit_with(&api, &asker, &found, now, Some(&picture), wanted).await
    })
    .await
}

/// Ends a guest's mirror, and sees to it that none is begun again.
#[utoipa::path(delete, path = "/v1/guests/{guest}/mirrors", tag = "guests", responses((status = 200, body = Guest)))]
pub async fn end(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        let mirror = of(&api, &found).await?;
        if mirror.as_ref().is_some_and(|(_, _, is_failing_over)| *is_failing_over) {
            return Err(takes_over());
        }
        let mirror = mirror.map(|(record, ..)| record).filter(|record| !record.operation.is_cancel_requested);
        if asker.params.dry_run || (mirror.is_none() && found.guest.kept_mirror.is_none()) {
            return Reply::ok(&found.guest);
        }
        let mut change = Change::new();
        let mut now = found.value.clone();
        if now.guest.kept_mirror.take().is_some() {
            change.update(&found, &now);
        }
        if let Some(record) = mirror {
            change.request_cancel(&record);
        }
        asker.commit(&api.parts, now.guest.project, change, Reply::ok(&now.guest)?).await
    })
    .await
}

/// The mirror that is kept of a guest, if one is: its operation, how it is kept, and whether it is failing over.
async fn of(api: &Api, found: &GuestRecord) -> Result<Option<(Stored<OperationRecord>, MirrorOptions, bool)>, Failure> {
    let Some(id) = found.guest.operation else { return Ok(None) };
    let record = api.parts.state.read::<OperationRecord>(&id).await?;
    Ok(record.filter(|record| !record.operation.phase.is_terminal()).and_then(|record| match record.work {
        Work::GuestMirror { options, is_failing_over } => Some((record, options, is_failing_over)),
        _ => None,
    }))
}

/// Why a mirror cannot be ended any more.
pub(super) fn takes_over() -> Failure {
    Failure::new(Code::WrongState, "the standby takes over: what it has is all that is left of the guest")
}

fn shown(
    operation: &Operation,
    options: MirrorOptions,
    is_failing_over: bool,
    standing: MirrorStanding,
) -> Option<Mirror> {
    Some(Mirror {
        operation: operation.id,
        guest: operation.guest?,
        source: operation.source,
        destination: operation.destination,
        mode: if options.is_strict { MirrorMode::Strict } else { MirrorMode::Async },
        interval_ms: options.interval_ms,
        fencing: if options.lease_ms.is_some() { Fencing::Lease } else { Fencing::Manual },
        lease_ms: options.lease_ms,
        lease_over_in_ms: None,
        source_silent_ms: None,
        is_protected: standing.committed > 0 && operation.phase == Phase::Copy,
        is_failing_over,
        standing,
    })
}

/// The mirrors of a guest; at most one now.
#[utoipa::path(get, path = "/v1/guests/{guest}/mirrors", tag = "guests", responses((status = 200, body = Page<Mirror>)))]
pub async fn list(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let mirrors: Vec<Mirror> = match of(&api, &found).await? {
        Some((record, options, is_failing_over)) => {
            let mut live = super::operations::shown(&api, &record);
            let standing = live.progress.mirror.take().unwrap_or_default();
            let mut mirror = shown(&live, options, is_failing_over, standing);
            if let Some(mirror) = &mut mirror {
                let leases = &api.parts.leases;
                mirror.lease_over_in_ms = options.lease_ms.map(|lease_ms| leases.over_in_ms(mirror.guest, lease_ms));
                mirror.source_silent_ms = mirror.source.map(|host| leases.silent_ms(host));
            }
            mirror.into_iter().collect()
        }
        None => Vec::new(),
    };
    Reply::ok(&Page { items: mirrors, next_page: None })
}

/// Has the standby of a mirrored guest take over. The guest's host must be dead, and you must say so.
#[utoipa::path(post, path = "/v1/guests/{guest}/failover", tag = "guests", request_body = GuestFailover, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn fail_over(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestFailover = body(&headers, &bytes)?;
    guest_plan::check_reason(wanted.reason.as_ref())?;
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        let wrong = |detail: String| Failure::new(Code::WrongState, detail);
        let Some((record, options, is_failing_over)) = of(&api, &found).await? else {
            let detail = format!("guest {} has no mirror that could take over", found.guest.name);
            return Err(wrong(detail));
        };
        if record.operation.phase != Phase::Copy {
            return Err(wrong("the mirror has not begun to copy, or takes over already".to_owned()));
        }
        let is_standing = |op: &supercloud_api::handover::Operation| op.id == record.operation.id && op.is_mirrored();
        if !is_failing_over && !found.owner.operation.as_ref().is_some_and(is_standing) {
            return Err(wrong("the mirror was called off and is being cleared away: its standby cannot take over".to_owned()));
        }
        if let Some(source) = record.operation.source
            && api.parts.hosts.get(source).is_some()
        {
            let name = api.parts.state.need::<HostRecord>(&source).await?.host.name.clone();
            return Err(wrong(format!(
                "{name}, where the guest runs, is connected: cancel the mirror and migrate the guest, or stop that host's agent and \
                 the guest first"
            )));
        }
        if !wanted.host_is_dead {
            return Err(Failure::bad(
                "host_is_dead must be true: make sure that the guest's host does not run any more and will not run this guest again \
                 (the provider says terminated, or you switched it off)",
            ));
        }
        if is_failing_over || asker.params.dry_run {
            let shown = super::operations::shown(&api, &record);
            return if asker.params.dry_run { Reply::ok(&shown) } else { Reply::accepted(&shown) };
        }
        let mut now = record.value.clone();
        now.work = Work::GuestMirror { options, is_failing_over: true };
        let mut change = Change::new();
        let mut event = EventDraft::new("guest.failover_requested")
            .project(now.operation.project)
            .guest(now.operation.guest)
            .operation(now.operation.id);
        if let Some(host) = now.operation.source {
            event = event.host(host);
        }
        change.event(event);
        change.unchanged(&found);
        change.update_operation(&record, &mut now);
        asker.commit(&api.parts, now.operation.project, change, Reply::accepted(&now.operation)?).await
    })
    .await
}
