//! Groups of guests, and what is done with all of their guests together: migrate, freeze, thaw. All of it is checked, placed and begun in
//! one transaction, and carried out as one: see [`crate::operations::group`].

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Freeze, Group, GroupCreate, GroupThaw, GroupUpdate, GuestFreeze, GuestMigrate, Operation, OperationKind,
    Page, Plan, PlanCheck, Problem, Ref, Shape, ThawMemory,
    handover::{self, BeginRequest},
    ids::{FreezeId, GroupId, GuestId, OperationId},
    unix_ms,
};

use super::{
    Api, Asker, Failure, Reply, body, check_if_match,
    guest_operations::{self, Wanted},
    guest_plan::{self, Picture, Route},
};
use crate::{
    admission::Request,
    state::{Change, EventDraft, GuestRecord, Named as _, ProjectRecord, Stored, Work, keys, retry_conflicts},
};

/// Most members: all that changes at their switch fits into one transaction of any store.
const MEMBERS_AT_MOST: usize = 8;

/// Groups.
#[utoipa::path(get, path = "/v1/groups", tag = "groups", responses((status = 200, body = Page<Group>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |group: &Group| scope.is_none_or(|project| group.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|group| group.value).collect(), next_page })
}

/// One group.
#[utoipa::path(get, path = "/v1/groups/{group}", tag = "groups", responses((status = 200, body = Group)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(group): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Group>(&api.parts, &Ref::from(group)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

/// The guests that are to be a group's members, if they may be.
async fn members(api: &Api, asker: &Asker, group: &Group, wanted: &[Ref]) -> Result<Vec<GuestId>, Failure> {
    if wanted.is_empty() || wanted.len() > MEMBERS_AT_MOST {
        let count = wanted.len();
        return Err(Failure::bad(format!("guests names {count} guests; a group has 1 to {MEMBERS_AT_MOST}")));
    }
    let mut guests = Vec::with_capacity(wanted.len());
    for reference in wanted {
        // By name it is one of the group's project, whatever project is at hand.
        let found = match reference.as_str().parse::<GuestId>() {
            Ok(_) => asker.find_guest(&api.parts, reference).await?,
            Err(_) => api
                .parts
                .state
                .find::<GuestRecord>(Some(group.project), reference)
                .await?
                .ok_or_else(|| Failure::not_found("guest", reference.as_str()))?,
        };
        let guest = &found.guest;
        if guest.project != group.project {
            return Err(Failure::bad(format!("guest {} is of another project than the group", guest.name)));
        }
        if guests.contains(&guest.id) {
            return Err(Failure::bad(format!("guest {} is named twice", guest.name)));
        }
        if let Some(other) = group_of(api, guest.id).await?.filter(|other| other.id != group.id) {
            let detail = format!("guest {} is in group {}; a guest is in one group at most", guest.name, other.name);
            return Err(Failure::new(Code::WrongState, detail));
        }
        guests.push(guest.id);
    }
    Ok(guests)
}

/// The group that a guest is in.
pub(super) async fn group_of(api: &Api, guest: GuestId) -> Result<Option<Group>, Failure> {
    let groups = api.parts.state.list::<Group>().await?;
    Ok(groups.into_iter().map(|group| group.value).find(|group| group.guests.contains(&guest)))
}

/// That nothing is done with the group now.
fn idle(group: &Group) -> Result<(), Failure> {
    match group.operation {
        Some(operation) => Err(Failure::new(
            Code::OperationInProgress,
            format!("operation {operation} is under way on group {}", group.name),
        )),
        None => Ok(()),
    }
}

fn told(kind: &'static str, group: &Group) -> EventDraft {
    EventDraft::new(kind)
        .project(group.project)
        .data(serde_json::json!({ "group": group.id, "name": group.name, "guests": group.guests }))
}

/// Makes a group.
#[utoipa::path(post, path = "/v1/groups", tag = "groups", request_body = GroupCreate, responses((status = 201, body = Group)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: GroupCreate = body(&headers, &bytes)?;
    let project = asker.project(&api.parts, wanted.project.as_ref()).await?.project.id;
    retry_conflicts(|| async {
        // Whoever makes a guest a member passes it.
        let guard = keys::usage_guard(project);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        if api.parts.state.find::<Group>(Some(project), &Ref::from(wanted.name.as_str())).await?.is_some() {
            return Err(Failure::name_taken(Group::NOUN, &wanted.name));
        }
        let mut group = Group {
            id: GroupId::generate(),
            project,
            name: wanted.name.clone(),
            guests: Vec::new(),
            operation: None,
            created_at_ms: unix_ms(),
        };
        group.guests = members(&api, &asker, &group, &wanted.guests).await?;
        let mut change = Change::new();
        change.create_named(&group).guard(guard, guarded).event(told("group.created", &group));
        let reply = Reply::created(format!("/v1/groups/{}", group.id), &group)?;
        asker.commit(&api.parts, project, change, reply).await
    })
    .await
}

