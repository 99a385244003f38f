//! Recorded markets on a grid of ticks.

use super::hazard::{CapacityRuns, Followed};
use crate::{
    market::{HOUR_MS, InstanceType, Regime, Trace},
    money::NanoUsd,
};

/// A market on the grid.
#[derive(Debug, Clone, PartialEq)]
pub struct GridMarket {
    /// `zone/type/spot`, or `any/type/on_demand`.
    pub name: String,
    /// The zone's number; `None` for on-demand, which is in every zone.
    pub zone: Option<u32>,
    /// What is rented.
    pub instance: InstanceType,
    /// The highest price that is paid.
    pub bid: NanoUsd,
    /// The price in each tick; meaningless before `first_tick`. One entry for on-demand.
    price: Vec<NanoUsd>,
    /// A host here is taken at the start of this tick. Empty: never.
    taken: Vec<bool>,
    /// From when on the price is known.
    pub first_tick: usize,
}

impl GridMarket {
    /// It is on-demand.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        self.zone.is_none()
    }

    /// The price in a tick; the last known one after the end.
    #[must_use]
    pub fn price(&self, tick: usize) -> NanoUsd {
        self.price[tick.min(self.price.len() - 1)]
    }

    /// A host that was here in the tick before is taken at the start of this one.
    #[must_use]
    pub fn is_taken(&self, tick: usize) -> bool {
        self.taken.get(tick).copied().unwrap_or(false)
    }

    /// A host can be rented in this tick.
    #[must_use]
    pub fn is_open(&self, tick: usize) -> bool {
        tick >= self.first_tick && self.price(tick) <= self.bid && !self.is_taken(tick)
    }
}

/// Why a trace cannot be replayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GridError {
    /// The ticks do not divide an hour.
    #[error("a tick of {0} ms does not divide an hour, or is shorter than a minute")]
    Tick(u64),
    /// Nothing to replay.
    #[error("the trace has no prices in the time that was asked for")]
    Empty,
    /// More than fits in memory.
    #[error("{markets} markets over {ticks} ticks are too many; ask for a shorter time or longer ticks")]
    TooLarge {
        /// Markets.
        markets: usize,
        /// Ticks.
        ticks: u64,
    },
}

/// The most prices that a grid may hold.
const MAX_CELLS: u64 = 1 << 27;

/// Recorded markets on a grid.
#[derive(Debug, Clone)]
pub struct Grid {
    /// How the markets work.
    pub regime: Regime,
    /// When the replay starts: milliseconds since 1970.
    pub start_ms: u64,
    /// The length of a tick.
    pub tick_ms: u64,
    /// How many ticks there are.
    pub ticks: usize,
    /// The markets: the spot markets of the trace, then on-demand of each type.
    pub markets: Vec<GridMarket>,
    /// Interruptions are part of it: auction prices, or a hazard was drawn.
    pub has_interruptions: bool,
}

