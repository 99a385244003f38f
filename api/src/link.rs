//! The agent link: one mTLS connection per host, dialled by the agent (hosts sit behind NAT), ALPN [`crate::tls::ALPN_AGENT`].
//!
//! Either side sends requests and notices; each request carries a number that its response repeats. All payloads are
//! JSON in [`crate::frame`]s:
//!
//! | kind | name | from | payload |
//! |---|---|---|---|
//! | 1 | hello | agent | [`Hello`]: the first frame |
//! | 2 | welcome | controller | [`Welcome`]: the answer; else the connection is closed |
//! | 3 | query | agent | [`Envelope`]`<`[`Query`]`>` |
//! | 4 | answer | controller | [`Envelope`]`<`[`Outcome`]`<`[`Answer`]`>>` |
//! | 5 | notice | agent | [`Notice`]; no answer |
//! | 6 | directive | controller | [`Directive`]; no answer |
//! | 7 | farewell | controller | [`Farewell`], instead of a welcome |
//!
//! Everything that changes a guest's owner goes by [`supercloud_handover`]: the agent's machines say
//! [`Report`](supercloud_handover::Report)s ([`Notice::Report`]), the controller's record gives
//! [`OrderBody`](supercloud_handover::OrderBody)s ([`Directive::Order`]). Both are repeated until they have had their effect
//! (every few seconds and after each reconnect), so a lost message loses nothing. What the receiver needs beside the order (the
//! guest's description, tickets, where to find chunks) travels as the order's [`Assignment`]. "Start", "stop", "migrate",
//! "freeze", "thaw" are all kinds of one operation: [`supercloud_handover::OperationKind`].

mod console;
mod guest;
mod path;
mod store;

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use supercloud_handover::{OrderBody, Report};
use supercloud_ids::{CloudId, Epoch, FreezeId, GuestId, HostId, OperationId, ProjectId, VolumeId};

use crate::{
    CompatClass, FrozenVolume, HostNoticeKind, Name, Operation, OverlayEncryption, Problem, Progress, Room, ThawMemory,
    guest_call::{GuestCall, GuestStanding},
};

pub use self::console::{CONSOLE_TAKEN, ConsoleBytes, ConsoleNews, ConsoleOrder, MAX_CONSOLE_BYTES};
pub use self::guest::{BootSpec, ChunkSource, GuestSpec, MigrationOptions, MirrorOptions, Peer, PortSpec, VolumeSpec};
pub use self::path::{FlowsOf, FlowsTold, MAX_PATH_PEERS, MAX_PORT_FLOWS, PathMeasured, PathPeer};
pub use self::store::{
    CheckpointContent, ChunksChecked, HistoryMark, ManifestPart, PointContent, PointTaken, StoreRoot, StoreSwept,
    VolumeChecked,
};

/// The version of every payload of this link.
pub const VERSION: u16 = 1;

/// Frame kinds of the agent link.
pub mod kind {
    #![expect(missing_docs, reason = "the table in the module's documentation says what they are")]
    pub const HELLO: u16 = 1;
    pub const WELCOME: u16 = 2;
    pub const QUERY: u16 = 3;
    pub const ANSWER: u16 = 4;
    pub const NOTICE: u16 = 5;
    pub const DIRECTIVE: u16 = 6;
    pub const FAREWELL: u16 = 7;
}

/// Instead of a welcome, to a host that an operator has removed and that comes back: its guests were given up and may run
/// elsewhere. The agent destroys its guests' processes, keeps all files, and does not dial again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Farewell {
    /// The host: who is not named is not meant.
    pub host: HostId,
    /// What people are told.
    pub problem: Problem,
}

/// A numbered message: a response repeats the number of its request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// The number, chosen by the asking side, unique on the connection.
    pub number: u64,
    /// The message.
    pub body: T,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome<T> {
    /// It was done.
    Ok(T),
    /// It was not.
    Err(Problem),
}

impl<T> From<Outcome<T>> for Result<T, Problem> {
    fn from(outcome: Outcome<T>) -> Self {
        match outcome {
            Outcome::Ok(value) => Ok(value),
            Outcome::Err(problem) => Err(problem),
        }
    }
}

impl<T> From<Result<T, Problem>> for Outcome<T> {
    fn from(result: Result<T, Problem>) -> Self {
        match result {
            Ok(value) => Outcome::Ok(value),
            Err(problem) => Outcome::Err(problem),
        }
    }
}

