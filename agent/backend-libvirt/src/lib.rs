//! The `libvirt-qemu` back end: guests in QEMU, through this host's own libvirtd.
//!
//! | module | what |
//! |---|---|
//! | [`LibvirtBackend`] | the [`supercloud_blanket::Backend`] |
//! | `migration` | [`supercloud_blanket::LiveMigration`]: libvirt's v3 protocol, driven phase by phase |
//! | `xml` | the domain XML, a pure function of spec and host arguments |
//! | `connection`, `ffi` | the connection, its events, and the calls that crate `virt` lacks |
//! | [`console`] | keeping console logs bounded |
//!
//! # What libvirtd needs
//! Guests are *transient*: nothing of them stays in libvirt's own configuration. One libvirtd per host, reached by its
//! unix socket only. Found necessary or useful in `qemu.conf` where a host is a namespace of a lab (no cgroups to
//! manage, no security driver): `user = "root"`, `group = "root"`, `security_driver = "none"`,
//! `cgroup_controllers = []`, `namespaces = []`, `dynamic_ownership = 0`, `remember_owner = 0`, and everywhere
//! `stdio_handler = "file"` (console logs are then written by QEMU itself: [`console::trim_log`]). In `libvirtd.conf`:
//! `auth_unix_rw = "none"`, `unix_sock_rw_perms = "0700"` and, where several daemons share a machine, an own
//! `host_uuid` each (libvirt refuses a move between equal ones). The user and group `libvirt-qemu` must exist even
//! when `qemu.conf` names others: libvirtd looks them up before it reads the file, and without them its QEMU driver
//! does not start.

mod backend;
mod capabilities;
mod connection;
pub mod console;
mod ending;
mod ffi;
mod metadata;
mod migration;
mod state;
mod transfer;
mod xml;

use std::{path::PathBuf, time::Duration};

use supercloud_blanket::probe::ProbeReport;

pub use backend::LibvirtBackend;

/// The name of this back end in a compat class.
pub const BACK_END: &str = "libvirt-qemu";

/// How QEMU executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Accelerator {
    /// By the processor, through `/dev/kvm`.
    Kvm,
    /// By translation: works everywhere, slowly.
    Tcg,
}

impl Accelerator {
    /// As in [`supercloud_blanket::CompatClass::accelerator`].
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// What QEMU can use, the preferred one first, as the probe measured it. `/dev/kvm` being there is not enough.
    #[must_use]
    pub fn from_probe(report: &ProbeReport) -> Vec<Self> {
        if report.substrate.runs_plain_guests() { vec![Self::Kvm, Self::Tcg] } else { vec![Self::Tcg] }
    }
}

/// Where the daemon is, and how long it may take.
#[derive(Debug, Clone)]
pub struct LibvirtConfig {
    /// The connection URI; see [`LibvirtConfig::for_socket`].
    pub uri: String,
    /// What QEMU can use on this host, the preferred one first; see [`Accelerator::from_probe`].
    pub accelerators: Vec<Accelerator>,
    /// Where libvirtd writes the guests' pid files (`<run>/libvirt/qemu`), to tell their processes. Absent: not told.
    pub pid_dir: Option<PathBuf>,
    /// Where libvirtd writes the guests' logs, to tell why one ended. Absent: not told.
    pub log_dir: Option<PathBuf>,
    /// Budget of a call that only asks or changes a state.
    pub call_budget: Duration,
    /// Budget of a call that makes or ends a QEMU process.
    pub process_budget: Duration,
}

impl LibvirtConfig {
    /// The system daemon of this host.
    #[must_use]
    pub fn system(accelerators: Vec<Accelerator>) -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            accelerators,
            pid_dir: Some(PathBuf::from("/run/libvirt/qemu")),
            log_dir: Some(PathBuf::from("/var/log/libvirt/qemu")),
            call_budget: Duration::from_secs(15),
            process_budget: Duration::from_secs(90),
        }
    }

    /// A daemon that listens on another socket.
    #[must_use]
    pub fn for_socket(socket: &std::path::Path, accelerators: Vec<Accelerator>) -> Self {
        let pid_dir = socket.parent().map(|run| run.join("qemu"));
        let uri = format!("qemu+unix:///system?socket={}", socket.display());
        Self { uri, pid_dir, ..Self::system(accelerators) }
    }
}
