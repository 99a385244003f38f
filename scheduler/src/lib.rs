//! Pure decisions: which host a guest is placed on, and when a price is worth a move.
//!
//! Nothing here knows a clock, a file or a network: prices, rooms and times come in as data, and the same code runs in
//! the daemon and in a simulator. Money is integer nano-dollars.

#![forbid(unsafe_code)]

pub mod money;
pub mod placement;
pub mod price;
