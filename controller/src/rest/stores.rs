//! Chunk stores, and their sweeps.

use axum::{
    extract::{Path, State},
    http::StatusCode,
};
use supercloud_api::{ChunkStore, Cloud, Code, Page, Ref, unix_ms};

use super::{Api, Asker, Failure, Reply};
use crate::{
    operations::sweeps::{StoreCount, StoreOf},
    state::{AcceptedMark, Change, EventDraft, HostRecord, Record as _},
};

/// A transaction holds no more.
const ACCEPTED_AT_ONCE: usize = 64;
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

/// An operator says that these records count, though hosts were told of events that are not in them.
async fn accept_records(api: &Api, asker: &Asker) -> Result<(), Failure> {
    let mut change = Change::new();
    let mut accepted = Vec::new();
    for mark in api.parts.sweeps.take_foreign() {
        let mark = AcceptedMark { seq: mark.seq, hash: mark.hash, accepted_at_ms: unix_ms() };
        if api.parts.state.read::<AcceptedMark>(&mark.id()).await?.is_none() && accepted.len() < ACCEPTED_AT_ONCE {
            change.create(&mark);
            accepted.push(mark.seq);
        }
    }
    if !accepted.is_empty() {
        change.event(EventDraft::new("store.records_accepted").data(serde_json::json!({ "events": accepted })));
        api.parts.state.commit(&asker.context(None), change).await?;
    }
    Ok(())
}

/// Has a store swept now: what no image, volume or freeze names any more is removed. Events tell what was. With `force` also
/// when hosts of the store were told of events that are not in this controller's history (its records were brought back from
/// a backup): those of which it has been told since its start do not count from then on.
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
    if asker.params.dry_run {
        return Reply::ok(&shown(cloud.as_ref(), api.parts.sweeps.counts().get(&of)));
    }
    if asker.params.force {
        accept_records(&api, &asker).await?;
    }
    api.parts.sweeps.ask(of);
    Reply::json(StatusCode::ACCEPTED, &shown(cloud.as_ref(), api.parts.sweeps.counts().get(&of)))
}
