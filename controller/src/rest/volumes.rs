//! Volumes and freezes: both made and deleted with their guests.

use axum::{
    extract::{Path, State},
    http::StatusCode,
};
use supercloud_api::{Code, Freeze, Page, Ref, Site, Volume};

use super::{Api, Asker, Failure, Reply};
use crate::{operations::checks::Asked, sites};

/// Volumes.
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", responses((status = 200, body = Page<Volume>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |volume: &Volume| scope.is_none_or(|project| volume.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|volume| volume.value).collect(), next_page })
}

/// One volume.
#[utoipa::path(get, path = "/v1/volumes/{volume}", tag = "volumes", responses((status = 200, body = Volume)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

/// Where a volume lies: hosts that have blocks of it, stores that have what it stands on and what was kept of it.
#[utoipa::path(get, path = "/v1/volumes/{volume}/sites", tag = "volumes", responses((status = 200, body = Page<Site>)))]
pub async fn volume_sites(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    Reply::ok(&Page { items: sites::of_volume(&api.parts, &found).await?, next_page: None })
}

/// How fast a check reads when nothing is said, in bytes per second.
const CHECK_BYTES_PER_S: u64 = 20_000_000;

/// Has everything read that a volume stands on (its image, or the freeze that it came from) in its cloud's store, by the host that
/// holds the volume, at no more than `bytes_per_s`. What is missing or damaged there is mended from wherever else it can be
/// had. An event tells what was found: `volume.sound`, or `volume.damaged` with what is lost.
#[utoipa::path(post, path = "/v1/volumes/{volume}/check", tag = "volumes", responses((status = 202, body = Volume)))]
pub async fn check(State(api): State<Api>, asker: Asker, Path(volume): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Volume>(&api.parts, &Ref::from(volume)).await?;
    let bytes_per_s = asker.params.bytes_per_s.unwrap_or(CHECK_BYTES_PER_S);
    if bytes_per_s == 0 {
        return Err(Failure::new(Code::BadRequest, "bytes_per_s is 0: nothing would ever be read"));
    }
    let wrong = |why: String| Failure::new(Code::WrongState, why);
    let (Some(guest), Some(host)) = (found.guest, found.host) else {
        return Err(wrong(format!("no host holds volume {}: its guest was never started, or is frozen", found.name)));
    };
    if api.parts.hosts.get(host).is_none() {
        return Err(wrong(format!("the host that holds volume {} is not connected", found.name)));
    }
    if !api.parts.checks.takes(host) {
        return Err(wrong("the agent of the host that holds it is of a version that checks nothing".to_owned()));
    }
    if asker.params.dry_run {
        return Reply::ok(&found.value);
    }
    if !api.parts.checks.ask(found.id, Asked { host, guest, bytes_per_s }) {
        return Err(Failure::new(Code::TooManyRequests, "too many checks are under way"));
    }
    Reply::json(StatusCode::ACCEPTED, &found.value)
}

/// Freezes, also those that were consumed.
#[utoipa::path(get, path = "/v1/freezes", tag = "freezes", responses((status = 200, body = Page<Freeze>)))]
pub async fn list_freezes(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |freeze: &Freeze| scope.is_none_or(|project| freeze.project == project);
    let (items, next_page) = api.parts.state.page(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|freeze| freeze.value).collect(), next_page })
}

/// One freeze.
#[utoipa::path(get, path = "/v1/freezes/{freeze}", tag = "freezes", responses((status = 200, body = Freeze)))]
pub async fn read_freeze(State(api): State<Api>, asker: Asker, Path(freeze): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Freeze>(&api.parts, &Ref::from(freeze)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}
