//! Events: a listing, and a stream (`text/event-stream`) that goes on where the last one ended.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::StreamExt as _;
use supercloud_api::{
    Code, Event, Page, Role,
    ids::{ProjectId, TokenId},
    unix_ms,
};
use supercloud_store::{Change, WatchItem};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{
    Api, Asker, Failure, Reply,
    shares::{Share, Shares},
};
use crate::{
    app::Parts,
    auth::{Caller, Reach},
    chain,
    state::{StateError, TokenRecord, decode, keys},
};

/// Streams at once.
const STREAMS_AT_ONCE: usize = 256;
/// Of these, those of one token.
const STREAMS_OF_ONE: usize = 32;
/// Pieces that wait for a slow reader before it is let go.
const QUEUE: usize = 64;
/// A comment this often keeps the stream alive through middle boxes; the token is looked at again then.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long a reader may take to take a piece.
const SLOW_READER_BUDGET: Duration = Duration::from_secs(30);
const PAGE: usize = 500;

/// The places for streams. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Streams {
    places: Arc<Semaphore>,
    shares: Shares,
}

impl Default for Streams {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(STREAMS_AT_ONCE)), shares: Shares::default() }
    }
}

/// Which events somebody sees.
#[derive(Debug, Clone, Copy)]
struct Sight {
    scope: Option<ProjectId>,
    /// Admins of everything also see what belongs to no project.
    sees_projectless: bool,
}

impl Sight {
    async fn of(api: &Api, asker: &Asker) -> Result<Self, Failure> {
        let caller: &Caller = asker.caller()?;
        let is_admin = caller.reach() == Reach::All && caller.token.role == Role::Admin;
        let scope = asker.scope(&api.parts).await?;
        Ok(Self { scope, sees_projectless: is_admin && scope.is_none() })
    }

    fn sees(self, event: &Event) -> bool {
        match (event.project, self.scope) {
            (None, _) => self.sees_projectless,
            (Some(_), None) => true,
            (Some(project), Some(scope)) => project == scope,
        }
    }
}

/// The number after which a listing or a stream begins.
async fn start(api: &Api, asker: &Asker) -> Result<u64, Failure> {
    match (asker.params.last, asker.params.after) {
        (Some(_), Some(_)) => Err(Failure::bad("say either after or last")),
        (Some(last), None) => Ok(api.parts.state.head().await?.seq.saturating_sub(last)),
        (None, after) => Ok(after.unwrap_or(0)),
    }
}

/// Events after a number, in order (`?last=N`: the newest N of all, of which those are told that the token sees). An admin of everything who names no project gets the whole chain, without gaps.
#[utoipa::path(get, path = "/v1/events", tag = "events", responses((status = 200, body = Page<Event>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let sight = Sight::of(&api, &asker).await?;
    let limit = asker.params.limit()?;
    let mut after = match asker.params.page::<u64>()? {
        Some(page) => page,
        None => start(&api, &asker).await?,
    };
    let mut items: Vec<Event> = Vec::new();
    loop {
        let (events, more) = api.parts.state.events(after, PAGE).await?;
        for event in events {
            after = event.seq;
            if !sight.sees(&event) {
                continue;
            }
            if items.len() == limit {
                let next_page = items.last().map(|last| last.seq.to_string());
                return Reply::ok(&Page { items, next_page });
            }
            items.push(event);
        }
        if !more {
            return Reply::ok(&Page { items, next_page: None });
        }
    }
}

