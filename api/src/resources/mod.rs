//! What REST `/v1` speaks of. Nouns, snake_case, units in names; every type derives its part of the OpenAPI document.

mod access;
mod evacuation;
mod event;
mod guest;
mod history;
mod image;
mod ledger;
mod link;
mod market;
mod network;
mod operation;
mod place;
mod placement;
mod plan;
mod renting;
mod simulation;
mod site;

pub use access::*;
pub use evacuation::*;
pub use event::*;
pub use guest::*;
pub use history::*;
pub use image::*;
pub use ledger::*;
pub use link::*;
pub use market::*;
pub use network::*;
pub use operation::*;
pub use place::*;
pub use placement::*;
pub use plan::*;
pub use renting::*;
pub use simulation::*;
pub use site::*;