/// 32 secret bytes; base64 on the wire, never in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use base64::Engine as _;
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use base64::Engine as _;
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        base64::engine::general_purpose::STANDARD
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom("a secret is 32 bytes in base64"))
    }
}

// ---------------------------------------------------------------------------------------------- opening

/// The agent's first frame.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Must be the host that the certificate names.
    pub host: HostId,
    /// The agent's version.
    pub agent_version: String,
    /// Where other agents can dial it; absent behind a NAT.
    pub data_address: Option<SocketAddr>,
    /// Its address in the overlay's underlay.
    pub overlay_address: Option<Ipv4Addr>,
    /// How it encrypts the overlay's tunnels; absent: not.
    #[serde(default)]
    pub overlay_encryption: Option<OverlayEncryption>,
    /// What it offers to guests.
    pub capacity: Room,
    /// What it can run.
    pub compat_classes: Vec<CompatClass>,
    /// What the probe measured.
    pub probe: serde_json::Value,
    /// Every guest of which it holds anything, with what it thinks of it.
    pub guests: Vec<GuestReport>,
    /// Volumes it holds that belong to no guest in `guests`.
    pub volumes: Vec<VolumeId>,
    /// The revision of the overlay view that it has applied; told for the log, nothing is decided by it.
    pub view_revision: u64,
    /// It knows [`Directive::SweepStore`].
    #[serde(default)]
    pub takes_sweeps: bool,
    /// It knows [`Directive::Console`].
    #[serde(default)]
    pub takes_consoles: bool,
    /// It knows [`Propagation::Predictive`].
    #[serde(default)]
    pub knows_predictive: bool,
    /// It knows [`Directive::CheckVolume`].
    #[serde(default)]
    pub takes_checks: bool,
    /// It knows [`Directive::TakePoint`].
    #[serde(default)]
    pub takes_points: bool,
    /// It takes points with the memory of running guests, and thaws from them.
    #[serde(default)]
    pub takes_checkpoints: bool,
    /// Its guests cannot be moved while they run.
    #[serde(default)]
    pub moves_none_live: bool,
    /// Its guests can be mirrored, and it can stand by for others'.
    #[serde(default)]
    pub takes_mirrors: bool,
    /// Guests may leave memory behind when they move from or to it ([`crate::MemoryMode`]).
    #[serde(default)]
    pub takes_post_copy: bool,
    /// Guests can be thawed there before their memory is there ([`ThawWish`]).
    #[serde(default)]
    pub takes_lazy_thaw: bool,
    /// Moves can wait with the guest's pause until they are told ([`MigrationOptions::holds`], [`Directive::SwitchOver`]).
    #[serde(default)]
    pub takes_holds: bool,
    /// It knows [`Directive::MeasurePaths`].
    #[serde(default)]
    pub measures_paths: bool,
    /// It knows [`Directive::TellFlows`].
    #[serde(default)]
    pub tells_flows: bool,
    /// Its guests stand still by themselves when a lease runs out ([`MirrorOptions::lease_ms`]).
    #[serde(default)]
    pub takes_leases: bool,
}

/// The controller's answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// The host's name, for logs.
    pub host_name: Name,
    /// The cloud in which it stands.
    pub cloud: CloudId,
    /// Ed25519 public key (hex) that signs tickets.
    pub ticket_key: String,
    /// Send a heartbeat this often.
    pub heartbeat_ms: u64,
    /// Guests that this host owns, as the store has it. About what it holds of others it asks
    /// ([`supercloud_handover::Report::AskOwner`]).
    pub owned: Vec<(GuestId, Epoch)>,
}

/// What an agent holds of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Holding {
    /// It runs here.
    Running,
    /// It is paused here (by a hand-over, or by a disk that cannot be reached).
    Paused,
    /// The hypervisor process is gone though the guest should run.
    Down,
    /// An incoming copy that has no grant yet.
    Incoming,
    /// Only volumes: blocks that others may still need.
    Volumes,
}

/// One guest in a [`Hello`] or heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestReport {
    /// The guest.
    pub guest: GuestId,
    /// The epoch under which it is held.
    pub epoch: Epoch,
    /// What is held.
    pub holding: Holding,
    /// The operation in which it takes part here, if any.
    pub operation: Option<OperationId>,
    /// Something that people should know (a disk that stalls, …).
    pub alarm: Option<String>,
    /// Blocks (in bytes) that its volumes still lack here.
    pub missing_bytes: u64,
    /// What the store of this host's cloud still lacks of the contents on which the volumes stand, in bytes; absent: not
    /// known (yet). At 0 the guest needs nothing from the cloud from which it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_missing_bytes: Option<u64>,
    /// Root and version of each volume's newest durable map.
    pub volumes: Vec<VolumeRoot>,
}

