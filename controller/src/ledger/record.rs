//! What the ledger keeps: facts. Money is computed from them when it is asked for.

use serde::{Deserialize, Serialize};
use supercloud_api::{
    LedgerClock, Name, Tenure,
    ids::{CloudId, GuestId, HostId, OperationId, ProjectId, RentingId},
};
use supercloud_scheduler::{ledger::Room, money::NanoUsd};

use super::Stamp;
use crate::state::Record;

/// Why a guest takes room on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It runs there.
    Runs,
    /// It is on its way there.
    Incoming,
}

/// Room as the ledger counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory, a started MiB being a whole one.
    pub memory_mib: u64,
}

impl Size {
    /// Of so many bytes.
    #[must_use]
    pub const fn new(vcpus: u32, memory_bytes: u64) -> Self {
        Self { vcpus, memory_mib: memory_bytes.div_ceil(1 << 20) }
    }
}

impl From<Size> for Room {
    fn from(size: Size) -> Self {
        Self { vcpus: size.vcpus, memory_mib: size.memory_mib }
    }
}

/// That a guest takes room on a host, and since when; kept in the guest's own record, so that it changes with the owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenStay {
    /// The host.
    pub host: HostId,
    /// Why.
    pub role: Role,
    /// How much.
    pub size: Size,
    /// Since when.
    pub since: Stamp,
}

/// A stay that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StayRecord {
    /// The guest.
    pub guest: GuestId,
    /// Its name then.
    pub guest_name: Name,
    /// Its project.
    pub project: ProjectId,
    /// Where, why, how much, since when.
    pub stay: OpenStay,
    /// Until when, by the same clock.
    pub to_ms: u64,
}

/// One time of being rented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenancySpan {
    /// Since when.
    pub since: Stamp,
    /// Until when, by the same clock; still rented when absent.
    pub to_ms: Option<u64>,
}

/// What a host had from some time on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeFrom {
    /// Since when.
    pub since: Stamp,
    /// How much.
    pub size: Size,
}

/// Where a price comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarketName {
    /// The cloud's name.
    pub cloud: Name,
    /// The instance type.
    pub instance_type: String,
    /// How it is rented.
    pub tenure: Tenure,
}

impl MarketName {
    /// As the board calls it.
    #[must_use]
    pub fn name(&self) -> String {
        let tenure = if self.tenure == Tenure::Spot { "spot" } else { "on_demand" };
        format!("{}/{}/{tenure}", self.cloud, self.instance_type)
    }

    /// The same thing on demand.
    #[must_use]
    pub fn on_demand(&self) -> Self {
        Self { tenure: Tenure::OnDemand, ..self.clone() }
    }
}

/// A host as long as it costs something. A host is rented once; more than one span comes of a change of clocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenancyRecord {
    /// The host.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// Its cloud.
    pub cloud: CloudId,
    /// The cloud's name.
    pub cloud_name: Name,
    /// The renting; absent for a host that joined by itself.
    pub renting: Option<RentingId>,
    /// The market; absent while none is known.
    pub market: Option<MarketName>,
    /// When it was rented.
    pub spans: Vec<TenancySpan>,
    /// What it had, in the order of time.
    pub sizes: Vec<SizeFrom>,
}

impl TenancyRecord {
    /// The market whose prices it is told by. A host that joined by itself has one where a feed is replayed only: by wall time, real
    /// money would be charged at the price of somebody else's machine.
    #[must_use]
    pub fn market_by(&self, clock: LedgerClock) -> Option<&MarketName> {
        self.market.as_ref().filter(|_| self.renting.is_some() || clock == LedgerClock::Feed)
    }
}

/// Bytes of a move that left a cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EgressRecord {
    /// The move.
    pub operation: OperationId,
    /// The guest.
    pub guest: GuestId,
    /// Its name then.
    pub guest_name: Name,
    /// Its project.
    pub project: ProjectId,
    /// The host that they left.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// Its cloud.
    pub cloud: CloudId,
    /// The cloud's name.
    pub cloud_name: Name,
    /// The cloud to which they went.
    pub to_cloud_name: Name,
    /// How many.
    pub bytes: u64,
    /// What a GiB cost then, if that was known.
    pub per_gib: Option<NanoUsd>,
    /// When the move ended.
    pub at: Stamp,
}

/// How far a market's prices were looked up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarketRecord {
    /// The market.
    pub market: String,
    /// By which clock.
    pub clock: LedgerClock,
    /// The newest price's time.
    pub last_at_ms: u64,
    /// It.
    pub last: NanoUsd,
    /// Until when it is known to hold.
    pub known_until_ms: u64,
}

/// A price of a market.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceRecord {
    /// The market.
    pub market: String,
    /// From when.
    pub at: Stamp,
    /// Per hour.
    pub per_hour: NanoUsd,
}

/// Where the clock was when it was last looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockRecord {
    /// The ledger's time.
    pub at: Stamp,
    /// Wall time at the same moment.
    pub wall_ms: u64,
}

/// Within keys, the clocks.
const fn letter(clock: LedgerClock) -> char {
    match clock {
        LedgerClock::Wall => 'w',
        LedgerClock::Feed => 'f',
    }
}

/// What names a market in keys: instance types may be any text.
#[must_use]
pub fn market_id(market: &str, clock: LedgerClock) -> String {
    format!("{}{}", letter(clock), &blake3::hash(market.as_bytes()).to_hex()[..32])
}

/// A stay's key begins with this: stays that ended earlier come before it.
#[must_use]
pub fn stay_id_at(host: HostId, to_ms: u64) -> String {
    format!("{host}/{to_ms:020}")
}

impl Record for StayRecord {
    type Id = String;
    const FOLDER: &'static str = "ledger-stays";
    fn id(&self) -> String {
        let OpenStay { host, role, since, .. } = &self.stay;
        let role = if *role == Role::Runs { 'r' } else { 'i' };
        let clock = letter(since.clock);
        format!("{}-{clock}{role}-{}-{:020}", stay_id_at(*host, self.to_ms), self.guest, since.at_ms)
    }
}

impl Record for TenancyRecord {
    type Id = HostId;
    const FOLDER: &'static str = "ledger-tenancies";
    fn id(&self) -> HostId {
        self.host
    }
}

impl Record for EgressRecord {
    type Id = String;
    const FOLDER: &'static str = "ledger-egress";
    fn id(&self) -> String {
        format!("{:020}-{}", self.at.at_ms, self.operation)
    }
}

impl Record for MarketRecord {
    type Id = String;
    const FOLDER: &'static str = "ledger-markets";
    fn id(&self) -> String {
        market_id(&self.market, self.clock)
    }
}

impl Record for PriceRecord {
    type Id = String;
    const FOLDER: &'static str = "ledger-prices";
    fn id(&self) -> String {
        format!("{}/{:020}", market_id(&self.market, self.at.clock), self.at.at_ms)
    }
}

impl Record for ClockRecord {
    type Id = &'static str;
    const FOLDER: &'static str = "ledger-clock";
    fn id(&self) -> &'static str {
        "now"
    }
}
