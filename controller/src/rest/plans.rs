//! Plans: made, looked at, applied, cancelled, taken back. Carried out by [`crate::plans`].

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
};
use supercloud_api::{
    Cloud, FleetPlan, FleetPlanCreate, Page, PlanKind, Problem, Ref,
    ids::{GuestId, PlanId},
};

use super::{Api, Asker, Failure, Reply, body, guest_plan};
use crate::{
    placement::Place,
    plans::{
        AT_MOST_STEPS, machine,
        make::{Aim, Target},
        propose::{make_way, propose},
    },
    state::{Change, PlanRecord, Stored, retry_conflicts},
};

/// How far apart loads may be when nothing is said, in percent of a host.
const DEFAULT_BAND_PERCENT: u32 = 20;

fn location(plan: &FleetPlan) -> String {
    format!("/v1/plans/{}", plan.id)
}

/// Plans, oldest first, as many as are kept.
#[utoipa::path(get, path = "/v1/plans", tag = "plans", responses((status = 200, body = Page<FleetPlan>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let (items, next_page) =
        api.parts.state.page::<PlanRecord>(asker.params.page()?.as_ref(), asker.params.limit()?, |_| true).await?;
    Reply::ok(&Page { items: items.into_iter().map(|record| record.value.plan).collect(), next_page })
}

async fn find(api: &Api, id: &str) -> Result<Stored<PlanRecord>, Failure> {
    let missing = || Failure::not_found("plan", id);
    let parsed: PlanId = id.parse().map_err(|_| missing())?;
    api.parts.state.read::<PlanRecord>(&parsed).await?.ok_or_else(missing)
}

/// One plan.
#[utoipa::path(get, path = "/v1/plans/{plan}", tag = "plans", responses((status = 200, body = FleetPlan)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    asker.caller()?;
    let found = find(&api, &id).await?;
    Ok(Reply::ok(&found.plan)?.at(found.revision))
}

/// What is named must be what the kind is about, and nothing else.
fn check(wanted: &FleetPlanCreate) -> Result<(), Failure> {
    guest_plan::check_reason(wanted.reason.as_ref())?;
    let named = [
        ("host", wanted.host.is_some(), wanted.kind == PlanKind::Drain, true),
        ("cloud", wanted.cloud.is_some(), wanted.kind == PlanKind::Evacuate, true),
        ("guests", !wanted.guests.is_empty(), wanted.kind == PlanKind::Gather, true),
        ("to", wanted.to.is_some(), wanted.kind == PlanKind::Gather, true),
        ("band_percent", wanted.band_percent.is_some(), wanted.kind == PlanKind::Rebalance, false),
    ];
    for (field, is_there, is_meant, is_needed) in named {
        if is_there && !is_meant {
            return Err(Failure::bad(format!("{field} is not for a plan of this kind")));
        }
        if is_meant && is_needed && !is_there {
            return Err(Failure::bad(format!("a plan of this kind needs {field}")));
        }
    }
    if wanted.guests.len() > AT_MOST_STEPS {
        return Err(Failure::bad(format!("{} guests are named; at most {AT_MOST_STEPS}", wanted.guests.len())));
    }
    if let Some(percent) = wanted.band_percent.filter(|percent| !(1..=100).contains(percent)) {
        return Err(Failure::bad(format!("band_percent is {percent}; it must be 1 to 100")));
    }
    Ok(())
}

