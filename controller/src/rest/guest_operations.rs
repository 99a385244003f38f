//! What is done with guests: start, stop, migrate, freeze, thaw, delete. Each is checked against the admission table, placed,
//! begun in the ownership record and written as an operation, in one transaction.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Freeze, GuestFreeze, GuestMigrate, GuestStart, GuestState, GuestStop, GuestThaw, Host, MemoryMode, Operation,
    OperationKind, Plan, PlanCheck, Problem, Ref, ThawMemory,
    handover::{self, BeginRequest},
    ids::{FreezeId, HostId, OperationId},
    link::MigrationOptions,
};

use super::{
    Api, Asker, Failure, Reply, body, groups,
    guest_plan::{self, Picture, Route},
};
use crate::{
    admission::Request,
    auth::Access,
    checkpoints::SetBack,
    placement::{self, Need, Place},
    plans::{measured::Measured, propose},
    state::{Change, GuestRecord, LiveHosts, ProjectRecord, Stored, Work, keys, retry_conflicts},
};

/// How long a guest may take to shut down when nothing is said.
const DEFAULT_GRACE_MS: u64 = 30_000;
const MAX_GRACE_MS: u64 = 3_600_000;
const DEFAULT_DOWNTIME_MS: u64 = 300;
const MAX_DOWNTIME_MS: u64 = 60_000;
pub(super) const MIN_BANDWIDTH_BPS: u64 = 1_000_000;
const MAX_DEADLINE_MS: u64 = 24 * 3_600_000;

/// What an operation does in the ownership protocol, what is kept of the request, and where it goes.
pub(super) struct Wanted {
    pub kind: OperationKind,
    pub handover: handover::OperationKind,
    pub work: Work,
    pub route: Route,
}

/// Writes an operation on a guest; for a dry run only says what would be written.
pub(super) async fn submit(
    api: &Api,
    asker: &Asker,
    found: &Stored<GuestRecord>,
    picture: Option<&Picture>,
    wanted: Wanted,
) -> Result<Reply, Failure> {
    submit_with(api, asker, found, found.value.clone(), picture, wanted).await
}

/// The same, of a guest whose record `now` is to be changed besides.
pub(super) async fn submit_with(
    api: &Api,
    asker: &Asker,
    found: &Stored<GuestRecord>,
    now: GuestRecord,
    picture: Option<&Picture>,
    wanted: Wanted,
) -> Result<Reply, Failure> {
    submit_also(api, asker, found, now, picture, wanted, |_, _| ()).await
}

/// The same; `also` changes what is to change besides.
async fn submit_also(
    api: &Api,
    asker: &Asker,
    found: &Stored<GuestRecord>,
    mut now: GuestRecord,
    picture: Option<&Picture>,
    wanted: Wanted,
    also: impl FnOnce(&mut GuestRecord, &mut Change),
) -> Result<Reply, Failure> {
    let id = OperationId::generate();
    guest_plan::begin_on(&mut now, &BeginRequest { operation: id, kind: wanted.handover, group: None })?;
    let operation = guest_plan::new_operation(asker, id, wanted.kind, &now.guest, wanted.route);
    if asker.params.dry_run {
        return Reply::ok(&operation);
    }
    let mut change = Change::new();
    also(&mut now, &mut change);
    change.update(found, &now);
    if let (Some(picture), Some(host)) = (picture, operation.destination) {
        picture.pass(&mut change, keys::room_guard(host));
        picture.pass(&mut change, keys::usage_guard(now.guest.project));
    }
    change.create_operation(&guest_plan::record(operation.clone(), wanted.work));
    asker.commit(&api.parts, now.guest.project, change, Reply::accepted(&operation)?).await
}

/// The plan of a dry run that would be refused; the refusal itself when it is no dry run.
pub(super) fn refuse(
    asker: &Asker,
    found: &GuestRecord,
    kind: OperationKind,
    problem: Problem,
) -> Result<Reply, Failure> {
    if !asker.params.dry_run || !matches!(problem.code, Code::NoCapacity | Code::Incompatible | Code::HostUnavailable) {
        return Err(problem.into());
    }
    let route = Route { source: found.guest.host, plan: Some(guest_plan::failed_plan(&problem)), ..Route::default() };
    Reply::ok(&guest_plan::new_operation(asker, OperationId::generate(), kind, &found.guest, route))
}

