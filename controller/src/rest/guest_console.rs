//! A guest's console: what it says as a stream of bytes, and what is typed.

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    extract::{Path, State},
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::Stream;
use supercloud_api::{Code, ConsoleInput, Ref, handover::Owner, link::ConsoleBytes};

use super::{Api, Asker, Failure, Reply, body, events::may_go_on, shares::Share};
use crate::consoles::{Console, ConsoleError};

/// Consoles that one token may look at at once.
const CONSOLES_OF_ONE: usize = 16;
/// The token that opened a console is looked at again this often.
const LOOK_EVERY: Duration = Duration::from_secs(15);
/// Where the console's number is told.
const CONSOLE: HeaderName = HeaderName::from_static("supercloud-console");

/// A console that is shown for as long as somebody reads.
struct Pieces {
    console: Console,
    _share: Share,
}

impl Stream for Pieces {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.console.pieces.poll_recv(context).map(|piece| piece.map(Ok))
    }
}

fn failure(error: ConsoleError) -> Failure {
    Failure::new(Code::WrongState, error.to_string())
}

/// The guest's console: the last that it said, then what it says, as bytes, until nobody reads or the guest leaves its host. The header `supercloud-console` has the number by which it is typed into. The newest reader takes the place of the one before.
#[utoipa::path(get, path = "/v1/guests/{guest}/console", tag = "guests", responses((status = 200, content_type = "application/octet-stream", body = String)))]
pub async fn open(State(api): State<Api>, asker: Asker, Path(guest): Path<String>) -> Result<Response, Failure> {
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let Owner::Host(host) = found.owner.owner else {
        return Err(Failure::new(Code::WrongState, "the guest runs nowhere: it has no console"));
    };
    let too_many = || Failure::new(Code::TooManyRequests, "too many consoles are open");
    let share = api.consoles.take(&asker.caller()?.token, CONSOLES_OF_ONE).ok_or_else(too_many)?;
    let console = api.parts.consoles.open(host, found.guest.id, found.owner.epoch).map_err(failure)?;
    let (parts, number, token) = (api.parts.clone(), console.number, asker.caller()?.token.id);
    api.parts.spawn("console", async move {
        while parts.consoles.is_shown(number) {
            tokio::time::sleep(LOOK_EVERY).await;
            if !matches!(may_go_on(&parts, token).await, Ok(true)) {
                parts.consoles.close(number);
            }
        }
    });
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")),
        (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
        (CONSOLE, HeaderValue::from(console.number)),
    ];
    Ok((headers, Body::from_stream(Pieces { console, _share: share })).into_response())
}

/// Types into a console that is shown.
#[utoipa::path(post, path = "/v1/guests/{guest}/console/{console}/input", tag = "guests", request_body = ConsoleInput, responses((status = 204)))]
pub async fn input(
    State(api): State<Api>,
    asker: Asker,
    Path((guest, console)): Path<(String, u64)>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Reply, Failure> {
    let input: ConsoleInput = body(&headers, &bytes)?;
    let found = asker.find_guest(&api.parts, &Ref::from(guest)).await?;
    let data: ConsoleBytes = serde_json::from_value(serde_json::Value::String(input.data))
        .map_err(|error| Failure::bad(format!("data: {error}")))?;
    api.parts.consoles.typed(found.guest.id, console, data).map_err(failure)?;
    Ok(Reply::nothing())
}
