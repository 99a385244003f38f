//! Where in the shipped price feed the policy will move a guest: found by running the policy itself over the feed.

use std::collections::BTreeSet;

use supercloud_feed::{Feed, MarketKey};
use supercloud_scheduler::money::NanoUsd;
use supercloud_scheduler::price::{CheapestWithHysteresis, Decision, Position, Quote, Reason};

/// Most feed time that the clock is set before a turn, milliseconds.
const LEAD_MS: u64 = 30_000;

/// A time at which the policy moves a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The feed's time of the decision, milliseconds.
    pub at_ms: u64,
    /// A time shortly before it at which the policy lets the guest stay.
    pub before_ms: u64,
    /// To this cloud.
    pub to: String,
    /// What is saved per hour.
    pub saving_per_hour: NanoUsd,
    /// The spot prices then: (cloud, per hour), cheapest first.
    pub prices: Vec<(String, NanoUsd)>,
}

/// A guest that follows prices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follower {
    /// The cloud in which it is.
    pub cloud: String,
    /// When the policy last moved it, on the feed's clock.
    pub last_move_ms: Option<u64>,
    /// What a move of it costs.
    pub move_cost: NanoUsd,
}

/// The first turn after `from_ms` that comes after a time at which the guest was where it is cheapest, so that it is the market
/// that turns and not the guest that stands wrong.
#[must_use]
pub fn next_turn(feed: &Feed, policy: &CheapestWithHysteresis, guest: &Follower, from_ms: u64) -> Option<Turn> {
    let here = spot(feed).find(|(key, _)| key.cloud == guest.cloud)?.0.name();
    let position = Position { market: here, last_move_ms: guest.last_move_ms, move_cost: guest.move_cost };
    let mut was_cheapest = false;
    let mut before = from_ms;
    for now_ms in decision_times(feed, policy, guest).range(from_ms..) {
        let quotes = quotes(feed, *now_ms);
        match policy.decide(*now_ms, &position, &quotes) {
            Decision::Stay(Reason::Cheapest) => was_cheapest = true,
            Decision::Stay(_) => {}
            Decision::Move { to, saving_per_hour } if was_cheapest => {
                let to = spot(feed).find(|(key, _)| key.name() == to)?.0.cloud.clone();
                let lead_ms = LEAD_MS.min((now_ms - before) / 2);
                return Some(Turn {
                    at_ms: *now_ms,
                    before_ms: now_ms - lead_ms,
                    to,
                    saving_per_hour,
                    prices: prices_at(feed, *now_ms),
                });
            }
            Decision::Move { .. } => {}
        }
        before = *now_ms;
    }
    None
}

/// The spot prices at a time, cheapest first.
#[must_use]
pub fn prices_at(feed: &Feed, now_ms: u64) -> Vec<(String, NanoUsd)> {
    let mut prices: Vec<_> =
        spot(feed).filter_map(|(key, _)| Some((key.cloud.clone(), feed.price_at(key, now_ms)?.price))).collect();
    prices.sort_by_key(|(cloud, price)| (*price, cloud.clone()));
    prices
}

fn spot(feed: &Feed) -> impl Iterator<Item = (&MarketKey, &[supercloud_feed::Step])> {
    feed.markets().filter(|(key, _)| key.tenure == "spot")
}

fn quotes(feed: &Feed, now_ms: u64) -> Vec<Quote> {
    spot(feed)
        .filter_map(|(key, _)| {
            let step = feed.price_at(key, now_ms)?;
            Some(Quote { market: key.name(), price: step.price, since_ms: step.at_ms, is_open: true })
        })
        .collect()
}

/// The times at which a decision can become another one: when a price changes, when it has settled, when the guest may move again.
fn decision_times(feed: &Feed, policy: &CheapestWithHysteresis, guest: &Follower) -> BTreeSet<u64> {
    let mut times = BTreeSet::new();
    for (_, steps) in spot(feed) {
        times.extend(steps.iter().flat_map(|step| [step.at_ms, step.at_ms + policy.settle_ms]));
    }
    times.extend(guest.last_move_ms.map(|at| at + policy.cool_down_ms));
    times
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::FEED;

    fn guest(cloud: &str, last_move_ms: Option<u64>) -> Follower {
        Follower { cloud: cloud.into(), last_move_ms, move_cost: NanoUsd(2_500_000) }
    }

    #[test]
    fn the_shipped_feed_turns_twice_for_a_guest_in_any_cloud() {
        let feed = Feed::parse(FEED).unwrap();
        let policy = CheapestWithHysteresis::default();
        for cloud in ["aws-east", "gcp-west", "home"] {
            let first = next_turn(&feed, &policy, &guest(cloud, None), 0).unwrap();
            assert_ne!(first.to, cloud);
            assert_eq!(first.prices[0].0, first.to, "to the cheapest");
            let second = next_turn(&feed, &policy, &guest(&first.to, Some(first.at_ms)), first.at_ms).unwrap();
            assert!(second.at_ms >= first.at_ms + policy.cool_down_ms);
            assert_ne!(second.to, first.to);
        }
    }

    /// Looked at every ten seconds as a daemon would, the policy moves at the turn and not before.
    #[test]
    fn between_the_lead_and_the_turn_the_policy_lets_the_guest_stay() {
        let feed = Feed::parse(FEED).unwrap();
        let policy = CheapestWithHysteresis::default();
        let turn = next_turn(&feed, &policy, &guest("home", None), 0).unwrap();
        assert!(turn.before_ms < turn.at_ms && turn.at_ms - turn.before_ms <= LEAD_MS);
        let position =
            Position { market: "home/demo.large/spot".into(), last_move_ms: None, move_cost: NanoUsd(2_500_000) };
        let decide = |now_ms| policy.decide(now_ms, &position, &quotes(&feed, now_ms));
        for now_ms in (turn.before_ms..turn.at_ms).step_by(1000) {
            assert!(matches!(decide(now_ms), Decision::Stay(_)), "at {now_ms}");
        }
        assert!(matches!(decide(turn.at_ms), Decision::Move { .. }));
        assert!(matches!(decide(turn.at_ms + 5000), Decision::Move { .. }), "and a moment later");
    }

    #[test]
    fn a_cloud_without_prices_never_turns() {
        let feed = Feed::parse(FEED).unwrap();
        assert_eq!(next_turn(&feed, &CheapestWithHysteresis::default(), &guest("moon", None), 0), None);
        let end = feed.end_ms();
        assert_eq!(next_turn(&feed, &CheapestWithHysteresis::default(), &guest("home", None), end + 1), None);
    }
}