/// What a guest needs of a host.
pub(crate) fn need(picture: &Picture, found: &GuestRecord, not_at: Option<HostId>) -> Need {
    Need {
        shape: found.guest.shape,
        disk_bytes: picture.disk_of(found.guest.id),
        class: found.guest.compat_class.clone(),
        not_at,
    }
}

/// Starts a guest that is stopped, was never started, or was lost (then from its volumes).
#[utoipa::path(post, path = "/v1/guests/{guest}/start", tag = "guests", request_body = GuestStart, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn start(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestStart = body(&headers, &bytes)?;
    let reference = Ref::from(guest);
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let picture = Picture::take(&api.parts).await?;
        let found = asker.find_guest(&api.parts, &reference).await?;
        guest_plan::admit(Request::Start, &found)?;
        let project = api.parts.state.need::<ProjectRecord>(&found.guest.project).await?;
        let place = match &wanted.place {
            Some(place) => guest_plan::resolve_place(&api.parts, Some(place)).await?,
            None => guest_plan::volume_place(&api.parts.state, &picture, &found).await?,
        };
        picture.check_quota(found.guest.project, project.project.quota, 0, Some(found.guest.shape), 0)?;
        let mut now = found.value.clone();
        if let Some(cpu) = wanted.cpu {
            now.guest.cpu = cpu;
            now.guest.compat_class = None;
        }
        let need = need(&picture, &now, None);
        let chosen = match &need.class {
            Some(_) => picture.choose(&need, &place).map(|(host, checks)| (host, checks, need.class.clone())),
            None => picture.choose_first(&need, &place, now.guest.cpu),
        };
        match chosen {
            Ok((host, checks, class)) => {
                now.guest.compat_class = class;
                let handover = match found.guest.state {
                    GuestState::Lost => handover::OperationKind::RestartFromVolume { to: host.id },
                    _ => handover::OperationKind::Start { to: host.id },
                };
                let plan = Some(guest_plan::plan_for(host, checks));
                let route = Route { destination: Some(host.id), plan, ..Route::default() };
                let wanted = Wanted { kind: OperationKind::GuestStart, handover, work: Work::GuestStart, route };
                submit_with(&api, &asker, &found, now, Some(&picture), wanted).await
            }
            Err(problem) => refuse(&asker, &found, OperationKind::GuestStart, problem),
        }
    })
    .await
}

/// Stops a guest: asks it to shut down, and pulls the plug when it takes too long.
#[utoipa::path(post, path = "/v1/guests/{guest}/stop", tag = "guests", request_body = GuestStop, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn stop(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestStop = body(&headers, &bytes)?;
    let grace_ms = match (wanted.force, wanted.grace_ms) {
        (true, Some(_)) => return Err(Failure::bad("force and grace_ms exclude each other")),
        (true, None) => 0,
        (false, grace) => grace.unwrap_or(DEFAULT_GRACE_MS),
    };
    if grace_ms > MAX_GRACE_MS {
        return Err(Failure::bad(format!("grace_ms is {grace_ms}; at most {MAX_GRACE_MS}")));
    }
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        guest_plan::admit(Request::Stop, &found)?;
        let route = Route { source: found.guest.host, ..Route::default() };
        let wanted = Wanted {
            kind: OperationKind::GuestStop,
            handover: handover::OperationKind::Stop,
            work: Work::GuestStop { grace_ms },
            route,
        };
        submit(&api, &asker, &found, None, wanted).await
    })
    .await
}

pub(super) fn migration_options(wanted: &GuestMigrate) -> Result<MigrationOptions, Failure> {
    let ranges = [
        ("bandwidth_bps", wanted.bandwidth_bps, MIN_BANDWIDTH_BPS, u64::MAX),
        ("max_downtime_ms", wanted.max_downtime_ms, 1, MAX_DOWNTIME_MS),
        ("deadline_ms", wanted.deadline_ms, 1000, MAX_DEADLINE_MS),
    ];
    for (field, value, least, most) in ranges {
        if let Some(value) = value.filter(|value| !(least..=most).contains(value)) {
            return Err(Failure::bad(format!("{field} is {value}; it must be {least} to {most}")));
        }
    }
    guest_plan::check_reason(wanted.reason.as_ref())?;
    Ok(MigrationOptions {
        bandwidth_bps: wanted.bandwidth_bps,
        max_downtime_ms: Some(wanted.max_downtime_ms.unwrap_or(DEFAULT_DOWNTIME_MS)),
        auto_converge: wanted.auto_converge,
        deadline_ms: wanted.deadline_ms,
        memory: wanted.memory,
        holds: false,
    })
}

