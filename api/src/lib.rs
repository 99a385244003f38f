//! The vocabulary of Supercloud: REST types, ids, errors, agent-link messages, tickets and the typed client.
//!
//! | module | what |
//! |---|---|
//! | [`resources`] | what `/v1` speaks of: clouds, hosts, projects, images, volumes, guests, networks, ports, operations, events, markets, tokens |
//! | [`problem`] | RFC 9457 problem+json, the one error form of the API |
//! | [`name`], [`page`] | names that people give; pages of a listing |
//! | [`frame`] | the frames of every wire between our own processes: `kind u16, version u16, length u32` |
//! | [`history`] | volumes as of past instants: clock, chain, thinning |
//! | [`blocks`] | the blocks of an image or volume as REST gives them out |
//! | [`link`] | agent ↔ controller messages |
//! | [`lease`] | how long a host may run a guest unheard: arithmetic of two clocks |
//! | [`data`] | agent ↔ agent: opening frames of the data plane and the control channel of a handover |
//! | [`ticket`] | signed permissions for what two agents do with each other |
//! | [`tls`] | mutual TLS as every link uses it, and reading a host's id out of its certificate |
//! | `client` | the typed REST client (feature `client`) |
//!
//! This crate knows no other crate of ours but [`supercloud_ids`] and [`supercloud_handover`], which live in its folder.

pub mod blocks;
pub mod cpu;
pub mod data;
pub mod frame;
pub mod guest_call;
pub mod history;
pub mod lease;
pub mod link;
pub mod name;
pub mod page;
pub mod pieces;
pub mod problem;
pub mod resources;
pub mod ticket;
pub mod tls;

#[cfg(feature = "client")]
pub mod client;

pub use cpu::{CpuBaseline, CpuChoice, CpuLevel};
pub use name::{Name, Ref};
pub use page::Page;
pub use problem::{Code, Problem};
pub use resources::*;
pub use supercloud_handover as handover;
pub use supercloud_ids as ids;

/// Milliseconds since the Unix epoch; wall time, for people and expiry dates only.
#[must_use]
pub fn unix_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
