//! The ledger: what was paid.

use std::sync::Arc;

use axum::extract::State;
use supercloud_api::{
    Cloud, Code, Ledger, LedgerRate, Ref,
    ids::{GuestId, HostId},
};
use supercloud_scheduler::ledger::{HOUR_MS, Span};

use super::{Api, Asker, Failure, Reply};
use crate::{
    ledger::{Asked, LINES_AT_MOST, StatementError, rate, statement},
    state::{HostRecord, StateError},
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

fn refused(error: StatementError) -> Failure {
    match error {
        StatementError::State(error) => error.into(),
        StatementError::TooMuch => Failure::bad(format!(
            "the ledger has more than {LINES_AT_MOST} lines of what is asked for: say less time (from_ms, to_ms), or one host, \
             cloud or guest"
        )),
    }
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
    let skipped = page.map_or(0, |(_, skipped)| skipped);
    let wanted = skipped..skipped.saturating_add(limit);
    let asked = Asked { clock, window, project, guest, host, cloud };
    let mut one_at_a_time = Arc::clone(&api.reckoning).lock_owned().await;
    let state = api.parts.state.clone();
    // In a task: when its client goes away it ends before the next one begins.
    let (tell, told) = tokio::sync::oneshot::channel();
    api.parts.spawn("ledger", async move {
        let reckoned = statement(&state, asked, wanted, LINES_AT_MOST, &mut one_at_a_time).await;
        // Nobody may wait for it any more.
        let _whoever_waits = tell.send(reckoned);
        drop(one_at_a_time);
    });
    let ended = |_| StateError::Missing("the ledger's lines: the controller ends".to_owned());
    let told = told.await.map_err(ended)?.map_err(refused)?;
    let items = told.lines;
    let end = skipped.saturating_add(items.len());
    // What the fleet costs is no business of members of one project.
    let sees_all = project.is_none() && clock == now.clock;
    let rate = match sees_all {
        true => Some(rate(&api.parts.state).await?).map(|rate| LedgerRate {
            paid_nanousd_per_hour: rate.paid.0,
            comparable_nanousd_per_hour: rate.comparable.0,
            on_demand_nanousd_per_hour: rate.on_demand.0,
            unpriced_hosts: rate.unpriced_hosts,
        }),
        false => None,
    };
    let next_page = (end < told.count && !items.is_empty()).then(|| format!("{to_ms}-{end}"));
    Reply::ok(&Ledger { clock, from_ms, to_ms: window.to_ms, totals: told.totals, rate, items, next_page })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_much_is_the_askers_to_narrow() {
        let problem = refused(StatementError::TooMuch).problem();
        assert_eq!(problem.code, Code::BadRequest);
        assert!(problem.to_string().contains("1000000 lines") && problem.to_string().contains("from_ms"), "{problem}");
    }

    #[test]
    fn pages_that_no_listing_gave_are_refused() {
        assert_eq!(parse_page("7-100"), Some((7, 100)));
        for bad in ["", "7", "-", "7-", "-7", "7-x", "99999999999999999999-1"] {
            assert_eq!(parse_page(bad), None, "{bad}");
        }
    }
}