/// Says which guests are the group's from now on.
#[utoipa::path(patch, path = "/v1/groups/{group}", tag = "groups", request_body = GroupUpdate, responses((status = 200, body = Group)))]
pub async fn change(
    State(api): State<Api>,
    asker: Asker,
    Path(group): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GroupUpdate = body(&headers, &bytes)?;
    let reference = Ref::from(group);
    retry_conflicts(|| async {
        let found = asker.find::<Group>(&api.parts, &reference).await?;
        check_if_match(&headers, found.revision)?;
        let guard = keys::usage_guard(found.project);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        idle(&found)?;
        let mut now = found.value.clone();
        now.guests = members(&api, &asker, &found, &wanted.guests).await?;
        let mut change = Change::new();
        change.update(&found, &now).guard(guard, guarded).event(told("group.changed", &now));
        asker.commit(&api.parts, now.project, change, Reply::ok(&now)?).await
    })
    .await
}

/// Deletes a group; its guests stay as they are.
#[utoipa::path(delete, path = "/v1/groups/{group}", tag = "groups", responses((status = 204)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(group): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(group);
    retry_conflicts(|| async {
        let found = asker.find::<Group>(&api.parts, &reference).await?;
        idle(&found)?;
        let mut change = Change::new();
        change.delete_named(&found).event(told("group.deleted", &found));
        asker.commit(&api.parts, found.project, change, Reply::nothing()).await
    })
    .await
}

/// A member, and what is wanted of it.
struct Member {
    found: Stored<GuestRecord>,
    /// As it shall be.
    now: GuestRecord,
    id: OperationId,
    wanted: Wanted,
}

/// A group's operation in the making.
struct Together {
    id: OperationId,
    group: Stored<Group>,
    kind: OperationKind,
    reason: Option<String>,
    members: Vec<Member>,
}

/// Whose fault it is.
fn of_guest(found: &GuestRecord, failure: Failure) -> Failure {
    match failure {
        Failure::Problem(mut problem) => {
            problem.detail = format!("guest {}: {}", found.guest.name, problem.detail);
            Failure::Problem(problem)
        }
        other => other,
    }
}

impl Together {
    /// Reads a group and its members, which all must be ready for that.
    async fn read(
        api: &Api,
        asker: &Asker,
        reference: &Ref,
        (kind, request): (OperationKind, Request),
        reason: Option<&String>,
    ) -> Result<(Self, Vec<Stored<GuestRecord>>), Failure> {
        let group = asker.find::<Group>(&api.parts, reference).await?;
        idle(&group)?;
        let mut guests = Vec::with_capacity(group.guests.len());
        for guest in &group.guests {
            let Some(found) = api.parts.state.read::<GuestRecord>(guest).await? else {
                let detail =
                    format!("guest {guest} was deleted; say which guests are the group's (guest names follow)");
                return Err(Failure::new(Code::WrongState, detail));
            };
            guest_plan::admit(request, &found).map_err(|failure| of_guest(&found, failure))?;
            guests.push(found);
        }
        let reason = reason.cloned();
        let whole = Self { id: OperationId::generate(), group, kind, reason, members: Vec::new() };
        Ok((whole, guests))
    }

    /// Adds a member; what it takes counts from now on in the picture.
    fn add(
        &mut self,
        found: Stored<GuestRecord>,
        wanted: Wanted,
        picture: Option<&mut Picture>,
    ) -> Result<(), Failure> {
        let mut now = found.value.clone();
        let id = OperationId::generate();
        let request = BeginRequest { operation: id, kind: wanted.handover, group: Some(self.id) };
        guest_plan::begin_on(&mut now, &request).map_err(|failure| of_guest(&found, failure))?;
        if let Some(picture) = picture {
            picture.assume(&now);
        }
        self.members.push(Member { found, now, id, wanted });
        Ok(())
    }