/// Whether both agents know how to leave memory behind, and what that means; nothing for a move that leaves none.
pub(super) fn post_copy(
    live: &LiveHosts,
    source: Option<HostId>,
    to: &Host,
    memory: MemoryMode,
) -> Result<Option<PlanCheck>, Problem> {
    if memory.is_pre_copy() {
        return Ok(None);
    }
    if let Some(host) = source.into_iter().chain([to.id]).find(|host| !live.takes_post_copy(*host)) {
        let name = match memory {
            MemoryMode::Hybrid => "hybrid",
            _ => "post_copy",
        };
        let detail = format!(
            "memory {name}: guests cannot leave memory behind when they move from or to {host}; its back end or kernel lacks it, or its \
             agent is older"
        );
        return Err(Problem::new(Code::Unsupported, detail));
    }
    let detail = "while memory is missing at the destination, the loss of the source host loses the guest";
    Ok(Some(PlanCheck { name: "post_copy".to_owned(), is_ok: true, detail: detail.to_owned() }))
}

/// Moves a guest live.
#[utoipa::path(post, path = "/v1/guests/{guest}/migrate", tag = "guests", request_body = GuestMigrate, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn migrate(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    begin_migration(&api, &asker, &Ref::from(guest), &body(&headers, &bytes)?).await
}

/// As [`migrate`].
pub(super) async fn begin_migration(
    api: &Api,
    asker: &Asker,
    reference: &Ref,
    wanted: &GuestMigrate,
) -> Result<Reply, Failure> {
    let options = migration_options(wanted)?;
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let picture = Picture::take(&api.parts).await?;
        let found = asker.find_guest(&api.parts, reference).await?;
        guest_plan::admit(Request::Migrate, &found)?;
        let place = guest_plan::resolve_place(&api.parts, Some(&wanted.to)).await?;
        // Much to read: only for those who look first.
        let measured = match asker.params.dry_run {
            true => Some(propose::measured(&api.parts.state, &api.parts.paths, &picture.hosts).await?),
            false => None,
        };
        let way = way_out(&picture, &found, found.guest.host, &place, options.bandwidth_bps);
        let way = way.and_then(|(host, mut plan)| {
            plan.checks.extend(post_copy(&api.parts.hosts, found.guest.host, host, options.memory)?);
            if let (Some(measured), Some(source)) = (&measured, found.guest.host.and_then(|host| picture.host(host))) {
                foretell(&mut plan, measured, &found, (source, host), &options);
            }
            Ok((host, plan))
        });
        match way {
            Ok((host, plan)) => {
                let route = Route {
                    source: found.guest.host,
                    destination: Some(host.id),
                    plan: Some(plan),
                    reason: wanted.reason.clone(),
                };
                let post_copy = !options.memory.is_pre_copy();
                let wanted = Wanted {
                    kind: OperationKind::GuestMigrate,
                    handover: handover::OperationKind::Migrate { to: host.id, post_copy },
                    work: Work::GuestMigrate { options: options.clone() },
                    route,
                };
                submit(api, asker, &found, Some(&picture), wanted).await
            }
            Err(problem) => refuse(asker, &found, OperationKind::GuestMigrate, problem),
        }
    })
    .await
}

/// Adds to a plan what was measured of such moves.
fn foretell(
    plan: &mut Plan,
    measured: &Measured,
    found: &GuestRecord,
    way: (&Host, &Host),
    options: &MigrationOptions,
) {
    let limit = options.bandwidth_bps.map(|bps| (bps / 8).max(1));
    let downtime_ms = options.max_downtime_ms.unwrap_or(DEFAULT_DOWNTIME_MS);
    plan.predicted_from = Some(measured.basis(found.guest.id, way.0, way.1));
    // The model is of memory that goes before the guest does.
    let live =
        measured.forecast(&found.guest, way.0, way.1, limit, downtime_ms).filter(|_| options.memory.is_pre_copy());
    if let Some(live) = live {
        plan.predicted_bytes = Some(live.bytes);
        plan.predicted_ms = Some(live.copy_ms);
        plan.predicted_downtime_ms = Some(live.downtime_ms);
    }
}

