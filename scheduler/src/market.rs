//! Markets: what can be rented, how it is billed, and what its price was.
//!
//! Two regimes are real. In the **auction** era (2009 to 2017) a spot price could pass on-demand, a bid below it ended the
//! instance, time was billed by started hours, and an hour that the provider cut short was free. In the **capacity**
//! regime of today prices are smooth and capped by on-demand, time is billed by the second after a minimum, and
//! interruptions come from capacity, whatever one is willing to pay. In both, the price of a running instance is set at
//! the start of each of its instance-hours.

use serde::{Deserialize, Serialize};

use crate::money::NanoUsd;

/// Milliseconds in an hour.
pub const HOUR_MS: u64 = 3_600_000;
/// The least time that is billed by the second, in the capacity regime.
pub const LEAST_BILLED_MS: u64 = 60_000;

/// How spot markets work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Regime {
    /// By bids and started hours.
    Auction,
    /// By capacity and seconds.
    Capacity,
}

/// How a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The tenant gave it back.
    Returned,
    /// The provider took it.
    Taken,
}

impl Regime {
    /// What an instance-hour costs of which `used_ms` (at most an hour) were used, at the price of its start. Rounded
    /// once.
    #[must_use]
    pub fn bill(self, price: NanoUsd, used_ms: u64, is_on_demand: bool, is_first: bool, end: Option<End>) -> NanoUsd {
        let used_ms = used_ms.min(HOUR_MS);
        match self {
            _ if used_ms == 0 => NanoUsd(0),
            Regime::Auction if end == Some(End::Taken) && used_ms < HOUR_MS && !is_on_demand => NanoUsd(0),
            Regime::Auction => price,
            Regime::Capacity if is_first => price.per_hour_for(used_ms.max(LEAST_BILLED_MS)),
            Regime::Capacity => price.per_hour_for(used_ms),
        }
    }
}

/// An instance type with its list price.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceType {
    /// Its name, for example `m5.xlarge`.
    pub name: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The on-demand price per hour.
    pub on_demand: NanoUsd,
}

/// A price that holds from a time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PricePoint {
    /// From when: milliseconds since 1970, UTC, or of a feed's own clock.
    pub at_ms: u64,
    /// The price per hour.
    pub price: NanoUsd,
}

/// A spot market's recorded prices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpotSeries {
    /// The zone.
    pub zone: String,
    /// What is rented.
    pub instance: InstanceType,
    /// The prices, by time.
    pub points: Vec<PricePoint>,
}

/// Recorded markets of one regime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// How the markets work.
    pub regime: Regime,
    /// The spot markets, by zone and type.
    pub series: Vec<SpotSeries>,
}

impl Trace {
    /// The first and the last time at which a price changed.
    #[must_use]
    pub fn span(&self) -> Option<(u64, u64)> {
        let points = || self.series.iter().flat_map(|series| series.points.iter().map(|point| point.at_ms));
        Some((points().min()?, points().max()?))
    }

    /// Which regime the prices themselves show: a capacity market's price never passes on-demand.
    #[must_use]
    pub fn guess_regime(series: &[SpotSeries]) -> Regime {
        let is_above = |series: &SpotSeries| series.points.iter().any(|point| point.price > series.instance.on_demand);
        if series.iter().any(is_above) { Regime::Auction } else { Regime::Capacity }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hours_are_billed_as_each_regime_says() {
        let hour = NanoUsd(3_600_000);
        let auction = |ms, end| Regime::Auction.bill(hour, ms, false, false, end);
        assert_eq!(auction(1, Some(End::Returned)), hour, "a started hour is a whole one");
        assert_eq!(auction(HOUR_MS - 1, Some(End::Taken)), NanoUsd(0), "an hour cut short by the provider is free");
        assert_eq!(auction(HOUR_MS, None), hour);
        assert_eq!(Regime::Auction.bill(hour, 1, true, false, Some(End::Taken)), hour, "on-demand is never free");
        let capacity = |ms, is_first| Regime::Capacity.bill(hour, ms, false, is_first, Some(End::Taken));
        assert_eq!(capacity(1, true), NanoUsd(60_000), "a minute at least");
        assert_eq!(capacity(1, false), NanoUsd(1));
        assert_eq!(capacity(0, true), NanoUsd(0));
        assert_eq!(capacity(HOUR_MS + 5, false), hour);
    }
}