impl Grid {
    /// Puts `trace` on a grid from `from_ms` to `to_ms` (rounded inwards to whole hours). Bids are `bid_permille` of on-demand.
    /// With `capacity`, interruptions of the capacity regime are drawn with that seed.
    ///
    /// # Errors
    /// See [`GridError`].
    pub fn new(
        trace: &Trace,
        (from_ms, to_ms): (u64, u64),
        tick_ms: u64,
        bid_permille: u32,
        capacity: Option<(&CapacityRuns, u64)>,
    ) -> Result<Self, GridError> {
        if tick_ms < 60_000 || !HOUR_MS.is_multiple_of(tick_ms) {
            return Err(GridError::Tick(tick_ms));
        }
        let start_ms = from_ms.div_ceil(HOUR_MS) * HOUR_MS;
        let hours = (to_ms / HOUR_MS).saturating_sub(start_ms / HOUR_MS);
        let ticks_u64 = hours.saturating_mul(HOUR_MS / tick_ms);
        let markets = trace.series.len();
        if ticks_u64.saturating_mul(markets as u64) > MAX_CELLS {
            return Err(GridError::TooLarge { markets, ticks: ticks_u64 });
        }
        let ticks = ticks_u64 as usize;
        if ticks == 0 || trace.series.iter().all(|series| series.points.is_empty()) {
            return Err(GridError::Empty);
        }
        let mut zones: Vec<&str> = trace.series.iter().map(|series| series.zone.as_str()).collect();
        zones.sort_unstable();
        zones.dedup();
        let mut grid = Vec::with_capacity(markets * 2);
        for series in trace.series.iter().filter(|series| !series.points.is_empty()) {
            let name = format!("{}/{}/spot", series.zone, series.instance.name);
            let on_demand = u128::from(series.instance.on_demand.0);
            let bid = NanoUsd((on_demand * u128::from(bid_permille) / 1000) as u64);
            let (mut price, mut taken) = (Vec::with_capacity(ticks), Vec::new());
            let mut next = 0;
            let mut first_tick = ticks;
            let mut now = NanoUsd(u64::MAX);
            let mut is_passed = false;
            for tick in 0..ticks {
                let at_ms = start_ms + tick as u64 * tick_ms;
                // Changes within the tick before this one; one at the very start of a tick belongs to that tick.
                while let Some(point) = series.points.get(next).filter(|point| point.at_ms <= at_ms) {
                    now = point.price;
                    // A step at the very start of this tick is seen by the look at its start: open or not.
                    is_passed |= now > bid;
                    next += 1;
                }
                if next > 0 {
                    first_tick = first_tick.min(tick);
                }
                price.push(now);
                if trace.regime == Regime::Auction {
                    taken.push(is_passed && tick > 0);
                    is_passed = now > bid;
                }
            }
            if trace.regime == Regime::Capacity
                && let Some((runs, seed)) = capacity
            {
                taken = runs.draw(seed, &name, ticks, tick_ms).into_iter().map(|is_up| !is_up).collect();
            }
            let zone = zones.binary_search(&series.zone.as_str()).ok().map(|zone| zone as u32);
            // In the capacity regime no bid is too low.
            let bid = if trace.regime == Regime::Auction { bid } else { NanoUsd(u64::MAX - 1) };
            grid.push(GridMarket { name, zone, instance: series.instance.clone(), bid, price, taken, first_tick });
        }
        let mut types: Vec<&InstanceType> = trace.series.iter().map(|series| &series.instance).collect();
        types.sort_by(|a, b| a.name.cmp(&b.name));
        types.dedup();
        grid.extend(types.into_iter().map(|instance| GridMarket {
            name: format!("any/{}/on_demand", instance.name),
            zone: None,
            instance: instance.clone(),
            bid: NanoUsd(u64::MAX - 1),
            price: vec![instance.on_demand],
            taken: Vec::new(),
            first_tick: 0,
        }));
        let has_interruptions = trace.regime == Regime::Auction || capacity.is_some();
        Ok(Self { regime: trace.regime, start_ms, tick_ms, ticks, markets: grid, has_interruptions })
    }

    /// Has interruptions of the capacity regime come as they were recorded, instead of drawn ones; in the auction regime prices
    /// alone take hosts, and nothing changes.
    pub fn follow(&mut self, recorded: &Followed, seed: u64) {
        if self.regime != Regime::Capacity || !recorded.is_usable() {
            return;
        }
        self.has_interruptions = true;
        let (ticks, tick_ms) = (self.ticks, self.tick_ms);
        for market in self.markets.iter_mut().filter(|market| !market.is_on_demand()) {
            let zone = market.name.split('/').next().unwrap_or_default();
            let there = recorded.capacity(seed, &market.name, zone, ticks, tick_ms);
            market.taken = there.into_iter().map(|is_up| !is_up).collect();
        }
    }

    /// How long the replay is, in milliseconds.
    #[must_use]
    pub fn length_ms(&self) -> u64 {
        self.ticks as u64 * self.tick_ms
    }

    /// A plan is checked like any input: only an open market that fits, and not the one that the guest is in.
    pub(super) fn may_enter(&self, to: u32, tick: usize, fits: &[bool], here: Option<u32>) -> bool {
        fits.get(to as usize) == Some(&true) && self.markets[to as usize].is_open(tick) && here != Some(to)
    }

    /// The markets whose instances hold a guest of this size: all spot ones, and the cheapest on-demand one.
    #[must_use]
    pub fn fitting(&self, vcpus: u32, memory_bytes: u64) -> Vec<u32> {
        let fits = |market: &GridMarket| market.instance.vcpus >= vcpus && market.instance.memory_bytes >= memory_bytes;
        let cheapest = (self.markets.iter().enumerate())
            .filter(|(_, market)| market.is_on_demand() && fits(market))
            .min_by_key(|(_, market)| market.instance.on_demand)
            .map(|(id, _)| id);
        (self.markets.iter().enumerate())
            .filter(|(id, market)| fits(market) && (!market.is_on_demand() || Some(*id) == cheapest))
            .map(|(id, _)| id as u32)
            .collect()
    }
}