/// The state of a volume's block map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRoot {
    /// The volume.
    pub volume: VolumeId,
    /// Merkle root of the map, hex.
    pub root: String,
    /// Its version.
    pub version: u64,
}

// ---------------------------------------------------------------------------------------------- controller -> agent

/// What an agent needs to carry out an order, beside the order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// The operation.
    pub operation: OperationId,
    /// The guest as it must be run. For a thaw the volumes' `base_root` are the frozen contents.
    pub spec: GuestSpec,
    /// The other agent, if two take part.
    pub peer: Option<Peer>,
    /// Permission for both, in text form; see [`crate::ticket`]. Renewed by a repeated order.
    pub ticket: Option<String>,
    /// Where chunks that this cloud lacks can be had.
    pub chunk_sources: Vec<ChunkSource>,
    /// How a migration may go.
    pub migration: MigrationOptions,
    /// For a mirror: how it is kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<MirrorOptions>,
    /// For a stop: how long the guest may take before the plug is pulled; 0 pulls it at once.
    pub grace_ms: u64,
    /// For a thaw: the memory state that is resumed.
    pub frozen: Option<FrozenMemory>,
    /// For a thaw: whether the guest waits for its memory.
    #[serde(default, skip_serializing_if = "ThawWish::is_whole")]
    pub thaw: ThawWish,
}

/// Whether a thawed guest waits for its memory. Who says anything but `whole` keeps what was frozen until nothing of it is missing;
/// controllers of before do not, and say nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThawWish {
    /// It waits until all of it is there.
    #[default]
    Whole,
    /// It runs at once; a host that cannot do that refuses.
    Lazy,
    /// It runs at once where the host can do that.
    Either,
}

impl ThawWish {
    /// Whether all of it must be there first.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        matches!(self, Self::Whole)
    }
}

impl From<Option<ThawMemory>> for ThawWish {
    fn from(memory: Option<ThawMemory>) -> Self {
        match memory {
            None => Self::Either,
            Some(ThawMemory::Lazy) => Self::Lazy,
            Some(ThawMemory::Whole) => Self::Whole,
        }
    }
}

/// The memory and device state of a frozen guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenMemory {
    /// The freeze.
    pub freeze: FreezeId,
    /// Root of its content.
    pub root: String,
    /// Its size.
    pub bytes: u64,
    /// What wrote it, for example `libvirt-qemu/7.2`.
    pub format: String,
}

/// State that the agent takes over, or an order; never answered, repeated where it matters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "directive")]
pub enum Directive {
    /// An order of the ownership protocol.
    Order {
        /// The guest.
        guest: GuestId,
        /// The order.
        order: OrderBody,
        /// What is needed to carry it out: always with `Prepare` and `Begin`, and with `Granted` of a start.
        assignment: Option<Box<Assignment>>,
        /// The newest place in the controller's history: what it says of this cloud's store must not be older.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        mark: Option<HistoryMark>,
    },
    /// The overlay as this host must know it: the JSON of the sdn library's view.
    Overlay {
        /// Store revision from which it was made; older ones are ignored.
        revision: u64,
        /// The view.
        view: serde_json::Value,
    },
    /// A part of a view that is longer than a frame ([`crate::pieces`]).
    OverlayPiece {
        /// As for the whole view.
        revision: u64,
        /// Its number, from 0.
        piece: u32,
        /// How many there are.
        of: u32,
        /// The part of the view's JSON text.
        text: String,
    },
    /// A guest that is ready to change over, and was to wait for the others of its group ([`MigrationOptions::holds`]), need wait no more.
    SwitchOver {
        /// The guest.
        guest: GuestId,
        /// Its move.
        operation: OperationId,
    },
    /// The guest was deleted: remove everything that is held of it, volumes too. Told again until [`Notice::Discarded`].
    Discard {
        /// The guest.
        guest: GuestId,
    },
    /// A freeze was consumed or deleted: its memory state may be removed from this cloud's store.
    DropFreeze {
        /// The freeze.
        freeze: FreezeId,
        /// The project.
        project: ProjectId,
        /// Root of the memory state.
        memory_root: String,
    },
    /// Sweep the cloud's chunk store now. Told only to hosts that have asked [`Query::StoreRoots`]: older ones do not know it.
    SweepStore,
    /// A guest's console. Told only to hosts that said [`Hello::takes_consoles`].
    Console {
        /// By which it is known.
        console: u64,
        /// What is to be done.
        order: ConsoleOrder,
    },
    /// Read everything that a volume here stands on, and mend what can be mended. Told only to hosts that take checks.
    CheckVolume {
        /// The guest.
        guest: GuestId,
        /// Its volume.
        volume: VolumeId,
        /// How fast it may read, in bytes per second.
        bytes_per_s: u64,
    },
    /// Bring what a volume here holds at this moment into the cloud's store. Told only to hosts that take points.
    TakePoint {
        /// The guest.
        guest: GuestId,
        /// Its volume.
        volume: VolumeId,
        /// With the guest's memory at the same instant; said only to hosts that take checkpoints.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        memory: bool,
    },
    /// Measure the ways to these hosts from now on, and to no others ([`Notice::Paths`]). Told only to hosts that measure.
    MeasurePaths {
        /// At most [`MAX_PATH_PEERS`].
        peers: Vec<PathPeer>,
    },
    /// Tell what the switch holds for a port ([`Notice::Flows`]). Told only to hosts that tell flows.
    TellFlows {
        /// By which the answer is known.
        asked: u64,
        /// Whose.
        of: FlowsOf,
    },
}

