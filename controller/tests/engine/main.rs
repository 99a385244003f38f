//! The engine with real links and a real store: every kind of operation, cancelled and killed everywhere, against agents that
//! run the real ownership protocol, and against agents that lie.
//!
//! One test by hand: `cargo test -p supercloud-controller --test engine -- moves::`; `SUPERCLOUD_SEED=n` repeats a run.

#![expect(clippy::unwrap_used, reason = "what fails here fails the test")]

#[path = "../support/mod.rs"]
mod support;

mod checkpoints;
mod chunks;
mod crashes;
mod groups;
mod hostile;
mod images;
mod leases;
mod ledger;
mod losses;
mod mirrors;
mod moves;
mod notices;
mod plans;
mod points;
mod recovery;
mod sweeps;
mod undo;
