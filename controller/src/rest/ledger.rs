//! The ledger: what was paid.

use axum::extract::State;
use supercloud_api::{
    Cloud, Code, Ledger, Ref,
    ids::{GuestId, HostId},
};
use supercloud_scheduler::ledger::{HOUR_MS, Span};

use super::{Api, Asker, Failure, Reply};
use crate::{
    ledger::{Asked, statement},
    state::HostRecord,
};

/// Without a beginning, so much is told.
const DEFAULT_MS: u64 = 31 * 24 * HOUR_MS;
/// The most that is told at once.
const MOST_MS: u64 = 366 * 24 * HOUR_MS;

/// A page's name: where the whole listing ends, so that all pages are of the same one, and how many lines came before.
fn parse_page(text: &str) -> Option<(u64, usize)> {
    let (to_ms, skipped) = text.split_once('-')?;
    Some((to_ms.parse().ok()?, skipped.parse().ok()?))
}

/// What was paid: per guest, host, market and hour, with what the same would have cost on demand. `totals` are of everything that is
/// asked for. Members of one project see its guests' lines; what is idle is for those who see all projects.
#[utoipa::path(get, path = "/v1/ledger", tag = "markets", responses((status = 200, body = Ledger)))]
pub async fn read(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let params = &asker.params;
    let limit = params.limit()?;
    let project = asker.scope(&api.parts).await?;
    let page = match &params.page {
        Some(text) => Some(parse_page(text).ok_or_else(|| Failure::bad("page is not one that a listing gave"))?),
        None => None,
    };
    // Things that are gone have no names, but their lines stay: ids need not be known.
    let guest = match params.guest.as_deref().map(|text| (text, text.parse::<GuestId>())) {
        None => None,
        Some((_, Ok(id))) => Some(id),
        Some((name, Err(_))) => Some(asker.find_guest(&api.parts, &Ref::from(name)).await?.guest.id),
    };
    let host = match params.host.as_deref().map(|text| (text, text.parse::<HostId>())) {
        None => None,
        Some((_, Ok(id))) => Some(id),
        Some((name, Err(_))) => Some(asker.find::<HostRecord>(&api.parts, &Ref::from(name)).await?.host.id),
    };
    let cloud = match &params.cloud {
        None => None,
        Some(name) => Some(asker.find::<Cloud>(&api.parts, &Ref::from(name)).await?.id),
    };
    let now = api.parts.clerk.recent().await?;
    let clock = params.clock.unwrap_or(now.clock);
    let latest_ms = if clock == now.clock { now.at_ms } else { u64::MAX };
    if clock != now.clock && (params.from_ms.is_none() || params.to_ms.is_none()) {
        return Err(Failure::bad("the ledger is not kept by this clock now: say from_ms and to_ms"));
    }
    let asked_to_ms = page.map(|(to_ms, _)| to_ms).or(params.to_ms);
    let to_ms = asked_to_ms.map_or(latest_ms, |to_ms| to_ms.min(latest_ms));
    let from_ms = params.from_ms.unwrap_or_else(|| to_ms.saturating_sub(DEFAULT_MS));
    if to_ms.saturating_sub(from_ms) > MOST_MS {
        return Err(Failure::new(Code::BadRequest, "at most 366 days are told at once: say from_ms and to_ms"));
    }
    let window = Span { from_ms, to_ms: to_ms.max(from_ms) };
    let told = {
        let _one_at_a_time = api.reckoning.lock().await;
        statement(&api.parts.state, Asked { clock, window, project, guest, host, cloud }).await?
    };
    let skipped = page.map_or(0, |(_, skipped)| skipped);
    let all = told.lines.len();
    let items: Vec<_> = told.lines.into_iter().skip(skipped).take(limit).collect();
    let end = skipped.saturating_add(items.len());
    let next_page = (end < all && !items.is_empty()).then(|| format!("{to_ms}-{end}"));
    Reply::ok(&Ledger { clock, from_ms, to_ms: window.to_ms, totals: told.totals, items, next_page })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_no_listing_gave_are_refused() {
        assert_eq!(parse_page("7-100"), Some((7, 100)));
        for bad in ["", "7", "-", "7-", "-7", "7-x", "99999999999999999999-1"] {
            assert_eq!(parse_page(bad), None, "{bad}");
        }
    }
}
