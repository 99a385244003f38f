//! Follow the sun: a guest whose clients ask from different places at different times is where most of them are, and goes there
//! before they come.
//!
//! ## The objective
//! The latency that no more than one in twenty requests of the coming day exceeds (p95), over all places, requests that
//! wait for a switch included. Of all itineraries of the day within the bounds, one is taken that brings it down to `target_p95_ms`,
//! or as far as is possible, with the fewest moves; where that is above the target, more moves that keep it are made for a lower
//! mean. The lowest p95 is found exactly, for what is forecast: a p95 of at most `t` means that the requests slower than `t` are at most a
//! twentieth, and these add up over time, so that dynamic programming over (slot, cloud, moves so far) finds the least; and
//! only latencies that occur can be the smallest `t`.
//!
//! ## The bounds
//! Moves cost at most `max_moves_nanousd_per_day` in any 24 hours; a cloud is gone to only while its rent is at most
//! `max_price_permille` of the cheapest open one's. A day with moves must have a p95, or a mean, that is lower by
//! `min_gain_permille` than that of the best itinerary with fewer, or nothing moves for it.

mod demand;
mod itinerary;
pub mod replay;

use serde::{Deserialize, Serialize};

pub use demand::{Demand, DemandError, MOST_PLACES, MOST_SLOTS};

use crate::money::NanoUsd;

/// Milliseconds in a day: how far it is looked ahead, and over what moves are bounded.
pub const DAY_MS: u64 = 86_400_000;
/// The most clouds that a guest may follow the sun over.
pub const MOST_CLOUDS: usize = 16;
/// The most moves in a day, whatever they cost.
pub const MOST_MOVES: u32 = 24;

/// The settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FollowTheSun {
    /// The latency that is good enough, in milliseconds: at most one request in twenty may take longer. 0: as low as can be.
    pub target_p95_ms: u32,
    /// The most that the moves of a guest may cost in any 24 hours, in nano-dollars.
    pub max_moves_nanousd_per_day: u64,
    /// The most moves of a guest in any 24 hours.
    pub max_moves_per_day: u32,
    /// How dear a cloud may be, in thousandths of the cheapest open one's price (1000: only the cheapest).
    pub max_price_permille: u32,
    /// By how much the p95 of the day, or its mean latency, must fall for more moves to be worth it, in thousandths.
    pub min_gain_permille: u32,
}

impl Default for FollowTheSun {
    fn default() -> Self {
        Self {
            target_p95_ms: 0,
            max_moves_nanousd_per_day: 1_000_000_000,
            max_moves_per_day: 4,
            max_price_permille: 2000,
            min_gain_permille: 100,
        }
    }
}

impl FollowTheSun {
    /// What is wrong with the settings, if anything.
    ///
    /// # Errors
    /// A sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        for (field, value, least, most) in [
            ("target_p95_ms", self.target_p95_ms, 0, 60_000),
            ("max_moves_per_day", self.max_moves_per_day, 1, MOST_MOVES),
            ("max_price_permille", self.max_price_permille, 1000, 1_000_000),
            ("min_gain_permille", self.min_gain_permille, 1, 1000),
        ] {
            if !(least..=most).contains(&value) {
                return Err(format!("{field} is {value}; it must be {least} to {most}"));
            }
        }
        Ok(())
    }
}

/// A cloud as this policy sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudView {
    /// The guest could be there now.
    pub is_open: bool,
    /// The rent per hour.
    pub price: NanoUsd,
    /// What a move of the guest there costs.
    pub move_cost: NanoUsd,
    /// How long a request and its answer are under way to it from each place, in milliseconds.
    pub latency_ms: Vec<u32>,
}

/// What the policy sees of one guest.
#[derive(Debug, Clone, Copy)]
pub struct SunView<'a> {
    /// Now, on the clock of the demand.
    pub now_ms: u64,
    /// What was counted.
    pub demand: &'a Demand,
    /// Its period, see [`Demand::period`]; learned by the caller, because it changes slowly and takes long.
    pub period: Option<usize>,
    /// The clouds.
    pub clouds: &'a [CloudView],
    /// In which of them the guest is.
    pub here: usize,
    /// How long a move takes, in milliseconds: it is begun as much earlier.
    pub move_ms: u64,
    /// How long the guest stands still in a switch, in milliseconds.
    pub pause_ms: u64,
    /// The moves that this policy made, when and at what cost; those of the last 24 hours count.
    pub moves: &'a [(u64, NanoUsd)],
}

/// Why a guest goes or stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
pub enum SunWhy {
    /// Its clients are, or will be, there.
    #[error("its clients of the coming hours are nearer there")]
    Nearer,
    /// The best that can be had.
    #[error("no itinerary of the coming day is better by enough")]
    Content,
    /// Something better is planned for later.
    #[error("a move is planned for later in the day")]
    Later,
    /// The bound on moves.
    #[error("the bound on moves in 24 hours is reached")]
    Bound,
    /// Nothing was counted.
    #[error("nothing is known of its clients")]
    NoDemand,
    /// The view does not fit together.
    #[error("its cloud or a latency is missing in the settings")]
    Incomplete,
}