async fn aim(api: &Api, asker: &Asker, wanted: &FleetPlanCreate) -> Result<Aim, Failure> {
    let place = |reference: &Option<Ref>| {
        let reference = reference.clone();
        async move { guest_plan::resolve_place(&api.parts, reference.as_ref()).await }
    };
    Ok(match wanted.kind {
        PlanKind::Drain => match place(&wanted.host).await? {
            Place::Host(host) => Aim::Drain(host.id),
            Place::Cloud(cloud) => {
                return Err(Failure::bad(format!(
                    "{} is a cloud: a cloud is evacuated, a host is drained",
                    cloud.name
                )));
            }
            Place::Anywhere => return Err(Failure::bad("a plan of this kind needs host")),
        },
        PlanKind::Evacuate => {
            let reference = wanted.cloud.clone().unwrap_or_else(|| Ref::from(""));
            Aim::Evacuate(asker.find::<Cloud>(&api.parts, &reference).await?.id)
        }
        PlanKind::Rebalance => Aim::Rebalance(wanted.band_percent.unwrap_or(DEFAULT_BAND_PERCENT)),
        PlanKind::Gather => {
            let target = match place(&wanted.to).await? {
                Place::Host(host) => Target::Host(host.id),
                Place::Cloud(cloud) => Target::Cloud(cloud.id),
                Place::Anywhere => return Err(Failure::bad("a plan of this kind needs to")),
            };
            let mut guests: Vec<GuestId> = Vec::new();
            for reference in &wanted.guests {
                guests.push(asker.find_guest(&api.parts, reference).await?.guest.id);
            }
            Aim::Gather(guests, target)
        }
    })
}

/// Makes a plan: looks where the guests would go, what that costs and what may go otherwise. Nothing moves before it is applied; a dry
/// run does not even keep it.
#[utoipa::path(post, path = "/v1/plans", tag = "plans", request_body = FleetPlanCreate, responses((status = 201, body = FleetPlan), (status = 200, description = "Dry run", body = FleetPlan)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: FleetPlanCreate = body(&headers, &bytes)?;
    check(&wanted)?;
    let aim = aim(&api, &asker, &wanted).await?;
    let context = asker.context(None);
    let plan = propose(&api.parts.state, &api.parts.hosts, &api.parts.paths, &aim, wanted.reason, &context).await?;
    if asker.params.dry_run {
        return Reply::ok(&plan);
    }
    let record = PlanRecord { plan, actor: context.actor, request_id: context.request_id };
    retry_conflicts(|| async {
        let mut change = Change::new();
        make_way(&api.parts.state, &mut change).await?;
        change.create_plan(&record);
        asker.commit(&api.parts, None, change, Reply::created(location(&record.plan), &record.plan)?).await
    })
    .await
}

/// Changes a plan as asked for, in the asker's name from now on.
async fn turn(
    api: &Api,
    asker: &Asker,
    id: &str,
    how: fn(&mut FleetPlan) -> Result<(), Problem>,
) -> Result<Reply, Failure> {
    let reply = retry_conflicts(|| async {
        let found = find(api, id).await?;
        let mut now = found.value.clone();
        how(&mut now.plan)?;
        if asker.params.dry_run {
            return Reply::ok(&now.plan);
        }
        let context = asker.context(None);
        (now.actor, now.request_id) = (context.actor, context.request_id);
        let mut change = Change::new();
        change.update_plan(&found, &mut now);
        let location = Some(location(&now.plan));
        let reply = Reply { location, ..Reply::json(StatusCode::ACCEPTED, &now.plan)? };
        asker.commit(&api.parts, None, change, reply).await
    })
    .await?;
    api.parts.plans_wake.notify_one();
    Ok(reply)
}

/// Has a plan carried out, step by step. Each move is checked again when its turn comes.
#[utoipa::path(post, path = "/v1/plans/{plan}/apply", tag = "plans", responses((status = 202, body = FleetPlan), (status = 200, description = "Dry run", body = FleetPlan)))]
pub async fn apply(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    turn(&api, &asker, &id, machine::apply).await
}

/// Has a plan stop: no step begins any more, those under way are cancelled where that is still possible, and what is done stays.
#[utoipa::path(post, path = "/v1/plans/{plan}/cancel", tag = "plans", responses((status = 202, body = FleetPlan), (status = 200, description = "Dry run", body = FleetPlan)))]
pub async fn cancel(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    turn(&api, &asker, &id, machine::cancel).await
}

/// Has a plan that has come to rest taken back: its cordons are lifted, and every guest that it moved goes to where it was, the last
/// first.
#[utoipa::path(post, path = "/v1/plans/{plan}/undo", tag = "plans", responses((status = 202, body = FleetPlan), (status = 200, description = "Dry run", body = FleetPlan)))]
pub async fn undo(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    turn(&api, &asker, &id, machine::undo).await
}
