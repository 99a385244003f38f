//! Markets and prices, read-only in this API: what can be rented, and for how much.

use serde::{Deserialize, Serialize};
use supercloud_ids::CloudId;
use utoipa::ToSchema;

use crate::Name;

/// How a thing is rented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Tenure {
    /// Until the provider wants it back.
    Spot,
    /// For as long as it is paid.
    OnDemand,
}

/// One thing that can be rented, with its price now. Money is integer nano-dollars.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Market {
    /// `<cloud>/<instance type>/<spot|on_demand>`.
    pub name: String,
    /// The cloud.
    pub cloud: CloudId,
    /// The cloud's name.
    pub cloud_name: Name,
    /// The instance type.
    pub instance_type: String,
    /// How it is rented.
    pub tenure: Tenure,
    /// The price now.
    pub price_nanousd_per_hour: u64,
    /// The on-demand price of the same thing, if known.
    pub on_demand_nanousd_per_hour: Option<u64>,
    /// The feed's time at which this price began to hold (not wall time when a recorded feed is replayed).
    pub feed_time_ms: u64,
    /// The feed's time now.
    pub feed_now_ms: u64,
    /// What befell our own rentings there; absent: nothing was rented there yet, so nothing is known, or the asker sees one
    /// project only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<MarketSeen>,
}

/// What was seen of a market: our own rentings there, those that ended too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MarketSeen {
    /// Machines that were rented there.
    pub machines: u32,
    /// How long they were there, together, in milliseconds.
    pub ran_ms: u64,
    /// Of them, those that the provider took.
    pub taken: u32,
    /// Those that are there now and that the provider has said it takes back, or may.
    pub announced: u32,
}

/// One step of a price series: the price holds until the next point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PricePoint {
    /// The feed's time.
    pub feed_time_ms: u64,
    /// The price from then on.
    pub price_nanousd_per_hour: u64,
}

/// The prices of a market up to now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PriceSeries {
    /// The market's name.
    pub market: String,
    /// The feed's time now.
    pub feed_now_ms: u64,
    /// Points, oldest first.
    pub points: Vec<PricePoint>,
}

/// Sets the clock of a replayed price feed; it never goes back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedClock {
    /// The feed's time from now on; as it is when absent.
    #[serde(default)]
    pub feed_now_ms: Option<u64>,
    /// Feed milliseconds per millisecond, 0 to 1,000,000; as it is when absent. 0 holds the clock.
    #[serde(default)]
    pub speed: Option<f64>,
}
