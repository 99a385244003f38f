//! What drivers and the controller tell each other: plain data.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use supercloud_api::Tenure;
use supercloud_scheduler::money::NanoUsd;

/// What a provider can do at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// It starts machines by itself; else somebody starts the agent on a machine that stands there already, and
    /// [`crate::Provider::instances`] tells nothing.
    pub launches: bool,
    /// It has a spot market.
    pub spot: bool,
}

/// Whether virtual machines can run with hardware help inside an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nesting {
    /// Always: a machine without a hypervisor of the provider, or one that offers it by default.
    Always,
    /// When it is asked for at launch.
    OnRequest,
    /// No.
    Never,
    /// The provider does not tell; the host's probe will measure it.
    Unknown,
}

/// What can be rented.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceType {
    /// Its name.
    pub name: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// The CPU, as far as the provider tells (manufacturer and sustained clock).
    pub cpu: Option<String>,
    /// Whether guests get hardware help.
    pub nesting: Nesting,
    /// It can be had on a spot market.
    pub spot: bool,
}

/// What fails together with an instance, from wide to narrow; `None`: not known.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FaultDomains {
    /// The provider.
    pub provider: String,
    /// Its region.
    pub region: Option<String>,
    /// Its zone.
    pub zone: Option<String>,
    /// The pool that is reclaimed as a whole.
    pub pool: Option<String>,
    /// The build of the operating system.
    pub build: Option<String>,
}

/// Which spot prices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PriceQuery {
    /// Of these types; all when empty.
    pub instance_types: Vec<String>,
    /// From this time on (Unix, ms).
    pub from_ms: u64,
    /// Up to this time.
    pub to_ms: u64,
}

/// A price that holds from a time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PricePoint {
    /// Since when (Unix, ms).
    pub at_ms: u64,
    /// Per hour.
    pub per_hour: NanoUsd,
}

/// The spot prices of a type in a zone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Series {
    /// The type.
    pub instance_type: String,
    /// The zone.
    pub zone: String,
    /// Oldest first, one per time.
    pub points: Vec<PricePoint>,
}

/// An order for one host.
#[derive(Clone, PartialEq, Eq)]
pub struct LaunchOrder {
    /// Names this order for ever: at most 64 printable ASCII characters.
    pub token: String,
    /// Whose it is: the controller's fingerprint.
    pub owner: String,
    /// The host's name, for people.
    pub name: String,
    /// What is rented.
    pub instance_type: String,
    /// How.
    pub tenure: Tenure,
    /// What is paid per hour at most, on a spot market; its own limit (on-demand) when absent.
    pub max_price: Option<NanoUsd>,
    /// What the machine does at its first boot; holds the join token.
    pub user_data: String,
    /// Machines that other orders hold, where machines are not launched but chosen.
    pub taken: Vec<String>,
}

/// Without the user-data, which holds a secret.
impl std::fmt::Debug for LaunchOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaunchOrder")
            .field("token", &self.token)
            .field("name", &self.name)
            .field("instance_type", &self.instance_type)
            .field("tenure", &self.tenure)
            .field("max_price", &self.max_price)
            .finish_non_exhaustive()
    }
}

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstanceState {
    /// It was taken on and does not run yet.
    Starting,
    /// It runs.
    Running,
    /// It is ending, or stopped; it comes back only by the provider's hand.
    Ending,
    /// It is gone and costs nothing.
    Gone,
}

impl InstanceState {
    /// Whether it may still cost money.
    #[must_use]
    pub const fn may_cost(self) -> bool {
        !matches!(self, Self::Gone)
    }
}

/// A machine at a provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// The provider's name for it.
    pub id: String,
    /// The token of the order that made it.
    pub token: String,
    /// Where it is in its life.
    pub state: InstanceState,
    /// What it is.
    pub instance_type: String,
    /// How it is rented.
    pub tenure: Tenure,
    /// Its address, when it has one and the provider tells.
    pub address: Option<IpAddr>,
    /// When it was launched (Unix, ms), where the provider tells.
    pub launched_at_ms: Option<u64>,
    /// What fails together with it.
    pub domains: FaultDomains,
}

/// What a provider announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoticeKind {
    /// It is taken at this time (Unix, ms), or soon when no time is told.
    Interruption {
        /// When.
        at_ms: Option<u64>,
    },
    /// It is likelier than others to be taken.
    Rebalance,
}

/// An announcement for an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// Which.
    pub instance: String,
    /// What.
    pub kind: NoticeKind,
}