/// What to do with a guest, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SunPlan {
    /// Begin a move to this cloud now.
    pub to: Option<usize>,
    /// Why.
    pub reason: SunWhy,
    /// The p95 of the coming day if it stayed where it is, in milliseconds, as forecast.
    pub fixed_p95_ms: u32,
    /// The p95 with the itinerary that was found, in milliseconds, as forecast.
    pub planned_p95_ms: u32,
    /// How many moves that has.
    pub planned_moves: u32,
}

impl SunPlan {
    fn stay(reason: SunWhy) -> Self {
        Self { to: None, reason, fixed_p95_ms: 0, planned_p95_ms: 0, planned_moves: 0 }
    }
}

impl FollowTheSun {
    /// What to do with one guest now. The same view gives the same plan.
    #[must_use]
    pub fn decide(&self, view: &SunView<'_>) -> SunPlan {
        let places = view.demand.places();
        let is_whole = view.here < view.clouds.len()
            && view.clouds.len() <= MOST_CLOUDS
            && view.clouds.iter().all(|cloud| cloud.latency_ms.len() == places);
        if !is_whole {
            return SunPlan::stay(SunWhy::Incomplete);
        }
        let slot_ms = view.demand.slot_ms();
        // What is decided now holds from the end of the move on; until the next look, a slot later, nothing can be done.
        let lead_ms = view.move_ms.saturating_add(slot_ms - 1) / slot_ms * slot_ms;
        let from_ms = view.now_ms.saturating_add(lead_ms);
        let slots = (DAY_MS / slot_ms) as usize;
        let expected = view.demand.forecast(view.period, from_ms, slots);
        if expected.iter().flatten().sum::<f64>() <= 0.0 {
            return SunPlan::stay(SunWhy::NoDemand);
        }
        let may = self.eligible(view);
        let allowed: Vec<u32> = (0..slots as u64).map(|slot| self.allowed(view, slot * slot_ms)).collect();
        let days = itinerary::Days {
            expected: &expected,
            clouds: view.clouds,
            may: &may,
            here: view.here,
            allowed: &allowed,
            pause: (view.pause_ms, slot_ms),
        };
        let Some(best) = itinerary::find(&days, self.target_p95_ms, self.min_gain_permille) else {
            return SunPlan::stay(SunWhy::Incomplete);
        };
        let fixed = best.fixed_p95_ms;
        let plan = |to, reason| SunPlan {
            to,
            reason,
            fixed_p95_ms: fixed,
            planned_p95_ms: best.p95_ms,
            planned_moves: best.moves,
        };
        match best.first {
            Some(to) if to != view.here => plan(Some(to), SunWhy::Nearer),
            _ if best.moves > 0 => plan(None, SunWhy::Later),
            _ if allowed.iter().all(|moves| *moves == 0) => plan(None, SunWhy::Bound),
            _ => plan(None, SunWhy::Content),
        }
    }

    /// Which clouds may be gone to: open, and not too dear.
    fn eligible(&self, view: &SunView<'_>) -> Vec<bool> {
        let open = view.clouds.iter().enumerate().filter(|(i, cloud)| cloud.is_open || *i == view.here);
        let cheapest = open.map(|(_, cloud)| cloud.price).min().unwrap_or_default();
        let most = u128::from(cheapest.0) * u128::from(self.max_price_permille);
        let may = |cloud: &CloudView| cloud.is_open && u128::from(cloud.price.0) * 1000 <= most;
        view.clouds.iter().map(may).collect()
    }

    /// How many moves may be planned up to `later_ms` from now: what the bounds leave, those moves taken off that will still be
    /// within their 24 hours then. A planned move is taken to cost what the dearest would.
    fn allowed(&self, view: &SunView<'_>, later_ms: u64) -> u32 {
        let at_ms = view.now_ms.saturating_add(later_ms);
        let recent = view.moves.iter().filter(|(made_ms, _)| made_ms.saturating_add(DAY_MS) > at_ms);
        let (count, paid) = recent.fold((0u32, NanoUsd(0)), |(count, paid), (_, cost)| (count + 1, paid + *cost));
        let dearest = view.clouds.iter().map(|cloud| cloud.move_cost.0).max().unwrap_or(0);
        let left = self.max_moves_nanousd_per_day.saturating_sub(paid.0);
        let by_money = left.checked_div(dearest).map_or(MOST_MOVES, |moves| u32::try_from(moves).unwrap_or(MOST_MOVES));
        self.max_moves_per_day.saturating_sub(count).min(by_money).min(MOST_MOVES)
    }
}

#[cfg(test)]
mod tests;
