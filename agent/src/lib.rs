//! The agent of one host: runs guests for the controller, and moves them to and from other hosts.
//!
//! ```text
//!                        controller
//!                            | link (mTLS, dialled by the agent)
//!   +------------------------v---------------------------------------+
//!   | agent: composition      guests: finds or begins the task of a guest
//!   |                         guest: one task, the ownership protocol's machine, the record
//!   |                         jobs: receive, depart, freeze, fetch
//!   | volumes: processes      ports: taps and the switch      metadata: what guests may ask
//!   +---^-----------------------------^----------------------------^-+
//!       | control, NBD, peer sockets  | plane (mTLS)               | 169.254.169.254
//!   volume processes, hypervisor   other agents                 guests
//! ```
//!
//! | what dies | what goes on | who mends it |
//! |---|---|---|
//! | the agent | guests, their disks, flows | the next agent: [`guest`]'s records, control sockets, the hypervisor's list |
//! | a volume process | the guest, paused at its next disk access | the agent starts it anew; the guest is resumed |
//! | the hypervisor's daemon | guests, their disks | the back end connects again |
//! | the switch | guests, unconnected | the switch's driver programs it again |
//! | the controller, the link | everything | the link dials again |

pub mod accounts;
pub mod agent;
pub mod announced;
pub mod checker;
pub mod checkpoints;
pub mod chunks;
pub mod cloud_store;
pub mod config;
pub mod confinement;
pub mod consoles;
pub mod durable;
pub mod farewell;
pub mod flows;
pub mod frozen;
pub mod guest;
pub mod guests;
pub mod holdings;
pub mod host;
pub mod identity;
pub mod jobs;
pub mod join;
pub mod link;
pub mod metadata;
pub mod overlay_key;
pub mod paths;
pub mod plane;
pub mod points;
pub mod ports;
pub mod seed;
pub mod socket;
pub mod sweeper;
pub mod volumes;

/// An error with all its causes, for logs and problems: `what: why: why`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
