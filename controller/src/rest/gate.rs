//! What every request passes, in this order: a number, its route, its token, the role table, its body's size, its idempotency
//! key; then the handler under a deadline; then one form for every error, and the counts.

use std::{
    net::{IpAddr, SocketAddr},
    panic::AssertUnwindSafe,
    sync::Arc,
    time::Duration,
};

use axum::{
    body::{Body, Bytes, to_bytes},
    extract::{ConnectInfo, MatchedPath, Query, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::FutureExt as _;
use supercloud_api::{Code, Problem, ids::RequestId, unix_ms};
use tokio::{sync::Semaphore, time::Instant};

use super::{
    asker::{Asker, Params},
    idempotency::{self, Claim},
    reply::{Failure, Reply, problem_response},
    shares::{Shares, neighbourhood},
    squeeze,
};
use crate::{
    app::Parts,
    auth::{Access, CSRF_HEADER, Caller, ROUTES, Route, Session, find_route, token_of_id, token_of_secret},
    metrics::Metrics,
};

/// Largest JSON body, in bytes.
pub const MAX_JSON_BYTES: usize = 1 << 20;
/// Largest piece of an upload, in bytes.
pub const MAX_PIECE_BYTES: usize = 8 << 20;
/// How long a body may take to arrive.
const BODY_BUDGET: Duration = Duration::from_secs(45);
/// How long a handler may take, long polls included.
const HANDLER_BUDGET: Duration = Duration::from_secs(58);
/// Requests that are worked on at once; more are sent away.
const REQUESTS_AT_ONCE: usize = 1024;
/// Of these, those of one token: long polls and slow bodies of one keep nobody else out.
const REQUESTS_OF_ONE: usize = 128;
/// Requests with a body but without a token (agents that join) at once: strangers cannot hold more.
const STRANGERS_AT_ONCE: usize = 32;
/// Of these, those from one address.
const STRANGERS_OF_ONE: usize = 8;
/// How long a stranger's body may take to arrive: it is small.
const STRANGER_BODY_BUDGET: Duration = Duration::from_secs(10);
/// Bodies of uploads that are held in memory at once.
const UPLOADS_AT_ONCE: usize = 8;
/// Of these, those of one token.
const UPLOADS_OF_ONE: usize = 2;
/// How long an upload may wait for its place.
const UPLOAD_WAIT_BUDGET: Duration = Duration::from_secs(10);

static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// What the gate needs.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The controller's parts.
    pub parts: Parts,
    /// Where requests are counted.
    pub metrics: Metrics,
    requests: Arc<Semaphore>,
    shares: Shares,
    strangers: Arc<Semaphore>,
    stranger_shares: Shares<IpAddr>,
    uploads: Arc<Semaphore>,
    upload_shares: Shares,
}

impl Gate {
    /// A gate.
    #[must_use]
    pub fn new(parts: Parts, metrics: Metrics) -> Self {
        Self {
            parts,
            metrics,
            requests: Arc::new(Semaphore::new(REQUESTS_AT_ONCE)),
            shares: Shares::default(),
            strangers: Arc::new(Semaphore::new(STRANGERS_AT_ONCE)),
            stranger_shares: Shares::default(),
            uploads: Arc::new(Semaphore::new(UPLOADS_AT_ONCE)),
            upload_shares: Shares::default(),
        }
    }
}

/// The middleware.
pub async fn gate(State(gate): State<Gate>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let request_id = RequestId::generate();
    let method = request.method().clone();
    let takes_gzip = squeeze::is_asked_for(&method, request.headers());
    let path = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let response = match pass(&gate, request_id, path.as_deref(), request, next).await {
        Ok(response) => response,
        Err(failure) => failure.into_response(),
    };
    let response = finish(response, request_id);
    let response = if takes_gzip { squeeze::squeeze(response).await } else { response };
    let took = began.elapsed();
    let status = response.status();
    gate.metrics.observe_request(&method, path.as_deref(), status, took);
    tracing::debug!(%request_id, %method, path = path.as_deref().unwrap_or("-"), status = status.as_u16(), ?took, "answered");
    response
}

async fn pass(
    gate: &Gate,
    request_id: RequestId,
    path: Option<&str>,
    request: Request,
    next: Next,
) -> Result<Response, Failure> {
    let busy = || Failure::new(Code::TooManyRequests, "the controller is busy; try again in a second");
    let _place = gate.requests.try_acquire().map_err(|_| busy())?;
    let (route, path) = match (path, request.method()) {
        (Some(path), &Method::HEAD) => (find_route(&Method::GET, path), path),
        (Some(path), method) => (find_route(method, path), path),
        (None, _) => return Err(Failure::new(Code::NotFound, "there is no such path; see /v1/openapi.json")),
    };
    let Some(route) = route else { return Ok(method_not_allowed(path)) };
    let (mut head, body) = request.into_parts();
    let caller = authenticate(&gate.parts, route, &head.headers).await?;
    let _share = match &caller {
        Some(caller) => Some(gate.shares.take(&caller.token, REQUESTS_OF_ONE).ok_or_else(|| {
            Failure::new(
                Code::TooManyRequests,
                "too many requests of this token are open at once; try again in a second",
            )
        })?),
        None => None,
    };
    let Query(params) = Query::<Params>::try_from_uri(&head.uri)
        .map_err(|error| Failure::bad(format!("the query: {}", crate::chain(&error))))?;
    if params.dry_run && route.method != Method::GET && !route.is_triable() {
        // Not done in earnest because nobody knew how to try it.
        return Err(Failure::bad("this cannot be tried: leave dry_run out"));
    }
    let _stranger = match (&caller, route.method == Method::GET) {
        (None, false) => {
            // One that opens many and says nothing keeps out itself.
            let ConnectInfo(from) = head
                .extensions
                .get::<ConnectInfo<SocketAddr>>()
                .ok_or_else(|| Failure::new(Code::Internal, "where the request comes from is not known"))?;
            let share = gate.stranger_shares.take_as(neighbourhood(from.ip()), STRANGERS_OF_ONE).ok_or_else(busy)?;
            Some((share, gate.strangers.try_acquire().map_err(|_| busy())?))
        }
        _ => None,
    };
    // A piece of an upload is large: only so many are held at a time.
    let is_upload = route.method == Method::PUT;
    let _room = match (is_upload, &caller) {
        (true, Some(caller)) => {
            let share = gate.upload_shares.take(&caller.token, UPLOADS_OF_ONE).ok_or_else(busy)?;
            let place = tokio::time::timeout(UPLOAD_WAIT_BUDGET, gate.uploads.acquire()).await;
            Some((share, place.map_err(|_| busy())?.map_err(|_| busy())?))
        }
        _ => None,
    };
    let budget = if caller.is_some() { BODY_BUDGET } else { STRANGER_BODY_BUDGET };
    let bytes = read_body(&head.method, is_upload, body, budget).await?;
    let mut asker = Asker { caller, request_id, params, idempotency: None, by: None };
    if let (Some(caller), true) = (&asker.caller, matches!(route.method, Method::POST | Method::PATCH | Method::DELETE))
    {
        let uri = head.uri.path_and_query().map_or("", |uri| uri.as_str());
        let what: [&[u8]; 3] = [route.method.as_str().as_bytes(), uri.as_bytes(), &bytes];
        match idempotency::claim(&gate.parts, caller.token.id, &head.headers, &what).await? {
            Claim::None => {}
            Claim::New(claim) => asker.idempotency = Some(claim),
            Claim::Answered(reply) => return Ok(replayed(reply)),
        }
    }
    let claim = asker.idempotency.clone();
    head.extensions.insert(asker);
    let handler = AssertUnwindSafe(next.run(Request::from_parts(head, Body::from(bytes)))).catch_unwind();
    match tokio::time::timeout(HANDLER_BUDGET, handler).await {
        Ok(Ok(response)) => match claim.filter(|_| response.extensions().get::<Problem>().is_some()) {
            // Refused perhaps because of what the very same request, sent twice at once, has done.
            Some(claim) => match idempotency::kept_answer(&gate.parts, &claim).await? {
                Some(reply) => Ok(replayed(reply)),
                None => Ok(response),
            },
            None => Ok(response),
        },
        Ok(Err(_panic)) => {
            tracing::error!(%request_id, path, "a handler panicked");
            Err(Failure::new(Code::Internal, "a fault in the controller; its log has this request's id"))
        }
        Err(_) => Err(Failure::new(
            Code::StoreUnavailable,
            "it took too long; nothing is known of the outcome, try again with the same Idempotency-Key",
        )),
    }
}

fn replayed(reply: Reply) -> Response {
    let mut response = reply.into_response();
    response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}

async fn authenticate(parts: &Parts, route: &'static Route, headers: &HeaderMap) -> Result<Option<Caller>, Failure> {
    if route.access == Access::Open {
        return Ok(None);
    }
    let no = |detail: &str| Failure::new(Code::Unauthenticated, detail);
    let token = match headers.get(header::AUTHORIZATION) {
        Some(value) => {
            let text = value.to_str().map_err(|_| no("the Authorization header is malformed"))?;
            let (scheme, secret) = text.split_once(' ').ok_or_else(|| no("the Authorization header is malformed"))?;
            if !scheme.eq_ignore_ascii_case("bearer") {
                return Err(no("only bearer tokens are taken"));
            }
            token_of_secret(&parts.state, secret.trim(), unix_ms()).await?
        }
        None => {
            let session = Session::of(&parts.keys.root, headers, !parts.config.plain_http, unix_ms())
                .ok_or_else(|| no("send 'Authorization: Bearer <token>'"))?;
            if route.method != Method::GET && !headers.contains_key(CSRF_HEADER) {
                return Err(Failure::new(
                    Code::Forbidden,
                    format!("a change by cookie needs the header {CSRF_HEADER}"),
                ));
            }
            let from = headers.get("sec-fetch-site").map(|value| value.to_str().unwrap_or_default());
            if from.is_some_and(|from| !matches!(from, "same-origin" | "none")) {
                return Err(Failure::new(Code::Forbidden, "a cookie is good for the controller's own pages only"));
            }
            token_of_id(&parts.state, session.token, unix_ms()).await?
        }
    };
    let caller = Caller { token: token.ok_or_else(|| no("this token is not known, or has expired"))? };
    caller.check(route).map_err(|denied| Failure::new(Code::Forbidden, denied.to_string()))?;
    Ok(Some(caller))
}

async fn read_body(method: &Method, is_upload: bool, body: Body, budget: Duration) -> Result<Bytes, Failure> {
    if matches!(*method, Method::GET | Method::HEAD) {
        return Ok(Bytes::new());
    }
    let limit = if is_upload { MAX_PIECE_BYTES } else { MAX_JSON_BYTES };
    match tokio::time::timeout(budget, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            let text = crate::chain(&error);
            if text.contains("length limit exceeded") {
                return Err(Failure::new(Code::TooLarge, format!("the body is larger than {limit} bytes")));
            }
            Err(Failure::bad("the body broke off"))
        }
        Err(_) => Err(Failure::bad("the body did not arrive in time")),
    }
}

