//! The ledger of a replay: what was paid, line by line.

use crate::{
    calendar::month_of,
    market::{End, HOUR_MS, Regime},
    money::NanoUsd,
    policy::MarketId,
};

/// What was paid for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LineKind {
    /// An instance-hour, or the part of it that was used.
    Rent,
    /// The same of a host that is kept ready and empty.
    Spare,
    /// Bytes that left a zone.
    Egress,
}

/// One payment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// The guest's index in the fleet.
    pub guest: u32,
    /// Where.
    pub market: MarketId,
    /// When it began, in milliseconds since 1970.
    pub at_ms: u64,
    /// For how long, in milliseconds; 0 for egress.
    pub for_ms: u64,
    /// For what.
    pub kind: LineKind,
    /// How much.
    pub paid: NanoUsd,
}

/// All payments of a replay.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// The payments, in the order in which they were booked.
    pub lines: Vec<Line>,
}

/// A host that is rented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lease {
    pub market: MarketId,
    pub is_on_demand: bool,
    /// When it began, in milliseconds since the replay's start.
    pub from_ms: u64,
}

impl Ledger {
    /// Books a lease that ends at `to_ms` (since the replay's start) as `kind`: a line per instance-hour, at the price of its
    /// start.
    pub(super) fn book_lease(
        &mut self,
        (kind, guest, start_ms, regime): (LineKind, u32, u64, Regime),
        lease: Lease,
        (to_ms, end): (u64, End),
        price_at: impl Fn(u64) -> NanoUsd,
    ) {
        let mut at_ms = lease.from_ms;
        while at_ms < to_ms {
            let used_ms = (to_ms - at_ms).min(HOUR_MS);
            let is_last = at_ms + used_ms >= to_ms;
            let paid = regime.bill(
                price_at(at_ms),
                used_ms,
                lease.is_on_demand,
                at_ms == lease.from_ms,
                is_last.then_some(end),
            );
            self.lines.push(Line { guest, market: lease.market, at_ms: start_ms + at_ms, for_ms: used_ms, kind, paid });
            at_ms += HOUR_MS;
        }
    }

    /// Everything that was paid.
    #[must_use]
    pub fn total(&self) -> NanoUsd {
        self.lines.iter().map(|line| line.paid).sum()
    }

    /// What was paid per calendar month (UTC), in order.
    #[must_use]
    pub fn months(&self) -> Vec<((u64, u32), NanoUsd)> {
        let mut months = std::collections::BTreeMap::new();
        for line in &self.lines {
            let sum = months.entry(month_of(line.at_ms)).or_insert(NanoUsd(0));
            *sum = *sum + line.paid;
        }
        months.into_iter().collect()
    }
}