    /// One plan for all: whose destination is common is named, and every check with its guest.
    fn plan(&self) -> Option<Plan> {
        let plans = || self.members.iter().filter_map(|member| Some((member, member.wanted.route.plan.as_ref()?)));
        let (_, first) = plans().next()?;
        let is_common = plans().all(|(_, plan)| plan.destination == first.destination);
        let sum = |of: fn(&Plan) -> Option<u64>| {
            plans().map(|(_, plan)| of(plan)).try_fold(0_u64, |sum, one| Some(sum.saturating_add(one?)))
        };
        // They go at the same time and share what carries them.
        let longest = |of: fn(&Plan) -> Option<u64>| {
            plans().map(|(_, plan)| of(plan)).try_fold(0_u64, |most, one| Some(most.max(one?)))
        };
        let checks = plans().flat_map(|(member, plan)| {
            let guest = &member.found.guest.name;
            let to = plan.destination_name.as_ref().map(|host| PlanCheck {
                name: "destination".to_owned(),
                is_ok: true,
                detail: format!("{guest}: {host}"),
            });
            let checks = plan
                .checks
                .iter()
                .map(move |check| PlanCheck { detail: format!("{guest}: {}", check.detail), ..check.clone() });
            to.into_iter().chain(checks)
        });
        Some(Plan {
            destination: first.destination.filter(|_| is_common),
            destination_name: first.destination_name.clone().filter(|_| is_common),
            checks: checks.collect(),
            predicted_bytes: sum(|plan| plan.predicted_bytes),
            predicted_ms: longest(|plan| plan.predicted_ms),
            predicted_downtime_ms: longest(|plan| plan.predicted_downtime_ms),
            predicted_from: None,
        })
    }

    /// Writes all of it, or says what would be written.
    async fn submit(self, api: &Api, asker: &Asker, picture: Option<&Picture>) -> Result<Reply, Failure> {
        let project = self.group.project;
        let plan = self.plan();
        let whole = Operation {
            project: Some(project),
            group: Some(self.group.id),
            parts: self.members.iter().map(|member| member.id).collect(),
            destination: plan.as_ref().and_then(|plan| plan.destination),
            plan,
            reason: self.reason.clone(),
            ..asker.context(project).planned(self.id, self.kind)
        };
        if asker.params.dry_run {
            return Reply::ok(&whole);
        }
        let mut change = Change::new();
        for Member { found, now, id, wanted } in self.members {
            let Wanted { kind, work, route, .. } = wanted;
            let mut part = guest_plan::new_operation(asker, id, kind, &now.guest, route);
            (part.group, part.part_of, part.reason) = (Some(self.group.id), Some(self.id), self.reason.clone());
            if let (Some(picture), Some(host)) = (picture, part.destination) {
                picture.pass(&mut change, keys::room_guard(host));
                picture.pass(&mut change, keys::usage_guard(project));
            }
            change.update(&found, &now).create_operation(&guest_plan::record(part, work));
        }
        let group = Group { operation: Some(self.id), ..self.group.value.clone() };
        change.update(&self.group, &group).create_operation(&guest_plan::record(whole.clone(), Work::Group));
        asker.commit(&api.parts, project, change, Reply::accepted(&whole)?).await
    }
}

/// Those that take most find room first.
fn largest_first(guests: &mut [Stored<GuestRecord>]) {
    guests.sort_by_key(|guest| std::cmp::Reverse((guest.guest.shape.memory_bytes, guest.guest.shape.vcpus)));
}

/// Moves all guests of a group live, or none; those that are there already stay.
#[utoipa::path(post, path = "/v1/groups/{group}/migrate", tag = "groups", request_body = GuestMigrate, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn migrate(
    State(api): State<Api>,
    asker: Asker,
    Path(group): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestMigrate = body(&headers, &bytes)?;
    let options = guest_operations::migration_options(&wanted)?;
    let reference = Ref::from(group);
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let mut picture = Picture::take(&api.parts).await?;
        let what = (OperationKind::GroupMigrate, Request::Migrate);
        let (mut whole, mut guests) = Together::read(&api, &asker, &reference, what, wanted.reason.as_ref()).await?;
        let place = guest_plan::resolve_place(&api.parts, Some(&wanted.to)).await?;
        guests.retain(|found| !place.holds(found.guest.host, found.guest.cloud));
        if guests.is_empty() {
            let detail = format!("all guests of group {} are there already", whole.group.name);
            return Err(Failure::new(Code::WrongState, detail));
        }
        largest_first(&mut guests);
        for found in guests {
            let source = found.guest.host;
            let way = guest_operations::way_out(&picture, &found, source, &place, options.bandwidth_bps);
            let way = way.and_then(|(host, mut plan)| {
                plan.checks.extend(guest_operations::post_copy(&api.parts.hosts, source, host, options.memory)?);
                Ok((host.id, plan))
            });
            let (to, plan) = way.map_err(|problem| of_guest(&found, problem.into()))?;
            let route = Route { source, destination: Some(to), plan: Some(plan), reason: None };
            let wanted = Wanted {
                kind: OperationKind::GuestMigrate,
                handover: handover::OperationKind::Migrate { to, post_copy: !options.memory.is_pre_copy() },
                work: Work::GuestMigrate { options: options.clone() },
                route,
            };
            whole.add(found, wanted, Some(&mut picture))?;
        }
        whole.submit(&api, &asker, Some(&picture)).await
    })
    .await
}

