//! Guests: what users run.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};
use supercloud_ids::{CloudId, Epoch, FreezeId, GuestId, HostId, ImageId, OperationId, PortId, ProjectId, VolumeId};
use utoipa::ToSchema;

use crate::{CompatClass, CpuChoice, DiskFrom, MirrorStanding, Name, Propagation, Ref};

/// vCPUs and memory of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Virtual CPUs: 1 to 64.
    pub vcpus: u32,
    /// Memory: 64 MiB to 1 TiB, whole MiB.
    pub memory_bytes: u64,
}

impl Shape {
    /// What is wrong with it, if anything.
    ///
    /// # Errors
    /// A sentence that names the field and its range.
    pub fn check(&self) -> Result<(), String> {
        const MIB: u64 = 1 << 20;
        if !(1..=64).contains(&self.vcpus) {
            return Err(format!("shape.vcpus is {}; it must be 1 to 64", self.vcpus));
        }
        if self.memory_bytes < 64 * MIB || self.memory_bytes > MIB * MIB || !self.memory_bytes.is_multiple_of(MIB) {
            return Err(format!(
                "shape.memory_bytes is {}; it must be whole MiB from 64 MiB to 1 TiB",
                self.memory_bytes
            ));
        }
        Ok(())
    }
}

/// Where a guest is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuestState {
    /// Made, never started.
    Created,
    /// Owned by a host and running there (also while an operation moves it).
    Running,
    /// Not running; its volumes are kept.
    Stopped,
    /// Suspended into the image store; thaw it.
    Frozen,
    /// Its host was lost after a switch, or its guest crashed: see `alarm`.
    Lost,
}

/// A user's virtual machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Guest {
    /// Its id.
    pub id: GuestId,
    /// The project it belongs to.
    pub project: ProjectId,
    /// Its name.
    pub name: Name,
    /// Where it is in its life.
    pub state: GuestState,
    /// What is wrong, if anything, and what to do.
    pub alarm: Option<String>,
    /// vCPUs and memory.
    pub shape: Shape,
    /// The image it was made from.
    pub image: ImageId,
    /// The host that owns it.
    pub host: Option<HostId>,
    /// That host's name.
    pub host_name: Option<Name>,
    /// The cloud of that host.
    pub cloud: Option<CloudId>,
    /// That cloud's name.
    pub cloud_name: Option<Name>,
    /// The generation of its ownership.
    pub epoch: Epoch,
    /// The class it runs in; fixed at its first start.
    pub compat_class: Option<CompatClass>,
    /// The CPU that was asked for.
    #[serde(default)]
    pub cpu: CpuChoice,
    /// Its disks, the boot disk first.
    pub volumes: Vec<VolumeId>,
    /// Its ports.
    pub ports: Vec<PortId>,
    /// The IPv4 address of its first port.
    #[schema(value_type = Option<String>)]
    pub ipv4: Option<Ipv4Addr>,
    /// The operation that holds it.
    pub operation: Option<OperationId>,
    /// The freeze that a thaw would consume.
    pub freeze: Option<FreezeId>,
    /// Whether price policies may move it.
    pub follow_prices: bool,
    /// What is done by itself when its running copy is lost for good.
    #[serde(default)]
    pub on_loss: OnLoss,
    /// The mirror that is begun again whenever none is kept; absent: none is.
    #[serde(default)]
    pub kept_mirror: Option<KeptMirror>,
    /// Starts since it was made: cold starts, not moves.
    pub starts: u64,
    /// Bytes that the cloud in which it runs still lacks of what its disks stand on: until it is 0 the cloud from which it came
    /// is needed (see the volumes' `base_cloud`), and letting that go loses the guest's state. Absent: it does not run, or
    /// that is not known (yet).
    #[serde(default)]
    pub base_missing_bytes: Option<u64>,
    /// When it was made.
    pub created_at_ms: u64,
}

/// Asks for a guest; it is started unless `start` is false.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestCreate {
    /// Its name.
    pub name: Name,
    /// The project; that of the token when absent.
    #[serde(default)]
    pub project: Option<Ref>,
    /// The image its volume starts from.
    pub image: Ref,
    /// vCPUs and memory.
    pub shape: Shape,
    /// What its disk starts from in place of the image's: a volume as of a past instant. The image's kernel, if it has one, is
    /// booted all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_from: Option<DiskFrom>,
    /// The network it is attached to.
    pub network: Ref,
    /// Its address there; the first free one when absent.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub ipv4: Option<Ipv4Addr>,
    /// Where to start it: a host or a cloud, by name or id; anywhere with room when absent.
    #[serde(default)]
    pub place: Option<Ref>,
    /// The volume's size; that of the image when absent or smaller.
    #[serde(default)]
    pub disk_bytes: Option<u64>,
    /// cloud-init user-data; at most 64 KiB.
    #[serde(default)]
    pub user_data: Option<String>,
    /// Appended to the image's kernel command line, when it has one; at most 1024 bytes.
    #[serde(default)]
    pub cmdline_extra: Option<String>,
    /// How blocks follow the volume.
    #[serde(default)]
    pub propagation: Propagation,
    /// Whether price policies may move it.
    #[serde(default)]
    pub follow_prices: bool,
    /// What its processors can do, and so where it can go while it runs. Hosts whose back end has CPUs of its own take
    /// `portable` and `host` alike.
    #[serde(default, skip_serializing_if = "CpuChoice::is_default")]
    pub cpu: CpuChoice,
    /// What is done by itself when its running copy is lost for good.
    #[serde(default)]
    pub on_loss: OnLoss,
    /// Start it at once.
    #[serde(default = "yes")]
    pub start: bool,
}

