//! The data plane: agent ↔ agent (and agent → controller for chunks), mTLS, ALPN [`crate::tls::ALPN_DATA`].
//!
//! Each TLS connection is one channel. The dialling side sends one [`Open`] frame, the other answers with one
//! [`Opened`] frame; after an `Ok` the connection belongs to the channel:
//!
//! - `Control`: frames of kind [`kind::HANDOVER`] with [`HandoverMessage`]s, both ways, for the life of a migration;
//! - `Memory`: raw bytes of the hypervisor's migration stream, source to destination (opaque to us); after the switch of a move that has
//!   left memory behind: what fetches that, both ways;
//! - `Volume`: the storage library's peer protocol between the two volume processes, raw to the agents;
//! - `Chunks`: the storage library's chunk protocol.
//!
//! Which side is source and which is destination follows from the ticket, never from who dialled: either end may be the
//! one that can dial.

use serde::{Deserialize, Serialize};
use supercloud_ids::{Epoch, GuestId, OperationId, ProjectId, VolumeId};

use crate::Problem;

/// The version of every payload of this plane.
pub const VERSION: u16 = 1;

/// Frame kinds of the data plane's own frames. Kinds from 256 on belong to the channels' protocols.
pub mod kind {
    #![expect(missing_docs, reason = "named after their payload")]
    pub const OPEN: u16 = 1;
    pub const OPENED: u16 = 2;
    pub const HANDOVER: u16 = 3;
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "channel")]
pub enum Channel {
    /// The handover's own messages.
    Control,
    /// The hypervisor's stream.
    Memory,
    /// Blocks of a volume.
    Volume {
        /// Which.
        volume: VolumeId,
    },
    /// Sealed chunks of a project.
    Chunks {
        /// Which.
        project: ProjectId,
    },
}

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// The permission, in text form.
    pub ticket: String,
    /// What the connection is for.
    pub channel: Channel,
}

/// The answer to an [`Open`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// Why not; absent: go on.
    pub error: Option<Problem>,
}

/// What source and destination say to each other in a migration: only what their hypervisors and volume processes need.
/// Who owns the guest is never said here: that is the controller's alone, by [`supercloud_handover`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "message")]
pub enum HandoverMessage {
    /// Source, once the blocks are ahead: the guest as its hypervisor describes it.
    Begin {
        /// The operation.
        operation: OperationId,
        /// The guest.
        guest: GuestId,
        /// Its epoch e.
        epoch: Epoch,
        /// The back end's own data, base64, at most 256 KiB.
        cookie: String,
    },
    /// Standby of a mirror: the controller has declared the source lost, and yet it is heard; it stops its guest.
    TakesOver,
    /// Source of a mirror: the guest does not run there (any more), and will not before the controller says so.
    StandsStill,
    /// Source, after a move that has left memory behind: its process is gone, and with it what is not fetched yet.
    MemoryGone,
    /// Destination: it still copies blocks ahead; said now and then before `CopiedAhead`.
    Preparing {
        /// Bytes of blocks that have come so far.
        bytes: u64,
    },
    /// Destination: the blocks that the source had are here; the source may begin. Until then its hypervisor has nothing to do
    /// with the move, however long it lasts.
    CopiedAhead,
    /// Destination: the hypervisor waits for the stream.
    Prepared {
        /// The back end's own data, base64.
        cookie: String,
        /// It knows [`HandoverMessage::Draining`]; an older agent would take that for the end of the connection.
        #[serde(default)]
        takes_draining: bool,
    },
    /// Destination: dial me this channel (asked of the side that can dial).
    DialMe {
        /// Which.
        channel: Channel,
    },
    /// Source: the guest has stopped, the last of its memory is on its way; the volumes are sealed when all of it is across.
    Draining,
    /// Source: the guest is paused, memory and device state are across, the volumes are sealed at epoch e.
    Performed {
        /// The back end's own data, base64.
        cookie: String,
        /// Root and version of each sealed map: what the destination must have adopted before it asks for the switch.
        volumes: Vec<crate::link::VolumeRoot>,
        /// When the source paused the guest: milliseconds before this message was sent.
        paused_for_ms: u64,
    },
    /// Destination: the guest runs here; the back end's own data with which the source's hypervisor ends its part.
    Finished {
        /// base64.
        cookie: String,
    },
    /// Either: this side cannot go on with the copy. Decides nothing.
    Failed {
        /// Why.
        problem: Problem,
    },
    /// Either: still there.
    Alive,
    /// What a later version says, and this one can do without.
    #[serde(other)]
    Other,
}
