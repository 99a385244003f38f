//! Whether guests could leave their hosts in time, all of them.

use std::collections::HashSet;

use axum::extract::State;
use supercloud_api::{Evacuation, EvacuationState, Page, ids::GuestId};

use super::{Api, Asker, Failure, Reply};
use crate::state::GuestRecord;

/// Guests on hosts that a provider takes back, and whether they could leave in time: as it was when last looked at, some seconds ago.
#[utoipa::path(get, path = "/v1/evacuations", tag = "guests", responses((status = 200, body = Page<Evacuation>)))]
pub async fn list(State(api): State<Api>, asker: Asker) -> Result<Reply, Failure> {
    let limit = asker.params.limit()?;
    let after = asker.params.page::<GuestId>()?;
    let visible = match asker.scope(&api.parts).await? {
        None => None,
        Some(project) => {
            let guests = api.parts.state.list::<GuestRecord>().await?;
            let own = guests.iter().filter(|record| record.guest.project == project);
            Some(own.map(|record| record.guest.id).collect())
        }
    };
    Reply::ok(&page(api.parts.evacuations.all(), visible.as_ref(), after, limit))
}

/// A page of those that a provider may take and that are `visible` (`None`: all are); `all` is in the order of ids.
fn page(
    all: Vec<Evacuation>,
    visible: Option<&HashSet<GuestId>>,
    after: Option<GuestId>,
    limit: usize,
) -> Page<Evacuation> {
    let found = all.into_iter().filter(|one| {
        one.state != EvacuationState::NotNeeded
            && after.is_none_or(|after| one.guest > after)
            && visible.is_none_or(|visible| visible.contains(&one.guest))
    });
    let mut items: Vec<Evacuation> = found.take(limit + 1).collect();
    let is_more = items.len() > limit;
    items.truncate(limit);
    let next_page = items.last().filter(|_| is_more).map(|last| last.guest.to_string());
    Page { items, next_page }
}

#[cfg(test)]
mod tests {
    use supercloud_api::ids::HostId;

    use super::*;

    fn one(guest: GuestId, state: EvacuationState) -> Evacuation {
        Evacuation {
            guest,
            host: HostId::generate(),
            host_name: "h".parse().unwrap(),
            destination: None,
            destination_name: None,
            state,
            notice_ms: 120_000,
            leave_ms: None,
            leave_with_all_ms: None,
            downtime_ms: None,
            checkpoint_age_ms: None,
            detail: String::new(),
        }
    }

    #[test]
    fn pages_hold_every_visible_guest_of_a_spot_host_once() {
        use EvacuationState::{InTime, Late, NotNeeded, Unknown};
        let mut ids: Vec<GuestId> = (0..7).map(|_| GuestId::generate()).collect();
        ids.sort();
        let states = [Late, NotNeeded, InTime, Unknown, Late, NotNeeded, Late];
        let all = || ids.iter().zip(states).map(|(id, state)| one(*id, state)).collect::<Vec<_>>();
        let guests = |page: &Page<Evacuation>| page.items.iter().map(|one| one.guest).collect::<Vec<_>>();
        let first = page(all(), None, None, 2);
        assert_eq!(guests(&first), [ids[0], ids[2]]);
        let second = page(all(), None, first.next_page.unwrap().parse().ok(), 3);
        assert_eq!((guests(&second), second.next_page), (vec![ids[3], ids[4], ids[6]], None));
        let own = HashSet::from([ids[1], ids[4]]);
        assert_eq!(guests(&page(all(), Some(&own), None, 10)), [ids[4]]);
    }
}
