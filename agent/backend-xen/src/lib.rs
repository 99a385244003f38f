//! The `xen` back end: paravirtual guests on Xen, which needs no virtualization of the processor's at all.
//!
//! | module | what |
//! |---|---|
//! | [`XenBackend`] | the [`supercloud_blanket::Backend`] |
//! | `migration` | [`supercloud_blanket::LiveMigration`] |
//! | `arrive`, `leave` | a guest's stream comes in, goes out |
//! | `inner` | what the back end's tasks share |
//! | `life`, `freeze` | starting, stopping, resetting; freezing and thawing |
//! | `watch` | looks after all guests |
//! | `guest` | one guest: its record, its state, what is done for it beside |
//! | [`turn`] | one program at a time sends a domain, or lets it run on |
//! | `domain` | the domain's configuration, a pure function of spec and host arguments |
//! | `xl` | Xen's own program `xl`, and what it says |
//! | `nbd` | the kernel's block devices on volume processes (netlink) |
//! | `card` | a domain's network card takes the place of the tap that was made for it |
//! | `console` | a domain's console as a socket and a log |
//! | [`libxl`] | the two calls that `xl` lacks, made by the program `supercloud-xen` |
//!
//! Domains are made, ended and listed by `xl`. A move needs two things that `xl` does not do: to send a domain and leave it
//! suspended whatever becomes of who sends, and to let a suspended one run on. Both are calls of libxl, which a small program of its
//! own makes, because libxl wants a process for itself: it starts others and takes signals. docs/xen.md tells what was found.
//!
//! No script of Xen's runs for disks and cards: disks are block devices that are there before their domain, cards are put in place here, and
//! what Xen's tools call for each is [`hotplug`].

mod arrive;
mod backend;
mod card;
mod console;
mod domain;
mod freeze;
mod guest;
pub mod hotplug;
mod inner;
mod leave;
pub mod libxl;
mod life;
mod migration;
mod nbd;
pub mod turn;
mod watch;
mod xl;

use std::{path::PathBuf, time::Duration};

pub use backend::XenBackend;

/// The name of this back end in a compat class.
pub const BACK_END: &str = "xen";
/// How its guests' instructions are executed: by the processor, with the kernel's privileged ones replaced by calls.
pub const ACCELERATOR: &str = "pv";
/// The machine that a guest sees: rises when devices or their places change.
pub const MACHINE_VERSION: &str = "1";

/// The exit status of `supercloud-xen` when another one has this domain in hand (`EX_TEMPFAIL` of sysexits.h).
pub const BUSY: u8 = 75;

/// Where things are, and how long they may take.
#[derive(Debug, Clone)]
pub struct XenConfig {
    /// Our own program beside `xl`, `supercloud-xen`.
    pub program: PathBuf,
    /// The folder of records; it goes with the host's boot.
    pub run_dir: PathBuf,
    /// Whether guests may move live, where the hypervisor can do it. Off: no such move was seen through to its end yet.
    pub may_move_live: bool,
    /// Budget of a question or a small change.
    pub call_budget: Duration,
    /// Budget of making a domain, or ending one.
    pub domain_budget: Duration,
}

impl XenConfig {
    /// With the usual budgets.
    #[must_use]
    pub fn new(program: PathBuf, run_dir: PathBuf) -> Self {
        Self {
            program,
            run_dir,
            may_move_live: false,
            call_budget: Duration::from_secs(30),
            domain_budget: Duration::from_secs(300),
        }
    }
}
