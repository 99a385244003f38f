//! Reading and changing guests.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Guest, GuestPatch, Page, Ref};

use super::{Api, Asker, Failure, Reply, body, check_if_match, guest_plan};
use crate::{
    admission::Request,
    state::{Change, EventDraft, GuestRecord, retry_conflicts},
};

/// Guests.
#[utoipa::path(get, path = "/v1/guests", tag = "guests", responses((status = 200, body = Page<Guest>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |record: &GuestRecord| scope.is_none_or(|project| record.guest.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|record| record.value.guest).collect(), next_page })
}

/// One guest.
#[utoipa::path(get, path = "/v1/guests/{guest}", tag = "guests", responses((status = 200, body = Guest)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    Ok(Reply::ok(&found.guest)?.at(found.revision))
}

/// Changes a guest.
#[utoipa::path(patch, path = "/v1/guests/{guest}", tag = "guests", request_body = GuestPatch, responses((status = 200, body = Guest)))]
pub async fn change(
    State(api): State<Api>,
    asker: Asker,
    Path(guest): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: GuestPatch = body(&headers, &bytes)?;
    let reference = Ref::from(guest);
    retry_conflicts(|| async {
        let found = asker.find_guest(&api.parts, &reference).await?;
        check_if_match(&headers, found.revision)?;
        guest_plan::admit(Request::Patch, &found)?;
        let mut now = found.value.clone();
        now.guest.follow_prices = wanted.follow_prices.unwrap_or(now.guest.follow_prices);
        if now == found.value {
            return Ok(Reply::ok(&found.guest)?.at(found.revision));
        }
        let mut change = Change::new();
        change.update(&found, &now).event(
            EventDraft::new("guest.changed")
                .project(now.guest.project)
                .guest(now.guest.id)
                .data(serde_json::json!({ "follow_prices": now.guest.follow_prices })),
        );
        asker.commit(&api.parts, now.guest.project, change, Reply::ok(&now.guest)?).await
    })
    .await
}