fn yes() -> bool {
    true
}

/// How a guest may be moved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestMigrate {
    /// Where to: a host or a cloud, by name or id.
    pub to: Ref,
    /// At most this much of the link, in bits per second; unlimited when absent.
    #[serde(default)]
    pub bandwidth_bps: Option<u64>,
    /// The pause that is aimed at, in milliseconds; 300 when absent. The hand-over has its share of it, except for a guest that does
    /// not come to such a pause in six rounds: its last pages may take all of it.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Slow the guest down step by step when it writes memory faster than the link carries.
    #[serde(default = "yes")]
    pub auto_converge: bool,
    /// Give up (the guest goes on where it is) when the switch has not come by then.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// Which of its memory may follow after the guest runs at the destination.
    #[serde(default, skip_serializing_if = "MemoryMode::is_pre_copy")]
    pub memory: MemoryMode,
    /// Why, for the audit trail; at most 256 bytes.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Which of a guest's memory goes before it is paused, and which follows after it runs at the destination. While some of it has still to
/// come, the loss of the host that it has left loses the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemoryMode {
    /// All of it goes before.
    #[default]
    PreCopy,
    /// As much as can be goes before; what a guest writes faster than the link carries follows.
    Hybrid,
    /// All of it follows.
    PostCopy,
}

impl MemoryMode {
    /// Whether nothing follows.
    #[must_use]
    pub const fn is_pre_copy(&self) -> bool {
        matches!(self, Self::PreCopy)
    }
}

/// What a mirrored guest says to the network.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MirrorMode {
    /// It speaks freely: a fail-over loses what it did since the last cut.
    #[default]
    Async,
    /// What it says waits until the standby has the cut that it belongs to: nothing that anybody has seen is ever lost, and each
    /// answer takes up to an interval longer.
    Strict,
}

/// Who may say that a mirrored guest does not run at a host that is silent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fencing {
    /// An operator, or the host's provider.
    #[default]
    Manual,
    /// The clock: the guest runs there for as long as a lease that the controller renews, and stands still by itself when it runs out.
    /// The standby takes over some time after that, without being told to.
    Lease,
}

/// What is done by itself when a guest's running copy is lost for good: its process ended without being asked to, or its host was
/// removed, by an operator or because its provider took it back. A host that is merely silent is not lost. A mirror's standby takes
/// over whatever is said here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// It stays lost until somebody starts it.
    #[default]
    Nothing,
    /// It boots again, where its disk is if that host is there, else where there is room. With its host it loses what it wrote to its
    /// disk since its image or its last thaw: only a mirror keeps that.
    RestartFromVolume,
    /// It is thawed from its newest checkpoint, where there is room: memory, devices and disk are those of that instant, and what came
    /// after it is lost. Without a checkpoint it stays lost, and an event says so.
    ThawCheckpoint,
}

/// A mirror that is begun again when it has taken over, or has broken: at the same place where that is not where the guest is, else
/// in another cloud, else at another host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct KeptMirror {
    /// Where it was wanted first: a host or a cloud.
    pub to: Ref,
    /// From one cut to the next.
    pub interval_ms: u64,
    /// What the guest says to the network meanwhile.
    pub mode: MirrorMode,
    /// At most this much of the link, in bits per second.
    #[serde(default)]
    pub bandwidth_bps: Option<u64>,
    /// Fenced by a lease of so many milliseconds; by hand when absent.
    #[serde(default)]
    pub lease_ms: Option<u64>,
}

