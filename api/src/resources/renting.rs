//! Rentings: hosts that a provider was asked for, from the durable order to the confirmed end.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, HostId, OperationId, RentingId};
use utoipa::ToSchema;

use crate::{Name, Problem, Tenure};

/// Where a renting is. It only goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RentingState {
    /// The order is durable; the provider has not been asked.
    Recorded,
    /// The provider was, or is being, asked; what came of it may not be known.
    Asked,
    /// There is a machine; its agent has not joined yet.
    Launched,
    /// Its agent has joined: it is a host.
    Up,
    /// It is being given back.
    Returning,
    /// It costs nothing any more, or never did.
    Ended,
}

/// How a renting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RentingEnd {
    /// The provider did not take the order.
    Refused,
    /// It was given back.
    Returned,
    /// Its agent did not join in time, so it was given back.
    NeverJoined,
    /// The provider took it.
    Taken,
}

/// A rented host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Renting {
    /// Its id, which is also the order's token at the provider.
    pub id: RentingId,
    /// The cloud in which it is rented.
    pub cloud: CloudId,
    /// The cloud's name.
    pub cloud_name: Name,
    /// The provider, as the controller's settings name it.
    pub provider: String,
    /// The id that the host has, or will have when it joins.
    pub host: HostId,
    /// The name that the host has, or will have.
    pub host_name: Name,
    /// What is rented.
    pub instance_type: String,
    /// How.
    pub tenure: Tenure,
    /// The most that is paid per hour on a spot market.
    pub max_price_nanousd_per_hour: Option<u64>,
    /// Where it is.
    pub state: RentingState,
    /// How it ended.
    pub end: Option<RentingEnd>,
    /// The provider's name for the machine, once it is known.
    pub instance: Option<String>,
    /// The machine's address, where the provider tells.
    pub address: Option<String>,
    /// Nothing is launched: somebody starts the agent there, see `POST /v1/rentings/{renting}/join-token`.
    pub is_started_by_hand: bool,
    /// It is to be given back, and will have ended so.
    pub ending_as: Option<RentingEnd>,
    /// What the provider, or we, found wrong last.
    pub error: Option<Problem>,
    /// The operation that rents it.
    pub rent_operation: OperationId,
    /// The operation that gives it back.
    pub return_operation: Option<OperationId>,
    /// When the order was recorded.
    pub created_at_ms: u64,
    /// When it was known that there is a machine.
    pub launched_at_ms: Option<u64>,
    /// When its agent joined.
    pub up_at_ms: Option<u64>,
    /// When it was known to cost nothing any more.
    pub ended_at_ms: Option<u64>,
}

/// Asks for a host to be rented.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostRent {
    /// The name that the host will have.
    pub host_name: Name,
    /// What to rent, in the provider's words.
    pub instance_type: String,
    /// How.
    #[serde(default = "on_demand")]
    pub tenure: Tenure,
    /// The most to pay per hour on a spot market; the provider's own limit when absent.
    #[serde(default)]
    pub max_price_nanousd_per_hour: Option<u64>,
}

const fn on_demand() -> Tenure {
    Tenure::OnDemand
}
