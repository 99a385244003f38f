//! Operations: looking, waiting, cancelling.

use std::time::Duration;

use axum::extract::{Path, State};
use supercloud_api::{
    Code, Operation, OperationKind, Page, Ref, Role,
    ids::{GuestId, OperationId},
};

use super::{Api, Asker, Failure, Reply, guest_mirrors};
use crate::auth::Caller;
use crate::state::{Change, GuestRecord, OperationRecord, Seen, Stored, Work, retry_conflicts};

/// The operation as it is now: newer than its record, which is written less often.
pub(super) fn shown(api: &Api, record: &OperationRecord) -> Operation {
    let mut operation = record.operation.clone();
    if !operation.phase.is_terminal() {
        api.parts.progress.apply(operation.id, &mut operation.progress);
    }
    operation
}

pub(super) async fn find(api: &Api, asker: &Asker, id: &str) -> Result<Stored<OperationRecord>, Failure> {
    let missing = || Failure::not_found("operation", id);
    let parsed: OperationId = id.parse().map_err(|_| missing())?;
    let found = api.parts.state.read::<OperationRecord>(&parsed).await?;
    found.filter(|found| asker.sees_operation(found.operation.project, found.operation.guest)).ok_or_else(missing)
}

/// Operations, oldest first or newest first.
#[utoipa::path(get, path = "/v1/operations", tag = "operations", params(
    ("newest" = Option<bool>, Query, description = "The newest first. A page can then hold fewer than asked for, or none, and still name a next one."),
    ("active" = Option<bool>, Query, description = "Only those that have not ended."),
    ("guest" = Option<String>, Query, description = "Only those of this guest, by name or id."),
    ("phase" = Option<supercloud_api::Phase>, Query, description = "Only those in this phase."),
    ("from_ms" = Option<u64>, Query, description = "Only those made at this time or later, in milliseconds since 1970."),
), responses((status = 200, body = Page<Operation>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let (state, params) = (&api.parts.state, &asker.params);
    let scope = asker.scope(&api.parts).await?;
    // A guest that is gone has no name, but its operations stay.
    let guest = match params.guest.as_deref().map(|text| (text, text.parse::<GuestId>())) {
        None => None,
        Some((_, Ok(id))) => Some(id),
        Some((name, Err(_))) => Some(asker.find_guest(&api.parts, &Ref::from(name)).await?.guest.id),
    };
    let is_older =
        |record: &OperationRecord| params.from_ms.is_some_and(|from_ms| record.operation.created_at_ms < from_ms);
    let keep = |record: &OperationRecord| {
        let operation = &record.operation;
        (scope.is_none() || operation.project == scope)
            && (guest.is_none() || operation.guest == guest)
            && params.phase.is_none_or(|phase| operation.phase == phase)
            && !(params.active && operation.phase.is_terminal())
            && !is_older(record)
    };
    let (page, limit) = (params.page::<OperationId>()?, params.limit()?);
    let (items, next_page) = match (params.active, params.newest) {
        (true, newest) => active(state, page, limit, newest, keep).await?,
        (false, true) => state.page_back(page.as_ref(), limit, is_older, keep).await?,
        (false, false) => state.page(page.as_ref(), limit, keep).await?,
    };
    Reply::ok(&Page { items: items.iter().map(|record| shown(&api, record)).collect(), next_page })
}

/// A page of those that have not ended, by their index: what has ended costs nothing.
async fn active(
    state: &crate::state::State,
    page: Option<OperationId>,
    limit: usize,
    is_newest_first: bool,
    keep: impl Fn(&OperationRecord) -> bool,
) -> Result<(Vec<Stored<OperationRecord>>, Option<String>), Failure> {
    let mut ids = state.active_operations().await?;
    ids.sort_unstable();
    if is_newest_first {
        ids.reverse();
    }
    ids.retain(|id| page.is_none_or(|page| if is_newest_first { *id < page } else { *id > page }));
    let mut kept: Vec<Stored<OperationRecord>> = Vec::new();
    for id in ids {
        if kept.len() == limit {
            let last = kept.last().map(|record| record.operation.id.to_string());
            return Ok((kept, last));
        }
        kept.extend(state.read::<OperationRecord>(&id).await?.filter(|record| keep(record)));
    }
    Ok((kept, None))
}

/// One operation. `?wait=30s` answers when it has ended, or after that time.
#[utoipa::path(get, path = "/v1/operations/{operation}", tag = "operations", responses((status = 200, body = Operation)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    let mut found = find(&api, &asker, &id).await?;
    if let (Some(wait), false) = (asker.params.wait()?, found.operation.phase.is_terminal()) {
        if let Some(newer) = wait_for_end(&api, found.operation.id, wait).await {
            found = newer;
        } else {
            found = find(&api, &asker, &id).await?;
        }
    }
    Ok(Reply::ok(&shown(&api, &found))?.at(found.revision))
}

