//! What every handler knows of a request: who asks, by which parameters, and what they may see.

use std::time::Duration;

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts as RequestParts},
};
use serde::{Deserialize, de::DeserializeOwned};
use supercloud_api::{
    Code, Ref,
    ids::{Epoch, GuestId, HostId, ProjectId, RequestId},
};

use super::reply::{Failure, Reply, etag};
use crate::{
    app::Parts,
    auth::{Caller, DEFAULT_PROJECT, Reach},
    operations::not_owned,
    state::{Answer, Change, Context, IdempotencyClaim, Named, ProjectRecord, StateError, Stored},
};

/// Items of a page that does not say how many.
const DEFAULT_PAGE_ITEMS: usize = 100;
/// Most items of a page.
const MAX_PAGE_ITEMS: usize = 1000;
/// The longest wait of a request; the client's budget for one is 60 s.
const MAX_WAIT: Duration = Duration::from_secs(50);

/// The parameters of all routes; what a route does not use it ignores, what is not here is refused.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The project at hand, by name or id.
    pub project: Option<String>,
    /// Items of a page.
    pub limit: Option<usize>,
    /// Where the page starts.
    pub page: Option<String>,
    /// Give up what is lost by it.
    #[serde(default)]
    pub force: bool,
    /// How fast something may read, in bytes per second.
    pub bytes_per_s: Option<u64>,
    /// Only tell what would happen.
    #[serde(default)]
    pub dry_run: bool,
    /// How long to wait for the end of an operation.
    pub wait: Option<String>,
    /// Events after this number.
    pub after: Option<u64>,
    /// The newest so many events, and what follows.
    pub last: Option<u64>,
    /// An instant of the past, in milliseconds since 1970.
    pub as_of_ms: Option<u64>,
    /// The first block of a content that is asked for.
    pub from_block: Option<u32>,
    /// The first that is not any more.
    pub to_block: Option<u32>,
    /// Only the blocks' digests.
    #[serde(default)]
    pub digests: bool,
    /// Where an uploaded piece goes.
    pub offset: Option<u64>,
    /// How many bytes are asked about.
    pub bytes: Option<u64>,
    /// The market.
    pub market: Option<String>,
    /// A host or a cloud.
    pub place: Option<String>,
    /// Also say why.
    pub explain: Option<String>,
    /// A guest, by name or id.
    pub guest: Option<String>,
    /// A host, by name or id.
    pub host: Option<String>,
    /// A cloud, by name or id.
    pub cloud: Option<String>,
    /// From when, by the ledger's clock.
    pub from_ms: Option<u64>,
    /// Until when, by the ledger's clock.
    pub to_ms: Option<u64>,
    /// By which clock.
    pub clock: Option<supercloud_api::LedgerClock>,
    /// The newest first.
    #[serde(default)]
    pub newest: bool,
    /// Only what has not ended.
    #[serde(default)]
    pub active: bool,
    /// Only what is in this phase.
    pub phase: Option<supercloud_api::Phase>,
}

impl Params {
    /// Items of a page.
    ///
    /// # Errors
    /// When it is out of range.
    pub fn limit(&self) -> Result<usize, Failure> {
        match self.limit {
            None => Ok(DEFAULT_PAGE_ITEMS),
            Some(limit) if (1..=MAX_PAGE_ITEMS).contains(&limit) => Ok(limit),
            Some(limit) => Err(Failure::bad(format!("limit is {limit}; it must be 1 to {MAX_PAGE_ITEMS}"))),
        }
    }

    /// Where the page starts.
    ///
    /// # Errors
    /// When it is not what an earlier page gave.
    pub fn page<T: std::str::FromStr>(&self) -> Result<Option<T>, Failure> {
        let parse = |text: &String| text.parse().map_err(|_| Failure::bad("page is not one that a listing gave"));
        self.page.as_ref().map(parse).transpose()
    }

    /// Whether to say why: `explain`, `explain=true`.
    ///
    /// # Errors
    /// When it is neither true nor false.
    pub fn explain(&self) -> Result<bool, Failure> {
        match self.explain.as_deref() {
            None | Some("false") => Ok(false),
            Some("" | "true") => Ok(true),
            Some(_) => Err(Failure::bad("explain must be true or false")),
        }
    }

    /// How long to wait, at most 50 s: `30s`, `500ms`, `30`.
    ///
    /// # Errors
    /// When it is no time.
    pub fn wait(&self) -> Result<Option<Duration>, Failure> {
        let Some(text) = &self.wait else { return Ok(None) };
        let (number, unit_ms) = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
            (Some(number), _) => (number, 1),
            (None, Some(number)) => (number, 1000),
            (None, None) => (text.as_str(), 1000),
        };
        let count: u64 = number.parse().map_err(|_| Failure::bad("wait must be a time like 30s or 500ms"))?;
        Ok(Some(Duration::from_millis(count.saturating_mul(unit_ms)).min(MAX_WAIT)))
    }
}

