//! How good it was.

use axum::extract::State;
use supercloud_api::{Ref, Reliability, ids::GuestId, unix_ms};

use super::{Api, Asker, Failure, Reply};
use crate::reliability::{KEPT_MS, Window};

/// Without a beginning, so much is told.
const DEFAULT_MS: u64 = 30 * 24 * 3_600_000;

/// How good it was, out of the events of a time: what guests missed of the time that they were to run, how moves went and how long
/// they paused guests, which deadlines were missed.
#[utoipa::path(get, path = "/v1/reliability", tag = "guests", responses((status = 200, body = Reliability)))]
pub async fn read(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let params = &asker.params;
    let project = asker.scope(&api.parts).await?;
    // A guest that is gone has no name, but what befell it stays.
    let guest = match params.guest.as_deref().map(|text| (text, text.parse::<GuestId>())) {
        None => None,
        Some((_, Ok(id))) => Some(id),
        Some((name, Err(_))) => Some(asker.find_guest(&api.parts, &Ref::from(name)).await?.guest.id),
    };
    let now_ms = unix_ms();
    let to_ms = params.to_ms.map_or(now_ms, |to_ms| to_ms.min(now_ms));
    let from_ms = params.from_ms.unwrap_or_else(|| to_ms.saturating_sub(DEFAULT_MS));
    if from_ms > to_ms {
        return Err(Failure::bad("from_ms is later than to_ms"));
    }
    if from_ms < now_ms.saturating_sub(KEPT_MS) {
        return Err(Failure::bad("events are looked at for 366 days: say a later from_ms"));
    }
    let window = Window { from_ms, to_ms, project, guest };
    Reply::ok(&api.parts.reliability.read(&api.parts.state, window).await?)
}
