//! Volumes and freezes: both made and deleted with their guests, so read-only here.

use axum::extract::{Path, State};
use supercloud_api::{Freeze, Page, Ref, Volume};

use super::{Api, Asker, Failure, Reply};

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
