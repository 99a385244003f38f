//! Clouds and hosts: where guests can be.

use std::net::{Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, HostId};
use utoipa::ToSchema;

use crate::{CpuBaseline, Name, Ref};

/// A provider region or zone in which hosts are rented.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Cloud {
    /// Its id.
    pub id: CloudId,
    /// Its name, unique in the whole system.
    pub name: Name,
    /// The provider: one of the controller's settings, or `static` or `lab`, where nothing is rented.
    pub provider: String,
    /// When it was made known.
    pub created_at_ms: u64,
}

/// Asks for a cloud to be made known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloudCreate {
    /// Its name.
    pub name: Name,
    /// The driver that rents hosts there.
    #[serde(default = "static_provider")]
    pub provider: String,
}

fn static_provider() -> String {
    "static".to_owned()
}

/// Whether a host can take guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostState {
    /// Its agent is connected and well.
    Up,
    /// Its agent is away; its guests may well run on.
    Unreachable,
    /// It takes no new guests.
    Cordoned,
    /// It was removed: its certificate is denied.
    Removed,
}

/// What a back end on a host can run; a guest moves live inside its compat class only.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
pub struct CompatClass {
    /// `libvirt-qemu`, `kvm`, `xen-pv`.
    pub back_end: String,
    /// `tcg`, `kvm`, `xen`.
    pub accelerator: String,
    /// The virtual machine's version, for example `pc-i440fx-7.2`.
    pub machine_version: String,
    /// The CPU that guests see: a name, or what a [`CpuBaseline`] is written as.
    pub cpu_baseline: String,
}

/// Whether this can be a part of a compat class that is only a name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
#[must_use]
pub fn is_class_part(part: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=64).contains(&part.len()) && part.bytes().all(is_good)
}

impl CompatClass {
    /// Whether its parts are what parts can be.
    #[must_use]
    pub fn is_plausible(&self) -> bool {
        let names = [&self.back_end, &self.accelerator, &self.machine_version];
        names.into_iter().all(|part| is_class_part(part))
            && (self.features().is_some() || is_class_part(&self.cpu_baseline))
    }

    /// The features that its baseline is made of, where it says them.
    #[must_use]
    pub fn features(&self) -> Option<CpuBaseline> {
        self.cpu_baseline.parse().ok()
    }

    /// Whether a host that offers this class runs guests of that one: the same, or with fewer features.
    #[must_use]
    pub fn serves(&self, wanted: &Self) -> bool {
        let covers = || match (self.features(), wanted.features()) {
            (Some(mine), Some(wanted)) => mine.covers(&wanted),
            _ => false,
        };
        self == wanted || (self.is_like(wanted) && covers())
    }
}

impl CompatClass {
    /// The names of features of this class that none of `offered` has, of those that are like it in the rest; `None` when it
    /// is not (only) features that are missing.
    #[must_use]
    pub fn lacking_of(&self, offered: &[Self]) -> Option<String> {
        let wanted = self.features()?;
        let like = offered.iter().filter(|one| one.is_like(self));
        let best = like.filter_map(Self::features).min_by_key(|mine| wanted.beyond(mine).len())?;
        if best.maker != wanted.maker {
            return Some(format!("being made by {}", wanted.maker));
        }
        let mut names = wanted.beyond(&best);
        if wanted.physical_bits > best.physical_bits {
            names.push(format!("physical addresses of {} bits", wanted.physical_bits));
        }
        (!names.is_empty()).then(|| names.join(", "))
    }

    fn is_like(&self, other: &Self) -> bool {
        self.back_end == other.back_end
            && self.accelerator == other.accelerator
            && self.machine_version == other.machine_version
    }
}

impl std::fmt::Display for CompatClass {
    /// For people: a baseline that is made of features is shortened.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let baseline = self.features().map_or_else(|| self.cpu_baseline.clone(), |features| features.short());
        write!(f, "{}/{}/{}/{baseline}", self.back_end, self.accelerator, self.machine_version)
    }
}

impl Host {
    /// Whether it runs guests of this class.
    #[must_use]
    pub fn serves(&self, class: &CompatClass) -> bool {
        self.compat_classes.iter().any(|mine| mine.serves(class))
    }

    /// What its processors can do, where its back end says it.
    #[must_use]
    pub fn features(&self) -> Option<CpuBaseline> {
        self.compat_classes.iter().find_map(CompatClass::features)
    }
}

/// Room on a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
pub struct Room {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory for guests.
    pub memory_bytes: u64,
    /// Disk for volumes.
    pub disk_bytes: u64,
}

