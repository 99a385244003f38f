//! Smart spot: follow prices, leave before one is thrown out, fall back to on-demand and come back.
//!
//! **Auction regime** (the published policy, Smart Spot Instances): bid high; when the price nears the bid within a paid
//! hour, leave at once; near the end of the hour compare all markets that fit, on-demand among them, and go to the
//! cheapest when that saves more than the move costs. On-demand is the worst case, and is left again by the same rule.
//!
//! **Capacity regime** (today's markets, ours): time is billed by the second, so the end of the hour means nothing. A
//! market's price is taken with what its interruptions are expected to cost: the learned rate (a Gamma prior of one
//! interruption in `prior_hours`, updated by what was seen; with `belief = "learned"` by the pool's age and hour of day too,
//! [`crate::interruptions`]) times the cost of one. A move must pay for itself within
//! `horizon_ms`. No more than `max_pool_permille` of the fleet goes into one pool, because a pool is taken as a whole, and no
//! more than `max_shared_permille` where it is expected to be lost together with others.
//!
//! Where a notice is shorter than a new host takes to be ready, hosts can be kept **spare** ([`SmartSpot::with_spares`]).
//!
//! In both the guest is kept **evacuable**: when it cannot leave live within the notice, background checkpoints are asked
//! for; when even these do not help, it is put on on-demand.

use serde::{Deserialize, Serialize};

use super::{Action, Facts, Plan, Policy, View, Why};
use crate::{
    evacuable::{self, Exit},
    interruptions::Outlook,
    market::{HOUR_MS, Regime},
    money::NanoUsd,
    price::Quote,
};

/// The settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SmartSpot {
    /// Leave within a paid hour when the price reaches this share of the bid, in thousandths (auction regime).
    pub near_bid_permille: u32,
    /// Another market must be cheaper by at least this share of the present price, in thousandths.
    pub min_saving_permille: u32,
    /// A move must pay for itself within this time (capacity regime), in milliseconds.
    pub horizon_ms: u64,
    /// The least time between two moves that save money, in milliseconds (capacity regime; where hours are paid, the
    /// paid hour is the cool-down).
    pub cool_down_ms: u64,
    /// A price must have held for this long before it is moved to, in milliseconds.
    pub settle_ms: u64,
    /// The prior belief: one interruption of a pool in so many hours.
    pub prior_hours: u32,
    /// What a second of downtime is worth, in nano-dollars.
    pub downtime_nanousd_per_s: u64,
    /// A pool that was taken is entered again only when its capacity has been back for so long (capacity regime), in
    /// milliseconds: what came back a moment ago tends to go again.
    pub patience_ms: u64,
    /// The largest share of the fleet in one pool, in thousandths; 1000: no limit.
    pub max_pool_permille: u32,
    /// A pool is full when so much of the fleet is expected to lose its host with it, pools that went with it before included,
    /// in thousandths; 1000: no limit.
    pub max_shared_permille: u32,
    /// Where a notice is shorter than a new host takes to be ready: for how many guests one host is kept ready. 0: none.
    pub guests_per_spare: u32,
    /// What is believed of interruptions (capacity regime).
    pub belief: Belief,
}

/// What is believed of interruptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Belief {
    /// Each pool has a mean rate, whatever its age and the hour.
    #[default]
    Mean,
    /// Its rate depends on for how long capacity has been there, and on the hour of day where that has foretold better.
    Learned,
}

const GIGA: u128 = 1_000_000_000;

impl Default for SmartSpot {
    /// Tuned on the first half of the public traces; `docs/policies.md` reports on the second.
    fn default() -> Self {
        Self {
            near_bid_permille: 900,
            min_saving_permille: 60,
            horizon_ms: 24 * HOUR_MS,
            cool_down_ms: HOUR_MS,
            settle_ms: 0,
            prior_hours: 24,
            downtime_nanousd_per_s: 1_000_000,
            patience_ms: HOUR_MS / 6,
            max_pool_permille: 1000,
            max_shared_permille: 1000,
            guests_per_spare: 0,
            belief: Belief::Mean,
        }
    }
}

impl SmartSpot {
    /// For short notices: guests spread thinly over pools, with a host kept ready for every four. Dearer, and more available.
    #[must_use]
    pub fn with_spares() -> Self {
        Self { max_pool_permille: 60, guests_per_spare: 4, belief: Belief::Learned, ..Self::default() }
    }

