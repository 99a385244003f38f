//! The ledger: what was really paid, for whom and where, and what it would have cost on demand.

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, GuestId, HostId, OperationId, ProjectId};
use utoipa::ToSchema;

use crate::Name;

/// By which clock the ledger counts time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LedgerClock {
    /// Milliseconds since 1970.
    Wall,
    /// The time of a price feed that is replayed: money that nobody really pays.
    Feed,
}

/// What a line of the ledger is paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LedgerKind {
    /// A guest's share of the host that it runs on.
    Runs,
    /// What is kept free for a guest on the host to which it is on its way: during a move it is paid for twice.
    Incoming,
    /// What nobody uses of a host.
    Idle,
    /// Bytes of a move that left a cloud.
    Egress,
}

/// One line: one guest, or nobody, on one host, in (a part of) one hour at one price. Money is integer nano-dollars.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LedgerLine {
    /// What for.
    pub kind: LedgerKind,
    /// From when, by the ledger's clock.
    pub from_ms: u64,
    /// Until when; as `from_ms` for egress.
    pub to_ms: u64,
    /// The host; for egress, the one that the bytes left.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// Its cloud.
    pub cloud: CloudId,
    /// The cloud's name.
    pub cloud_name: Name,
    /// The market in which the host is rented: `<cloud>/<instance type>/<spot|on_demand>`; absent where none is known.
    pub market: Option<String>,
    /// The guest; absent for what is idle.
    pub guest: Option<GuestId>,
    /// Its name.
    pub guest_name: Option<Name>,
    /// Its project.
    pub project: Option<ProjectId>,
    /// The move, for egress.
    pub operation: Option<OperationId>,
    /// The cloud to which the bytes went, for egress.
    pub to_cloud_name: Option<Name>,
    /// How many, for egress.
    pub bytes: Option<u64>,
    /// The host's price then; for egress, the price of a GiB. Absent: not known.
    pub price_nanousd: Option<u64>,
    /// What was paid. Absent: no price is known, and none is invented.
    pub paid_nanousd: Option<u64>,
    /// What the same would have cost on a host rented on demand that nobody ever had to leave; absent where that is not known.
    pub on_demand_nanousd: Option<u64>,
}

/// Sums of lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct LedgerTotals {
    /// What was paid.
    pub paid_nanousd: u64,
    /// Of this, what guests' shares cost.
    pub runs_nanousd: u64,
    /// What was kept free for guests on their way.
    pub incoming_nanousd: u64,
    /// What nobody used.
    pub idle_nanousd: u64,
    /// What left clouds.
    pub egress_nanousd: u64,
    /// What was paid by lines of which is known what they would have cost on demand.
    pub comparable_paid_nanousd: u64,
    /// What these lines would have cost on demand.
    pub on_demand_nanousd: u64,
    /// Milliseconds of lines without a price.
    pub unpriced_ms: u64,
    /// Bytes that left clouds at a price that is not known.
    pub unpriced_bytes: u64,
}

/// What everything that is rented costs now, per hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct LedgerRate {
    /// At the prices that were looked up last.
    pub paid_nanousd_per_hour: u64,
    /// Of this, for hosts of which is known what they cost on demand.
    pub comparable_nanousd_per_hour: u64,
    /// What these hosts cost on demand.
    pub on_demand_nanousd_per_hour: u64,
    /// Hosts of which no price is known.
    pub unpriced_hosts: u64,
}

/// A page of the ledger with the sums of everything that was asked for, not of the page alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Ledger {
    /// By which clock times are told.
    pub clock: LedgerClock,
    /// From when lines were asked for.
    pub from_ms: u64,
    /// Until when; never later than the time up to which prices were looked up.
    pub to_ms: u64,
    /// The sums of all pages.
    pub totals: LedgerTotals,
    /// What all that is rented costs now; absent for those who see one project only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<LedgerRate>,
    /// The lines, by host, then by time.
    pub items: Vec<LedgerLine>,
    /// Where the next page starts; absent on the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_page: Option<String>,
}
