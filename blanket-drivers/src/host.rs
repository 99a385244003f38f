//! What belongs to one host: files, sockets and taps that a guest is wired to. Never travels; the destination of a move
//! makes its own for the same [`MachineSpec`].

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId};

use crate::device::{Boot, MachineSpec, SpecError};

/// The longest path of a unix socket, in bytes (`sun_path` less its final zero).
pub const MAX_SOCKET_PATH_BYTES: usize = 107;

/// A host's own ends of a guest's devices. Serialisable so that an agent can keep it across its own restart.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostArgs {
    /// The kernel of a direct boot.
    pub kernel: Option<PathBuf>,
    /// Its initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// Per disk name: the unix socket of the NBD server that holds it.
    pub disks: BTreeMap<String, NbdSocket>,
    /// Per interface name: the tap, made and attached to the switch before.
    pub taps: BTreeMap<String, String>,
    /// Where the console is served: a unix socket that the back end makes.
    pub console_socket: Option<PathBuf>,
    /// Where what the console says is appended. The agent keeps it bounded: a guest can write without end.
    pub console_log: Option<PathBuf>,
}

/// Where an NBD server listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdSocket {
    /// The unix socket.
    pub socket: PathBuf,
    /// The export's name; empty for the server's default one. Better give one: libvirt 9 loses the event that names the
    /// disk of an I/O error when the export has none (the guest's pause is told in any case).
    #[serde(default)]
    pub export: String,
}

/// Everything that a back end needs to bring a guest up on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// The guest.
    pub guest: GuestId,
    /// The epoch under which this host runs it (of an incoming guest: the one that it will be granted).
    pub epoch: Epoch,
    /// What the guest sees.
    pub spec: MachineSpec,
    /// What this host gives for it.
    pub host: HostArgs,
}

impl Launch {
    /// Checks the spec, and that the host gives an end for each of its devices.
    ///
    /// # Errors
    /// The first thing that is wrong or missing, by name.
    pub fn check(&self) -> Result<(), SpecError> {
        self.spec.check()?;
        let missing = |what: String| Err(SpecError::Missing { what });
        if let Boot::Kernel { has_initrd, .. } = &self.spec.boot {
            check_path("host.kernel", self.host.kernel.as_ref(), 4095)?;
            if *has_initrd {
                check_path("host.initrd", self.host.initrd.as_ref(), 4095)?;
            }
        }
        for disk in &self.spec.devices.disks {
            let Some(nbd) = self.host.disks.get(&disk.name) else {
                return missing(format!("the NBD socket of disk '{}'", disk.name));
            };
            check_path("host.disks.socket", Some(&nbd.socket), MAX_SOCKET_PATH_BYTES)?;
            if nbd.export.len() > 255 || nbd.export.bytes().any(|byte| !(0x20..0x7f).contains(&byte)) {
                return Err(SpecError::Text {
                    field: "host.disks.export",
                    value: nbd.export.chars().take(64).collect(),
                    rule: "it has at most 255 printable ASCII characters",
                });
            }
        }
        for nic in &self.spec.devices.nics {
            let Some(tap) = self.host.taps.get(&nic.name) else {
                return missing(format!("the tap of interface '{}'", nic.name));
            };
            // The kernel's own rule for interface names (IFNAMSIZ - 1 = 15), less its odder characters.
            let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            if tap.is_empty() || tap.len() > 15 || !tap.bytes().all(is_good) || tap.starts_with('.') {
                return Err(SpecError::Text {
                    field: "host.taps",
                    value: tap.chars().take(64).collect(),
                    rule: "it has 1 to 15 characters of a-z, A-Z, 0-9, '-', '_', '.'",
                });
            }
        }
        if self.host.console_socket.is_some() {
            check_path("host.console_socket", self.host.console_socket.as_ref(), MAX_SOCKET_PATH_BYTES)?;
        }
        if self.host.console_log.is_some() {
            check_path("host.console_log", self.host.console_log.as_ref(), 4095)?;
        }
        Ok(())
    }
}

fn check_path(field: &'static str, path: Option<&PathBuf>, max_bytes: usize) -> Result<(), SpecError> {
    let Some(path) = path else { return Err(SpecError::Missing { what: field.to_owned() }) };
    // A comma is QEMU's separator of options and a colon starts a protocol; neither is needed in paths that agents make.
    let is_good = |text: &str| text.bytes().all(|byte| (0x21..0x7f).contains(&byte) && !matches!(byte, b',' | b':'));
    match path.to_str() {
        Some(text) if path.is_absolute() && text.len() <= max_bytes && is_good(text) => Ok(()),
        _ => Err(SpecError::Text {
            field,
            value: path.to_string_lossy().chars().take(64).collect(),
            rule: "it is an absolute path of printable ASCII without blanks, commas and colons, and not too long",
        }),
    }
}
