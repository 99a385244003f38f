//! The `kvm` back end: guests in our own VMM, a process `supercloud-vmm` each.
//!
//! | module | what |
//! |---|---|
//! | [`KvmBackend`] | the [`supercloud_blanket::Backend`] |
//! | `migration` | [`supercloud_blanket::LiveMigration`] |
//! | `post_copy` | [`supercloud_blanket::PostCopy`] |
//! | `mirror` | [`supercloud_blanket::Mirroring`] |
//! | `checkpoint` | [`supercloud_blanket::checkpoint::Checkpointing`] |
//! | `lazy` | [`supercloud_blanket::LazyThaw`] |
//! | `keeper` | who talks to a guest's process: its state, its events, ways to its disks that broke |
//! | `control` | the lines that go between the two |
//! | `spawn` | the descriptors that a process gets, and its start |
//! | `record` | what an agent that comes after must know of a process |
//!
//! Guests go on while no agent is there. Each has a folder under [`KvmConfig::run_dir`] with its control socket and a record;
//! whoever comes next finds them by it. What is only arriving then is ended, a freeze that was broken off is rolled back.

mod backend;
mod checkpoint;
mod control;
mod keeper;
mod lazy;
mod migration;
mod mirror;
mod post_copy;
mod record;
mod spawn;

use std::{path::PathBuf, time::Duration};

pub use backend::KvmBackend;

/// The name of this back end in a compat class.
pub const BACK_END: &str = "kvm";
/// How its guests' instructions are executed.
pub const ACCELERATOR: &str = "kvm";
/// Where things are, and how long they may take.
#[derive(Debug, Clone)]
pub struct KvmConfig {
    /// The program, `supercloud-vmm`.
    pub program: PathBuf,
    /// The folder of records and sockets; it goes with the host's boot.
    pub run_dir: PathBuf,
    /// As which user and group guests' processes run.
    pub user: (u32, u32),
    /// Budget of a question or a small change.
    pub call_budget: Duration,
    /// Budget of a process's start, of taking a guest that came, of its end.
    pub process_budget: Duration,
}

impl KvmConfig {
    /// With the usual budgets.
    #[must_use]
    pub fn new(program: PathBuf, run_dir: PathBuf, user: (u32, u32)) -> Self {
        let (call_budget, process_budget) = (Duration::from_secs(15), Duration::from_secs(90));
        Self { program, run_dir, user, call_budget, process_budget }
    }
}