    /// What is wrong with the settings, if anything.
    ///
    /// # Errors
    /// A sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("near_bid_permille", self.near_bid_permille),
            ("min_saving_permille", self.min_saving_permille),
            ("max_pool_permille", self.max_pool_permille),
            ("max_shared_permille", self.max_shared_permille),
        ] {
            if !(1..=1000).contains(&value) {
                return Err(format!("{name} is {value}; it must be 1 to 1000"));
            }
        }
        if self.horizon_ms == 0 {
            return Err("horizon_ms is 0; a move could never pay for itself".into());
        }
        if self.prior_hours == 0 {
            return Err("prior_hours is 0; it must be at least 1".into());
        }
        Ok(())
    }

    /// Interruptions of a market that are expected in 10^9 hours: the mean of the posterior, (1 + seen) / (prior + watched).
    fn rate(&self, facts: &Facts) -> u128 {
        let watched_ms = u128::from(self.prior_hours) * u128::from(HOUR_MS) + u128::from(facts.watched_ms);
        (1 + u128::from(facts.interruptions)) * u128::from(HOUR_MS) * GIGA / watched_ms
    }

    /// What is expected of a stay in a market from now on, where that is learned.
    fn outlook(&self, view: &View<'_>, facts: &Facts) -> Option<Outlook> {
        let is_used = self.belief == Belief::Learned && view.regime == Regime::Capacity && !facts.is_on_demand;
        let hazard = facts.hazard.filter(|_| is_used)?;
        Some(hazard.outlook(facts.up_ms, view.wall_ms, self.horizon_ms))
    }

    /// What interruptions of a market are expected to cost per hour, when one costs `cost`.
    fn risk_per_hour(&self, view: &View<'_>, facts: &Facts, cost: NanoUsd) -> NanoUsd {
        if facts.is_on_demand {
            return NanoUsd(0);
        }
        if let Some(outlook) = self.outlook(view, facts) {
            let per_hour = cost.0 as f64 * outlook.chance * HOUR_MS as f64 / outlook.stay_ms.max(1.0);
            return NanoUsd(per_hour as u64);
        }
        NanoUsd(u64::try_from(u128::from(cost.0) * self.rate(facts) / GIGA).unwrap_or(u64::MAX))
    }

    /// How long a guest is expected to stay in a market, at most the horizon.
    fn stay_ms(&self, view: &View<'_>, facts: &Facts) -> u64 {
        let horizon_ms = if view.regime == Regime::Auction { HOUR_MS } else { self.horizon_ms };
        if facts.is_on_demand || view.regime == Regime::Auction {
            return horizon_ms;
        }
        if let Some(outlook) = self.outlook(view, facts) {
            return outlook.stay_ms as u64;
        }
        let expected = u128::from(HOUR_MS) * GIGA / self.rate(facts).max(1);
        horizon_ms.min(u64::try_from(expected).unwrap_or(u64::MAX))
    }

    /// The market with the lowest price, among those that are open, not full and have been there for long enough: its
    /// interruptions and, spread over the time that the guest is expected to stay, the bytes of the way there included.
    /// The price that is returned is without the way.
    fn best<'v>(&self, view: &View<'v>, cost: NanoUsd, may_spot: bool) -> Option<(&'v Quote<u32>, NanoUsd)> {
        let here = view.place.map(|place| place.market);
        let mut best: Option<(&Quote<u32>, NanoUsd, NanoUsd)> = None;
        for quote in view.quotes {
            // Cheapest first: the rest only adds, so nothing further on can be better.
            if best.is_some_and(|(_, _, score)| score <= quote.price) {
                break;
            }
            let Some(facts) = view.facts.get(quote.market as usize) else { continue };
            let is_full = facts.crowd_permille >= self.max_pool_permille
                || (self.is_hedged() && facts.shared_permille >= self.max_shared_permille);
            let is_young = view.regime == Regime::Capacity && facts.up_ms.is_some_and(|up| up < self.patience_ms);
            let is_dear = view.regime == Regime::Auction && self.is_near_bid(quote, facts);
            let is_bad = !facts.is_on_demand && (is_full || is_young || is_dear || !may_spot);
            if !quote.is_open || Some(quote.market) == here || is_bad {
                continue;
            }
            let full = quote.price + self.risk_per_hour(view, facts, cost);
            let way = u128::from(view.egress(quote.market).0) * u128::from(HOUR_MS);
            let way = way / u128::from(self.stay_ms(view, facts).max(1));
            let score = full + NanoUsd(u64::try_from(way).unwrap_or(u64::MAX));
            if best.is_none_or(|(_, _, so_far)| score < so_far) {
                best = Some((quote, full, score));
            }
        }
        best.map(|(quote, full, _)| (quote, full))
    }

    /// What the way out costs at most when a host is taken: the bytes to another zone, or on-demand in the same zone until
    /// the capacity has been back for long enough, whichever is less.
    fn way_out(&self, view: &View<'_>, rent: NanoUsd) -> NanoUsd {
        let bytes = super::egress(view.guest);
        let on_demand = view.cheapest(|_, facts| facts.is_on_demand);
        let detour = on_demand.map(|quote| NanoUsd(quote.price.0.saturating_sub(rent.0)));
        detour.map_or(bytes, |more| bytes.min(more.per_hour_for(self.patience_ms.saturating_add(HOUR_MS))))
    }

    fn is_near_bid(&self, quote: &Quote<u32>, facts: &Facts) -> bool {
        u128::from(quote.price.0) * 1000 >= u128::from(facts.bid.0) * u128::from(self.near_bid_permille)
    }

    fn act(&self, view: &View<'_>, has_checkpoints: bool) -> (Action, Why) {
        let exit = view.exit(has_checkpoints);
        let downtime_ms = match exit {
            Exit::Live { downtime_ms, .. } | Exit::Frozen { downtime_ms, .. } => downtime_ms,
            Exit::Stranded { .. } => 0,
        };
        let worth = |ms: u64| {
            let worth = u128::from(self.downtime_nanousd_per_s) * u128::from(ms) / 1000;
            NanoUsd(u64::try_from(worth).unwrap_or(u64::MAX))
        };
        let downtime = worth(downtime_ms);
        // What one interruption costs: its downtime, the bytes of the way out, and two hosts for as long as it takes.
        let rent = view.quotes.first().map_or(NanoUsd(0), |quote| quote.price);
        let way = if view.regime == Regime::Capacity { self.way_out(view, rent) } else { NanoUsd(0) };
        let cost = downtime + way + rent.per_hour_for(view.move_ms());
        let may_spot = View { has_spare: false, ..*view }.exit(has_checkpoints).is_safe();
        let go = |found: Option<(&Quote<u32>, NanoUsd)>, why: Why| match found {
            Some((quote, _)) => (Action::Go(quote.market), why),
            None => (Action::Stay, Why::NoMarket),
        };
        let (Some(place), Some(here)) = (view.place.filter(|_| !view.is_leaving), view.here()) else {
            let why = if view.is_leaving { Why::Notice } else { Why::First };
            return go(self.best(view, cost, may_spot), why);
        };
        let Some(facts) = view.facts.get(here.market as usize) else { return (Action::Stay, Why::NoMarket) };
        if !may_spot && !facts.is_on_demand {
            return go(self.best(view, cost, false), Why::NotEvacuable);
        }
        let is_auction = view.regime == Regime::Auction;
        if is_auction && !facts.is_on_demand && self.is_near_bid(here, facts) {
            return go(self.best(view, cost, true), Why::NearBid);
        }
        if is_auction {
            // The last look at which the move still ends within the paid hour; a move longer than the hour never fits.
            let move_ms = view.move_ms();
            let fits_later = place.hour_left_ms > view.look_ms && place.hour_left_ms - view.look_ms >= move_ms;
            if fits_later {
                return (Action::Stay, Why::PaidHour);
            }
        }
        let moved_ms = place.last_move_ms.map(|at| view.now_ms.saturating_sub(at));
        if !is_auction && moved_ms.is_some_and(|ms| ms < self.cool_down_ms) {
            return (Action::Stay, Why::CoolDown);
        }
        let Some((best, full)) = self.best(view, cost, may_spot) else { return (Action::Stay, Why::Content) };
        let here_full = here.price + self.risk_per_hour(view, facts, cost);
        let saving = here_full.0.saturating_sub(full.0);
        if u128::from(saving) * 1000 < u128::from(here_full.0) * u128::from(self.min_saving_permille) || saving == 0 {
            return (Action::Stay, Why::Content);
        }
        if view.now_ms.saturating_sub(best.since_ms) < self.settle_ms {
            return (Action::Stay, Why::NotSettled);
        }
        let horizon_ms = view.facts.get(best.market as usize).map_or(0, |facts| self.stay_ms(view, facts));
        // The new rent begins while the old still runs: with paid hours that part of the new hour is lost.
        let early = if is_auction { best.price.per_hour_for(view.move_ms()) } else { NanoUsd(0) };
        let pause = evacuable::predict(&view.guest.load, &view.guest.path).map_or(0, |live| live.downtime_ms);
        let pause = worth(pause);
        if NanoUsd(saving).per_hour_for(horizon_ms) <= view.move_cost(best.market) + early + pause {
            return (Action::Stay, Why::Content);
        }
        (Action::Go(best.market), Why::Saving)
    }
}

impl Policy for SmartSpot {
    fn name(&self) -> &'static str {
        "smart-spot"
    }

    fn decide(&self, view: &View<'_>) -> Plan {
        // Others may take the spare host at the same moment: what must be safe is safe without it.
        let alone = View { has_spare: false, ..*view };
        let has_checkpoints = !matches!(alone.exit(false), Exit::Live { .. });
        let (action, reason) = self.act(view, has_checkpoints);
        Plan { action, has_checkpoints, reason }
    }

    fn is_hedged(&self) -> bool {
        self.max_shared_permille < 1000
    }

    fn guests_per_spare(&self, notice_ms: u64, host_ready_ms: u64) -> u32 {
        if notice_ms < host_ready_ms { self.guests_per_spare } else { 0 }
    }
}