/// Events as they happen, after `Last-Event-ID` (or `?after=`, or `?last=N` for the newest N and what follows; else from the first): lines `id`, `event`, `data` (an Event as JSON).
#[utoipa::path(get, path = "/v1/events/stream", tag = "events", responses((status = 200, content_type = "text/event-stream", body = String)))]
pub async fn stream(State(api): State<Api>, asker: Asker, headers: HeaderMap) -> Result<Response, Failure> {
    let sight = Sight::of(&api, &asker).await?;
    let last = match headers.get("last-event-id") {
        Some(value) => {
            let parsed = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
            parsed.ok_or_else(|| Failure::bad("Last-Event-ID must be the number of an event"))?
        }
        None => start(&api, &asker).await?,
    };
    let too_many = || Failure::new(Code::TooManyRequests, "too many event streams are open");
    let share = api.streams.shares.take(&asker.caller()?.token, STREAMS_OF_ONE).ok_or_else(too_many)?;
    let place = Arc::clone(&api.streams.places).try_acquire_owned().map_err(|_| too_many())?;
    let (sender, receiver) = mpsc::channel::<Bytes>(QUEUE);
    let caller = asker.caller()?.clone();
    let feed = Feed { parts: api.parts.clone(), sight, caller, sender, last };
    api.parts.spawn("event stream", feed.run((place, share)));
    let pieces = tokio_stream::wrappers::ReceiverStream::new(receiver).map(Ok::<Bytes, Infallible>);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Feeds one stream; owned by the controller's tasks. Ends when the reader is gone or too slow, the token is, or the
/// controller ends.
struct Feed {
    parts: Parts,
    sight: Sight,
    caller: Caller,
    sender: mpsc::Sender<Bytes>,
    last: u64,
}

/// Whether a stream that a token opened is still its: it was neither revoked nor has it expired.
pub(super) async fn may_go_on(parts: &Parts, token: TokenId) -> Result<bool, StateError> {
    let token = parts.state.read::<TokenRecord>(&token).await?;
    Ok(token.is_some_and(|record| record.token.expires_at_ms.is_none_or(|at| unix_ms() < at)))
}

impl Feed {
    async fn run(mut self, _place: (OwnedSemaphorePermit, Share)) {
        // Says at once that the stream is open.
        if !self.send(Bytes::from_static(b": open\n\n")).await {
            return;
        }
        let reader_gone = self.sender.clone();
        let outcome = tokio::select! {
            outcome = self.feed() => outcome,
            () = reader_gone.closed() => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::warn!(error = %chain(&error), "an event stream ends");
        }
    }

    async fn send(&self, piece: Bytes) -> bool {
        self.sender.send_timeout(piece, SLOW_READER_BUDGET).await.is_ok()
    }

    async fn tell(&mut self, event: &Event) -> bool {
        if event.seq <= self.last {
            return true;
        }
        self.last = event.seq;
        if !self.sight.sees(event) {
            return true;
        }
        let Ok(data) = serde_json::to_string(event) else { return false };
        self.send(Bytes::from(format!("id: {}\nevent: {}\ndata: {data}\n\n", event.seq, event.kind))).await
    }

    async fn feed(&mut self) -> Result<(), StateError> {
        let mut tick = tokio::time::interval(KEEP_ALIVE);
        tick.reset();
        loop {
            // The revision first: what comes after it the watch tells, and `tell` drops what is told twice.
            let revision = self.parts.state.health().await?.revision;
            loop {
                let (events, more) = self.parts.state.events(self.last, PAGE).await?;
                for event in &events {
                    if !self.tell(event).await {
                        return Ok(());
                    }
                }
                if !more {
                    break;
                }
            }
            let mut watch = self.parts.state.store().watch(keys::folder("events"), revision + 1);
            loop {
                tokio::select! {
                    _ = tick.tick() => {
                        if !may_go_on(&self.parts, self.caller.token.id).await? || !self.send(Bytes::from_static(b": alive\n\n")).await {
                            return Ok(());
                        }
                    }
                    item = watch.next() => match item {
                        Some(Ok(WatchItem::Changes { changes, .. })) => {
                            for change in &changes {
                                if let Change::Put(found) = change
                                    && !self.tell(&decode(found)?).await
                                {
                                    return Ok(());
                                }
                            }
                        }
                        // Read again from the last event that was told.
                        Some(Ok(WatchItem::Compacted { .. })) => break,
                        Some(Err(error)) => return Err(error.into()),
                        None => return Ok(()),
                    },
                }
            }
        }
    }
}