/// The ended operation, if it ends in time.
async fn wait_for_end(api: &Api, id: OperationId, wait: Duration) -> Option<Stored<OperationRecord>> {
    let mut follower = api.parts.state.follow_one::<OperationRecord>(&id);
    let ended = async {
        loop {
            match follower.next().await {
                Ok(Seen::Put(record)) if record.operation.phase.is_terminal() => return Some(record),
                Ok(Seen::Gone(_)) | Err(_) => return None,
                Ok(Seen::Put(_) | Seen::Restart | Seen::CaughtUp) => {}
            }
        }
    };
    tokio::select! {
        // A controller that ends answers with what it knows.
        () = api.parts.stop.cancelled() => None,
        ended = tokio::time::timeout(wait, ended) => ended.ok().flatten(),
    }
}

/// A guest may cancel what it asked for itself, not what an operator does with it: else it could not be evacuated. Who may not
/// begin a piece of work may not cancel it either.
fn may_cancel(caller: &Caller, operation: &Operation) -> Result<(), Failure> {
    if caller.token.guest.is_some() && operation.actor != caller.actor() {
        return Err(Failure::new(Code::Forbidden, "a guest cancels only what it asked for itself"));
    }
    let moves = matches!(
        operation.kind,
        OperationKind::GuestMigrate
            | OperationKind::GuestMirror
            | OperationKind::GuestFreeze
            | OperationKind::GuestThaw
            | OperationKind::GroupMigrate
            | OperationKind::GroupFreeze
            | OperationKind::GroupThaw
    );
    let least = match operation.kind {
        _ if moves => Role::Policy,
        OperationKind::HostRent | OperationKind::HostReturn => Role::Admin,
        _ => Role::Operator,
    };
    if caller.token.role < least {
        return Err(Failure::new(Code::Forbidden, format!("cancelling this takes the role {least:?}")));
    }
    Ok(())
}

/// Asks for an operation to be cancelled. It may come too late: watch the operation.
#[utoipa::path(post, path = "/v1/operations/{operation}/cancel", tag = "operations", responses((status = 202, body = Operation), (status = 200, description = "Dry run", body = Operation)))]
pub async fn cancel(State(api): State<Api>, asker: Asker, Path(id): Path<String>) -> Result<Reply, Failure> {
    retry_conflicts(|| async {
        let found = find(&api, &asker, &id).await?;
        may_cancel(asker.caller()?, &found.operation)?;
        if found.operation.phase.is_terminal() {
            return Err(Failure::new(Code::WrongState, "the operation has ended"));
        }
        if let Work::GuestMirror { is_failing_over: true, .. } = found.work {
            return Err(guest_mirrors::takes_over());
        }
        let kept = match (&found.work, found.operation.guest) {
            (Work::GuestMirror { .. }, Some(guest)) => api.parts.state.read::<GuestRecord>(&guest).await?,
            _ => None,
        };
        let kept = kept.filter(|guest| guest.guest.kept_mirror.is_some());
        if asker.params.dry_run || (found.operation.is_cancel_requested && kept.is_none()) {
            let shown = shown(&api, &found);
            return if asker.params.dry_run { Reply::ok(&shown) } else { Reply::accepted(&shown) };
        }
        let mut change = Change::new();
        let mut now = found.value.clone();
        if !found.operation.is_cancel_requested {
            now = change.request_cancel(&found);
        }
        if let Some(guest) = kept {
            // Who ends a mirror does not want another one in its place.
            let mut without = guest.value.clone();
            without.guest.kept_mirror = None;
            change.update(&guest, &without);
        }
        asker.commit(&api.parts, now.operation.project, change, Reply::accepted(&now.operation)?).await
    })
    .await
}
