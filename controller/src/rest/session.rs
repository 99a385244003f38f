//! Signing in to the dashboard, and out.

use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use supercloud_api::{Code, WhoAmI, unix_ms};

use super::{Api, Asker, Failure, Reply, tokens};
use crate::auth::{SESSION_MS, Session};

fn with_cookie(reply: Reply, cookie: Option<HeaderValue>) -> Result<Response, Failure> {
    let cookie = cookie.ok_or_else(|| Failure::new(Code::Internal, "the cookie cannot be written"))?;
    let mut response = reply.into_response();
    response.headers_mut().insert(header::SET_COOKIE, cookie);
    Ok(response)
}

/// Signs a browser in: with a token, for a cookie that is good for 12 hours and as long as the token is.
#[utoipa::path(post, path = "/v1/session", tag = "tokens", responses((status = 200, body = WhoAmI)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap) -> Result<Response, Failure> {
    if !headers.contains_key(header::AUTHORIZATION) {
        return Err(Failure::new(Code::Forbidden, "a session does not prolong itself: sign in with a token"));
    }
    let token = &asker.caller()?.token;
    let now_ms = unix_ms();
    let latest = now_ms.saturating_add(SESSION_MS);
    let ends_at_ms = token.expires_at_ms.map_or(latest, |at| at.min(latest));
    let session = Session { token: token.id, ends_at_ms };
    let who = tokens::who(&api, &asker).await?;
    with_cookie(Reply::ok(&who)?, session.cookie(&api.parts.keys.root, !api.parts.config.plain_http, now_ms))
}

/// Signs it out: the cookie is removed.
#[utoipa::path(delete, path = "/v1/session", tag = "tokens", responses((status = 204)))]
pub async fn remove(State(api): State<Api>) -> Result<Response, Failure> {
    with_cookie(Reply::nothing(), Session::no_cookie(!api.parts.config.plain_http))
}
