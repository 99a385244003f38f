//! The controller: REST `/v1`, durable state, operations, and the links to the agents.
//!
//! ```text
//!   REST, SSE (rest) ── who may (auth) ── which request in which state (admission), where to (placement)
//!        │ writes operations, reads records
//!   state: typed records, one transaction per change, the chain of events      [sled or etcd]
//!        │ followed by the parts that carry operations out
//! ```
//! [`app`] puts the parts together and owns every task.
#![deny(unsafe_code)]

pub mod admission;
pub mod app;
pub mod auth;
pub mod ca;
mod checkpoints;
pub mod consoles;
mod cpus;
pub mod dashboard;
pub mod evacuation;
pub mod fencing;
pub mod flows;
pub mod keys;
pub mod leases;
pub mod ledger;
pub mod link;
pub mod markets;
pub mod metrics;
pub mod notices;
pub mod operations;
pub mod overlay;
pub mod paths;
pub mod placement;
pub mod plans;
pub mod price_board;
pub mod recovery;
pub mod reliability;
pub mod renting;
pub mod rest;
pub mod simulation;
pub mod sites;
pub mod state;
pub mod verdicts;

/// An error with its causes, as one line for the log.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
