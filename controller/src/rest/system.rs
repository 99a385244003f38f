//! Health, metrics, the OpenAPI document, markets.

use axum::{
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use supercloud_api::{Code, FeedClock, Market, Page, PriceSeries, unix_ms};
use utoipa::ToSchema;

use super::{Api, Asker, Failure, Reply, body, openapi};
use crate::auth::Reach;

/// How the controller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    pub status: &'static str,
    /// The controller's version.
    pub version: &'static str,
}

const OK: Health = Health { status: "ok", version: env!("CARGO_PKG_VERSION") };

/// Whether the process lives.
#[utoipa::path(get, path = "/healthz", tag = "system", responses((status = 200, body = Health)))]
pub async fn healthz() -> Result<Reply, Failure> {
    Reply::ok(&OK)
}

/// Whether it can serve: its store answers.
#[utoipa::path(get, path = "/readyz", tag = "system", responses((status = 200, body = Health)))]
pub async fn readyz(State(api): State<Api>) -> Result<Reply, Failure> {
    if api.parts.stop.is_cancelled() {
        return Err(Failure::new(Code::StoreUnavailable, "the controller is shutting down"));
    }
    match api.parts.state.health().await {
        Ok(_) => Reply::ok(&OK),
        Err(_) => Err(Failure::new(Code::StoreUnavailable, "the store does not answer")),
    }
}

/// Everything for Prometheus, in its text format.
#[utoipa::path(get, path = "/metrics", tag = "system", responses((status = 200, content_type = "text/plain", body = String)))]
pub async fn metrics(State(api): State<Api>) -> Result<Response, Failure> {
    let text = api.metrics.render(&api.parts).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// This document.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "system", responses((status = 200, content_type = "application/json", body = serde_json::Value)))]
pub async fn openapi_document() -> Response {
    (StatusCode::OK, [(header::CONTENT_TYPE, "application/json")], openapi::document_text()).into_response()
}

/// All markets with their prices now.
#[utoipa::path(get, path = "/v1/markets", tag = "markets", responses((status = 200, body = Page<Market>)))]
pub async fn markets(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let limit = asker.params.limit()?;
    let after: Option<String> = asker.params.page()?;
    let mut items = api.parts.markets.board().markets();
    items.sort_by(|a, b| a.name.cmp(&b.name));
    items.retain(|market| after.as_ref().is_none_or(|after| market.name > *after));
    let next_page = if items.len() > limit { items.get(limit - 1).map(|last| last.name.clone()) } else { None };
    items.truncate(limit);
    // What the fleet rents is no business of members of one project.
    if asker.caller.as_ref().is_some_and(|caller| caller.reach() == Reach::All) {
        api.seen_markets.note(&api.parts.state, &mut items, unix_ms()).await?;
    }
    Reply::ok(&Page { items, next_page })
}

/// The prices of a market up to now.
#[utoipa::path(get, path = "/v1/prices", tag = "markets", params(("market" = String, Query, description = "The market's name")), responses((status = 200, body = PriceSeries)))]
pub async fn prices(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let name = asker.params.market.as_ref().ok_or_else(|| Failure::bad("say which market: ?market=<name>"))?;
    let series = api.parts.markets.board().prices(name).ok_or_else(|| Failure::not_found("market", name))?;
    Reply::ok(&series)
}

/// Sets the clock of a replayed price feed. The answer is the clock as it is now.
#[utoipa::path(post, path = "/v1/feed", tag = "markets", request_body = FeedClock, responses((status = 200, body = FeedClock)))]
pub async fn set_feed_clock(State(api): State<Api>, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let clock: FeedClock = body(&headers, &bytes)?;
    let now = api.parts.markets.board().set_clock(clock)?;
    // Durable from here on: a restarted controller does not let the feed go back behind it.
    api.parts.clerk.pass().await?;
    Reply::ok(&now)
}
