//! Hosts.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Code, Host, HostPatch, Page, Ref, handover::Owner};

use super::{Api, Asker, Failure, Reply, body, check_if_match};
use crate::{
    auth::Reach,
    state::{Change, EventDraft, GuestRecord, HostRecord, retry_conflicts},
};

/// What members of one project need not know of the machines below.
fn shown(api: &Api, asker: &Asker, record: &HostRecord) -> Host {
    let mut host = record.view(&api.parts.hosts);
    if asker.caller.as_ref().is_none_or(|caller| caller.reach() != Reach::All) {
        host.data_address = None;
        host.overlay_address = None;
        host.certificate_sha256 = String::new();
        host.probe = serde_json::Value::Null;
    }
    host
}

/// All hosts, also those that were removed.
#[utoipa::path(get, path = "/v1/hosts", tag = "hosts", responses((status = 200, body = Page<Host>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let (items, next_page) =
        api.parts.state.page::<HostRecord>(asker.params.page()?.as_ref(), asker.params.limit()?, |_| true).await?;
    Reply::ok(&Page { items: items.iter().map(|record| shown(&api, &asker, record)).collect(), next_page })
}

/// One host.
#[utoipa::path(get, path = "/v1/hosts/{host}", tag = "hosts", responses((status = 200, body = Host)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(host): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<HostRecord>(&api.parts, &Ref::from(host)).await?;
    Ok(Reply::ok(&shown(&api, &asker, &found))?.at(found.revision))
}

/// Changes a host: cordons or uncordons it.
#[utoipa::path(patch, path = "/v1/hosts/{host}", tag = "hosts", request_body = HostPatch, responses((status = 200, body = Host)))]
pub async fn change(
    State(api): State<Api>,
    asker: Asker,
    Path(host): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let wanted: HostPatch = body(&headers, &bytes)?;
    let reference = Ref::from(host);
    retry_conflicts(|| async {
        let found = asker.find::<HostRecord>(&api.parts, &reference).await?;
        check_if_match(&headers, found.revision)?;
        if found.is_removed {
            return Err(Failure::new(Code::WrongState, "the host was removed"));
        }
        let mut now = found.value.clone();
        now.is_cordoned = wanted.cordoned.unwrap_or(now.is_cordoned);
        if now == found.value {
            return Ok(Reply::ok(&shown(&api, &asker, &found))?.at(found.revision));
        }
        let mut change = Change::new();
        let kind = if now.is_cordoned { "host.cordoned" } else { "host.uncordoned" };
        change.update(&found, &now).event(EventDraft::new(kind).host(now.host.id));
        let reply = Reply::ok(&shown(&api, &asker, &now))?;
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}

/// Removes a host: its certificate is denied at once, and what it ran alone is declared lost. Refused while its agent is connected
/// and it owns guests: then nothing proves that they do not run on.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", responses((status = 200, body = Host)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(host): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(host);
    retry_conflicts(|| async {
        let found = asker.find::<HostRecord>(&api.parts, &reference).await?;
        let id = found.host.id;
        if found.is_removed {
            return Reply::ok(&shown(&api, &asker, &found));
        }
        let guard = crate::state::keys::room_guard(id);
        let guarded = api.parts.state.revision_of(guard.clone()).await?;
        let guests = api.parts.state.list::<GuestRecord>().await?;
        let owned = guests.iter().filter(|record| record.owner.owner == Owner::Host(id)).count();
        if owned > 0 && api.parts.hosts.get(id).is_some() {
            return Err(Failure::new(
                Code::WrongState,
                format!(
                    "the host is connected and owns {owned} guests: move them away, or stop its agent and them first"
                ),
            ));
        }
        let now = HostRecord { is_removed: true, ..found.value.clone() };
        let mut change = Change::new();
        change.update(&found, &now).guard(guard, guarded).event(
            EventDraft::new("host.removed")
                .host(id)
                .data(serde_json::json!({ "name": found.host.name, "guests_owned": owned })),
        );
        // Its name is free for the machine that comes after it.
        if let Some(key) = crate::state::Named::name_key(&found.value) {
            change.release(key);
        }
        let reply = Reply::ok(&shown(&api, &asker, &now))?;
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}
