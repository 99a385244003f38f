//! What policies decided for guests.

use std::collections::HashMap;

use axum::{body::Bytes, extract::State, http::HeaderMap};
use supercloud_api::{
    GuestVerdict, Page, VERDICT_TEXT_BYTES, VERDICTS_AT_ONCE, Verdict, VerdictsTaken, VerdictsTold, ids::GuestId,
    unix_ms,
};

use super::{Api, Asker, Failure, Reply, body};
use crate::{state::GuestRecord, verdicts::Teller};

/// What is wrong with a verdict, if anything.
fn fault(verdict: &Verdict) -> Option<String> {
    let texts = [Some(&verdict.reason), verdict.market.as_ref(), verdict.chosen.as_ref(), verdict.runner_up.as_ref()];
    let mut texts = texts.into_iter().flatten();
    if texts.clone().any(|text| text.len() > VERDICT_TEXT_BYTES) {
        return Some(format!("a text of the verdict on {} is longer than {VERDICT_TEXT_BYTES} bytes", verdict.guest));
    }
    let has_control = texts.any(|text| text.chars().any(char::is_control));
    has_control.then(|| format!("the verdict on {} has control characters", verdict.guest))
}

/// What policies decided for guests, as they told it in the last five minutes: the market that is chosen, the runner-up, and why.
#[utoipa::path(get, path = "/v1/verdicts", tag = "markets", responses((status = 200, body = Page<GuestVerdict>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let limit = asker.params.limit()?;
    let after = asker.params.page::<GuestId>()?;
    let project = asker.scope(&api.parts).await?;
    let (items, is_more) = api.parts.verdicts.page(project, after, limit, unix_ms());
    let next_page = items.last().filter(|_| is_more).map(|last| last.guest.to_string());
    Reply::ok(&Page { items, next_page })
}

/// A policy tells what it decided. Nothing moves by it: moves are asked for with the guest.
#[utoipa::path(post, path = "/v1/verdicts", tag = "markets", request_body = VerdictsTold, responses((status = 200, body = VerdictsTaken)))]
pub async fn tell(State(api): State<Api>, asker: Asker, headers: HeaderMap, bytes: Bytes) -> Result<Reply, Failure> {
    let told: VerdictsTold = body(&headers, &bytes)?;
    if told.items.len() > VERDICTS_AT_ONCE {
        return Err(Failure::bad(format!(
            "{} verdicts at once; at most {VERDICTS_AT_ONCE} are taken",
            told.items.len()
        )));
    }
    if let Some(fault) = told.items.iter().find_map(fault) {
        return Err(Failure::bad(fault));
    }
    let project = asker.scope(&api.parts).await?;
    // Daemons tell every second or so.
    let fleet = api.parts.state.fleet().await?;
    let visible = fleet.guests().filter(|record| project.is_none_or(|wanted| record.guest.project == wanted));
    let known: HashMap<GuestId, &GuestRecord> = visible.map(|record| (record.guest.id, record)).collect();
    let of_known = |verdict: Verdict| {
        let guest = &known.get(&verdict.guest)?.guest;
        Some((guest.name.clone(), guest.project, verdict))
    };
    let items: Vec<_> = told.items.into_iter().filter_map(of_known).collect();
    if asker.params.dry_run {
        return Reply::ok(&VerdictsTaken { taken: items.len() });
    }
    let actor = asker.context(None).actor;
    let teller = Teller { policy: told.policy, actor, at_ms: unix_ms() };
    Reply::ok(&VerdictsTaken { taken: api.parts.verdicts.take(&teller, items) })
}