/// Who asks, and how. Made by the gate, which has checked the role table already.
#[derive(Debug, Clone)]
pub struct Asker {
    /// The token; open routes have none.
    pub caller: Option<Caller>,
    /// The request.
    pub request_id: RequestId,
    /// Its parameters.
    pub params: Params,
    /// Where its answer is kept.
    pub idempotency: Option<IdempotencyClaim>,
    /// The host that asks for its guest, and the epoch at which it must own it.
    pub by: Option<(HostId, Epoch)>,
}

impl<S: Send + Sync> FromRequestParts<S> for Asker {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut RequestParts, _state: &S) -> Result<Self, Failure> {
        let asker = parts.extensions.get::<Asker>().cloned();
        asker.ok_or_else(|| Failure::new(Code::Internal, "the request did not pass the gate"))
    }
}

/// Parses a JSON body strictly; an empty one is `null`'s default where the type allows.
///
/// # Errors
/// What is wrong and where.
pub fn body<T: DeserializeOwned>(headers: &HeaderMap, bytes: &[u8]) -> Result<T, Failure> {
    let kind = headers.get(header::CONTENT_TYPE).map(|value| value.to_str().unwrap_or_default());
    let is_json = kind.is_none_or(|kind| {
        kind.split(';').next().is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
    });
    if !is_json {
        return Err(Failure::bad("the body must be application/json"));
    }
    let bytes = if bytes.trim_ascii().is_empty() { b"{}" } else { bytes };
    serde_json::from_slice(bytes).map_err(|error| Failure::bad(format!("the body: {error}")))
}

impl Asker {
    /// Who asks.
    ///
    /// # Errors
    /// On an open route without a token.
    pub fn caller(&self) -> Result<&Caller, Failure> {
        self.caller.as_ref().ok_or_else(|| Failure::new(Code::Unauthenticated, "this needs a token"))
    }

    /// For a change in a project.
    #[must_use]
    pub fn context(&self, project: impl Into<Option<ProjectId>>) -> Context {
        let actor = self.caller.as_ref().map_or_else(|| "nobody".to_owned(), Caller::actor);
        Context { actor, request_id: self.request_id, project: project.into(), idempotency: self.idempotency.clone() }
    }

    /// The project in which something is made: that of the body, of `?project=`, of the token, or `default`.
    ///
    /// # Errors
    /// When there is no such project, or the caller cannot see it.
    pub async fn project(&self, parts: &Parts, body: Option<&Ref>) -> Result<Stored<ProjectRecord>, Failure> {
        let caller = self.caller()?;
        let wanted = match (body, &self.params.project, caller.token.project) {
            (Some(reference), ..) => reference.clone(),
            (None, Some(reference), _) => Ref::from(reference),
            (None, None, Some(project)) => Ref::from(project.to_string()),
            (None, None, None) => Ref::from(DEFAULT_PROJECT),
        };
        match parts.state.find::<ProjectRecord>(None, &wanted).await? {
            Some(found) if caller.sees_project(Some(found.project.id)) => Ok(found),
            _ => Err(Failure::not_found("project", wanted.as_str())),
        }
    }

    /// The projects of a listing: one, or all (`None`).
    ///
    /// # Errors
    /// When there is no such project, or the caller cannot see it.
    pub async fn scope(&self, parts: &Parts) -> Result<Option<ProjectId>, Failure> {
        match (&self.params.project, self.caller()?.reach()) {
            (None, Reach::All) => Ok(None),
            (None, Reach::Project(project) | Reach::Guest(project, _)) => Ok(Some(project)),
            (Some(_), _) => Ok(Some(self.project(parts, None).await?.project.id)),
        }
    }

    /// What a reference in the path or body means, if the caller can see it.
    ///
    /// # Errors
    /// `404` when there is no such thing, or the caller cannot see it.
    pub async fn find<T: Named>(&self, parts: &Parts, reference: &Ref) -> Result<Stored<T>, Failure> {
        let caller = self.caller()?;
        let project = match self.params.project {
            // An id needs no project at hand; a wrong one is an error all the same.
            Some(_) => Some(self.project(parts, None).await?.project.id),
            None => match caller.reach() {
                Reach::Project(project) | Reach::Guest(project, _) => Some(project),
                Reach::All if T::IS_PER_PROJECT && reference.as_str().parse::<T::Id>().is_err() => {
                    let default = parts.state.find::<ProjectRecord>(None, &Ref::from(DEFAULT_PROJECT)).await?;
                    default.map(|found| found.project.id)
                }
                Reach::All => None,
            },
        };
        let found = parts.state.find::<T>(project, reference).await?;
        let visible = found.filter(|found| match T::KIND {
            Some("cloud" | "host") => true,
            _ => caller.sees_project(found.value.project()),
        });
        visible.ok_or_else(|| Failure::not_found(T::NOUN, reference.as_str()))
    }

