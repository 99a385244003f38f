//! The least that a job can cost, when all is known beforehand: dynamic programming over ticks, work left, and where the job is. Its
//! actions are those of the policies, with the same changes and the same bills.

use super::{At, Job, Pool};
use crate::money::NanoUsd;

/// Prices are whole; what cannot be in time costs this.
const NEVER: u64 = u64::MAX;

/// The least cost; `None` when not even that is in time.
#[must_use]
pub fn optimum(job: Job, pool: &Pool<'_>) -> Option<NanoUsd> {
    // A place: nowhere, or on a host that takes so many ticks yet: nowhere, spot 0..=change, on-demand 0..=change.
    let hosts = job.change + 1;
    let places = 1 + 2 * hosts;
    let spot = pool.spot.per_hour_for(pool.tick_ms).0;
    let on_demand = pool.on_demand.per_hour_for(pool.tick_ms).0;
    let place = |at: At, changing: usize| match at {
        At::Nowhere => 0,
        At::Spot => 1 + changing,
        At::OnDemand => 1 + hosts + changing,
    };
    // after[left_work * places + place]: the least cost from the next tick on.
    let mut after = vec![NEVER; (job.work + 1) * places];
    after[..places].fill(0);
    for tick in (0..job.window).rev() {
        let is_open = pool.is_open.get(tick).copied().unwrap_or(false);
        let mut now = vec![NEVER; after.len()];
        now[..places].fill(0);
        for left in 1..=job.work {
            // What a tick on a host costs from here, when it takes so many ticks to be ready before it.
            let stay = |at: At, changing: usize, price: u64| {
                let next = match changing.checked_sub(1) {
                    Some(less) => after[left * places + place(at, less)],
                    None => after[(left - 1) * places + place(at, 0)],
                };
                next.saturating_add(price)
            };
            let wait = after[left * places];
            let to_on_demand = stay(At::OnDemand, job.change, on_demand);
            let to_spot = if is_open { stay(At::Spot, job.change, spot) } else { NEVER };
            let anew = wait.min(to_on_demand).min(to_spot);
            now[left * places] = anew;
            for changing in 0..hosts {
                let here = if is_open { stay(At::Spot, changing, spot) } else { NEVER };
                now[left * places + place(At::Spot, changing)] = here.min(wait).min(to_on_demand);
                // A host that was just taken is rented anew, if at all.
                if !is_open {
                    now[left * places + place(At::Spot, changing)] = anew;
                }
                let here = stay(At::OnDemand, changing, on_demand);
                now[left * places + place(At::OnDemand, changing)] = here.min(wait).min(to_spot);
            }
        }
        after = now;
    }
    let least = after[job.work * places];
    (least < NEVER).then_some(NanoUsd(least))
}