/// What a host's provider says that it will do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HostNoticeKind {
    /// It is likelier than others to be taken back soon.
    Rebalance,
    /// It is taken back.
    Interruption,
}

/// What a host's provider has announced for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostNotice {
    /// What.
    pub kind: HostNoticeKind,
    /// When it is carried out, in Unix milliseconds; absent: soon.
    pub at_ms: Option<u64>,
    /// When it was heard of first.
    pub heard_at_ms: u64,
}

const fn yes() -> bool {
    true
}

/// A machine that runs an agent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Host {
    /// Its id, which its certificate names.
    pub id: HostId,
    /// Its name, unique in the whole system.
    pub name: Name,
    /// The cloud it stands in.
    pub cloud: CloudId,
    /// The cloud's name, for people.
    pub cloud_name: Name,
    /// Whether it can take guests.
    pub state: HostState,
    /// Where other agents can dial it; absent behind a NAT.
    #[schema(value_type = Option<String>)]
    pub data_address: Option<SocketAddr>,
    /// Its address in the overlay's underlay; tunnels end there.
    #[schema(value_type = Option<String>)]
    pub overlay_address: Option<Ipv4Addr>,
    /// How it encrypts its tunnels; absent: not.
    #[serde(default)]
    pub overlay_encryption: Option<OverlayEncryption>,
    /// Its small number in the overlay (1 to 4094), which names its tunnels.
    pub overlay_index: u16,
    /// What it offers.
    pub capacity: Room,
    /// What its guests and reservations take.
    pub used: Room,
    /// The compat classes it can run.
    pub compat_classes: Vec<CompatClass>,
    /// Whether its guests can be moved while they run; else they are frozen and thawed.
    #[serde(default = "yes")]
    pub moves_live: bool,
    /// What the substrate probe found (`kind`, ns per instruction, …), as measured.
    #[schema(value_type = Object)]
    pub probe: serde_json::Value,
    /// The agent's version.
    pub agent_version: String,
    /// SHA-256 of its current certificate (DER), hex.
    pub certificate_sha256: String,
    /// When its agent was last heard of.
    pub last_seen_ms: u64,
    /// What its provider has announced for it; an uncordoned host's was withdrawn.
    #[serde(default)]
    pub notice: Option<HostNotice>,
    /// When it joined.
    pub created_at_ms: u64,
}

/// How a host encrypts the overlay's tunnels: by WireGuard, beneath them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OverlayEncryption {
    /// Its public key (Curve25519), base64.
    pub public_key: String,
    /// Where it takes encrypted packets (UDP); absent behind a NAT: it speaks first.
    #[schema(value_type = Option<String>)]
    pub endpoint: Option<SocketAddr>,
}

/// A chunk store: the controller's own, in which images lie, or a cloud's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChunkStore {
    /// `controller`, or the cloud's name.
    pub name: String,
    /// The cloud; absent: the controller's own.
    pub cloud: Option<CloudId>,
    /// Bytes of chunks after the last sweep of each project; absent: not swept since the controller's start.
    pub bytes: Option<u64>,
    /// Bytes that sweeps have removed since the controller's start.
    pub freed_bytes: u64,
    /// Sweeps that did not come to their end since the controller's start; events tell why.
    pub failed_sweeps: u64,
}

/// Asks for a one-time token with which an agent may join.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenCreate {
    /// The name that the host will have.
    pub host_name: Name,
    /// The cloud in which it stands.
    pub cloud: Ref,
    /// How long the token may be used; at most 900.
    #[serde(default = "default_join_seconds")]
    pub expires_in_s: u32,
}

fn default_join_seconds() -> u32 {
    900
}

/// A one-time token with which one agent may join; shown once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinToken {
    /// The host's id to be.
    pub host: HostId,
    /// The secret: `scjoin.<host>.<secret>.<fingerprint of the CA>`.
    pub token: String,
    /// When it stops working.
    pub expires_at_ms: u64,
}

/// An agent's request to join: the token and a CSR of a key that never leaves the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The one-time token.
    pub token: String,
    /// PKCS#10, PEM.
    pub csr_pem: String,
}

/// The answer to a [`JoinRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JoinResponse {
    /// The host's id.
    pub host: HostId,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// The CA's certificate, PEM.
    pub ca_pem: String,
    /// Where the controller takes agents' links (`host:port`).
    pub link_address: String,
}

/// A change of a host.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostPatch {
    /// `true`: takes no new guests; `false`: takes them again.
    #[serde(default)]
    pub cordoned: Option<bool>,
}
