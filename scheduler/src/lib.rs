//! Pure decisions: which host a guest is placed on, when a price is worth a move, and whether a guest can leave in time;
//! and the simulator that replays them on recorded markets.
//!
//! Nothing here knows a clock, a file or a network: prices, rooms and times come in as data, and the same code runs in
//! the daemon and in a simulator. Money is integer nano-dollars.

#![forbid(unsafe_code)]

pub mod calendar;
pub mod cluster;
pub mod evacuable;
pub mod interruptions;
pub mod ledger;
pub mod market;
pub mod money;
pub mod overload;
pub mod placement;
pub mod policy;
pub mod price;
pub mod sim;
pub mod sun;
