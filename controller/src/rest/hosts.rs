//! Hosts.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Freeze, Host, HostPatch, Page, Ref, Volume, VolumeHistory, handover::Owner, link::Announced,
};

use super::{Api, Asker, Failure, Reply, body, check_if_match};
use crate::{
    auth::Reach,
    notices,
    state::{Change, EventDraft, GuestRecord, HostRecord, Stored, retry_conflicts},
};

/// What members of one project need not know of the machines below.
fn shown(api: &Api, asker: &Asker, record: &HostRecord) -> Host {
    let mut host = record.view(&api.parts.hosts);
    if asker.caller.as_ref().is_none_or(|caller| caller.reach() != Reach::All) {
        host.data_address = None;
        host.overlay_address = None;
        host.overlay_encryption = None;
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

/// Changes a host: cordons or uncordons it. Uncordoning withdraws what its provider had announced for it.
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
        if wanted.cordoned == Some(false)
            && let Some(notice) = now.host.notice.take()
        {
            // Else its guests would leave all the same. What is announced anew counts.
            now.withdrawn = Some(Announced { kind: notice.kind, at_ms: notice.at_ms });
        }
        if now == found.value {
            return Ok(Reply::ok(&shown(&api, &asker, &found))?.at(found.revision));
        }
        let mut change = Change::new();
        let kind = if now.is_cordoned { "host.cordoned" } else { "host.uncordoned" };
        change.update(&found, &now).event(EventDraft::new(kind).host(now.host.id));
        if found.host.notice.is_some() && now.host.notice.is_none() {
            notices::stop_leaving(&api.parts.state, now.host.id, &mut change).await?;
        }
        let reply = Reply::ok(&shown(&api, &asker, &now))?;
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}

/// What only this host has, as sentences: blocks and volumes of guests that it does not run, and the last way into its cloud's store.
async fn only_here(api: &Api, host: &Host, guests: &[Stored<GuestRecord>]) -> Result<Vec<String>, Failure> {
    let mut found = Vec::new();
    for record in guests {
        if record.owner.owner == Owner::Host(host.id) {
            found.push(format!("what guest {} has written to its disk", record.guest.name));
        } else if record.owner.holders.iter().any(|holder| holder.host == host.id && holder.needed && !holder.lost) {
            found.push(format!("disk blocks of guest {}", record.guest.name));
        }
    }
    let others = api.parts.state.list::<HostRecord>().await?;
    if others.iter().any(|other| other.host.cloud == host.cloud && other.host.id != host.id && !other.is_removed) {
        return Ok(found);
    }
    for freeze in api.parts.state.list::<Freeze>().await?.iter().filter(|freeze| !freeze.is_consumed) {
        if freeze.cloud == host.cloud {
            found.push(format!("the way to freeze {} of guest {}", freeze.id, freeze.guest));
        }
    }
    for volume in api.parts.state.list::<Volume>().await? {
        if volume.base_cloud == Some(host.cloud) && volume.host.is_none_or(|at| at != host.id) {
            found.push(format!("the way to what volume {} was thawed from", volume.name));
        }
    }
    for history in api.parts.state.list::<VolumeHistory>().await? {
        let points = history.points.iter().filter(|point| point.cloud == host.cloud).count();
        if points > 0 {
            found.push(format!("the way to {points} points of the history of volume {}", history.volume));
        }
    }
    Ok(found)
}

/// Adds to a change that a host is removed: its certificate is denied at once, and what it ran alone is declared lost. Refused while
/// its agent is connected and it owns guests, and unless `force` is set while others need what only it has.
pub(super) async fn removal(
    api: &Api,
    found: &Stored<HostRecord>,
    force: bool,
    change: &mut Change,
) -> Result<HostRecord, Failure> {
    let id = found.host.id;
    let guard = crate::state::keys::room_guard(id);
    let guarded = api.parts.state.revision_of(guard.clone()).await?;
    let guests = api.parts.state.list::<GuestRecord>().await?;
    let owned = guests.iter().filter(|record| record.owner.owner == Owner::Host(id)).count();
    if owned > 0 && api.parts.hosts.get(id).is_some() {
        return Err(Failure::new(
            Code::WrongState,
            format!("the host is connected and owns {owned} guests: move them away, or stop its agent and them first"),
        ));
    }
    let needed = only_here(api, &found.host, &guests).await?;
    if !needed.is_empty() && !force {
        const SHOWN: usize = 5;
        let more = needed.len().saturating_sub(SHOWN);
        let mut list = needed.into_iter().take(SHOWN).collect::<Vec<_>>().join(", ");
        if more > 0 {
            list.push_str(&format!(" and {more} more"));
        }
        return Err(Failure::new(
            Code::WrongState,
            format!(
                "only this host has: {list}. Wait until it is back or until moves have finished, start or thaw those guests \
                 elsewhere, or, if this host does not run any more and will not, give all this up with ?force=true: such guests then \
                 start from their images, some of them by themselves (mirrors, on_loss)"
            ),
        ));
    }
    let now = HostRecord { is_removed: true, ..found.value.clone() };
    crate::ledger::host_removed(&api.parts.state, id, change).await?;
    change.update(found, &now).guard(guard, guarded).event(
        EventDraft::new("host.removed")
            .host(id)
            .data(serde_json::json!({ "name": found.host.name, "guests_owned": owned, "given_up": needed })),
    );
    // Its name is free for the machine that comes after it.
    if let Some(key) = crate::state::Named::name_key(&found.value) {
        change.release(key);
    }
    Ok(now)
}

/// Removes a host: its certificate is denied at once, and what it ran alone is declared lost. Refused while its agent is connected
/// and it owns guests: then nothing proves that they do not run on. Refused, unless `?force=true`, while other guests need what only
/// this host has. With `force` you say that the machine does not run any more: standbys of mirrors take over, and guests whose
/// `on_loss` says so start elsewhere, at once. A rented one is given back instead: `POST /v1/rentings/{renting}/return`.
#[utoipa::path(delete, path = "/v1/hosts/{host}", tag = "hosts", responses((status = 200, body = Host)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(host): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(host);
    retry_conflicts(|| async {
        let found = asker.find::<HostRecord>(&api.parts, &reference).await?;
        if found.is_removed {
            return Reply::ok(&shown(&api, &asker, &found));
        }
        let mut change = Change::new();
        let now = removal(&api, &found, asker.params.force, &mut change).await?;
        let reply = Reply::ok(&shown(&api, &asker, &now))?;
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}