/// Where a guest that is at `from` would go, as the place that was asked for allows, and what that would take.
///
/// # Errors
/// Why it cannot go there.
pub(crate) fn way_out<'a>(
    picture: &'a Picture,
    found: &GuestRecord,
    from: Option<HostId>,
    place: &Place,
    bandwidth_bps: Option<u64>,
) -> Result<(&'a Host, Plan), Problem> {
    let source = from.and_then(|host| picture.host(host));
    let (host, checks) = picture.choose(&need(picture, found, from), place)?;
    let (host, checks) = with_reachability(source, host, !found.guest.ports.is_empty(), checks)?;
    Ok((host, migration_plan(found, host, checks, bandwidth_bps)))
}

/// The chosen host, if the guest's host can be reached and reach it.
fn with_reachability<'a>(
    source: Option<&Host>,
    host: &'a Host,
    has_ports: bool,
    mut checks: Vec<PlanCheck>,
) -> Result<(&'a Host, Vec<PlanCheck>), Problem> {
    let Some(source) = source else {
        return Err(Problem::new(Code::HostUnavailable, "the guest's host is not known any more"));
    };
    if source.state == supercloud_api::HostState::Unreachable {
        let detail = format!("the agent of {}, where the guest is, is not connected", source.name);
        return Err(Problem::new(Code::HostUnavailable, detail));
    }
    let live = placement::moves_live(source);
    if !live.is_ok {
        return Err(Problem::new(Code::Unsupported, live.detail));
    }
    let check = placement::reachability(source, host);
    if !check.is_ok {
        return Err(Problem::new(Code::HostUnavailable, check.detail));
    }
    checks.push(check);
    if has_ports {
        let check = placement::one_overlay(source, host);
        if !check.is_ok {
            return Err(Problem::new(Code::Incompatible, check.detail));
        }
        checks.push(check);
    }
    Ok((host, checks))
}

/// What a move would take: each page once, at the bandwidth that was given. What is not known is not predicted.
fn migration_plan(found: &GuestRecord, host: &Host, checks: Vec<PlanCheck>, bandwidth_bps: Option<u64>) -> Plan {
    let bytes = found.guest.shape.memory_bytes;
    Plan {
        predicted_bytes: Some(bytes),
        predicted_ms: bandwidth_bps.map(|bps| bytes.saturating_mul(8000) / bps),
        ..guest_plan::plan_for(host, checks)
    }
}

/// Suspends a guest into the store of its cloud.
#[utoipa::path(post, path = "/v1/guests/{guest}/freeze", tag = "guests", request_body = GuestFreeze, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn freeze(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestFreeze = body(&headers, &bytes)?;
    guest_plan::check_reason(wanted.reason.as_ref())?;
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        guest_plan::admit(Request::Freeze, &found)?;
        let freeze = FreezeId::generate();
        let route = Route { source: found.guest.host, reason: wanted.reason.clone(), ..Route::default() };
        let wanted = Wanted {
            kind: OperationKind::GuestFreeze,
            handover: handover::OperationKind::Freeze { freeze },
            work: Work::GuestFreeze { freeze },
            route,
        };
        submit(&api, &asker, &found, None, wanted).await
    })
    .await
}

