//! Tokens.

use axum::{
    body::Bytes,
    extract::{Path, State},
    http::HeaderMap,
};
use supercloud_api::{
    Code, Page, Ref, Token, TokenCreate, TokenSecret, WhoAmI,
    ids::{ProjectId, TokenId},
    unix_ms,
};

use super::{Api, Asker, Failure, Reply, body};
use crate::{
    auth::{Reach, new_token},
    state::{Change, ProjectRecord, TokenRecord, retry_conflicts},
};

/// The longest life of a token that has an end: ten years.
const MAX_SECONDS: u64 = 10 * 365 * 86_400;

/// Who the token is.
#[utoipa::path(get, path = "/v1/whoami", tag = "tokens", responses((status = 200, body = WhoAmI)))]
pub async fn whoami(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    Reply::ok(&who(&api, &asker).await?)
}

pub(super) async fn who(api: &Api, asker: &Asker) -> Result<WhoAmI, Failure> {
    let token = asker.caller()?.token.clone();
    let project_name = match token.project {
        Some(project) => api.parts.state.read::<ProjectRecord>(&project).await?.map(|record| record.value.project.name),
        None => None,
    };
    Ok(WhoAmI { token, project_name })
}

/// Tokens without their secrets.
#[utoipa::path(get, path = "/v1/tokens", tag = "tokens", responses((status = 200, body = Page<Token>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let scope = asker.scope(&api.parts).await?;
    let keep = |record: &TokenRecord| scope.is_none() || record.token.project == scope;
    let (items, next_page) =
        api.parts.state.page::<TokenRecord>(asker.params.page()?.as_ref(), asker.params.limit()?, keep).await?;
    Reply::ok(&Page { items: items.into_iter().map(|record| record.value.token).collect(), next_page })
}

/// Makes a token. Its secret is shown this once.
#[utoipa::path(post, path = "/v1/tokens", tag = "tokens", request_body = TokenCreate, responses((status = 201, body = TokenSecret)))]
pub async fn create(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let wanted: TokenCreate = body(&headers, &bytes)?;
    let project: Option<ProjectId> = match wanted.project.as_str() {
        "*" if asker.caller()?.reach() == Reach::All => None,
        "*" => return Err(Failure::new(Code::Forbidden, "a token of one project makes no tokens for all")),
        _ => Some(asker.project(&api.parts, Some(&wanted.project)).await?.project.id),
    };
    let expires_at_ms = match wanted.expires_in_s {
        None => None,
        Some(seconds) if (1..=MAX_SECONDS).contains(&seconds) => Some(unix_ms().saturating_add(seconds * 1000)),
        Some(seconds) => {
            return Err(Failure::bad(format!("expires_in_s is {seconds}; it must be 1 to {MAX_SECONDS}")));
        }
    };
    let (record, secret) = new_token(wanted.name, project, None, wanted.role, expires_at_ms);
    let mut change = Change::new();
    record.store_in(&mut change);
    let location = format!("/v1/tokens/{}", record.token.id);
    let reply = Reply::created(location, &TokenSecret { token: record.token, secret })?.secret();
    asker.commit(&api.parts, project, change, reply).await
}

/// Deletes a token: it stops working at once.
#[utoipa::path(delete, path = "/v1/tokens/{token}", tag = "tokens", responses((status = 204)))]
pub async fn remove(State(api): State<Api>, asker: Asker, Path(token): Path<String>) -> Result<Reply, Failure> {
    let reference = Ref::from(token);
    if reference.as_str().parse::<TokenId>().is_err() {
        return Err(Failure::bad("a token is deleted by its id (tok-…); names of tokens are not unique"));
    }
    retry_conflicts(|| async {
        let found = asker.find::<TokenRecord>(&api.parts, &reference).await?;
        let mut change = Change::new();
        TokenRecord::remove_in(&found, &mut change);
        asker.commit(&api.parts, found.token.project, change, Reply::nothing()).await
    })
    .await
}
