//! Plans: moves of many guests, decided together ([`make`]), kept as a record, looked at, and then carried out by [`Runner`].
//!
//! ```text
//!   REST: make ──► proposed ──apply──► active-plans/<id> ──► Runner: one store transaction per step
//!                                                             (guest, its operation, the plan's step)
//!   the engine carries the operation out ──► Runner sees its end ──► next step
//! ```
//! A step and its operation are written in one transaction, so a controller that dies at any point neither begins a move twice
//! nor forgets one. What is to be done next follows from the record alone ([`machine`]).

pub mod machine;
pub mod make;
pub mod measured;
pub mod propose;
mod runner;

pub use runner::{Pace, Runner};

/// The most moves of one plan: its record is written at each step.
pub const AT_MOST_STEPS: usize = 200;
/// Plans that are kept, at most; the oldest at rest makes way.
pub const AT_MOST_KEPT: usize = 100;
/// The pause that moves of plans aim at, in milliseconds: as for a move that says nothing.
pub const MAX_DOWNTIME_MS: u64 = 300;