/// Suspends all guests of a group into the stores of their clouds, or none: none runs on while another stands still, so that what was
/// frozen is a consistent cut.
#[utoipa::path(post, path = "/v1/groups/{group}/freeze", tag = "groups", request_body = GuestFreeze, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn freeze(
    State(api): State<Api>,
    asker: Asker,
    Path(group): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestFreeze = body(&headers, &bytes)?;
    guest_plan::check_reason(wanted.reason.as_ref())?;
    let reference = Ref::from(group);
    retry_conflicts(|| async {
        let what = (OperationKind::GroupFreeze, Request::Freeze);
        let (mut whole, guests) = Together::read(&api, &asker, &reference, what, wanted.reason.as_ref()).await?;
        for found in guests {
            let freeze = FreezeId::generate();
            let route = Route { source: found.guest.host, ..Route::default() };
            let wanted = Wanted {
                kind: OperationKind::GuestFreeze,
                handover: handover::OperationKind::Freeze { freeze },
                work: Work::GuestFreeze { freeze },
                route,
            };
            whole.add(found, wanted, None)?;
        }
        whole.submit(&api, &asker, None).await
    })
    .await
}

/// Resumes all guests of a frozen group, or none: none runs before all can.
#[utoipa::path(post, path = "/v1/groups/{group}/thaw", tag = "groups", request_body = GroupThaw, responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn thaw(
    State(api): State<Api>,
    asker: Asker,
    Path(group): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GroupThaw = body(&headers, &bytes)?;
    guest_plan::check_reason(wanted.reason.as_ref())?;
    let reference = Ref::from(group);
    let _turn = api.placing.lock().await;
    retry_conflicts(|| async {
        let mut picture = Picture::take(&api.parts).await?;
        let what = (OperationKind::GroupThaw, Request::Thaw);
        let (mut whole, mut guests) = Together::read(&api, &asker, &reference, what, wanted.reason.as_ref()).await?;
        let project = api.parts.state.need::<ProjectRecord>(&whole.group.project).await?;
        let place = guest_plan::resolve_place(&api.parts, wanted.to.as_ref()).await?;
        if wanted.memory == Some(ThawMemory::Lazy) {
            picture.only_with_lazy_thaws(&api.parts.hosts)?;
        }
        let all = guests.iter().fold(Shape { vcpus: 0, memory_bytes: 0 }, |all, found| Shape {
            vcpus: all.vcpus.saturating_add(found.guest.shape.vcpus),
            memory_bytes: all.memory_bytes.saturating_add(found.guest.shape.memory_bytes),
        });
        picture.check_quota(whole.group.project, project.project.quota, 0, Some(all), 0)?;
        largest_first(&mut guests);
        for found in guests {
            let Some(freeze) = found.guest.freeze else {
                return Err(Failure::new(Code::Internal, "a guest is frozen, and its record names no freeze"));
            };
            if api.parts.state.read::<Freeze>(&freeze).await?.is_some_and(|made| made.point.is_some()) {
                picture.only_with_checkpoints(&api.parts.hosts)?;
            }
            let (host, checks) = picture
                .choose(&guest_operations::need(&picture, &found, None), &place)
                .map_err(|problem: Problem| of_guest(&found, problem.into()))?;
            let mut plan = guest_plan::plan_for(host, checks);
            plan.checks.extend(guest_operations::lazy_thaw(&api.parts.hosts, host, wanted.memory));
            let to = host.id;
            let route = Route { destination: Some(to), plan: Some(plan), ..Route::default() };
            let wanted = Wanted {
                kind: OperationKind::GuestThaw,
                handover: handover::OperationKind::Thaw { freeze, to },
                work: Work::GuestThaw { freeze, memory: wanted.memory },
                route,
            };
            whole.add(found, wanted, Some(&mut picture))?;
        }
        whole.submit(&api, &asker, Some(&picture)).await
    })
    .await
}
