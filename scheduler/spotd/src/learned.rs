//! What the controller's rentings tell of interruptions: for how long hosts of each pool were had, and when the provider took one.
//!
//! A pool is an instance type in a cloud, on the spot market. Seen is only what was rented: while nobody has a host there, nothing
//! is learned of it. Nothing is kept beside what the API tells, so that a restarted daemon knows the same.

use std::collections::BTreeMap;

use supercloud_api::{Market, Renting, RentingEnd, Tenure, ids::CloudId};
use supercloud_scheduler::{
    interruptions::{Hazard, Learner, TOGETHER_MS},
    market::HOUR_MS,
};

/// How far back rentings count, in milliseconds: markets change.
const WINDOW_MS: u64 = 90 * 24 * HOUR_MS;
/// The most pools and stays that are learned from; the newest.
const MOST_POOLS: usize = 512;
const MOST_STAYS: usize = 10_000;

/// A host was had from one time to another, and was taken at the end, or was not.
type Stay = (u64, u64, bool);

/// What is known of one market.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// How often the provider took hosts.
    pub interruptions: u32,
    /// For how long there were any, in milliseconds.
    pub watched_ms: u64,
    /// How long ago that was last, in milliseconds; `None`: never.
    pub since_taken_ms: Option<u64>,
    /// What is believed of it now.
    pub hazard: Hazard,
}

/// What was learned of all pools.
#[derive(Debug)]
pub struct Learned {
    learner: Learner,
    /// Each pool's number and when it was last taken.
    pools: BTreeMap<(CloudId, String), (usize, Option<u64>)>,
}

impl Learned {
    /// Learns from rentings up to now, milliseconds since 1970.
    pub fn from(rentings: &[Renting], prior_hours: u32, now_ms: u64) -> Self {
        let mut stays: BTreeMap<(CloudId, String), Vec<Stay>> = BTreeMap::new();
        // Oldest first: the newest are what is read from the end.
        for renting in rentings.iter().rev().take(MOST_STAYS) {
            let from_ms = renting.launched_at_ms.or(renting.up_at_ms);
            let (Tenure::Spot, Some(from_ms)) = (renting.tenure, from_ms) else { continue };
            let to_ms = renting.ended_at_ms.unwrap_or(now_ms).min(now_ms);
            let from_ms = from_ms.max(now_ms.saturating_sub(WINDOW_MS));
            let key = (renting.cloud, renting.instance_type.clone());
            if to_ms > from_ms && (stays.len() < MOST_POOLS || stays.contains_key(&key)) {
                stays.entry(key).or_default().push((from_ms, to_ms, renting.end == Some(RentingEnd::Taken)));
            }
        }
        let mut learner = Learner::new(stays.len(), prior_hours);
        let (mut seen, mut pools) = (Vec::new(), BTreeMap::new());
        for (number, (key, stays)) in stays.into_iter().enumerate() {
            let takes = takes(&stays);
            watch(number, stays, &takes, &mut seen);
            pools.insert(key, (number, takes.last().copied()));
        }
        seen.sort_by_key(|seen| (seen.at_ms + seen.for_ms, seen.pool));
        for Seen { at_ms, pool, for_ms, up_ms, is_taken } in seen {
            learner.watch(pool, (at_ms, for_ms), up_ms, is_taken);
            if is_taken {
                learner.went(pool, at_ms + for_ms);
            }
        }
        Self { learner, pools }
    }

    /// What is known of a market now; of one in which nothing was rented, the prior.
    pub fn of(&self, market: &Market, now_ms: u64) -> Known {
        let key = (market.cloud, market.instance_type.clone());
        let (pool, taken_ms) = self.pools.get(&key).copied().unwrap_or((usize::MAX, None));
        Known {
            interruptions: self.learner.seen(pool),
            watched_ms: self.learner.watched_ms(pool),
            since_taken_ms: taken_ms.map(|at| now_ms.saturating_sub(at)),
            hazard: self.learner.hazard(pool),
        }
    }

    /// The chance in thousandths that hosts of the market `other` are taken when those of `market` are.
    pub fn goes_with(&self, market: &Market, other: &Market) -> u32 {
        let number = |market: &Market| self.pools.get(&(market.cloud, market.instance_type.clone())).map(|pool| pool.0);
        match (number(market), number(other)) {
            (Some(market), Some(other)) => self.learner.goes_with(market, other),
            _ => u32::from(market.name == other.name) * 1000,
        }
    }
}

/// When hosts of a pool were taken; those within a short time are one interruption.
fn takes(stays: &[Stay]) -> Vec<u64> {
    let mut takes: Vec<u64> = stays.iter().filter(|stay| stay.2).map(|stay| stay.1).collect();
    takes.sort_unstable();
    let mut last = None;
    takes.retain(|at| {
        let is_new = last.is_none_or(|last: u64| at - last > TOGETHER_MS);
        if is_new {
            last = Some(*at);
        }
        is_new
    });
    takes
}

