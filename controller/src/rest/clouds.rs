//! Clouds.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{Cloud, CloudCreate, Page, Ref, ids::CloudId, unix_ms};

use super::{Api, Asker, Failure, Reply, body};
use crate::state::{Change, EventDraft, Named as _, retry_conflicts};

/// Clouds in which nothing is rented: their hosts join by themselves.
const WITHOUT_RENTING: [&str; 2] = ["static", "lab"];

/// All clouds.
#[utoipa::path(get, path = "/v1/clouds", tag = "clouds", responses((status = 200, body = Page<Cloud>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let (items, next_page) =
        api.parts.state.page::<Cloud>(asker.params.page()?.as_ref(), asker.params.limit()?, |_| true).await?;
    Reply::ok(&Page { items: items.into_iter().map(|cloud| cloud.value).collect(), next_page })
}

/// One cloud.
#[utoipa::path(get, path = "/v1/clouds/{cloud}", tag = "clouds", responses((status = 200, body = Cloud)))]
pub async fn read(State(api): State<Api>, asker: Asker, Path(cloud): Path<String>) -> Result<Reply, Failure> {
    let found = asker.find::<Cloud>(&api.parts, &Ref::from(cloud)).await?;
    Ok(Reply::ok(&found.value)?.at(found.revision))
}

/// Makes a cloud known.
#[utoipa::path(post, path = "/v1/clouds", tag = "clouds", request_body = CloudCreate, responses((status = 201, body = Cloud)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: CloudCreate = body(&headers, &bytes)?;
    let provider = wanted.provider.as_str();
    if !WITHOUT_RENTING.contains(&provider) && api.parts.providers.get(provider).is_none() {
        let known: Vec<&str> =
            WITHOUT_RENTING.into_iter().chain(api.parts.providers.iter().map(|(name, _)| name)).collect();
        let known = known.join(", ");
        return Err(Failure::bad(format!("provider: this controller has no such provider; it has: {known}")));
    }
    let cloud =
        Cloud { id: CloudId::generate(), name: wanted.name, provider: wanted.provider, created_at_ms: unix_ms() };
    retry_conflicts(|| async {
        if api.parts.state.find::<Cloud>(None, &Ref::from(cloud.name.as_str())).await?.is_some() {
            return Err(Failure::name_taken(Cloud::NOUN, &cloud.name));
        }
        let mut change = Change::new();
        change
            .create_named(&cloud)
            .event(EventDraft::new("cloud.created").data(serde_json::json!({ "cloud": cloud.id, "name": cloud.name })));
        let reply = Reply::created(format!("/v1/clouds/{}", cloud.id), &cloud)?;
        asker.commit(&api.parts, None, change, reply).await
    })
    .await
}
