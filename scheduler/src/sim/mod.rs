//! The simulator: recorded markets, replayed through the same policy code as the daemon runs.
//!
//! ## The world
//! Time goes in ticks (five minutes unless told; they divide an hour). A market's price in a tick is the recorded price at
//! its start. Auction regime: a spot host is taken at the end of a tick in which the recorded price passed the bid at any
//! moment. Capacity regime: it is taken at the start of a tick in which the drawn capacity is away ([`hazard`]). Taking
//! comes with a notice. Each guest has a host of its own, the whole of which is paid; packing is not part of this. A policy may
//! keep spare hosts ready.
//! Both hosts are paid while a guest moves. Money: one ledger line per instance-hour or move, rounded once.

pub mod deadline;
mod engine;
pub mod fleet;
mod grid;
pub mod hazard;
mod ledger;
pub mod optimum;
pub mod overload;
mod spares;
#[cfg(test)]
mod tests;

pub use engine::{Outcome, Settings, run, run_while};
pub use grid::{Grid, GridError, GridMarket};
pub use ledger::{Ledger, Line, LineKind};