fn method_not_allowed(path: &str) -> Response {
    let allowed: Vec<&str> =
        ROUTES.iter().filter(|route| route.path == path).map(|route| route.method.as_str()).collect();
    let allowed = allowed.join(", ");
    let mut problem = Problem::new(Code::BadRequest, format!("this path takes: {allowed}"));
    problem.status = StatusCode::METHOD_NOT_ALLOWED.as_u16();
    let mut response = problem_response(problem);
    if let Ok(value) = HeaderValue::try_from(allowed) {
        response.headers_mut().insert(header::ALLOW, value);
    }
    response
}

/// Gives every error its one form, and every answer its number.
fn finish(mut response: Response, request_id: RequestId) -> Response {
    let status = response.status();
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        response = write_problem(&response, &problem.for_request(request_id));
    } else if status.is_client_error() || status.is_server_error() {
        // Made by the framework (an unreadable path and the like).
        let code = match status {
            StatusCode::NOT_FOUND => Code::NotFound,
            StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            status if status.is_server_error() => Code::Internal,
            _ => Code::BadRequest,
        };
        let mut problem = Problem::new(code, status.canonical_reason().unwrap_or("the request is malformed"));
        problem.status = status.as_u16();
        response = write_problem(&response, &problem.for_request(request_id));
    }
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::try_from(request_id.to_string()) {
        headers.insert(REQUEST_ID.clone(), value);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn write_problem(response: &Response, problem: &Problem) -> Response {
    let allow = response.headers().get(header::ALLOW).cloned();
    let body = serde_json::to_vec(problem).unwrap_or_default();
    let status = StatusCode::from_u16(problem.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
    let headers = response.headers_mut();
    if let Some(allow) = allow {
        headers.insert(header::ALLOW, allow);
    }
    if status == StatusCode::UNAUTHORIZED {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    if matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