/// Asks for a second copy of a running guest, kept up to date at another host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestMirror {
    /// Where to: a host or a cloud, by name or id.
    pub to: Ref,
    /// From one cut to the next, in milliseconds; 1,000 when absent.
    #[serde(default)]
    pub interval_ms: Option<u64>,
    /// What it says to the network meanwhile.
    #[serde(default)]
    pub mode: MirrorMode,
    /// At most this much of the link, in bits per second; unlimited when absent.
    #[serde(default)]
    pub bandwidth_bps: Option<u64>,
    /// Who may say that the guest does not run at a host that is silent.
    #[serde(default)]
    pub fencing: Fencing,
    /// With `fencing: lease`, how long the guest may run unheard, in milliseconds: 5,000 to 300,000; 15,000 when absent.
    #[serde(default)]
    pub lease_ms: Option<u64>,
    /// Begin another one whenever it has taken over or has broken, until it is ended: see [`KeptMirror`].
    #[serde(default)]
    pub keep: bool,
    /// Why, for the audit trail; at most 256 bytes.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A mirror of a guest: an operation that goes on until it is ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Mirror {
    /// The operation that keeps it; cancel it to end the mirror.
    pub operation: OperationId,
    /// The guest.
    pub guest: GuestId,
    /// Where the guest runs.
    pub source: Option<HostId>,
    /// Where its copy stands by.
    pub destination: Option<HostId>,
    /// What it says to the network meanwhile.
    pub mode: MirrorMode,
    /// From one cut to the next.
    pub interval_ms: u64,
    /// Who may say that the guest does not run at a host that is silent.
    #[serde(default)]
    pub fencing: Fencing,
    /// With `fencing: lease`, how long the guest may run unheard, in milliseconds.
    #[serde(default)]
    pub lease_ms: Option<u64>,
    /// With `fencing: lease`, in how many milliseconds every lease is surely over unless it is renewed: a silent guest can be taken over
    /// then. 0: they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease_over_in_ms: Option<u64>,
    /// For how long nothing was heard of the guest's host, in milliseconds, as far as this controller knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_silent_ms: Option<u64>,
    /// Whether the standby has a whole cut, from which the guest would go on.
    pub is_protected: bool,
    /// Whether it was told to take over.
    pub is_failing_over: bool,
    /// How far the standby is.
    pub standing: MirrorStanding,
}

/// Has the standby of a mirrored guest take over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestFailover {
    /// You know that the guest's host does not run any more, and will not run this guest again: two copies of it would do harm that
    /// nobody could undo. Must be `true`.
    pub host_is_dead: bool,
    /// Why, for the audit trail; at most 256 bytes.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Where a stopped or new guest is started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestStart {
    /// A host or a cloud; where its volume is when absent.
    #[serde(default)]
    pub place: Option<Ref>,
    /// Another CPU from this start on; that of its first start when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuChoice>,
}

/// How a guest is stopped.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestStop {
    /// Pull the plug at once instead of asking the guest first.
    #[serde(default)]
    pub force: bool,
    /// How long the guest may take before the plug is pulled; 30,000 when absent.
    #[serde(default)]
    pub grace_ms: Option<u64>,
}

/// Asks for a freeze.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestFreeze {
    /// Why, for the audit trail; at most 256 bytes.
    #[serde(default)]
    pub reason: Option<String>,
}

/// Whether a thawed guest waits for its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ThawMemory {
    /// It runs at once, and its memory follows: what it wants first, then what it was writing when it was frozen, then the rest. Until
    /// none is missing, what was frozen is needed where it lies.
    Lazy,
    /// It runs when all of its memory is there.
    Whole,
}

/// Where a frozen guest is resumed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestThaw {
    /// A host or a cloud; anywhere with room when absent.
    #[serde(default)]
    pub to: Option<Ref>,
    /// The freeze that is meant; refused when the guest's newest is another one.
    #[serde(default)]
    pub freeze: Option<FreezeId>,
    /// A guest that is lost or stopped is set back to a checkpoint, and goes on from that: the newest, unless `point` says which. **What
    /// it wrote after it, to memory and disk, is given up.**
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checkpoint: bool,
    /// With `checkpoint`: the number of the point in its volume's history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<u64>,
    /// Whether it waits for its memory; when absent, `lazy` where the host and what was frozen allow it, else `whole`. A host that cannot
    /// do what is named refuses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ThawMemory>,
}

/// A change of a guest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GuestPatch {
    /// Whether price policies may move it.
    #[serde(default)]
    pub follow_prices: Option<bool>,
    /// What is done by itself when its running copy is lost for good.
    #[serde(default)]
    pub on_loss: Option<OnLoss>,
}

/// What is typed into a console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConsoleInput {
    /// Bytes, base64; at most 16 KiB of them.
    pub data: String,
}

/// A guest suspended into the image store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Freeze {
    /// Its id.
    pub id: FreezeId,
    /// The guest.
    pub guest: GuestId,
    /// The project.
    pub project: ProjectId,
    /// The epoch at which it was frozen; a thaw takes it to the next.
    pub epoch: Epoch,
    /// The cloud in whose store it lies.
    pub cloud: CloudId,
    /// Root of the memory and device state (opaque to us, tagged with the hypervisor's version).
    pub memory_root: String,
    /// Its size.
    pub memory_bytes: u64,
    /// What wrote the memory state, for example `libvirt-qemu/7.2`.
    pub memory_format: String,
    /// Root of each volume's content.
    pub volumes: Vec<FrozenVolume>,
    /// Whether a thaw has consumed it.
    pub is_consumed: bool,
    /// When it was made.
    pub created_at_ms: u64,
    /// The guest was not frozen, but set back to this point of its volume's history: a checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<u64>,
}

/// A volume inside a freeze.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FrozenVolume {
    /// The volume.
    pub volume: VolumeId,
    /// Root of its content.
    pub root: String,
    /// Bytes that were stored for it.
    pub stored_bytes: u64,
}