/// Resumes a frozen guest, once; or sets a guest that is lost or stopped back to a checkpoint and resumes it from that.
#[utoipa::path(post, path = "/v1/guests/{guest}/thaw", tag = "guests", request_body = GuestThaw, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn thaw(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestThaw = body(&headers, &bytes)?;
    let reference = Ref::from(guest);
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let mut picture = Picture::take(&api.parts).await?;
        let found = asker.find_guest(&api.parts, &reference).await?;
        let back = set_back(&api, &asker, &found, &wanted, &mut picture).await?;
        let now = back.as_ref().map_or(&found.value, |back| &back.guest);
        let Some(freeze) = now.guest.freeze else {
            return Err(Failure::new(Code::Internal, "the guest is frozen, and its record names no freeze"));
        };
        if let Some(stale) = wanted.freeze.filter(|meant| *meant != freeze) {
            return Err(Failure::new(
                Code::WrongState,
                format!("the freeze {stale} is not the guest's state any more; its newest is {freeze}"),
            ));
        }
        let made = api.parts.state.read::<Freeze>(&freeze).await?;
        if back.is_none() && made.is_some_and(|made| made.point.is_some()) {
            // It was set back before, and the thaw did not come to its end.
            picture.only_with_checkpoints(&api.parts.hosts)?;
        }
        let project = api.parts.state.need::<ProjectRecord>(&found.guest.project).await?;
        picture.check_quota(found.guest.project, project.project.quota, 0, Some(found.guest.shape), 0)?;
        if wanted.memory == Some(ThawMemory::Lazy) {
            picture.only_with_lazy_thaws(&api.parts.hosts)?;
        }
        let place = guest_plan::resolve_place(&api.parts, wanted.to.as_ref()).await?;
        match picture.choose(&need(&picture, &found, None), &place) {
            Ok((host, checks)) => {
                let mut plan = guest_plan::plan_for(host, checks);
                plan.checks.extend(lazy_thaw(&api.parts.hosts, host, wanted.memory));
                let plan = Some(plan);
                let reason = back.as_ref().map(|back| format!("set back to point {} of its volume", back.point));
                let route = Route { destination: Some(host.id), plan, reason, ..Route::default() };
                let wanted = Wanted {
                    kind: OperationKind::GuestThaw,
                    handover: handover::OperationKind::Thaw { freeze, to: host.id },
                    work: Work::GuestThaw { freeze, memory: wanted.memory },
                    route,
                };
                submit_also(&api, &asker, &found, now.clone(), Some(&picture), wanted, |guest, change| {
                    if let Some(back) = &back {
                        back.write(guest, api.parts.state.book().now(), change);
                    }
                })
                .await
            }
            Err(problem) => refuse(&asker, &found, OperationKind::GuestThaw, problem),
        }
    })
    .await
}

/// What it means that a thawed guest runs before its memory is there; nothing where it waits.
pub(super) fn lazy_thaw(live: &LiveHosts, to: &Host, memory: Option<ThawMemory>) -> Option<PlanCheck> {
    let is_lazy = memory != Some(ThawMemory::Whole) && live.takes_lazy_thaw(to.id);
    let detail = "it runs at once where what was frozen allows it; until its memory is there, it waits for what it wants of it when the \
                  store of its freeze cannot be reached";
    is_lazy.then(|| PlanCheck { name: "memory".to_owned(), is_ok: true, detail: detail.to_owned() })
}

/// Whether the guest may be thawed, or what it is set back to first: then only hosts count that can go on from that.
async fn set_back(
    api: &Api,
    asker: &Asker,
    found: &GuestRecord,
    wanted: &GuestThaw,
    picture: &mut Picture,
) -> Result<Option<SetBack>, Failure> {
    match (wanted.checkpoint, wanted.point, wanted.freeze) {
        (false, Some(_), _) => return Err(Failure::bad("point: only with checkpoint")),
        (true, _, Some(_)) => return Err(Failure::bad("freeze and checkpoint exclude each other")),
        (false, None, _) => {
            guest_plan::admit(Request::Thaw, found)?;
            return Ok(None);
        }
        (true, ..) => guest_plan::admit(Request::SetBack, found)?,
    }
    // It gives up what the guest did since: more than a policy does that moves guests.
    if !Access::Change.allows(&asker.caller()?.token) {
        return Err(Failure::new(Code::Forbidden, "setting a guest back to a checkpoint takes the role operator"));
    }
    let back = SetBack::plan(&api.parts.state, found, wanted.point).await?;
    picture.only_with_checkpoints(&api.parts.hosts)?;
    Ok(Some(back))
}

/// Deletes a guest that does not run, with its volumes and ports.
#[utoipa::path(delete, path = "/v1/guests/{guest}", tag = "guests", responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        guest_plan::admit(Request::Delete, &found)?;
        // Whoever makes it a member of a group passes it.
        let guard = keys::usage_guard(found.guest.project);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        if let Some(group) = groups::group_of(&api, found.guest.id).await? {
            let detail = format!("it is in group {}; take it out of that, or delete the group, first", group.name);
            return Err(Failure::new(Code::WrongState, detail));
        }
        let id = OperationId::generate();
        let route = Route { source: found.guest.host, ..Route::default() };
        let operation = guest_plan::new_operation(&asker, id, OperationKind::GuestDelete, &found.guest, route);
        if asker.params.dry_run {
            return Reply::ok(&operation);
        }
        let mut now = found.value.clone();
        now.guest.operation = Some(id);
        let mut change = Change::new();
        change.update(&found, &now).create_operation(&guest_plan::record(operation.clone(), Work::GuestDelete));
        change.guard(guard, guarded);
        asker.commit(&api.parts, now.guest.project, change, Reply::accepted(&operation)?).await
    })
    .await
}
