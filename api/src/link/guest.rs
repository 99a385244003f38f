//! What a guest is, for a host that runs it, and how it may leave.

use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use supercloud_ids::{GuestId, HostId, ImageId, NetworkId, PortId, ProjectId, VolumeId};

use super::Secret;
use crate::{CompatClass, MemoryMode, Name, Propagation, Shape};

/// Everything that a host needs to run a guest; the same wherever it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GuestSpec {
    /// The guest.
    pub guest: GuestId,
    /// Its name, which is also its host name told by DHCP.
    pub name: Name,
    /// Its project.
    pub project: ProjectId,
    /// The key from which the project's chunk names and seals are derived.
    pub project_key: Secret,
    /// vCPUs and memory.
    pub shape: Shape,
    /// The class it runs in; absent at its first start: the host's first.
    pub compat_class: Option<CompatClass>,
    /// How it boots.
    pub boot: BootSpec,
    /// Its disks, the boot disk first.
    pub volumes: Vec<VolumeSpec>,
    /// Its ports.
    pub ports: Vec<PortSpec>,
    /// cloud-init user-data.
    pub user_data: Option<String>,
}

/// How a guest boots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum BootSpec {
    /// By firmware from the boot disk.
    Disk,
    /// A kernel given beside the disk.
    Kernel {
        /// The image whose parts they are.
        image: ImageId,
        /// Root of the kernel's content.
        kernel_root: String,
        /// Root of the initial RAM disk's content.
        initrd_root: Option<String>,
        /// The command line.
        cmdline: String,
    },
}

/// A disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// The volume.
    pub volume: VolumeId,
    /// Its size.
    pub size_bytes: u64,
    /// Root of the manifest that it starts from; absent: zeros.
    pub base_root: Option<String>,
    /// How blocks follow it.
    pub propagation: Propagation,
}

/// A port of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortSpec {
    /// The port.
    pub port: PortId,
    /// Its network.
    pub network: NetworkId,
    /// `02:…`
    pub mac: String,
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// The MTU that fits the tunnels.
    pub mtu: u16,
}

/// Another agent, as a party of an operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The host.
    pub host: HostId,
    /// Its name, for messages.
    pub name: Name,
    /// Where it can be dialled; absent behind a NAT.
    pub data_address: Option<SocketAddr>,
    /// SHA-256 of its certificate (DER), hex.
    pub certificate_sha256: String,
}

/// A place from which sealed chunks can be had: the controller's own store, or an agent of another cloud.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkSource {
    /// Where to dial ([`crate::data::Channel::Chunks`]).
    pub address: SocketAddr,
    /// SHA-256 of the certificate that must answer, hex.
    pub certificate_sha256: String,
    /// Permission to ask there for this project's chunks (a [`crate::ticket`] in text form).
    pub ticket: String,
}

/// How a migration may go.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MigrationOptions {
    /// At most this much of the link, bits per second.
    pub bandwidth_bps: Option<u64>,
    /// The pause that is aimed at.
    pub max_downtime_ms: Option<u64>,
    /// Slow the guest when it does not converge.
    pub auto_converge: bool,
    /// Give up when the switch has not come by then (milliseconds from the command).
    pub deadline_ms: Option<u64>,
    /// Which memory may follow after the guest runs at the destination. Never told to an agent that does not know it.
    #[serde(default, skip_serializing_if = "MemoryMode::is_pre_copy")]
    pub memory: MemoryMode,
    /// The guest is not to be paused, although it could be, before [`super::Directive::SwitchOver`]: it waits for the others of its group.
    /// Asked only of hosts that said [`super::Hello::takes_holds`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub holds: bool,
}

/// How a mirror is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorOptions {
    /// From one cut to the next.
    pub interval_ms: u64,
    /// What the guest says waits for its cut.
    pub is_strict: bool,
    /// The guest runs at its source for as long as its lease only, which is renewed by [`super::Query::RenewLease`] and is so many
    /// milliseconds long; absent: without. Asked only of hosts that said [`super::Hello::takes_leases`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_ms: Option<u64>,
    /// At most this much of the link, bits per second.
    pub bandwidth_bps: Option<u64>,
}
