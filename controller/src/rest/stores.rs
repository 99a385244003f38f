//! Chunk stores, and their sweeps.

use axum::{
    extract::{Path, State},
    http::StatusCode,
};
use supercloud_api::{ChunkStore, Cloud, Code, Page, Ref};

use super::{Api, Asker, Failure, Reply};
use crate::{
    operations::sweeps::{StoreCount, StoreOf},
    state::HostRecord,
};

/// The name of the controller's own store.
const OWN: &str = "controller";

fn shown(cloud: Option<&Cloud>, count: Option<&StoreCount>) -> ChunkStore {
    ChunkStore {
        name: cloud.map_or_else(|| OWN.to_owned(), |cloud| cloud.name.to_string()),
        cloud: cloud.map(|cloud| cloud.id),
        bytes: count.filter(|count| !count.bytes.is_empty()).map(|count| count.bytes.values().sum()),
        freed_bytes: count.map_or(0, |count| count.freed_bytes),
        failed_sweeps: count.map_or(0, |count| count.failures),
    }
}

/// All chunk stores, the controller's own first.
#[utoipa::path(get, path = "/v1/stores", tag = "clouds", responses((status = 200, body = Page<ChunkStore>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let after = asker.params.page()?;
    let counts = api.parts.sweeps.counts();
    let (clouds, next_page) = api.parts.state.page::<Cloud>(after.as_ref(), asker.params.limit()?, |_| true).await?;
    let mut items = Vec::with_capacity(clouds.len() + 1);
    if after.is_none() {
        items.push(shown(None, counts.get(&StoreOf::Controller)));
    }
    items.extend(clouds.iter().map(|cloud| shown(Some(cloud), counts.get(&StoreOf::Cloud(cloud.id)))));
    Reply::ok(&Page { items, next_page })
}

/// Has a store swept now: what no image, volume or freeze names any more is removed. Events tell what was.
#[utoipa::path(post, path = "/v1/stores/{store}/sweep", tag = "clouds", responses((status = 202, body = ChunkStore)))]
pub async fn sweep(State(api): State<Api>, asker: Asker, Path(store): Path<String>) -> Result<Reply, Failure> {
    let (of, cloud) = if store == OWN {
        (StoreOf::Controller, None)
    } else {
        let cloud = asker.find::<Cloud>(&api.parts, &Ref::from(store)).await?;
        let hosts = api.parts.state.list::<HostRecord>().await?;
        let is_there = |host: &HostRecord| {
            let id = host.host.id;
            host.host.cloud == cloud.id && api.parts.hosts.get(id).is_some() && api.parts.sweeps.takes_orders(id)
        };
        if !hosts.iter().any(|host| is_there(host)) {
            let why = format!("no host of cloud {} that sweeps its store is connected", cloud.name);
            return Err(Failure::new(Code::WrongState, why));
        }
        (StoreOf::Cloud(cloud.id), Some(cloud.value))
    };
    api.parts.sweeps.ask(of);
    Reply::json(StatusCode::ACCEPTED, &shown(cloud.as_ref(), api.parts.sweeps.counts().get(&of)))
}