// ---------------------------------------------------------------------------------------------- agent -> controller

/// What an agent asks of the controller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "query")]
pub enum Query {
    /// The guest asked its metadata service for a token of its own.
    GuestToken {
        /// The guest, known by its switch port.
        guest: GuestId,
        /// Its epoch.
        epoch: Epoch,
    },
    /// The guest asked its metadata service for something about itself.
    GuestCall {
        /// The guest, known by its switch port.
        guest: GuestId,
        /// Its epoch.
        epoch: Epoch,
        /// What.
        call: GuestCall,
    },
    /// Where the chunks of a guest of this host can be had now: what came with its last assignment has aged.
    ChunkSources {
        /// The guest.
        guest: GuestId,
    },
    /// What lives in a project, for the sweep of a cloud's chunk store: one page of it.
    StoreRoots {
        /// The project.
        project: ProjectId,
        /// What the last sweep of this store saw of the controller's history: refused when that does not contain it.
        seen: Option<HistoryMark>,
        /// A host whose sweep did not end: whether it is gone for good is told.
        holder: Option<String>,
        /// The page after this root; absent: the first one.
        after: Option<String>,
        /// More that must be in the history: places of which hosts that use this store have been told.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        also_seen: Vec<HistoryMark>,
        /// More hosts of which it is told whether they are gone for good: those that hold something in this store.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        holders: Vec<String>,
    },
    /// The names in a part of a manifest, for a sweep. Hosts do not have every project's key.
    StoreNames {
        /// The project.
        project: ProjectId,
        /// Which part.
        part: ManifestPart,
        /// The chunk's name, hex.
        name: String,
        /// The sealed chunk, hex; absent: the controller's own copy.
        sealed: Option<String>,
    },
    /// What a sweep did; only told.
    StoreSwept {
        /// What.
        swept: StoreSwept,
    },
    /// What a check of a volume found; only told.
    VolumeChecked {
        /// What.
        checked: VolumeChecked,
    },
    /// A point of a volume was taken, or not; only told.
    PointTaken {
        /// What.
        taken: PointTaken,
    },
    /// May the guest run on here? Asked again and again while a mirror of it is fenced by a lease.
    RenewLease {
        /// The guest.
        guest: GuestId,
        /// Its epoch.
        epoch: Epoch,
        /// What the asker's boot clock shows, in milliseconds: the lease counts from here.
        asked_ms: u64,
        /// How long a lease, in milliseconds.
        lease_ms: u64,
    },
    /// A fresh certificate for a new key.
    RenewCertificate {
        /// PKCS#10, PEM.
        csr_pem: String,
    },
}

