//! The ledger: what was really paid per guest, host, market and hour, and what on-demand would have cost.
//!
//! ```text
//!   facts, in the transactions that make them true             prices, looked up by the clerk
//!     guests/<id>: stays that are open                           ledger-prices/<market>/<time>
//!     ledger-stays/<host>/<end>: stays that are over             ledger-markets/<market>: known until when
//!     ledger-tenancies/<host>: hosts while they cost                      │
//!     ledger-egress/<time>: bytes of moves                                │
//!                          └──────────── read: scheduler::ledger ─────────┘ ──► lines, totals
//! ```
//! No amount is kept: amounts follow from the facts by [`supercloud_scheduler::ledger`], whose rules say who pays what and why the
//! lines of any time are exactly what the hosts cost. A crash can therefore lose no money and count none twice: a stay that was open
//! is open still, and a price that was not looked up yet is looked up by the next pass of the clerk.
//!
//! Time is the feed's where a price feed is replayed, else wall time. A restarted controller lets the feed go on from where it was,
//! as the hosts went on costing something. When the clock changes between two starts, everything open is cut at the last
//! time that the ledger saw by the old one.

mod clerk;
mod clock;
mod facts;
mod provider_prices;
mod read;
mod record;

pub use clerk::{Clerk, start};
pub use clock::{Book, Stamp};
pub use facts::{end_stays, host_removed, keep_egress, keep_host, keep_renting, keep_stays};
pub use provider_prices::ProviderPrices;
pub use read::{Asked, DaySums, LINES_AT_MOST, Rate, Statement, StatementError, rate, statement};
pub use record::{
    ClockRecord, EgressRecord, MarketName, MarketRecord, OpenStay, PriceRecord, Role, Size, SizeFrom, StayRecord,
    TenancyRecord, TenancySpan,
};