    /// A guest: also for its own token.
    ///
    /// # Errors
    /// `404` when there is no such guest, or the caller cannot see it.
    pub async fn find_guest(
        &self,
        parts: &Parts,
        reference: &Ref,
    ) -> Result<Stored<crate::state::GuestRecord>, Failure> {
        let caller = self.caller()?;
        let Reach::Guest(project, own) = caller.reach() else { return self.find(parts, reference).await };
        let found = parts.state.find::<crate::state::GuestRecord>(Some(project), reference).await?;
        let visible = found.filter(|found| found.guest.id == own && caller.sees_guest(found.guest.project, own));
        let visible = visible.ok_or_else(|| Failure::not_found("guest", reference.as_str()))?;
        match self.by {
            // Checked at what the change compares: a host that lost the guest meanwhile does nothing with it.
            Some((host, epoch)) if !visible.owner.is_owned_by(host, epoch) => Err(Failure::from(not_owned())),
            _ => Ok(visible),
        }
    }

    /// Whether an operation can be seen.
    #[must_use]
    pub fn sees_operation(&self, project: Option<ProjectId>, guest: Option<GuestId>) -> bool {
        self.caller.as_ref().is_some_and(|caller| match (caller.reach(), project, guest) {
            (Reach::Guest(..), Some(project), Some(guest)) => caller.sees_guest(project, guest),
            (Reach::Guest(..), ..) => false,
            _ => caller.sees_project(project),
        })
    }

    /// Makes a change and gives the answer, which is kept with it when the request has an idempotency key. Of a dry run the answer
    /// alone: all that could refuse it was asked, and nothing is stored.
    ///
    /// # Errors
    /// Conflicts and store errors.
    pub async fn commit(
        &self,
        parts: &Parts,
        project: impl Into<Option<ProjectId>>,
        mut change: Change,
        reply: Reply,
    ) -> Result<Reply, Failure> {
        if self.params.dry_run {
            return Ok(reply.tried());
        }
        let context = self.context(project);
        if let Some(claim) = &context.idempotency {
            let body = reply.body.clone().unwrap_or_default();
            let body = if reply.is_secret {
                hex::encode(parts.keys.root.seal(claim.key.as_str(), body.as_bytes()))
            } else {
                body
            };
            change.answer(Answer {
                status: reply.status.as_u16(),
                location: reply.location.clone(),
                body,
                is_sealed: reply.is_secret,
            });
        }
        match parts.state.commit(&context, change).await {
            Ok(_) => Ok(reply),
            // The same request at the same time: its answer is this one's.
            Err(StateError::AlreadyAnswered) => match &context.idempotency {
                Some(claim) => match super::idempotency::kept_answer(parts, claim).await? {
                    Some(reply) => Ok(reply),
                    None => Err(StateError::AlreadyAnswered.into()),
                },
                None => Err(StateError::AlreadyAnswered.into()),
            },
            Err(error) => Err(error.into()),
        }
    }
}

/// Checks `If-Match` against the revision of what was read.
///
/// # Errors
/// `412` when it does not match.
pub fn check_if_match(headers: &HeaderMap, revision: u64) -> Result<(), Failure> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(()) };
    let wanted = value.to_str().map_err(|_| Failure::bad("If-Match is malformed"))?;
    let now = etag(revision);
    if wanted.split(',').map(str::trim).any(|tag| tag == "*" || tag == now) {
        return Ok(());
    }
    Err(Failure::new(Code::PreconditionFailed, format!("it is at ETag {now} now; read it again")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_times_and_capped() {
        let wait = |text: &str| Params { wait: Some(text.into()), ..Params::default() }.wait();
        assert_eq!(wait("30s").unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(wait("250ms").unwrap(), Some(Duration::from_millis(250)));
        assert_eq!(wait("2").unwrap(), Some(Duration::from_secs(2)));
        assert_eq!(wait("18446744073709551615s").unwrap(), Some(MAX_WAIT));
        for bad in ["", "s", "-1s", "1.5s", "1h", "99999999999999999999s"] {
            assert!(wait(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn if_match_takes_the_revision_or_a_star() {
        let check = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::IF_MATCH, value.parse().unwrap());
            check_if_match(&headers, 7).is_ok()
        };
        assert!(check_if_match(&HeaderMap::new(), 7).is_ok());
        assert!(check("\"7\"") && check("*") && check("\"6\", \"7\""));
        assert!(!check("\"6\"") && !check("7"));
    }
}
