//! Reading and changing guests.

use std::time::{Duration, Instant};

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Guest, GuestPatch, Name, Page, Ref, Volume, handover::Owner};

use super::{Api, Asker, Failure, Reply, body, check_if_match, guest_plan};
use crate::{
    admission::Request,
    app::Parts,
    state::{Change, EventDraft, GuestRecord, HostRecord, retry_conflicts},
};

/// A guest as it is shown: with what only its host knows, or that its host is away.
async fn shown(parts: &Parts, record: &GuestRecord) -> Result<Guest, Failure> {
    let mut guest = record.guest.clone();
    if let Owner::Host(host) = record.owner.owner {
        if let Some(silent) = parts.hosts.away_for(host, Instant::now()) {
            let away = parts.state.read::<HostRecord>(&host).await?.and_then(|record| away(&record.host.name, silent));
            guest.alarm = match (guest.alarm, away) {
                (Some(before), Some(away)) => Some(format!("{away}; before that: {before}")),
                (before, away) => away.or(before),
            };
        }
        let told = parts.hosts.base_missing_bytes(host, guest.id, record.owner.epoch);
        // What was durable before a restart of the controller holds; else only the host knows.
        guest.base_missing_bytes = match told {
            None => is_base_here(parts, &guest).await?.then_some(0),
            told => told,
        };
    }
    Ok(guest)
}

/// How long a host's link may be down before its guests' owners are told: agents dial again within seconds.
const AWAY_PATIENCE: Duration = Duration::from_secs(10);
/// And before they are told what can be done: a machine that starts anew is back by then.
const GONE_PATIENCE: Duration = Duration::from_secs(600);

/// What is to be said of a guest whose host has had no link to the controller for so long.
fn away(name: &Name, silent: Duration) -> Option<String> {
    let advice = match silent >= GONE_PATIENCE {
        false => String::new(),
        true => format!(
            "; what it has written is on the disk of {name} alone: only if that is gone for good, `supercloud host remove {name} \
             --force` gives it up, and the guest can start elsewhere from its image"
        ),
    };
    let seconds = silent.as_secs();
    (silent >= AWAY_PATIENCE)
        .then(|| format!("its host {name} has been away for {seconds} s: whether the guest runs is not known{advice}"))
}

/// Whether all that the guest's volumes stand on is known to be in its own cloud.
async fn is_base_here(parts: &Parts, guest: &Guest) -> Result<bool, Failure> {
    for id in &guest.volumes {
        let volume = parts.state.need::<Volume>(id).await?;
        if volume.base.is_some() && (volume.base_cloud.is_none() || volume.base_cloud != guest.cloud) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Guests.
#[utoipa::path(get, path = "/v1/guests", tag = "guests", responses((status = 200, body = Page<Guest>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |record: &GuestRecord| scope.is_none_or(|project| record.guest.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    let mut guests = Vec::with_capacity(items.len());
    for record in &items {
        guests.push(shown(&api.parts, record).await?);
    }
    Reply::ok(&Page { items: guests, next_page })
}

/// One guest.
#[utoipa::path(get, path = "/v1/guests/{guest}", tag = "guests", responses((status = 200, body = Guest)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    Ok(Reply::ok(&shown(&api.parts, &found).await?)?.at(found.revision))
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
        now.guest.on_loss = wanted.on_loss.unwrap_or(now.guest.on_loss);
        if now == found.value {
            return Ok(Reply::ok(&shown(&api.parts, &found).await?)?.at(found.revision));
        }
        let mut change = Change::new();
        change.update(&found, &now).event(
            EventDraft::new("guest.changed")
                .project(now.guest.project)
                .guest(now.guest.id)
                .data(serde_json::json!({ "follow_prices": now.guest.follow_prices, "on_loss": now.guest.on_loss })),
        );
        asker.commit(&api.parts, now.guest.project, change, Reply::ok(&shown(&api.parts, &now).await?)?).await
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_told_that_a_host_is_away_is_not_sent_into_losing_its_disks() {
        let name: Name = "h1".parse().unwrap();
        assert_eq!(away(&name, Duration::from_secs(9)), None);
        let soon = away(&name, Duration::from_secs(11)).unwrap();
        assert!(soon.contains("h1 has been away for 11 s") && !soon.contains("remove"), "{soon}");
        let late = away(&name, Duration::from_secs(601)).unwrap();
        assert!(late.contains("on the disk of h1 alone") && late.contains("--force"), "{late}");
    }
}