/// An interval in which a pool was watched.
struct Seen {
    at_ms: u64,
    pool: usize,
    for_ms: u64,
    up_ms: Option<u64>,
    is_taken: bool,
}

/// Splits the time in which there was any host of a pool at full hours and where one was taken.
fn watch(pool: usize, mut stays: Vec<Stay>, takes: &[u64], seen: &mut Vec<Seen>) {
    stays.sort_unstable();
    let mut from_ms = 0;
    for (begin_ms, to_ms, _) in stays {
        // What is within an earlier stay was watched with it.
        from_ms = from_ms.max(begin_ms);
        while from_ms < to_ms {
            let next = takes.partition_point(|take| *take <= from_ms);
            let hour = (from_ms / HOUR_MS + 1) * HOUR_MS;
            let end_ms = to_ms.min(hour).min(takes.get(next).copied().unwrap_or(u64::MAX));
            seen.push(Seen {
                at_ms: from_ms,
                pool,
                for_ms: end_ms - from_ms,
                up_ms: next.checked_sub(1).map(|last| from_ms - takes[last]),
                is_taken: takes.get(next) == Some(&end_ms),
            });
            from_ms = end_ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use supercloud_api::ids::{HostId, OperationId, RentingId};

    use super::*;

    const NOW: u64 = 2000 * HOUR_MS;

    fn renting(cloud: CloudId, kind: &str, (from, to): (u64, Option<u64>), end: Option<&str>) -> Renting {
        serde_json::from_value(json!({
            "id": RentingId::generate(), "cloud": cloud, "cloud_name": "c", "provider": "ec2", "host": HostId::generate(),
            "host_name": "h", "instance_type": kind, "tenure": "spot", "max_price_nanousd_per_hour": null,
            "state": if to.is_some() { "ended" } else { "up" }, "end": end, "instance": null, "address": null,
            "is_started_by_hand": false, "ending_as": null, "error": null, "rent_operation": OperationId::generate(),
            "return_operation": null, "created_at_ms": from, "launched_at_ms": from, "up_at_ms": from, "ended_at_ms": to,
        }))
        .unwrap()
    }

    fn market(cloud: CloudId, kind: &str) -> Market {
        serde_json::from_value(json!({
            "name": format!("c/{kind}/spot"), "cloud": cloud, "cloud_name": "c", "instance_type": kind, "tenure": "spot",
            "price_nanousd_per_hour": 1, "on_demand_nanousd_per_hour": null, "feed_time_ms": 0, "feed_now_ms": 0,
        }))
        .unwrap()
    }

    #[test]
    fn rentings_tell_for_how_long_and_how_often() {
        let cloud = CloudId::generate();
        let hour = |n: u64| NOW - n * HOUR_MS;
        let rentings = [
            renting(cloud, "calm", (hour(1000), None), None),
            renting(cloud, "calm", (hour(500), Some(hour(100))), Some("returned")),
            renting(cloud, "wild", (hour(50), Some(hour(40))), Some("taken")),
            renting(cloud, "wild", (hour(45), Some(hour(40) + 60_000)), Some("taken")),
            renting(cloud, "wild", (hour(30), Some(hour(20))), Some("taken")),
        ];
        let learned = Learned::from(&rentings, 24, NOW);
        let (calm, wild) = (learned.of(&market(cloud, "calm"), NOW), learned.of(&market(cloud, "wild"), NOW));
        assert_eq!((calm.interruptions, calm.watched_ms, calm.since_taken_ms), (0, 1000 * HOUR_MS, None));
        assert_eq!(wild.interruptions, 2, "two hosts taken within a minute are one interruption");
        assert_eq!((wild.watched_ms, wild.since_taken_ms), (20 * HOUR_MS + 60_000, Some(20 * HOUR_MS)));
        assert!(wild.hazard.by_age[2] > 10 * calm.hazard.by_age[2], "{wild:?} {calm:?}");
        let none = learned.of(&market(cloud, "new"), NOW);
        assert_eq!((none.interruptions, none.watched_ms), (0, 0));
        assert_eq!(learned.goes_with(&market(cloud, "wild"), &market(cloud, "calm")), 0);
        assert_eq!(learned.goes_with(&market(cloud, "new"), &market(cloud, "new")), 1000);
    }

    #[test]
    fn times_that_do_not_fit_change_nothing() {
        let cloud = CloudId::generate();
        let odd = [
            renting(cloud, "odd", (NOW + 5, Some(NOW + 9)), Some("taken")),
            renting(cloud, "odd", (NOW, Some(NOW - 9)), Some("taken")),
            renting(cloud, "odd", (0, Some(u64::MAX)), Some("taken")),
        ];
        let known = Learned::from(&odd, 24, NOW).of(&market(cloud, "odd"), NOW);
        assert!(known.watched_ms <= WINDOW_MS, "{known:?}");
    }
}
