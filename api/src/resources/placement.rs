//! Where a guest would go, and why not elsewhere.

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, HostId};
use utoipa::ToSchema;

use crate::{CpuChoice, CpuLevel, Name};

/// Where a guest would be placed now. Nothing is reserved by asking.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Placement {
    /// The guest.
    pub guest: GuestId,
    /// The host that has it now, which is no destination.
    pub host: Option<HostId>,
    /// That host's name.
    pub host_name: Option<Name>,
    /// The host that it would go to; absent when none takes it.
    pub destination: Option<HostId>,
    /// That host's name.
    pub destination_name: Option<Name>,
    /// What makes one host better than another.
    pub objective: String,
    /// With `explain`: every host, those that take it first, best first. Else empty.
    pub hosts: Vec<PlacementHost>,
    /// With `explain`: what each CPU that it could be given at a start gives up, and opens. Empty where the back end has CPUs of
    /// its own, and without `explain`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpus: Vec<PlacementCpu>,
}

/// A CPU that a guest could be given at a start, seen from the host that has it (or would have it).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacementCpu {
    /// What would be asked for.
    pub choice: CpuChoice,
    /// It is what the guest has asked for.
    pub is_current: bool,
    /// The features, shortened: maker, level, digits of a hash.
    pub baseline: String,
    /// The level that they reach; absent: less than `x86-64-v2`.
    pub level: Option<CpuLevel>,
    /// Hosts to which it could move while it runs, the one that it is seen from too.
    pub hosts: u32,
    /// Their clouds.
    pub clouds: u32,
    /// Markets of instance types that those hosts are rented as.
    pub markets: u32,
    /// The features of this host that it would do without.
    pub without: Vec<String>,
}

/// A host in an explanation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PlacementHost {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// The name of its cloud.
    pub cloud_name: Name,
    /// It takes the guest.
    pub is_ok: bool,
    /// The first filter that it fails, for programs: `down`, `cordoned`, `class`, `memory`, …
    pub refusal: Option<String>,
    /// What was found, for people.
    pub detail: String,
    /// What it scores; absent when it is refused.
    pub score: Option<PlacementScore>,
}

/// What a host scores. Less cost is better; then more free memory; then the name that sorts first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlacementScore {
    /// 1 is the best.
    pub rank: u32,
    /// What the guest costs there, by the objective.
    pub cost_nanousd_per_hour: u64,
    /// Memory that is free before the guest comes.
    pub free_memory_bytes: u64,
}
