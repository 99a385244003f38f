//! Policies tried on a generated market.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A policy that can be tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SimulatedKind {
    /// What the controller's own policy is: price, risk, notice and downtime are weighed.
    SmartSpot,
    /// The same, spread thinly over pools and with spare hosts.
    SmartSpotSpares,
    /// The cheapest market, with hysteresis.
    Cheapest,
    /// The cheapest market at every moment.
    Greedy,
}

/// A policy with its settings; those that are absent are as they ship, those that its kind does not have are refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SimulatedPolicy {
    /// Which.
    pub kind: SimulatedKind,
    /// How much cheaper another market must be, in thousandths of the present price.
    #[serde(default)]
    pub min_saving_permille: Option<u32>,
    /// The time in which a move must pay for itself, in milliseconds.
    #[serde(default)]
    pub horizon_ms: Option<u64>,
    /// The least time between two moves of a guest that save money, in milliseconds.
    #[serde(default)]
    pub cool_down_ms: Option<u64>,
    /// How long a price must have held before it is moved to, in milliseconds.
    #[serde(default)]
    pub settle_ms: Option<u64>,
    /// The largest share of the fleet in one pool, in thousandths.
    #[serde(default)]
    pub max_pool_permille: Option<u32>,
    /// For how many guests one spare host is kept ready; 0: none.
    #[serde(default)]
    pub guests_per_spare: Option<u32>,
}

/// Asks for a replay of a generated market. The same request has the same answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SimulationCreate {
    /// One or two policies.
    pub policies: Vec<SimulatedPolicy>,
    /// How long, in days, 1 to 58; 28 when absent.
    #[serde(default)]
    pub days: Option<u32>,
    /// What draws prices and interruptions; 12 when absent.
    #[serde(default)]
    pub seed: Option<u64>,
    /// A pool is taken once in so many hours, on average, 1 to 1000; absent: never.
    #[serde(default)]
    pub interruption_hours: Option<u32>,
    /// How long before it takes a host the provider says so, in seconds, at most 3600; 120 when absent.
    #[serde(default)]
    pub notice_s: Option<u32>,
}

/// What came of one policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SimulatedOutcome {
    /// The policy, or the baseline.
    pub policy: String,
    /// What was paid.
    pub paid_nanousd: u64,
    /// What was paid by the end of each day: by the beginning of rented hours.
    pub paid_by_day_nanousd: Vec<u64>,
    /// The share of guest time that was served; absent where no interruptions were modelled.
    pub availability: Option<f64>,
    /// How often a guest's host was taken.
    pub interruptions: u64,
    /// How often a guest had not left in time.
    pub missed: u64,
    /// Moves that the policy wanted by itself.
    pub moves: u64,
    /// How often each reason led to a change of hosts.
    pub changes_by_reason: BTreeMap<String, u64>,
}

/// Policies on one generated market, side by side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Simulation {
    /// Guests of the fleet that ships: 1 to 64 GiB.
    pub guests: u32,
    /// Spot markets of the generated trace.
    pub spot_markets: u32,
    /// How long, in hours.
    pub hours: u64,
    /// What drew it.
    pub seed: u64,
    /// The policies, in the order in which they were asked for.
    pub outcomes: Vec<SimulatedOutcome>,
    /// The same fleet on demand.
    pub on_demand: SimulatedOutcome,
    /// What is known of how this was made up; a sentence each.
    pub notes: Vec<String>,
}