/// The controller's answer to a [`Query`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum Answer {
    /// To [`Query::GuestToken`].
    GuestToken {
        /// The secret, for `Authorization: Bearer`.
        secret: String,
        /// Where the API is.
        api_url: String,
        /// The CA that its certificate hangs on, PEM.
        ca_pem: String,
        /// How long it is good, in milliseconds from now; 0: not said. It replaces the guest's token before it.
        #[serde(default)]
        life_ms: u64,
    },
    /// To [`GuestCall::Look`].
    GuestStanding {
        /// How it stands.
        standing: Box<GuestStanding>,
    },
    /// To [`GuestCall::Migrate`] and [`GuestCall::Operation`].
    GuestOperation {
        /// The operation: as it was accepted, or as it is.
        operation: Box<Operation>,
    },
    /// To [`Query::ChunkSources`].
    ChunkSources {
        /// In the order in which they are to be asked, with fresh tickets.
        sources: Vec<ChunkSource>,
    },
    /// To [`Query::StoreRoots`].
    StoreRoots {
        /// The roots of this page, in order.
        roots: Vec<StoreRoot>,
        /// Whether there are more.
        more: bool,
        /// How long the oldest operation has been at work that may be writing content of the project.
        oldest_writer_ms: Option<u64>,
        /// The newest place in the controller's history.
        mark: HistoryMark,
        /// Whether the holder was removed by an operator.
        is_holder_gone: bool,
        /// Of the holders, those that were.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        gone: Vec<String>,
    },
    /// To [`Query::StoreNames`].
    StoreNames {
        /// The names one after the other, hex; absent: there is no such chunk, or it is damaged.
        names: Option<String>,
    },
    /// To [`Query::StoreSwept`], [`Query::VolumeChecked`] and [`Query::PointTaken`].
    Noted,
    /// To [`Query::RenewLease`]: yes.
    Lease {
        /// As it was asked.
        asked_ms: u64,
        /// From then on, in milliseconds.
        lease_ms: u64,
    },
    /// To [`Query::RenewCertificate`].
    Certificate {
        /// PEM.
        certificate_pem: String,
    },
}

/// What travels with a report because the same transaction must hold it, or people want to know it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportDetails {
    /// With `Prepared` and `Running`: the class in which the guest runs there.
    pub compat_class: Option<CompatClass>,
    /// With `RequestSwitch` of a freeze: what lies in the store now.
    pub frozen: Option<FrozenContent>,
    /// With `RequestAbort`: why, in full.
    pub problem: Option<Problem>,
    /// With `Running`, `NothingMissing`, `Released`, `Resumed`: final numbers of this side.
    pub progress: Option<Progress>,
}

/// A freeze as the store holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenContent {
    /// Memory and device state.
    pub memory: FrozenMemory,
    /// The volumes' contents.
    pub volumes: Vec<FrozenVolume>,
}

/// What an agent tells without being asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "notice")]
pub enum Notice {
    /// A report of the ownership protocol; the controller answers with orders.
    Report {
        /// The guest.
        guest: GuestId,
        /// The report.
        report: Report,
        /// What goes with it.
        details: Box<ReportDetails>,
    },
    /// It is well.
    Heartbeat {
        /// What guests and reservations take.
        used: Room,
        /// Every guest of which it holds anything.
        guests: Vec<GuestReport>,
        /// The revision of the overlay view that it has applied.
        view_revision: u64,
        /// What the machine's own metadata say that its provider will do with it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        announced: Option<Announced>,
    },
    /// How far an operation is, at the side that knows; merged by the controller (never backwards).
    Progress {
        /// The operation.
        operation: OperationId,
        /// How far.
        progress: Progress,
    },
    /// A guest did something by itself.
    GuestEvent {
        /// The guest.
        guest: GuestId,
        /// Its epoch.
        epoch: Epoch,
        /// What.
        event: GuestEventKind,
        /// How often since it was told last; an agent of an older version tells each time.
        #[serde(default = "once")]
        times: u32,
    },
    /// Nothing is left here of a deleted guest.
    Discarded {
        /// The guest.
        guest: GuestId,
    },
    /// Of a console that the controller opened.
    Console {
        /// Which.
        console: u64,
        /// What.
        news: ConsoleNews,
    },
    /// The ways to the hosts of the newest [`Directive::MeasurePaths`]; told every ten seconds.
    Paths {
        /// One for each.
        paths: Vec<PathMeasured>,
    },
    /// The answer to a [`Directive::TellFlows`].
    Flows {
        /// Its number.
        asked: u64,
        /// What the switch holds, or why that cannot be told.
        told: Outcome<FlowsTold>,
    },
}

/// What a provider has announced for a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// What.
    pub kind: HostNoticeKind,
    /// When it is carried out, in Unix milliseconds; absent: soon.
    #[serde(default)]
    pub at_ms: Option<u64>,
}

fn once() -> u32 {
    1
}

/// What a guest did by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEventKind {
    /// It powered itself off.
    PoweredOff,
    /// It rebooted (and runs on).
    Rebooted,
    /// Its kernel panicked, or its hypervisor process died.
    Crashed,
    /// A disk stalls.
    DiskStalled,
    /// The disk is back.
    DiskRecovered,
}

#[cfg(test)]
mod tests;
